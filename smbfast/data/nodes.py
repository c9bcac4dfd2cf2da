"""Turns decision nodes into token windows, and windows that begin alike into trunks and branches.

A node (subject, prediction time) is embedded once, however many tasks need it. It is embedded from
the complete buckets and the tail of the current one: only events with `time <= prediction_time`.

Legend: K nodes, N events, T tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import groupby

import numpy as np

from smbfast.batch import UNKNOWN, Timeline
from smbfast.data.codes.serializer import CodeSerializer
from smbfast.data.labels import Labels
from smbfast.data.meds import BIRTH, STATIC, EventBatch, MedsDataset
from smbfast.data.serialize import Serializer
from smbfast.data.splits import SPLITS
from smbfast.data.timelines import node_spans, node_timeline, node_window

SPLIT_NAMES = ("", *SPLITS)  # "" is that of a subject whose split is not known
HELD_OUT = SPLIT_NAMES.index("held_out")


@dataclass(frozen=True)
class Nodes:
    """Distinct decision nodes, sorted by subject and time."""

    subject_K: np.ndarray  # int64
    time_K: np.ndarray  # int64 microseconds since 1970
    split_K: np.ndarray  # int8 index into `SPLIT_NAMES`

    def __getitem__(self, index_M: np.ndarray) -> "Nodes":
        """Return the nodes `index_M`, which must be in order."""
        return Nodes(self.subject_K[index_M], self.time_K[index_M], self.split_K[index_M])

    def digest(self) -> str:
        """Return a digest of all nodes."""
        content = sha256()
        for array_K in (self.subject_K, self.time_K, self.split_K):
            content.update(np.ascontiguousarray(array_K).data)
        return content.hexdigest()[:16]


@dataclass(frozen=True)
class NodeText:
    """The tokens that one node is embedded from."""

    index: int  # in `Nodes`
    subject: int
    time: int
    start: int  # the token of its timeline with which its window begins
    ids_T: np.ndarray
    held_out: bool = False  # whether its subject is of the split of that name


@dataclass(frozen=True)
class SharedWindow:
    """Nodes whose windows begin alike: a trunk, and what each node does not share with it.

    Node k is the last token of `trunk_T[:prefix_K[k]]` followed by branch `branch_K[k]`, if any.
    """

    nodes: list[NodeText]
    trunk_T: np.ndarray
    branches: list[tuple[int, np.ndarray]]  # tokens of the trunk it sees, its own token ids
    prefix_K: list[int]
    branch_K: list[int]  # -1: the node is a position on the trunk

    def __len__(self) -> int:
        """Tokens of the trunk and all branches."""
        return len(self.trunk_T) + sum(len(ids) for _, ids in self.branches)


def distinct_nodes(tasks: list[Labels]) -> Nodes:
    """Return the nodes of all tasks, each once."""
    if not tasks:
        return sorted_nodes(*(np.empty(0, t) for t in (np.int64, np.int64, np.int8)))
    split_N = np.concatenate([split_index(task.split_N) for task in tasks])
    subject_N, time_N = (
        np.concatenate([getattr(task, name) for task in tasks]) for name in ("subject_N", "time_N")
    )
    return sorted_nodes(subject_N, time_N, split_N)


def sorted_nodes(subject_N: np.ndarray, time_N: np.ndarray, split_N: np.ndarray) -> Nodes:
    """Return nodes in order and each once; of the splits of one node the last that is known.

    Args:
        subject_N, time_N: int64 [N], in any order; times are microseconds since 1970.
        split_N: int8 [N], see `Nodes`.
    """
    # a stable sort keeps rows of one node in their order; a known split goes behind ""
    order_N = np.lexsort((split_N > 0, time_N, subject_N))
    subject_N, time_N = subject_N[order_N], time_N[order_N]
    last_N = np.ones(len(order_N), bool)
    last_N[:-1] = (subject_N[1:] != subject_N[:-1]) | (time_N[1:] != time_N[:-1])
    return Nodes(subject_N[last_N], time_N[last_N], split_N[order_N][last_N])


def split_index(name_N: np.ndarray) -> np.ndarray:
    """Return names of splits as indices into `SPLIT_NAMES`, int8 [N]; 0 for any other name."""
    index_N = np.zeros(len(name_N), np.int8)
    for index, name in enumerate(SPLIT_NAMES):
        index_N[name_N == name] = index
    return index_N


def node_texts(
    dataset: MedsDataset,
    serializer: Serializer | CodeSerializer,
    nodes: Nodes,
    window: int,
    counts: dict[str, int],
) -> Iterator[NodeText]:
    """Yield the window of each node, in the order of the data.

    Nodes of unknown subjects, nodes before a subject's first event and tokens lost are counted in
    `counts`.
    """
    counts.update(nodes=len(nodes.subject_K), embedded=0, before_first_event=0, tokens_lost=0)
    known = 0
    subject_S = np.unique(nodes.subject_K)
    for split in dataset.splits:
        for batch in dataset.batches(split, subject_S, text_chars=serializer.text_chars):
            for at, texts in _by_subject(batch, serializer, nodes, window, counts):
                known += at.stop - at.start
                yield from texts
    counts["unknown_subjects"] = len(nodes.subject_K) - known


def batch_texts(
    batch: EventBatch,
    serializer: Serializer | CodeSerializer,
    nodes: Nodes,
    window: int,
    counts: dict[str, int],
) -> Iterator[NodeText]:
    """Yield the windows of the nodes of the subjects of a batch, and count as `node_texts` does."""
    for _, texts in _by_subject(batch, serializer, nodes, window, counts):
        yield from texts


def _by_subject(
    batch: EventBatch,
    serializer: Serializer | CodeSerializer,
    nodes: Nodes,
    window: int,
    counts: dict[str, int],
) -> Iterator[tuple[slice, Iterator[NodeText]]]:
    """Yield for each subject of a batch where its nodes are in `nodes`, and their windows."""
    timelines = serializer.timelines(batch)
    births = np.array([c == BIRTH for c in batch.codes])[batch.code_N]
    timed_N = (batch.time_N != STATIC) & ~births
    for s, timeline in enumerate(timelines):
        rows = slice(int(batch.offset_S1[s]), int(batch.offset_S1[s + 1]))
        # nodes are sorted by subject: no pass over all of them for every subject
        subject = timeline.subject
        at = slice(*np.searchsorted(nodes.subject_K, [subject, subject + 1]).tolist())
        yield (
            at,
            _subject_texts(batch, rows, timed_N, timeline, serializer, nodes, at, window, counts),
        )


def _subject_texts(
    batch: EventBatch,
    rows: slice,
    timed_N: np.ndarray,
    timeline: Timeline,
    serializer: Serializer | CodeSerializer,
    nodes: Nodes,
    at: slice,
    window: int,
    counts: dict[str, int],
) -> Iterator[NodeText]:
    """Yield the windows of one subject's nodes, `at` in `nodes`, of its events `rows`."""
    time_K = nodes.time_K[at]
    tails: list[Timeline | None] = [None] * len(time_K)
    if isinstance(serializer, Serializer):  # in codes every moment is a prefix
        tails = _tails(batch, rows, timed_N, serializer, time_K)
    spans = node_spans(timeline, window, serializer.preamble)
    complete_K = np.searchsorted(timeline.bucket_time_B, serializer.bucket_key(time_K))
    for k, complete, tail in zip(range(at.start, at.stop), complete_K.tolist(), tails, strict=True):
        record = node_timeline(timeline, complete, tail)
        if not len(record.bucket_end_B):
            counts["before_first_event"] += 1
            continue
        cut, lost = node_window(record, window, serializer.preamble, spans, complete)
        counts["tokens_lost"] += lost
        counts["embedded"] += 1
        held_out = bool(nodes.split_K[k] == HELD_OUT)
        yield NodeText(k, timeline.subject, int(nodes.time_K[k]), cut.start, cut.ids_T, held_out)


