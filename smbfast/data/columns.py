"""Says which columns a MEDS file of events must have, and of which types.

Wider than MEDS: UTC times (nothing is shifted), whole and decimal numbers, and `patient_id`, the
name of `subject_id` before MEDS 0.3.3.
"""

from pathlib import Path

import pyarrow as pa

from smbfast.data.parquet import column_names, is_text

UTC = {"utc", "etc/utc", "gmt", "z", "+00:00", "-00:00", "+0000"}  # names in small letters


def is_utc(kind: pa.DataType) -> bool:
    """Return whether a type of times has no time zone, or one that shifts nothing."""
    return kind.tz is None or kind.tz.lower() in UTC


def event_columns(file: Path, schema: pa.Schema) -> list[str]:
    """Return the columns to read, with `patient_id` where it stands for `subject_id`.

    Raises:
        ValueError: a column is missing, there twice, or of a type that would lose data.
    """
    subject = subject_column(schema)
    rules = {
        subject: (lambda t: pa.types.is_integer(t) and t != pa.uint64(), "int64"),
        "time": (pa.types.is_timestamp, "timestamp[us]"),
        "code": (is_text, "string"),
        "numeric_value": (_is_number, "float32"),
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
        if name == "time" and not is_utc(actual):
            raise ValueError(
                f"{file}: column `time` must have no time zone, or UTC, it is {actual}"
            )
        columns.append(name)
    return columns


def subject_column(schema: pa.Schema) -> str:
    """Return the name of the column of subjects: `subject_id` unless only `patient_id` is there."""
    old = "subject_id" not in schema.names and "patient_id" in schema.names
    return "patient_id" if old else "subject_id"


def with_subject_id(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return a batch whose column of subjects is named `subject_id`."""
    old = subject_column(batch.schema)
    return batch.rename_columns(["subject_id" if n == old else n for n in batch.schema.names])


def _is_number(kind: pa.DataType) -> bool:
    types = pa.types
    return any(
        accepts(kind)
        for accepts in (types.is_floating, types.is_integer, types.is_decimal, types.is_null)
    )
