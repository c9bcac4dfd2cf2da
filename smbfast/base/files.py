"""Writes files and folders atomically: after a crash there is the old or the new one, whole.

A folder is written into `name.tmp/`. Then every file is fsynced, a manifest with sizes and SHA-256
is written last, the folder is fsynced and renamed, and its parent is fsynced. Safetensors and
parquet files have no checksum of their own, so readers call `verify_folder` first.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 1  # of a manifest


class ForeignFormat(ValueError):
    """A file of a format that another version writes: whole, and not to be read by this one."""


@contextmanager
def committed_folder(path: Path, *, replace: bool = False, private: bool = False) -> Iterator[Path]:
    """Yield `path.tmp/`; on success it becomes `path` with a manifest, on failure it is removed.

    Args:
        replace: whether to replace an existing folder, which stays until the new one is whole.
        private: whether to make files 0600 and the folder 0700, for data of patients.

    Raises:
        ValueError: if `path` exists and `replace` is false.
    """
    path = Path(path)
    retired = path.with_name(path.name + ".old")
    if retired.exists() and not path.exists():  # a crash between the two renames below
        os.rename(retired, path)
    if path.exists() and not replace:
        raise ValueError(f"{path} must not exist yet; remove it or name another folder")
    staging = path.with_name(path.name + ".tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True, mode=0o700 if private else 0o777)
    try:
        yield staging
        _seal(staging, private)
        if path.exists():
            shutil.rmtree(retired, ignore_errors=True)
            os.rename(path, retired)
            os.rename(staging, path)
            shutil.rmtree(retired, ignore_errors=True)
        else:
            os.rename(staging, path)
        _fsync(path.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def committed_file(path: Path, *, private: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is fsynced and renamed over `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(path.name + ".tmp")
    try:
        if private:
            staging.touch(0o600)
        yield staging
        _fsync(staging)
        os.rename(staging, path)
        _fsync(path.parent)
    finally:
        staging.unlink(missing_ok=True)


def verify_folder(path: Path) -> dict[str, Any]:
    """Check every file of a committed folder against its manifest and return the manifest.

    Raises:
        ValueError: if the manifest is missing or names no file, or a file is missing, or its size
            or content differ.
        ForeignFormat: if the manifest has the format of another version.
    """
    path = Path(path)
    try:
        manifest = json.loads((path / MANIFEST).read_text())
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
        if not file.is_file() or file.stat().st_size != size:
            raise ValueError(f"{file} must hold {size} bytes as its manifest says; it does not")
        if _sha256(file) != digest:
            raise ValueError(f"{file} does not match the SHA-256 of its manifest: it is damaged")
    return manifest


def require_files(manifest: dict[str, Any], path: Path, names: Iterable[str]) -> None:
    """Raise a ValueError if a manifest, as `verify_folder` returns it, lacks one of these files."""
    missing = [name for name in names if name not in manifest["files"]]
    if missing:
        raise ValueError(f"{path / MANIFEST} must name {missing[0]}; it does not")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ValueError: if there is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object; it does not")
    return content


def cannot_write(error: OSError) -> str:
    """Return the reason and the file of an operating system's error, for a message."""
    return f"{error.strerror or type(error).__name__}: {error.filename or 'a file'}"


def write_text(path: Path, text: str) -> None:
    """Replace the content of `path` by `text`, atomically."""
    with committed_file(path) as staging:
        staging.write_text(text, encoding="utf-8")


def digest_of(*parts: object) -> str:
    """Return 16 hex digits of the SHA-256 of the JSON of `parts`, the key of a cache folder."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _seal(folder: Path, private: bool) -> None:
    files = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        if private:
            file.chmod(0o600)
        _fsync(file)
        files[str(file.relative_to(folder))] = (file.stat().st_size, _sha256(file))
    (folder / MANIFEST).touch(0o600 if private else 0o666)
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1))
    _fsync(folder / MANIFEST)
    for sub in [p for p in folder.rglob("*") if p.is_dir()]:
        _fsync(sub)
    _fsync(folder)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
