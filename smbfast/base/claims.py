"""Claims of pieces of work, so that processes that share a folder divide it and none does it twice.

A claim is a lock of a file in the folder: the system releases it however its process ends. It
saves work and decides nothing. What is done is what is there, whole, by its own name
(`smbfast.base.files` renames it there), so work that two processes did both is right as well: where
a file system has no locks, that is what happens.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EACCES, EPERM, EROFS
from functools import cache
from pathlib import Path
from urllib.parse import quote

from smbfast.base.locks import acquire, opened, release, same_file

CLAIMS = ".smbfast.claims"


@contextmanager
def claimed(folder: Path, name: str, *, wait: bool = False) -> Iterator[bool]:
    """Yield whether the work `name` in `folder` is for this block to do.

    Whoever has the claim looks first whether the work is done: another process may have finished it
    and let go. The folder is made if it is missing; nothing of a claim is there after the block.

    Args:
        name: of the work, the same in all processes; any text.
        wait: whether to wait until another process lets go, then to claim it; a process that waits
            for a claim of its own waits without an end.

    Raises:
        OSError: the folder cannot be made.
    """
    file = Path(folder) / CLAIMS / f"{quote(name, safe='')}.lock"
    taken, handle = _taken(file, wait)
    try:
        yield taken
    finally:
        if handle is not None:
            with suppress(OSError):
                os.unlink(file)  # while it is held, so that nobody else's is removed
            release(handle)
            with suppress(OSError):
                file.parent.rmdir()


def clear_claims(folder: Path) -> None:
    """Remove what claims of killed processes have left in a folder, and nothing that is held."""
    for file in sorted((Path(folder) / CLAIMS).glob("*.lock")):
        with suppress(OSError):
            handle = os.open(file, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            if acquire(handle) and same_file(handle, file):
                os.unlink(file)
            release(handle)
    with suppress(OSError):
        (Path(folder) / CLAIMS).rmdir()


def _taken(file: Path, wait: bool) -> tuple[bool, int | None]:
    """Return whether the work is this process's, and the handle of the lock if there is one."""
    while True:
        try:
            handle, _ = opened(file)
        except OSError as error:
            if error.errno in (EROFS, EACCES, EPERM) and file.parent.parent.is_dir():
                return True, None  # who cannot write here may still read
            raise
        got = acquire(handle, wait=wait)
        if got is None:
            os.close(handle)
            with suppress(OSError):  # it claims nothing, and nobody else would remove it
                os.unlink(file)
                file.parent.rmdir()
            _say_no_locks(file.parent.parent)
            return True, None
        if not got:
            os.close(handle)
            return False, None
        if same_file(handle, file):
            return True, handle
        release(handle)  # the one that held it has removed it; there may be a new one


@cache
def _say_no_locks(folder: Path) -> None:
    print(
        f"smbfast: {folder} is on a file system without locks: processes that share it repeat each "
        "other's work",
        file=sys.stderr,
    )
