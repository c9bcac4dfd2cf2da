"""The C++ kernels where they are their own: threads, tiles, ragged ends, bf16, far rows.

M masked positions, D width, T rows of the target; N out, K in features, R rank.
"""

import pytest
import torch
from smbkernels import ema_update_, masked_jepa_mse
from smbkernels.cpp_build import missing
from smbkernels.ema import join, split

from tests.oracle import assert_no_worse

pytestmark = pytest.mark.numeric

F32, BF16 = torch.float32, torch.bfloat16
TAU, SCALE = 0.97, 0.3


@pytest.fixture(autouse=True)
def _built():
    if missing("cpu"):
        pytest.skip(missing("cpu"))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def loss_and_grad(function, prediction_MD, *args, **options):
    leaf = prediction_MD.detach().clone().requires_grad_()
    loss = function(leaf, *args, **options)
    loss.backward()
    return loss.detach(), leaf.grad


def matrices(shapes, weight=F32, adapter=F32):
    """Averages, weights, and B and A, of shapes (N, K, R)."""
    sizes = [((n, k), (n, k), (n, r), (r, k)) for n, k, r in shapes]
    dtypes = (F32, weight, adapter, adapter)
    rows = [[torch.randn(s).to(d) for s, d in zip(size, dtypes, strict=True)] for size in sizes]
    return [list(column) for column in zip(*rows, strict=True)]


def pinned(average_NK, weight_NK, b_NR=None, a_RK=None):
    """The order of the reference, each step rounded to fp32 once."""
    target = weight_NK.float()
    if b_NR is not None:
        delta = torch.zeros_like(target)
        for b_N, a_K in zip(b_NR.double().T, a_RK.double(), strict=True):
            # a product of two fp32 numbers is exact in fp64
            delta = (torch.outer(b_N, a_K) + delta.double()).float()
        target = target + torch.tensor(SCALE) * delta
    return average_NK + torch.tensor(1 - TAU) * (target - average_NK)


def updated(average, weight, b, a, halves=False):
    """The fp32 averages that the kernel makes."""
    scale = [SCALE] * len(average)
    if not halves:
        found = [x.clone() for x in average]
        ema_update_.on("cpp")(found, weight, b, a, scale=scale, tau=TAU)
        return found
    high, low = map(list, zip(*map(split, average), strict=True))
    ema_update_.on("cpp")(high, weight, b, a, remainder=low, scale=scale, tau=TAU)
    return [join(h, r) for h, r in zip(high, low, strict=True)]


# no element, a rank of none; one element; an end of one vector; whole vectors; a row left over from
# those taken together; several tiles side by side (a high rank makes them narrow) and below
SHAPES = [
    (3, 0, 2),
    (0, 3, 2),
    (3, 5, 0),
    (1, 1, 1),
    (7, 33, 3),
    (64, 64, 16),
    (130, 1000, 16),
    (5, 4097, 8),
    (103, 670, 100),
]


@pytest.mark.parametrize("halves", [False, True], ids=["fp32", "halves"])
@pytest.mark.parametrize("weight", [F32, BF16], ids=["w32", "w16"])
@pytest.mark.parametrize("adapter", [F32, BF16, None], ids=["ba32", "ba16", "no_adapter"])
def test_every_element_of_an_average_has_the_pinned_bits(weight, adapter, halves):
    average, weights, b, a = matrices(SHAPES, weight, adapter or F32)
    if adapter is None:
        found = updated(average, weights, None, None, halves)
        expected = [pinned(*pair) for pair in zip(average, weights, strict=True)]
    else:
        found = updated(average, weights, b, a, halves)
        expected = [pinned(*m) for m in zip(average, weights, b, a, strict=True)]
    for shape, one, other in zip(SHAPES, found, expected, strict=True):
        assert torch.equal(one, other), shape


def test_a_flat_average_longer_than_a_tile():
    average, weight = [torch.randn(3, 50_001)], [torch.randn(3, 50_001)]
    (found,) = updated(average, weight, None, None)
    assert torch.equal(found, pinned(average[0], weight[0]))


def test_an_average_does_not_depend_on_the_number_of_threads(threads):
    inputs = matrices([(130, 1000, 16), (7, 33, 3), (103, 670, 100), (64, 2048, 8)])
    found = []
    for count in (1, 2, 5):
        threads(count)
        found.append(updated(*inputs))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("norm", [True, False], ids=["rms_norm", "normed"])
