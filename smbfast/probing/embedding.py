"""Embeds decision nodes of MEDS labels with one model or several.

All nodes of a window are embedded by one forward: the complete buckets are the trunk, and what a
node does not share with the others is a branch (`smbfast.data.nodes`). A thread makes the texts and
packs them while the device computes. They are made once, however many models read them.

Legend: K nodes, W windows, S branches, T tokens, D width, P sums of consecutive states, E ends of
prefixes of a trunk.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from threading import Event
from typing import Literal, Protocol

import numpy as np
import torch
from smbkernels.attention import Segments
from torch import Tensor

from smbfast.base.progress import Progress
from smbfast.batch import PackedBatch, pack_segments
from smbfast.data.nodes import Nodes, NodeText, SharedWindow, shared_windows
from smbfast.data.packing import plan_micro_batches
from smbfast.model.backbone import PatientEncoder
from smbfast.model.decoder import HfModule
from smbfast.model.target import TargetEncoder
from smbfast.probing.embedding_file import embedding_file

Pool = Literal["last", "mean"]

_PLANNED = 32  # forwards planned together: what fills them well, and fits in memory
_MOST_ON_CPU = 1024  # tokens of a forward of several windows: more of them leave the cache


class Packed(Protocol):
    """The forward of a pack: ids [T] and positions [T] to the states of `rows`, or of all T."""

    def __call__(
        self,
        ids_T: Tensor,
        position_T: Tensor,
        segments: Segments,
        /,
        *,
        rows: Tensor | None = None,
    ) -> Tensor: ...


class Sink(Protocol):
    """What takes the embeddings [M, D] of the nodes `index_M`."""

    def put(self, index_M: list[int], values_MD: np.ndarray, /) -> None: ...


@dataclass(frozen=True)
class Model:
    """A packed forward, the context that it runs in, and what its file says of its origin."""

    packed: Packed
    scope: Callable[[], AbstractContextManager] = nullcontext
    origin: dict | None = None


@dataclass(frozen=True)
class Row:
    """The windows of one forward, packed."""

    windows: list[SharedWindow]
    batch: PackedBatch

    @classmethod
    def of(cls, windows: list[SharedWindow]) -> "Row":
        """Pack windows."""
        batch = pack_segments([w.trunk_T for w in windows], [w.branches for w in windows])
        return cls(windows, batch)

    @property
    def nodes(self) -> list[NodeText]:
        """The nodes of all windows."""
        return [node for window in self.windows for node in window.nodes]


def embed_nodes(
    models: dict[Path, Model],
    nodes: Nodes,
    texts: Iterator[NodeText],
    device: torch.device,
    *,
    tokens: int,
    pool: Pool,
) -> None:
    """Write the embeddings of `nodes` by each model, with rows in the order of (subject, time).

    Args:
        models: by the parquet file that each writes.
        texts, tokens: see `embed_into`.

    Raises:
        ValueError: there is no node, or a model gives states that are not finite. Then nothing is
            written.
    """
    with ExitStack() as stack:
        files = [
            (stack.enter_context(embedding_file(path, nodes, model.origin)), model)
            for path, model in models.items()
        ]
        embed_into(files, len(nodes.subject_K), texts, device, tokens=tokens, pool=pool)
        for file, _ in files:
            file.write()


@torch.inference_mode()
def embed_into(
    sinks: Sequence[tuple[Sink, Model]],
    num_nodes: int,
    texts: Iterator[NodeText],
    device: torch.device,
    *,
    tokens: int,
    pool: Pool,
) -> None:
    """Give each sink the embeddings of its model, in any order.

    Nodes of one window share its trunk. Windows of many patients share a forward of at most
    `tokens` tokens, on a CPU of at most 1,024; a longer window has a forward of its own.

    Args:
        num_nodes: how many there are, for the line that says how far it is.
        texts: those of the nodes that can be embedded, in any order.
    """
    progress = Progress("smbfast.embed", len(sinks) * num_nodes, "embeddings")
    most = min(tokens, _MOST_ON_CPU) if device.type == "cpu" else tokens
    stopped = Event()  # after an error or an interrupt no further text is made
    texts = takewhile(lambda _: not stopped.is_set(), texts)
    groups = _groups(shared_windows(texts, tokens), most)
    with closing(_ahead(groups, stopped)) as ahead:
        for group in ahead:
            for sink, model in sinks:
                with model.scope():
                    for row in group:
                        own = row.nodes
                        values_KD = pooled(model.packed, row, pool, device)
                        sink.put([node.index for node in own], values_KD)
                        progress.add(len(own))


def _groups(windows: Iterator[SharedWindow], tokens: int) -> Iterator[list[Row]]:
    """Yield packed forwards, planned among few enough windows at a time to bound memory."""
    while group := _next_windows(windows, _PLANNED * tokens):
        size_W = np.array([len(window) for window in group])
        plan = plan_micro_batches(size_W, size_W, tokens)
        yield [Row.of([group[w] for w in row]) for row in plan]


def _ahead(groups: Iterator[list[Row]], stopped: Event) -> Generator[list[Row], None, None]:
    """Yield groups, each made by a thread while the one before it is embedded."""
    with ThreadPoolExecutor(1) as thread:
        try:
            coming = thread.submit(next, groups, None)
            while (group := coming.result()) is not None:
                coming = thread.submit(next, groups, None)
                yield group
        finally:
            stopped.set()


def _next_windows(windows: Iterator[SharedWindow], tokens: int) -> list[SharedWindow]:
    group: list[SharedWindow] = []
    while tokens > 0 and (window := next(windows, None)) is not None:
        group.append(window)
        tokens -= len(window)
    return group


def pooled(packed: Packed, row: Row, pool: Pool, device: torch.device) -> np.ndarray:
    """Return the embeddings of the nodes of a row, fp64 [K, D], from one forward."""
    batch = row.batch.to(device)
    last_K = torch.tensor(_last(row.windows)).to(device) if pool == "last" else None
    states = packed(batch.ids_T, batch.position_T, batch.segments, rows=last_K)
    return _mean(states, row.windows) if last_K is None else states.cpu().double().numpy()


def _last(windows: list[SharedWindow]) -> list[int]:
    """Return the row of each node's last token, on its trunk or at the end of its branch."""
    start, own_start = 0, sum(len(w.trunk_T) for w in windows)  # branches lie behind all trunks
    row_K: list[int] = []
    for window in windows:
        own_end = own_start + np.cumsum([0, *(len(ids) for _, ids in window.branches)])
        for prefix, branch in zip(window.prefix_K, window.branch_K, strict=True):
            row_K.append((start + prefix if branch < 0 else own_end[branch + 1]) - 1)
        start, own_start = start + len(window.trunk_T), own_end[-1]
    return row_K


