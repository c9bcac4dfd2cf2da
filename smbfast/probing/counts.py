"""Computes the plain baseline: age, and how often each code occurred up to the prediction time.

Sex is counted by its static code, as is every code without a time. Events after the prediction
time are never read, a birth included.

Legend: K distinct nodes, C codes, N label rows, J nodes of a batch, P nodes of a piece of it, V
visible (node, event) pairs, of a node in the order of its events.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix, hstack

from smbfast.base.counts import of_whole
from smbfast.data.meds import BIRTH, STATIC, EventBatch, MedsDataset
from smbfast.data.splits import SPLITS
from smbfast.probing.features import join

_YEAR = 365.25 * 86_400e6  # microseconds
_ROWS = 4_000_000  # (node, event) pairs held at once


@dataclass(frozen=True)
class CodeCounts:
    """Counts of events with `time <= prediction_time` (or no time) at K nodes.

    subject_K, time_K int64; count_KC csr float64; age_K float64 years, nan where no birth is known.
    """

    subject_K: np.ndarray
    time_K: np.ndarray
    count_KC: csr_matrix
    age_K: np.ndarray

    def features(
        self, subject_N: np.ndarray, time_N: np.ndarray, train_N: np.ndarray
    ) -> csr_matrix:
        """Return float64 [N, 2 + codes in train]: age in years, whether it is known, log1p(count).

        The codes are those that occur in the train rows.
        """
        row_N = join(subject_N, time_N, self.subject_K, self.time_K)
        count_NC = self.count_KC[row_N]
        seen_C = np.unique(count_NC[np.flatnonzero(train_N)].indices)
        known_N = np.isfinite(self.age_K[row_N])
        age_N2 = np.stack([np.where(known_N, self.age_K[row_N], 0.0), known_N], 1)
        return hstack([csr_matrix(age_N2), count_NC[:, seen_C].log1p()], format="csr")


class Piece(NamedTuple):
    """Visible events of whole nodes, of each in order of time.

    node_V: place in K; code_V: place in the vocabulary; value_V: float32, nan where there is none;
    time_V: int64, microseconds since 1970, `STATIC` where there is none.
    """

    node_V: np.ndarray
    code_V: np.ndarray
    value_V: np.ndarray
    time_V: np.ndarray


class VisibleEvents:
    """The events that decision nodes may see, read in one pass.

    subject_K, time_K: the distinct nodes, sorted; vocabulary: the place of each code met so far.
    """

    def __init__(self, subject_N: np.ndarray, time_N: np.ndarray) -> None:
        """Take the nodes, each as often as it comes."""
        node_K2 = np.unique(np.stack([subject_N, time_N], 1), axis=0)
        self.subject_K, self.time_K = node_K2[:, 0], node_K2[:, 1]
        self.vocabulary: dict[str, int] = {}
        self._seen_K = np.zeros(len(node_K2), bool)
        self._birth_K = np.full(len(node_K2), STATIC)

    def pieces(self, dataset: MedsDataset, progress: Callable[[str], None]) -> Iterator[Piece]:
        """Yield every visible event, in bounded pieces that no node is divided by.

        Raises:
            ValueError: a subject is not in the dataset.
        """
        for split in SPLITS:
            batches = dataset.batches(split, np.unique(self.subject_K), text_chars=0)
            for number, batch in enumerate(batches):
                progress(f"{split}, batch {number + 1}")
                known = self.vocabulary
                code_C = np.array([known.setdefault(c, len(known)) for c in batch.codes], np.int64)
                for node_V, row_V in _visible(
                    batch, self.subject_K, self.time_K, self._seen_K, self._birth_K
                ):
                    code_V = code_C[batch.code_N[row_V]]
                    yield Piece(node_V, code_V, batch.value_N[row_V], batch.time_N[row_V])
        if not self._seen_K.all():
            missing, labelled = (
                len(np.unique(subject_K))
                for subject_K in (self.subject_K[~self._seen_K], self.subject_K)
            )
            raise ValueError(
                f"{dataset.path} must hold every labelled subject; "
                f"{of_whole(missing, labelled)} are not in it"
            )

    def age_K(self) -> np.ndarray:
        """Return the age in years at each node, nan without a birth; after the pass."""
        known_K = self._birth_K != STATIC
        return np.where(known_K, (self.time_K - self._birth_K.astype(np.float64)) / _YEAR, np.nan)


@dataclass
class CountParts:
    """Counts of a pass, piece by piece."""

    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)

    def add(self, node_V: np.ndarray, code_V: np.ndarray, num_codes: int) -> None:
        """Count a piece, whose codes are below `num_codes`."""
        pair, count = np.unique(node_V * num_codes + code_V, return_counts=True)
        self.parts.append((*np.divmod(pair, num_codes), count))

    def counts(self, events: VisibleEvents) -> CodeCounts:
        """Return the counts, after the pass."""
        node, code, count = (np.concatenate(p) for p in zip(*self.parts, strict=True))
        shape = (len(events.subject_K), len(events.vocabulary))
        count_KC = csr_matrix((count.astype(np.float64), (node, code)), shape=shape)
        return CodeCounts(events.subject_K, events.time_K, count_KC, events.age_K())


def count_codes(
    dataset: MedsDataset,
    subject_N: np.ndarray,
    time_N: np.ndarray,
    progress: Callable[[str], None] = lambda _: None,
) -> CodeCounts:
    """Count the codes at every distinct (subject, prediction time) given, in one pass.

    Raises:
        ValueError: a subject is not in the dataset.
    """
    events, counted = VisibleEvents(subject_N, time_N), CountParts()
    for piece in events.pieces(dataset, progress):
        counted.add(piece.node_V, piece.code_V, max(1, len(events.vocabulary)))
    return counted.counts(events)


def _visible(
    batch: EventBatch,
    subject_K: np.ndarray,
    time_K: np.ndarray,
    seen_K: np.ndarray,
    birth_K: np.ndarray,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (node, row of the batch) for every event a node may see, in bounded pieces; mark
    the nodes of the batch in `seen_K` and write their births to `birth_K`.

    Events of a subject are sorted by time, so what a node sees is a prefix of them.
    """
    birth_C = np.array([code.split("//")[0] == BIRTH for code in batch.codes], bool)
    nodes: list[np.ndarray] = []
    starts: list[np.ndarray] = []
    ends: list[np.ndarray] = []
    for start, end in zip(batch.offset_S1[:-1], batch.offset_S1[1:], strict=True):
        subject = batch.subject_N[start]
        node_J = np.arange(*np.searchsorted(subject_K, [subject, subject + 1]))
        end_J = start + np.searchsorted(batch.time_N[start:end], time_K[node_J], side="right")
        seen_K[node_J] = True
        for row in start + np.flatnonzero(birth_C[batch.code_N[start:end]]):
            if batch.time_N[row] != STATIC:
                birth_K[node_J[(end_J > row) & (birth_K[node_J] == STATIC)]] = batch.time_N[row]
        nodes.append(node_J)
        starts.append(np.full(len(node_J), start))
        ends.append(end_J)
    node_J, start_J, end_J = (np.concatenate(x).astype(np.int64) for x in (nodes, starts, ends))
    size_J = end_J - start_J
    piece_J = np.cumsum(size_J) // _ROWS
    for piece in np.unique(piece_J):
        inside = piece_J == piece
        size_P, start_P = size_J[inside], start_J[inside]
        first_P = np.cumsum(size_P) - size_P
        row_V = np.arange(size_P.sum()) - np.repeat(first_P - start_P, size_P)
        yield np.repeat(node_J[inside], size_P), row_V
