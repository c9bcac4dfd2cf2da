"""What a kill leaves: a process that ends in the middle of a write."""

import subprocess
import sys
from pathlib import Path

_WRITES = """
import os, sys
from pathlib import Path
from smbfast.base import replace
from smbfast.base.files import committed_folder
rename, exchange = os.rename, replace.exchange
def dies(*args):
    os._exit(9)
def second_rename_dies(one, other):
    (dies if renamed else renamed.append)(one)
    rename(one, other)
renamed = []
if sys.argv[2] == "between":
    replace.exchange, os.rename = lambda one, other: False, second_rename_dies
if sys.argv[2] == "exchanged":
    replace.exchange = lambda one, other: exchange(one, other) and dies()
with committed_folder(Path(sys.argv[1]), replace=True) as folder:
    (folder / "new").write_text("new")
    if sys.argv[2] == "inside":
        dies()
dies()
"""


def killed_in_a_write(path: Path, where: str = "inside") -> None:
    """Leave what a process leaves that is killed while it replaces the folder `path`.

    `where` is "inside" the writing of the new folder, "between" two renames, or when both are
    "exchanged" and the old one is not removed yet.
    """
    done = subprocess.run([sys.executable, "-c", _WRITES, str(path), where], check=False)
    assert done.returncode == 9
