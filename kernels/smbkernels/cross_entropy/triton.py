"""The plan: a program owns one row of a chunk of logits, and turns it into its gradient in place.

It reads the row twice: for the log-sum-exp, which each lane sums on its own with its own maximum,
and for the gradient, which it writes where the logit was. In bf16 that is 6 bytes a logit, with no
copy in fp32. Products, chunks and trained rows are those of `chunked`.

N labelled tokens, C rows of a chunk, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from smbkernels.cross_entropy.chunked import in_chunks
from smbkernels.cross_entropy.op import one_pass
from smbkernels.triton_platform import Build, missing

__all__ = ["builds", "linear_cross_entropy", "missing"]

# set explicitly, because its default differs between versions of Triton
OPTIONS = {"enable_fp_fusion": True}
BLOCK_V = 4096  # logits at a time: 16 of each thread, two 16-byte loads of bf16
NUM_WARPS = 8
LOWEST = tl.constexpr(-3.0e38)  # below every logit, and finite: a difference to it is no NaN
NEAR = tl.constexpr(-0.25)  # from here on exp(x) - 1 loses digits, and ten terms do not


@triton.jit
def _minus_one(x):
    """exp(x) - 1 for x <= 0."""
    series = 1.0 + x / 10
    for i in tl.static_range(9, 1, -1):
        series = 1.0 + series * x / i
    return tl.where(x > NEAR, x * series, tl.exp(x) - 1.0)


@triton.jit
def _softmax_gradient_kernel(
    logits_ptr,
    label_ptr,
    log_p_ptr,
    V,
    stride_c,
    NEEDS_GRAD: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    # a row of 2^31 elements and beyond is reached in 64 bits
    row_ptr = logits_ptr + row * stride_c
    label = tl.load(label_ptr + row)
    inside = (label >= 0) & (label < V)
    # before the first sum over all lanes, which every lane waits for: no gradient is written yet
    own = tl.load(row_ptr + label, mask=inside, other=float("nan")).to(tl.float32)

    offs = tl.arange(0, BLOCK_V)
    largest = tl.full((BLOCK_V,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, V, BLOCK_V):
        mask = start + offs < V
        z = tl.load(row_ptr + start + offs, mask=mask, other=float("-inf")).to(tl.float32)
        # of exp(largest - new) and exp(z - new) one is 1
        smaller = tl.exp(-tl.abs(z - largest))
        total = tl.where(z > largest, total * smaller + 1.0, total + smaller)
        largest = tl.maximum(largest, z)
    most = tl.max(largest, 0)
    log_sum = most + tl.log(tl.sum(total * tl.exp(largest - most), 0))
    log_p = own - log_sum
    tl.store(log_p_ptr + row, log_p)
    if NEEDS_GRAD:
        own_gradient = _minus_one(log_p)
        for start in range(0, V, BLOCK_V):
            mask = start + offs < V
            z = tl.load(row_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
            dz = tl.where(start + offs == label, own_gradient, tl.exp(z - log_sum))
            tl.store(row_ptr + start + offs, dz.to(logits_ptr.dtype.element_ty), mask=mask)


def _gradient_(
    logits_CV: Tensor, label_C1: Tensor, log_p_C1: Tensor, _buffer_CV: Tensor, needs_grad: bool
) -> None:
    C, V = logits_CV.shape
    if not C:
        return
    block = min(BLOCK_V, triton.next_power_of_2(V))
    with torch.cuda.device_of(logits_CV):
        _softmax_gradient_kernel[(C,)](
            logits_ptr=logits_CV,
            label_ptr=label_C1,
            log_p_ptr=log_p_C1,
            V=V,
            stride_c=logits_CV.stride(0),
            NEEDS_GRAD=needs_grad,
            BLOCK_V=block,
            num_warps=max(1, NUM_WARPS * block // 4096),
            **OPTIONS,
        )


# a logit is widened in registers
_launch = in_chunks(_gradient_, widens=False)
linear_cross_entropy = one_pass("triton", _launch)


def builds() -> list[Build]:
    """The vocabulary of 8B models, and one that no vector divides."""
    return [
        Build(
            name=f"linear_cross_entropy/{name} {dtype}",
            kernel=_softmax_gradient_kernel,
            signature={
                "logits_ptr": f"*{dtype}",
                "label_ptr": "*i64",
                "log_p_ptr": "*fp32",
                "V": "i32",
                "stride_c": "i32",
                "NEEDS_GRAD": "constexpr",
                "BLOCK_V": "constexpr",
            },
            constexprs={"NEEDS_GRAD": True, "BLOCK_V": BLOCK_V},
            num_warps=NUM_WARPS,
            aligned=aligned,
            options=OPTIONS,
            wide_loads=bool(aligned),
        )
        for name, aligned in (("151936", ("V", "stride_c")), ("odd", ()))
        for dtype in ("bf16", "fp32")
    ]
