"""SwiGLU: each backend against the reference, values and gradients.

T tokens, F width of the MLP.
"""

import math

import pytest
import torch
from smbkernels import swiglu
from smbkernels.registry import OPS
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.differentiated import assert_saved_bytes, compare, outcome, runnable
from tests.ops.tolerance import rounding

pytestmark = pytest.mark.numeric
F32, BF16 = torch.float32, torch.bfloat16
OP = OPS["swiglu"]
# in fp32 a dozen roundings, of which exp has a few; in bf16 the activation may become either of two
# numbers, and then the product
TOL = {F32: [rounding(12)], BF16: [2**-7]}


@pytest.fixture(params=[b.name for b in OP.backends])
def backend(request, device):
    runnable(OP, request.param, device)
    return request.param


@pytest.fixture
def on(backend):
    return swiglu.on(backend)


@pytest.fixture
def place(backend, device):
    return "cpu" if backend == "cpp" else device


def inputs(T, F, dtype=F32, device="cpu"):
    # gates at which silu bends, and at which it does not
    gate_TF, up_TF, grad_TF = (n * torch.randn(T, F, device=device) for n in (4.0, 1.0, 1.0))
    return [x.to(dtype).requires_grad_() for x in (gate_TF, up_TF)], [grad_TF.to(dtype)]


@pytest.mark.parametrize(
    ("T", "F"),
    # one element; no whole vector; an end of one; a block and an end of one; several threads' worth
    [(1, 1), (3, 7), (5, 33), (2, 2050), (40, 1024)],
)
def test_values_and_gradients(on, place, T, F):
    compare(on, swiglu.reference, *inputs(T, F, device=place), TOL[F32])


@pytest.mark.parametrize(("T", "F"), [(3, 7), (70, 160)])
def test_bf16(on, backend, place, T, F):
    if backend == "triton" and place == "cpu":
        pytest.skip("the interpreter rounds to bf16 wrongly")
    compare(on, swiglu.reference, *inputs(T, F, BF16, place), TOL[BF16])


def test_no_row(on, place):
    found = compare(on, swiglu.reference, *inputs(0, 12, device=place), TOL[F32])
    assert all(x.shape == (0, 12) for x in found)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gates_far_from_zero(on, backend, place, dtype):
    """Where exp is infinite or nothing; a gate that is no number stays none."""
    if backend == "triton" and place == "cpu" and dtype == BF16:
        pytest.skip("the interpreter rounds to bf16 wrongly")
    values = [-1e30, -200.0, -90.0, -0.0, 0.0, 90.0, 200.0, 1e30]
    gate_TF = torch.tensor([values], device=place).to(dtype).requires_grad_()
    one_TF = torch.ones_like(gate_TF)
    compare(on, swiglu.reference, [gate_TF, one_TF], [one_TF.detach()], TOL[dtype])
    odd_TF = torch.tensor([[math.nan, 1.0]], device=place).to(dtype).requires_grad_()
    one_TF = torch.ones_like(odd_TF).requires_grad_()
    for x in outcome(on, [odd_TF, one_TF], [torch.ones_like(odd_TF)]):
        assert x[0].isnan().tolist() == [True, False]


def test_rows_that_lie_apart(on, place):
    given, grads = inputs(5, 96, device=place)
    expected = outcome(on, given, grads)
    both = torch.cat([x.detach() for x in given], 1).requires_grad_()
    out_TF = on(*both.split(96, 1))
    (grad,) = torch.autograd.grad(out_TF, both, torch.cat([*grads, *grads], 1)[:, 96:])
    assert torch.equal(out_TF, expected[0])
    assert all(map(torch.equal, grad.split(96, 1), expected[1:]))
    across = [x.detach().T.contiguous().T for x in given]
    assert torch.equal(on(*across), expected[0])


def test_mixed_dtypes_and_autocast_are_as_in_torch():
    (gate_TF, up_TF), _ = inputs(3, 8)
    expected = swiglu.reference(gate_TF.bfloat16(), up_TF)
    assert torch.equal(swiglu(gate_TF.bfloat16(), up_TF), expected) and expected.dtype == F32
    plain = swiglu(gate_TF, up_TF)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(swiglu(gate_TF, up_TF), plain)


def test_what_is_saved_are_the_inputs(on, place):
    given, _ = inputs(6, 8, device=place)
    assert_saved_bytes(lambda: on(*given), 4 * 2 * 6 * 8)


@pytest.mark.parametrize("count", [2, 5])
def test_nothing_depends_on_the_number_of_threads(count):
    runnable(OP, "cpp", "cpu")
    given, grads = inputs(301, 333)
    torch.set_num_threads(1)
    expected = outcome(swiglu.on("cpp"), given, grads)
    torch.set_num_threads(count)
    assert all(map(torch.equal, outcome(swiglu.on("cpp"), given, grads), expected))


def test_backward_twice_and_no_second_derivative(on, place):
    given, grads = inputs(3, 8, device=place)
    out_TF = on(*given)
    first = torch.autograd.grad(out_TF, given, grads, retain_graph=True)
    again = torch.autograd.grad(out_TF, given, grads, create_graph=True)
    assert all(map(torch.equal, first, again))
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.autograd.grad(again[0].sum(), given[0])


def test_opcheck(backend, place):
    given, grads = inputs(3, 24, device=place)
    opcheck(getattr(torch.ops.smb, f"swiglu_{backend}").default, tuple(given))
    saved = [x.detach() for x in given]
    opcheck(getattr(torch.ops.smb, f"swiglu_{backend}_bwd").default, (*grads, *saved))


def test_compiles_into_one_graph(on, place):
    given, grads = inputs(3, 24, device=place)
    compiled = torch.compile(on, fullgraph=True, backend="aot_eager")
    expected = outcome(on, given, grads)
    assert all(map(torch.equal, outcome(compiled, given, grads), expected))


def test_flops_are_counted(on, place):
    given, grads = inputs(3, 5, device=place)
    with FlopCounterMode(display=False) as counter:
        out_TF = on(*given)
    assert counter.get_total_flops() == swiglu.flops(*given) == 2 * 15
    with FlopCounterMode(display=False) as counter:
        out_TF.backward(*grads)
    assert counter.get_total_flops() == 7 * 15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g, u: (g[0], u), r"gate_TF must be \[T, F\], got \[24\]"),
        (lambda g, u: (g[:, :0], u[:, :0]), r"gate_TF must be \[T, F\], got \[3, 0\]"),
        (lambda g, u: (g, u[:1]), r"up_TF must be \[3, 24\], got \[1, 24\]"),
        (lambda g, u: (g, u.to("meta")), "up_TF must be on .*, got meta"),
        (lambda g, u: (g.double(), u.double()), "must be one of float32 or bfloat16, got float64"),
    ],
)
def test_bad_input_is_refused(on, place, change, message):
    given, _ = inputs(3, 24, device=place)
    with pytest.raises(ValueError, match=message):
        on(*change(*given))
