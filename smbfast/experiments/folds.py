"""Makes the folds of a cross-validation: views of a MEDS dataset with splits of their own.

A view links the files of the dataset, so it takes no room, and holds a table of splits: the
subjects of one fold are held_out, some of the others tuning, and the rest train. Each subject is
held out in exactly one fold, so the held-out predictions of all folds together are of every
subject, by models that never saw that one. Which fold a subject is in is a hash of its id.

Legend: S subjects.
"""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smbfast.base.files import committed_file
from smbfast.data.columns import event_columns
from smbfast.data.parquet import open_parquet
from smbfast.data.source_index import id_batches
from smbfast.data.splits import SPLITS, hashed

TUNING = 0.15  # of the subjects outside the fold: our choice


def fold_view(data: Path, out: Path, fold: int, num_folds: int) -> Path:
    """Write the view of `data` in which fold `fold` (from 1) of `num_folds` is held out; return it.

    The dataset's own splits, and those of its labels, are set aside. What is there already is
    written again.

    Raises:
        ValueError: the dataset has no parquet file, or one that holds no events; `fold` is not one
            of 1 to `num_folds`, or there are fewer than two folds.
    """
    if num_folds < 2 or not 1 <= fold <= num_folds:
        raise ValueError(f"a fold must be one of 1 to 2 or more, got {fold} of {num_folds}")
    files = _parquets(data / "data")
    if not files:
        raise ValueError(f"{data / 'data'} must hold parquet files; it has none")
    subject_S = _subjects(files)
    for number, file in enumerate(files):
        _link(file, out / "data" / f"{number}.parquet")
    for name in ("codes.parquet", "dataset.json"):
        if (data / "metadata" / name).is_file():
            _link(data / "metadata" / name, out / "metadata" / name)
    for task in sorted(folder for folder in (data / "labels").glob("*") if folder.is_dir()):
        for number, file in enumerate(_parquets(task)):
            # a name that says no split, so that the table does
            _link(file, out / "labels" / task.name / f"rows-{number}.parquet")
    table = pa.table(
        {
            "subject_id": subject_S,
            "split": np.array(SPLITS)[fold_splits(subject_S, fold, num_folds)],
        }
    )
    with committed_file(out / "metadata" / "subject_splits.parquet", private=True) as staging:
        pq.write_table(table, staging)
    return out


def fold_splits(subject_S: np.ndarray, fold: int, num_folds: int) -> np.ndarray:
    """Return the split of each subject as its place in `SPLITS`, int64 [S]."""
    place_S = hashed(subject_S) * num_folds
    fold_S = np.floor(place_S).astype(np.int64) + 1
    # the rest of the hash is as good as another one
    tuning_S = place_S % 1 < TUNING
    return np.where(fold_S == fold, 2, np.where(tuning_S, 1, 0))


def _subjects(files: list[Path]) -> np.ndarray:
    """Return the subjects of the files, each once, int64 [S]."""
    parts = []
    for file in files:
        opened = open_parquet(file)
        event_columns(file, opened.schema_arrow)  # whose errors hold no cell
        parts += [np.unique(ids) for ids in id_batches(file, opened)]
    return np.unique(np.concatenate(parts or [np.empty(0, np.int64)]))


def _parquets(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*.parquet") if p.name[0] not in "._")


def _link(file: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    os.symlink(file.resolve(), link)