def _mean(hidden_TD: Tensor, windows: list[SharedWindow]) -> np.ndarray:
    """Return the mean over each node's tokens: the part of the trunk that it sees, and its branch.

    Each token is summed once, in fp32 at least. The pieces of a trunk between the ends of prefixes
    are added up in fp64 from the trunk's own start. So nothing that a node does not see reaches it,
    not even the rounding of another patient's sums.
    """
    ends = [np.unique(window.prefix_K) for window in windows]  # the last is the trunk's
    pieces = [length for end_E in ends for length in np.diff(end_E, prepend=0).tolist()]
    own = [len(ids) for window in windows for _, ids in window.branches]
    exact = torch.promote_types(hidden_TD.dtype, torch.float32)
    sums = [rows.sum(0, dtype=exact) for rows in hidden_TD.split(pieces + own)]
    sum_PD = torch.stack(sums).cpu().double().numpy()
    first, first_own = 0, len(pieces)
    mean_K = []
    for window, end_E in zip(windows, ends, strict=True):
        seen_ED = sum_PD[first : first + len(end_E)].cumsum(0)
        own_SD = sum_PD[first_own : first_own + len(window.branches)]
        for node, prefix, branch in zip(
            window.nodes, window.prefix_K, window.branch_K, strict=True
        ):
            sum_D = seen_ED[np.searchsorted(end_E, prefix)]
            mean_K.append((sum_D if branch < 0 else sum_D + own_SD[branch]) / len(node.ids_T))
        first, first_own = first + len(end_E), first_own + len(window.branches)
    return np.stack(mean_K)


def packed_of(
    encoder: PatientEncoder,
    target: TargetEncoder | None,
    which: Literal["online", "target"],
    path: Literal["shared", "reference"],
) -> Packed:
    """Return the packed forward of the encoder `which`.

    Raises:
        ValueError: `which` is the target encoder, but the run had none.
    """
    chosen = encoder if which == "online" else target
    if chosen is None:
        raise ValueError("encoder=target needs a run with a JEPA phase; this one had none")
    return chosen.packed if path == "shared" else one_by_one(chosen.hidden)


def untrained(encoder: PatientEncoder, path: Literal["shared", "reference"]) -> Model:
    """Return the backbone of a LoRA encoder as it was before training.

    The adapter is disabled, and with it the rows of token embeddings that are trained beside it.
    """
    lm: HfModule = encoder.lm
    return Model(packed_of(encoder, None, "online", path), lm.disable_adapter)


def one_by_one(hidden: Callable[[Tensor], Tensor]) -> Packed:
    """Return the reference of a packed forward: one forward for each trunk, and one for each branch
    with what it sees.

    Args:
        hidden: ids [B, T] to hidden states [B, T, D].
    """

    def packed(
        ids_T: Tensor, position_T: Tensor, segments: Segments, *, rows: Tensor | None = None
    ) -> Tensor:
        states = []
        for start, length, trunk, prefix in segments.host_S6[:, :4].tolist():
            seen_T = torch.cat([ids_T[trunk : trunk + prefix], ids_T[start : start + length]])
            states.append(hidden(seen_T[None])[0, prefix:])
        return torch.cat(states) if rows is None else torch.cat(states)[rows]

    return packed
