"""Attention of trunks and the branches that hang on them, packed in one row of tokens.

    out = softmax(scale q k') v over what is seen        lse = log sum exp of the same scores

`segments` defines what a query sees.

T tokens, H query heads, G key/value heads (H / G query heads share one), C head dim, S segments.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from smbkernels.attention.segments import Segments, visible
from smbkernels.operation import Backend, op


def attention_flops(pairs: int, heads: int, head_dim: int, *, backward: bool = False) -> int:
    """Of the matrix products over visible pairs: 2 forward, 5 backward (one is recomputed)."""
    return (5 if backward else 2) * 2 * pairs * heads * head_dim


def _flops(
    query_THC: Tensor, _key_TGC: Tensor, _value_TGC: Tensor, segments: Segments, **_kwargs: Any
) -> int:
    return attention_flops(segments.pairs, query_THC.shape[1], query_THC.shape[2])


def _fits_triton(query_THC: Tensor, *_args: Any, **_kwargs: Any) -> str | None:
    if query_THC.dtype not in (torch.float32, torch.bfloat16):
        return f"dtype must be fp32 or bf16, got {query_THC.dtype}"
    if query_THC.shape[-1] not in (64, 128):
        return f"head dim must be 64 or 128, got {query_THC.shape[-1]}"
    return None


def _fits_cpp(query_THC: Tensor, *_args: Any, **_kwargs: Any) -> str | None:
    if query_THC.dtype not in (torch.float32, torch.bfloat16):
        return f"dtype must be fp32 or bf16, got {query_THC.dtype}"
    return None


def _fits_varlen(query_THC: Tensor, *_args: Any, **_kwargs: Any) -> str | None:
    if query_THC.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype must be bf16 or fp16, got {query_THC.dtype}"
    if query_THC.shape[-1] % 8 or query_THC.shape[-1] > 256:
        return f"head dim must be a multiple of 8 up to 256, got {query_THC.shape[-1]}"
    return None


def _fits_cudnn(query_THC: Tensor, *_args: Any, **_kwargs: Any) -> str | None:
    if query_THC.shape[-1] > 128:
        return f"head dim must be a multiple of 8 up to 128, got {query_THC.shape[-1]}"
    return _fits_varlen(query_THC)


@op(
    Backend("triton", "attention.triton", ("cuda",), _fits_triton),
    Backend("varlen", "attention.varlen", ("cuda",), _fits_varlen),
    # only on request, until a GPU has shown that they pay; their backwards add up by atomics
    Backend("flash", "attention.flash", (), _fits_varlen),
    Backend("cudnn", "attention.cudnn", (), _fits_cudnn),
    Backend("cpp", "attention.cpp", ("cpu",), _fits_cpp),
    Backend("sdpa", "attention.sdpa", ("cpu",)),
    flops=_flops,
)
def timeline_attention(
    query_THC: Tensor,
    key_TGC: Tensor,
    value_TGC: Tensor,
    segments: Segments,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention outputs [T, H, C] and log-sum-exp [H, T], at least fp32 and without gradient.

    Args:
        query_THC: H is a multiple of G.
        key_TGC: of the dtype of the queries, as are the values.
        scale: of the scores; None: C ** -0.5.
    """
    _, H, C = query_THC.shape
    visible_TT = visible(segments).to(query_THC.device)
    wide = torch.promote_types(query_THC.dtype, torch.float32)
    group = H // key_TGC.shape[1]
    key_THC = key_TGC.to(wide).repeat_interleave(group, 1)
    value_THC = value_TGC.to(wide).repeat_interleave(group, 1)
    score_HTT = torch.einsum("qhc,khc->hqk", query_THC.to(wide), key_THC)
    score_HTT = score_HTT * (C**-0.5 if scale is None else scale)
    score_HTT = score_HTT.masked_fill(~visible_TT, -torch.inf)
    lse_HT = torch.logsumexp(score_HTT, -1)
    out_THC = torch.einsum("hqk,khc->qhc", torch.exp(score_HTT - lse_HT[..., None]), value_THC)
    return out_THC.to(query_THC.dtype), lse_HT.detach()


class Inputs(NamedTuple):
    """What a backend computes from: the operation's arguments, with the table of the segments."""

    query_THC: Tensor
    key_TGC: Tensor
    value_TGC: Tensor
    table_S6: Tensor
    scale: float


Forward = Callable[[Inputs], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Inputs], tuple[Tensor, ...]]


