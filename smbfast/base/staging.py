"""Folders beside a target, in which it is written: `NAME.<16 hex digits>.tmp/`, mode 0700.

Such a folder holds a marker, whose lock is held while it is in use, and what is being written, by
the name of the target. After a kill it may also hold what was to be replaced. The next write beside
it clears it; one whose marker does not say yet whose it is, only when it is a minute old. A folder
without our marker is never touched, whatever its name, unless it is empty.
"""

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from smbfast.base.locks import acquire, holder, is_alive, release
from smbfast.base.replace import GONE, RETIRED, discard, left_name, make_folder

MARKER = ".smbfast-writes-here"
_NAME = re.compile(r".+\.[0-9a-f]{16}\.tmp")
_OWN: set[Path] = set()  # of this process, in use
_MADE_BY_THEN = 60.0  # seconds in which a process has surely written its marker: our choice


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`, which is removed at the end; clear those of kills."""
    make_folder(path.parent)
    clear_left(path.parent)
    folder, marker = _made(path)
    try:
        yield folder
    finally:
        with suppress(OSError):  # what cannot be removed is left to the next write
            _clear(folder, path)
        _OWN.discard(folder)
        release(marker)


def clear_left(parent: Path) -> None:
    """Clear what writes that were killed have left in a folder, as the next write there would."""
    for left in _left(parent):
        with suppress(OSError):
            _clear(left, parent / _target(left))


def is_staging(folder: Path) -> bool:
    """Whether a folder was made by `staged`; a kill may have left it empty, before its marker."""
    marker = folder / MARKER
    if _NAME.fullmatch(folder.name) is None or folder.is_symlink() or not folder.is_dir():
        return False
    return (marker.is_file() and not marker.is_symlink()) or _is_empty(folder)


def _is_empty(folder: Path) -> bool:
    try:
        return not os.listdir(folder)
    except OSError:  # its process has removed it
        return True


def standing(path: Path) -> Path:
    """Return `path`, or the folder that a kill between two renames has left in its place."""
    path = Path(path)
    if path.exists() or not path.parent.is_dir():
        return path
    for folder in path.parent.glob("*.tmp"):
        retired = folder / RETIRED
        if is_staging(folder) and _target(folder) == path.name and retired.is_dir():
            return retired
    return path


def _made(path: Path) -> tuple[Path, int]:
    """Make a folder, and lock its marker before it says that it is one."""
    folder = path.with_name(f"{path.name[:200]}.{secrets.token_hex(8)}.tmp")
    os.mkdir(folder, 0o700)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        marker = os.open(folder / MARKER, flags, 0o600)
    except OSError:
        with suppress(OSError):  # the next write clears what stays
            folder.rmdir()
        raise
    _OWN.add(folder)
    acquire(marker, wait=True)
    try:
        os.write(marker, json.dumps({"writes": path.name, **holder()}).encode())
    except OSError:
        with suppress(OSError):
            _remove(folder)
        _OWN.discard(folder)
        release(marker)
        raise
    return folder, marker


def _left(parent: Path) -> Iterator[Path]:
    """Yield the folders of processes that have ended."""
    with suppress(OSError), os.scandir(parent) as entries:
        named = [Path(e.path) for e in entries if _NAME.fullmatch(e.name)]
        for folder in named:
            if folder not in _OWN and is_staging(folder) and _is_dead(folder):
                yield folder


def _is_dead(folder: Path) -> bool:
    """Whether the process has ended that writes in a folder of `staged`."""
    marker = folder / MARKER
    try:
        handle = os.open(marker, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:  # it is being made, or was left before or after its marker was there
        return _is_old(folder)
    except OSError:
        return False
    try:
        got = acquire(handle)
        record = _record(marker)
        if not record:  # being made, or a power cut has left a marker without content
            return got is not False and _is_old(folder)
        return not is_alive(record) if got is None else got  # no locks here: judge by the process
    finally:
        release(handle)


def _is_old(folder: Path) -> bool:
    try:
        return time.time() - folder.stat().st_mtime > _MADE_BY_THEN
    except OSError:  # its process has removed it
        return False


def _record(marker: Path) -> dict:
    try:
        record = json.loads(marker.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("writes"), str) else {}


def _target(folder: Path) -> str:
    return Path(_record(folder / MARKER).get("writes", "")).name or folder.name.rsplit(".", 2)[0]


def _clear(folder: Path, path: Path) -> None:
    """Remove a folder of `staged`; what it holds of others goes to `path`, where it was."""
    retired, gone = folder / RETIRED, folder / GONE
    if retired.is_dir() and not os.path.lexists(path):  # a kill between two renames
        os.rename(retired, path)
    if gone.is_dir():
        discard(gone, left_name(path))
    for old in (retired, folder / path.name):
        if old.is_dir() and path.is_dir():
            discard(old, path)
    _remove(folder)


def _remove(folder: Path) -> None:
    """Remove what was never a finished folder, and the marker last."""
    for entry in list(os.scandir(folder)):
        if entry.name == MARKER:
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)
    (folder / MARKER).unlink(missing_ok=True)
    folder.rmdir()
