"""Puts a finished folder in the place of another one, and loses nothing that others put there.

A manifest lists what is ours. The rest (files of others, notes that they have edited) is carried
into the new folder before the two change places, and the old one is then removed file by file.
"""

import ctypes
import hashlib
import json
import os
import shutil
import sys
from contextlib import suppress
from errno import EINVAL, ENOSYS, ENOTSUP, EPERM
from pathlib import Path

MANIFEST = "manifest.json"
RETIRED = "retired"  # in a staging folder: the folder that the new one replaces
GONE = "gone"  # in a staging folder: a folder that is being removed
_OF_TOKENIZERS = ("merges.txt", "vocab.txt")
_HERE, _SWAP = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of linux/fs.h


def is_note(name: str) -> bool:
    """Whether a file is for people, such as a model card, and so outside the manifest."""
    path = Path(name)
    return path.suffix.lower() in (".md", ".txt") and path.name not in _OF_TOKENIZERS


def put(content: Path, path: Path) -> None:
    """Put the sealed folder `content`, which lies in a staging folder, in the place of `path`."""
    if not os.path.lexists(path):
        fsync_folders(content)
        os.rename(content, path)
        fsync(path.parent)
        return
    clash = _carry(path, content)
    fsync_folders(content)
    if clash is not None:
        _set_aside(content, path, clash)
        return
    old = _swap(content, path, content.with_name(RETIRED))
    fsync(path.parent)
    fsync(content.parent)
    with suppress(OSError):  # the new folder is whole; the next write removes the old one
        discard(old, path)


def remove_folder(folder: Path, staging: Path) -> None:
    """Remove a committed folder by way of a staging folder; what others put there stays beside it.

    A folder without a readable manifest is left as it is.
    """
    if _ours(folder) is None:
        return
    os.rename(folder, staging / GONE)
    fsync(folder.parent)  # else a power cut could leave the folder, without its files
    discard(staging / GONE, left_name(folder))


def discard(old: Path, path: Path) -> None:
    """Remove the files that the manifest of `old` lists; what is left of others moves to `path`.

    A folder without a manifest was never finished: all of it is ours.
    """
    ours = _ours(old)
    if ours is None:
        shutil.rmtree(old)
        return
    others = foreign(old)
    for name in ours - {MANIFEST}:
        (old / name).unlink(missing_ok=True)
    for name in others:
        _move(old / name, path / name)
    if others:  # without a manifest, all that is still there would be taken for ours
        fsync_folders(path)
        fsync(old)
    (old / MANIFEST).unlink(missing_ok=True)
    for folder, _, _ in os.walk(old, topdown=False):
        os.rmdir(folder)


def foreign(folder: Path) -> list[str]:
    """Return what a folder holds that its manifest does not list, and notes that were edited.

    Names are relative; folders are named only where they are empty.
    """
    ours = _ours(folder) or set()
    names = []
    for root, folders, files in os.walk(folder):
        links = [f for f in folders if os.path.islink(os.path.join(root, f))]
        for name in [*files, *links] or ([] if folders else [""]):
            relative = os.path.relpath(os.path.join(root, name), folder)
            if relative != "." and os.path.normpath(relative) not in ours:
                names.append(os.path.normpath(relative))
    return sorted(names)


def free_name(path: Path, word: str) -> Path:
    """Return `path.word-1` beside `path`, or the first higher number that is free."""
    number = 1
    while os.path.lexists(path.with_name(f"{path.name}.{word}-{number}")):
        number += 1
    return path.with_name(f"{path.name}.{word}-{number}")


def left_name(path: Path) -> Path:
    """Return `path.left-1`, or the first higher number where nothing lies, for files of others."""
    number = 1
    while True:
        left = path.with_name(f"{path.name}.left-{number}")
        # one that is empty was made by a removal that failed
        if not os.path.lexists(left) or (left.is_dir() and not any(left.iterdir())):
            return left
        number += 1


def make_folder(path: Path, mode: int = 0o777) -> None:
    """Make a folder and what is missing above it, so that they outlive a power cut.

    Raises:
        FileExistsError: if there is a file of that name.
    """
    if path.is_dir():
        return
    if path.parent != path:
        make_folder(path.parent, mode)
    path.mkdir(mode=mode, exist_ok=True)
    try:
        fsync(path.parent)
    except PermissionError:  # one that may be entered and not read
        return
    except OSError:
        with suppress(OSError):
            path.rmdir()  # so that the next attempt does not take it for made
        raise


