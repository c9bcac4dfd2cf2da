"""Writes files and folders atomically: after a crash there is the old or the new one, whole.

What is written lies first in a folder of its own beside its target, `NAME.<16 hex digits>.tmp/`,
which nobody else can open and which holds a marker (`smbfast.base.staging`). Then every file is
fsynced, a manifest with sizes and SHA-256 is written last, the folder is fsynced and put in its
place, and its parent is fsynced. Safetensors and parquet files have no checksum of their own, so
readers call `verify_folder` first.

Nothing that was not written here is removed. Notes (`*.md`, `*.txt`) are for people to edit: the
manifest does not vouch for them, and an edited one outlives the folder it lies in, as does any
other file that somebody has put there.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from errno import ENOENT
from pathlib import Path
from typing import Any

from smbfast.base import replace as replacing
from smbfast.base.disk import cannot_write, system_error
from smbfast.base.replace import MANIFEST, fsync, is_note, link, put, sha256
from smbfast.base.staging import staged, standing

__all__ = [
    "MANIFEST",
    "ForeignFormat",
    "cannot_write",
    "committed_file",
    "committed_folder",
    "digest_of",
    "legal",
    "link",
    "read_json",
    "remove_folder",
    "require_files",
    "standing",
    "verify_folder",
    "write_text",
]

FORMAT = 1  # of a manifest


class ForeignFormat(ValueError):
    """A file of a format that another version writes: whole, and not to be read by this one."""


@contextmanager
def committed_folder(path: Path, *, replace: bool = False, private: bool = False) -> Iterator[Path]:
    """Yield a folder to fill; on success it becomes `path` with a manifest, else it is removed.

    Args:
        replace: whether to replace an existing folder, which stays until the new one is whole. What
            others have put into it, and notes that they have edited, are carried into the new one.
            If that is not possible, because a file has the name of a new one, the whole folder is
            set aside under another name, which is said.
        private: whether to make files 0600 and the folder 0700, for data of patients.

    Raises:
        ValueError: if `path` exists and `replace` is false.
        OSError: if a library cannot write, whatever its own error is; it names the file.
    """
    path = _followed(path)
    with staged(path) as staging:
        if os.path.lexists(path) and not replace:
            raise ValueError(f"{path} must not exist yet; remove it or name another folder")
        content = staging / path.name
        with _named(content, path):
            content.mkdir(mode=0o700 if private else 0o777)
            made = content.stat()
            yield content
            if not os.path.samestat(made, content.stat()):  # libraries make a folder that is gone
                raise FileNotFoundError(ENOENT, os.strerror(ENOENT), str(content))
            _seal(content, private)
            put(content, path)


@contextmanager
def committed_file(path: Path, *, private: bool = False) -> Iterator[Path]:
    """Yield a temporary path; on success the file there is fsynced and renamed to `path`.

    Raises:
        OSError: if a library cannot write, whatever its own error is; it names `path`.
    """
    path = _followed(path)
    with staged(path) as staging:
        content = staging / path.name
        with _named(content, path):
            if private:
                os.close(os.open(content, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            yield content
            fsync(content)
            os.rename(content, path)
            fsync(path.parent)


def verify_folder(path: Path) -> dict[str, Any]:
    """Check every file of a committed folder against its manifest and return the manifest.

    Notes are not checked.

    Raises:
        ValueError: if the manifest is missing or names no file, or a file is missing, or its size
            or content differ.
        ForeignFormat: if the manifest has the format of another version.
    """
    path = Path(path)
    try:
        manifest = json.loads(read_regular(path / MANIFEST))
        version = manifest["format"]
        entries = [(name, size, digest) for name, (size, digest) in manifest["files"].items()]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise ValueError(f"{path} must hold a readable {MANIFEST}; it was not finished") from None
    if version != FORMAT:
        raise ForeignFormat(
            f"{path / MANIFEST} has format {version!r}, and this version reads {FORMAT} alone; use "
            "the version that wrote it"
        )
    if not entries:
        raise ValueError(f"{path / MANIFEST} must name the files beside it; it names none")
    for name, size, digest in entries:
        file = path / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise ValueError(f"{path / MANIFEST} names a file outside its folder")
        if is_note(name):  # manifests of earlier versions list them
            continue
        if not file.is_file() or file.stat().st_size != size:
            raise ValueError(f"{file} must hold {size} bytes as its manifest says; it does not")
        if sha256(file) != digest:
            raise ValueError(f"{file} does not match the SHA-256 of its manifest: it is damaged")
    return manifest


def require_files(manifest: dict[str, Any], path: Path, names: Iterable[str]) -> None:
    """Raise a ValueError if a manifest, as `verify_folder` returns it, lacks one of these files."""
    missing = [name for name in names if name not in manifest["files"]]
    if missing:
        raise ValueError(f"{path / MANIFEST} must name {missing[0]}; it does not")


def legal(value: object) -> object:
    """Return what JSON can hold: a number that is not finite becomes null, which readers know."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: legal(inner) for key, inner in value.items()}
    return [legal(inner) for inner in value] if isinstance(value, list | tuple) else value


def read_regular(path: Path) -> str:
    """Return the text of a file; a pipe would never end, and a device neither.

    Raises:
        ValueError: it is no regular file, or not UTF-8.
        OSError: it cannot be read.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"{path} must be a file; it is a folder, a pipe or a device")
    return Path(path).read_text(encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ValueError: if there is none.
    """
    try:
        content = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object; it does not")
    return content


def remove_folder(path: Path) -> None:
    """Remove a committed folder, which is not found by its name from then on.

    Files of others that lie in it stay in `path.left-1`. What cannot be removed now is removed by
    the next write.
    """
    with suppress(OSError), staged(path) as staging:
        replacing.remove_folder(path, staging)


def write_text(path: Path, text: str) -> None:
    """Replace the content of `path` by `text`, atomically."""
    with committed_file(path) as staging:
        staging.write_text(text, encoding="utf-8")


def digest_of(*parts: object) -> str:
    """Return 16 hex digits of the SHA-256 of the JSON of `parts`, the key of a cache folder."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _followed(path: Path) -> Path:
    """Return where a link points to: what is written goes there, and the link stays."""
    path = Path(path)
    return path.resolve() if path.is_symlink() else path


@contextmanager
def _named(content: Path, path: Path) -> Iterator[None]:
    """Let an error of the system name the file by where it would have been."""
    try:
        yield
    except Exception as error:
        known = system_error(error)
        if known is None:
            raise
        name = Path(os.fsdecode(known.filename or content))
        if name.is_relative_to(content):
            name = path / name.relative_to(content)
        raise OSError(known.errno, known.strerror, str(name)) from None


def _seal(folder: Path, private: bool) -> None:
    """Write the manifest, after every file is on the disk."""
    files: dict[str, tuple[int, str]] = {}
    notes: dict[str, tuple[int, str]] = {}
    (folder / MANIFEST).touch(0o600 if private else 0o666)
    # some libraries make files 0600 whatever the umask says
    mode = (folder / MANIFEST).stat().st_mode & 0o777
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        if file == folder / MANIFEST:
            continue
        file.chmod(mode)
        fsync(file)
        name = str(file.relative_to(folder))
        (notes if is_note(name) else files)[name] = (file.stat().st_size, sha256(file))
    manifest = {"format": FORMAT, "files": files} | ({"notes": notes} if notes else {})
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    fsync(folder / MANIFEST)
