"""LoRA linears whose rank-r products read a tile once; the base products stay cuBLAS.

Three kernels over a matrix x [T, C], which is x itself (C = K) or a dy (C = N):

`rows`     owns BLOCK_T rows and a span of columns, and walks the columns: x F, [T, R], with F
           [C, R]. So x A' of a whole group, and dy B. With COLUMNS the tile it has read also gives
           its share of dy' (x A'), written once per BLOCK_T rows. Nothing is recomputed.
`columns`  owns BLOCK_C columns and a span of rows, and walks the rows: x' L, [C, R], with L [T, R].
           So dA of a whole group, and dB where the rank is too large for COLUMNS.
`sum`      adds the shares in the order of the spans, and rounds to the dtype of the gradient.

No atomics, and spans depend on shapes alone: the same inputs give the same bits on every GPU.

Bytes per token in bf16, beside the base products reading x or dy and writing y or dx once each;
n linears in a group, N the sum of their outputs. Factors and x A' are below 1 % of this.

    forward      reads and writes
    PEFT, fp32   28 N + 10 n K            x cast per linear; product, scaling, sum, cast
    PEFT, bf16   12 N +  2 n K            x A'; product, scaling, sum (the reference)
    fused         4 N +  2 K              x A' of the group; product written, read by the base GEMM
    triton        4 N +  2 K              no win to be counted

    backward
    PEFT, fp32   28 N + 26 n K - 6 K      dy cast, scaled, read for dy B and dB; x; dx cast, summed
    PEFT, bf16    8 N + 16 n K - 6 K      dy scaled, read for dy B and dB; x; dx summed
    fused         4 N +  2 n K + 4 K      dy read for dy B and dB; x; dx written, read by base GEMMs
    triton      2.5 N +  2 n K + 4 K      dy read once, and shares: 8 R / BLOCK_T N, here R = 16;
                                          those of dy B, 8 R a span, are a few per cent more

So this can win 1.5 N bytes of a token's backward: of what LoRA adds to o of Qwen3-8B 15 %, to gate
and up 28 %; over all its linears and 32,768 tokens 69 GB, 16 ms at 4.3 TB/s of a step of 3.3 s. At
rank 64 shares would cost more than the second reading of dy, so that rank takes two kernels.

Nothing here has been measured on a GPU, and it is therefore not the automatic choice.

S is the sum of the ranks of a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from smbkernels.lora.op import Group, Needs, by_hand, wider
from smbkernels.lora.products import chosen, input_gradient, outputs, parts, rows, stacked
from smbkernels.triton_platform import INTERPRET, Build, missing, on_device_of_first

__all__ = ["builds", "lora_linear", "missing"]

# about two waves of the largest GPU; a constant, so that sums do not depend on the device
_PROGRAMS = 264
_SUM_BLOCK = 256


@dataclass(frozen=True)
class Settings:
    """Launch settings of `rows` or `columns`."""

    block_t: int
    block_c: int
    block_r: int
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, rank: int, itemsize: int, kernel: str) -> "Settings":
        """The one heuristic; `kernel` is rows, both (rows with COLUMNS) or columns."""
        block_r = min(64, max(16, triton.next_power_of_2(rank)))
        if itemsize == 4:
            # fp32 products run on the ordinary units, from registers: small tiles
            return cls(64, 32, min(32, block_r), 4 if block_r == 16 else 8, 2)
        if kernel == "both":
            # the more rows, the fewer shares
            return cls(256, 64, block_r, 8, 3)
        return cls(128, 64, block_r, 4, 3) if kernel == "rows" else cls(64, 128, block_r, 4, 3)

    def blocks(self) -> dict[str, int]:
        """The sizes of a tile, as kernels name them."""
        return {"BLOCK_T": self.block_t, "BLOCK_C": self.block_c, "BLOCK_R": self.block_r}

    def pays(self, rank: int, itemsize: int) -> bool:
        """Whether shares cost less than reading dy again."""
        return rank <= self.block_r and 8 * self.block_r < itemsize * self.block_t


@triton.jit
def _dot(left, right, acc, WIDE: tl.constexpr):
    if WIDE:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(left, right.to(left.dtype), acc)


@triton.jit
def _lora_linear_rows_kernel(
    out_ptr,  # [spans, T, R]
    share_ptr,  # [blocks of T, C, R], fp32
    x_ptr,
    factor_ptr,
    low_ptr,
    T,
    C,
    R,
    span,
    scale,
    stride_os,
    stride_ot,
    stride_xt,
    stride_fc,
    stride_fr,
    stride_lt,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # programs that share rows are neighbours, so that a second block of ranks finds them in cache
    blocks_r = tl.cdiv(R, BLOCK_R)
    pid_t = (tl.program_id(0) // blocks_r).to(tl.int64)
    pid_r = tl.program_id(0) % blocks_r
    pid_s = tl.program_id(1)
    # 64-bit to the first row of the tile, 32-bit within the tile
    first = pid_t * BLOCK_T
    x_ptr += first * stride_xt
    offs_t = tl.arange(0, BLOCK_T)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_t = offs_t < T - first
    mask_r = offs_r < R
    mask_tr = mask_t[:, None] & mask_r[None, :]
    if COLUMNS:
        low_ptr += first * stride_lt
        low = tl.load(low_ptr + offs_t[:, None] * stride_lt + offs_r[None, :], mask_tr, other=0.0)
        share_ptr += pid_t * C * R
    acc = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for c in range(pid_s * span, tl.minimum((pid_s + 1) * span, C), BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        mask_tc = mask_t[:, None] & mask_c[None, :]
        x = tl.load(x_ptr + offs_t[:, None] * stride_xt + offs_c[None, :], mask_tc, other=0.0)
        mask_cr = mask_c[:, None] & mask_r[None, :]
        factor_ptrs = factor_ptr + offs_c[:, None] * stride_fc + offs_r[None, :] * stride_fr
        factor = tl.load(factor_ptrs, mask_cr, other=0.0)
        # a factor is rounded to the dtype of x, whatever its own
        acc = _dot(x, factor.to(x.dtype), acc, WIDE)
        if COLUMNS:
            share = _dot(tl.trans(x), low, tl.zeros([BLOCK_C, BLOCK_R], tl.float32), WIDE)
            tl.store(share_ptr + offs_c[:, None] * R + offs_r[None, :], share * scale, mask_cr)
    out_ptr += pid_s.to(tl.int64) * stride_os + first * stride_ot
    out = (acc * scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_t[:, None] * stride_ot + offs_r[None, :], out, mask_tr)


@triton.jit
def _lora_linear_columns_kernel(
    out_ptr,  # [spans, C, R], or [spans, R, C]
    x_ptr,
    low_ptr,
    T,
    C,
    R,
    span,
    scale,
    stride_oc,
    stride_or,
    stride_xt,
    stride_lt,
    WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    blocks_r = tl.cdiv(R, BLOCK_R)
    pid_c = tl.program_id(0) // blocks_r
    pid_r = tl.program_id(0) % blocks_r
    pid_s = tl.program_id(1).to(tl.int64)
    first = pid_s * span
    offs_t = tl.arange(0, BLOCK_T)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_c = offs_c < C
    mask_r = offs_r < R
    # pointers walk: a span of rows may hold more than 2^31 elements
    x_ptr += first * stride_xt
    low_ptr += first * stride_lt
    step = tl.full([], BLOCK_T, tl.int64)
    acc = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
    for t in range(0, tl.minimum(span, T - first).to(tl.int32), BLOCK_T):
        mask_t = offs_t < T - first - t
        mask_tc = mask_t[:, None] & mask_c[None, :]
        x = tl.load(x_ptr + offs_t[:, None] * stride_xt + offs_c[None, :], mask_tc, other=0.0)
        mask_tr = mask_t[:, None] & mask_r[None, :]
        low = tl.load(low_ptr + offs_t[:, None] * stride_lt + offs_r[None, :], mask_tr, other=0.0)
        acc = _dot(tl.trans(x), low, acc, WIDE)
        x_ptr += step * stride_xt
        low_ptr += step * stride_lt
    out_ptr += pid_s * C * R
    out = (acc * scale).to(out_ptr.dtype.element_ty)
    mask_cr = mask_c[:, None] & mask_r[None, :]
    tl.store(out_ptr + offs_c[:, None] * stride_oc + offs_r[None, :] * stride_or, out, mask_cr)


@triton.jit
def _lora_linear_sum_kernel(out_ptr, share_ptr, size, width, shares, stride_o, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    acc = tl.zeros([BLOCK], tl.float32)
    for _ in range(shares):
        acc += tl.load(share_ptr + offs, mask, other=0.0)
        share_ptr += size
    out_ptrs = out_ptr + offs // width * stride_o + offs % width
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask)


def _spans(length: int, block: int, programs: int) -> tuple[int, int]:
    """How long each part of a loop is, and how many there are, to keep a GPU busy."""
    wanted = max(1, min(triton.cdiv(_PROGRAMS, programs), length // (4 * block)))
    span = triton.cdiv(triton.cdiv(length, wanted), block) * block
    return span, triton.cdiv(length, span)


def _sum(out_MC: Tensor, share: Tensor) -> None:
    size = out_MC.numel()
    # share's first axis counts the shares; the rest is laid out like a contiguous `out`
    _lora_linear_sum_kernel[(triton.cdiv(size, _SUM_BLOCK),)](
        out_MC, share, size, out_MC.shape[1], share.shape[0], out_MC.stride(0), BLOCK=_SUM_BLOCK
    )


def _launch_rows(
    out_TR: Tensor,
    x_TC: Tensor,
    factor_CR: Tensor,
    scale: float,
    low_TR: Tensor | None = None,
    db_CR: Tensor | None = None,
) -> None:
    """out = scale x F; with `low_TR`, db = scale x' low of the same reading."""
    (T, C), R = x_TC.shape, factor_CR.shape[1]
    if T == 0:
        if db_CR is not None:
            db_CR.zero_()
        return
    s = Settings.of(R, x_TC.itemsize, "rows" if low_TR is None else "both")
    blocks_t, blocks_r = triton.cdiv(T, s.block_t), triton.cdiv(R, s.block_r)
    span, spans = _spans(C, s.block_c, blocks_t * blocks_r)
    target = out_TR if spans == 1 else x_TC.new_empty((spans, T, R), dtype=torch.float32)
    share = None if low_TR is None else x_TC.new_empty((blocks_t, C, R), dtype=torch.float32)
    _lora_linear_rows_kernel[(blocks_t * blocks_r, spans)](
        target,
        share,
        x_TC,
        factor_CR,
        low_TR,
        T=T,
        C=C,
        R=R,
        span=span,
        scale=scale,
        stride_os=T * R,
        stride_ot=target.stride(-2),
        stride_xt=x_TC.stride(0),
        stride_fc=factor_CR.stride(0),
        stride_fr=factor_CR.stride(1),
        stride_lt=0 if low_TR is None else low_TR.stride(0),
        COLUMNS=low_TR is not None,
        WIDE=INTERPRET or x_TC.dtype == torch.float32,
        **s.blocks(),
        num_warps=s.num_warps,
        num_stages=s.num_stages,
    )
    if spans > 1:
        _sum(out_TR, target)
    if share is not None and db_CR is not None:
        _sum(db_CR, share)


