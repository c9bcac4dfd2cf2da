"""Timeline attention in two calls of varlen attention whose masks are top-left, exact.

    own: every segment's queries against its own keys, causal
    far: every branch's queries against the prefix of its trunk, without a mask

No key of a segment is copied for the first call, and neither call needs a mask that is aligned
bottom right. The two results of a branch, out_o and out_f with log-sum-exps o and f, are merged:

    lse = log(e^o + e^f)        out = e^(o - lse) out_o + e^(f - lse) out_f

Backward is exact call by call: given the *merged* out and lse, each call's own backward computes
P = exp(scale q k' - lse) and dS = P (dout v' - dout . out), which is what its keys get. Gradients
of a branch's queries add up, and those of a prefix's keys are added in the order of the branches.

What a far call reads. Branches side by side with the same prefix are one sequence. Where no two
sequences share keys, forward reads keys in place: what lies between two prefixes is the keys of a
sequence without queries. Otherwise, and in every backward, prefixes are copied together. Backward
could read in place too, but FlashAttention 2 writes and sums H rows of gradient for each key that
it is given, of which G are left: what lies between then costs 4 C (2 H) bytes a key in bf16, and a
copy 4 C (4 G), which is more only where more than two thirds of a trunk are seen (H = 4 G).

What runs the calls is an `Engine`:

    forward(query, key, value, *bounds, causal, scale) -> out, lse [H, L], at least fp32
    backward(grad_out, query, key, value, out, lse, *bounds, causal, scale) -> 3 gradients

Sequences may lack queries, but not keys; a causal call has as many of both.

Bounds of sequences are made on the CPU from the table of segments, sent without a wait and cached
for the other layers of the batch.

L queries of a call, P keys of a call, otherwise as in `op`.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from smbkernels.attention.engines import Engine
from smbkernels.attention.op import Inputs, forward_backward
from smbkernels.attention.segments import LENGTH, PREFIX, START, TRUNK_START


class Far(NamedTuple):
    """Rows of the queries of one or more branches side by side, and of the prefix they all see."""

    query: slice
    key: slice


class Bounds(NamedTuple):
    """Where sequences begin, int32 on the device, and the most queries and keys of one."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int


@dataclass(frozen=True)
class Plan:
    """Both calls of a batch; without branches the first alone."""

    own: Bounds
    far: tuple[Far, ...]
    copied: Bounds | None  # of the far call, over prefixes that are copied together
    in_place: Bounds | None  # over all keys from the first prefix to the last, if none are shared

    @property
    def queries(self) -> tuple[slice, ...]:
        """Rows of the far call's queries, in as few pieces as there are."""
        return joined(f.query for f in self.far)

    @property
    def keys(self) -> tuple[slice, ...]:
        """Rows of the far call's keys."""
        return tuple(f.key for f in self.far)


def far_of(rows: list[list[int]]) -> tuple[Far, ...]:
    """The sequences of the far call, of a table of segments."""
    sequences: list[Far] = []
    for r in rows:
        if not r[PREFIX]:
            continue
        query = slice(r[START], r[START] + r[LENGTH])
        key = slice(r[TRUNK_START], r[TRUNK_START] + r[PREFIX])
        last = sequences[-1] if sequences else None
        if last and last.key == key and last.query.stop == query.start:
            sequences[-1] = Far(slice(last.query.start, query.stop), key)
        else:
            sequences.append(Far(query, key))
    return tuple(sequences)


def plan_of(rows: list[list[int]], send: Callable[[Tensor], Tensor]) -> Plan:
    """Make the plan of a table of segments; `send` brings a tensor to the device."""
    lengths = [r[LENGTH] for r in rows]
    own = _bounds(lengths, lengths, send)
    far = far_of(rows)
    if not far:
        return Plan(own, (), None, None)
    num_queries = [_size(f.query) for f in far]
    copied = _bounds(num_queries, [_size(f.key) for f in far], send)
    if any(a.key.stop > b.key.start for a, b in itertools.pairwise(far)):
        return Plan(own, far, copied, None)
    with_gaps: list[tuple[int, int]] = []  # queries and keys of each sequence
    at = far[0].key.start
    for f, num in zip(far, num_queries, strict=True):
        if f.key.start > at:
            with_gaps.append((0, f.key.start - at))
        with_gaps.append((num, _size(f.key)))
        at = f.key.stop
    in_place = _bounds([q for q, _ in with_gaps], [k for _, k in with_gaps], send)
    return Plan(own, far, copied, in_place)


def _bounds(queries: list[int], keys: list[int], send: Callable[[Tensor], Tensor]) -> Bounds:
    cu_q, cu_k = (
        send(torch.tensor([0, *n], dtype=torch.int32).cumsum(0, dtype=torch.int32))
        for n in (queries, keys)
    )
    return Bounds(cu_q, cu_k, max(queries), max(keys))


def _size(rows: slice) -> int:
    return rows.stop - rows.start


def joined(ranges: Iterable[slice]) -> tuple[slice, ...]:
    """The same rows with neighbours in one piece."""
    pieces: list[slice] = []
    for rows in ranges:
        if pieces and pieces[-1].stop == rows.start:
            rows = slice(pieces.pop().start, rows.stop)
        pieces.append(rows)
    return tuple(pieces)


@functools.lru_cache(maxsize=8)
def _cached_plan(table: tuple[int, ...], device: torch.device) -> Plan:
    def send(x: Tensor) -> Tensor:
        if device.type == "cpu":
            return x
        return x.pin_memory().to(device, non_blocking=True)

    return plan_of([list(table[i : i + 6]) for i in range(0, len(table), 6)], send)


