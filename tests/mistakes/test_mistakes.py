"""A mistake of a user is answered in one line: the thing, what was expected, what was received."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mistakes.case import Mistake, Said, lay_out, look, run_here
from tests.mistakes.files import DATA, LABELS, RUNS
from tests.mistakes.results import EMBED, OTHERS
from tests.mistakes.typed import RUN, TYPED

REAL = [
    "train Tiny",
    f"{RUN} --optim.batch=large",
    f"{RUN} --data.path=nosuch",
    f"{RUN} --run.dir=meds",
    "check tiny --gpus=0",
    "prepare --path=meds",
    "embed --model=run/final",
    "probe --data=meds",
    "compare nosuch run",
    "report --run=nosuch",
    "tasks mimik --data=meds",
    "simulate --out=c --patients=many",
    "experiment regime --work=w",
]
ALL = (*TYPED, *DATA, *LABELS, *RUNS, *EMBED, *OTHERS)


@pytest.mark.parametrize("mistake", ALL, ids=lambda m: m.name)
def test_a_mistake_is_answered_in_one_line(
    mistake: Mistake, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    before = lay_out(mistake, shared, tmp_path)
    look(mistake, run_here(mistake), before, tmp_path)


@pytest.mark.parametrize("words", REAL)
def test_so_does_the_command(words: str, shared: Path, tmp_path: Path) -> None:
    """As one types it: the process ends with the same status and line, and says nothing else."""
    mistake = next(m for m in ALL if m.words == words)
    before = lay_out(mistake, shared, tmp_path)
    command, *argv = shlex.split(words)
    done = subprocess.run(
        [sys.executable, "-m", f"smbfast.{command}", *argv],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    look(mistake, Said(done.returncode, done.stderr), before, tmp_path)
    assert not done.stdout
