"""One command twice, in two processes that share nothing which nobody seeded."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from tests.reliability import small_runs
from tests.reliability.proof import Work
from tests.reliability.small_runs import Shape

# what two processes of different days, machines and users may see
_ODD = (
    {"PYTHONHASHSEED": "1", "TZ": "UTC", "LC_ALL": "C"},
    {"PYTHONHASHSEED": "2", "TZ": "Asia/Kathmandu", "LC_ALL": "C.UTF-8", "COLUMNS": "200"},
)


def forked_twice(work: Work, shape: Shape) -> list[str]:
    """Run a command in two forked processes; what differs, in words."""
    runs = [work.folder / f"{shape}-{name}" for name in ("once", "twice")]
    begun = [small_runs.begin(_words(work, shape, run), run, world=shape.world) for run in runs]
    bad = []
    for one in begun:
        try:
            small_runs.require_end(one)
        except AssertionError as error:
            bad.append(f"{shape}: {error}")
    return bad or _compared(work, shape, runs)


def started_twice(work: Work, shape: Shape) -> list[str]:
    """Run a command in two new processes, by the words that a user types; what differs."""
    runs = [work.folder / f"{shape}-{name}-anew" for name in ("once", "twice")]
    bad = []
    for run, odd in zip(runs, _ODD, strict=True):
        command = [sys.executable, "-m", "smbfast.train", *_words(work, shape, run)]
        environment = {**os.environ, **odd}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            bad.append(f"{shape} ended with {done.returncode}: {done.stderr[-300:]}")
    return bad or _compared(work, shape, runs)


def _words(work: Work, shape: Shape, run: Path) -> list[str]:
    # each prepares its data itself, but for ranks, which begin with shards
    return small_runs.words_of(work.folder, replace(shape, prepares=shape.world == 1), run)


def _compared(work: Work, shape: Shape, runs: list[Path]) -> list[str]:
    bad = small_runs.differences(*runs)
    if shape.world == 1:
        bad += small_runs.different_files(*(run / "prepared" for run in runs))
    work.say(f"{shape}: {len(bad)} bad")
    for run in runs:
        shutil.rmtree(run)
    return [f"{shape}: {text}" for text in bad]
