"""Gradients of fp32 factors beside a bf16 stream: the sum over tokens is not rounded to bf16.

Only CUDA writes fp32 from bf16 operands; on a CPU a product that does so stands in for it.
"""

import pytest
import torch
from smbkernels import lora_linear
from smbkernels.lora import products
from torch import Tensor

from tests.ops.test_lora_linear import BF16, FP32, Group
from tests.ops.tolerance import rounding

pytestmark = pytest.mark.numeric

T, K, N, R = 300, 96, [80, 48], [8, 4]


@pytest.fixture
def shapes(device, monkeypatch) -> list[tuple[int, int]]:
    """Shapes of the products that were written in fp32; on a GPU they are torch's own."""
    seen = []
    real = torch.mm

    def mm(left: Tensor, right: Tensor, *, out_dtype: torch.dtype | None = None, **more) -> Tensor:
        if out_dtype is None:
            return real(left, right, **more)
        assert left.dtype == right.dtype == BF16 and out_dtype == FP32 and not more
        seen.append((left.shape[0], right.shape[1]))
        if left.is_cuda:
            return real(left, right, out_dtype=out_dtype)
        return real(left.float(), right.float())

    monkeypatch.setattr(torch, "mm", mm)
    if device == "cpu":
        monkeypatch.setattr(
            products, "_leaves_in_fp32", lambda x, dtype: (x.dtype, dtype) == (BF16, FP32)
        )
    return seen


def group(device: str, factor: torch.dtype = FP32) -> Group:
    return Group.of((T,), K, N, R, dtype=BF16, factor=factor, device=device)


def exact_db(g: Group, i: int) -> Tensor:
    """s dy' (x A'), where x A' is rounded to bf16 as it is stored, and nothing else."""
    low_TR = (g.x @ torch.cat(g.a).to(BF16).t()).split(R, 1)[i]
    return g.scale[i] * (g.dy[i].double().t() @ low_TR.double())


def test_sums_over_tokens_leave_in_fp32(device, shapes):
    """What a sum of T terms in fp32 rounds is a hundredth of a rounding to bf16."""
    g = group(device)
    found = g.run(lora_linear.on("fused"))
    assert sorted(shapes) == sorted([(8, 80), (4, 48), (12, K)])
    for i in range(2):
        assert found[f"db{i}"].dtype == found[f"da{i}"].dtype == FP32
        exact = exact_db(g, i)
        error = (found[f"db{i}"].double() - exact).norm() / exact.norm()
        assert error < rounding(T) < 2**-9 / 100
    dlow_TS = torch.cat([(g.scale[i] * (g.dy[i] @ g.b[i].to(BF16))) for i in range(2)], 1)
    exact = dlow_TS.double().t() @ g.x.double()
    found_da = torch.cat([found["da0"], found["da1"]]).double()
    # dy B is rounded to bf16 before and after its scale here, once there: one part of 2^9 a term
    assert (found_da - exact).norm() / exact.norm() < 2**-8


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_a_sum_is_that_of_fp32(alpha, device, shapes):
    left, right = (torch.randn(n, T, device=device).to(BF16) for n in (R[0], K))
    found = products.summed(left, right.t(), alpha, FP32)
    exact = alpha * (left.double() @ right.double().t())
    assert found.dtype == FP32 and len(shapes) == 1
    size = float(exact.square().mean().sqrt())
    assert float((found.double() - exact).abs().max()) < rounding(T) * size
    narrow = products.summed(left, right.t(), alpha, BF16)
    assert narrow.dtype == BF16 and len(shapes) == 1


def test_on_a_cpu_and_for_bf16_factors_it_is_the_product_it_was(monkeypatch):
    """No product in fp32 where torch has none, and none where the gradient is bf16."""
    monkeypatch.setattr(torch, "mm", None)  # nothing but addmm_
    for factor in (FP32, BF16):
        g = group("cpu", factor)
        found = g.run(lora_linear.on("fused"))
        low_TR = (g.x @ torch.cat(g.a).to(BF16).t()).split(R, 1)[0]
        expected = (low_TR.t() @ g.dy[0]).float() * g.scale[0]
        assert found["db0"].dtype == factor
        gap = (found["db0"].float() - expected.t()).norm() / expected.norm()
        assert gap < 2**-7  # two roundings to bf16