def fsync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _ours(folder: Path) -> set[str] | None:
    """Return the names that we have written and nobody has edited since; None without manifest.

    Raises:
        OSError: the manifest is there and cannot be read.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = dict(manifest["files"])
        notes = {n: e for n, e in files.items() if is_note(n)} | dict(manifest.get("notes", {}))
        unedited = {n for n, (_, digest) in notes.items() if _is(folder / n, digest)}
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None
    inside = {n for n in files if ".." not in Path(n).parts and not Path(n).is_absolute()}
    return (inside - notes.keys()) | unedited | {MANIFEST}


def _is(file: Path, digest: str) -> bool:
    return file.is_file() and not file.is_symlink() and sha256(file) == digest


def _carry(old: Path, content: Path) -> str | None:
    """Bring what others put into `old` into `content`; or say why that cannot be.

    Files are linked, so that they stay what they are; where links are refused, they are copied.
    """
    if not old.is_dir():
        return "no folder"
    if _ours(old) is None:
        return f"no readable {MANIFEST}" if any(old.iterdir()) else None
    names = foreign(old)
    for name in names:
        if os.path.lexists(content / name) and not is_note(name):
            return f"{name}, which is not ours"
    for name in names:
        target = content / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # a note that we wrote anew and somebody has edited
        link(old / name, target)
    return None


def link(source: Path, target: Path) -> None:
    """Let `target` be the same file, link or folder as `source`, or a copy of it."""
    if source.is_symlink():
        target.symlink_to(os.readlink(source))
    elif source.is_dir():
        target.mkdir(exist_ok=True)
        shutil.copystat(source, target)
    else:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)
            fsync(target)


def _move(source: Path, target: Path) -> None:
    """Move a file of others to `target`, unless it is there already; nothing is overwritten."""
    if source.is_dir() and not source.is_symlink():
        make_folder(target)
        return
    if os.path.lexists(target):
        if _alike(source, target):
            source.unlink()
            return
        target = free_name(target, "earlier")
    make_folder(target.parent)
    os.rename(source, target)


def _alike(one: Path, other: Path) -> bool:
    if one.is_symlink() or other.is_symlink():
        return one.is_symlink() and other.is_symlink() and os.readlink(one) == os.readlink(other)
    return os.path.samefile(one, other) or (other.is_file() and sha256(one) == sha256(other))


def _swap(content: Path, path: Path, free: Path) -> Path:
    """Let both change places; return where the old one is now: at `content` or at `free`.

    Where the system cannot exchange two names at once, there is a moment without `path`; after a
    kill just then, readers find the old folder by `standing`, and the next write puts it back.
    """
    if exchange(content, path):
        return content
    os.rename(path, free)
    try:
        os.rename(content, path)
    except BaseException:
        os.rename(free, path)
        raise
    return free


def _set_aside(content: Path, path: Path, clash: str) -> None:
    """Put `content` in the place of `path`, which is not all ours and stays under another name."""
    aside = free_name(path, "set-aside")
    os.rename(content, aside)
    old = _swap(aside, path, free_name(aside, "old"))
    if old != aside:
        os.rename(old, aside)
    fsync(path.parent)
    print(
        f"smbfast: {path} held {clash}, so it was not replaced: all of it is now {aside}",
        file=sys.stderr,
    )


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names at once; return False where the system cannot.

    Raises:
        OSError: if it can, but not with these.
    """
    call = None
    with suppress(OSError, AttributeError):
        call = ctypes.CDLL(None, use_errno=True).renameat2
    if call is None:
        return False
    if call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _SWAP) == 0:
        return True
    number = ctypes.get_errno()
    if number in (EINVAL, ENOSYS, ENOTSUP, EPERM):
        return False
    raise OSError(number, os.strerror(number), str(other))


def fsync_folders(folder: Path) -> None:
    """Wait until the names of all that is in a folder are on the disk."""
    for root, _, _ in os.walk(folder, topdown=False):
        fsync(Path(root))
