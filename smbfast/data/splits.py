"""Finds out which files and subjects of a MEDS folder belong to which split.

There are two layouts: a folder per split, or `data/*.parquet` beside the table
`metadata/subject_splits.parquet`. MEDS allows further splits than its three; their subjects are not
read.
"""

import re
from pathlib import Path

import meds
import numpy as np
import pyarrow as pa

from smbfast.data.parquet import TEXT, read_columns, strings

SPLITS: tuple[str, ...] = (meds.train_split, meds.tuning_split, meds.held_out_split)


def find_splits(
    path: Path, *, need_train: bool = True
) -> tuple[dict[str, list[Path]], dict[str, np.ndarray] | None]:
    """Return the files of each split and, where no folders name the splits, the subjects of each.

    Raises:
        ValueError: there is no parquet file, or the table of splits is needed and missing or bad.
    """
    folder = path / "data"
    splits = {s: _parquets(folder / s) for s in SPLITS}
    if any(splits.values()):
        return splits, None
    files = _parquets(folder if folder.is_dir() else path)
    if not need_train and files and not (path / "metadata" / "subject_splits.parquet").is_file():
        return {"": files}, None
    table = path / "metadata" / "subject_splits.parquet"
    if not files:
        raise ValueError(
            f"{folder} must hold {{train,tuning,held_out}}/*.parquet; it has no parquet"
        )
    if not table.is_file():
        raise ValueError(f"{folder} has no folder per split, so {table} must exist; it does not")
    return {s: files for s in SPLITS}, _read_table(table)


def _read_table(file: Path) -> dict[str, np.ndarray]:
    rows = read_columns(file, {"subject_id": (pa.int64(),), "split": TEXT})
    for name in rows.column_names:
        if rows[name].null_count:
            row = int(np.argmax(rows[name].is_null().to_numpy()))
            raise ValueError(f"{file}: row {row} must have a `{name}`, it is null")
    ids, names = rows["subject_id"].to_numpy(), np.array(strings(file, rows["split"]), object)
    _, first_N = np.unique(ids, return_index=True)
    if len(first_N) != len(ids):
        row = int(np.setdiff1d(np.arange(len(ids)), first_N)[0])
        raise ValueError(f"{file} must name each subject once; row {row} names one again")
    return {s: ids[names == s] for s in SPLITS}


def _parquets(folder: Path) -> list[Path]:
    def natural(file: Path) -> list:
        parts = re.split(r"(\d+)", str(file.relative_to(folder)))
        return [(int(p), "") if p.isdigit() else (-1, p) for p in parts]

    return sorted(folder.rglob("*.parquet"), key=natural) if folder.is_dir() else []
