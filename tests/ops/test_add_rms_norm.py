"""Residual and RMSNorm: each backend against the reference, values and gradients.

T tokens, D width.
"""

import pytest
import torch
import triton
import triton.language as tl
from smbkernels import add_rms_norm
from smbkernels.norm.op import WIDEST
from smbkernels.registry import OPS
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from tests.ops.differentiated import assert_saved_bytes, compare, outcome, runnable
from tests.ops.tolerance import rounding

pytestmark = pytest.mark.numeric
F32, BF16 = torch.float32, torch.bfloat16
OP = OPS["add_rms_norm"]
EPS = 1e-5
REFERENCE = lambda *args: add_rms_norm.reference(*args, eps=EPS)  # noqa: E731


@pytest.fixture(params=[b.name for b in OP.backends])
def backend(request, device):
    runnable(OP, request.param, device)
    return request.param


@pytest.fixture
def on(backend):
    return lambda *args: add_rms_norm.on(backend)(*args, eps=EPS)


@pytest.fixture
def place(backend, device):
    return "cpu" if backend == "cpp" else device


def tolerance(T: int, D: int, dtype: torch.dtype) -> list[float]:
    """Of the sum, its norm, and the gradients.

    At least 64 lanes share a row's sum, 64 rows the first sum of a weight's gradient; a dozen other
    roundings come to each. In bf16 a value that lies between two numbers may become either, and its
    product with the weight then moves by as much.
    """
    if dtype == BF16:
        return [2**-8, 2**-7]
    row = rounding(12 + D / 64)
    return [0.0, row, row, row, rounding(12 + D / 64, 64 + T / 64)]


def inputs(T, D, dtype=F32, device="cpu", *, residual=True, trained=True):
    x_TD, residual_TD = (torch.randn(T, D, device=device).to(dtype) for _ in range(2))
    # another size than that of x
    residual_TD = (3 * residual_TD + 0.5).requires_grad_() if residual else None
    weight_D = (torch.rand(D, device=device) + 0.5).to(dtype).requires_grad_(trained)
    grads = [torch.randn(T, D, device=device).to(dtype) for _ in range(2)]
    return [x_TD.requires_grad_(), residual_TD, weight_D], grads


SIZES = [
    (1, 1),
    # less than a vector, and no block of the width divides it
    (3, 7),
    # an end of one vector
    (5, 33),
    # whole vectors
    (4, 96),
    # no 16-byte load is possible
    (5, 1001),
    # the width of 8B models
    (2, 4096),
]


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("residual", [True, False], ids=["sum", "alone"])
@pytest.mark.parametrize(("T", "D"), SIZES)
def test_values_and_gradients(on, place, T, D, residual, trained):
    given, grads = inputs(T, D, device=place, residual=residual, trained=trained)
    compare(on, REFERENCE, given, grads, tolerance(T, D, F32))


def test_several_blocks_of_rows_have_a_share_of_the_weight_s_gradient(on, backend, place):
    T = 200 if backend == "cpp" else 37
    compare(on, REFERENCE, *inputs(T, 40, device=place), tolerance(T, 40, F32))


@pytest.mark.parametrize("residual", [True, False], ids=["sum", "alone"])
@pytest.mark.parametrize(("T", "D"), [(3, 7), (70, 160)])
def test_bf16(on, backend, place, T, D, residual):
    if backend == "triton" and place == "cpu":
        pytest.skip("the interpreter rounds to bf16 wrongly")
    given, grads = inputs(T, D, BF16, place, residual=residual)
    compare(on, REFERENCE, given, grads, tolerance(T, D, BF16))


@pytest.mark.parametrize("read", [0, 1])
def test_one_output_alone_is_read(on, place, read):
    given, grads = inputs(6, 40, device=place)
    grads[1 - read] = None
    given[2] = given[2].detach().requires_grad_(read == 1)
    compare(on, REFERENCE, given, grads, tolerance(6, 40, F32))


def test_no_row(on, place):
    given, grads = inputs(0, 12, device=place)
    found = compare(on, REFERENCE, given, grads, [0.0])
    assert [list(x.shape) for x in found] == [[0, 12]] * 4 + [[12]] and not found[-1].any()


def test_the_widest_row(on, place):
    given, grads = inputs(2, WIDEST, device=place)
    compare(on, REFERENCE, given, grads, tolerance(2, WIDEST, F32))


