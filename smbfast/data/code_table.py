"""The descriptions and parents of codes, as arrow data that processes can share.

A vocabulary has up to millions of codes. They are sorted once; a code is found by bisection on the
bytes of its name, and the table is mapped from a file where there is an index, so that it costs a
process next to nothing.

Legend: R rows of the file, C distinct codes, P names of parents.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from smbfast.data.parquet import TEXT, is_text, parquet_buffer, read_columns
from smbfast.data.source_index import map_arrow, one_array, stamp, write_arrow

FILE = "codes.arrow"
_FORMAT = b"1"
_PIECE = 1 << 16  # codes that are made Python strings at once
V = TypeVar("V")


class _Names:
    """Sorted names, large_string [C], and where each of them is."""

    def __init__(self, names: pa.LargeStringArray) -> None:
        self.array = names
        _, offsets, data = names.buffers()
        first = names.offset
        num = len(names) + 1 if len(names) else 0  # of none there may be no buffer
        self._offset_C1 = np.frombuffer(offsets or b"", np.int64, num, 8 * first if num else 0)
        self._data = memoryview(data) if data else memoryview(b"")

    def row(self, name: str) -> int:
        """Return the row of a name, -1 if it is not there."""
        sought = name.encode("utf-8", "surrogatepass")
        # bytes of UTF-8 are in the order of arrow's sort
        row = bisect_left(range(len(self.array)), sought, key=self._bytes)
        return row if row < len(self.array) and self._bytes(row) == sought else -1

    def _bytes(self, row: int) -> bytes:
        return bytes(self._data[self._offset_C1[row] : self._offset_C1[row + 1]])


class _Column(Mapping[str, V]):
    """One column of the table by code; codes for which it is null are not in the mapping."""

    def __init__(self, names: _Names, values: pa.Array) -> None:
        self._names, self._values = names, values

    def __getitem__(self, code: str) -> V:
        row = self._names.row(code) if isinstance(code, str) else -1
        value: Any = self._values[row].as_py() if row >= 0 else None
        if value is None:
            raise KeyError(code)
        return value

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self._values), _PIECE):
            here = self._values.slice(start, _PIECE).is_valid()
            yield from self._names.array.slice(start, _PIECE).filter(here).to_pylist()

    def __len__(self) -> int:
        return len(self._values) - self._values.null_count


class CodeTable:
    """What codes.parquet says: `descriptions` (str) and `parents` (list of str), by code."""

    descriptions: Mapping[str, str]
    parents: Mapping[str, list[str]]

    def __init__(self, table: pa.Table) -> None:
        names, description_C, parents_C = (
            one_array(table[name]) for name in ("code", "description", "parents")
        )
        self._table = table
        known = _Names(names)
        self.descriptions = _Column[str](known, description_C)
        self.parents = _Column[list[str]](known, parents_C)

    @classmethod
    def open(cls, file: Path, index: Path | None = None) -> "CodeTable":
        """Read codes.parquet, or the copy of it in the folder `index`, which is made if need be.

        A file that is missing is a table without codes.

        Raises:
            ValueError: the file cannot be read, a column is missing or of a wrong type, a code is
                null, or a code has two different descriptions.
        """
        if not file.is_file():
            return cls(_EMPTY)
        state = {b"format": _FORMAT, b"file": str(stamp(file)).encode()}
        if index is not None and (known := _mapped(index / FILE, state)) is not None:
            return cls(known)
        table = read_codes(file).replace_schema_metadata(state)
        if index is not None and write_arrow(index / FILE, table):
            table = _mapped(index / FILE, state) or table  # pages that processes share
        pa.default_memory_pool().release_unused()  # of a large vocabulary, hundreds of MiB
        return cls(table)

    @classmethod
    def of_table(cls, table: pa.Table | None, name: Path) -> "CodeTable":
        """Return the codes of a table in memory; `name` is what errors call it."""
        return cls(_EMPTY if table is None else read_codes(name, parquet_buffer(table)))

    @cached_property
    def digest(self) -> str:
        """A digest of all that the table says."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self._table.schema) as stream:
            stream.write_table(self._table)
        return sha256(sink.getvalue()).hexdigest()


