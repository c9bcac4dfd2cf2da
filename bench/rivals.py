"""What others would use in place of an operation, with its signature.

None of it is ours; each is checked against the reference like an implementation, but for those that
compute less on purpose.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from smbkernels.attention import Segments, flash, varlen
from smbkernels.attention.engines import Engine
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

BY_SEGMENT = "SDPA by segment"
ADDMM_LERP, FOREACH_LERP = "addmm + lerp_", "_foreach_lerp_"
LIGER = "Liger fused"
SWITCH = "float32_matmul_precision"
TORCH_NORM = "addition, F.rms_norm"


def averages(*, halves: bool) -> dict[str, Callable | str]:
    """Averages of merged weights on an fp32 master.

    Args:
        halves: the case keeps bf16 halves and remainders; the master is then made here, once.
    """
    made: list[Tensor] = []

    def master(average: list[Tensor]) -> list[Tensor]:
        if halves and not made:
            made.extend(t.float() for t in average)
        return made if halves else average

    def merged(weight, b, a, scale, i) -> Tensor:
        if b is None:
            return weight[i].float()
        return torch.addmm(weight[i].float(), b[i], a[i], alpha=scale[i])

    @torch.no_grad()
    def addmm_lerp(average, weight, b=None, a=None, *, remainder=None, scale, tau) -> None:
        for i, full in enumerate(master(average)):
            full.lerp_(merged(weight, b, a, scale, i), 1 - tau)

    @torch.no_grad()
    def foreach_lerp(average, weight, b=None, a=None, *, remainder=None, scale, tau) -> None:
        targets = [merged(weight, b, a, scale, i) for i in range(len(average))]
        torch._foreach_lerp_(master(average), targets, 1 - tau)

    return {ADDMM_LERP: addmm_lerp, FOREACH_LERP: foreach_lerp}


def attentions(segments: Segments, device: str) -> dict[str, Callable | str]:
    """Eager attention without a mask over all tokens, and on a GPU what has a kernel for it."""
    rivals: dict[str, Callable | str] = {BY_SEGMENT: _by_segment(segments, device)}
    if device == "cuda":
        rivals["FlexAttention"] = _flex(segments, device)
        rivals["MagiAttention"] = magi(segments, device)
        rivals["flash, prefixes copied"] = flash.missing(device) or copied()
    return rivals


def _by_segment(segments: Segments, device: str) -> Callable:
    rows = [row[:4] for row in segments.table_S6.tolist()]
    masks = {}
    for _, length, _, prefix in rows:
        if prefix and (length, prefix) not in masks:
            mask = torch.ones(length, prefix + length, dtype=torch.bool, device=device)
            masks[length, prefix] = mask.tril(prefix)

    def attention(query_THC, key_TGC, value_TGC, segments, *, scale=None):
        outputs = []
        for start, length, trunk, prefix in rows:
            own = slice(start, start + length)
            key, value = key_TGC[own], value_TGC[own]
            if prefix:
                seen = slice(trunk, trunk + prefix)
                # the kernels that take a mask want as many key heads as query heads
                group = query_THC.shape[1] // key.shape[1]
                key = torch.cat([key_TGC[seen], key]).repeat_interleave(group, 1)
                value = torch.cat([value_TGC[seen], value]).repeat_interleave(group, 1)
            heads = (t.transpose(0, 1)[None] for t in (query_THC[own], key, value))
            out = F.scaled_dot_product_attention(
                *heads,
                attn_mask=masks[length, prefix] if prefix else None,
                is_causal=not prefix,
                scale=scale,
                enable_gqa=not prefix,
            )
            outputs.append(out[0].transpose(0, 1))
        return torch.cat(outputs), None

    return attention


def mask_of(segments: Segments, device: str) -> Callable:
    """Whether a query sees a key, by the rows of the two, as FlexAttention asks it."""
    own, trunk, prefix = (
        torch.cat([torch.full((row[1],), row[i]) for row in segments.table_S6.tolist()]).to(device)
        for i in (0, 2, 3)
    )

    def visible(_batch, _head, q, k):
        return ((k >= own[q]) & (k <= q)) | ((k >= trunk[q]) & (k < trunk[q] + prefix[q]))

    return visible


def _flex(segments: Segments, device: str) -> Callable:
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

    visible = mask_of(segments, device)
    compiled = torch.compile(flex_attention, dynamic=False)
    blocks: list[BlockMask] = []  # made once, as for all layers of a step

    def attention(query_THC, key_TGC, value_TGC, segments, *, scale=None):
        if not blocks:
            num_tokens = len(query_THC)
            make = torch.compile(create_block_mask)
            blocks.append(make(visible, None, None, num_tokens, num_tokens, device=device))
        heads = (t.transpose(0, 1)[None] for t in (query_THC, key_TGC, value_TGC))
        out = compiled(*heads, block_mask=blocks[0], scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1), None

    return attention


def magi(segments: Segments, device: str) -> Callable | str:
    """MagiAttention's kernel over slices of queries and keys; those of a query add by atomics."""
    try:
        from magi_attention.api import flex_flash_attn_func as slices
    except ImportError as error:
        return f"not installed: {error}"
    full, causal = 0, 1
    queries, keys, kinds = [], [], []
    for start, length, trunk, prefix in (row[:4] for row in segments.table_S6.tolist()):
        own = [start, start + length]
        seen = [(own, causal), ([trunk, trunk + prefix], full)]
        for rows, kind in seen[: 2 if prefix else 1]:
            queries.append(own)
            keys.append(rows)
            kinds.append(kind)
    q_2N, k_2N, kind_N = (
        torch.tensor(x, dtype=torch.int32, device=device) for x in (queries, keys, kinds)
    )

    def attention(query_THC, key_TGC, value_TGC, segments, *, scale=None):
        scale = query_THC.shape[-1] ** -0.5 if scale is None else scale
        slice_of = {"q_ranges": q_2N, "k_ranges": k_2N, "attn_type_map": kind_N}
        tensors = (query_THC, key_TGC, value_TGC)
        return slices(*tensors, **slice_of, softmax_scale=scale)[0], None

    return attention


