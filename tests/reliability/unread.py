"""Datasets whose held-out records nobody can read, and whether they change what is made."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import safe_open

# what tells of a moment or of a place in it, and so differs between equal runs
_OF_A_MOMENT = ("metrics.jsonl", "status.json", "run.json", "report.html", "verified.json")
_OF_A_MOMENT += ("record.json",)  # of a checkpoint: seconds
_OF_A_MOMENT += ("manifest.json",)  # which has digests of what names the run
_OF_A_PLACE = ("tensorboard", "source")


def unreadable(file: Path, rng: np.random.Generator) -> int:
    """Give each held-out subject other records, then overwrite all columns but the ids.

    Returns:
        The number of parts of columns that are noise.
    """
    table = pq.read_table(file)
    for name, column in zip(table.column_names, table.columns, strict=True):
        if name == "subject_id":
            continue
        if pa.types.is_string(column.type):
            new = pa.array(
                [None if cell is None else f"OTHER//{cell}" for cell in column.to_pylist()]
            )
        elif pa.types.is_timestamp(column.type):
            days = np.timedelta64(400, "D")
            new = pa.array(column.to_numpy() + days, column.type)
        else:
            new = pa.array([None if cell is None else 7 * cell for cell in column.to_pylist()])
        table = table.set_column(table.column_names.index(name), name, new.cast(column.type))
    pq.write_table(table, file)
    about, content, count = pq.read_metadata(file), bytearray(file.read_bytes()), 0
    for group in range(about.num_row_groups):
        for at in range(about.num_columns):
            part = about.row_group(group).column(at)
            if part.path_in_schema == "subject_id":
                continue
            begin = part.data_page_offset
            if part.has_dictionary_page:
                begin = min(begin, part.dictionary_page_offset)
            size = part.total_compressed_size
            content[begin : begin + size] = rng.bytes(size)
            count += 1
    file.write_bytes(bytes(content))
    return count


def turned(file: Path) -> None:
    """Turn the outcomes of a label file."""
    table = pq.read_table(file)
    at = table.schema.get_field_index("boolean_value")
    values = pa.array([not value for value in table["boolean_value"].to_pylist()])
    pq.write_table(table.set_column(at, "boolean_value", values), file)


def otherwise(file: Path) -> None:
    """Give the records of a file other codes, values and texts."""
    table = pq.read_table(file)
    codes = pa.array([f"{code}//NEW" for code in table["code"].to_pylist()])
    values = pa.array(
        [None if v is None else 3 * v for v in table["numeric_value"].to_pylist()], pa.float32()
    )
    texts = pa.array([t and f"new {t}" for t in table["text_value"].to_pylist()], pa.string())
    for name, column in (("code", codes), ("numeric_value", values), ("text_value", texts)):
        table = table.set_column(table.schema.get_field_index(name), name, column)
    pq.write_table(table, file)


def differences(one: Path, other: Path, parts: tuple[str, ...] = ("",)) -> tuple[int, list[str]]:
    """How many files two folders have in `parts`, and which of them differ by a byte."""
    contents = [
        {
            str(file.relative_to(folder)): file
            for part in parts
            for file in sorted((folder / part).rglob("*"))
            if file.is_file() and not _is_of_a_moment(file.relative_to(folder))
        }
        for folder in (one, other)
    ]
    names = sorted(set(contents[0]) | set(contents[1]))
    return len(names), [
        name
        for name in names
        if name not in contents[0]
        or name not in contents[1]
        or _content(contents[0][name], one) != _content(contents[1][name], other)
    ]


def _content(file: Path, folder: Path) -> object:
    """What a file holds, but for the id of the run that wrote it, which metadata have too."""
    if file.suffix == ".parquet":
        return pq.read_table(file).replace_schema_metadata(None).to_pydict()
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
            return {n: tensors.get_tensor(n).numpy(force=True).tobytes() for n in names}
    about = folder / "run" / "run.json"
    run = json.loads(about.read_text())["run"] if about.is_file() else "none"
    return file.read_bytes().replace(run.encode(), b"this run")


def _is_of_a_moment(name: Path) -> bool:
    return name.name in _OF_A_MOMENT or bool(set(name.parts) & set(_OF_A_PLACE))
