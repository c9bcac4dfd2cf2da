"""Processes that work in one folder at the same time, and what the last of them may clear away.

Each holds the folder's lock as one of several. Its file says what the first of them noted, then
has a `+` for each that came and a `-` for each that failed: one that was killed, stopped or done
has no `-`, so its work is never taken for that of a failure.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from errno import EACCES, EPERM, EROFS
from pathlib import Path
from typing import Any

from smbfast.base.claims import claimed
from smbfast.base.locks import LOCK, acquire, opened, release, same_file


@dataclass
class Together:
    """This process as one of those that work in a folder."""

    folder: Path
    first: bool  # whether nobody was there
    noted: Any  # by the first of them, JSON
    _handle: int | None = None

    def all_failed(self) -> bool:
        """Count this process as failed; whether it is the last one, and all before it failed too.

        If so, nobody else comes in before the `with` block of `together` ends.
        """
        if self._handle is None:
            return False
        self._count(b"-")
        if not acquire(self._handle):
            return False
        members = _content(self._handle)[1]
        return members.count("-") == members.count("+")

    def _count(self, sign: bytes) -> None:
        assert self._handle is not None
        with claimed(self.folder, "members", wait=True):
            os.pwrite(self._handle, sign, os.fstat(self._handle).st_size)


@contextmanager
def together(folder: Path, note: Callable[[], Any]) -> Iterator[Together]:
    """Be one of the processes that work in `folder`, which is made if it is missing.

    The last to leave removes the lock's file, and the folder if it was made and is empty. Where
    there are no locks, or the folder cannot be written, each process is alone and never the last.

    Args:
        note: makes what the first of them notes, as JSON; it is called before others come in.
    """
    folder = Path(folder)
    handle, first, made = _joined(folder, note)
    if handle is None:
        yield Together(folder, first=True, noted=note())
        return
    try:
        group = Together(folder, first, _content(handle)[0].get("noted"), handle)
        group._count(b"m+" if made else b"+")
        yield group
    finally:
        if acquire(handle):  # the last one
            _remove(folder, made="m" in _content(handle)[1])
        release(handle)


def _remove(folder: Path, *, made: bool) -> None:
    """Remove the lock's file, which is held alone, and the folder if it was `made` and is empty.

    The folder goes away at once with the lock in it: a process that came between the two would
    think that the folder had been there, and leave it.
    """
    with suppress(OSError):
        if made and os.listdir(folder) == [LOCK]:
            aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
            folder = folder.rename(aside)
        else:
            made = False
        os.unlink(folder / LOCK)
        if made:
            folder.rmdir()


def _joined(folder: Path, note: Callable[[], Any]) -> tuple[int | None, bool, bool]:
    """Return the handle of the lock that is shared now, whether nobody else had it, and whether
    this process has made the folder."""
    while True:
        try:
            handle, made = opened(folder / LOCK)
        except OSError as error:
            if error.errno in (EROFS, EACCES, EPERM) and folder.is_dir():
                return None, True, False
            raise
        first = acquire(handle)
        if first is None:
            os.close(handle)
            with suppress(OSError):
                os.unlink(folder / LOCK)
            return None, True, made
        if first and same_file(handle, folder / LOCK):
            os.truncate(handle, 0)
            os.pwrite(handle, json.dumps({"noted": note()}).encode() + b"\n", 0)
        acquire(handle, wait=True, shared=True)
        if same_file(handle, folder / LOCK):
            return handle, first, made
        release(handle)  # the last one has removed it


def _content(handle: int) -> tuple[dict, str]:
    """Return what the first one noted, and a sign for each that came or failed."""
    text = os.pread(handle, os.fstat(handle).st_size, 0).decode(errors="replace")
    start, _, members = text.partition("\n")
    try:
        noted = json.loads(start)
    except ValueError:
        noted = None
    return (noted, members) if isinstance(noted, dict) else ({}, "")
