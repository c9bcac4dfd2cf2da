"""Records of a run: one JSON object a line, appended at once, and read back to resume.

A record's key is `stage/item`, that of a stage as a whole `stage`. The latest one of a key counts.
Nothing here needs more than Python: it is read before the wheels are unpacked.
"""

import json
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]
DONE, WRONG, FAILED, KILLED, ABSENT = "done", "wrong", "failed", "killed", "not here"


def append(path: Path, record: Record) -> None:
    """Add a line in a single write, so that no kill leaves half of one behind a later one.

    A line that was cut off, with the machine or its disk, is ended first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        end = os.lseek(descriptor, 0, os.SEEK_END)
        cut = end > 0 and os.pread(descriptor, 1, end - 1) != b"\n"
        os.write(descriptor, (b"\n" if cut else b"") + json.dumps(record).encode() + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(paths: list[Path], rehearsal: str) -> dict[str, Record]:
    """The latest record of each key, of runs of the same kind; lines that were cut off are left."""
    latest: dict[str, Record] = {}
    for path in paths:
        if not path.exists():
            continue
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if record.get("rehearsal", "") == rehearsal and "key" in record:
                latest[record["key"]] = record
    return latest


def without(latest: dict[str, Record], again: list[str]) -> dict[str, Record]:
    """What is left when these keys, all below them, and the marks of their stages are forgotten."""
    stages = {key.partition("/")[0] for key in again}
    return {
        key: record
        for key, record in latest.items()
        if key not in stages and not any(key == a or key.startswith(f"{a}/") for a in again)
    }


def refused(latest: dict[str, Record]) -> dict[str, list[str]]:
    """Backends, by operation, whose item of the stage `ops` is anything but right."""
    backends: dict[str, list[str]] = {}
    for key, record in latest.items():
        parts = key.split("/")
        if parts[0] == "ops" and len(parts) == 3 and record["state"] in (WRONG, FAILED, KILLED):
            backends.setdefault(parts[1], []).append(parts[2])
    return backends