def read_codes(file: Path, buffer: pa.Buffer | None = None) -> pa.Table:
    """Return `code` (sorted, each once), `description` and `parents` (null where there is none).

    Rows of one code are joined: its description, and all its parents.

    Args:
        buffer: the bytes of the file, if they are in memory.

    Raises:
        ValueError: see `CodeTable.open`.
    """
    # one column after the other: together, and sorted, they would be several times the file
    code_R = _text(file, read_columns(file, {"code": TEXT}, buffer=buffer)["code"])
    if code_R.null_count:
        row = pc.index(code_R.is_null(), True).as_py()
        raise ValueError(f"{file}: row {row} must have a `code`, it is null")
    if not len(code_R):
        return _EMPTY
    order_R = pc.sort_indices(code_R)  # stable: the rows of a code stay in order
    code_R = code_R.take(order_R)
    new_R = np.ones(len(code_R), bool)
    new_R[1:] = pc.not_equal(code_R[1:], code_R[:-1]).to_numpy(zero_copy_only=False)
    group_R = np.cumsum(new_R) - 1
    try:
        columns = {
            "code": code_R.filter(pa.array(new_R)),
            "description": _described(file, buffer, order_R, group_R),
            "parents": _parents(file, buffer, order_R, group_R),
        }
    except pa.ArrowIndexError:
        raise ValueError(f"{file} must have columns of one length; it is damaged") from None
    return pa.table(columns, schema=_EMPTY.schema)


def _described(
    file: Path, buffer: pa.Buffer | None, order_R: pa.Array, group_R: np.ndarray
) -> pa.Array:
    """Return the description of each code; those of its rows must be the same."""
    wanted = {"description": (*TEXT, pa.null(), None)}
    text_R = _text(file, read_columns(file, wanted, buffer=buffer)["description"]).take(order_R)
    row_D = np.flatnonzero(
        pc.fill_null(pc.greater(pc.binary_length(text_R), 0), False).to_numpy(zero_copy_only=False)
    )
    text_D, group_D = text_R.take(pa.array(row_D)), group_R[row_D]
    again_D = group_D[1:] == group_D[:-1]
    if again_D.any():
        other_D = pc.not_equal(text_D[1:], text_D[:-1]).to_numpy(zero_copy_only=False) & again_D
        if other_D.any():
            at = int(np.argmax(other_D))
            first, second = (int(order_R[int(row_D[i])].as_py()) for i in (at, at + 1))
            codes = len(np.unique(group_D[1:][other_D]))
            raise ValueError(
                f"{file} must give a code one description; rows {first} and {second} give one code "
                f"two ({codes:,} such codes in all)"
            )
    row_C = np.full(int(group_R[-1]) + 1, -1, np.int64)
    row_C[group_D[::-1]] = row_D[::-1]
    return text_R.take(pa.array(row_C, mask=row_C < 0))


def _parents(
    file: Path, buffer: pa.Buffer | None, order_R: pa.Array, group_R: np.ndarray
) -> pa.Array:
    """Return the parents of each code, each once, in the order of its rows."""
    num_codes = int(group_R[-1]) + 1
    table = read_columns(file, {}, optional={"parent_codes"}, buffer=buffer)
    kind = table["parent_codes"].type if "parent_codes" in table.column_names else pa.null()
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not (any(is_list(kind) for is_list in lists) and is_text(kind.value_type)):
        return pa.nulls(num_codes, _EMPTY.schema.field("parents").type)
    lists_R = one_array(table["parent_codes"]).take(order_R)
    name_P = _text(file, lists_R.flatten())
    group_P = group_R[pc.list_parent_indices(lists_R).to_numpy()]
    here_P = name_P.is_valid()
    name_P, group_P = name_P.filter(here_P), group_P[here_P.to_numpy(zero_copy_only=False)]
    encoded = name_P.dictionary_encode()
    key_P = group_P * max(len(encoded.dictionary), 1) + encoded.indices.to_numpy()
    first_P = np.sort(np.unique(key_P, return_index=True)[1])
    count_C = np.bincount(group_P[first_P], minlength=num_codes)
    offset_C1 = np.concatenate([[0], np.cumsum(count_C)])
    return pa.LargeListArray.from_arrays(
        pa.array(offset_C1, pa.int64()),
        encoded.take(pa.array(first_P)),
        mask=pa.array(count_C == 0),
    )


def _text(file: Path, column: pa.ChunkedArray | pa.Array) -> pa.LargeStringArray:
    """Return a column as one array of text, whose bytes are checked (parquet does not)."""
    try:
        column = one_array(column.cast(pa.large_string()))
        column.validate(full=True)
    except (pa.ArrowException, UnicodeDecodeError):
        raise ValueError(f"{file} is damaged: it holds text that is not UTF-8") from None
    return column


def _mapped(file: Path, state: dict[bytes, bytes]) -> pa.Table | None:
    """Return the table of the index, or None where it is missing, damaged or of another state."""
    wanted = _EMPTY.schema.with_metadata(state)
    return map_arrow(file, lambda schema: schema.equals(wanted, check_metadata=True))


_EMPTY = pa.schema(
    [
        ("code", pa.large_string()),
        ("description", pa.large_string()),
        # many codes have the same parents
        ("parents", pa.large_list(pa.dictionary(pa.int32(), pa.large_string()))),
    ]
).empty_table()