def test_a_loss_does_not_depend_on_the_number_of_threads(threads, norm):
    # a gradient of more than one huge page
    prediction_MD, target_TD = torch.randn(300, 4096), torch.randn(50, 4096)
    args = [target_TD, torch.randint(0, 50, (300,)), torch.rand(4096) if norm else None]
    found = []
    for count in (1, 2, 5):
        threads(count)
        found.append(loss_and_grad(masked_jepa_mse.on("cpp"), prediction_MD, *args))
    for loss, grad_MD in found[1:]:
        assert torch.equal(loss, found[0][0]) and torch.equal(grad_MD, found[0][1])


@pytest.mark.parametrize("normalize", [True, False], ids=["layer_norm", "identity"])
@pytest.mark.parametrize("norm", [None, F32, BF16], ids=["normed", "n32", "n16"])
@pytest.mark.parametrize("target", [F32, BF16], ids=["t32", "t16"])
@pytest.mark.parametrize("prediction", [F32, BF16], ids=["p32", "p16"])
# less than a vector; four vectors and an end; the width of 8B models
@pytest.mark.parametrize("D", [5, 141, 4096])
def test_every_mix_of_dtypes_is_no_worse_than_eager(D, prediction, target, norm, normalize):
    inputs = [
        torch.randn(6, D).to(prediction),
        (3 * torch.randn(4, D) + 1).to(target),
        torch.tensor([3, 0, 0, 1, 2, 3]),
        None if norm is None else (torch.rand(D) + 0.5).to(norm),
    ]
    exact = [x.double() if x is not None and x.is_floating_point() else x for x in inputs]
    options = {"normalize": normalize, "scale": 0.37}
    found = loss_and_grad(masked_jepa_mse.on("cpp"), *inputs, **options)
    eager = loss_and_grad(masked_jepa_mse.reference, *inputs, **options)
    truth = loss_and_grad(masked_jepa_mse.reference, *exact, **options)
    # where an fp32 error of some 1e-7 lies between two bf16 numbers, either may be taken
    tol = 2**-8 if prediction == BF16 else 1e-6
    assert_no_worse(found[0], eager[0], truth[0], 1e-6)
    assert_no_worse(found[1], eager[1], truth[1], tol)
    assert found[1].dtype == prediction


def test_statistics_of_a_long_row_far_from_zero():
    """100,000 terms, where a plain fp32 sum loses digits, and a mean whose rounding shows."""
    prediction_MD, row_M = torch.zeros(2, 100_003), torch.tensor([1, 0])
    target_TD = torch.randn(2, 100_003) + 30
    reference = masked_jepa_mse.reference
    truth = loss_and_grad(reference, prediction_MD.double(), target_TD.double(), row_M)
    eager = loss_and_grad(reference, prediction_MD, target_TD, row_M)
    found = loss_and_grad(masked_jepa_mse.on("cpp"), prediction_MD, target_TD, row_M)
    own, others = (
        float((grad_MD.double() - truth[1]).norm() / truth[1].norm())
        for _, grad_MD in (found, eager)
    )
    assert own < 1e-7 and own < 0.5 * others
    assert float(found[0]) == pytest.approx(float(truth[0]), rel=2e-7)


@pytest.mark.parametrize("row", [-1, 9, 2**40])
def test_a_row_that_the_target_does_not_have(row):
    row_M = torch.tensor([8, 0, row])
    with pytest.raises(ValueError, match=rf"row_M must be in \[0, 9\), got {row} at position 2"):
        masked_jepa_mse.on("cpp")(torch.zeros(3, 4), torch.zeros(9, 4), row_M)


def test_a_target_of_more_than_2_to_the_31_elements(tmp_path):
    # a file with holes: 4 GiB of addresses, two pages of memory
    T, D = 2**20 + 2, 2048
    with (tmp_path / "target").open("wb") as file:
        file.truncate(2 * T * D)
    name = str(tmp_path / "target")
    target_TD = torch.from_file(name, shared=True, size=T * D, dtype=BF16).view(T, D)
    values_D = torch.randn(D).to(BF16)
    target_TD[T - 1] = values_D
    prediction_MD, row_M = torch.randn(1, D), torch.tensor([T - 1])
    found = loss_and_grad(masked_jepa_mse.on("cpp"), prediction_MD, target_TD, row_M)
    near = loss_and_grad(masked_jepa_mse.on("cpp"), prediction_MD, values_D[None], row_M * 0)
    assert torch.equal(found[0], near[0]) and torch.equal(found[1], near[1])
