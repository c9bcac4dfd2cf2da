"""Simulated patients: what the runs on a cohort share, and the patients who judge them.

Legend: K nodes, N label rows.
"""

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smbfast.base.files import committed_folder, digest_of
from smbfast.data.prepared import Prepared
from smbfast.probing.features import join
from smbfast.run.folder import data_of, prepared_data
from smbfast.settings import TrainSettings
from smbfast.simulation.dataset import simulate

TASKS = ("death_1y", "death_3y", "progression_1y")
APART = 100_000  # from the seed of a run's cohort to that of the patients who judge it
SHIFT = 10**9  # added to their subject ids: patient i of every cohort has the id i + 1


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
