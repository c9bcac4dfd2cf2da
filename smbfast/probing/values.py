"""Computes a stronger baseline: counts of codes, with the last, mean, least and largest value of
each code that has numbers, up to the prediction time.

Of values at the same time the one that the file names last is the last. What a node may see is what
`counts` lets it see. Legend: K distinct nodes, C codes, N label rows, V visible (node, event)
pairs, P pairs of a node and a code with values, E those of a label
row and such a code, S codes with a value in train, 4 summaries (last, mean, min, max), F features.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import csr_matrix, hstack

from smbfast.data.meds import MedsDataset
from smbfast.probing.counts import CodeCounts, CountParts, Piece, VisibleEvents
from smbfast.probing.features import Gapped, join

_DENSE = 1 << 27  # numbers that are held with those that are absent: 1 GiB
SUMMARIES = ("last", "mean", "min", "max")


@dataclass(frozen=True)
class CodeValues:
    """Counts, and summaries of the values, at K nodes.

    node_P int64 (ascending), code_P int64; summary_P4 float64, in the order of `SUMMARIES`.
    """

    counts: CodeCounts
    node_P: np.ndarray
    code_P: np.ndarray
    summary_P4: np.ndarray

    def features(
        self,
        subject_N: np.ndarray,
        time_N: np.ndarray,
        train_N: np.ndarray,
        most: int | None = None,
    ) -> np.ndarray | Gapped:
        """Return float64 [N, F]: the features of `CodeCounts`, dense, then of each code that has a
        value in the train rows the last, mean, least and largest one; nan where there is none. Of
        more than `most` features those stay that most train rows have. More than 1 GiB of them
        stay sparse."""
        count_NF = self.counts.features(subject_N, time_N, train_N)
        row_E, column_E, summary_E4, num_seen = self._entries(subject_N, time_N, train_N)
        at_E4 = 4 * column_E[:, None] + np.arange(4)
        entries = summary_E4.ravel(), (np.repeat(row_E, 4), at_E4.ravel())
        value_NG = csr_matrix(entries, shape=(len(subject_N), 4 * num_seen))
        gapped = Gapped(count_NF, value_NG)
        if most is not None and gapped.shape[1] > most:
            gapped = gapped.commonest(np.flatnonzero(train_N), most)
        return gapped if gapped.size > _DENSE else gapped.toarray()

    def linear_features(
        self, subject_N: np.ndarray, time_N: np.ndarray, train_N: np.ndarray
    ) -> csr_matrix:
        """Return csr float64 [N, F] for a linear model: the features of `CodeCounts`, then of each
        code with a value in the train rows the last, mean, least and largest one, less its mean
        over those of train (so 0, which stands where there is none, is the mean), then whether
        there is one."""
        count_NF = self.counts.features(subject_N, time_N, train_N)
        row_E, column_E, summary_E4, num_seen = self._entries(subject_N, time_N, train_N)
        train_E = train_N[row_E]
        size_S = np.bincount(column_E[train_E], minlength=num_seen)
        parts = []
        for summary_E in summary_E4.T:
            sum_S = np.bincount(column_E[train_E], summary_E[train_E], minlength=num_seen)
            parts.append(summary_E - (sum_S / size_S)[column_E])
        parts.append(np.ones(len(row_E)))
        shape = (len(subject_N), num_seen)
        own = [csr_matrix((part_E, (row_E, column_E)), shape=shape) for part_E in parts]
        return hstack([count_NF, *own], format="csr")

    def _entries(
        self, subject_N: np.ndarray, time_N: np.ndarray, train_N: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """Return the label row, the column and the summaries (float64 [E, 4]) of every pair of a
        row and a code with values, and the number of columns: those codes that have a value in the
        train rows."""
        row_N = join(subject_N, time_N, self.counts.subject_K, self.counts.time_K)
        num_nodes, num_codes = self.counts.count_KC.shape
        in_train_K = np.zeros(num_nodes, bool)
        in_train_K[row_N[train_N]] = True
        seen = np.unique(self.code_P[in_train_K[self.node_P]])
        column_C = np.full(num_codes, -1)
        column_C[seen] = np.arange(len(seen))
        wanted_P = column_C[self.code_P] >= 0
        node_P, column_P = self.node_P[wanted_P], column_C[self.code_P[wanted_P]]
        # the pairs of a label row, whose node may stand for several rows
        first_N, last_N = (np.searchsorted(node_P, row_N, side) for side in ("left", "right"))
        size_N = last_N - first_N
        at_E = np.repeat(first_N - np.cumsum(size_N) + size_N, size_N) + np.arange(size_N.sum())
        row_E = np.repeat(np.arange(len(row_N)), size_N)
        return row_E, column_P[at_E], self.summary_P4[wanted_P][at_E], len(seen)


@dataclass
class ValueParts:
    """Summaries of a pass, piece by piece."""

    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)

    def add(self, piece: Piece, num_codes: int) -> None:
        """Summarise the values of a piece, whose codes are below `num_codes`."""
        with_value_V = ~np.isnan(piece.value_V)
        pair_V = piece.node_V[with_value_V] * num_codes + piece.code_V[with_value_V]
        value_V = piece.value_V[with_value_V].astype(np.float64)
        pair_P, summary_P4 = _summaries(pair_V, value_V)
        self.parts.append((*np.divmod(pair_P, num_codes), summary_P4))

    def values(self, counts: CodeCounts) -> CodeValues:
        """Return the summaries beside the counts of the same pass, after it."""
        empty = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, 4)))
        node_P, code_P, summary_P4 = (
            np.concatenate(part) for part in zip(empty, *self.parts, strict=True)
        )
        order_P = np.argsort(node_P, kind="stable")
        return CodeValues(counts, node_P[order_P], code_P[order_P], summary_P4[order_P])


def code_values(
    dataset: MedsDataset,
    subject_N: np.ndarray,
    time_N: np.ndarray,
    progress: Callable[[str], None] = lambda _: None,
) -> CodeValues:
    """Count codes and summarise values at every distinct (subject, prediction time) given, in one
    pass.

    Raises:
        ValueError: a subject is not in the dataset.
    """
    events, counted, valued = VisibleEvents(subject_N, time_N), CountParts(), ValueParts()
    for piece in events.pieces(dataset, progress):
        num_codes = max(1, len(events.vocabulary))
        counted.add(piece.node_V, piece.code_V, num_codes)
        valued.add(piece, num_codes)
    return valued.values(counted.counts(events))


def _summaries(pair_V: np.ndarray, value_V: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct pairs and the summaries of their values, which are in order of time."""
    order_V = np.argsort(pair_V, kind="stable")
    pair_V, value_V = pair_V[order_V], value_V[order_V]
    pair_P, first_P, size_P = np.unique(pair_V, return_index=True, return_counts=True)
    if len(pair_P) == 0:
        return pair_P, np.empty((0, 4))
    last_P, mean_P = value_V[first_P + size_P - 1], np.add.reduceat(value_V, first_P) / size_P
    least_P, most_P = (ufunc.reduceat(value_V, first_P) for ufunc in (np.minimum, np.maximum))
    return pair_P, np.stack([last_P, mean_P, least_P, most_P], 1)