def forward_backward(
    backend: str, forward: Forward, backward: Backward, *, on_device: bool = False
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The operation on a backend.

    Args:
        forward: (inputs) -> out [T, H, C] and lse [H, T].
        backward: (grad_out, out, lse, inputs) -> the gradients of query, key and value. All that
            either returns is contiguous.
        on_device: they read the table where the queries are, and a gradient of any strides;
            otherwise the table on the CPU, and a contiguous gradient.
    """
    name = f"timeline_attention_{backend}"
    attend = _custom_op(name, forward, backward, on_device=on_device)
    _count_flops(name)

    def timeline_attention(
        query_THC: Tensor,
        key_TGC: Tensor,
        value_TGC: Tensor,
        segments: Segments,
        *,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        _check(query_THC, {"key_TGC": key_TGC, "value_TGC": value_TGC}, segments.tokens)
        table_S6 = segments.table_S6 if on_device else segments.host_S6
        if on_device and table_S6.device != query_THC.device:
            raise ValueError(
                f"segments must be on {query_THC.device} as the queries, got "
                f"{table_S6.device}: `segments.to(device)` moves them once per batch"
            )
        scale = query_THC.shape[-1] ** -0.5 if scale is None else scale
        tensors = (query_THC, key_TGC, value_TGC, table_S6)
        out_THC, lse_HT = attend(*tensors, scale, segments.pairs)
        return out_THC, lse_HT.detach()

    return timeline_attention


def _custom_op(name: str, forward: Forward, backward: Backward, *, on_device: bool) -> CustomOpDef:
    """(query, key, value, table, scale, visible pairs) -> out and lse, with its gradient."""

    @custom_op(f"smb::{name}", mutates_args=())
    def attend(
        query_THC: Tensor,
        key_TGC: Tensor,
        value_TGC: Tensor,
        table_S6: Tensor,
        scale: float,
        pairs: int,
    ) -> tuple[Tensor, Tensor]:
        return forward(Inputs(query_THC, key_TGC, value_TGC, table_S6, scale))

    @attend.register_fake
    def _(query_THC, *_inputs):
        T, H, _ = query_THC.shape
        wide = torch.promote_types(query_THC.dtype, torch.float32)
        return query_THC.new_empty(query_THC.shape), query_THC.new_empty(H, T, dtype=wide)

    @custom_op(f"smb::{name}_bwd", mutates_args=())
    def attend_bwd(
        grad_out_THC: Tensor,
        query_THC: Tensor,
        key_TGC: Tensor,
        value_TGC: Tensor,
        out_THC: Tensor,
        lse_HT: Tensor,
        table_S6: Tensor,
        scale: float,
        pairs: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_out_THC = grad_out_THC if on_device else grad_out_THC.contiguous()
        inputs = Inputs(query_THC, key_TGC, value_TGC, table_S6, scale)
        grads = backward(grad_out_THC, out_THC, lse_HT, inputs)
        return grads[0], grads[1], grads[2]

    @attend_bwd.register_fake
    def _(_grad_out_THC, query_THC, key_TGC, value_TGC, *_inputs):
        return tuple(x.new_empty(x.shape) for x in (query_THC, key_TGC, value_TGC))

    def save(ctx, inputs, output) -> None:
        *tensors, ctx.scale, ctx.pairs = inputs
        *tensors, table_S6 = tensors
        ctx.save_for_backward(*tensors, *output, table_S6)
        ctx.set_materialize_grads(False)

    def differentiate(ctx, grad_out_THC, _grad_lse):
        if grad_out_THC is None:
            return (None,) * 6
        return *attend_bwd(grad_out_THC, *ctx.saved_tensors, ctx.scale, ctx.pairs), *[None] * 3

    attend.register_autograd(differentiate, setup_context=save)
    return attend


def _count_flops(name: str) -> None:
    @register_flop_formula(getattr(torch.ops.smb, name), get_raw=True)
    def _(query_THC, *inputs, **_):
        return attention_flops(inputs[-1], query_THC.shape[1], query_THC.shape[2])

    @register_flop_formula(getattr(torch.ops.smb, f"{name}_bwd"), get_raw=True)
    def _(_grad_out_THC, query_THC, *inputs, **_):
        return attention_flops(inputs[-1], query_THC.shape[1], query_THC.shape[2], backward=True)


def _check(query_THC: Tensor, keys_and_values: dict[str, Tensor], num_tokens: int) -> None:
    if query_THC.dim() != 3 or query_THC.shape[0] != num_tokens:
        raise ValueError(f"query_THC must be [{num_tokens}, H, C], got {list(query_THC.shape)}")
    T, H, C = query_THC.shape
    key_TGC = keys_and_values["key_TGC"]
    for name, x in keys_and_values.items():
        if x.dim() != 3 or x.shape != (T, key_TGC.shape[1], C) or not x.shape[1] or H % x.shape[1]:
            raise ValueError(
                f"{name} must be [{T}, G, {C}] with the same G for keys and values that divides "
                f"{H}, got {list(x.shape)}"
            )
        if x.dtype != query_THC.dtype:
            raise ValueError(f"{name} must be {query_THC.dtype} as the queries, got {x.dtype}")
        if x.device != query_THC.device:
            raise ValueError(f"{name} must be on {query_THC.device} as the queries, got {x.device}")
