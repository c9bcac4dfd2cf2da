"""The plan: a program owns a row and holds it in registers, forward and backward.

Forward reads x and the residual and writes the sum and its norm: 8 bytes an element in bf16, where
an addition and a norm after it would move 10. Backward reads what comes from the sum and from the
norm and the sum itself, and writes one gradient: 8 bytes, where a norm's own backward and an
addition would move 12. The weight comes from L2, and a frozen one costs nothing else.

The gradient of a trained weight is a sum over rows: a program then owns ROWS of them, writes its
share in fp32, and torch adds the shares. ROWS is a constant, so that the order of that sum depends
on T alone; there are no atomics.

T tokens, D width.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from smbkernels.autograd import rows
from smbkernels.norm.op import by_hand
from smbkernels.triton_platform import Build, missing

__all__ = ["add_rms_norm", "builds", "missing"]

# set explicitly, because its default differs between versions of Triton
OPTIONS = {"enable_fp_fusion": True}
ROWS = 16  # of a program that has a share of a weight's gradient


@dataclass(frozen=True)
class Settings:
    """Of a launch: the width held in registers, and the warps that share it."""

    block_d: int
    num_warps: int

    @classmethod
    def of(cls, width: int) -> "Settings":
        """16 elements per thread, two 16-byte loads of bf16; 32 in the widest rows."""
        block_d = triton.next_power_of_2(width)
        return cls(block_d, num_warps=min(max(block_d // 512, 1), 16))


@triton.jit
def _row_start(row, stride):
    # a row of 2^31 elements and beyond is reached in 64 bits
    return row.to(tl.int64) * stride


@triton.jit
def _add_rms_norm_kernel(
    sum_ptr,
    normed_ptr,
    rstd_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    D,
    stride_x,
    stride_r,
    inverse_width,
    eps,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(0)
    dtype = normed_ptr.dtype.element_ty
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    out = _row_start(t, D) + offs_d

    x = tl.load(x_ptr + _row_start(t, stride_x) + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        start = residual_ptr + _row_start(t, stride_r)
        x += tl.load(start + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        tl.store(sum_ptr + out, x.to(dtype), mask=mask_d)
        # what is normed is what was stored
        x = x.to(dtype).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x) * inverse_width + eps)
    tl.store(rstd_ptr + t, rstd)
    normed = (x * rstd).to(dtype).to(tl.float32) * weight
    tl.store(normed_ptr + out, normed.to(dtype), mask=mask_d)


@triton.jit(do_not_specialize=["T"])
def _add_rms_norm_bwd_kernel(
    grad_ptr,
    share_ptr,
    grad_sum_ptr,
    grad_normed_ptr,
    sum_ptr,
    rstd_ptr,
    weight_ptr,
    T,
    D,
    stride_gs,
    stride_gn,
    stride_s,
    inverse_width,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    share = tl.zeros((BLOCK_D,), tl.float32)
    for i in range(ROWS):
        t = program * ROWS + i
        mask = offs_d < tl.where(t < T, D, 0)
        dy_start = grad_normed_ptr + _row_start(t, stride_gn)
        dy = tl.load(dy_start + offs_d, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(sum_ptr + _row_start(t, stride_s) + offs_d, mask=mask, other=0.0)
        rstd = tl.load(rstd_ptr + t, mask=t < T, other=0.0)
        normed = x.to(tl.float32) * rstd
        if share_ptr is not None:
            share += dy * normed
        dy *= weight
        dx = rstd * (dy - normed * (tl.sum(dy * normed) * inverse_width))
        if grad_sum_ptr is not None:
            other_start = grad_sum_ptr + _row_start(t, stride_gs)
            dx += tl.load(other_start + offs_d, mask=mask, other=0.0).to(tl.float32)
        out = grad_ptr + _row_start(t, D) + offs_d
        tl.store(out, dx.to(grad_ptr.dtype.element_ty), mask=mask)
    if share_ptr is not None:
        tl.store(share_ptr + _row_start(program, D) + offs_d, share, mask=mask_d)


def _forward(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    (T, D), settings = x_TD.shape, Settings.of(x_TD.shape[1])
    # there may be gaps between rows, as in a slice of a wider tensor; a transposed tensor is copied
    from_TD, residual_TD = rows(x_TD), None if residual_TD is None else rows(residual_TD)
    sum_TD = x_TD if residual_TD is None else x_TD.new_empty((T, D))
    normed_TD, rstd_T = x_TD.new_empty((T, D)), x_TD.new_empty(T, dtype=torch.float32)
    if T:
        with torch.cuda.device_of(x_TD):
            _add_rms_norm_kernel[(T,)](
                sum_ptr=None if residual_TD is None else sum_TD,
                normed_ptr=normed_TD,
                rstd_ptr=rstd_T,
                x_ptr=from_TD,
                residual_ptr=residual_TD,
                weight_ptr=weight_D.contiguous(),
                D=D,
                stride_x=from_TD.stride(0),
                stride_r=0 if residual_TD is None else residual_TD.stride(0),
                inverse_width=1 / D,
                eps=eps,
                BLOCK_D=settings.block_d,
                num_warps=settings.num_warps,
                **OPTIONS,
            )
    return sum_TD, normed_TD, rstd_T


def _backward(
    grad_sum_TD: Tensor | None,
    grad_normed_TD: Tensor,
    sum_TD: Tensor,
    rstd_T: Tensor,
    weight: Tensor,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    (T, D), settings = sum_TD.shape, Settings.of(sum_TD.shape[1])
    grad_sum_TD = None if grad_sum_TD is None else rows(grad_sum_TD)
    grad_normed_TD, sum_TD = rows(grad_normed_TD), rows(sum_TD)
    grad_TD, num_rows = sum_TD.new_empty((T, D)), ROWS if needs_weight else 1
    programs = triton.cdiv(T, num_rows)
    share_PD = sum_TD.new_empty((programs, D) if needs_weight else (0,), dtype=torch.float32)
    if T:
        with torch.cuda.device_of(sum_TD):
            _add_rms_norm_bwd_kernel[(programs,)](
                grad_ptr=grad_TD,
                share_ptr=share_PD if needs_weight else None,
                grad_sum_ptr=grad_sum_TD,
                grad_normed_ptr=grad_normed_TD,
                sum_ptr=sum_TD,
                rstd_ptr=rstd_T,
                weight_ptr=weight.contiguous(),
                T=T,
                D=D,
                stride_gs=0 if grad_sum_TD is None else grad_sum_TD.stride(0),
                stride_gn=grad_normed_TD.stride(0),
                stride_s=sum_TD.stride(0),
                inverse_width=1 / D,
                ROWS=num_rows,
                BLOCK_D=settings.block_d,
                num_warps=settings.num_warps,
                **OPTIONS,
            )
    return grad_TD, share_PD.sum(0).to(weight.dtype) if needs_weight else weight.new_empty(0)


add_rms_norm = by_hand("triton", _forward, _backward)


def builds() -> list[Build]:
    """The width of 8B models and the widest of other models, with and without a trained weight."""
    configurations = []
    for width, dtype in ((4096, "bf16"), (8192, "bf16"), (4096, "fp32")):
        settings = Settings.of(width)
        element, strides = f"*{dtype}", dict.fromkeys(("D", "stride_x", "stride_r"), "i32")
        configurations.append(
            Build(
                name=f"add_rms_norm/{width} {dtype}",
                kernel=_add_rms_norm_kernel,
                signature={
                    "sum_ptr": element,
                    "normed_ptr": element,
                    "rstd_ptr": "*fp32",
                    "x_ptr": element,
                    "residual_ptr": element,
                    "weight_ptr": element,
                    **strides,
                    "inverse_width": "fp32",
                    "eps": "fp32",
                    "BLOCK_D": "constexpr",
                },
                constexprs={"BLOCK_D": settings.block_d},
                aligned=tuple(strides),
                num_warps=settings.num_warps,
                options=OPTIONS,
            )
        )
        strides = dict.fromkeys(("D", "stride_gs", "stride_gn", "stride_s"), "i32")
        for num_rows in (1, ROWS):
            configurations.append(
                Build(
                    name=f"add_rms_norm/backward {width} {dtype}"
                    + (" trained" if num_rows > 1 else ""),
                    kernel=_add_rms_norm_bwd_kernel,
                    signature={
                        "grad_ptr": element,
                        "share_ptr": "*fp32" if num_rows > 1 else "constexpr",
                        "grad_sum_ptr": element,
                        "grad_normed_ptr": element,
                        "sum_ptr": element,
                        "rstd_ptr": "*fp32",
                        "weight_ptr": element,
                        "T": "i32",
                        **strides,
                        "inverse_width": "fp32",
                        "ROWS": "constexpr",
                        "BLOCK_D": "constexpr",
                    },
                    constexprs={"ROWS": num_rows, "BLOCK_D": settings.block_d}
                    | ({} if num_rows > 1 else {"share_ptr": None}),
                    aligned=tuple(strides),
                    num_warps=settings.num_warps,
                    options=OPTIONS,
                )
            )
    return configurations