@pytest.mark.parametrize("dtype", [F32, BF16])
@torch.no_grad()
def test_the_reference_has_the_bits_of_transformers(dtype):
    norm = Qwen3RMSNorm(48, eps=EPS).to(dtype)
    norm.weight.copy_(torch.rand(48) + 0.5)
    (x_TD, residual_TD, _), _ = inputs(9, 48, dtype)
    sum_TD, normed_TD = REFERENCE(x_TD, residual_TD, norm.weight)
    assert torch.equal(sum_TD, residual_TD + x_TD)
    assert torch.equal(normed_TD, norm(sum_TD)) and normed_TD.dtype == dtype


def test_mixed_dtypes_are_promoted_as_by_transformers():
    """As under autocast, where linears return bf16 and the stream is fp32."""
    norm = Qwen3RMSNorm(8, eps=EPS)
    x_TD, residual_TD = torch.randn(3, 8).bfloat16(), torch.randn(3, 8)
    sum_TD, normed_TD = add_rms_norm(x_TD, residual_TD, norm.weight, eps=EPS)
    assert torch.equal(sum_TD, x_TD + residual_TD) and sum_TD.dtype == F32
    assert torch.equal(normed_TD, norm(sum_TD))
    _, normed_TD = add_rms_norm(x_TD, None, norm.weight, eps=EPS)
    assert torch.equal(normed_TD, norm(x_TD)) and normed_TD.dtype == F32


def test_autocast_changes_nothing(on, place):
    given, grads = inputs(6, 40, device=place)
    expected = outcome(on, given, grads)
    with torch.autocast(place, torch.bfloat16):
        found = outcome(on, given, grads)
    assert all(map(torch.equal, found, expected))


def test_rows_that_lie_apart(on, place):
    given, grads = inputs(5, 96, device=place)
    expected = outcome(on, given, grads)
    apart = [torch.cat([x.detach(), x.detach()], 1)[:, 96:].requires_grad_() for x in given[:2]]
    across = [x.detach().T.contiguous().T.requires_grad_() for x in given[:2]]
    every_second = torch.stack([given[2].detach()] * 2, 1)[:, 0].requires_grad_()
    for tensors in (apart, across):
        leaves = [*tensors, every_second]
        outputs = on(*leaves)
        other_grads = [torch.cat([g, g], 1)[:, :96] for g in grads]
        found = torch.autograd.grad(outputs, leaves, other_grads)
        assert all(map(torch.equal, [*outputs, *found], expected))


def test_a_gradient_that_is_one_number_in_all_places(on, place):
    """Its strides are zero."""
    given, grads = inputs(5, 96, device=place)
    expected = outcome(on, given, [torch.ones_like(g) for g in grads])
    one = torch.ones((), device=place).expand(5, 96)
    assert all(map(torch.equal, outcome(on, given, [one, one]), expected))


def test_inputs_do_not_share_the_memory_of_a_gradient(on, place):
    (x_TD, residual_TD, weight_D), grads = inputs(5, 8, device=place)
    torch.autograd.backward(on(x_TD, residual_TD, weight_D), grads)
    assert torch.equal(x_TD.grad, residual_TD.grad)
    assert x_TD.grad.data_ptr() != residual_TD.grad.data_ptr()


def test_what_is_normed_alone_has_the_bits_of_the_sum(on, place):
    """Where a layer is computed again, its input was added before: values and gradients agree."""
    given, grads = inputs(9, 40, device=place)
    together = outcome(on, given, grads)
    before = given[0].detach() + given[1].detach()
    alone = outcome(on, [before.requires_grad_(), None, given[2]], grads)
    assert all(map(torch.equal, alone, [*together[:3], together[4]]))


def test_a_frozen_weight_gets_no_gradient_and_is_not_summed(on, backend, place):
    given, grads = inputs(6, 16, device=place, trained=False)
    assert len(outcome(on, given, grads)) == 4
    op = getattr(torch.ops.smb, f"add_rms_norm_{backend}_bwd")
    saved = [x.detach() for x in (given[0], torch.ones(6, device=place), given[2])]
    assert op(*grads, *saved, False)[1].shape == (0,)


def test_what_is_saved_is_the_sum_and_a_number_a_row(on, place):
    given, _ = inputs(6, 32, device=place)
    assert_saved_bytes(lambda: on(*given), 4 * (6 * 32 + 6 + 32))


@pytest.mark.parametrize("count", [2, 5])
def test_nothing_depends_on_the_number_of_threads(count):
    runnable(OP, "cpp", "cpu")
    given, grads = inputs(2000, 48)
    function = lambda *args: add_rms_norm.on("cpp")(*args, eps=EPS)  # noqa: E731
    torch.set_num_threads(1)
    expected = outcome(function, given, grads)
    torch.set_num_threads(count)
    assert all(map(torch.equal, outcome(function, given, grads), expected))


