"""Attention of packed rivals: what somebody who has no kernel of ours would call.

On a GPU it is torch's public `varlen_attn`, once on the trunks and once on the branches behind
copies of their prefixes, with autograd's own backward. It adds up gradients by atomics, which is
its default; ours is asked for the same bits every time, which costs time. On a CPU, for which torch
has no attention on packed rows, it is torch's flash attention by segment, the operation's `sdpa`.

Legend: T rows of a pack, Q queries and P keys of a call, H query heads, G key heads, C head dim.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from smbkernels.attention import Segments, attention_flops, sdpa
from smbkernels.attention.varlen import plan_of
from torch import Tensor

_CAUSAL = (-1, 0)  # keys to the left without limit, none to the right of the diagonal


class Call(NamedTuple):
    """One call on sequences of queries and of keys; causal, aligned at the last of both."""

    num_queries: int  # the rows of the pack that follow those of the calls before
    keys: Tensor | None  # the row of the pack of each key; None: those of the queries
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int


def calls_of(segments: Segments, device: torch.device | str) -> list[Call]:
    """The trunks of a pack, then its branches if there are any; made once for a batch."""
    plan = plan_of(segments.host_S6.tolist(), lambda x: x.to(device))
    calls, first = [], 0
    for sequences, keys in plan.calls:
        rows = sequences.rows
        assert isinstance(rows, slice) and rows.start == first, "trunks come before branches"
        own = None if isinstance(keys, slice) else keys
        calls.append(Call(rows.stop - first, own, *sequences.bounds))
        first = rows.stop
    return calls


def by_calls(
    query_THC: Tensor,
    key_TGC: Tensor,
    value_TGC: Tensor,
    calls: list[Call],
    scale: float,
    attend: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Attention outputs [T, H, C] by one call of `attend`, or of `varlen_attn`, for each part."""
    attend = attend or varlen_attn()
    outputs, first = [], 0
    for call in calls:
        own = slice(first, first + call.num_queries)
        rows = own if call.keys is None else call.keys
        tensors = (query_THC[own], key_TGC[rows], value_TGC[rows])
        outputs.append(attend(*tensors, call.cu_q, call.cu_k, call.max_q, call.max_k, scale=scale))
        first = own.stop
    return torch.cat(outputs)


def by_segment(
    query_THC: Tensor, key_TGC: Tensor, value_TGC: Tensor, segments: Segments, scale: float
) -> Tensor:
    """Attention outputs [T, H, C] on a CPU."""
    return sdpa.timeline_attention(query_THC, key_TGC, value_TGC, segments, scale=scale)[0]


@functools.cache
def varlen_attn() -> Callable[..., Tensor]:
    """torch's attention on packed rows, causal; its options differ by version."""
    from torch.nn.attention import varlen

    options: dict[str, Any] = {"window_size": _CAUSAL}
    if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters:
        options["enable_gqa"] = True  # from 2.12 on; 2.11 takes fewer key heads as they are
    return functools.partial(varlen.varlen_attn, **options)


def varlen_formulas() -> dict[Any, Callable[..., int]]:
    """Formulas of `varlen_attn` that count the pairs that its causal sequences see."""
    formulas: dict[Any, Any] = {}
    for end in ("", "_backward"):
        packet = getattr(torch.ops.torch_attn, f"_varlen_attn{end}", None)
        if packet is not None:
            names = [a.name for a in packet.default._schema.arguments]
            formulas[packet] = functools.partial(_varlen_flops, names, bool(end))
            formulas[packet]._get_raw = True
    return formulas


def _varlen_flops(names: list[str], backward: bool, *args: Any, **kwargs: Any) -> int:
    given = dict(zip(names, args, strict=False)) | kwargs
    _, heads, head_dim = given["query"].shape
    num_queries, num_keys = (given[name].diff().long() for name in ("cu_seq_q", "cu_seq_k"))
    pairs = num_queries * num_keys - num_queries * (num_queries - 1) // 2
    return attention_flops(int(pairs.sum()), heads, head_dim, backward=backward)
