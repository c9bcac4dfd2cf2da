"""Token shards hold the timelines of one MEDS file as flat arrays, memory-mapped when read.

A shard is a committed folder: `<field>.bin` for every array of a Timeline, `timelines.bin` with the
offsets, `index.json` with dtypes and counts. Timelines are appended, so memory use stays constant.

Legend: S timelines; the last axis of `timelines.bin` is TABLE.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from smbfast.base.files import verify_folder
from smbfast.batch import Timeline

FIELDS: dict[str, type] = {
    "ids_T": np.int32,
    "bucket_end_B": np.int32,
    "bucket_time_B": np.int64,
    "bucket_head_B": np.uint16,
    "line_start_L": np.int32,
    "line_end_L": np.int32,
    "line_time_L": np.int64,
    "line_section_L": np.uint8,
}
TABLE = ("subject", "birth", "header", "tokens", "buckets", "lines")  # the last three: ends


class ShardWriter:
    """Appends timelines to a folder that is being committed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = {name: open(folder / f"{name}.bin", "wb") for name in FIELDS}  # noqa: SIM115
        self._table: list[tuple[int, ...]] = []
        self._ends = np.zeros(3, np.int64)

    def add(self, timeline: Timeline) -> None:
        """Append one timeline."""
        for name, dtype in FIELDS.items():
            self._files[name].write(np.ascontiguousarray(getattr(timeline, name), dtype).tobytes())
        self._ends += (len(timeline), len(timeline.bucket_end_B), len(timeline.line_start_L))
        scalars = (timeline.subject, timeline.birth, timeline.header)
        self._table.append((*scalars, *self._ends.tolist()))

    def close(self, **index: object) -> None:
        """Finish the files; `index` goes into `index.json`."""
        for file in self._files.values():
            file.close()
        table = np.array(self._table, np.int64).reshape(-1, len(TABLE))
        (self._folder / "timelines.bin").write_bytes(table.tobytes())
        content = {"timelines": len(table), "tokens": int(self._ends[0]), **index}
        (self._folder / "index.json").write_text(json.dumps(content))


class Shard:
    """A finished shard; `shard[i]` is its i-th timeline, read from the map."""

    def __init__(self, folder: Path) -> None:
        """Map a shard after its sizes and hashes were checked.

        Raises:
            ValueError: the shard is unfinished or damaged.
        """
        verify_folder(folder)
        self.folder = folder
        self.index = json.loads((folder / "index.json").read_text())
        table = np.frombuffer((folder / "timelines.bin").read_bytes(), np.int64)
        self.table = table.reshape(-1, len(TABLE))
        self._maps = {n: _mapped(folder / f"{n}.bin", dtype) for n, dtype in FIELDS.items()}

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[Timeline]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, item: int) -> Timeline:
        if item >= len(self.table):
            raise IndexError(item)
        starts = self.table[item - 1, 3:] if item else np.zeros(3, np.int64)
        subject, birth, header, *ends = self.table[item].tolist()
        spans = dict(zip("TBL", zip(starts.tolist(), ends, strict=True), strict=True))
        arrays: dict[str, Any] = {n: self._maps[n][slice(*spans[n[-1]])] for n in FIELDS}
        return Timeline(subject=subject, birth=birth, header=header, **arrays)


def _mapped(file: Path, dtype: type) -> np.ndarray:
    # a plain array over the map, whose slices cost a tenth of those of a memmap
    return np.asarray(np.memmap(file, dtype, "r")) if file.stat().st_size else np.empty(0, dtype)
