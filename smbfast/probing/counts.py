"""Computes the plain baseline: age, and how often each code occurred up to the prediction time.

Sex is counted by its static code, as is every code without a time. Events after the prediction
time are never read, a birth included.

Legend: K distinct nodes, C codes, N label rows, J nodes of a batch, P nodes of a piece of it, V
visible (node, event) pairs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix, hstack

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
    node_K2 = np.unique(np.stack([subject_N, time_N], 1), axis=0)
    subject_K, time_K = node_K2[:, 0], node_K2[:, 1]
    seen_K = np.zeros(len(node_K2), bool)
    birth_K = np.full(len(node_K2), STATIC)
    vocabulary: dict[str, int] = {}
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for split in SPLITS:
        batches = dataset.batches(split, np.unique(subject_K), text_chars=0)  # no text is used
        for number, batch in enumerate(batches):
            progress(f"{split}, batch {number + 1}")
            new_C = [vocabulary.setdefault(code, len(vocabulary)) for code in batch.codes]
            code_C, width = np.array(new_C, np.int64), max(1, len(vocabulary))
            for node_V, code_V in _visible(batch, subject_K, time_K, seen_K, birth_K):
                pair, count = np.unique(node_V * width + code_C[code_V], return_counts=True)
                parts.append((*np.divmod(pair, width), count))
    if not seen_K.all():
        raise ValueError(
            f"{dataset.path} must hold every labelled subject; "
            f"{len(np.unique(subject_K[~seen_K]))} are not in it"
        )
    node, code, count = (np.concatenate(p) for p in zip(*parts, strict=True))
    shape = (len(node_K2), len(vocabulary))
    # entries of one node and code that came in several pieces are added up here
    count_KC = csr_matrix((count.astype(np.float64), (node, code)), shape=shape)
    age_K = np.where(birth_K == STATIC, np.nan, (time_K - birth_K.astype(np.float64)) / _YEAR)
    return CodeCounts(subject_K, time_K, count_KC, age_K)


def _visible(
    batch: EventBatch,
    subject_K: np.ndarray,
    time_K: np.ndarray,
    seen_K: np.ndarray,
    birth_K: np.ndarray,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (node, code of the batch) for every event a node may see, in bounded pieces; mark
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
        yield np.repeat(node_J[inside], size_P), batch.code_N[row_V]
