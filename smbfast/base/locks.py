"""A lock on a folder that one process writes, which says who holds it.

The lock is `flock` of a file in the folder: the system releases it however the process ends, so a
lock that a kill has left behind never blocks. Processes that are forked or spawned do not hold it.
Where a file system has no such locks, that is said and the work goes on.
"""

import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from errno import EACCES, EAGAIN, EPERM, EROFS, EWOULDBLOCK
from itertools import count
from pathlib import Path

from smbfast.base.replace import fsync

LOCK = ".smbfast.lock"
_PATIENCE = 1.0  # seconds that a lock of a process that has ended is waited for
_ATTEMPTS = 1000  # each fails only if another process has removed the folder in between
_OPEN = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_HELD: set[int] = set()  # handles of the locks of this process


def _forget() -> None:
    """Close the handles that a forked process inherits; the lock stays with its parent."""
    for handle in _HELD:
        with suppress(OSError):
            os.close(handle)
    _HELD.clear()


os.register_at_fork(after_in_child=_forget)


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Hold the lock of `folder`, which is made if it is missing, while the block runs.

    The lock's file is removed at the end, and so is a folder that was made and is still empty.

    Args:
        what: the command that holds it, for the message of another one.

    Raises:
        ValueError: if another process holds it, which is named with its host and start.
    """
    folder = Path(folder)
    made = not folder.exists()
    handle = _taken(folder, what)
    try:
        yield
    finally:
        if handle is not None:
            with suppress(OSError):
                os.unlink(folder / LOCK)  # while it is held, so that nobody else's is removed
            release(handle)
        if made:
            with suppress(OSError):
                folder.rmdir()


def acquire(handle: int, *, wait: bool = False, shared: bool = False) -> bool | None:
    """Lock an open file: True if this process has it now, False if another one has it.

    None stands for a file system that has no locks. A lock that the handle had is given up first.

    Args:
        shared: whether others may have it too, if they share it.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(handle, kind | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        return False if error.errno in (EWOULDBLOCK, EAGAIN, EACCES) else None
    _HELD.add(handle)
    return True


def release(handle: int) -> None:
    """Close a handle, and so release its lock."""
    _HELD.discard(handle)
    with suppress(OSError):
        os.close(handle)


def same_file(handle: int, file: Path) -> bool:
    """Whether an open file is still the one of that name; one that is gone is not."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(file, follow_symlinks=False))
    except OSError:
        return False


def holder() -> dict[str, object]:
    """Return what a lock says of the process that holds it; never who started it."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": now}


def is_alive(record: dict) -> bool:
    """Whether the process of a `holder` record may be at work; one of another host may be."""
    if record.get("host") != socket.gethostname():
        return True
    try:
        os.kill(int(record["pid"]), 0)
    except PermissionError:
        return True
    except (OSError, KeyError, TypeError, ValueError, OverflowError):
        return False
    return True


def opened(file: Path) -> tuple[int, bool]:
    """Return the handle of a file to lock, made if it is missing, and whether its folder was made.

    Whoever has made the folder may remove it at any moment; then it is made again, for this user
    alone, with what is missing above it.

    Raises:
        OSError: it cannot be opened.
    """
    for attempt in count():
        try:
            made = _make_private(file.parent)
            return os.open(file, _OPEN, 0o600), made
        except FileNotFoundError:
            if attempt == _ATTEMPTS:  # such as a link to a folder that is not there
                raise
    raise AssertionError  # unreachable


def _make_private(folder: Path) -> bool:
    """Make a folder and what is missing above it, if it is not there; whether it was made."""
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        return False
    except FileNotFoundError:
        if _make_private(folder.parent):
            return _make_private(folder)
        raise  # it is there now, or is a link to nothing
    with suppress(OSError):  # a parent that cannot be read
        fsync(folder.parent)
    return True


def _taken(folder: Path, what: str) -> int | None:
    """Return the handle of the lock; None where there are no locks, or nothing can be written."""
    file, patience = folder / LOCK, time.monotonic() + _PATIENCE
    while True:
        try:
            handle, _ = opened(file)
        except OSError as error:
            if error.errno in (EROFS, EACCES, EPERM) and folder.is_dir():
                return None  # to read a folder that nobody can write is harmless
            raise
        got = acquire(handle)
        if got is False:
            shown, left = _shown(handle), _is_left(handle)
            os.close(handle)
            if left and time.monotonic() < patience:
                time.sleep(0.02)
                continue
            raise ValueError(
                f"{folder} is in use by {shown}; wait for it, stop it, or name another folder"
            )
        if got is None:
            print(
                f"smbfast: {folder} is on a file system without locks; start nothing else that "
                "writes there",
                file=sys.stderr,
            )
            os.close(handle)
            with suppress(OSError):
                os.unlink(file)
            return None
        if same_file(handle, file):
            os.truncate(handle, 0)
            os.pwrite(handle, json.dumps({"command": what, **holder()}).encode(), 0)
            return handle
        release(handle)  # the one that held it has removed it; there may be a new one


def _is_left(handle: int) -> bool:
    """Whether the process that took a lock has ended: one that it forked lets go in a moment."""
    try:
        return not is_alive(json.loads(os.pread(handle, 4096, 0)))
    except (OSError, ValueError, AttributeError):
        return False


def _shown(handle: int) -> str:
    """Say who holds a lock; it writes that just after it has taken it."""
    for _ in range(20):
        try:
            record = json.loads(os.pread(handle, 4096, 0))
            return (
                f"{record['command']} since {record['since']} "
                f"(process {record['pid']} on {record['host']})"
            )
        except (OSError, ValueError, KeyError, TypeError):
            time.sleep(0.01)
    return "another process"
