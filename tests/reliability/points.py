"""Fault points: one call of one commit that a process is killed at, or that fails."""

import os
import random
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import NamedTuple

from smbfast.base.entry import entry
from tests.reliability.commit_cases import Commit, holds_of_others
from tests.reliability.faults import ERRORS, Faults, Journal

PROG = "smbfast.train"
KILLS = ("kill", "cut synced", "cut names")
MODES = (*KILLS, "cut after", *ERRORS)
WORDS = [os.strerror(number) for number in ERRORS.values()]
_LONG_AGO = 3600.0  # seconds: a machine that had no power begins again minutes later


class Point(NamedTuple):
    """A trial."""

    commit: str
    mode: str
    call: int


@dataclass
class Trials:
    """Runs trials of one commit, each on a copy of the same folder."""

    faults: Faults
    commit: Commit
    folder: Path
    count: Counter = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.faults.exchanges = self.commit.exchanges
        self.before, self.now = self.folder / "before", self.folder / "now"
        self.before.mkdir()
        self.commit.begin(self.before)
        self.old = 0 if self.commit.from_nothing else 1
        self._fresh()
        with self.faults.at(self.now) as calls:
            self.commit.write(self.now, 2)
        self.calls = calls[0]
        self.after = self._journal()
        if unseen := self.after.explains():
            raise RuntimeError(f"calls of {self.commit.name} are not seen: {unseen[:3]}")
        self._judge("no fault", 0, {2})
        self.count.clear()

    def points(self) -> Iterator[Point]:
        """All trials there are."""
        for call in range(1, self.calls + 1):
            for mode in MODES:
                if mode != "cut after":
                    yield Point(self.commit.name, mode, call)
        for call in (-1, 0, *self.after.unvouched()):
            yield Point(self.commit.name, "cut after", call)

    def telling(self) -> list[Point]:
        """Those where most can go wrong: at each rename, and right after the end."""
        first = [Point(self.commit.name, "cut after", call) for call in (-1, 0)]
        return first + [
            Point(self.commit.name, mode, call)
            for call in self.after.renames
            for mode in ("kill", "cut names", "EIO")
        ]

    def run(self, points: list[Point]) -> None:
        """Run trials; a process is killed once for all that is looked at afterwards."""
        kills: dict[int, list[str]] = {}
        cuts = []
        for point in points:
            if point.mode in KILLS:
                kills.setdefault(point.call, []).append(point.mode)
            elif point.mode == "cut after":
                cuts.append(point.call)
            else:
                self._fail(point.mode, point.call)
        for call, modes in kills.items():
            self._kill(call, modes)
        if cuts:
            self._cut_after(cuts)

    def _fresh(self) -> None:
        shutil.rmtree(self.now, ignore_errors=True)
        shutil.copytree(self.before, self.now, symlinks=True)

    def _journal(self) -> Journal:
        return Journal(self.faults, self.before, self.now)

    def _kill(self, call: int, modes: list[str]) -> None:
        self._fresh()
        self.faults.killed(self.now, call, lambda: self.commit.write(self.now, 2))
        journal = self._journal()
        cut = {m: self._remains(journal, m, m.removeprefix("cut ")) for m in modes if m != "kill"}
        if "kill" in modes:
            self._judge("kill", call, {self.old, 2})
        for mode, remains in cut.items():
            self._become(remains)
            self._judge(mode, call, {self.old, 2})

    def _cut_after(self, calls: list[int]) -> None:
        self._fresh()
        with self.faults.at(self.now):
            self.commit.write(self.now, 2)
        journal = self._journal()
        kinds = {-1: "synced", 0: "names"}
        for call in calls:
            self._remains(journal, str(call), kinds.get(call, "all but"), call)
        for call in calls:
            self._become(self.folder / str(call))
            self._judge("cut after", call, {2})

    def _remains(self, journal: Journal, name: str, kind: str, but: int = 0) -> Path:
        out = self.folder / name
        shutil.rmtree(out, ignore_errors=True)
        return journal.remains(out, kind, but)

    def _become(self, remains: Path) -> None:
        shutil.rmtree(self.now)
        remains.rename(self.now)

    def _fail(self, mode: str, call: int) -> None:
        self._fresh()
        with self.faults.at(self.now, call, ERRORS[mode]):
            done, why = self.attempt(WORDS)
        journal = self._journal()
        if not journal.failed:  # a call that this error is none of
            return
        if why:
            self._bad(mode, call, why)
        if not done:
            self._judge(mode, call, {self.old, 2})
            return
        remains = self._remains(journal, "done", "synced")
        if self._judge(mode, call, {2}):  # it says that it is done: so it outlives a power cut
            self._become(remains)
            self._judge(f"{mode} and a cut", call, {2}, counts=False)

    def attempt(self, known: list[str]) -> tuple[bool, str]:
        """Write as a command does; whether it is done, and what is wrong with how it failed.

        Args:
            known: one of these must be said.
        """
        with redirect_stderr(StringIO()):
            try:
                with entry(PROG):
                    return self.commit.write(self.now, 2) is not False, ""
            except SystemExit as stop:
                words = stop.code
            except BaseException as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                return False, f"a traceback of {type(error).__name__} in {last.name}"
        text = words if isinstance(words, str) else ""
        if text.startswith(f"{PROG}: ") and "\n" not in text and any(k in text for k in known):
            return False, ""
        return False, f"it says {text or words!r}"

    def _judge(self, mode: str, call: int, allowed: set[int], *, counts: bool = True) -> bool:
        """Whether the old or the new version is there, and the next write heals all."""
        if counts:
            self.count[mode] += 1
        why = self._wrong(allowed)
        if why:
            self._bad(mode, call, why)
        return not why

    def _wrong(self, allowed: set[int]) -> str:
        quiet = StringIO()
        with redirect_stderr(quiet):
            try:
                version = self.commit.read(self.now)
                if version not in allowed:
                    return f"version {version} where one of {sorted(allowed)} must be"
            except Exception as error:
                return f"neither version: {type(error).__name__} {str(error)[:120]}"
            if gone := holds_of_others(self.now, self.before):
                return gone[0]
            _age(self.now)
            try:
                self.commit.write(self.now, 3)
                version = self.commit.read(self.now)
            except Exception as error:
                return f"the next write fails: {type(error).__name__} {str(error)[:120]}"
            if version != 3:
                return f"version {version} after the next write"
            try:
                left = self.commit.strange(self.now)
            except ValueError as error:
                left = [str(error)]
            left += holds_of_others(self.now, self.before)
        return f"left after the next write: {', '.join(left[:3])}" if left else ""

    def _bad(self, mode: str, call: int, why: str) -> None:
        why = why.replace(str(self.now), "")
        self.bad.append(f"{self.commit.name}, {mode} at call {call} of {self.calls}: {why}")


def _age(folder: Path) -> None:
    """Let what lies there be of an hour ago: nobody begins again in the same second."""
    then = time.time() - _LONG_AGO
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (then, then), follow_symlinks=False)


def drawn(points: list[Point], num: int, seed: int) -> list[Point]:
    """As many of the points, in their order."""
    if num >= len(points):
        return points
    chosen = random.Random(seed).sample(range(len(points)), num)
    return [points[i] for i in sorted(chosen)]
