"""Reads MEDS folders as plain arrays: whole subjects, sorted by time.

Reads MEDS 0.4 and 0.3 (no `text_value`; extra columns are ignored). The `meds` package names the
splits; the rules that cross rows and files (one file per subject, contiguous, sorted by time, one
split per subject) are checked here, once, and trusted everywhere after.

No error of this file carries a cell: only file, row number, column and type.

Legend: N events, S subjects of a batch (S1 = S + 1 offsets).
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import meds
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smbfast.base.counts import few
from smbfast.base.files import digest_of
from smbfast.data.code_table import CodeTable
from smbfast.data.columns import event_columns, with_subject_id
from smbfast.data.long_texts import gathered, rows_at_once
from smbfast.data.parquet import open_parquet, parquet_buffer, strings
from smbfast.data.source_index import SourceIndex, Stamp, file_digest, read_subjects, stamp
from smbfast.data.splits import (
    SPLITS,
    UNKNOWN,
    Fractions,
    find_files,
    refuse_contradiction,
    splits_of,
)
from smbfast.settings import require_meds_folder

STATIC: int = int(np.iinfo(np.int64).min)  # the time of an event that has none
MOST_TIME = 1 << 62  # microseconds from 1970: of less, a difference and a bucket never wrap
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

    def with_codes_of_its_events(self) -> "EventBatch":
        """Return the same events with `codes` that name theirs alone, in the order of before.

        What goes through all codes of a file is then as fast as the events are few.
        """
        used_C = np.zeros(len(self.codes), bool)
        used_C[self.code_N] = True
        place_C = np.cumsum(used_C, dtype=np.int32) - np.int32(1)
        codes = [self.codes[c] for c in np.flatnonzero(used_C).tolist()]
        return replace(self, code_N=place_C[self.code_N], codes=codes)


@dataclass(frozen=True)
class MedsDataset:
    """A MEDS folder, or a table in memory, whose layout, columns and splits have been checked.

    `splits` has the files of each split; where folders do not name the splits, each has all files.
    `descriptions` and `parents` are read from codes.parquet, by code.
    """

    path: Path
    splits: dict[str, list[Path]]
    descriptions: Mapping[str, str]
    parents: Mapping[str, list[str]]
    version: str
    fractions: Fractions | None  # of train, tuning and held_out, where a hash divides the subjects
    _source: SourceIndex
    _split_S: np.ndarray | None  # int8, place in (*SPLITS, UNKNOWN); None where files say it
    _buffers: dict[Path, pa.Buffer]  # parquet in memory, of tables
    _codes: CodeTable | None = None  # of tables
    num_unread: int = 0  # parquet files that lie in the folder of no split and are not read

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        index: Path | None = None,
        split: Fractions | None = None,
        need_train: bool = True,
    ) -> "MedsDataset":
        """Check a MEDS folder and index its subjects (one pass over `subject_id` alone).

        Args:
            index: a private folder in which the subjects, rows and SHA-256 of each file and the
                table of codes are written once, and from which they are read as long as the files
                do not change. None reads them from the files.
            split: the fractions of train, tuning and held_out of a dataset without splits, whose
                subjects are then divided by a hash of their ids (see `smbfast.data.splits`).
            need_train: whether there must be splits, and subjects in `train`. Without it, files may
                lie in `path` itself, and subjects of no known split are in the split "".

        Raises:
            ValueError: the folder is missing or not MEDS, a column is missing or of a wrong type,
                the rows of a subject do not stand together or are in two files or splits, folders
                and table of splits contradict each other, a code has two descriptions, or no
                subject is in the split `train`.
        """
        path = Path(path)
        require_meds_folder(path)
        if need_train and not (path / "data").is_dir():
            raise ValueError(
                f"{path} must be a MEDS dataset, with data/train/*.parquet; it has no folder data/"
            )
        layout = find_files(path, split, need_train=need_train)
        codes = CodeTable.open(path / "metadata" / "codes.parquet", index)
        files = list(dict.fromkeys(file for own in layout.files.values() for file in own))
        source = SourceIndex.open(path, files, index)
        spans = {s: [source.span(file) for file in own] for s, own in layout.files.items()}
        refuse_contradiction(layout, spans, source.subject_S)
        dataset = cls(
            path,
            layout.files,
            codes.descriptions,
            codes.parents,
            _version(path),
            layout.fractions,
            source,
            splits_of(layout, source.subject_S),
            {},
            num_unread=layout.num_unread,
        )
        if need_train and len(dataset.subjects(meds.train_split)) == 0:
            raise ValueError(
                f"{path} must have subjects in its split `{meds.train_split}`; it has none"
            )
        return dataset

    @classmethod
    def of_table(cls, events: pa.Table, codes: pa.Table | CodeTable | None = None) -> "MedsDataset":
        """Return the dataset of one table of events in memory, all in the split "".

        Args:
            events: with the columns and the order of rows of a MEDS file of events.
            codes: with the columns of codes.parquet, or what was read from such a table.

        Raises:
            ValueError: as `open`.
        """
        file = Path("the table of events")
        buffer = parquet_buffer(events)
        ids, num_rows = read_subjects(file, open_parquet(file, buffer))
        source = SourceIndex.of_parts(Path(), [file], [ids], [num_rows])
        if not isinstance(codes, CodeTable):
            codes = CodeTable.of_table(codes, Path("the table of codes"))
        splits = {UNKNOWN: [file]}
        known = codes.descriptions, codes.parents
        return cls(Path(), splits, *known, "unknown", None, source, None, {file: buffer}, codes)

    def subjects(self, split: str, files: Iterable[Path] | None = None) -> np.ndarray:
        """Return the subject ids of a split, in the order they are read (int64).

        Args:
            files: those of the split that are meant, if not all.
        """
        files = self.splits[split] if files is None else files
        ids = [self._subjects(file, split) for file in files]
        return np.concatenate(ids) if ids else np.empty(0, np.int64)

    def without_split(self) -> int:
        """Return how many subjects of the files are in none of the three splits."""
        known = sum(len(self.subjects(s)) for s in SPLITS if s in self.splits)
        return len(self._source.subject_S) - known

    def num_rows(self, file: Path) -> int:
        """Return the number of rows of a file, which is not opened for it."""
        return self._source.rows[self._source.place[file]]

    def stamp(self, file: Path) -> Stamp:
        """Return size, mtime and ctime of a file when the dataset was opened."""
        return self._source.stamps[self._source.place[file]]

    def state(self) -> str:
        """Return a digest that tells this data from other data: of size and times of every file
        that is read, as they were opened, and of the bytes of a table in memory."""
        if self._codes is not None:
            digests = [sha256(buffer).hexdigest() for buffer in self._buffers.values()]
            return digest_of(digests, self._codes.digest)
        files = dict.fromkeys(file for own in self.splits.values() for file in own)
        codes = self.path / "metadata" / "codes.parquet"
        return digest_of(
            [(file.relative_to(self.path).as_posix(), self.stamp(file)) for file in files],
            stamp(codes) if codes.is_file() else None,
        )

    def require_unchanged(self, files: Iterable[Path]) -> None:
        """Refuse files that are not those whose subjects and bytes were read when it was opened.

        Raises:
            ValueError: a file has changed since.
        """
        for file in files:
            if file not in self._buffers:
                self._source.require_unchanged(file)

    @property
    def where(self) -> tuple[Path, Path | None, Fractions | None]:
        """What another process opens the dataset with (see `again`)."""
        index = self._source.folder
        return self.path.absolute(), index.absolute() if index else None, self.fractions

    @classmethod
    def again(cls, where: tuple[Path, Path | None, Fractions | None]) -> "MedsDataset":
        """Open a dataset that another process has opened, from `where`."""
        path, index, split = where
        return cls.open(path, index=index, split=split)

    def digest(self, splits: Iterable[str]) -> str:
        """Return a digest of every byte of the files of `splits`, and of what is said of codes and
        splits. The SHA-256 of a file is computed once where there is an index.

        Raises:
            ValueError: a file has changed since the dataset was opened.
        """
        parts = []
        for split in splits:
            files = self.splits[split]
            names = [file.relative_to(self.path).as_posix() for file in files]
            parts.append((split, names, self._source.digests_of(files)))
        tables = (self.path / "metadata" / n for n in ("codes.parquet", "subject_splits.parquet"))
        said = [file_digest(table) if table.is_file() else None for table in tables]
        return digest_of(parts, said, self.fractions)

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
        asked = None if subjects is None else np.unique(subjects)
        for file in self.splits[split]:
            yield from self._file_batches(file, split, asked, text_chars)

    def file_batches(
        self,
        file: Path,
        split: str,
        subjects: np.ndarray | None = None,
        *,
        text_chars: int | None = None,
    ) -> Iterator[EventBatch]:
        """Yield the events of one file, as `batches` does for all."""
        asked = None if subjects is None else np.unique(subjects)
        yield from self._file_batches(file, split, asked, text_chars)

    def _file_batches(
        self, file: Path, split: str, asked: np.ndarray | None, text_chars: int | None
    ) -> Iterator[EventBatch]:
        wanted = self._subjects(file, split)
        if asked is not None:
            # one search in sorted ids: a pass over all that are asked for, of each file, is
            # quadratic
            at = np.searchsorted(asked, wanted)
            wanted = (
                wanted[asked[np.minimum(at, len(asked) - 1)] == wanted] if len(asked) else at[:0]
            )
        if len(wanted) == 0:
            return
        span = self._source.span(file)
        everyone = len(wanted) == span.stop - span.start
        self.require_unchanged([file])
        parquet = open_parquet(file, self._buffers.get(file))
        yield from _read_file(file, parquet, None if everyone else np.sort(wanted), text_chars)
        self.require_unchanged([file])

    def _subjects(self, file: Path, split: str) -> np.ndarray:
        span = self._source.span(file)
        ids = self._source.subject_S[span]
        if self._split_S is None:
            return ids
        return ids[self._split_S[span] == (*SPLITS, UNKNOWN).index(split)]


def _version(path: Path) -> str:
    try:
        return str(json.loads((path / "metadata" / "dataset.json").read_text())["meds_version"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "unknown"


def _batches(
    parquet: pq.ParquetFile, file: Path, columns: list[str]
) -> Iterator[tuple[int, pa.RecordBatch]]:
    row = 0
    try:
        for batch in parquet.iter_batches(rows_at_once(parquet, columns), columns=columns):
            if batch.num_rows:
                yield row, with_subject_id(batch)
            row += batch.num_rows
    except (pa.ArrowException, OSError):
        raise ValueError(f"{file} is damaged: row {row} and later cannot be read") from None


def _read_file(
    file: Path, parquet: pq.ParquetFile, wanted: np.ndarray | None, text_chars: int | None
) -> Iterator[EventBatch]:
    columns = event_columns(file, parquet.schema_arrow)
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
    time_N = _times(file, start, table["time"])
    if wanted is not None:
        keep = np.isin(table["subject_id"].to_numpy(), wanted)
        if not keep.any():
            return
        table, time_N = table.filter(pa.array(keep)), time_N[keep]
    subject_N = table["subject_id"].to_numpy().astype(np.int64)
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
    far = ((time_N < -MOST_TIME) | (time_N > MOST_TIME)) & ~null
    if far.any():
        raise ValueError(
            f"{file}: row {start + int(np.argmax(far))} must have a `time` within 146,000 years of "
            "1970, so that the time between two events can be counted; "
            f"{few(int(far.sum()))} of the rows read with it have not"
        )
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
    if not pa.types.is_floating(column.type):  # whole and decimal numbers
        column = column.cast(pa.float64(), safe=False)
    with np.errstate(over="ignore"):
        value_N = column.to_numpy().astype(np.float32)
    bad = ~np.isfinite(value_N) & ~null
    value_N[bad] = np.nan
    return value_N, int(bad.sum())
