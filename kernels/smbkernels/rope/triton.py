"""The plan: a program owns some heads of a token, of its queries or of its keys.

It holds both halves of each head in registers, so that a head is read once and written once, in the
layout of the linears and of attention: no transposed copy exists. In bf16 that is 4 bytes an
element forward, and 6 backward, which reads what was normed again instead of keeping 1 / rms.
Cosines and sines come from L2 for all but the first program of a token.

The gradients of trained weights are sums over tokens and heads: a program then owns TOKENS of them,
writes its share in fp32, and torch adds the shares, in an order that depends on shapes alone.

T tokens, H query and G key heads, N heads of either, C head dim, P programs.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from smbkernels.autograd import rows
from smbkernels.rope.op import Four, by_hand
from smbkernels.triton_platform import Build, missing

__all__ = ["builds", "missing", "qk_norm_rope"]

# set explicitly, because its default differs between versions of Triton
OPTIONS = {"enable_fp_fusion": True}
TOKENS = 16  # of a program that has a share of a weight's gradient
ELEMENTS = 2048  # of the heads of a program, about: 16 per thread


@dataclass(frozen=True)
class Settings:
    """Of a launch: the tile of a program, and how many programs share a token."""

    block_n: int
    block_c: int  # of half a head
    blocks_q: int
    blocks_k: int
    num_warps: int

    @classmethod
    def of(cls, heads: int, kv_heads: int, head_dim: int) -> "Settings":
        """Blocks of 16 heads of 128."""
        block_c = triton.next_power_of_2(head_dim // 2)
        most = max(ELEMENTS // (2 * block_c), 1)
        block_n = min(triton.next_power_of_2(max(heads, kv_heads, 1)), most)
        blocks = triton.cdiv(heads, block_n), triton.cdiv(kv_heads, block_n)
        return cls(block_n, block_c, *blocks, num_warps=min(max(block_n * block_c // 256, 1), 8))


@triton.jit
def _row_start(row, stride):
    # a row of 2^31 elements and beyond is reached in 64 bits
    return row.to(tl.int64) * stride


@triton.jit
def _halves(ptr, at, mask, HALF: tl.constexpr):
    first = tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)
    return first, tl.load(ptr + at + HALF, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _rstd(first, second, mask_n, eps, HALF: tl.constexpr):
    mean_square = tl.sum(first * first + second * second, axis=1) * (0.5 / HALF)
    # of a head that is not there 1
    return tl.rsqrt(tl.where(mask_n, mean_square + eps, 1.0))[:, None]


@triton.jit
def _turn(
    to_ptr,
    x_ptr,
    stride_n,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    eps,
    block,
    N: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = tl.arange(0, BLOCK_C)
    mask_n, mask_c = offs_n < N, offs_c < HALF
    mask = mask_n[:, None] & mask_c[None, :]
    dtype = to_ptr.dtype.element_ty
    first, second = _halves(x_ptr, offs_n[:, None] * stride_n + offs_c[None, :], mask, HALF)
    if weight_ptr is not None:
        rstd = _rstd(first, second, mask_n, eps, HALF)
        weight, weight_2 = _halves(weight_ptr, offs_c, mask_c, HALF)
        first = ((first * rstd).to(dtype).to(tl.float32) * weight[None, :]).to(dtype)
        second = ((second * rstd).to(dtype).to(tl.float32) * weight_2[None, :]).to(dtype)
        first, second = first.to(tl.float32), second.to(tl.float32)
    cos, cos_2 = _halves(cos_ptr, offs_c, mask_c, HALF)
    sin, sin_2 = _halves(sin_ptr, offs_c, mask_c, HALF)
    out = to_ptr + offs_n[:, None] * (2 * HALF) + offs_c[None, :]
    turned = first * cos[None, :] - second * sin[None, :]
    tl.store(out, turned.to(dtype), mask=mask)
    turned = second * cos_2[None, :] + first * sin_2[None, :]
    tl.store(out + HALF, turned.to(dtype), mask=mask)


@triton.jit
def _qk_norm_rope_kernel(
    q_to_ptr,
    k_to_ptr,
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    stride_qt,
    stride_qn,
    stride_kt,
    stride_kn,
    stride_cos,
    stride_sin,
    eps,
    H: tl.constexpr,
    G: tl.constexpr,
    HALF: tl.constexpr,
    BLOCKS_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    t, block = tl.program_id(0), tl.program_id(1)
    cos_ptr += _row_start(t, stride_cos)
    sin_ptr += _row_start(t, stride_sin)
    if block < BLOCKS_Q:
        _turn(
            q_to_ptr + _row_start(t, 2 * H * HALF),
            q_ptr + _row_start(t, stride_qt),
            stride_qn,
            q_weight_ptr,
            cos_ptr,
            sin_ptr,
            eps,
            block,
            H,
            HALF,
            BLOCK_N,
            BLOCK_C,
        )
    else:
        _turn(
            k_to_ptr + _row_start(t, 2 * G * HALF),
            k_ptr + _row_start(t, stride_kt),
            stride_kn,
            k_weight_ptr,
            cos_ptr,
            sin_ptr,
            eps,
            block - BLOCKS_Q,
            G,
            HALF,
            BLOCK_N,
            BLOCK_C,
        )


@triton.jit
def _turn_back(
    to_ptr,
    share_ptr,
    grad_ptr,
    stride_gt,
    stride_gn,
    x_ptr,
    stride_t,
    stride_n,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    stride_cos,
    stride_sin,
    eps,
    block,
    T,
    N: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < HALF
    share = tl.zeros((BLOCK_C,), tl.float32)
    share_2 = tl.zeros((BLOCK_C,), tl.float32)
    for i in range(TOKENS):
        t = tl.program_id(0) * TOKENS + i
        mask_n = offs_n < tl.where(t < T, N, 0)
        mask = mask_n[:, None] & mask_c[None, :]
        mask_at = offs_c < tl.where(t < T, HALF, 0)
        cos, cos_2 = _halves(cos_ptr + _row_start(t, stride_cos), offs_c, mask_at, HALF)
        sin, sin_2 = _halves(sin_ptr + _row_start(t, stride_sin), offs_c, mask_at, HALF)
        at = offs_n[:, None] * stride_gn + offs_c[None, :]
        dy, dy_2 = _halves(grad_ptr + _row_start(t, stride_gt), at, mask, HALF)
        dx = dy * cos[None, :] + dy_2 * sin_2[None, :]
        dx_2 = dy_2 * cos_2[None, :] - dy * sin[None, :]
        if weight_ptr is not None:
            at = offs_n[:, None] * stride_n + offs_c[None, :]
            x, x_2 = _halves(x_ptr + _row_start(t, stride_t), at, mask, HALF)
            rstd = _rstd(x, x_2, mask_n, eps, HALF)
            x *= rstd
            x_2 *= rstd
            if share_ptr is not None:
                share += tl.sum(dx * x, axis=0)
                share_2 += tl.sum(dx_2 * x_2, axis=0)
            weight, weight_2 = _halves(weight_ptr, offs_c, mask_c, HALF)
            dx *= weight[None, :]
            dx_2 *= weight_2[None, :]
            mean = tl.sum(dx * x + dx_2 * x_2, axis=1)[:, None] * (0.5 / HALF)
            dx = rstd * (dx - x * mean)
            dx_2 = rstd * (dx_2 - x_2 * mean)
        out = to_ptr + _row_start(t, 2 * N * HALF)
        out += offs_n[:, None] * (2 * HALF) + offs_c[None, :]
        tl.store(out, dx.to(to_ptr.dtype.element_ty), mask=mask)
        tl.store(out + HALF, dx_2.to(to_ptr.dtype.element_ty), mask=mask)
    if share_ptr is not None:
        program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        share_ptr += program * (2 * HALF)
        tl.store(share_ptr + offs_c, share, mask=mask_c)
        tl.store(share_ptr + HALF + offs_c, share_2, mask=mask_c)


@triton.jit(do_not_specialize=["T"])
def _qk_norm_rope_bwd_kernel(
    q_to_ptr,
    k_to_ptr,
    share_ptr,
    grad_q_ptr,
    grad_k_ptr,
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    stride_gqt,
    stride_gqn,
    stride_gkt,
    stride_gkn,
    stride_qt,
    stride_qn,
    stride_kt,
    stride_kn,
    stride_cos,
    stride_sin,
    T,
    eps,
    H: tl.constexpr,
    G: tl.constexpr,
    HALF: tl.constexpr,
    BLOCKS_Q: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    block = tl.program_id(1)
    if block < BLOCKS_Q:
        _turn_back(
            q_to_ptr,
            share_ptr,
            grad_q_ptr,
            stride_gqt,
            stride_gqn,
            q_ptr,
            stride_qt,
            stride_qn,
            q_weight_ptr,
            cos_ptr,
            sin_ptr,
            stride_cos,
            stride_sin,
            eps,
            block,
            T,
            H,
            HALF,
            TOKENS,
            BLOCK_N,
            BLOCK_C,
        )
    else:
        _turn_back(
            k_to_ptr,
            share_ptr,
            grad_k_ptr,
            stride_gkt,
            stride_gkn,
            k_ptr,
            stride_kt,
            stride_kn,
            k_weight_ptr,
            cos_ptr,
            sin_ptr,
            stride_cos,
            stride_sin,
            eps,
            block - BLOCKS_Q,
            T,
            G,
            HALF,
            TOKENS,
            BLOCK_N,
            BLOCK_C,
        )


def _forward(
    q_THC: Tensor,
    k_TGC: Tensor,
    q_weight_C: Tensor | None,
    k_weight_C: Tensor | None,
    cos_TC: Tensor,
    sin_TC: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    (T, H, C), G = q_THC.shape, k_TGC.shape[1]
    settings = Settings.of(H, G, C)
    q_to_THC, k_to_TGC = q_THC.new_empty((T, H, C)), k_TGC.new_empty((T, G, C))
    q_THC, k_TGC, cos_TC, sin_TC = (rows(x) for x in (q_THC, k_TGC, cos_TC, sin_TC))
    blocks = settings.blocks_q + settings.blocks_k
    if T and blocks:
        with torch.cuda.device_of(q_THC):
            _qk_norm_rope_kernel[(T, blocks)](
                q_to_THC,
                k_to_TGC,
                q_THC,
                k_TGC,
                _whole(q_weight_C),
                _whole(k_weight_C),
                cos_TC,
                sin_TC,
                *(x.stride(i) for x in (q_THC, k_TGC) for i in (0, 1)),
                cos_TC.stride(0),
                sin_TC.stride(0),
                eps,
                H=H,
                G=G,
                HALF=C // 2,
                BLOCKS_Q=settings.blocks_q,
                BLOCK_N=settings.block_n,
                BLOCK_C=settings.block_c,
                num_warps=settings.num_warps,
                **OPTIONS,
            )
    return q_to_THC, k_to_TGC


def _backward(
    grad_q_THC: Tensor,
    grad_k_TGC: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos_TC: Tensor,
    sin_TC: Tensor,
    eps: float,
    needs_weights: bool,
) -> Four:
    (T, H, C), G = grad_q_THC.shape, grad_k_TGC.shape[1]
    settings, tokens = Settings.of(H, G, C), TOKENS if needs_weights else 1
    q_to_THC, k_to_TGC = grad_q_THC.new_empty((T, H, C)), grad_k_TGC.new_empty((T, G, C))
    # without a norm nothing is read of these two
    heads = [rows(grad if x is None else x) for x, grad in ((q, grad_q_THC), (k, grad_k_TGC))]
    tensors = [rows(grad_q_THC), rows(grad_k_TGC), *heads]
    angles = rows(cos_TC), rows(sin_TC)
    blocks, programs = settings.blocks_q + settings.blocks_k, triton.cdiv(T, tokens)
    shape = (programs, blocks, C if needs_weights else 0)
    share_PNC = grad_q_THC.new_empty(shape, dtype=torch.float32)
    if programs and blocks:
        with torch.cuda.device_of(grad_q_THC):
            _qk_norm_rope_bwd_kernel[(programs, blocks)](
                q_to_THC,
                k_to_TGC,
                share_PNC if needs_weights else None,
                *tensors,
                _whole(q_weight),
                _whole(k_weight),
                *angles,
                *(x.stride(i) for x in tensors for i in (0, 1)),
                *(x.stride(0) for x in angles),
                T,
                eps,
                H=H,
                G=G,
                HALF=C // 2,
                BLOCKS_Q=settings.blocks_q,
                TOKENS=tokens,
                BLOCK_N=settings.block_n,
                BLOCK_C=settings.block_c,
                num_warps=settings.num_warps,
                **OPTIONS,
            )
    parts = share_PNC[:, : settings.blocks_q], share_PNC[:, settings.blocks_q :]
    weights = [part.sum((0, 1)).to(grad_q_THC.dtype) for part in parts]
    return q_to_THC, k_to_TGC, weights[0], weights[1]


def _whole(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()


qk_norm_rope = by_hand("triton", _forward, _backward)


def builds() -> list[Build]:
    """Heads of 8B models, with the norm of Qwen3 and without, and the widest heads."""
    configurations = []
    shapes = ((32, 8, 128, True), (32, 8, 128, False), (16, 4, 256, True))
    for heads, kv_heads, head_dim, norm in shapes:
        for tokens in (None, 1, TOKENS) if norm else (None, 1):
            configurations.append(_build(heads, kv_heads, head_dim, norm, tokens))
    return configurations


def _build(heads: int, kv_heads: int, head_dim: int, norm: bool, tokens: int | None) -> Build:
    """One in bf16; of the forward, or of a backward with so many tokens of a program."""
    settings = Settings.of(heads, kv_heads, head_dim)
    kernel = _qk_norm_rope_kernel if tokens is None else _qk_norm_rope_bwd_kernel
    sizes = {
        "H": heads,
        "G": kv_heads,
        "HALF": head_dim // 2,
        "BLOCKS_Q": settings.blocks_q,
        "TOKENS": tokens,
        "BLOCK_N": settings.block_n,
        "BLOCK_C": settings.block_c,
    }
    constexprs: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
    if not norm:
        constexprs |= {"q_weight_ptr": None, "k_weight_ptr": None}
    if tokens == 1:
        constexprs["share_ptr"] = None
    kinds = {"T": "i32", "eps": "fp32", "share_ptr": "*fp32"}
    signature = {
        name: "constexpr"
        if name in constexprs
        else kinds.get(name, "i32" if name.startswith("stride") else "*bf16")
        for name in kernel.arg_names
    }
    name = f"qk_norm_rope/{'' if tokens is None else 'backward '}{heads}+{kv_heads} of {head_dim}"
    return Build(
        name=name + ("" if norm else " no norm") + (" trained" if tokens == TOKENS else ""),
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=settings.num_warps,
        aligned=tuple(n for n in kernel.arg_names if n.startswith("stride")),
        options=OPTIONS,
    )
