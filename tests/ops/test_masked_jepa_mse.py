"""Masked JEPA MSE: every backend against the reference in the same dtype and in fp64.

M masked positions, D width, T rows of the target.
"""

import math
from dataclasses import dataclass

import pytest
import torch
import triton
import triton.language as tl
from smbkernels import masked_jepa_mse
from smbkernels.jepa_mse.op import WIDEST
from smbkernels.jepa_mse.triton import _row_start
from smbkernels.registry import OPS
from torch import Tensor
from torch.library import opcheck

from tests.ops.tolerance import rounding
from tests.oracle import assert_no_worse

pytestmark = pytest.mark.numeric

# every backend sums a row in fp64 or in a tree, whose depth is below 32 for the widest row, and the
# rounding of its dozen other operations is within what a tree of that depth leaves
TOL = rounding(32)
OP = OPS["masked_jepa_mse"]


@dataclass(frozen=True)
class On:
    """A backend, and the kind of device it runs on."""

    name: str
    device: str

    def __call__(self, *args, **kwargs) -> Tensor:
        return masked_jepa_mse.on(self.name)(*args, **kwargs)


@pytest.fixture(params=[b.name for b in OP.backends])
def on(request, device) -> On:
    found = On(request.param, "cpu" if request.param == "cpp" else device)
    backend = next(b for b in OP.backends if b.name == found.name)
    reason = OP.missing(backend, found.device)
    if reason:
        pytest.skip(f"{found.name}: {reason}")
    return found


def inputs(rows, D, T=9, prediction=torch.float32, target=torch.float32, device="cpu"):
    prediction_MD = torch.randn(len(rows), D, device=device).to(prediction).requires_grad_()
    # another scale and a mean, so that each norm has something to do
    target_TD = (3 * torch.randn(T, D, device=device) + 1).to(target)
    weight_D = (torch.rand(D, device=device) + 0.5).to(target)
    return prediction_MD, target_TD, torch.tensor(rows, device=device).long(), weight_D


def outcome(function, prediction_MD, target_TD, row_M, *weight, upstream=1.0, **options):
    leaf = prediction_MD.detach().clone().requires_grad_()
    loss = function(leaf, target_TD, row_M, *weight, **options)
    (upstream * loss).backward()
    return loss.detach(), leaf.grad


def compare(on, tensors, tol=TOL, **options):
    """Loss and gradient of a backend, after a comparison with eager and fp64."""
    exact = [x.double().cpu() if x.is_floating_point() else x.cpu() for x in tensors]
    reference = masked_jepa_mse.reference
    found = outcome(on, *tensors, **options)
    eager = outcome(reference, *tensors, **options)
    truth = outcome(reference, *exact, **options)
    for fast, same, true in zip(found, eager, truth, strict=True):
        assert_no_worse(fast, same, true, tol)
    return found


@pytest.mark.parametrize("normalize", [True, False], ids=["layer_norm", "identity"])
@pytest.mark.parametrize("norm", [True, False], ids=["rms_norm", "normed"])
@pytest.mark.parametrize(
    ("rows", "D"),
    [
        # the narrowest row, whose variance is 0
        ([2], 1),
        # a repeated row; less than a warp, and no block of the width divides it
        ([4, 0, 4], 7),
        # all rows one row; 16-byte loads with a part of the block masked
        ([5] * 6, 80),
        # no 16-byte load is possible
        ([8, 1, 3], 1001),
        # two warps and more share a row
        ([0, 7, 2], 2048),
        # the width of 8B models
        ([8, 8, 6], 4096),
    ],
)
def test_loss_and_gradient(on, rows, D, norm, normalize):
    prediction_MD, target_TD, row_M, weight_D = inputs(rows, D, device=on.device)
    weight = [weight_D] if norm else []
    # a scale as in training, and a gradient from above that is not one
    options = {"normalize": normalize, "norm_eps": 1e-3, "scale": 0.37, "upstream": 3.0}
    compare(on, [prediction_MD, target_TD, row_M, *weight], **options)


def test_the_widest_row(on):
    compare(on, inputs([1, 0], WIDEST, T=2, device=on.device))


