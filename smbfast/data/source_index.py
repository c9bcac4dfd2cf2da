"""The subjects, rows and SHA-256 of each file of a dataset, read once and then known again.

A file is known by its path in the dataset, its size and the times of its last changes, so that a
corrected export of equal size is read anew. Subjects are ids of patients: the index is private.

Legend: F files, S subjects of all files in their order.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smbfast.base.files import committed_file
from smbfast.base.replace import make_folder, sha256
from smbfast.data.columns import event_columns, subject_column
from smbfast.data.parquet import open_parquet

FOLDER = "source"  # of the index, beside the shards
FILE = "files.arrow"
ROWS = 1 << 20  # subject ids decoded at once: 8 MiB
_FORMAT = b"1"
_SEAL = b"smbarrow"
_SEALED = len(_SEAL) + hashlib.sha256().digest_size  # bytes behind an arrow file
_THREADS = 8  # files hashed at once; hashing leaves the interpreter free
_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("ctime_ns", pa.int64()),
        ("rows", pa.int64()),
        ("sha256", pa.string()),
        ("subjects", pa.large_list(pa.int64())),
    ],
    metadata={"format": _FORMAT},
)
Stamp = tuple[int, int, int]


def stamp(file: Path) -> Stamp:
    """Return size, mtime and ctime (ns) of a file. Archives and copies can set the mtime of other
    content back to the same value, never the ctime.

    Raises:
        ValueError: the file is missing or cannot be read.
    """
    try:
        state = os.stat(file)
    except OSError as error:
        raise ValueError(f"{file} must be readable: {error.strerror}") from None
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns


@dataclass
class SourceIndex:
    """What is known of the files of a dataset; see `open`."""

    root: Path
    files: list[Path]
    stamps: list[Stamp]
    rows: list[int]
    digests: list[str | None]
    subject_S: np.ndarray  # int64, the subjects of a file in the order of their rows
    offset_F1: np.ndarray  # int64: file f has the subjects offset_F1[f]:offset_F1[f + 1]
    folder: Path | None = None
    place: dict[Path, int] = field(init=False)

    def __post_init__(self) -> None:
        self.place = {file: f for f, file in enumerate(self.files)}

    @classmethod
    def open(cls, root: Path, files: Sequence[Path], folder: Path | None = None) -> "SourceIndex":
        """Read the subjects of `files` from the index in `folder`, and from the files themselves
        where they are new or have changed; then write the index.

        Raises:
            ValueError: a file is damaged, its columns or the order of its rows break a rule, or a
                subject is in two files.
        """
        known = _read(folder)
        stamps = [stamp(file) for file in files]
        names = [file.relative_to(root).as_posix() for file in files]
        at_F = [known.find(name, state) for name, state in zip(names, stamps, strict=True)]
        if -1 not in at_F and at_F == list(range(len(known.names))):
            subject_S, offset_F1 = known.subject_S, known.offset_F1
            return cls(
                root, list(files), stamps, known.rows, known.digests, subject_S, offset_F1, folder
            )
        parts, rows = [], []
        for file, at in zip(files, at_F, strict=True):
            ids, num_rows = known.part(at) if at >= 0 else read_subjects(file, open_parquet(file))
            parts.append(ids)
            rows.append(num_rows)
        digests = [known.digests[at] if at >= 0 else None for at in at_F]
        made = cls.of_parts(root, list(files), parts, rows)
        made.stamps, made.digests, made.folder = stamps, digests, folder
        made.save()
        return made

    @classmethod
    def of_parts(
        cls, root: Path, files: list[Path], parts: list[np.ndarray], rows: list[int]
    ) -> "SourceIndex":
        """Join the subjects of files, int64 arrays.

        Raises:
            ValueError: a subject is in two files.
        """
        subject_S = np.concatenate(parts) if parts else np.empty(0, np.int64)
        offset_F1 = np.concatenate([[0], np.cumsum([len(p) for p in parts])]).astype(np.int64)
        stamps: list[Stamp] = [(0, 0, 0)] * len(files)
        made = cls(root, files, stamps, rows, [None] * len(files), subject_S, offset_F1)
        made._refuse_two_files()
        return made

    def span(self, file: Path) -> slice:
        """Return where the subjects of a file are in `subject_S`."""
        f = self.place[file]
        return slice(int(self.offset_F1[f]), int(self.offset_F1[f + 1]))

    def digests_of(self, files: Sequence[Path]) -> list[str]:
        """Return the SHA-256 of the bytes of each file; those read for it are noted in the index.

        Raises:
            ValueError: a file has changed since the index was opened.
        """
        missing = [file for file in files if self.digests[self.place[file]] is None]
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
            for file, digest in zip(missing, pool.map(file_digest, missing), strict=True):
                self.require_unchanged(file)
                self.digests[self.place[file]] = digest
        if missing:
            self.save()
        known = (self.digests[self.place[file]] for file in files)
        return [digest for digest in known if digest is not None]

    def require_unchanged(self, file: Path) -> None:
        """Raise a ValueError if a file is not the one that was indexed."""
        if stamp(file) != self.stamps[self.place[file]]:
            raise ValueError(f"{file} must not change while it is read; it has changed")

    def save(self) -> None:
        """Write the index into its folder, if it has one that can be written."""
        if self.folder is None:
            return
        offset_F1 = pa.array(self.offset_F1, pa.int64())
        size_F, mtime_F, ctime_F = zip(*self.stamps, strict=True) if self.stamps else ((), (), ())
        table = pa.table(
            [
                [file.relative_to(self.root).as_posix() for file in self.files],
                size_F,
                mtime_F,
                ctime_F,
                self.rows,
                self.digests,
                pa.LargeListArray.from_arrays(offset_F1, pa.array(self.subject_S)),
            ],
            schema=_SCHEMA,
        )
        write_arrow(self.folder / FILE, table)

    def _refuse_two_files(self) -> None:
        sorted_S = np.sort(self.subject_S)
        both = np.unique(sorted_S[1:][sorted_S[1:] == sorted_S[:-1]])
        if not len(both):
            return
        # of the first file that repeats subjects, the least one
        first_S = np.zeros(len(self.subject_S), bool)
        first_S[np.unique(self.subject_S, return_index=True)[1]] = True
        again = int(np.argmin(first_S))
        f = int(np.searchsorted(self.offset_F1, again, side="right")) - 1
        mine = np.arange(self.offset_F1[f], self.offset_F1[f + 1])
        subject = int(np.min(self.subject_S[mine][~first_S[mine]]))
        before = int(np.argmax(self.subject_S == subject))
        other = int(np.searchsorted(self.offset_F1, before, side="right")) - 1
        file = self.files[f]
        row = row_of(file, open_parquet(file), subject)
        shown = f"{len(both):,}" if len(both) > 10 else "up to 10"
        raise ValueError(
            f"{file}: the subject of row {row} must stand in one file and one split only, it also "
            f"stands in {self.files[other]} ({shown} such subjects)"
        )


@dataclass
class _Known:
    """An index as it is in its file."""

    names: list[str]
    stamps: list[Stamp]
    rows: list[int]
    digests: list[str | None]
    subject_S: np.ndarray
    offset_F1: np.ndarray

    def __post_init__(self) -> None:
        self._at = {name: at for at, name in enumerate(self.names)}

    def find(self, name: str, state: Stamp) -> int:
        at = self._at.get(name, -1)
        return at if at >= 0 and self.stamps[at] == state else -1

    def part(self, at: int) -> tuple[np.ndarray, int]:
        return self.subject_S[self.offset_F1[at] : self.offset_F1[at + 1]], self.rows[at]


def _read(folder: Path | None) -> _Known:
    """Return the index of a folder; an empty one where it is missing, damaged or of old form."""
    table = map_arrow(folder / FILE, _fits) if folder is not None else None
    if table is None:
        return _nothing()
    columns = {n: one_array(table[n]) for n in table.column_names}
    subjects = columns["subjects"]
    known = [array for name, array in columns.items() if name != "sha256"]
    if any(array.null_count for array in (*known, subjects.values)):
        return _nothing()
    stamps = zip(*(columns[n].to_pylist() for n in ("size", "mtime_ns", "ctime_ns")), strict=True)
    return _Known(
        columns["name"].to_pylist(),
        list(stamps),
        columns["rows"].to_pylist(),
        columns["sha256"].to_pylist(),
        subjects.values.to_numpy(),
        subjects.offsets.to_numpy(),
    )


def _nothing() -> _Known:
    return _Known([], [], [], [], np.empty(0, np.int64), np.zeros(1, np.int64))


def _fits(schema: pa.Schema) -> bool:
    return schema.equals(_SCHEMA, check_metadata=True)


def map_arrow(file: Path, fits: Callable[[pa.Schema], bool]) -> pa.Table | None:
    """Return the table of a file of `put_arrow`, mapped; None where it is missing or damaged.

    All of it is read once, its texts and offsets twice, for Arrow may end the process over a file
    that does not fit its header. Over one of other types than expected it does so while it checks
    them, so that nothing is made of those.

    Args:
        fits: whether a schema is one that is expected; None is returned where it is not.
    """
    try:
        raw = pa.memory_map(os.fspath(file)).read_buffer()
        body, seal = raw.slice(0, max(raw.size - _SEALED, 0)), raw.slice(max(raw.size - _SEALED, 0))
        if bytes(seal) != _SEAL + hashlib.sha256(body).digest():
            return None
        reader = pa.ipc.open_file(pa.BufferReader(body))
        if not fits(reader.schema):
            return None
        table = reader.read_all()
        table.validate(full=True)
    except (OSError, pa.ArrowException, UnicodeDecodeError):
        return None
    return table


def put_arrow(file: Path, table: pa.Table) -> None:
    """Write a table as an arrow file, and the SHA-256 of its bytes behind it."""
    with pa.ipc.new_file(os.fspath(file), table.schema) as writer:
        writer.write_table(table)
    digest = bytes.fromhex(sha256(file))
    with open(file, "ab") as end:
        end.write(_SEAL + digest)


def write_arrow(file: Path, table: pa.Table) -> bool:
    """Write a private arrow file, and return whether it could be written.

    An index saves time; a folder that cannot be written is no reason to stop.
    """
    try:
        make_folder(file.parent, 0o700)
        with committed_file(file, private=True) as staging:
            put_arrow(staging, table)
    except OSError:
        return False
    return True


def one_array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Return a column as one array, a mapped one without a copy."""
    if isinstance(column, pa.Array):
        return column
    if column.num_chunks == 1:
        return column.chunk(0)
    return pa.concat_arrays(column.chunks or [pa.array([], column.type)])


