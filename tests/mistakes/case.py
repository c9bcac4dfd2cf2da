"""One mistake of a user: what is typed, what is wrong with the files, and what must be said.

A case is run by `main(argv)` of its command in a folder of its own, which holds copies of a small
MEDS dataset `meds` and of a finished run `run`. What is said names the thing, what was expected and
what was received; files that were there stay as they are, and nothing half-written is left.
"""

import contextlib
import importlib
import io
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.refusal import no_canary

FOLDERS = ("meds", "run")
# what a run or a command made before it refused, whole: the next start uses it again
CACHES = re.compile(r"(new|shards)/(prepared/|source/|cohort-\d+-\d+/|digests\.json)|run/prepared/")
OURS = re.compile(r"(smbfast|warning:|compare:|python -m smbfast| )")


@dataclass(frozen=True)
class Mistake:
    """A case: `words` of a command, and the three things that its last line must hold."""

    words: str  # the command and its arguments, as a shell reads them
    thing: str
    expected: str
    received: str
    make: Callable[[Path], object] | None = None  # the mistake in the files, made in the folder
    status: int = 1  # 2 for arguments of the smaller commands; 0 where it is warned of alone

    @property
    def name(self) -> str:
        """The words, and what was done to the files."""
        made = getattr(self.make, "__name__", "")
        return f"{self.words} [{made}]" if made else self.words


@dataclass(frozen=True)
class Said:
    """The exit status and what stands on stderr at the end."""

    status: int
    error: str


def mistakes(*rows: tuple) -> tuple[Mistake, ...]:
    """The rows of a table as cases."""
    return tuple(Mistake(*row) for row in rows)


def lay_out(mistake: Mistake, shared: Path, here: Path) -> dict[str, bytes]:
    """Copy what the case needs into its folder and make the mistake; return the files there."""
    for name in FOLDERS:
        if re.search(rf"\b{name}\b", mistake.words) or mistake.make is not None:
            shutil.copytree(shared / name, here / name)
    if mistake.make is not None:
        mistake.make(here)
    return files_of(here)


def run_here(mistake: Mistake) -> Said:
    """Run the command by its `main` in this process and in the current folder."""
    command, *argv = shlex.split(mistake.words)
    out, error, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            importlib.import_module(f"smbfast.{command}").main(argv)
        except SystemExit as stop:  # as the interpreter does: text is printed and is status 1
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            print(stop.code if isinstance(stop.code, str) else "", file=error)
    return Said(status, error.getvalue())


def look(mistake: Mistake, said: Said, before: dict[str, bytes], here: Path) -> None:
    """Fail unless the case is answered as it must be."""
    lines = [line for line in said.error.splitlines() if line.strip()]
    assert said.status == mistake.status, said
    assert lines and all(OURS.match(line) for line in lines), said.error
    no_canary(said.error)
    message = said.error if mistake.status == 0 else _last(lines)
    for word in (mistake.thing, mistake.expected, mistake.received):
        assert word in message, (word, message)
    after = files_of(here)
    changed = [name for name in before if after.get(name) != before[name]]
    assert not [n for n in changed if not _is_own(n)], changed
    left = [name for name in after if name not in before and not CACHES.match(name)]
    assert mistake.status == 0 or not left, left
    assert not [n for n in after if n not in before and ".tmp" in n]


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder that can be read, by its path there."""
    files = (p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def _last(lines: list[str]) -> str:
    """The last line, with those before it if it goes on from them (the list of a difference)."""
    first = max(i for i, line in enumerate(lines) if not line.startswith("  "))
    return "\n".join(lines[first:])


def _is_own(name: str) -> bool:
    """Whether a run may rewrite this file of its own before it refuses to go on."""
    return name == "run/status.json" or bool(CACHES.match(name))
