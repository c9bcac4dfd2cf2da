"""What the labels of a run's tasks are worth to a probe, before anything is prepared or trained.

Legend: N label rows, K labelled subjects.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from smbfast.base.counts import share
from smbfast.base.runtime import few
from smbfast.batch import Timeline
from smbfast.data.labels import Labels, splits_read
from smbfast.data.meds import MedsDataset
from smbfast.data.shards import Shard
from smbfast.data.splits import SPLITS

MATCHED = 0.95  # share of label rows with a subject of the data, below it a run warns: our choice
_LOOKED_AT = 20_000  # labelled subjects of a task whose first event is looked up, at most
_SHARDS = 32  # that are read for it, at most, so that it does not grow with the data


@dataclass(frozen=True)
class TaskFacts:
    """Label rows of one task, by whether the dataset has their subject."""

    task: str
    kind: str  # binary or time_to_event
    num_rows: int
    matched: dict[str, int]  # rows by split whose subject is in it
    # of the matched in train and tuning: true labels, or observed events; held_out is for the end
    positives: dict[str, int]
    labels: Labels
    findings: tuple[str, ...] = ()  # what contradicts the definition beside them, if there is one

    @classmethod
    def of(cls, labels: Labels, dataset: MedsDataset) -> "TaskFacts":
        """Join the labels of a task with the subjects of a dataset."""
        true_N = labels.binary_N if labels.kind == "binary" else labels.survival_N[1]
        known = {
            split: (labels.split_N == split) & np.isin(labels.subject_N, dataset.subjects(split))
            for split in SPLITS
        }
        return cls(
            labels.task,
            labels.kind,
            len(labels),
            {split: int(known_N.sum()) for split, known_N in known.items()},
            {split: int((known[split] & true_N).sum()) for split in splits_read(final=False)},
            labels,
        )

    @property
    def num_matched(self) -> int:
        """Rows whose subject is in the data."""
        return sum(self.matched.values())

    def refusals(self) -> list[str]:
        """Return why no probe can be fitted to these labels, as whole sentences."""
        if not self.num_matched:
            return [
                f"labels of {self.task} match no subject of the data ({few(self.num_rows)} rows); "
                "name the labels of this dataset in probe.labels, or the dataset of these labels "
                "in data.path."
            ]
        rows, true = self.matched["train"], self.positives["train"]
        if self.kind == "time_to_event" and rows and not true:
            return [
                f"labels of {self.task} have no observed event in train, so that no risk can be "
                "fitted; leave the task out of probe.labels, or give it a longer follow-up."
            ]
        if self.kind == "binary" and rows and true in (0, rows):
            only = "true" if true else "false"
            return [
                f"labels of {self.task} are all {only} in train, so that no probe can be fitted; "
                "leave the task out of probe.labels, or give it rows of both classes."
            ]
        return []

    def warnings(self) -> list[str]:
        """Return what will make figures of these labels less than they seem."""
        texts = [f"labels of {self.task}: {text}" for text in self.findings]
        if self.num_matched < MATCHED * self.num_rows:
            matched = share(self.num_matched, self.num_rows)
            texts += [
                f"labels of {self.task}: only {matched} of the rows match a subject of the data; "
                "figures will be of these alone, so check that labels and data are of the same "
                "export."
            ]
        return texts


def require_none(refusals: Sequence[str]) -> None:
    """Raise a ValueError of all refusals, in one line."""
    if refusals:
        raise ValueError(" Also: ".join(refusals))


def before_records(
    labels: Labels, split: str, shards: Sequence[Shard | list[Timeline]]
) -> tuple[int, int]:
    """Return how many label rows lie before all events of their subject, and how many were read.

    Rows of subjects in up to `_SHARDS` shards are read, those of up to `_LOOKED_AT`. With the text
    formats a record begins with its first bucket, so a time within that but before its first event
    is not seen to be too early.

    Args:
        shards: those of `split`.
    """
    mine_N = labels.split_N == split
    wanted_K = np.unique(labels.subject_N[mine_N])
    if len(wanted_K) > _LOOKED_AT:
        wanted_K = wanted_K[np.linspace(0, len(wanted_K) - 1, _LOOKED_AT).astype(np.int64)]
    first = {}
    spread = np.unique(np.linspace(0, max(len(shards) - 1, 0), _SHARDS).astype(np.int64))
    for shard in (shards[i] for i in spread.tolist() if shards):
        place = np.flatnonzero(np.isin(_subjects(shard), wanted_K))
        for timeline in (shard[i] for i in place.tolist()):
            if len(timeline.bucket_time_B):
                first[timeline.subject] = int(timeline.bucket_time_B[0])
    known_K = np.array(sorted(first), np.int64)
    first_K = np.array([first[s] for s in known_K.tolist()], np.int64)
    rows_N = mine_N & np.isin(labels.subject_N, known_K)
    at_N = np.searchsorted(known_K, labels.subject_N[rows_N])
    return int((labels.time_N[rows_N] < first_K[at_N]).sum()), int(rows_N.sum())


def _subjects(shard: Shard | list[Timeline]) -> np.ndarray:
    if isinstance(shard, Shard):
        return shard.subjects()
    return np.array([timeline.subject for timeline in shard], np.int64)
