"""Token shards hold the timelines of one MEDS file as flat arrays, memory-mapped when read.

A shard is one file (`smbfast.data.array_file`) with every array of its timelines, one timeline
behind the other, and a table with their offsets. Timelines are appended, so memory use stays
constant. A shard that is not used holds neither memory nor a file descriptor.

Legend: S timelines, B buckets, L lines; the last axis of the table is TABLE.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from smbfast.batch import Timeline
from smbfast.data.array_file import ArrayFile, ArrayWriter, OpenMaps, damaged

LAYOUT = 3  # of the files; a prepared folder with another is refused
SUFFIX = ".shard"
FIELDS: dict[str, type] = {
    "ids_T": np.int32,
    "bucket_end_B": np.int32,
    "bucket_time_B": np.int64,
    "bucket_head_B": np.uint16,
    "line_start_L": np.int32,
    "line_end_L": np.int32,
    "line_time_L": np.int64,
    "line_section_L": np.uint8,
    "line_code_L": np.int32,
}
ABOUT = ("subject", "birth", "header", "last", "terminal")
TABLE = (*ABOUT, "tokens", "buckets", "lines")  # the last three: ends
MOST_MAPS = 64  # of shards at a time, far from the 256 open files of a strict system: our choice
BLOCK = 4096  # timelines that are read together, and as many thousands of lines: our choice

_ARRAYS = {
    "timelines": np.int64,
    "codes": np.uint8,  # a JSON list
    "subjects_K2": np.int64,  # ids of `line_code_L`, each with the number of timelines that have it
    **dict(reversed(FIELDS.items())),  # ids are last, so that reading the header reads none ahead
}
_ONE_OF_EACH = ("ids_T", "bucket_end_B", "line_start_L")
_MAPS = OpenMaps(MOST_MAPS)
_LEFT_OUT = ("ids_T", "line_time_L", "line_code_L")  # of a block
_WITHOUT_IDS = tuple(n for n in FIELDS if n not in _LEFT_OUT)


@dataclass(frozen=True)
class Block:
    """Timelines that lie behind each other, without what neither windows nor cuts follow from.

    Offsets of buckets and lines count tokens from the start of their own timeline.
    """

    first: int  # number of the first timeline in its shard
    about_S5: np.ndarray  # int64: the columns ABOUT of the table
    end_S3: np.ndarray  # int64: tokens, buckets and lines up to the end of each, in the block
    columns: dict[str, np.ndarray]  # the arrays of a Timeline but ids and lines' times and codes

    @classmethod
    def of(cls, timelines: Sequence[Timeline], first: int) -> "Block":
        """Put timelines behind each other; `first` is the number of the first one."""
        sizes = [(len(t), len(t.bucket_end_B), len(t.line_start_L)) for t in timelines]
        about = [[getattr(t, name) for name in ABOUT] for t in timelines]
        columns = {
            n: np.concatenate([np.empty(0, FIELDS[n]), *(getattr(t, n) for t in timelines)])
            for n in _WITHOUT_IDS
        }
        end_S3 = np.array(sizes, np.int64).reshape(-1, 3).cumsum(0)
        return cls(first, np.array(about, np.int64).reshape(-1, len(ABOUT)), end_S3, columns)

    @property
    def birth_S(self) -> np.ndarray:
        """Births, microseconds since 1970 or UNKNOWN, int64 [S]."""
        return self.about_S5[:, 1]

    @property
    def header_S(self) -> np.ndarray:
        """Tokens before the first bucket of each timeline, int64 [S]."""
        return self.about_S5[:, 2]

    @property
    def start_S3(self) -> np.ndarray:
        """Tokens, buckets and lines before each timeline, int64 [S, 3]."""
        return np.concatenate([np.zeros((1, 3), np.int64), self.end_S3[:-1]])

    @property
    def num_S3(self) -> np.ndarray:
        """Tokens, buckets and lines of each timeline, int64 [S, 3]."""
        return np.diff(self.end_S3, axis=0, prepend=np.zeros((1, 3), np.int64))

    def __getitem__(self, item: int) -> Timeline:
        """Return a timeline whose ids are zeros, and whose lines have no times and no codes."""
        starts = self.end_S3[item - 1].tolist() if item else [0, 0, 0]
        spans = dict(zip("TBL", zip(starts, self.end_S3[item].tolist(), strict=True), strict=True))
        arrays: dict[str, Any] = {n: self.columns[n][slice(*spans[n[-1]])] for n in _WITHOUT_IDS}
        num_tokens, num_lines = (spans[axis][1] - spans[axis][0] for axis in "TL")
        about = dict(zip(ABOUT, self.about_S5[item].tolist(), strict=True))
        return Timeline(
            **about,
            ids_T=np.broadcast_to(np.int32(0), num_tokens),  # takes no memory
            line_time_L=np.broadcast_to(np.int64(0), num_lines),
            **arrays,
        )


class _Columns(Mapping[str, np.ndarray]):
    """The arrays of timelines behind each other, each made when it is wanted and not held."""

    def __init__(self, timelines: Sequence[Timeline]) -> None:
        self._timelines = timelines

    def __getitem__(self, name: str) -> np.ndarray:
        parts = [getattr(t, name) for t in self._timelines]
        return np.concatenate(parts) if parts else np.empty(0, FIELDS[name])

    def __iter__(self) -> Iterator[str]:
        return iter(FIELDS)

    def __len__(self) -> int:
        return len(FIELDS)


class ShardWriter:
    """Appends timelines to a shard, which is there once the `with` block has ended without error.

    What is put into `index` goes into its header.
    """

    def __init__(self, path: Path) -> None:
        """Begin a shard; see `ArrayWriter`."""
        self._file = ArrayWriter(path, _ARRAYS)
        self._ends = np.zeros(3, np.int64)
        self.index = self._file.index
        self.index |= {"timelines": 0, "tokens": 0}

    def add(self, *timelines: Timeline) -> None:
        """Append timelines; many at a time cost a fraction of as many calls."""
        sizes = [(len(t.ids_T), len(t.bucket_end_B), len(t.line_start_L)) for t in timelines]
        about = [(t.subject, t.birth, t.header, t.last, t.terminal) for t in timelines]
        self.add_block(
            np.array(about, np.int64).reshape(-1, len(ABOUT)),
            np.array(sizes, np.int64).reshape(-1, 3),
            _Columns(timelines),
        )

    def add_block(
        self, about_S5: np.ndarray, num_S3: np.ndarray, columns: Mapping[str, np.ndarray]
    ) -> None:
        """Append timelines that lie behind each other.

        Args:
            about_S5: int64, the columns ABOUT of the table.
            num_S3: int64, its tokens, buckets and lines.
            columns: every array of a Timeline, of all of them.
        """
        for name in FIELDS:
            self._file.append(name, columns[name])
        end_S3 = self._ends + num_S3.cumsum(0)
        self._file.append("timelines", np.concatenate([about_S5, end_S3], 1))
        self._ends += num_S3.sum(0)
        self.index["timelines"] += len(num_S3)
        self.index["tokens"] = int(self._ends[0])

    def add_codes(self, codes: list[str]) -> None:
        """Write, once, the codes whose places stand in `line_code_L`, if ids do not."""
        if codes:
            self._file.append("codes", np.frombuffer(json.dumps(codes).encode(), np.uint8))

    def add_subjects(self, subjects_K2: np.ndarray) -> None:
        """Write, once, how many timelines have each id of `line_code_L`, int64 [K, 2]."""
        self._file.append("subjects_K2", subjects_K2)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)


class Shard:
    """A finished shard; `shard[i]` is its i-th timeline, read from the map.

    The file is opened when a timeline is wanted, and is closed again when other shards are used.
    """

    def __init__(
        self, path: Path, num_timelines: int | None = None, sha256: str | None = None
    ) -> None:
        """Name a shard; nothing of it is read if the number of its timelines is known.

        Args:
            sha256: what its header must say once it is opened: size and date of a copy may be those
                of another shard.

        Raises:
            ValueError: `num_timelines` is None, and the shard is unfinished.
        """
        self.path, self._expected = path, sha256
        self._num = -1 if num_timelines is None else num_timelines
        if num_timelines is None:
            self._num = self._file.places["timelines"].num // len(TABLE)

    @cached_property
    def _file(self) -> ArrayFile:
        file = ArrayFile.open(self.path)
        have = {name: place.dtype for name, place in file.places.items()}
        if have != {name: np.dtype(dtype) for name, dtype in _ARRAYS.items()}:
            raise damaged(self.path)
        if self._expected not in (None, file.sha256):
            raise ValueError(
                f"{self.path} must have the SHA-256 {self._expected}; it is another file"
            )
        num, over = divmod(file.places["timelines"].num, len(TABLE))
        # the codes of lines may be left out, as `Timeline` has it
        recorded = (n for n in FIELDS if n != "line_code_L" or file.places[n].num)
        sizes = {(name[-1], file.places[name].num) for name in recorded}
        if over or len(sizes) != len("TBL") or self._num not in (-1, num):
            raise damaged(self.path)
        return file

    def _require_within(self, starts: list[int], ends: list[int]) -> None:
        """Raise a ValueError unless spans of tokens, buckets and lines lie in their arrays."""
        places = self._file.places
        for start, end, name in zip(starts, ends, _ONE_OF_EACH, strict=True):
            if not 0 <= start <= end <= places[name].num:
                raise damaged(self.path)

    @property
    def index(self) -> dict[str, Any]:
        """What the writer counted, with `timelines` and `tokens`."""
        index = self._file.index
        if not all(isinstance(index.get(name), int) for name in ("timelines", "tokens")):
            raise damaged(self.path)
        return index

    @property
    def sha256(self) -> str:
        """The hash of the shard, as its header says."""
        return self._file.sha256

    def codes(self) -> list[str]:
        """Return the codes whose places stand in `line_code_L`, read anew; none if ids do."""
        raw = self._whole("codes").tobytes()
        try:
            codes = json.loads(raw) if raw else []
        except (ValueError, RecursionError):
            raise damaged(self.path) from None
        if not (isinstance(codes, list) and all(isinstance(code, str) for code in codes)):
            raise damaged(self.path)
        return codes

    def subjects_of_codes(self) -> np.ndarray:
        """Return ids of `line_code_L` and how many timelines have each, int64 [K, 2], read anew.

        Shards of other splits than train have none.
        """
        flat = self._whole("subjects_K2")
        if len(flat) % 2:
            raise damaged(self.path)
        return flat.reshape(-1, 2)

    def _whole(self, name: str) -> np.ndarray:
        return self._file.read({name: (0, self._file.places[name].num)})[name]

    def verify(self) -> None:
        """Read every byte.

        Raises:
            ValueError: the shard is unfinished or damaged.
        """
        ArrayFile.open(self.path).verify()

    def __len__(self) -> int:
        return self._num

    def __iter__(self) -> Iterator[Timeline]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, item: int) -> Timeline:
        if item >= self._num:
            raise IndexError(item)
        arrays = _MAPS.of(self._file)
        table = arrays["timelines"].reshape(-1, len(TABLE))
        starts = table[item - 1, len(ABOUT) :].tolist() if item else [0, 0, 0]
        row = table[item].tolist()
        about, ends = dict(zip(ABOUT, row, strict=False)), row[len(ABOUT) :]
        self._require_within(starts, ends)
        spans = dict(zip("TBL", zip(starts, ends, strict=True), strict=True))
        fields: dict[str, Any] = {n: arrays[n][slice(*spans[n[-1]])] for n in FIELDS}
        return Timeline(**about, **fields)

    def subjects(self) -> np.ndarray:
        """Return the subject of each timeline, int64 [S], read without opening the shard's map."""
        width = len(TABLE)
        table = self._file.read({"timelines": (0, self._num * width)})["timelines"]
        return table.reshape(-1, width)[:, 0].copy()

    def blocks(self) -> Iterator[Block]:
        """Yield all timelines, a block at a time, read into memory that is bounded.

        A block has up to `BLOCK` timelines, with up to `1000 * BLOCK` lines if it has several.
        """
        first, before_3 = 0, np.zeros(3, np.int64)
        while first < self._num:
            end = min(first + BLOCK, self._num)
            width = len(TABLE)
            rows = self._file.read({"timelines": (first * width, end * width)})
            table = rows["timelines"].reshape(-1, width)
            num = int(np.searchsorted(table[:, -1], before_3[2] + 1000 * BLOCK, side="right"))
            table = table[: max(num, 1)]
            last_3 = table[-1, len(ABOUT) :]
            if (np.diff(table[:, len(ABOUT) :], axis=0, prepend=before_3[None]) < 0).any():
                raise damaged(self.path)
            self._require_within(before_3.tolist(), last_3.tolist())
            spans = dict(
                zip("TBL", zip(before_3.tolist(), last_3.tolist(), strict=True), strict=True)
            )
            columns = self._file.read({n: spans[n[-1]] for n in _WITHOUT_IDS})
            about_S5, end_S3 = np.split(table, [len(ABOUT)], axis=1)
            yield Block(first, about_S5, end_S3 - before_3, columns)
            first, before_3 = first + len(table), last_3