@pytest.mark.parametrize("prediction", [torch.float32, torch.bfloat16], ids=["p32", "p16"])
def test_bf16(on, prediction):
    if prediction == torch.bfloat16 and on.device == "cpu" and on.name == "triton":
        pytest.skip("the interpreter rounds to bf16 wrongly")
    # one rounding of the gradient to bf16
    tol = 2**-8 if prediction == torch.bfloat16 else TOL
    compare(on, inputs([3, 0, 8], 160, 9, prediction, torch.bfloat16, on.device), tol)


def test_no_masked_position(on):
    loss, grad_MD = compare(on, inputs([], 12, device=on.device))
    assert float(loss) == 0 and grad_MD.shape == (0, 12)


def test_every_position_masked(on):
    compare(on, inputs(list(range(9)), 24, device=on.device))


def test_a_target_far_from_zero(on):
    """The variance is that of the centred row, not a difference of large squares."""
    prediction_MD, target_TD, row_M, _ = inputs([0, 1, 2], 512, device=on.device)
    # values whose sums are exact, so that the mean is
    target_TD = (torch.randn(9, 512, device=on.device) * 4).round() + 4096
    compare(on, [prediction_MD, target_TD, row_M])


def test_a_constant_target_is_normed_to_zero(on):
    prediction_MD, target_TD, row_M, _ = inputs([0, 1], 64, device=on.device)
    loss, _ = outcome(on, prediction_MD, torch.full_like(target_TD, 5.0), row_M)
    torch.testing.assert_close(loss, prediction_MD.detach().square().mean(1).sum())


def test_rows_that_lie_apart(on):
    prediction_MD, target_TD, row_M, weight_D = inputs([4, 4, 1], 96, device=on.device)
    found = outcome(on, prediction_MD, target_TD, row_M, weight_D)
    wide_M2 = torch.stack([row_M, row_M], 1)
    strided = (
        torch.cat([prediction_MD.detach()] * 2, 1)[:, 96:],
        torch.cat([target_TD] * 2, 1)[:, :96],
        wide_M2[:, 0],
        torch.stack([weight_D, weight_D], 1)[:, 0],
    )
    transposed = (prediction_MD.detach().T.contiguous().T, target_TD.T.contiguous().T, row_M)
    for tensors in (strided, (*transposed, weight_D)):
        leaf = tensors[0].requires_grad_()
        loss = on(leaf, *tensors[1:])
        loss.backward()
        assert torch.equal(loss, found[0]) and torch.equal(leaf.grad, found[1])


@pytest.mark.parametrize("row", [-1, 9, 2**31, -(2**31), 2**40])
def test_a_row_that_the_target_does_not_have(on, row):
    """No wild read: NaN at that position alone, or an error where it can be raised in time."""
    prediction_MD, target_TD, row_M, _ = inputs([3, 0, 8], 40, device=on.device)
    _, expected_MD = outcome(on, prediction_MD, target_TD, row_M)
    row_M[1] = row
    try:
        loss, grad_MD = outcome(on, prediction_MD, target_TD, row_M)
    except (ValueError, IndexError):
        return
    assert loss.isnan() and grad_MD[1].isnan().all()
    assert torch.equal(grad_MD[::2], expected_MD[::2])


def test_a_target_without_rows(on):
    prediction_MD, target_TD, row_M, _ = inputs([0], 40, device=on.device)
    try:
        assert on(prediction_MD, target_TD[:0], row_M).isnan()
    except (ValueError, IndexError):
        assert on.name == "cpp"


def test_a_nan_reaches_the_loss(on):
    prediction_MD, target_TD, row_M, _ = inputs([3, 0], 40, device=on.device)
    target_TD[0, 7] = math.nan
    loss, grad_MD = outcome(on, prediction_MD, target_TD, row_M)
    assert loss.isnan() and grad_MD[1].isnan().all() and grad_MD[0].isfinite().all()


def test_same_inputs_same_bits(on):
    tensors = inputs([3, 0, 8, 8, 1], 200, device=on.device)
    first, second = outcome(on, *tensors), outcome(on, *tensors)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_the_gradient_is_made_only_if_it_is_needed(on):
    prediction_MD, target_TD, row_M, weight_D = inputs([3, 0], 40, device=on.device)
    forward = getattr(torch.ops.smb, f"masked_jepa_mse_{on.name}")
    options = (True, 1e-6, 0.5)
    loss, grad = forward(prediction_MD.detach(), target_TD, row_M, weight_D, *options, False)
    assert grad.shape == (0,)
    same, grad_MD = forward(prediction_MD.detach(), target_TD, row_M, weight_D, *options, True)
    assert torch.equal(loss, same) and grad_MD.shape == prediction_MD.shape
    with torch.no_grad():
        assert torch.equal(on(prediction_MD, target_TD, row_M, weight_D, scale=0.5), loss)