def test_a_nan_stays_in_its_row(on, place):
    given, grads = inputs(4, 40, device=place, trained=False)
    given[0].data[2, 7] = torch.nan
    for x in outcome(on, given, grads)[1:]:
        assert x[2].isnan().all() and x[[0, 1, 3]].isfinite().all()


def test_backward_twice_and_no_second_derivative(on, place):
    given, grads = inputs(3, 8, device=place)
    outputs = on(*given)
    first = torch.autograd.grad(outputs, given, grads, retain_graph=True)
    again = torch.autograd.grad(outputs, given, grads, create_graph=True)
    assert all(map(torch.equal, first, again))
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.autograd.grad(again[0].sum(), given[0])


@pytest.mark.parametrize("residual", [True, False])
def test_opcheck(backend, place, residual):
    given, grads = inputs(3, 24, device=place, residual=residual)
    op = getattr(torch.ops.smb, f"add_rms_norm_{backend}").default
    opcheck(op, (*given, EPS))
    op = getattr(torch.ops.smb, f"add_rms_norm_{backend}_bwd").default
    saved = given[0].detach(), torch.rand(3, device=place), given[2].detach()
    opcheck(op, (grads[0] if residual else None, grads[1], *saved, residual))


def test_compiles_into_one_graph(on, place):
    given, grads = inputs(3, 24, device=place)
    compiled = torch.compile(on, fullgraph=True, backend="aot_eager")
    expected = outcome(on, given, grads)
    assert all(map(torch.equal, outcome(compiled, given, grads), expected))


@pytest.mark.parametrize("residual", [True, False])
def test_flops_are_counted(backend, place, residual):
    given, grads = inputs(3, 5, device=place, residual=residual)
    with FlopCounterMode(display=False) as counter:
        outputs = add_rms_norm.on(backend)(*given, eps=EPS)
    forward = counter.get_total_flops()
    assert forward == add_rms_norm.flops(*given) == (5 if residual else 4) * 15
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(outputs, grads)
    assert counter.get_total_flops() == 11 * 15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, r, w: (x[0], r, w), r"x_TD must be \[T, D\], got \[24\]"),
        (lambda x, r, w: (x[:, :0], r, w), r"x_TD must be \[T, D\], got \[3, 0\]"),
        (lambda x, r, w: (x, r[:1], w), r"residual_TD must be \[3, 24\], got \[1, 24\]"),
        (lambda x, r, w: (x, r, w[:3]), r"weight_D must be \[24\], got \[3\]"),
        (lambda x, r, w: (x, r, w.to("meta")), "weight_D must be on .*, got meta"),
        (
            lambda x, r, w: (x, r.bfloat16(), w),
            "must be one of float32 or bfloat16, got",
        ),
        (lambda x, r, w: (x.double(), None, w.double()), "got float64"),
    ],
)
def test_bad_input_is_refused(on, place, change, message):
    given, _ = inputs(3, 24, device=place)
    with pytest.raises(ValueError, match=message):
        on(*change(*given))


def test_rows_too_wide_for_registers_are_left_to_the_reference(device):
    given, _ = inputs(1, WIDEST + 1, device=device)
    with pytest.raises(ValueError, match=f"at most {WIDEST}, got {WIDEST + 1}|no CUDA device"):
        add_rms_norm.on("triton")(*given, eps=EPS)


@triton.jit
def _starts(out_ptr, row_ptr, stride, START: tl.constexpr):
    i = tl.program_id(0)
    tl.store(out_ptr + i, START(tl.load(row_ptr + i).to(tl.int32), stride))


@pytest.mark.parametrize("module", ["norm", "rope", "gated"])
def test_rows_beyond_2_to_the_31_elements(device, module):
    """The kernels' own arithmetic, on row numbers of 32 bits as `tl.program_id` gives them."""
    if OP.missing(OP.backends[0], device):
        pytest.skip("no Triton here")
    start = __import__(f"smbkernels.{module}.triton", fromlist=["_row_start"])._row_start
    row_M = torch.tensor([1, 2**19, 2**19 + 1, 2**30], device=device)
    start_M = torch.empty_like(row_M)
    _starts[(4,)](start_M, row_M, 4096, START=start)
    assert start_M.tolist() == [row * 4096 for row in row_M.tolist()]
