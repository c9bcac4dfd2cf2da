"""Operations under autocast, and in graphs that are used more than once."""

import pytest
import torch
from smbkernels import ema_update_, lora_linear, masked_jepa_mse
from smbkernels.registry import OPS

pytestmark = pytest.mark.numeric


def ready(name: str) -> list[str]:
    """Implementations that run on a CPU here, the reference among them."""
    return [n for n, status in OPS[name].status("cpu").items() if status == "ok"]


@pytest.mark.parametrize("backend", ready("masked_jepa_mse"))
@pytest.mark.parametrize("width", [40, 4096])
def test_a_loss_may_be_differentiated_again_whatever_became_of_its_gradient(backend, width):
    M = 300 if backend != "triton" else 60  # interpreted, a row is slow
    prediction_MD = torch.randn(M, width, requires_grad=True)
    loss = masked_jepa_mse.on(backend)(prediction_MD, torch.randn(M, width), torch.arange(M))
    (once,) = torch.autograd.grad(loss, prediction_MD, retain_graph=True)
    once = once.clone()
    loss.backward(retain_graph=True)
    prediction_MD.grad.data.zero_()
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(prediction_MD.grad, 2 * once)


@pytest.mark.parametrize("backend", [b for b in ready("masked_jepa_mse") if b != "torch"])
def test_a_second_derivative_is_refused_not_wrong(backend):
    prediction_MD = torch.randn(2, 8, requires_grad=True)
    loss = masked_jepa_mse.on(backend)(prediction_MD, torch.randn(2, 8), torch.arange(2))
    (grad_MD,) = torch.autograd.grad(loss, prediction_MD, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.autograd.grad(grad_MD.sum(), prediction_MD)


@pytest.mark.parametrize("backend", ready("ema_update_"))
def test_an_average_is_as_exact_under_autocast(backend):
    weight, b, a = torch.randn(64, 64), torch.randn(64, 8), torch.randn(8, 64)
    plain, auto = weight.clone(), weight.clone()
    ema_update_.on(backend)([plain], [weight], [b], [a], scale=[2.0], tau=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        ema_update_.on(backend)([auto], [weight], [b], [a], scale=[2.0], tau=0.5)
    assert torch.equal(plain, auto)


@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
def test_lora_under_autocast_is_that_of_the_reference(inside):
    x, w = torch.randn(9, 32), [torch.randn(24, 32), torch.randn(16, 32)]
    factors = [torch.randn(n, 4) for n in (24, 16)], [torch.randn(4, 32) for _ in range(2)]
    found = []
    for call in (lora_linear.reference, lora_linear.on("fused")):
        x_TK = x.clone().requires_grad_()
        b, a = ([f.clone().requires_grad_() for f in g] for g in factors)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = call(x_TK, w, b, a, scale=[2.0, 0.5])
            loss = sum(y.float().square().sum() for y in outputs)
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        assert all(y.dtype == torch.bfloat16 for y in outputs)
        found.append([*outputs, x_TK.grad, *(f.grad for f in (*b, *a))])
    for own, reference in zip(found[1], found[0], strict=True):
        assert own.dtype == reference.dtype
        gap = (own.double() - reference.double()).norm() / reference.double().norm()
        assert float(gap) < 2**-7  # a few roundings of bf16


def test_lora_under_autocast_compiles_into_one_graph():
    x, w, b, a = torch.randn(5, 16), torch.randn(8, 16), torch.randn(8, 2), torch.randn(2, 16)

    fused = lora_linear.on("fused")  # imported before: what is compiled cannot import

    def call(x_TK):
        return fused(x_TK, [w], [b], [a], scale=[1.0])[0]

    with torch.autocast("cpu", torch.bfloat16):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
        assert torch.equal(compiled, call(x)) and compiled.dtype == torch.bfloat16
