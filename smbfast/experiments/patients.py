"""Simulated patients: what the runs on a cohort share, and the patients who judge them.

Legend: K nodes, L lines, T tokens, V tokens of the vocabulary, P tokens that a node sees.
"""

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy.sparse import csr_matrix, hstack

from smbfast.base.files import committed_folder, digest_of
from smbfast.batch import Timeline
from smbfast.data.meds import MedsDataset
from smbfast.data.prepared import Prepared
from smbfast.data.splits import SPLITS
from smbfast.probing.features import join
from smbfast.run.folder import data_of, prepared_data
from smbfast.settings import TrainSettings
from smbfast.simulation.dataset import simulate

TASKS = ("death_1y", "death_3y", "progression_1y")
APART = 100_000  # from the seed of a run's cohort to that of the patients who judge it
SHIFT = 10**9  # added to their subject ids: patient i of every cohort has the id i + 1
YEAR = int(365.25 * 86_400e6)  # microseconds


@dataclass(frozen=True)
class Shared:
    """What all runs on a cohort read: its patients and the token shards of train and tuning."""

    cohort: Path
    prepared: Prepared

    @classmethod
    def of(cls, work: Path, settings: TrainSettings) -> "Shared":
        """Simulate the cohort of a run and make its shards, as the run would, or open them.

        They lie in `work`, in a folder for each choice of cohort, data settings and tokenizer.
        """
        folder = work / f"data-{settings.cohort.seed}-{shared_key(settings)}"
        folder.mkdir(parents=True, exist_ok=True)
        data = data_of(settings, folder)
        data = data.model_copy(update={"prepared": str(folder / "prepared")})
        return cls(data.folder, prepared_data(settings, data, folder))

    def lend(self, run: Path) -> list[str]:
        """Link the cohort into a run's folder, where the run looks for it, and return the words
        that tell it of the shards."""
        run.mkdir(parents=True, exist_ok=True)
        link = run / self.cohort.name
        if not link.is_symlink():
            link.symlink_to(self.cohort.resolve(), target_is_directory=True)
        return [f"--data.prepared={self.prepared.folder.resolve()}"]


def shared_key(settings: TrainSettings) -> str:
    """Return a digest of the settings that decide what runs share."""
    made_of = (settings.cohort.model_dump(), settings.data.model_dump(), settings.model.path)
    return digest_of(*made_of)[:8]


def judged_by(work: Path, own: Path, seed: int, patients: int, split: str) -> Path:
    """Return a MEDS folder with train and tuning of `own`, and those who judge as held_out.

    Of the split held_out that is `own` itself. Of tuning the judges are the tuning patients of
    another cohort, with seed `seed` + 100,000: those of `own` choose penalties, and are few.
    """
    return own if split == "held_out" else joined(work, own, seed, patients)


def separate_cohort(work: Path, seed: int, patients: int) -> Path:
    """Return the folder with the tuning patients of the cohort that judges seed `seed`.

    It is simulated once and stays in `work`; the patients of the other splits are removed.
    """
    folder = work / f"separate-{patients}-{seed + APART}"
    if not folder.is_dir():
        with committed_folder(folder) as staging:
            whole = staging / "whole"
            simulate(whole, patients, seed + APART)
            shutil.move(whole / "data" / "tuning", staging / "data")
            for kind in ("labels", "oracles"):
                (staging / kind).mkdir()
                for task in TASKS:
                    file = whole / kind / task / "tuning.parquet"
                    shutil.move(file, staging / kind / f"{task}.parquet")
            shutil.rmtree(whole)
    return folder


def joined(work: Path, own: Path, seed: int, patients: int) -> Path:
    """Return a MEDS folder with train and tuning of `own`, and separate patients as held_out.

    It is made once and stays in `work`. The name holds a digest of the run's own patients, so that
    two versions that simulate other patients from one seed never share it.

    Args:
        own: the simulated cohort that runs train on.
        seed: the seed of that cohort.
        patients: the size of the separate cohort, all splits together.
    """
    folder = work / f"joined-{digest(own)}-{patients}-{seed + APART}"
    if folder.is_dir():
        return folder
    separate = separate_cohort(work, seed, patients)
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
    dataset: MedsDataset, prepared: Prepared, subject_K: np.ndarray, time_K: np.ndarray
) -> csr_matrix:
    """Return how often each token of a run stands in the record of each node, csr [K, 2 V].

    The tokens are those of the run's shards, of the whole record and not of a window; the first V
    columns count what happened up to the node, the others what happened in the year before it.
    Tags, headers and whatever else is in no line is left out; demographics have no time and count
    in the first V columns alone.
    """
    serializer, width = prepared.serializer(dataset), len(prepared.tokenizer)
    order_K = np.lexsort((time_K, subject_K))
    sorted_K = subject_K[order_K]
    ever: list[np.ndarray] = [np.empty(0, np.int64)] * len(subject_K)
    year = list(ever)
    for split in SPLITS:
        for batch in dataset.batches(split, np.unique(subject_K)):
            for timeline in serializer.timelines(batch):
                first, last = np.searchsorted(sorted_K, [timeline.subject, timeline.subject + 1])
                for k in order_K[first:last]:
                    ever[k], year[k] = seen_tokens(timeline, int(time_K[k]))
    return hstack([_counts(ever, width), _counts(year, width)], "csr")


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
