"""Kernels whose faults the budget check has to see; compiled by `bench.cubin`, never run."""

import triton
import triton.language as tl
from smbkernels.triton_platform import Build


@triton.jit
def _copy_kernel(out_ptr, x_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=offs < n), mask=offs < n)


@triton.jit
def _product_kernel(out_ptr, x_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tile = offs[:, None] * BLOCK + offs[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for i in range(n):
        x = tl.load(x_ptr + i * BLOCK * BLOCK + tile)
        acc = tl.dot(x, x, acc)
    tl.store(out_ptr + tile, acc.to(tl.bfloat16))


@triton.jit
def _centre_kernel(out_ptr, x_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    tl.store(out_ptr + offs, x - tl.sum(x), mask=offs < n)


def builds() -> list[Build]:
    copy = {"out_ptr": "*fp32", "x_ptr": "*fp32", "n": "i32", "BLOCK": "constexpr"}
    product = {"out_ptr": "*bf16", "x_ptr": "*bf16", "n": "i32", "BLOCK": "constexpr"}
    return [
        Build("good", _copy_kernel, copy, {"BLOCK": 1024}, aligned=("n",)),
        # the mask ends anywhere, so that no load is wider than an element
        Build("narrow", _copy_kernel, copy, {"BLOCK": 1024}),
        Build("matrix", _product_kernel, product, {"BLOCK": 64}, tensor_cores=True),
        # 256 values of each of 32 threads have to wait for the sum
        Build("spills", _centre_kernel, copy, {"BLOCK": 8192}, num_warps=1, aligned=("n",)),
        Build("misnamed", _copy_kernel, {**product, "y_ptr": "*fp32"}, {"BLOCK": 1024}),
    ]