def _tails(
    batch: EventBatch,
    rows: slice,
    timed_N: np.ndarray,
    serializer: Serializer,
    time_K: np.ndarray,
) -> list[Timeline | None]:
    """Return for each node of a subject its bucket's events up to it as tokens, or None."""
    time_N = batch.time_N[rows]
    timed = np.flatnonzero(timed_N[rows])
    key_K = serializer.bucket_key(time_K)
    picks, before = [], []
    for node_time, key in zip(time_K, key_K, strict=True):
        a = np.searchsorted(time_N[timed], key, side="left")
        b = np.searchsorted(time_N[timed], node_time, side="right")
        picks.append(timed[a:b] + rows.start)
        before.append(int(time_N[timed[a - 1]]) if a else UNKNOWN)
    offset = np.concatenate([[0], np.cumsum([len(p) for p in picks])])
    full = [i for i, p in enumerate(picks) if len(p)]
    tails: list[Timeline | None] = [None] * len(time_K)
    if full:
        chosen = np.concatenate([picks[i] for i in full])
        bounds = np.append(offset[full], offset[-1])
        before_S = np.array([before[i] for i in full], np.int64)
        own = batch.rows(chosen, bounds).with_codes_of_its_events()
        parts = serializer.timelines(own, before_S)
        for i, tail in zip(full, parts, strict=True):
            tails[i] = tail
    return tails


def shared_windows(texts: Iterator[NodeText], tokens: int) -> Iterator[SharedWindow]:
    """Yield successive nodes of one subject and window start as one trunk and its branches.

    The trunk is the window of the last of these nodes: it holds every bucket that is complete at
    any of them. A branch begins at the first token in which a node's window differs from the trunk.
    So the tokens that a node sees are its own window by construction; nothing later is among them.

    Args:
        tokens: the most that trunk and branches may have together; more than these are divided
            into several trunks, down to one node each.
    """
    for _, alike in groupby(texts, key=lambda text: (text.subject, text.start)):
        yield from _shared(list(alike), tokens)


def _shared(nodes: list[NodeText], tokens: int) -> Iterator[SharedWindow]:
    trunk_T = nodes[-1].ids_T
    prefix_K = [_common(node.ids_T, trunk_T) for node in nodes]
    branches: list[tuple[int, np.ndarray]] = []
    branch_K = []
    for node, prefix in zip(nodes, prefix_K, strict=True):
        own_T = node.ids_T[prefix:]
        branch_K.append(len(branches) if len(own_T) else -1)
        branches += [(prefix, own_T)] if len(own_T) else []
    window = SharedWindow(nodes, trunk_T, branches, prefix_K, branch_K)
    if len(nodes) > 1 and (len(window) > tokens or not min(prefix_K)):
        half = len(nodes) // 2
        yield from _shared(nodes[:half], tokens)
        yield from _shared(nodes[half:], tokens)
    else:
        yield window


def _common(ids_T: np.ndarray, trunk_T: np.ndarray) -> int:
    """Return the number of tokens with which both begin."""
    length = min(len(ids_T), len(trunk_T))
    unlike = np.flatnonzero(ids_T[:length] != trunk_T[:length])
    return int(unlike[0]) if len(unlike) else length
