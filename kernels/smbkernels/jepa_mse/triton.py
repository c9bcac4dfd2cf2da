"""The plan: a program owns one masked position and holds its whole row in registers.

It reads the row of the target by index, so that no gathered copy exists, and applies the target's
final RMSNorm and the layer norm there. All three operands are read once and together, before the
first reduction; mean and variance take two passes over registers. In bf16 2 bytes per element are
read of the prediction, 2 of the target and 2 are written of the gradient: 6. The norm weight comes
from L2.

Each program writes one partial loss; torch adds them, in an order that depends on M alone. A row
that the target does not have is not read: its loss and gradient are NaN.

M masked positions, D width, T rows of the target.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from smbkernels.jepa_mse.op import LAYER_NORM_EPS, one_pass
from smbkernels.triton_platform import Build, missing

__all__ = ["builds", "masked_jepa_mse", "missing"]


# set explicitly, because its default differs between versions of Triton
OPTIONS = {"enable_fp_fusion": True}


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


# the rows of the target differ from batch to batch, and need no kernel of their own
@triton.jit(do_not_specialize=["T"])
def _masked_jepa_mse_kernel(
    loss_ptr,
    grad_ptr,
    prediction_ptr,
    target_ptr,
    row_ptr,
    norm_weight_ptr,
    T,
    D,
    stride_pm,
    stride_tt,
    inverse_width,
    norm_eps,
    factor,
    NORMALIZE: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    m = tl.program_id(0)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    row = tl.load(row_ptr + m)
    inside = (row >= 0) & (row < T)
    mask_target = offs_d < tl.where(inside, D, 0)

    prediction_start = prediction_ptr + _row_start(m, stride_pm)
    target_start = target_ptr + _row_start(row, stride_tt)
    prediction = tl.load(prediction_start + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    target = tl.load(target_start + offs_d, mask=mask_target, other=0.0).to(tl.float32)

    if norm_weight_ptr is not None:
        weight = tl.load(norm_weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        mean_square = tl.sum(target * target) * inverse_width
        target = target * tl.rsqrt(mean_square + norm_eps) * weight
    if NORMALIZE:
        centred = tl.where(mask_d, target - tl.sum(target) * inverse_width, 0.0)
        variance = tl.sum(centred * centred) * inverse_width
        target = centred * tl.rsqrt(variance + EPS)

    error = tl.where(inside, prediction - target, float("nan"))
    # beyond the width both operands are zero
    tl.store(loss_ptr + m, factor * tl.sum(error * error))
    if grad_ptr is not None:
        grad = (2.0 * factor) * error
        grad_start = grad_ptr + _row_start(m, D)
        tl.store(grad_start + offs_d, grad.to(grad_ptr.dtype.element_ty), mask=mask_d)


def _launch(
    prediction_MD: Tensor,
    target_TD: Tensor,
    row_M: Tensor,
    norm_weight_D: Tensor | None,
    normalize: bool,
    norm_eps: float,
    scale: float,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    M, D = prediction_MD.shape
    # there may be gaps between rows, as in a slice of a wider tensor; a transposed tensor is copied
    prediction_MD = prediction_MD if prediction_MD.stride(1) == 1 else prediction_MD.contiguous()
    target_TD = target_TD if target_TD.stride(1) == 1 else target_TD.contiguous()
    loss_M = prediction_MD.new_empty(M, dtype=torch.float32)
    grad_MD = prediction_MD.new_empty((M, D) if needs_grad else (0,))
    if M:
        settings = Settings.of(D)
        with torch.cuda.device_of(prediction_MD):
            _masked_jepa_mse_kernel[(M,)](
                loss_ptr=loss_M,
                grad_ptr=grad_MD if needs_grad else None,
                prediction_ptr=prediction_MD,
                target_ptr=target_TD,
                row_ptr=row_M.contiguous(),
                norm_weight_ptr=None if norm_weight_D is None else norm_weight_D.contiguous(),
                T=target_TD.shape[0],
                D=D,
                stride_pm=prediction_MD.stride(0),
                stride_tt=target_TD.stride(0),
                inverse_width=1 / D,
                norm_eps=norm_eps,
                factor=scale / D,
                NORMALIZE=normalize,
                EPS=LAYER_NORM_EPS,
                BLOCK_D=settings.block_d,
                num_warps=settings.num_warps,
                **OPTIONS,
            )
    return loss_M.sum(), grad_MD


masked_jepa_mse = one_pass("triton", _launch)


def builds() -> list[Build]:
    """The width of 8B models, and the widest row."""
    configurations = []
    for width in (4096, 16384):
        for prediction, target in (("bf16", "bf16"), ("fp32", "bf16"), ("fp32", "fp32")):
            settings = Settings.of(width)
            configurations.append(
                Build(
                    name=f"masked_jepa_mse/{width} {prediction} {target}",
                    kernel=_masked_jepa_mse_kernel,
                    signature={
                        "loss_ptr": "*fp32",
                        "grad_ptr": f"*{prediction}",
                        "prediction_ptr": f"*{prediction}",
                        "target_ptr": f"*{target}",
                        "row_ptr": "*i64",
                        "norm_weight_ptr": f"*{target}",
                        "T": "i32",
                        "D": "i32",
                        "stride_pm": "i32",
                        "stride_tt": "i32",
                        "inverse_width": "fp32",
                        "norm_eps": "fp32",
                        "factor": "fp32",
                        "NORMALIZE": "constexpr",
                        "EPS": "constexpr",
                        "BLOCK_D": "constexpr",
                    },
                    constexprs={
                        "NORMALIZE": True,
                        "EPS": LAYER_NORM_EPS,
                        "BLOCK_D": settings.block_d,
                    },
                    num_warps=settings.num_warps,
                    aligned=("D", "stride_pm", "stride_tt"),
                    options=OPTIONS,
                )
            )
    return configurations
