"""Makes the features of every baseline that needs no model, and what is known of each node, in one
pass over the events.

Legend: K distinct nodes, N label rows, C codes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from smbfast.data.labels import Labels
from smbfast.data.meds import MedsDataset
from smbfast.judging.scored import Traits
from smbfast.probing.boosting import MOST_FEATURES
from smbfast.probing.counts import CodeCounts, CountParts, VisibleEvents
from smbfast.probing.features import Features, join
from smbfast.probing.models import Head
from smbfast.probing.recency import CodeRecency, RecencyParts
from smbfast.probing.values import CodeValues, ValueParts

SEX = ("GENDER", "SEX")  # first part of the codes that say it: our choice, as MEDS data name them

HEADS: dict[str, Head] = {"values": "standardised", "values_boosting": "boosting"}
"""The head of a baseline, where it is not "linear"."""
LABELS = {
    "age_sex": "age and sex",
    "counts": "age, sex and code counts",
    "recency": "code counts by recency",
    "values": "counts and values",
    "values_boosting": "counts and values, boosted trees",
}
"""What tables call each baseline."""


@dataclass(frozen=True)
class Baselines:
    """What the baselines read of each node.

    sex_K: str, what follows in a code `GENDER//...` or `SEX//...`, "" where there is none; of
    several codes the one that the data name last. events_K: int64, how many events the node sees,
    those without a time too.
    """

    values: CodeValues
    recency: CodeRecency
    sex_K: np.ndarray
    events_K: np.ndarray

    @property
    def counts(self) -> CodeCounts:
        """The counts of codes."""
        return self.values.counts

    def traits(self, labels: Labels) -> Traits:
        """Return what is known of each label row of a task."""
        row_N = self.rows(labels)
        age_N, sex_N = self.counts.age_K[row_N], self.sex_K[row_N]
        return Traits(age_N, sex_N, self.events_K[row_N], order_of(labels))

    def features(self, name: str, labels: Labels) -> Features:
        """Return the features [N, F] of the baseline `name`, one of `LABELS`."""
        key = labels.subject_N, labels.time_N, labels.split_N == "train"
        if name == "age_sex":
            return self._age_sex(labels)
        if name == "counts":
            return self.counts.features(*key)
        if name == "recency":
            return self.recency.features(*key)
        if name == "values":
            return self.values.linear_features(*key)
        assert name == "values_boosting"
        # a tree never splits on what fewer rows have than a leaf holds, so that little is lost
        return self.values.features(*key, most=MOST_FEATURES)

    def rows(self, labels: Labels) -> np.ndarray:
        """Return the node of each label row, int64 [N]."""
        counts = self.counts
        return join(labels.subject_N, labels.time_N, counts.subject_K, counts.time_K)

    def _age_sex(self, labels: Labels) -> np.ndarray:
        """Return age in years, whether it is known, and a column for each sex in train."""
        row_N = self.rows(labels)
        age_N, sex_N = self.counts.age_K[row_N], self.sex_K[row_N]
        known_N = np.isfinite(age_N)
        sexes = [sex for sex in np.unique(sex_N[labels.split_N == "train"]) if sex]
        columns = [np.where(known_N, age_N, 0.0), known_N, *(sex_N == sex for sex in sexes)]
        return np.stack(columns, 1).astype(np.float64)


def baselines(
    dataset: MedsDataset,
    subject_N: np.ndarray,
    time_N: np.ndarray,
    progress: Callable[[str], None] = lambda _: None,
) -> Baselines:
    """Read the events up to every distinct (subject, prediction time) given, in one pass.

    Raises:
        ValueError: a subject is not in the dataset.
    """
    events, counted = VisibleEvents(subject_N, time_N), CountParts()
    valued, recent = ValueParts(), RecencyParts()
    for piece in events.pieces(dataset, progress):
        num_codes = max(1, len(events.vocabulary))
        counted.add(piece.node_V, piece.code_V, num_codes)
        valued.add(piece, num_codes)
        recent.add(piece, events)
    counts = counted.counts(events)
    events_K = np.asarray(counts.count_KC.sum(1)).ravel().astype(np.int64)
    sex_K = _sexes(counts, events.vocabulary)
    return Baselines(valued.values(counts), recent.recency(counts), sex_K, events_K)


def order_of(labels: Labels) -> np.ndarray:
    """Return the place of each row among those of its subject, in order of time, int64 [N]."""
    order_N = np.lexsort((labels.time_N, labels.subject_N))
    _, first_S, size_S = np.unique(labels.subject_N[order_N], return_index=True, return_counts=True)
    place_N = np.empty(len(labels), np.int64)
    place_N[order_N] = np.arange(len(labels)) - np.repeat(first_S, size_S)
    return place_N


def _sexes(counts: CodeCounts, vocabulary: dict[str, int]) -> np.ndarray:
    """Return the sex of each node, str [K]."""
    sex_K = np.full(len(counts.subject_K), "", dtype=object)
    for code, place in vocabulary.items():
        first, _, sex = code.partition("//")
        if first in SEX:
            sex_K[counts.count_KC[:, [place]].nonzero()[0]] = sex
    return sex_K.astype(str)
