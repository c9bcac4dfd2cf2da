"""Embeds decision nodes of MEDS labels with one model or several.

All nodes of a window are embedded by one forward: the complete buckets are the trunk, and what a
node does not share with the others is a branch (`smbfast.data.nodes`). A thread makes the texts and
packs them while the device computes. They are made once, however many models read them. What states
become is the matter of `smbfast.probing.pooling`.

Legend: K nodes, M nodes of a call, W windows, B padded sequences, T tokens, D width.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass
from itertools import groupby, takewhile
from pathlib import Path
from threading import Event
from typing import Literal, Protocol

import numpy as np
import torch
from smbkernels.attention import Segments
from torch import Tensor

from smbfast.base.progress import Progress
from smbfast.data.nodes import Nodes, NodeText, SharedWindow, shared_windows
from smbfast.data.packing import plan_micro_batches
from smbfast.model.backbone import PatientEncoder
from smbfast.model.decoder import Each, HfModule
from smbfast.model.target import TargetEncoder
from smbfast.probing.embedding_file import embedding_file
from smbfast.probing.pooling import Packed, Row, pooled_by
from smbfast.settings import Pool

_PLANNED = 32  # forwards planned together: what fills them well, and fits in memory
_MOST_ON_CPU = 1024  # tokens of a forward of several windows: more of them leave the cache


class Sink(Protocol):
    """What takes the embeddings [M, D] of the nodes `index_M`."""

    def put(self, index_M: list[int], values_MD: np.ndarray, /) -> None: ...


@dataclass(frozen=True)
class Model:
    """A packed forward, the context that it runs in, and what its file says of its origin."""

    packed: Packed
    scope: Callable[[], AbstractContextManager] = nullcontext
    origin: dict | None = None


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
        files = [stack.enter_context(embedding_file(path, nodes)) for path in models]
        sinks = [({pool: f}, model) for f, model in zip(files, models.values(), strict=True)]
        embed_into(sinks, len(nodes.subject_K), texts, device, tokens=tokens)
        for file, model in zip(files, models.values(), strict=True):
            file.write(model.origin)


@torch.inference_mode()
def embed_into(
    sinks: Sequence[tuple[Mapping[Pool, Sink], Model]],
    num_nodes: int,
    texts: Iterator[NodeText],
    device: torch.device,
    *,
    tokens: int,
) -> None:
    """Give each sink the embeddings of its model by its pool, in any order.

    Nodes of one window share its trunk. Windows of many patients share a forward of at most
    `tokens` tokens, on a CPU of at most 1,024; a longer window has a forward of its own.

    Args:
        sinks: for each model those of its pools, for which it has one forward together.
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
            for by_pool, model in sinks:
                with model.scope():
                    for row in group:
                        index_M = [node.index for node in row.nodes]
                        values = pooled_by(model.packed, row, list(by_pool), device)
                        for pool, sink in by_pool.items():
                            sink.put(index_M, values[pool])
                        progress.add(len(index_M))


def _groups(windows: Iterator[SharedWindow], tokens: int) -> Iterator[list[Row]]:
    """Yield packed forwards, planned among few enough windows at a time to bound memory.

    Held-out patients have forwards of their own, so that the embeddings of the others keep their
    bits whether these are embedded or not.
    """
    for _, part in groupby(windows, key=lambda window: window.nodes[0].held_out):
        while group := _next_windows(part, _PLANNED * tokens):
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


def one_by_one(hidden: Callable[..., Tensor]) -> Packed:
    """Return the reference of a packed forward: one forward for each trunk, and one for each branch
    with what it sees.

    Args:
        hidden: ids [B, T] to hidden states [B, T, D]; it is given `each` where states of every
            layer are asked for, and calls it with those, [B, T, D].
    """

    def packed(
        ids_T: Tensor,
        position_T: Tensor,
        segments: Segments,
        *,
        rows: Tensor | None = None,
        each: Each | None = None,
    ) -> Tensor:
        states, layers = [], []
        for start, length, trunk, prefix in segments.host_S6[:, :4].tolist():
            seen_T = torch.cat([ids_T[trunk : trunk + prefix], ids_T[start : start + length]])
            own: list[Tensor] = []
            more = {} if each is None else {"each": own.append}
            states.append(hidden(seen_T[None], **more)[0, prefix:])
            layers.append([layer_1TD[0, prefix:] for layer_1TD in own])
        for of_a_layer in zip(*layers, strict=True):
            assert each is not None
            each(torch.cat(of_a_layer))
        return torch.cat(states) if rows is None else torch.cat(states)[rows]

    return packed