def _launch_columns(
    out: Tensor, x_TC: Tensor, low_TR: Tensor, scale: float, *, transposed: bool
) -> None:
    """out = scale x' low, contiguous [C, R]; or its transpose, [R, C]."""
    (T, C), R = x_TC.shape, low_TR.shape[1]
    if T == 0:
        out.zero_()
        return
    s = Settings.of(R, x_TC.itemsize, "columns")
    programs = triton.cdiv(C, s.block_c) * triton.cdiv(R, s.block_r)
    span, spans = _spans(T, s.block_t, programs)
    target = out if spans == 1 else out.new_empty((spans, *out.shape), dtype=torch.float32)
    _lora_linear_columns_kernel[(programs, spans)](
        target,
        x_TC,
        low_TR,
        T=T,
        C=C,
        R=R,
        span=span,
        scale=scale,
        stride_oc=1 if transposed else R,
        stride_or=C if transposed else 1,
        stride_xt=x_TC.stride(0),
        stride_lt=low_TR.stride(0),
        WIDE=INTERPRET or x_TC.dtype == torch.float32,
        **s.blocks(),
        num_warps=s.num_warps,
        num_stages=s.num_stages,
    )
    if spans > 1:
        _sum(out, target)


def _forward(x_TK: Tensor, group: Group) -> list[Tensor]:
    lead = x_TK.shape[:-1]
    x_TK, a_SK = rows(x_TK), stacked(group.a, x_TK.dtype)
    low_TS = x_TK.new_empty((x_TK.shape[0], a_SK.shape[0]))
    _launch_rows(low_TS, x_TK, a_SK.t(), 1.0)
    ys = outputs(x_TK, low_TS, group)
    return [*(y.view(*lead, y.shape[1]) for y in ys), low_TS]


