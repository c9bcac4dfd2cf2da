"""Disks that stay full, read-only or away for a while: what is written meanwhile, and afterwards.

As in `tests.reliability.points`, but the trouble goes on from a call until the write has ended.
Afterwards there is room again, and the same write must succeed and leave nothing behind.
"""

import ctypes
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from errno import EFBIG, ENOENT, ENOTDIR
from pathlib import Path

from tests.reliability.faults import ERRORS
from tests.reliability.points import Point, Trials

_REMOUNT, _PAGE = 32, 4096  # MS_REMOUNT of sys/mount.h; bytes
_LIMITS = (1000, 1, 5000, 0, 100, 20_000)  # bytes that a file may have
OUTAGES = (*(f"{name} from then on" for name in ERRORS), "folder gone")
WORDS = [os.strerror(n) for n in (*ERRORS.values(), EFBIG, ENOENT, ENOTDIR)]


class Outages(Trials):
    """Runs trials of one commit."""

    def points(self) -> Iterator[Point]:
        """Trials of every kind at every call."""
        for call in range(1, self.calls + 1):
            for mode in OUTAGES:
                yield Point(self.commit.name, mode, call)

    def run(self, points: list[Point]) -> None:
        """Run trials."""
        for point in points:
            self._fresh()
            gone = point.mode == "folder gone"
            error = None if gone else ERRORS[point.mode.split()[0]]
            with self.faults.at(self.now, point.call, error, goes_on=True):
                done, why = self._attempt()
            if self._journal_failed():
                self._come_back(point.mode, point.call, done)
                self._met(point.mode, point.call, done and not gone, why)

    def real(self, steps: int) -> bool:
        """Write to small file systems and under small limits; whether one could be mounted."""
        for limit in _LIMITS[:steps]:
            self._fresh()
            with _file_size(limit):
                done, why = self._attempt()
            self._met("file size", limit, done, why)
        used = sum(_PAGE * (2 + p.lstat().st_size // _PAGE) for p in self.before.rglob("*"))
        for pages in range(1, 4 * steps, 4):
            shutil.rmtree(self.now, ignore_errors=True)
            self.now.mkdir()
            with _mounted(self.now, used + pages * _PAGE) as grow:
                if grow is None:
                    return False
                shutil.copytree(self.before, self.now, symlinks=True, dirs_exist_ok=True)
                done, why = self._attempt()
                grow()
                self._met("small disk", pages, done, why)
        return True

    def _attempt(self) -> tuple[bool, str]:
        return self.attempt(WORDS)

    def _met(self, mode: str, call: int, done: bool, why: str) -> None:
        if why:
            self._bad(mode, call, why)
        self._judge(mode, call, {2} if done else {self.old, 2})

    def _journal_failed(self) -> bool:
        return "\tfailed\t" in self.faults.journal.read_text()

    def _come_back(self, mode: str, call: int, done: bool) -> None:
        """Put back a folder that was gone; what is done is there or in one made anew."""
        gone = Path(f"{self.now}.gone")
        if not gone.exists():
            return
        made = self._version() if self.now.exists() else 0
        shutil.rmtree(self.now, ignore_errors=True)
        gone.rename(self.now)
        if done and 2 not in (made, self._version()):
            self._bad(mode, call, "it is done, and neither in the folder nor in one made anew")

    def _version(self) -> int:
        with suppress(Exception):
            return self.commit.read(self.now)
        return 0


@contextmanager
def _file_size(limit: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def _mounted(folder: Path, size: int) -> Iterator[Callable[[], object] | None]:
    """Mount a file system of a size in memory; what makes room in it, or None if that is denied."""
    library = ctypes.CDLL(None, use_errno=True)

    def mount(flags: int, size: int) -> bool:
        options = f"size={size}".encode()
        return library.mount(b"t", os.fsencode(folder), b"tmpfs", flags, options) == 0

    if not mount(0, size):
        yield None
        return
    try:
        yield lambda: mount(_REMOUNT, 64 << 20)
    finally:
        library.umount2(os.fsencode(folder), 2)  # MNT_DETACH
