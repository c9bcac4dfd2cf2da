"""Divides decision nodes into parts that are embedded one by one, and reads the texts of a part.

A part has the nodes of subjects that follow one another in the data. Which they are depends on the
data and the nodes alone, never on who embeds them: no forward has nodes of two parts, so a node
keeps its bits however many processes embed and whatever was done before a kill. Held-out nodes have
parts of their own, so that the others keep their bits whether held-out patients are embedded.

Legend: K nodes, M nodes of a part, S subjects (S1 = S + 1 offsets), N events.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from smbfast.data.codes.serializer import CodeSerializer
from smbfast.data.meds import EventBatch, MedsDataset
from smbfast.data.nodes import HELD_OUT, Nodes, NodeText, batch_texts
from smbfast.data.serialize import Serializer

# nodes of a part, or as many as its last subject adds: a kill costs these of each process, and
# fewer would cost more in files than they save (our choice)
NODES = 512
_NOTHING = {"embedded": 0, "before_first_event": 0, "tokens_lost": 0}  # counted of a part


@dataclass(frozen=True)
class Piece:
    """Subjects of a part in one file, in the order of its rows."""

    split: str
    file: Path
    subject_S: np.ndarray  # int64


@dataclass(frozen=True)
class NodePart:
    """Nodes that are embedded together: int64 places in all nodes, ascending."""

    index_M: np.ndarray
    pieces: list[Piece]


def node_parts(dataset: MedsDataset, nodes: Nodes, size: int) -> list[NodePart]:
    """Divide the nodes of known subjects into parts of `size` nodes, in the order of the data.

    A part ends with the subject that fills it; at the end of a file half of that is enough, so that
    few parts read two files.
    """
    parts = []
    for held_out in (False, True):
        at_K = np.flatnonzero((nodes.split_K == HELD_OUT) == held_out)
        parts += _parts_of(dataset, nodes.subject_K[at_K], at_K, size)
    return parts


def _parts_of(
    dataset: MedsDataset, subject_K: np.ndarray, at_K: np.ndarray, size: int
) -> list[NodePart]:
    parts, pieces, index, num = [], list[Piece](), list[np.ndarray](), 0

    def close() -> None:
        nonlocal num
        parts.append(NodePart(np.sort(np.concatenate(index)), list(pieces)))
        pieces.clear()
        index.clear()
        num = 0

    for split, files in dataset.splits.items() if len(at_K) else ():
        for file in files:
            subject_S, first_S, offset_S1 = _with_nodes(dataset.subjects(split, [file]), subject_K)
            start = 0
            while start < len(subject_S):
                enough = np.searchsorted(offset_S1, offset_S1[start] + size - num)
                stop = min(int(enough), len(subject_S))
                own = slice(start, stop)
                pieces.append(Piece(split, file, subject_S[own]))
                index.append(at_K[_ranges(first_S[own], np.diff(offset_S1[start : stop + 1]))])
                num, start = num + len(index[-1]), stop
                if num >= size:
                    close()
            if num >= size / 2:
                close()
    if num:
        close()
    return parts


def _with_nodes(
    subject_S: np.ndarray, subject_K: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the subjects that have nodes, where those begin in `subject_K`, and offsets [S1]."""
    first_S = np.searchsorted(subject_K, subject_S)
    count_S = np.searchsorted(subject_K, subject_S, side="right") - first_S
    has_S = count_S > 0
    offset_S1 = np.concatenate([[0], np.cumsum(count_S[has_S])])
    return subject_S[has_S], first_S[has_S], offset_S1


def _ranges(first_S: np.ndarray, count_S: np.ndarray) -> np.ndarray:
    """Return first, first + 1, ... of each range, one after the other."""
    shift_S = first_S - np.concatenate([[0], np.cumsum(count_S)[:-1]])
    return np.repeat(shift_S, count_S) + np.arange(count_S.sum())


