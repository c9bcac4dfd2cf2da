"""The plan: a program owns a stretch of a row, and moves it once.

In bf16 that is 6 bytes an element forward, and 10 backward, which finds silu(gate) again.

T tokens, F width of the MLP.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from smbkernels.autograd import rows
from smbkernels.gated.op import by_hand
from smbkernels.triton_platform import Build, missing

__all__ = ["builds", "missing", "swiglu"]

# set explicitly, because its default differs between versions of Triton
OPTIONS = {"enable_fp_fusion": True}
BLOCK, WARPS = 2048, 4  # 16 elements per thread, two 16-byte loads of bf16


@triton.jit
def _row_start(row, stride):
    # a row of 2^31 elements and beyond is reached in 64 bits
    return row.to(tl.int64) * stride


@triton.jit
def _swiglu_kernel(out_ptr, gate_ptr, up_ptr, F, stride_g, stride_u, BLOCK: tl.constexpr):
    t, offs = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < F
    gate = tl.load(gate_ptr + _row_start(t, stride_g) + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + _row_start(t, stride_u) + offs, mask=mask, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    activated = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32)
    tl.store(out_ptr + _row_start(t, F) + offs, (activated * up).to(dtype), mask=mask)


@triton.jit
def _swiglu_bwd_kernel(
    to_gate_ptr,
    to_up_ptr,
    grad_ptr,
    gate_ptr,
    up_ptr,
    F,
    stride_o,
    stride_g,
    stride_u,
    BLOCK: tl.constexpr,
):
    t, offs = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < F
    gate = tl.load(gate_ptr + _row_start(t, stride_g) + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + _row_start(t, stride_u) + offs, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(grad_ptr + _row_start(t, stride_o) + offs, mask=mask, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    dgate = dy * up * share * (1.0 + gate * (1.0 - share))
    out = _row_start(t, F) + offs
    tl.store(to_gate_ptr + out, dgate.to(to_gate_ptr.dtype.element_ty), mask=mask)
    tl.store(to_up_ptr + out, (dy * gate * share).to(to_up_ptr.dtype.element_ty), mask=mask)


def _forward(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    T, F = gate_TF.shape
    out_TF = gate_TF.new_empty((T, F))
    gate_TF, up_TF = rows(gate_TF), rows(up_TF)
    if T:
        with torch.cuda.device_of(out_TF):
            _swiglu_kernel[(T, triton.cdiv(F, BLOCK))](
                out_TF,
                gate_TF,
                up_TF,
                F,
                gate_TF.stride(0),
                up_TF.stride(0),
                BLOCK=BLOCK,
                num_warps=WARPS,
                **OPTIONS,
            )
    return out_TF


def _backward(grad_TF: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    T, F = gate.shape
    to_gate_TF, to_up_TF = gate.new_empty((T, F)), gate.new_empty((T, F))
    inputs = [rows(x) for x in (grad_TF, gate, up)]
    if T:
        with torch.cuda.device_of(gate):
            _swiglu_bwd_kernel[(T, triton.cdiv(F, BLOCK))](
                to_gate_TF,
                to_up_TF,
                *inputs,
                F,
                *(x.stride(0) for x in inputs),
                BLOCK=BLOCK,
                num_warps=WARPS,
                **OPTIONS,
            )
    return to_gate_TF, to_up_TF


swiglu = by_hand("triton", _forward, _backward)


def builds() -> list[Build]:
    """Both dtypes, at any width that divides by 16."""
    configurations = []
    for dtype in ("bf16", "fp32"):
        for kernel, name in ((_swiglu_kernel, ""), (_swiglu_bwd_kernel, "backward ")):
            kinds = {"BLOCK": "constexpr", "F": "i32"}
            strides = [n for n in kernel.arg_names if n.startswith("stride")]
            kinds |= dict.fromkeys(strides, "i32")
            configurations.append(
                Build(
                    name=f"swiglu/{name}{dtype}",
                    kernel=kernel,
                    signature={n: kinds.get(n, f"*{dtype}") for n in kernel.arg_names},
                    constexprs={"BLOCK": BLOCK},
                    num_warps=WARPS,
                    aligned=("F", *strides),
                    options=OPTIONS,
                )
            )
    return configurations
