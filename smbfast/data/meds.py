"""Reads MEDS folders as plain arrays: whole subjects, sorted by time.

Reads MEDS 0.4 and 0.3 (no `text_value`; extra columns are ignored). The `meds` package names the
splits; the rules that cross rows and files (one file per subject, contiguous, sorted by time, one
split per subject) are checked here, once, and trusted everywhere after.

No error of this file carries a cell: only file, row number, column and type.

Legend: N events, S subjects of a batch (S1 = S + 1 offsets).
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import meds
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smbfast.base.files import digest_of
from smbfast.data.long_texts import gathered, rows_at_once
from smbfast.data.parquet import (
    TEXT,
    column_names,
    is_text,
    open_parquet,
    parquet_buffer,
    read_columns,
    strings,
)
from smbfast.data.splits import SPLITS, find_splits

STATIC: int = int(np.iinfo(np.int64).min)  # the time of an event that has none
BIRTH = meds.birth_code


@dataclass(frozen=True)
class EventBatch:
    """Events of whole subjects, each subject sorted by time with its static events first."""

    subject_N: np.ndarray  # int64
    time_N: np.ndarray  # int64 microseconds since 1970, STATIC where null
    code_N: np.ndarray  # int32 index into `codes`
    value_N: np.ndarray  # float32, nan where there is none
    text_N: np.ndarray  # int32 index into `texts`, -1 where there is none
    codes: list[str]
    texts: list[str]
    offset_S1: np.ndarray  # int64: subject s is rows offset_S1[s]:offset_S1[s + 1]
    nonfinite: int = 0  # values that were NaN or infinite, read as no value

    def rows(self, row_K: np.ndarray, offset_S1: np.ndarray) -> "EventBatch":
        """Return the events `row_K`, cut into subjects (or nodes of subjects) by `offset_S1`."""
        return EventBatch(
            self.subject_N[row_K],
            self.time_N[row_K],
            self.code_N[row_K],
            self.value_N[row_K],
            self.text_N[row_K],
            self.codes,
            self.texts,
            offset_S1,
        )


@dataclass(frozen=True)
class MedsDataset:
    """A MEDS folder whose layout, columns and splits have been checked."""

    path: Path
    splits: dict[str, list[Path]]
    descriptions: Mapping[str, str]
    parents: Mapping[str, list[str]]
    version: str
    split_of: dict[str, np.ndarray] | None = None  # only where folders do not name the splits
    subjects_of: dict[Path, np.ndarray] = field(default_factory=dict)
    buffers: dict[Path, pa.Buffer] = field(default_factory=dict)  # parquet in memory, of tables

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        index: Path | None = None,
        split: tuple[float, float, float] | None = None,
        need_train: bool = True,
    ) -> "MedsDataset":
        """Check a MEDS folder and index its subjects (one pass over `subject_id` alone).

        Args:
            index: a private folder in which the subjects of each file are written once and read by
                later openings; None reads them from the files.
            split: the fractions of train, tuning and held_out of a dataset without splits, whose
                subjects are then divided by a hash of their id.
            need_train: whether the split `train` must have subjects. Without it, subjects whose
                split is not known are in the split "".

        Raises:
            ValueError: the folder is missing or not MEDS, a column is missing or of a wrong type,
                the rows of a subject do not stand together or are in two files or splits, or no
                subject is in the split `train`.
        """
        path = Path(path)
        if not path.is_dir():
            raise ValueError(
                f"{path} must be the folder of a MEDS dataset; there is no such folder"
            )
        if need_train and not (path / "data").is_dir():
            raise ValueError(
                f"{path} must be a MEDS dataset, with data/train/*.parquet; it has no folder data/"
            )
        splits, split_of = find_splits(path, need_train=need_train)
        descriptions, parents = _read_codes(path / "metadata" / "codes.parquet")
        dataset = cls(path, splits, descriptions, parents, _version(path), split_of)
        dataset._index_subjects()
        if need_train and len(dataset.subjects(meds.train_split)) == 0:
            raise ValueError(
                f"{path} must have subjects in its split `{meds.train_split}`; it has none"
            )
        return dataset

    @classmethod
    def of_table(cls, events: pa.Table, codes: pa.Table | None = None) -> "MedsDataset":
        """Return the dataset of one table of events in memory, all in the split ""."""
        file = Path("the table of events")
        names = Path("the table of codes")
        descriptions, parents = (
            ({}, {}) if codes is None else _read_codes(names, parquet_buffer(codes))
        )
        buffers = {file: parquet_buffer(events)}
        dataset = cls(Path(), {"": [file]}, descriptions, parents, "unknown", buffers=buffers)
        dataset._index_subjects()
        return dataset

    def subjects(self, split: str, files: Iterable[Path] | None = None) -> np.ndarray:
        """Return the subject ids of a split, in the order they are read (int64).

        Args:
            files: those of the split that are meant, if not all.
        """
        files = self.splits[split] if files is None else files
        ids = [self._selected(self.subjects_of[f], split) for f in files]
        return np.concatenate(ids) if ids else np.empty(0, np.int64)

    def without_split(self) -> int:
        """Return how many subjects are in none of the three splits, and so never read."""
        everyone = {f: len(ids) for f, ids in self.subjects_of.items()}
        return sum(everyone.values()) - sum(len(self.subjects(s)) for s in SPLITS)

    def digest(self, splits: tuple[str, ...]) -> str:
        """Return a digest of `splits`: of every byte of their files and of what is said of codes
        and splits."""
        parts = [
            (split, str(file.relative_to(self.path)), file_digest(file))
            for split in splits
            for file in self.splits[split]
        ]
        tables = (self.path / "metadata" / n for n in ("codes.parquet", "subject_splits.parquet"))
        return digest_of(parts, [file_digest(t) for t in tables if t.is_file()])

    def num_rows(self, file: Path) -> int:
        """Return the number of rows of a file."""
        return open_parquet(file, self.buffers.get(file)).metadata.num_rows

    def batches(
        self,
        split: str,
        subjects: np.ndarray | None = None,
        *,
        text_chars: int | None = None,
    ) -> Iterator[EventBatch]:
        """Yield all events of a split (of `subjects` only, if given), whole subjects at a time.

        Args:
            text_chars: how many characters of a text will be used. Longer texts may come without
                what `smbfast.data.clean.shortened` does not need; None brings them whole.
        """
        for file in self.splits[split]:
            yield from self.file_batches(file, split, subjects, text_chars=text_chars)

    def file_batches(
        self,
        file: Path,
        split: str,
        subjects: np.ndarray | None = None,
        *,
        text_chars: int | None = None,
    ) -> Iterator[EventBatch]:
        """Yield the events of one file, as `batches` does for all."""
        wanted = self._selected(self.subjects_of[file], split)
        if subjects is not None:
            wanted = np.intersect1d(wanted, subjects)
        if len(wanted) == 0:
            return
        everyone = len(wanted) == len(self.subjects_of[file])
        parquet = open_parquet(file, self.buffers.get(file))
        yield from _read_file(file, parquet, None if everyone else np.sort(wanted), text_chars)

    def _selected(self, ids: np.ndarray, split: str) -> np.ndarray:
        return ids if self.split_of is None else ids[np.isin(ids, self.split_of[split])]

    def _index_subjects(self) -> None:
        seen = np.empty(0, np.int64)
        for files in self.splits.values():
            for file in files:
                if file in self.subjects_of:
                    continue
                ids = _subjects_of(file, open_parquet(file, self.buffers.get(file)))
                both = np.intersect1d(ids, seen)
                if len(both):
                    first = _row_of(file, open_parquet(file), int(both[0]))
                    other = next(f for f, s in self.subjects_of.items() if both[0] in s)
                    raise ValueError(
                        f"{file}: the subject of row {first} must stand in one file and one split "
                        f"only, it also stands in {other} ({len(both)} such subjects)"
                    )
                seen = np.concatenate([seen, ids])
                self.subjects_of[file] = ids


def file_digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _version(path: Path) -> str:
    try:
        return str(json.loads((path / "metadata" / "dataset.json").read_text())["meds_version"])
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"


def _read_codes(
    file: Path, buffer: pa.Buffer | None = None
) -> tuple[dict[str, str], dict[str, list[str]]]:
    if buffer is None and not file.is_file():
        return {}, {}
    table = read_columns(
        file,
        {"code": TEXT, "description": (*TEXT, pa.null(), None)},
        optional={"parent_codes"},
        buffer=buffer,
    )
    nullable = strings(file, table["code"])
    codes = [c for c in nullable if c is not None]
    if len(codes) < len(nullable):
        raise ValueError(f"{file}: row {nullable.index(None)} must have a `code`, it is null")
    descriptions = strings(file, table["description"])
    parents: list = (
        strings(file, table["parent_codes"]) if "parent_codes" in table.column_names else []
    )
    parent_names = (
        [n for n in p if isinstance(n, str)] if isinstance(p, list) else [] for p in parents
    )
    return (
        {c: d for c, d in zip(codes, descriptions, strict=True) if d},
        {c: p for c, p in zip(codes, parent_names, strict=False) if p},
    )


def _check_schema(file: Path, schema: pa.Schema) -> list[str]:
    """Return the columns to read; raise where one is missing or of a type that would lose data."""
    rules = {
        "subject_id": (lambda t: pa.types.is_integer(t) and t != pa.uint64(), "int64"),
        "time": (pa.types.is_timestamp, "timestamp[us]"),
        "code": (is_text, "string"),
        "numeric_value": (lambda t: pa.types.is_floating(t) or pa.types.is_null(t), "float32"),
        "text_value": (lambda t: is_text(t) or pa.types.is_null(t), "string"),
    }
    columns = []
    for name, (accepts, expected) in rules.items():
        if name not in schema.names:
            if name in ("numeric_value", "text_value"):
                continue
            raise ValueError(
                f"{file} must have the MEDS column `{name}`; it has {column_names(schema)}"
            )
        if schema.names.count(name) > 1:
            raise ValueError(
                f"{file} must have the column `{name}` once; it has {column_names(schema)}"
            )
        actual = schema.field(name).type
        if not accepts(actual):
            raise ValueError(f"{file}: column `{name}` must be {expected}, it is {actual}")
        if name == "time" and actual.tz is not None:
            raise ValueError(f"{file}: column `time` must have no time zone, it is {actual}")
        columns.append(name)
    return columns


def _subjects_of(file: Path, parquet: pq.ParquetFile) -> np.ndarray:
    """Return the subjects of a file in order; the rows of each must stand together."""
    _check_schema(file, parquet.schema_arrow)
    runs: list[np.ndarray] = []
    for start, column in _batches(parquet, file, ["subject_id"]):
        if column["subject_id"].null_count:
            row = start + int(np.argmax(column["subject_id"].is_null().to_numpy(False)))
            raise ValueError(f"{file}: row {row} must have a `subject_id`, it is null")
        ids = column["subject_id"].to_numpy().astype(np.int64)
        changed = np.flatnonzero(np.diff(ids)) + 1
        run = ids[np.concatenate([[0], changed])]
        if runs and runs[-1][-1] == run[0]:
            run = run[1:]
        if len(run):
            runs.append(run)
    ids = np.concatenate(runs) if runs else np.empty(0, np.int64)
    unique, count = np.unique(ids, return_counts=True)
    if len(unique) != len(ids):
        row = _row_of(file, parquet, int(unique[np.argmax(count > 1)]), second_run=True)
        raise ValueError(
            f"{file}: all rows of a subject must stand together; "
            f"row {row} goes on with a subject that had ended"
        )
    return ids


def _row_of(file: Path, parquet: pq.ParquetFile, subject: int, *, second_run: bool = False) -> int:
    ids = np.concatenate(
        [b["subject_id"].to_numpy() for _, b in _batches(parquet, file, ["subject_id"])]
    )
    rows = np.flatnonzero(ids == subject)
    gaps = np.flatnonzero(np.diff(rows) > 1)
    return int(rows[gaps[0] + 1] if second_run and len(gaps) else rows[0])


def _batches(
    parquet: pq.ParquetFile, file: Path, columns: list[str]
) -> Iterator[tuple[int, pa.RecordBatch]]:
    row = 0
    try:
        for batch in parquet.iter_batches(rows_at_once(parquet, columns), columns=columns):
            if batch.num_rows:
                yield row, batch
            row += batch.num_rows
    except (pa.ArrowException, OSError):
        raise ValueError(f"{file} is damaged: row {row} and later cannot be read") from None


def _read_file(
    file: Path, parquet: pq.ParquetFile, wanted: np.ndarray | None, text_chars: int | None
) -> Iterator[EventBatch]:
    columns = _check_schema(file, parquet.schema_arrow)
    held: list[pa.Table] = []  # rows of a subject that may go on in the next table
    held_rows = 0
    for start, table in _tables(file, _batches(parquet, file, columns), text_chars):
        ids = table["subject_id"].to_numpy()
        whole = _last_run_start(ids)
        if whole > 0 or (held and held[0]["subject_id"][0].as_py() != ids[0]):
            yield from _decode(file, start - held_rows, [*held, table.slice(0, whole)], wanted)
            held, held_rows = [], 0
        held.append(table.slice(whole))
        held_rows += len(table) - whole
    if held:
        total = parquet.metadata.num_rows
        yield from _decode(file, total - held_rows, held, wanted)


def _tables(
    file: Path, batches: Iterator[tuple[int, pa.RecordBatch]], text_chars: int | None
) -> Iterator[tuple[int, pa.Table]]:
    try:
        yield from gathered(batches, text_chars)
    except pa.ArrowInvalid:
        raise ValueError(f"{file} is damaged: it holds text that is not UTF-8") from None


def _last_run_start(ids: np.ndarray) -> int:
    changed = np.flatnonzero(np.diff(ids))
    return int(changed[-1]) + 1 if len(changed) else 0


def _decode(
    file: Path, start: int, tables: list[pa.Table], wanted: np.ndarray | None
) -> Iterator[EventBatch]:
    """Yield rows of whole subjects as one EventBatch; `start` is the row number of the first."""
    table = pa.concat_tables([t for t in tables if len(t)])
    if table["code"].null_count:
        row = start + int(np.argmax(table["code"].is_null().to_numpy()))
        raise ValueError(f"{file}: row {row} must have a `code`, it is null")
    if wanted is not None:
        keep = np.isin(table["subject_id"].to_numpy(), wanted)
        if not keep.any():
            return
        table = table.filter(pa.array(keep))
    subject_N = table["subject_id"].to_numpy().astype(np.int64)
    time_N = _times(file, start, table["time"])
    edges = np.flatnonzero(np.diff(subject_N)) + 1
    offset_S1 = np.concatenate([[0], edges, [len(subject_N)]])
    order = _static_first(time_N, subject_N)
    if order is not None:
        table, time_N = table.take(pa.array(order)), time_N[order]
    backwards = (time_N[1:] < time_N[:-1]) & (subject_N[1:] == subject_N[:-1])
    if backwards.any():
        row = int(np.argmax(backwards)) + 1
        where = f"row {start + row}" if wanted is None and order is None else "a row"
        raise ValueError(f"{file}: {where} lies before the row above it; sort subjects by time")
    code_N, codes = _encoded(file, table["code"])
    value_N, nonfinite = _values(table)
    if "text_value" in table.column_names and not pa.types.is_null(table["text_value"].type):
        text_N, texts = _encoded(file, table["text_value"])
    else:
        text_N, texts = np.full(len(subject_N), -1, np.int32), []
    yield EventBatch(subject_N, time_N, code_N, value_N, text_N, codes, texts, offset_S1, nonfinite)


def _times(file: Path, start: int, column: pa.ChunkedArray) -> np.ndarray:
    try:
        # nanoseconds may be cut off; seconds must not overflow
        column = column.cast(pa.timestamp("us"), safe=column.type.unit != "ns")
    except pa.ArrowException:
        raise ValueError(f"{file}: `time` near row {start} does not fit timestamp[us]") from None
    null = column.is_null().to_numpy()
    time_N = column.cast(pa.int64()).fill_null(STATIC).to_numpy().copy()
    time_N[null] = STATIC
    return time_N


def _static_first(time_N: np.ndarray, subject_N: np.ndarray) -> np.ndarray | None:
    """Return an order with null times first in each subject; None where they already are.

    Sorting libraries disagree on where nulls go, and MEDS leaves it open.
    """
    late = (time_N[1:] == STATIC) & (time_N[:-1] != STATIC) & (subject_N[1:] == subject_N[:-1])
    if not late.any():
        return None
    run = np.concatenate([[0], np.cumsum(np.diff(subject_N) != 0)])
    return np.lexsort((time_N != STATIC, run))


def _encoded(file: Path, column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """Return strings as (int32 index, distinct values); the index of null is -1."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(pa.large_string())
    encoded = pc.dictionary_encode(column).combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.unify_dictionaries().chunk(0)
    index = encoded.indices.fill_null(-1).to_numpy().astype(np.int32)
    distinct: list = strings(file, encoded.dictionary)  # without null, which has no entry
    return index, distinct


def _values(table: pa.Table) -> tuple[np.ndarray, int]:
    if "numeric_value" not in table.column_names:
        return np.full(len(table), np.nan, np.float32), 0
    column = table["numeric_value"]
    if pa.types.is_null(column.type):
        return np.full(len(table), np.nan, np.float32), 0
    null = column.is_null().to_numpy()
    with np.errstate(over="ignore"):
        value_N = column.to_numpy().astype(np.float32)
    bad = ~np.isfinite(value_N) & ~null
    value_N[bad] = np.nan
    return value_N, int(bad.sum())
