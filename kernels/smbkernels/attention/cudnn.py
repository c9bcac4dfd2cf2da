"""Timeline attention in dense calls of cuDNN, exact, without a copy of keys.

    own: runs of segments of one length, each against its own keys, causal: one call a run
    far: every branch against the prefix of its trunk, without a mask: one call a branch

merged as in `two_calls`, backward and all. cuDNN plans each new shape for tens of milliseconds on
the host, and torch keeps the plan for the next call of that shape: this suits batches whose lengths
recur, as in windows that are full. Its varlen calls, which take bounds of sequences as data, are of
no use in torch 2.11 to 2.13: they plan at every call, and up to 2.12 at least their backward takes
the head dim for the longest sequence, which writes out of bounds.

Where a length is 1, which cuDNN refuses for keys, plain products stand in. Gradients of queries are
added up by atomics: the same inputs may give other bits. It has not run on a GPU yet, and so runs
only where it is asked for.

B segments of one length, L queries, P keys, otherwise as in `op`.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from smbkernels.attention.engines import Engine, differs
from smbkernels.attention.op import Inputs, forward_backward
from smbkernels.attention.op import timeline_attention as attention
from smbkernels.attention.sdpa import PLAIN
from smbkernels.attention.segments import LENGTH, START
from smbkernels.attention.two_calls import Far, added, far_of, merge_, part_of

# it rounds lengths up, and with them the layout of the log-sum-exp
_ROUNDED = "TORCH_CUDNN_SDPA_AVOID_RECOMPILE"
_OLDEST = 90501  # before, a gradient had to have the strides of the output
_TENSORS = ("query", "key", "value")
FORWARD = (*_TENSORS, "attn_bias", "compute_log_sumexp")
BACKWARD = (
    *("grad_out", *_TENSORS, "out", "logsumexp", "philox_seed", "philox_offset", "attn_bias"),
    *("cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"),
)


def missing(device: str) -> str | None:
    """Why it cannot run on this kind of device here, or None."""
    if device != "cuda":
        return f"tensors are on {device}"
    if not torch.cuda.is_available():
        return "no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"compute capability must be 8.0 or higher, got {major}.{minor}"
    version = torch.backends.cudnn.version() or 0
    if version < _OLDEST:
        return f"cuDNN must be {_OLDEST} or newer, got {version}"
    if os.environ.get(_ROUNDED):
        return f"{_ROUNDED} is set, with which the log-sum-exp has another layout"
    engine_or_reason = engine()
    return engine_or_reason if isinstance(engine_or_reason, str) else None


@functools.cache
def engine() -> Engine | str:
    """Torch's operations over cuDNN, or why they cannot be called as here.

    forward(query, key, value, causal, scale) -> out, lse [B, H, L]
    backward(grad_out, query, key, value, out, lse, causal, scale) -> 3 gradients

    Queries are [B, H, L, C] and keys [B, G, P, C], views of contiguous [B, L, H, C].
    """
    aten = torch.ops.aten
    options = ("is_causal", "scale")
    reason = differs(aten._scaled_dot_product_cudnn_attention, FORWARD, *options)
    reason = reason or differs(aten._scaled_dot_product_cudnn_attention_backward, BACKWARD, "scale")
    if reason:
        return f"cuDNN attention of torch {torch.__version__}: {reason}"
    return Engine("cuDNN attention of torch", _forward, _backward)


def _forward(query, key, value, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    with_lse = True
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, with_lse, is_causal=causal, scale=scale
    )
    return out, lse.view(query.shape[:3])


def _backward(
    grad_out, query, key, value, out, lse, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    # the state of dropout, which is not read without any; no bias and no bounds of sequences
    states = (query.new_empty(2, dtype=torch.int64), query.new_empty(2, dtype=torch.int64))
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *(grad_out, query, key, value, out, lse.unsqueeze(-1).contiguous(), *states),
        *(None, None, None, query.shape[2], key.shape[2], 0.0, causal),
        scale=scale,
    )


class Run(NamedTuple):
    """Segments of one length, one after another."""

    rows: slice
    num_segments: int


def runs_of(rows: list[list[int]]) -> tuple[Run, ...]:
    """All segments of a table, in order."""
    runs: list[tuple[int, int, int]] = []  # start, length of a segment, segments
    for r in rows:
        if runs and runs[-1][1] == r[LENGTH]:
            start, length, count = runs[-1]
            runs[-1] = (start, length, count + 1)
        else:
            runs.append((r[START], r[LENGTH], 1))
    return tuple(Run(slice(at, at + size * n), n) for at, size, n in runs)


class Plan(NamedTuple):
    """The calls of a batch."""

    own: tuple[Run, ...]
    far: tuple[Far, ...]


def _plan(host_S6: Tensor) -> Plan:
    return _cached_plan(tuple(host_S6.flatten().tolist()))


@functools.lru_cache(maxsize=8)
def _cached_plan(table: tuple[int, ...]) -> Plan:
    rows = [list(table[i : i + 6]) for i in range(0, len(table), 6)]
    return Plan(runs_of(rows), far_of(rows))


def run_forward(
    engine: Engine, plan: Plan, tensors: list[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs [T, H, C] and log-sum-exp [H, T], of contiguous query, key and value."""

    def call(query: slice, key: slice, count: int, causal: bool) -> tuple[Tensor, Tensor]:
        ranges = (query, key, key)
        given = [_batched(x, r, count) for x, r in zip(tensors, ranges, strict=True)]
        return _part(engine, given).forward(*given, causal, scale)

    outs, lses = zip(*(call(run.rows, *run, True) for run in plan.own), strict=True)
    out_THC = _joined([_rows(x) for x in outs], 0)
    lse_HT = _joined([x.transpose(0, 1).flatten(1) for x in lses], 1)
    for query, key in plan.far:
        out, lse = call(query, key, 1, False)
        merge_(part_of(out_THC, query), part_of(lse_HT, query, 1), _rows(out), lse[0])
    return out_THC, lse_HT