class NodeSource:
    """The decision nodes of a dataset in parts, and their texts.

    Parts in the order of the data share one pass over a file, of which nothing but the rows is read
    for parts that are left out.
    """

    def __init__(
        self,
        dataset: MedsDataset,
        serializer: Serializer | CodeSerializer,
        nodes: Nodes,
        window: int,
        size: int = NODES,
    ) -> None:
        """Take the nodes in parts.

        Args:
            window: the most tokens of a node.
            size: see `node_parts`.
        """
        self.nodes, self.parts = nodes, node_parts(dataset, nodes, size)
        self._dataset, self._serializer, self._window = dataset, serializer, window
        self._pass: _Pass | None = None

    def state(self) -> str:
        """Return a digest of size and times of every file that is read, as they were opened."""
        return self._dataset.state()

    def counted(self, parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
        """Return how many nodes there are and what was lost, by what was counted in each part."""
        total = {"nodes": len(self.nodes.subject_K), **_NOTHING}
        for counts in parts:
            for name in _NOTHING:
                total[name] += counts[name]
        known = sum(len(part.index_M) for part in self.parts)
        return total | {"unknown_subjects": total["nodes"] - known}

    def texts(self, part: NodePart, counts: dict[str, int]) -> Iterator[NodeText]:
        """Yield the window of each node of a part, in the order of the data.

        Nodes that are embedded, nodes before a subject's first event and tokens lost are counted in
        `counts`.

        Raises:
            ValueError: a file is not as it was when the dataset was opened.
        """
        counts |= _NOTHING
        nodes = self.nodes[part.index_M]
        for piece in part.pieces:
            for batch in self._batches(piece):
                for text in batch_texts(batch, self._serializer, nodes, self._window, counts):
                    yield replace(text, index=int(part.index_M[text.index]))
        self._dataset.require_unchanged(piece.file for piece in part.pieces)

    def _batches(self, piece: Piece) -> Iterator[EventBatch]:
        if self._pass is None or not self._pass.leads_to(piece):
            subject_S = self._dataset.subjects(piece.split, [piece.file])
            subject_S, _, _ = _with_nodes(subject_S, self.nodes.subject_K)
            batches = self._dataset.file_batches(
                piece.file, piece.split, subject_S, text_chars=self._serializer.text_chars
            )
            self._pass = _Pass(piece.split, piece.file, subject_S, batches)
        yield from self._pass.batches(piece.subject_S)


class _Pass:
    """One pass over the events of a file, of which parts take theirs when their turn comes."""

    def __init__(
        self, split: str, file: Path, subject_S: np.ndarray, batches: Iterator[EventBatch]
    ) -> None:
        self._what, self._subject_S, self._batches = (split, file), subject_S, batches
        self._batch: EventBatch | None = None
        self._first = 0  # the place of the first subject of that batch

    def leads_to(self, piece: Piece) -> bool:
        """Whether the first subject of a piece has not gone by."""
        if self._what != (piece.split, piece.file):
            return False
        return bool((self._subject_S[self._first :] == piece.subject_S[0]).any())

    def batches(self, subject_S: np.ndarray) -> Iterator[EventBatch]:
        """Yield the events of these subjects; the batch of the last one stays at hand."""
        left = len(subject_S)
        while left:
            if self._batch is None:
                self._batch = next(self._batches)
            batch = self._batch
            ids_S = batch.subject_N[batch.offset_S1[:-1]]
            mine_S = np.isin(ids_S, subject_S)
            num = int(mine_S.sum())
            left -= num
            if left or mine_S[-1]:
                self._batch, self._first = None, self._first + len(ids_S)
            if num:
                yield batch if num == len(ids_S) else _chosen(batch, mine_S)


def _chosen(batch: EventBatch, mine_S: np.ndarray) -> EventBatch:
    size_S = np.diff(batch.offset_S1)
    offset_S1 = np.concatenate([[0], np.cumsum(size_S[mine_S])])
    return batch.rows(np.flatnonzero(np.repeat(mine_S, size_S)), offset_S1)
