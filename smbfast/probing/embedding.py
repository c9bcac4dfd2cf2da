"""Embeds decision nodes with one model or several.

All nodes of a window are embedded by one forward: the complete buckets are the trunk, and what a
node does not share with the others is a branch (`smbfast.data.nodes`). A thread makes the texts and
packs them while the device computes. They are made once, however many models read them. What states
become is the matter of `smbfast.probing.pooling`.

Legend: K nodes, M nodes of a call, W windows, B padded sequences, T tokens, D width.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby, repeat, takewhile
from threading import Event
from typing import Literal, Protocol, TypeVar

import numpy as np
import torch
from smbkernels.attention import Segments
from torch import Tensor

from smbfast.base.ahead import made_ahead
from smbfast.base.progress import Progress
from smbfast.data.nodes import NodeText, SharedWindow, shared_windows
from smbfast.data.packing import plan_micro_batches
from smbfast.model.backbone import PatientEncoder
from smbfast.model.decoder import Each, HfModule
from smbfast.model.target import TargetEncoder
from smbfast.probing.pooling import Packed, Row, pooled_by
from smbfast.settings import Pool

_PLANNED = 32  # forwards planned together: what fills them well, and fits in memory
_MOST_ON_CPU = 1024  # tokens of a forward of several windows: more of them leave the cache
Item = TypeVar("Item")


class Sink(Protocol):
    """What takes the embeddings [M, D] of the nodes `index_M`."""

    def put(self, index_M: list[int], values_MD: np.ndarray, /) -> None: ...


@dataclass(frozen=True)
class Model:
    """A packed forward and the context that it runs in."""

    packed: Packed
    scope: Callable[[], AbstractContextManager] = nullcontext


@dataclass(frozen=True)
class Task:
    """Nodes to embed.

    sinks: for each model those of its pools, for which it has one forward together.
    texts: those of the nodes that can be embedded, in any order.
    done: called when all of them are embedded.
    """

    sinks: Sequence[tuple[Mapping[Pool, Sink], Model]]
    texts: Iterator[NodeText]
    done: Callable[[], None] = lambda: None


def embed_into(
    sinks: Sequence[tuple[Mapping[Pool, Sink], Model]],
    num_nodes: int,
    texts: Iterator[NodeText],
    device: torch.device,
    *,
    tokens: int,
) -> None:
    """Give each sink the embeddings of its model by its pool, in any order.

    Args:
        sinks, texts: see `Task`.
        num_nodes: how many there are, for the line that says how far it is.
        tokens: see `embed_tasks`.
    """
    progress = Progress("smbfast.embed", len(sinks) * num_nodes, "embeddings")
    embed_tasks(
        iter([Task(sinks, texts)]), device, tokens=tokens, stopped=Event(), progress=progress.add
    )


@torch.inference_mode()
def embed_tasks(
    tasks: Iterator[Task],
    device: torch.device,
    *,
    tokens: int,
    stopped: Event,
    progress: Callable[[int], None],
) -> None:
    """Embed task after task; no forward has nodes of two.

    Nodes of one window share its trunk. Windows of many patients share a forward of at most
    `tokens` tokens, on a CPU of at most 1,024; a longer window has a forward of its own.

    Args:
        tasks: asked for by a thread, which is ahead of the device also between two tasks.
        stopped: set after an error or an interrupt: no further text is made.
        progress: called with the number of embeddings that a forward has given.
    """
    most = min(tokens, _MOST_ON_CPU) if device.type == "cpu" else tokens
    with closing(_ahead(_groups_of(tasks, tokens, most, stopped), stopped)) as ahead:
        for task, group in ahead:
            if group is None:
                task.done()
                continue
            for by_pool, model in task.sinks:
                with model.scope():
                    for row in group:
                        index_M = [node.index for node in row.nodes]
                        values = pooled_by(model.packed, row, list(by_pool), device)
                        for pool, sink in by_pool.items():
                            sink.put(index_M, values[pool])
                        progress(len(index_M))


def _groups_of(
    tasks: Iterator[Task], tokens: int, most: int, stopped: Event
) -> Iterator[tuple[Task, list[Row] | None]]:
    """Yield each task with its packed forwards, and at last with None."""
    for task in tasks:
        texts = takewhile(lambda _: not stopped.is_set(), task.texts)
        for group in _groups(shared_windows(texts, tokens), most):
            yield task, group
        if not stopped.is_set():
            yield task, None


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


def _ahead(groups: Iterator[Item], stopped: Event) -> Generator[Item, None, None]:
    """Yield groups, each made by a thread while the one before it is embedded."""
    calls = repeat(partial(next, groups, None))
    made = made_ahead(calls, what="the embedding", threads=1, waiting=1)
    try:
        yield from takewhile(lambda group: group is not None, made)
    finally:
        stopped.set()
        made.close()


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
        ValueError: `which` is the target encoder, but the run had none; `which` or `path` is
            neither of its two.
    """
    for name, value, two in (
        ("encoder", which, ("online", "target")),
        ("path", path, ("shared", "reference")),
    ):
        if value not in two:
            raise ValueError(f"`{name}` must be {' or '.join(two)}, got {value!r}")
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