def _backward(
    dy: Sequence[Tensor], x_TK: Tensor | None, low_TS: Tensor | None, group: Group, needs: Needs
) -> list[Tensor]:
    weight, b, a, scale, _ = group
    needs_x, needs_b, needs_a = needs
    lead, K = dy[0].shape[:-1], weight[0].shape[1]
    dy = [rows(v) for v in dy]
    dx_TK, da_SK = dy[0].new_empty(0), dy[0].new_empty(0, dtype=wider(a))
    db = [v.new_empty(v.shape if n else 0) for v, n in zip(b, needs_b, strict=True)]
    low = [] if low_TS is None else parts(low_TS, a)
    wanted = [i for i in range(len(a)) if needs_x or needs_a[i]]
    a_wanted = [a[i] for i in wanted]
    dlow_TS = dy[0].new_empty((dy[0].shape[0], sum(v.shape[0] for v in a_wanted)))
    dlow = dict(zip(wanted, parts(dlow_TS, a_wanted), strict=True)) if wanted else {}
    for i, dy_TN in enumerate(dy):
        both = needs_b[i] and i in dlow and _pays(dy_TN, b[i])
        if i in dlow:
            shares = (low[i], db[i]) if both else ()
            _launch_rows(dlow[i], dy_TN, b[i], scale[i], *shares)
        if needs_b[i] and not both:
            _launch_columns(db[i], dy_TN, low[i], scale[i], transposed=False)
    if needs_x:
        dx_TK = input_gradient(dy, dlow_TS, weight, a).view(*lead, K)
    if x_TK is not None and any(needs_a):
        columns_TS = chosen(dlow_TS, a_wanted, [needs_a[i] for i in wanted])
        da_SK = dy[0].new_empty((columns_TS.shape[1], K), dtype=wider(a))
        _launch_columns(da_SK, rows(x_TK), columns_TS, 1.0, transposed=True)
    return [dx_TK, *db, da_SK]