def test_backward_twice(on):
    prediction_MD, target_TD, row_M, _ = inputs([3, 0], 40, device=on.device)
    loss = on(prediction_MD, target_TD, row_M)
    (first,) = torch.autograd.grad(2 * loss, prediction_MD, retain_graph=True)
    (second,) = torch.autograd.grad(loss, prediction_MD)
    torch.testing.assert_close(first, 2 * second)


def test_the_target_and_its_norm_get_no_gradient(on):
    prediction_MD, target_TD, row_M, weight_D = inputs([3, 0], 40, device=on.device)
    on(prediction_MD, target_TD.requires_grad_(), row_M, weight_D.requires_grad_()).backward()
    assert target_TD.grad is None and weight_D.grad is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, t, r, w: (p[0], t, r, w), r"prediction_MD must be \[M, D\], got \[40\]"),
        (lambda p, t, r, w: (p[:, :0], t[:, :0], r), r"prediction_MD must be \[M, D\]"),
        (lambda p, t, r, w: (p, t[:, :9], r, w), r"target_TD must be \[T, 40\], got \[9, 9\]"),
        (lambda p, t, r, w: (p, t, r[:1], w), r"row_M must be int64 of shape \[2\]"),
        (lambda p, t, r, w: (p, t, r.int(), w), r"row_M must be int64 .* got torch.int32"),
        (lambda p, t, r, w: (p, t, r, w[:3]), r"norm_weight_D must be \[40\], got \[3\]"),
        (lambda p, t, r, w: (p, t.to("meta"), r), r"target_TD must be on .*, got meta"),
        (lambda p, t, r, w: (p, t.half(), r), "dtypes must be fp32 or bf16"),
    ],
)
def test_bad_input_is_refused(on, change, message):
    with pytest.raises(ValueError, match=message):
        on(*change(*inputs([3, 0], 40, device=on.device)))


def test_rows_too_wide_for_registers_are_left_to_the_reference(device):
    tensors = inputs([0], WIDEST + 1, T=1, device=device)[:3]
    torch.testing.assert_close(masked_jepa_mse(*tensors), masked_jepa_mse.reference(*tensors))
    with pytest.raises(ValueError, match=f"at most {WIDEST}, got {WIDEST + 1}|no CUDA device"):
        masked_jepa_mse.on("triton")(*tensors)


@pytest.mark.parametrize("needs_grad", [True, False])
def test_opcheck(on, needs_grad):
    prediction_MD, target_TD, row_M, weight_D = inputs([3, 0], 24, device=on.device)
    if not needs_grad:
        prediction_MD = prediction_MD.detach()
    op = getattr(torch.ops.smb, f"masked_jepa_mse_{on.name}").default
    opcheck(op, (prediction_MD, target_TD, row_M, weight_D, True, 1e-6, 0.5, needs_grad))


def test_in_a_compiled_graph(on):
    function = masked_jepa_mse.on(on.name)
    compiled = torch.compile(
        lambda p, t, r: 2 * function(p * 1.5, t, r), fullgraph=True, backend="aot_eager"
    )
    prediction_MD, target_TD, row_M, _ = inputs([3, 0], 24, device=on.device)
    expected = outcome(lambda p, t, r: 2 * function(p * 1.5, t, r), prediction_MD, target_TD, row_M)
    found = outcome(compiled, prediction_MD, target_TD, row_M)
    torch.testing.assert_close(found, expected)


@triton.jit
def _starts(out_ptr, row_ptr, stride):
    i = tl.program_id(0)
    tl.store(out_ptr + i, _row_start(tl.load(row_ptr + i).to(tl.int32), stride))


def test_rows_beyond_2_to_the_31_elements(device):
    """The kernel's own arithmetic, on row numbers of 32 bits as `tl.program_id` gives them."""
    if OP.missing(OP.backends[0], device):
        pytest.skip("no Triton here")
    row_M = torch.tensor([1, 2**19, 2**19 + 1, 2**30], device=device)
    start_M = torch.empty_like(row_M)
    _starts[(4,)](start_M, row_M, 4096)
    assert start_M.tolist() == [row * 4096 for row in row_M.tolist()]
