"""Data of `bench.cohorts`: a run's own patients, beside those of another cohort that judge it.

A run with cohort seed S is judged by patients that were simulated for that alone, with seed
S + 100,000. They stand in one MEDS folder with the run's own patients of train and tuning, as its
split held_out, so that `smbfast.embed` and the probes read all of them as they read any dataset.
The held-out patients of the run's own cohort are not in it.

Legend: K nodes, L lines, T tokens, V tokens of the vocabulary, P tokens that a node sees.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy.sparse import csr_matrix, hstack
from transformers import AutoTokenizer

from smbfast.base.files import committed_folder
from smbfast.batch import Timeline
from smbfast.data.formats import read_encoding, serializer_of
from smbfast.data.meds import MedsDataset
from smbfast.data.splits import SPLITS
from smbfast.probing.features import join
from smbfast.simulation.dataset import simulate

TASKS = ("death_1y", "death_3y", "progression_1y")
APART = 100_000  # from the seed of a run's cohort to that of the patients who judge it
SHIFT = 10**9  # added to their subject ids: patient i of every cohort has the id i + 1
YEAR = int(365.25 * 86_400e6)  # microseconds


def separate_cohort(work: Path, seed: int, patients: int, split: str) -> Path:
    """Return the folder with the patients of one split of the cohort that judges seed `seed`.

    It is simulated once and kept in `work`; the patients of the other splits are removed.
    """
    folder = work / f"separate-{patients}-{seed + APART}-{split}"
    if not folder.is_dir():
        with committed_folder(folder) as staging:
            whole = staging / "whole"
            simulate(whole, patients, seed + APART)
            shutil.move(whole / "data" / split, staging / "data")
            for kind in ("labels", "oracles"):
                (staging / kind).mkdir()
                for task in TASKS:
                    file = whole / kind / task / f"{split}.parquet"
                    shutil.move(file, staging / kind / f"{task}.parquet")
            shutil.rmtree(whole)
    return folder


def joined(work: Path, own: Path, seed: int, patients: int, split: str) -> Path:
    """Return a MEDS folder with train and tuning of `own`, and separate patients as held_out.

    It is made once and kept in `work`. The name holds a digest of the run's own patients, so that
    two versions that simulate other patients from one seed never share it.

    Args:
        own: the simulated cohort that a run trained on.
        seed: the seed of that cohort.
        patients: the size of the separate cohort, all splits together.
        split: the split of the separate cohort whose patients judge.
    """
    folder = work / f"joined-{digest(own)}-{patients}-{seed + APART}-{split}"
    if folder.is_dir():
        return folder
    separate = separate_cohort(work, seed, patients, split)
    with committed_folder(folder) as staging:
        shutil.copytree(own / "metadata", staging / "metadata")
        (staging / "metadata" / "subject_splits.parquet").unlink()  # folders name the splits
        for own_split in ("train", "tuning"):
            shutil.copytree(own / "data" / own_split, staging / "data" / own_split)
            for task in TASKS:
                target = staging / "labels" / task / f"{own_split}.parquet"
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(own / "labels" / task / f"{own_split}.parquet", target)
        for file in sorted((separate / "data").glob("*.parquet")):
            _shifted(file, staging / "data" / "held_out" / file.name)
        for kind in ("labels", "oracles"):
            for task in TASKS:
                file = separate / kind / f"{task}.parquet"
                _shifted(file, staging / kind / task / "held_out.parquet")
    return folder


def digest(own: Path) -> str:
    """Return 12 hex digits of what the files of train and tuning hold: events and labels."""
    total = hashlib.sha256()
    for split in ("train", "tuning"):
        files = sorted((own / "data" / split).glob("*.parquet"))
        for file in [*files, *(own / "labels" / task / f"{split}.parquet" for task in TASKS)]:
            total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()[:12]


def _shifted(file: Path, target: Path) -> None:
    table = pq.read_table(file)
    index = table.schema.get_field_index("subject_id")
    ids = pc.add(table["subject_id"], pa.scalar(SHIFT, pa.int64()))
    target.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.set_column(index, table.schema.field(index), ids), target)


def bag_of_tokens(
    final: Path,
    data: Path,
    subject_K: np.ndarray,
    time_K: np.ndarray,
    say: Callable[[str], None] = lambda _: None,
) -> csr_matrix:
    """Return how often each token of a run stands in the record of each node, csr [K, 2 V].

    The tokens are those of the model in `final`, of the whole record and not of a window; the first
    V columns count what happened up to the node, the others what happened in the year before it.
    Tags, headers and whatever else is in no line is left out; demographics have no time and count
    in the first V columns alone.

    Raises:
        ValueError: this version cannot read the format of the model.
    """
    # records of the first version do not name their format, which was the paper's
    record = {"data_format": "text-paper", **json.loads((final / "smbfast.json").read_text())}
    tokenizer = AutoTokenizer.from_pretrained(final, local_files_only=True)
    dataset = MedsDataset.open(data)
    serializer = serializer_of(dataset, read_encoding(final, tokenizer, record), record)
    order_K = np.lexsort((time_K, subject_K))
    sorted_K = subject_K[order_K]
    ever: list[np.ndarray] = [np.empty(0, np.int64)] * len(subject_K)
    year = list(ever)
    for split in SPLITS:
        for number, batch in enumerate(dataset.batches(split, np.unique(subject_K))):
            say(f"tokens of {split}, batch {number + 1}")
            for timeline in serializer.timelines(batch):
                first, last = np.searchsorted(sorted_K, [timeline.subject, timeline.subject + 1])
                for k in order_K[first:last]:
                    ever[k], year[k] = seen_tokens(timeline, int(time_K[k]))
    return hstack([_counts(ever, record["vocabulary"]), _counts(year, record["vocabulary"])], "csr")


def seen_tokens(timeline: Timeline, time: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the token ids (int32 [P]) of a record up to `time`, and of the year before it.

    A line counts if its last event is not after `time`.
    """
    ids_T, header = timeline.ids_T, timeline.ids_T[: timeline.header]
    seen_L = timeline.line_time_L <= time
    recent_L = seen_L & (timeline.line_time_L > time - YEAR)
    ever_P, year_P = (
        ids_T[_inside(timeline.line_start_L[own_L], timeline.line_end_L[own_L])]
        for own_L in (seen_L, recent_L)
    )
    return np.concatenate([header, ever_P]), year_P


