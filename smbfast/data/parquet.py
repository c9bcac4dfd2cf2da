"""Reads small parquet files, with errors that name file, column and type and never a cell."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

TEXT = (pa.string(), pa.large_string())
_ALIKE = 1 << 20  # rows up to which all may be alike: our choice
_ROWS_A_BYTE = 64  # beyond that: rows that differ take more, and those alike fill any memory
BUFFER = 1 << 20  # bytes of a column read at once: its chunk may be larger than the memory


def parquet_buffer(table: pa.Table) -> pa.Buffer:
    """Return a table in memory as the bytes of a parquet file, so that both are read alike."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue()


def open_parquet(file: Path, buffer: pa.Buffer | None = None) -> pq.ParquetFile:
    """Open a parquet file.

    Args:
        buffer: the bytes of the file, if they are in memory; `file` is then its name in errors.

    Raises:
        ValueError: the file, which is named, is missing or cannot be read.
    """
    if buffer is None and Path(file).exists() and not Path(file).is_file():
        raise ValueError(f"{file} must be a parquet file; {_kind(file)}")
    try:
        source = file if buffer is None else buffer
        parquet = pq.ParquetFile(source, page_checksum_verification=True, buffer_size=BUFFER)
        _ = parquet.schema_arrow.names  # damaged names are not UTF-8
    except FileNotFoundError:
        raise ValueError(f"no such file: {file}") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        raise ValueError(f"{file} must be a parquet file; {_kind(file)}") from None
    num, size = parquet.metadata.num_rows, len(buffer) if buffer else Path(file).stat().st_size
    if num > max(_ALIKE, size * _ROWS_A_BYTE):
        raise ValueError(
            f"{file} must have at most {_ROWS_A_BYTE:,} rows a byte, as rows of patients differ; "
            f"it has {num:,} in {size:,} bytes"
        )
    return parquet


def _kind(file: Path) -> str:
    """Return what a file is that is not read as parquet."""
    if Path(file).is_dir():
        return "it is a folder"
    if Path(file).exists() and not Path(file).is_file():
        return "it is a pipe or a device"
    if Path(file).is_file():
        with open(file, "rb") as opened:
            if opened.read(24).startswith(b"version https://git-lfs"):
                return "it is a pointer of git-lfs: fetch the file itself with `git lfs pull`"
    return "it cannot be read as one"


def read_columns(
    file: Path,
    wanted: dict[str, tuple],
    *,
    optional: set[str] | None = None,
    buffer: pa.Buffer | None = None,
) -> pa.Table:
    """Read columns of a small parquet file.

    Args:
        wanted: for each column the types that it may have; a `None` among them lets it be missing.
        optional: columns that are read as they are where the file has them.
        buffer: see `open_parquet`.

    Raises:
        ValueError: the file is unreadable, or a column is missing or of another type.
    """
    parquet = open_parquet(file, buffer)
    schema = parquet.schema_arrow
    columns = [c for c in (optional or ()) if c in schema.names]
    for name in (*wanted, *columns):
        if schema.names.count(name) > 1:
            raise ValueError(f"{file} must have one column `{name}`; it has {column_names(schema)}")
    for name, types in wanted.items():
        if name not in schema.names:
            if None in types:
                continue
            raise ValueError(f"{file} must have a column `{name}`; it has {column_names(schema)}")
        actual = schema.field(name).type
        if pa.types.is_dictionary(actual):
            actual = actual.value_type
        if actual not in types:
            expected = " or ".join(str(t) for t in types if t is not None)
            raise ValueError(f"{file}: column `{name}` must be {expected}, it is {actual}")
        columns.append(name)
    try:
        table = parquet.read(columns=columns)
    except (pa.ArrowException, OSError):
        raise ValueError(f"{file} is damaged: its pages cannot be read") from None
    for name, types in wanted.items():
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(len(table), types[0]))
    return table


def is_text(kind: pa.DataType) -> bool:
    """Return whether a column is text, plain or dictionary-encoded."""
    return (kind.value_type if pa.types.is_dictionary(kind) else kind) in TEXT


def strings(file: Path, column: pa.ChunkedArray | pa.Array) -> list[str | None]:
    """Return the strings of a column.

    Raises:
        ValueError: there are bytes that are not UTF-8 (parquet does not check).
    """
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        raise ValueError(f"{file} is damaged: it holds text that is not UTF-8") from None


def column_names(schema: pa.Schema) -> str:
    return ", ".join(f"`{n}`" for n in schema.names) or "none"
