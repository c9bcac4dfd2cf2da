"""Timeline attention in two calls of varlen attention, exact, over an installed library.

    call 1: each trunk's queries against its keys
    call 2: each branch's queries against its keys, copied together: trunk[:prefix], then its own

Both causal; aligned bottom right, the second lets query j of a branch see the whole prefix and own
keys [0, j]. Extra traffic, against a kernel that reads prefixes in place: the copied keys and
values, 2 G C (prefix + length) elements per branch, once in each direction.

Backward calls the library for both parts, then adds up in fp32 what a trunk's keys get: from its
trunk, then from its first branch, its second ... As a row of a trunk occurs at most once per
branch, every step writes distinct rows: no atomics, and the order is fixed.

Row numbers and sequence bounds are made on the CPU from the table of segments, sent without a wait
and cached for the other layers of the batch.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from smbkernels.attention.engines import Engine, engine
from smbkernels.attention.op import Inputs, forward_backward
from smbkernels.attention.op import timeline_attention as attention
from smbkernels.attention.segments import LENGTH, PREFIX, START, TRUNK_START

Rows = slice | Tensor  # of T: a range, or numbers


def missing(device: str) -> str | None:
    """Why it cannot run on this kind of device here, or None."""
    if device != "cuda":
        return f"tensors are on {device}"
    if not torch.cuda.is_available():
        return "no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"compute capability must be 8.0 or higher, got {major}.{minor}"
    engine_or_reason = engine()
    return engine_or_reason if isinstance(engine_or_reason, str) else None


@dataclass(frozen=True)
class Sequences:
    """Of one call: which rows its queries are, where each sequence begins, and the longest."""

    rows: Rows
    bounds: tuple[Tensor, Tensor, int, int]  # cu_q and cu_k, int32; max_q, max_k


@dataclass(frozen=True)
class Plan:
    """Both calls of one batch; `source` are rows of the copied keys, `target` rows of all."""

    trunks: Sequences
    branches: Sequences | None
    copied: Tensor | None  # the row of each key of the second call
    own: Tensor | None  # source: a branch's own keys, in the order of `branches.rows`
    levels: tuple[tuple[Tensor, Tensor], ...]  # source and target of each trunk's n-th branch

    @property
    def calls(self) -> list[tuple[Sequences, Rows]]:
        """Each call with the rows of its keys."""
        calls: list[tuple[Sequences, Rows]] = [(self.trunks, self.trunks.rows)]
        if self.branches is None or self.copied is None:
            return calls
        return [*calls, (self.branches, self.copied)]


def plan_of(rows: list[list[int]], send: Callable[[Tensor], Tensor]) -> Plan:
    """Make the plan of a table of segments; `send` brings a tensor to the device."""
    trunks = [r for r in rows if not r[PREFIX]]
    branches = [r for r in rows if r[PREFIX]]
    first = _sequences(trunks, send)
    if not branches:
        return Plan(first, None, None, None, ())
    begin = [r[i] for r in branches for i in (TRUNK_START, START)]
    length = [r[i] for r in branches for i in (PREFIX, LENGTH)]
    source = torch.tensor([0, *length]).cumsum(0)[:-1].tolist()  # where each range is copied to
    levels: dict[int, list[int]] = {}  # n: the prefix ranges of every trunk's n-th branch
    met: dict[int, int] = {}
    for i, r in enumerate(branches):
        level = met[r[TRUNK_START]] = met.get(r[TRUNK_START], -1) + 1
        levels.setdefault(level, []).append(2 * i)

    def rows_of(at: list[int], level: list[int]) -> Tensor:
        return send(_ranges([at[i] for i in level], [length[i] for i in level]))

    pairs = [(rows_of(source, level), rows_of(begin, level)) for level in levels.values()]
    own = _ranges(source[1::2], length[1::2])
    copied = _ranges(begin, length)
    return Plan(first, _sequences(branches, send), send(copied), send(own), tuple(pairs))


def _sequences(segments: list[list[int]], send: Callable[[Tensor], Tensor]) -> Sequences:
    start, length = [r[START] for r in segments], [r[LENGTH] for r in segments]
    keys = [r[PREFIX] + r[LENGTH] for r in segments]
    in_one_piece = start[-1] + length[-1] - start[0] == sum(length)
    rows: Rows = slice(start[0], start[-1] + length[-1])
    if not in_one_piece:
        rows = send(_ranges(start, length))
    cu_q, cu_k = (
        send(torch.tensor([0, *n], dtype=torch.int32).cumsum(0, dtype=torch.int32))
        for n in (length, keys)
    )
    return Sequences(rows, (cu_q, cu_k, max(length), max(keys)))


def _ranges(begin: list[int], length: list[int]) -> Tensor:
    """begin, begin + 1, ... of each range, one after another: int64."""
    lengths = torch.tensor(length)
    shift = torch.tensor(begin) - (lengths.cumsum(0) - lengths)
    return torch.arange(int(lengths.sum())) + torch.repeat_interleave(shift, lengths)


@functools.lru_cache(maxsize=8)
def _cached_plan(table: tuple[int, ...], device: torch.device) -> Plan:
    def send(x: Tensor) -> Tensor:
        if device.type == "cpu":
            return x
        return x.pin_memory().to(device, non_blocking=True)

    return plan_of([list(table[i : i + 6]) for i in range(0, len(table), 6)], send)


def _plan(host_S6: Tensor, device: torch.device) -> Plan:
    return _cached_plan(tuple(host_S6.flatten().tolist()), device)


def decomposed(name: str, find: Callable[[], Engine]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The operation `timeline_attention_<name>` over the engine that `find` returns."""

    def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
        query_THC, scale = inputs.query_THC, inputs.scale
        if not len(query_THC):
            wide = torch.promote_types(query_THC.dtype, torch.float32)
            lse_HT = query_THC.new_empty(query_THC.shape[1], 0, dtype=wide)
            return query_THC.new_empty(query_THC.shape), lse_HT
        plan = _plan(inputs.table_S6, query_THC.device)
        tensors, results = [_dense(x) for x in inputs[:3]], []
        for call, keys in plan.calls:
            out, lse = find().forward(*_of_call(tensors, call, keys), *call.bounds, scale)
            results.append((out, lse.T))
        out_THC, lse_TH = (_joined(plan, parts) for parts in zip(*results, strict=True))
        return out_THC, lse_TH.T.contiguous()

    def backward(
        grad_out_THC: Tensor, out_THC: Tensor, lse_HT: Tensor, inputs: Inputs
    ) -> tuple[Tensor, ...]:
        tensors, results = [_dense(x) for x in inputs[:3]], []
        if not len(inputs.query_THC):
            return tuple(x.new_empty(x.shape) for x in tensors)
        plan = _plan(inputs.table_S6, inputs.query_THC.device)
        for call, keys in plan.calls:
            grad, out = _read(grad_out_THC, call.rows), _read(out_THC, call.rows)
            given = (grad, *_of_call(tensors, call, keys), out)
            lse = _read(lse_HT.T, call.rows).T.contiguous()
            results.append(find().backward(*given, lse, *call.bounds, inputs.scale))
        query_parts, *key_parts = zip(*results, strict=True)
        return _joined(plan, query_parts), *(_folded(plan, parts) for parts in key_parts)

    return forward_backward(name, forward, backward)


