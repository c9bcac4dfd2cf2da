"""Remembers which files were read whole: later starts compare size and time of change alone."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from smbfast.base.files import committed_file
from smbfast.base.progress import Progress
from smbfast.data.array_file import ArrayFile

RECORD = "verified.json"


def verify_files(
    folder: Path, files: Mapping[str, str], records: Sequence[Path], *, every: bool = False
) -> None:
    """Read whole each file that was changed since it was last verified, or that never was.

    Args:
        files: name in the folder to SHA-256.
        records: folders of the record of what was verified; the first is written to that can be.
        every: whether to read all of them again.

    Raises:
        ValueError: a file is missing, unfinished or damaged, or another than the one expected.
    """
    verified: dict = {}
    for record in reversed(records):
        verified |= _read(record / RECORD)
    now = _now(folder, files)
    todo = [name for name in files if every or verified.get(name) != now[name]]
    if not todo:
        return
    progress = Progress("smbfast", sum(os.path.getsize(folder / n) for n in todo), "bytes verified")
    for name in todo:
        file = ArrayFile.open(folder / name)
        if file.sha256 != files[name]:
            raise ValueError(f"{file.path} must have the SHA-256 {files[name]}; it is another file")
        file.verify()
        progress.add(file.stamp[0])
    if any(verified.get(name) != now[name] for name in todo):
        _write(records, verified | now)


def note_verified(folder: Path, files: Mapping[str, str], records: Sequence[Path]) -> None:
    """Record files that the caller has verified; the arguments are those of `verify_files`.

    Where no folder of a record can be written, the next start reads these files again.
    """
    _write(records, _read(records[0] / RECORD) | _now(folder, files))


def _write(records: Sequence[Path], content: dict) -> None:
    for record in records:
        try:
            with committed_file(record / RECORD, private=True) as staging:
                staging.write_text(json.dumps(content, indent=0))
        except OSError:
            continue
        return


def _now(folder: Path, files: Mapping[str, str]) -> dict[str, list]:
    """Return bytes, time of the last change and SHA-256 of each file, as the record has them."""
    now = {}
    for name, sha256 in files.items():
        try:
            status = os.stat(folder / name)
        except OSError:
            raise ValueError(f"{folder / name} must be there; it is missing") from None
        now[name] = [status.st_size, status.st_mtime_ns, sha256]
    return now


def _read(file: Path) -> dict:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
