"""The predictor's products: TF32 beside a bf16 backbone on CUDA alone, in both paths, and no other.

A CPU has no TF32: there, tests see how the switch stands at each product.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from smbfast import objective, reference
from smbfast.model import tf32
from tests.ops.tolerance import rounding
from tests.tiny import tiny_encoder

pytestmark = pytest.mark.numeric

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
PRODUCTS = {"aten::mm", "aten::addmm"}
MATMUL = torch.backends.cuda.matmul


class Switch(TorchDispatchMode):
    """How the switch stands at each product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket._qualified_op_name in PRODUCTS:
            self.seen.append(MATMUL.allow_tf32)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def narrow(monkeypatch) -> None:
    """As if the states were on CUDA."""
    monkeypatch.setattr(tf32, "_is_narrow", lambda x, dtype: (x.dtype, dtype) == (BF16, FP32))


@pytest.mark.parametrize("path", [objective, reference])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_the_switch_is_on_for_the_predictor_of_a_bf16_encoder_alone(path, dtype, narrow):
    encoder = tiny_encoder()
    states_MD = torch.randn(5, encoder.width).to(dtype).requires_grad_()
    before = MATMUL.allow_tf32, MATMUL.fp32_precision
    with Switch() as switch:
        prediction_MD = path.predict(encoder, states_MD)
        prediction_MD.square().sum().backward()
        states_MD.grad.float() @ torch.ones(encoder.width, 1)  # a product of somebody else
    assert prediction_MD.dtype == FP32 and states_MD.grad.dtype == dtype
    assert not before[0] and (MATMUL.allow_tf32, MATMUL.fp32_precision) == before
    # two linears: forward, and two gradients each
    assert switch.seen == [dtype == BF16] * 6 + [False]


def test_on_a_cpu_it_is_the_linear_of_torch(monkeypatch):
    encoder = tiny_encoder()
    monkeypatch.setattr(tf32, "linear", None)
    for dtype in (BF16, FP32):
        states_MD = torch.randn(5, encoder.width).to(dtype)
        expected = encoder.predictor(states_MD.float())
        assert torch.equal(objective.predict(encoder, states_MD), expected)
        assert torch.equal(reference.predict(encoder, states_MD), expected)


@pytest.mark.parametrize("needs", ["x", "w", "b", "xwb", ""])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_a_linear(needs, bias):
    """Where nothing is rounded to TF32, to the rounding of sums over 9, 7 and 5 terms."""
    shapes = {"x": (5, 9), "w": (7, 9)} | ({"b": (7,)} if bias else {})
    found = []
    leaves = {k: torch.randn(*s) for k, s in shapes.items()}
    for function, dtype in ((tf32.linear, FP32), (F.linear, FP64)):
        own = {k: v.detach().to(dtype).requires_grad_(k in needs) for k, v in leaves.items()}
        out = function(own["x"], own["w"], own.get("b"))
        if out.requires_grad:
            out.backward(torch.linspace(-1, 1, 35).to(dtype).view(5, 7))
        found.append({"out": out.detach()} | {k: v.grad for k, v in own.items() if k in needs})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        exact = found[1][name]
        size = max(1.0, float(exact.abs().max()))
        assert float((value.double() - exact).abs().max()) < rounding(9, 7) * size, name


def test_the_switch_is_turned_back_after_an_error():
    before = MATMUL.allow_tf32, MATMUL.fp32_precision
    with pytest.raises(RuntimeError):
        tf32.linear(torch.ones(2, 3), torch.ones(4, 5), None)
    assert (MATMUL.allow_tf32, MATMUL.fp32_precision) == before
    MATMUL.allow_tf32 = True
    try:
        tf32.linear(torch.ones(2, 3), torch.ones(4, 3), None)
        assert MATMUL.allow_tf32
    finally:
        MATMUL.allow_tf32, MATMUL.fp32_precision = before
