"""Layouts of trunks and branches for tests of attention, and the comparison they end with.

A layout is a list of timelines: the length of a trunk, and (prefix, length) of each branch.
"""

from collections.abc import Callable

import torch
from smbkernels import Segments
from smbkernels.attention import timeline_attention, visible
from torch import Tensor

from tests.ops.tolerance import attention_rounding
from tests.oracle import assert_no_worse

Timelines = list[tuple[int, list[tuple[int, int]]]]

# 63, 64, 65: around a block of every engine; 1: the shortest; 600: several blocks and a rest
LAYOUTS: dict[str, Timelines] = {
    "trunks alone": [(63, []), (64, []), (1, []), (65, [])],
    "one branch on one token": [(65, [(1, 64)])],
    "one branch on the whole trunk": [(64, [(64, 65)])],
    "branches of one token": [(1, [(1, 1)]), (63, [(1, 1), (63, 1)])],
    "three nested branches": [(65, [(1, 63), (64, 64), (65, 65)])],
    "three, none and eight branches": [
        (65, [(65, 63), (1, 1), (64, 5)]),
        (64, []),
        (63, [(63, 2), (1, 65), (40, 1), (63, 7), (8, 3), (62, 64), (33, 9), (2, 30)]),
    ],
    "long": [(600, [(600, 65), (1, 63), (313, 130)]), (65, [])],
}


def columns(timelines: Timelines, *, interleaved: bool = False) -> Tensor:
    """start, length, trunk_start, prefix [4, S]: trunks first, or each before its branches."""
    order = [(t, None) for t in range(len(timelines))]
    order += [(t, b) for t, (_, branches) in enumerate(timelines) for b in range(len(branches))]
    if interleaved:
        order.sort(key=lambda place: place[0])
    rows, trunk_start, at = [], {}, 0
    for t, b in order:
        trunk, branches = timelines[t]
        prefix, length = (0, trunk) if b is None else branches[b]
        trunk_start.setdefault(t, at)
        rows.append((at, length, trunk_start[t], prefix))
        at += length
    return torch.tensor(rows).T


def segments(timelines: Timelines, *, interleaved: bool = False) -> Segments:
    """The same as Segments."""
    return Segments.of(*columns(timelines, interleaved=interleaved))


def inputs(
    tokens: int, H: int = 4, G: int = 2, C: int = 16, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Query, key, value and a gradient of the output; scores of size 3 make softmax sharp."""
    shapes = ((H, 3.0), (G, 1.0), (G, 1.0), (H, 1.0))
    return [(size * torch.randn(tokens, n, C)).to(dtype) for n, size in shapes]


def outcome(function: Callable, given: list[Tensor], *args, **kwargs) -> list[Tensor]:
    """out, lse and the gradients of query, key and value."""
    leaves = [x.detach().clone().requires_grad_() for x in given[:3]]
    out, lse = function(*leaves, *args, **kwargs)
    return [out.detach(), lse, *torch.autograd.grad(out, leaves, given[3])]


def dense(
    query_THC: Tensor, key_TGC: Tensor, value_TGC: Tensor, packed: Segments, **options
) -> tuple[Tensor, Tensor]:
    """What one writes without this operation: torch's attention with a mask of all tokens."""
    bhtc = [x.transpose(0, 1)[None] for x in (query_THC, key_TGC, value_TGC)]
    mask_TT = visible(packed).to(query_THC.device)
    options = {"attn_mask": mask_TT, "enable_gqa": True, **options}
    out = torch.nn.functional.scaled_dot_product_attention(*bhtc, **options)
    return out[0].transpose(0, 1), out


def assert_as_good(
    function: Callable,
    given: list[Tensor],
    packed: Segments,
    tol: float | None = None,
    **options,
) -> list[Tensor]:
    """Values and every gradient no further from fp64 than dense attention in the same dtype.

    Args:
        tol: None in fp32: what sums in another order explain.
    """
    fast = outcome(function, given, packed, **options)
    eager = outcome(dense, given, packed, **options)
    reference = timeline_attention.reference
    exact = outcome(reference, [x.double() for x in given], packed, **options)
    eager[1] = exact[1].to(fast[1].dtype)  # it gives no log-sum-exp
    if tol is None:
        C, R = given[0].shape[2], given[0].shape[1] // given[1].shape[1]
        tol = attention_rounding(exact[1], packed, C, R)
    for one in zip(fast, eager, exact, strict=True):
        assert_no_worse(*one, tol)
    return fast