def _of_call(tensors: list[Tensor], call: Sequences, keys: Rows) -> list[Tensor]:
    return [_read(x, rows) for x, rows in zip(tensors, (call.rows, keys, keys), strict=True)]


def _joined(plan: Plan, parts: tuple[Tensor, ...]) -> Tensor:
    """All rows, from the query rows of each call."""
    if len(parts) == 1:
        return parts[0].contiguous()
    whole = parts[0].new_empty(sum(len(x) for x in parts), *parts[0].shape[1:])
    for (call, _), part in zip(plan.calls, parts, strict=True):
        _write(whole, call.rows, part)
    return whole


def _folded(plan: Plan, parts: tuple[Tensor, ...]) -> Tensor:
    """The gradient of all keys, or values, from those of the keys of each call."""
    if plan.own is None:
        return parts[0].contiguous()
    trunks, copied = parts
    wide = torch.promote_types(trunks.dtype, torch.float32)
    own = copied.index_select(0, plan.own)
    whole = _joined(plan, (trunks.to(wide), own.to(wide)))
    for source, target in plan.levels:
        more = copied.index_select(0, source).to(wide)
        whole.index_copy_(0, target, more.add_(whole.index_select(0, target)))
    return whole.to(trunks.dtype)


def _read(x: Tensor, rows: Rows) -> Tensor:
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def _write(x: Tensor, rows: Rows, part: Tensor) -> None:
    if isinstance(rows, slice):
        x[rows] = part
    else:
        x.index_copy_(0, rows, part)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _installed() -> Engine:
    """What `missing` has made sure of."""
    return cast(Engine, engine())


timeline_attention = decomposed("varlen", _installed)
timeline_attention.__doc__ = attention.__doc__