def read_subjects(file: Path, parquet: pq.ParquetFile) -> tuple[np.ndarray, int]:
    """Return the subjects of a file in order (int64), and its number of rows.

    Raises:
        ValueError: see `event_columns`; a subject is null, or its rows do not stand together.
    """
    event_columns(file, parquet.schema_arrow)
    runs: list[np.ndarray] = []
    for ids in id_batches(file, parquet):
        run = ids[np.concatenate([[0], np.flatnonzero(np.diff(ids)) + 1])]
        if runs and runs[-1][-1] == run[0]:
            run = run[1:]
        if len(run):
            runs.append(run)
    subjects = np.concatenate(runs) if runs else np.empty(0, np.int64)
    unique, count = np.unique(subjects, return_counts=True)
    if len(unique) != len(subjects):
        row = row_of(file, parquet, int(unique[np.argmax(count > 1)]), second_run=True)
        raise ValueError(
            f"{file}: all rows of a subject must stand together; "
            f"row {row} goes on with a subject that had ended"
        )
    return subjects, parquet.metadata.num_rows


def row_of(file: Path, parquet: pq.ParquetFile, subject: int, *, second_run: bool = False) -> int:
    """Return the first row of a subject, or the first of those that stand by themselves later."""
    ids = np.concatenate([np.empty(0, np.int64), *id_batches(file, parquet)])
    rows = np.flatnonzero(ids == subject)
    if not len(rows):
        raise ValueError(
            f"{file} must hold the subjects that its index, {FOLDER}/{FILE} beside what was "
            "prepared, says; it does not: remove the index"
        )
    gaps = np.flatnonzero(np.diff(rows) > 1)
    return int(rows[gaps[0] + 1] if second_run and len(gaps) else rows[0])


def id_batches(file: Path, parquet: pq.ParquetFile) -> Iterator[np.ndarray]:
    """Yield the subject of each row of a file of events, as `event_columns` has accepted it.

    Yields:
        int64 [rows of a batch].

    Raises:
        ValueError: a row has none, or pages are damaged.
    """
    name = subject_column(parquet.schema_arrow)
    row = 0
    try:
        for batch in parquet.iter_batches(batch_size=ROWS, columns=[name]):
            column = batch[name]
            if column.null_count:
                null = row + int(np.argmax(column.is_null().to_numpy(False)))
                raise ValueError(f"{file}: row {null} must have a `{name}`, it is null")
            if batch.num_rows:
                yield column.to_numpy().astype(np.int64)
            row += batch.num_rows
    except (pa.ArrowException, OSError):
        raise ValueError(f"{file} is damaged: row {row} and later cannot be read") from None


def file_digest(file: Path) -> str:
    """Return the SHA-256 of the bytes of a file, in hex digits."""
    try:
        return sha256(file)
    except OSError as error:
        raise ValueError(f"{file} must be readable: {error.strerror}") from None