@functools.cache  # an operation is registered once
def copied() -> Callable:
    """Trunks, then branches behind copies of their prefixes; gradients add by atomics."""

    def engine() -> Engine:
        one = cast(Engine, flash.engine())
        # causal, and aligned bottom right where there are more keys than queries
        return Engine(
            one.name,
            lambda *given: one.forward(*given[:-1], True, given[-1]),
            lambda *given: one.backward(*given[:-1], True, given[-1]),
        )

    return varlen.decomposed("copied_prefixes", engine)


class _Switched(torch.autograd.Function):
    """A linear inside the switch for the whole process, there and back."""

    @staticmethod
    def forward(ctx, x_TK, weight_NK):
        ctx.save_for_backward(x_TK, weight_NK)
        with _lower_precision():
            return x_TK @ weight_NK.t()

    @staticmethod
    def backward(ctx, dy_TN):
        x_TK, weight_NK = ctx.saved_tensors
        with _lower_precision():
            return dy_TN @ weight_NK, dy_TN.t() @ x_TK


@contextmanager
def _lower_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def linears(device: str) -> dict[str, Callable | str]:
    """torch's switch, which on a CPU without AMX means oneDNN in fp32."""
    if device != "cpu":
        return {SWITCH: f"it is measured on a CPU, tensors are on {device}"}
    if torch.cpu._is_amx_tile_supported():
        return {SWITCH: "with AMX it computes in bf16"}
    return {SWITCH: lambda x_TK, weight_NK, bias_N=None: _Switched.apply(x_TK, weight_NK)}


def base_alone(x_TK, weight, b, a, *, scale, bias=None) -> list[Tensor]:
    """The frozen linears without LoRA: what cannot be saved."""
    return [F.linear(x_TK, w) for w in weight]