def _plan(host_S6: Tensor, device: torch.device) -> Plan:
    return _cached_plan(tuple(host_S6.flatten().tolist()), device)


def run_forward(
    engine: Engine, plan: Plan, tensors: list[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs [T, H, C] and log-sum-exp [H, T], of query, key and value."""
    out_THC, lse_HT = engine.forward(*tensors, *plan.own, True, scale)
    out_THC, lse_HT = out_THC.contiguous(), lse_HT.contiguous()
    bounds, ranges = plan.copied, plan.keys
    if plan.in_place is not None:
        bounds, ranges = plan.in_place, (slice(ranges[0].start, ranges[-1].stop),)
    if bounds is None:
        return out_THC, lse_HT
    given = [gathered(x, r) for x, r in zip(tensors, (plan.queries, ranges, ranges), strict=True)]
    far_LHC, far_HL = engine.forward(*given, *bounds, False, scale)
    at = 0
    for rows in plan.queries:
        part = slice(at, at + _size(rows))
        own = (part_of(out_THC, rows), part_of(lse_HT, rows, 1))
        merge_(*own, part_of(far_LHC, part), part_of(far_HL, part, 1))
        at = part.stop
    return out_THC, lse_HT


def run_backward(
    engine: Engine, plan: Plan, grad_out_THC: Tensor, rows: list[Tensor], scale: float
) -> tuple[Tensor, ...]:
    """Gradients of query, key and value; `rows` are these three, out and the log-sum-exp."""
    *tensors, out_THC, lse_HT = rows
    given = (grad_out_THC, *tensors, out_THC, lse_HT)
    grads = [x.contiguous() for x in engine.backward(*given, *plan.own, True, scale)]
    if plan.copied is None:
        return tuple(grads)
    own_rows, keys = plan.queries, plan.keys
    lse_HL = torch.cat([part_of(lse_HT, r, 1) for r in own_rows], 1)
    given = (
        *(gathered(x, own_rows) for x in (grad_out_THC, tensors[0])),
        *(gathered(x, keys) for x in tensors[1:]),
        gathered(out_THC, own_rows),
        lse_HL,
    )
    parts = engine.backward(*given, *plan.copied, False, scale)
    for i, ranges in enumerate((own_rows, keys, keys)):
        grads[i] = added(grads[i], ranges, parts[i].split([_size(r) for r in ranges]))
    return tuple(grads)


def gathered(x_TNC: Tensor, ranges: tuple[slice, ...]) -> Tensor:
    """These rows one after another: a copy, but for a single range."""
    if len(ranges) == 1:
        return part_of(x_TNC, ranges[0])
    return torch.cat([part_of(x_TNC, rows) for rows in ranges])


def part_of(x: Tensor, rows: slice, dim: int = 0) -> Tensor:
    """A view of these rows."""
    return x.narrow(dim, rows.start, rows.stop - rows.start)


def merge_(out_LHC: Tensor, lse_HL: Tensor, far_LHC: Tensor, far_HL: Tensor) -> None:
    """Merge a far call's result into that of the own call, in place."""
    far_weight_LH1 = torch.sigmoid(far_HL - lse_HL).T.unsqueeze(-1)
    out_LHC.mul_(1 - far_weight_LH1).addcmul_(far_LHC, far_weight_LH1)
    torch.logaddexp(lse_HL, far_HL, out=lse_HL)


def added(whole_TNC: Tensor, ranges: Sequence[slice], parts: Sequence[Tensor]) -> Tensor:
    """The sum of a tensor, which may be overwritten, and of parts for ranges of its rows.

    In one launch where no row gets two parts; otherwise in fp32 and in order, rounded once.
    """
    in_order = sorted(ranges, key=lambda rows: rows.start)
    if all(a.stop <= b.start for a, b in itertools.pairwise(in_order)):
        torch._foreach_add_([part_of(whole_TNC, rows) for rows in ranges], list(parts))
        return whole_TNC
    total_TNC = whole_TNC.to(torch.promote_types(whole_TNC.dtype, torch.float32))
    for rows, part in zip(ranges, parts, strict=True):
        part_of(total_TNC, rows).add_(part)
    return total_TNC.to(whole_TNC.dtype)


def decomposed(name: str, find: Callable[[], Engine]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The operation `timeline_attention_<name>` over the engine that `find` returns."""

    def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
        query_THC = inputs.query_THC
        if not len(query_THC):
            wide = torch.promote_types(query_THC.dtype, torch.float32)
            lse_HT = query_THC.new_empty(query_THC.shape[1], 0, dtype=wide)
            return query_THC.new_empty(query_THC.shape), lse_HT
        plan = _plan(inputs.table_S6, query_THC.device)
        return run_forward(find(), plan, [_dense(x) for x in inputs[:3]], inputs.scale)

    def backward(
        grad_out_THC: Tensor, out_THC: Tensor, lse_HT: Tensor, inputs: Inputs
    ) -> tuple[Tensor, ...]:
        tensors = [_dense(x) for x in inputs[:3]]
        if not len(inputs.query_THC):
            return tuple(x.new_empty(x.shape) for x in tensors)
        plan = _plan(inputs.table_S6, inputs.query_THC.device)
        rows = [*tensors, out_THC, lse_HT]
        return run_backward(find(), plan, grad_out_THC, rows, inputs.scale)

    return forward_backward(name, forward, backward)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
