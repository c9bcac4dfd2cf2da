"""Counts the tokens of a model in the record of each node: what its tokenisation alone gives.

The tokens are those of the whole record and not of a window. Tags, headers and whatever else is in
no line is left out; demographics have no time and count as ever.

Legend: K distinct nodes, N label rows, L lines, V tokens of the vocabulary, P tokens that a node
sees, E entries of a sparse matrix.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import csr_matrix, hstack

from smbfast.base.files import read_json
from smbfast.batch import Timeline
from smbfast.data.meds import MedsDataset
from smbfast.data.splits import SPLITS
from smbfast.probing.features import join

if TYPE_CHECKING:
    from smbfast.data.formats import PatientSerializer

DAY = 86_400_000_000  # microseconds


@dataclass(frozen=True)
class TokenBag:
    """How often each token stands in the record of each node: csr [K, V], up to the node (`ever`)
    and in the days before it (`recent`, None where that is the same)."""

    subject_K: np.ndarray
    time_K: np.ndarray
    ever_KV: csr_matrix
    recent_KV: csr_matrix | None

    def features(
        self,
        subject_N: np.ndarray,
        time_N: np.ndarray,
        train_N: np.ndarray,
        age_N2: np.ndarray | csr_matrix,
    ) -> csr_matrix:
        """Return csr float64 [N, 2 + columns]: age in years, whether it is known, log1p of counts.

        The columns are those that are not empty in the train rows, as with code counts.
        """
        row_N = join(subject_N, time_N, self.subject_K, self.time_K)
        parts = [csr_matrix(age_N2)]
        for count_KV in (self.ever_KV, self.recent_KV):
            if count_KV is not None:
                count_NV = count_KV[row_N]
                seen_V = np.unique(count_NV[np.flatnonzero(train_N)].indices)
                parts.append(count_NV[:, seen_V].log1p())
        return hstack(parts, format="csr")


def serializer_at(model: Path, dataset: MedsDataset) -> "PatientSerializer":
    """Return what makes the tokens of a dataset for the model in a folder.

    Raises:
        ValueError: the folder is no trained model, or of another version of its format.
    """
    from transformers import AutoTokenizer  # seconds, and the codes need none of it

    from smbfast.data.formats import read_encoding, serializer_of

    if not (model / "smbfast.json").is_file():
        raise ValueError(
            f"`model` must be the folder of a trained model, such as final, got {model}"
        )
    record = read_json(model / "smbfast.json")
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    return serializer_of(dataset, read_encoding(model, tokenizer, record), record)


def tokens_digest(model: Path) -> str:
    """Return the digest of the tokenizer or vocabulary of the model in a folder."""
    return str(read_json(model / "smbfast.json").get("encoder"))


def bag_of_tokens(
    dataset: MedsDataset,
    serializer: "PatientSerializer",
    subject_K: np.ndarray,
    time_K: np.ndarray,
    days: float | None,
    progress: Callable[[str], None] = lambda _: None,
) -> TokenBag:
    """Count the tokens of every node, in one pass.

    Args:
        subject_K, time_K: distinct nodes, in the order of (subject, time).
        days: the length of the recent past; None counts ever alone.
    """
    ever, recent = _Counts(len(subject_K)), _Counts(len(subject_K))
    for split in SPLITS:
        subject_S = np.unique(subject_K)
        batches = dataset.batches(split, subject_S, text_chars=serializer.text_chars)
        for number, batch in enumerate(batches):
            progress(f"{split}, batch {number + 1}")
            for timeline in serializer.timelines(batch):
                first, last = np.searchsorted(subject_K, [timeline.subject, timeline.subject + 1])
                for k in range(first, last):
                    ever_P, recent_P = seen_tokens(timeline, int(time_K[k]), days or 0)
                    ever.add(k, ever_P)
                    if days is not None:
                        recent.add(k, recent_P)
            ever.close()
            recent.close()
    width = 1 + max(ever.widest, recent.widest)
    counted = ever.matrix(width), recent.matrix(width) if days is not None else None
    return TokenBag(subject_K, time_K, *counted)


def seen_tokens(timeline: Timeline, time: int, days: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the token ids (int32 [P]) of a record up to `time`, and of the `days` before it.

    A line counts if its last event is not after `time`.
    """
    ids_T, header = timeline.ids_T, timeline.ids_T[: timeline.header]
    seen_L = timeline.line_time_L <= time
    recent_L = seen_L & (timeline.line_time_L > time - int(days * DAY))
    ever_P, recent_P = (
        ids_T[_inside(timeline.line_start_L[own_L], timeline.line_end_L[own_L])]
        for own_L in (seen_L, recent_L)
    )
    return np.concatenate([header, ever_P]), recent_P


class _Counts:
    """Counts of tokens on their way into a matrix: ids of one batch at a time are held as such."""

    def __init__(self, num_nodes: int) -> None:
        self._num_nodes, self.widest = num_nodes, 0
        self._ids: list[tuple[int, np.ndarray]] = []
        self._entries = [(np.empty(0, np.int64),) * 3]

    def add(self, node: int, ids_P: np.ndarray) -> None:
        """Take what a node sees."""
        self._ids.append((node, ids_P))

    def close(self) -> None:
        """Count what was taken since the last time."""
        if not self._ids:
            return
        node_P = np.repeat([k for k, _ in self._ids], [len(ids) for _, ids in self._ids])
        ids_P = np.concatenate([ids for _, ids in self._ids]).astype(np.int64)
        pair_E, count_E = np.unique((node_P << 32) | ids_P, return_counts=True)
        self._entries.append((pair_E >> 32, pair_E & 0xFFFFFFFF, count_E))
        self.widest = max(self.widest, int(ids_P.max(initial=0)))
        self._ids = []

    def matrix(self, width: int) -> csr_matrix:
        """Return the counts, float64 [K, V]."""
        node_E, id_E, count_E = (np.concatenate(part) for part in zip(*self._entries, strict=True))
        shape = (self._num_nodes, width)
        return csr_matrix((count_E.astype(np.float64), (node_E, id_E)), shape=shape)


def _inside(start_L: np.ndarray, end_L: np.ndarray) -> np.ndarray:
    """Return the rows of the tokens in `[start, end)` of each line, int64 [P]."""
    length_L = (end_L - start_L).astype(np.int64)
    before_L = np.cumsum(length_L) - length_L
    return np.arange(length_L.sum()) + np.repeat(start_L - before_L, length_L)