def heads(device: str) -> dict[str, Callable | str]:
    """Liger's fused linear cross-entropy: chunks as in ours, the loss by a Triton kernel.

    It counts labels on the host, and so waits for the GPU once a call.
    """
    if device != "cuda":
        return {LIGER: f"tensors are on {device}"}
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        return {LIGER: f"cannot be imported: {error}"}
    summed = LigerFusedLinearCrossEntropyLoss(reduction="sum")

    def head(hidden_ND, weight_VD, label_N, *, scale=1.0) -> Tensor:
        return summed(weight_VD, hidden_ND, label_N) * scale

    return {LIGER: head}


def norms(device: str) -> dict[str, Callable | str]:
    """An addition before torch's own norm, or before Liger's."""

    def by_torch(x_TD, residual_TD, weight_D, *, eps):
        sum_TD = residual_TD + x_TD
        return sum_TD, F.rms_norm(sum_TD, weight_D.shape, weight_D, eps)

    liger = _liger(device)
    if isinstance(liger, str):
        return {TORCH_NORM: by_torch, "addition, Liger": liger}

    def by_liger(x_TD, residual_TD, weight_D, *, eps):
        sum_TD = residual_TD + x_TD
        return sum_TD, liger.LigerRMSNormFunction.apply(sum_TD, weight_D, eps, 0.0, "llama", False)

    return {TORCH_NORM: by_torch, "addition, Liger": by_liger}


def turned_heads(device: str) -> dict[str, Callable | str]:
    """Norm and RoPE as two passes: torch's norm and transformers' RoPE, or both of Liger's.

    Liger's RoPE overwrites the gradient that it is given, so it is given a copy.
    """

    def by_torch(q_THC, k_TGC, q_weight_C, k_weight_C, cos_TC, sin_TC, *, eps=1e-6):
        q_THC = F.rms_norm(q_THC, q_weight_C.shape, q_weight_C, eps)
        k_TGC = F.rms_norm(k_TGC, k_weight_C.shape, k_weight_C, eps)
        return apply_rotary_pos_emb(q_THC, k_TGC, cos_TC, sin_TC, unsqueeze_dim=1)

    liger = _liger(device)
    if isinstance(liger, str):
        return {"F.rms_norm, RoPE": by_torch, "Liger": liger}

    def by_liger(q_THC, k_TGC, q_weight_C, k_weight_C, cos_TC, sin_TC, *, eps=1e-6):
        heads = []
        for x_TNC, weight_C in ((q_THC, q_weight_C), (k_TGC, k_weight_C)):
            x_TNC = liger.LigerRMSNormFunction.apply(x_TNC, weight_C, eps, 0.0, "llama", True)
            heads.append(x_TNC.transpose(0, 1)[None])
        turned = liger.LigerRopeFunction.apply(*heads, cos_TC[None], sin_TC[None])
        outputs = [x_1NTC.squeeze(0).transpose(0, 1) for x_1NTC in turned]
        for output in outputs:
            if output.requires_grad:
                output.register_hook(torch.clone)
        return tuple(outputs)

    return {"F.rms_norm, RoPE": by_torch, "Liger": by_liger}


def gated(device: str) -> dict[str, Callable | str]:
    """Liger's, which overwrites what it saved: its graph can be used once."""
    liger = _liger(device)
    if isinstance(liger, str):
        return {"Liger": liger}
    return {"Liger": liger.LigerSiLUMulFunction.apply}


def _liger(device: str) -> Any:
    """A namespace of Liger's functions, or why they are not run."""
    if device != "cuda":
        return f"tensors are on {device}"
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.rope import LigerRopeFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError as error:
        return f"cannot be imported: {error}"
    functions = (LigerRMSNormFunction, LigerRopeFunction, LigerSiLUMulFunction)
    return SimpleNamespace(**{f.__name__: f for f in functions})