def _inside(start_L: np.ndarray, end_L: np.ndarray) -> np.ndarray:
    """Return the rows of the tokens in `[start, end)` of each line, int64 [P]."""
    length_L = (end_L - start_L).astype(np.int64)
    before_L = np.cumsum(length_L) - length_L
    return np.arange(length_L.sum()) + np.repeat(start_L - before_L, length_L)


def _counts(ids: list[np.ndarray], width: int) -> csr_matrix:
    row = np.repeat(np.arange(len(ids)), [len(own) for own in ids])
    column = np.concatenate([*ids, np.empty(0, np.int64)]).astype(np.int64)
    ones = np.ones(len(row))
    # entries of one token that occurs again are added up here
    return csr_matrix((ones, (row, column)), shape=(len(ids), width))


def bag_features(
    count_KV: csr_matrix,
    row_N: np.ndarray,
    age_N2: np.ndarray | csr_matrix,
    train_N: np.ndarray,
) -> csr_matrix:
    """Return csr float64 [N, 2 + columns]: age, whether it is known, log1p of counts.

    The columns are those that are not empty in the train rows, as with code counts.

    Args:
        count_KV: as `bag_of_tokens` gives it.
        row_N: the row of each label in it.
        age_N2: age in years and whether it is known.
        train_N: bool, the rows of train.
    """
    count_NV = count_KV[row_N]
    seen_V = np.unique(count_NV[np.flatnonzero(train_N)].indices)
    return hstack([csr_matrix(age_N2), count_NV[:, seen_V].log1p()], format="csr")


def rows_of(
    subject_N: np.ndarray, time_N: np.ndarray, subject_K: np.ndarray, time_K: np.ndarray
) -> np.ndarray:
    """Return the row in K of each pair in N, int64 [N].

    Raises:
        ValueError: a pair is not in K.
    """
    row_N = join(subject_N, time_N, subject_K, time_K)
    if (row_N < 0).any():
        raise ValueError(
            f"every label must have a row of its own; {int(np.sum(row_N < 0))} of {len(row_N)} "
            "have none"
        )
    return row_N
