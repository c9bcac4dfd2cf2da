"""Columns of text in bounded memory: rows by their bytes, and of long texts the beginning alone.

Only a text's beginning is written or counted, so what stands behind it is cut off in arrow before
Python sees it. Two texts that differ only behind it become one, and each counts as cut as before.

Legend: N texts of a batch, J their bytes, R those of them whose beginning does not suffice.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smbfast.data.clean import shortened

ROWS = 1 << 18  # rows decoded at once: bounds memory whatever the size of a file
TEXT_ROWS = 1 << 12  # rows read at once where a column is text: 16 MB of notes of 4 kB
LEAST_ROWS = 16
TEXT_BYTES = 1 << 25  # of texts that are decoded at once
TEXT_COLUMN = "text_value"


def rows_at_once(parquet: pq.ParquetFile, columns: list[str]) -> int:
    """Return how many rows of a file to read at once, by the bytes of its row groups.

    Texts that repeat are stored once, so their bytes are not in it: then `TEXT_ROWS` is the bound.
    """
    if TEXT_COLUMN not in columns:
        return ROWS
    groups = (parquet.metadata.row_group(i) for i in range(parquet.metadata.num_row_groups))
    # of columns a damaged footer must not be asked: it ends the process
    most = max((g.total_byte_size / max(g.num_rows, 1) for g in groups), default=1)
    return min(ROWS, TEXT_ROWS, max(LEAST_ROWS, int(TEXT_BYTES / max(most, 1))))


def gathered(
    batches: Iterator[tuple[int, pa.RecordBatch]], text_chars: int | None
) -> Iterator[tuple[int, pa.Table]]:
    """Yield the batches as tables of up to `ROWS` rows and about `TEXT_BYTES` of text.

    Args:
        batches: each with the number of its first row.
        text_chars: how much of a text is ever asked for; of longer ones the beginning is returned,
            for which `smbfast.data.clean.shortened` gives the same. None returns them whole.

    Raises:
        pyarrow.ArrowInvalid: a long text is not UTF-8.
    """
    held: list[pa.RecordBatch] = []
    first = rows = size = 0
    for start, batch in batches:
        at = batch.schema.get_field_index(TEXT_COLUMN)
        if at >= 0 and text_chars is not None:
            column = beginnings(batch.column(at), text_chars)
            batch = batch.set_column(at, pa.field(TEXT_COLUMN, column.type), column)
        new = batch.column(at).nbytes if at >= 0 else 0
        if held and (rows + batch.num_rows > ROWS or size + new > TEXT_BYTES):
            yield first, pa.Table.from_batches(held)
            held, rows, size = [], 0, 0
        if not held:
            first = start
        held.append(batch)
        rows, size = rows + batch.num_rows, size + new
    if held:
        yield first, pa.Table.from_batches(held)


def beginnings(column: pa.Array, text_chars: int) -> pa.Array:
    """Return the texts, of long ones a beginning that tells as much as all of it.

    That is one for which `shortened(text, text_chars)` is the same, so whether it is cut as well.

    Args:
        column: strings, large strings or a dictionary of them; null stays null.

    Raises:
        pyarrow.ArrowInvalid: a long text is not UTF-8.
    """
    if pa.types.is_dictionary(column.type):
        values = beginnings(column.dictionary, text_chars)
        return pa.DictionaryArray.from_arrays(column.indices, values)
    if pa.types.is_null(column.type) or len(column) == 0:
        return column
    most = 4 * text_chars + 64  # bytes of a text are no fewer than its characters
    if (pc.max(pc.binary_length(column)).as_py() or 0) <= most:
        return column
    column.validate(full=True)  # what is cut off must be text as well
    cut = pc.utf8_slice_codeunits(column, 0, most)
    long = pc.less(pc.binary_length(cut), pc.binary_length(column))
    # most are plain words, and are counted without Python
    doubtful = pc.and_(long, pa.array(_num_plain(cut) <= text_chars))
    unsure = pc.unique(cut.filter(doubtful)).to_pylist()
    short = [x for x in unsure if x is not None and not shortened(x, text_chars)[1]]
    if not short:
        return cut
    # their beginning is mostly of what is not seen: they are read as far as it takes
    rest = pc.and_(long, pc.is_in(cut, value_set=pa.array(short, cut.type)))
    texts_R = [_enough(x, text_chars, most) for x in column.filter(rest).to_pylist()]
    return pc.replace_with_mask(cut, rest, pa.array(texts_R, cut.type))


def _num_plain(column: pa.Array) -> np.ndarray:
    """Return how many letters, digits and signs of ASCII each text has, int64 [N]."""
    wide = pa.types.is_large_string(column.type)
    buffer, first = column.buffers(), column.offset
    offset_N1 = np.frombuffer(buffer[1], np.int64 if wide else np.int32)
    offset_N1 = offset_N1[first : first + len(column) + 1].astype(np.int64)
    begin, end = int(offset_N1[0]), int(offset_N1[-1])
    byte_J = np.frombuffer(buffer[2], np.uint8)[begin:end]
    plain_J1 = np.concatenate([[0], np.cumsum((byte_J > 0x20) & (byte_J < 0x7F))])
    return np.diff(plain_J1[offset_N1 - begin])


def _enough(text: str, text_chars: int, read: int) -> str:
    while read < len(text) and not shortened(text[:read], text_chars)[1]:
        read *= 2
    return text[:read]
