"""Tiny MEDS datasets for tests: 20 made-up subjects in three splits, with labels.

A row is (subject, time, code, numeric_value, text_value); times are datetime64[us] or None.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Row = tuple[int | None, Any, Any, float | None, str | None]

SPLITS = {"train": range(1, 13), "tuning": range(13, 17), "held_out": range(17, 21)}
FIRST_DAY = np.datetime64("2150-01-01T08:00", "us")
COLUMNS = ("subject_id", "time", "code", "numeric_value", "text_value")
SCHEMA = pa.schema(
    [
        ("subject_id", pa.int64()),
        ("time", pa.timestamp("us")),
        ("code", pa.string()),
        ("numeric_value", pa.float32()),
        ("text_value", pa.string()),
    ]
)
CODES: dict[str, str | None] = {
    "LAB//glucose": "Glucose [Mass/volume] in Blood",
    "LAB//potassium": "Potassium",
    "DIAGNOSIS//I10": "Essential hypertension",
    "MEDICATION//aspirin": None,
    "GENDER//F": None,
    "MEDS_BIRTH": None,
}


def at(day: int, hour: int = 8) -> np.datetime64:
    """A moment `day` days after the first day of the dataset."""
    return FIRST_DAY + np.timedelta64(day, "D") + np.timedelta64(hour - 8, "h")


def subject_rows(subject: int, days: int = 8) -> list[Row]:
    """A static event, birth, and `days` days with five events each."""
    random = np.random.default_rng(subject)
    rows: list[Row] = [
        (subject, None, "GENDER//F", None, None),
        (subject, np.datetime64("2100-05-05", "us"), "MEDS_BIRTH", None, None),
    ]
    for day in range(days):
        glucose, potassium = random.normal([110, 4.2], [20, 0.4]).tolist()
        rows += [
            (subject, at(day), "LAB//glucose", glucose, None),
            (subject, at(day), "LAB//potassium", potassium, "serum"),
            (subject, at(day, 10), "DIAGNOSIS//I10", None, None),
            (subject, at(day, 12), "MEDICATION//aspirin", 100.0, "oral"),
            (subject, at(day, 20), "LAB//glucose", glucose + 5, None),
        ]
    return rows


def split_rows(split: str, days: int = 8) -> list[Row]:
    """The rows of all subjects of a split, in order."""
    return [row for subject in SPLITS[split] for row in subject_rows(subject, days)]


def table_of(rows: Sequence[Row], schema: pa.Schema = SCHEMA) -> pa.Table:
    """Rows as a table of `schema`, whose columns may be fewer than those of a row."""
    columns = dict(zip(COLUMNS, zip(*rows, strict=True), strict=True)) if rows else {}
    arrays = {n: pa.array(list(columns.get(n, ())), SCHEMA.field(n).type) for n in schema.names}
    return pa.table(arrays).cast(schema)


def write_table(file: Path, rows: Sequence[Row] | pa.Table, **options: Any) -> Path:
    """Write rows, or a table as it is, to a parquet file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows if isinstance(rows, pa.Table) else table_of(rows), file, **options)
    return file


def write_codes(folder: Path, codes: dict[str, str | None]) -> Path:
    """`metadata/codes.parquet`."""
    table = pa.table(
        {
            "code": pa.array(list(codes), pa.string()),
            "description": pa.array(list(codes.values()), pa.string()),
            "parent_codes": pa.array([None] * len(codes), pa.list_(pa.string())),
        }
    )
    return write_table(folder / "metadata" / "codes.parquet", table)


def write_meds(
    folder: Path,
    rows: dict[str, Sequence[Row] | pa.Table] | None = None,
    codes: dict[str, str | None] | None = None,
    *,
    version: str = "0.4.1",
    **options: Any,
) -> Path:
    """A whole dataset, `data/<split>/0.parquet`; `rows` takes the place of splits it names."""
    for split in SPLITS:
        given = (rows or {}).get(split, split_rows(split))
        write_table(folder / "data" / split / "0.parquet", given, **options)
    write_codes(folder, CODES if codes is None else codes)
    about = {"dataset_name": "tiny", "meds_version": version}
    (folder / "metadata" / "dataset.json").write_text(json.dumps(about))
    return folder


def write_labels(
    folder: Path, task: str = "task", rows: dict[str, Sequence[tuple]] | None = None
) -> Path:
    """`labels/<task>/<split>.parquet` with (subject, prediction time, value); two nodes a subject.

    `rows` takes the place of all splits.
    """
    for split, subjects in SPLITS.items():
        default = [(s, at(day, 15), (s + day) % 2 == 0) for s in subjects for day in (3, 6)]
        given = default if rows is None else rows.get(split, ())
        columns = list(zip(*given, strict=True)) or [(), (), ()]
        table = pa.table(
            {
                "subject_id": pa.array(list(columns[0]), pa.int64()),
                "prediction_time": pa.array(list(columns[1]), pa.timestamp("us")),
                "boolean_value": pa.array(list(columns[2]), pa.bool_()),
            }
        )
        write_table(folder / "labels" / task / f"{split}.parquet", table)
    return folder / "labels" / task


def write_flat(folder: Path) -> Path:
    """The layout without folders per split: `data/*.parquet` and `subject_splits.parquet`."""
    for number, split in enumerate(SPLITS):
        write_table(folder / "data" / f"{number}.parquet", split_rows(split))
    pairs = [(s, split) for split, subjects in SPLITS.items() for s in subjects]
    table = pa.table({"subject_id": [s for s, _ in pairs], "split": [s for _, s in pairs]})
    write_table(folder / "metadata" / "subject_splits.parquet", table)
    write_codes(folder, CODES)
    return folder


def tiny_run(data: Path, run: Path, *more: str) -> list[str]:
    """Arguments of a training run of four steps and four checkpoints: about a second."""
    steps = ["--phases.0.steps=2", "--phases.1.steps=2", "--run.save_every=1", "--run.keep=3"]
    return ["tiny", f"--data.path={data}", f"--run.dir={run}", *steps, *more]