def run_backward(
    engine: Engine, plan: Plan, grad_out_THC: Tensor, rows: list[Tensor], scale: float
) -> tuple[Tensor, ...]:
    """Gradients of query, key and value; `rows` are these three, out and the log-sum-exp."""
    *tensors, out_THC, lse_HT = rows

    def call(query: slice, key: slice, count: int, causal: bool) -> list[Tensor]:
        given = (grad_out_THC, *tensors, out_THC)
        ranges = (query, query, key, key, query)
        views = [_batched(x, r, count) for x, r in zip(given, ranges, strict=True)]
        lse = _batched_lse(lse_HT, query, count)
        parts = _part(engine, views).backward(*views, lse, causal, scale)
        return [_rows(x) for x in parts]

    own = zip(*(call(run.rows, *run, True) for run in plan.own), strict=True)
    grads = [_joined(parts, 0) for parts in own]
    if not plan.far:
        return tuple(grads)
    parts = zip(*(call(*far, 1, False) for far in plan.far), strict=True)
    queries, keys = zip(*plan.far, strict=True)
    each = zip(grads, (queries, keys, keys), parts, strict=True)
    return tuple(added(*one) for one in each)


def decomposed(name: str, find: Callable[[], Engine]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The operation `timeline_attention_<name>` over the engine that `find` returns."""

    def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
        tensors = [x.contiguous() for x in inputs[:3]]
        if not len(inputs.query_THC):
            wide = torch.promote_types(tensors[0].dtype, torch.float32)
            lse_HT = tensors[0].new_empty(tensors[0].shape[1], 0, dtype=wide)
            return torch.empty_like(tensors[0]), lse_HT
        return run_forward(find(), _plan(inputs.table_S6), tensors, inputs.scale)

    def backward(
        grad_out_THC: Tensor, out_THC: Tensor, lse_HT: Tensor, inputs: Inputs
    ) -> tuple[Tensor, ...]:
        tensors = [x.contiguous() for x in inputs[:3]]
        if not len(inputs.query_THC):
            return tuple(x.new_empty(x.shape) for x in tensors)
        rows = [*tensors, out_THC, lse_HT]
        return run_backward(find(), _plan(inputs.table_S6), grad_out_THC, rows, inputs.scale)

    return forward_backward(name, forward, backward)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Of all runs: a copy, but for a single one."""
    return torch.cat(list(parts), dim) if len(parts) > 1 else parts[0].contiguous()


def _batched(x_TNC: Tensor, rows: slice, count: int) -> Tensor:
    """A view [B, N, L, C]."""
    return part_of(x_TNC, rows).unflatten(0, (count, -1)).transpose(1, 2)


def _batched_lse(lse_HT: Tensor, rows: slice, count: int) -> Tensor:
    """A view [B, H, L]."""
    return part_of(lse_HT, rows, 1).unflatten(1, (count, -1)).transpose(0, 1)


def _rows(x_BNLC: Tensor) -> Tensor:
    """[B L, N, C]: a view, if it is laid out as `_batched` gives it."""
    return x_BNLC.transpose(1, 2).flatten(0, 1)


def _part(dense: Engine, tensors: list[Tensor]) -> Engine:
    """The engine, or plain products where there is a single query or key."""
    return dense if min(x.shape[2] for x in tensors) > 1 else SHORT


def _short_forward(query, key, value, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    wide, key, value = _shared(query, key, value)
    out, lse = PLAIN.forward(wide, key, value, causal, scale)
    return out.to(query.dtype), lse


def _short_backward(
    grad_out, query, key, value, out, lse, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide, wide_key, wide_value = _shared(query, key, value)
    grad_out, out = (x.to(wide.dtype) for x in (grad_out, out))
    grads = PLAIN.backward(grad_out, wide, wide_key, wide_value, out, lse, causal, scale)
    grad_key, grad_value = (x.unflatten(1, (key.shape[1], -1)).sum(2) for x in grads[1:])
    return grads[0].to(query.dtype), grad_key.to(query.dtype), grad_value.to(query.dtype)


def _shared(query: Tensor, *keys: Tensor) -> tuple[Tensor, ...]:
    """At least fp32, and a copy of the keys for each query head."""
    wide = torch.promote_types(query.dtype, torch.float32)
    times = query.shape[1] // keys[0].shape[1]
    return query.to(wide), *(x.to(wide).repeat_interleave(times, 1) for x in keys)


SHORT = Engine("plain products", _short_forward, _short_backward)


def _installed() -> Engine:
    """What `missing` has made sure of."""
    return cast(Engine, engine())


timeline_attention = decomposed("cudnn", _installed)
timeline_attention.__doc__ = attention.__doc__