def _pays(dy_TN: Tensor, b_NR: Tensor) -> bool:
    rank, itemsize = b_NR.shape[1], dy_TN.itemsize
    return Settings.of(rank, itemsize, "both").pays(rank, itemsize)


lora_linear = by_hand("triton", on_device_of_first(_forward), on_device_of_first(_backward))


def builds() -> list[Build]:
    """What Qwen3-8B launches: ranks of one linear, of gate and up, of Q K V; and rank 64."""
    builds_by_name = {}
    for dtype, itemsize in (("bf16", 2), ("fp32", 4)):
        for rank in (16, 32, 64):
            for kind in ("rows", "both", "columns"):
                s = Settings.of(rank, itemsize, kind)
                if kind != "both" or s.pays(rank, itemsize):
                    build = _build(kind, dtype, s)
                    builds_by_name[build.name] = build
    pointers = {"out_ptr": "*bf16", "share_ptr": "*fp32"}
    block = {"BLOCK": _SUM_BLOCK}
    total = _described(_lora_linear_sum_kernel, "sum_bf16", pointers, block, wide_loads=False)
    return [*builds_by_name.values(), total]


def _build(kind: str, dtype: str, s: Settings) -> Build:
    x, wide = f"*{dtype}", dtype == "fp32"
    # what a launch writes first: a share of a span, fp32
    pointers = {"out_ptr": "*fp32", "x_ptr": x, "low_ptr": x}
    known: dict[str, Any]
    if kind == "columns":
        kernel, known = _lora_linear_columns_kernel, {"stride_oc": 1}
    elif kind == "both":
        # B in fp32, [N, R]
        kernel, known = _lora_linear_rows_kernel, {"stride_fr": 1, "COLUMNS": True}
        pointers |= {"share_ptr": "*fp32", "factor_ptr": "*fp32"}
    else:
        # A stacked and cast, [S, K]
        kernel, known = _lora_linear_rows_kernel, {"stride_fc": 1, "COLUMNS": False}
        known |= {"share_ptr": None, "low_ptr": None}
        pointers |= {"factor_ptr": x}
    options = {"num_warps": s.num_warps, "num_stages": s.num_stages, "tensor_cores": not wide}
    name = f"{kind}_{dtype}_r{s.block_r}"
    return _described(kernel, name, pointers, {**known, "WIDE": wide, **s.blocks()}, **options)


def _described(kernel, name: str, pointers: dict, constexprs: dict, **options) -> Build:
    given = {**pointers, "scale": "fp32", **dict.fromkeys(constexprs, "constexpr")}
    signature = {n: given.get(n, "i32") for n in kernel.arg_names}
    aligned = tuple(n for n, kind in signature.items() if kind == "i32")
    return Build(f"lora_linear/{name}", kernel, signature, constexprs, aligned=aligned, **options)
