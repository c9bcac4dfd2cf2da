"""Averages of merged weights: every backend against the pinned order of operations and fp64.

N out, K in features, R rank.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import triton
from smbkernels import ema_update_
from smbkernels.ema import join, split
from smbkernels.registry import OPS
from smbkernels.triton_platform import INTERPRET
from torch import Tensor
from torch.library import opcheck

from tests.ops.tolerance import rounding
from tests.oracle import assert_no_worse

pytestmark = pytest.mark.numeric

TAU = 0.996
OP = OPS["ema_update_"]
# one per regime: N, K, R; R is None where there is no adapter
SHAPES = [
    # one element; one row and column of a tile
    (1, 1, 1),
    (1, 70, 3),
    (65, 1, 2),
    # whole tiles, no mask; the usual rank in one run
    (64, 128, 16),
    # 16-byte rows, tiles in part
    (70, 80, 16),
    # no 16-byte rows; ranks in runs of four, of two and of one
    (19, 67, 64),
    (17, 66, 18),
    (3, 5, 17),
    # without an adapter: whole runs, 16-byte accesses with a rest, and neither
    (64, 64, None),
    (48, 100, None),
    (7, 11, None),
]
shapes = pytest.mark.parametrize(("N", "K", "R"), SHAPES)
storage = pytest.mark.parametrize("halves", [False, True], ids=["fp32", "split"])


@dataclass(frozen=True)
class On:
    """A backend, and the kind of device it runs on."""

    name: str
    device: str

    def __call__(self, *args, **kwargs) -> None:
        ema_update_.on(self.name)(*args, **kwargs)


@pytest.fixture(params=[b.name for b in OP.backends])
def on(request, device) -> On:
    found = On(request.param, "cpu" if request.param == "cpp" else device)
    skip_if_missing(found)
    return found


def skip_if_missing(on: On) -> None:
    reason = OP.missing(next(b for b in OP.backends if b.name == on.name), on.device)
    if reason:
        pytest.skip(f"{on.name}: {reason}")


def stored(full: Tensor, halves: bool) -> tuple[Tensor, list[Tensor] | None]:
    """An average as the operation takes it: the tensor, and a list of its remainder if split."""
    if not halves:
        return full.clone(), None
    high, low = split(full)
    return high, [low]


def moved(on, full, weight, b=None, a=None, *, halves=False, scale=1.0, tau=TAU) -> Tensor:
    """The average after one update, in fp32."""
    average, remainder = stored(full, halves)
    adapters = ([b], [a]) if b is not None else (None, None)
    on([average], [weight], *adapters, remainder=remainder, scale=[scale], tau=tau)
    return average if remainder is None else join(average, remainder[0])


def pinned(full, weight, b=None, a=None, *, scale=1.0, tau=TAU) -> Tensor:
    """The order of operations, each rounded to fp32; B A must be exact in fp32."""
    w, t = full.cpu().numpy(), weight.float().cpu().numpy()
    if b is not None:
        product = (b.double() @ a.double()).cpu().numpy()
        assert (product == product.astype(np.float32)).all()
        t = t + np.float32(scale) * product.astype(np.float32)
    w = np.asarray(w + np.float32(1 - tau) * (t - w))
    assert w.dtype == np.float32
    return torch.from_numpy(w).to(full.device)


def whole_numbers(*shape, device="cpu") -> Tensor:
    """Small enough that sums of products are exact in fp32, in any order."""
    return torch.randint(-8, 9, shape, device=device).float()


def same_bits(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.view(torch.int32), y.view(torch.int32))


@shapes
@storage
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["w32", "w16"])
def test_each_step_rounds_once(on, N, K, R, halves, dtype):
    full, weight = torch.randn(2, N, K, device=on.device)
    weight = weight.to(dtype)
    adapters = []
    if R is not None:
        adapters = [whole_numbers(N, R, device=on.device), whole_numbers(R, K, device=on.device)]
    options = {"scale": 0.3, "tau": 0.9}
    found = moved(on, full, weight, *adapters, halves=halves, **options)
    assert same_bits(found, pinned(full, weight, *adapters, **options))


@shapes
def test_no_worse_than_eager(on, N, K, R):
    full, weight = torch.randn(2, N, K, device=on.device)
    adapters = []
    if R is not None:
        adapters = [torch.randn(N, R, device=on.device), torch.randn(R, K, device=on.device)]
    tensors = [full, weight, *adapters]
    options = {"scale": 2.0, "tau": 0.5}
    fast = moved(on, *tensors, **options)
    eager = moved(ema_update_.reference, *tensors, **options)
    exact = moved(ema_update_.reference, *[x.double() for x in tensors], **options)
    # R products in another order, then a scale, two sums and a product
    assert_no_worse(fast, eager, exact, rounding(R or 0, 4))


def test_b_a_is_a_chain_of_fused_multiply_adds_in_order(on):
    if on.name == "triton" and INTERPRET and triton.__version__ < "3.9":
        pytest.skip("this interpreter rounds a fused multiply-add twice")
    x = 1 + 2**-12
    rounded = float(np.float32(x) * np.float32(x))
    # the second product is added unrounded; the third sum is not that of the reverse order
    b_NR = torch.tensor([[1.0, x, 0.0], [1.0, 1.0, 1.0]], device=on.device)
    a_RK = torch.tensor([[-rounded, 1e8], [x, -1e8], [1.0, 1.0]], device=on.device)
    zeros = torch.zeros(2, 2, device=on.device)
    found = moved(on, zeros, zeros, b_NR, a_RK, tau=0.0)
    assert float(found[0, 0]) == x * x - rounded != 0
    assert float(found[1, 1]) == 1.0


def test_the_complement_of_tau_is_rounded_once(on):
    """1 - tau in fp32 of a tau in fp32 would be off by 6e-6 of itself."""
    found = moved(on, torch.zeros(4, device=on.device), torch.ones(4, device=on.device), tau=0.999)
    assert found.tolist() == [float(np.float32(1 - 0.999))] * 4


def awkward(device) -> Tensor:
    """128 values of all sizes and signs, and patterns around a tie of the bf16 rounding."""
    exponents = torch.tensor([2.0**e for e in (-140, -126, -40, -3, 0, 9, 60, 120)])
    spread = torch.cat([exponents, -exponents, torch.zeros(2), torch.tensor([-0.0, 1e-45])])
    bits = []
    for high in (0x3F80, 0x3F81, 0xBF80, 0xBF81, 0x0000, 0x8000, 0x7F7F, 0x00FF):
        for low in (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
            pattern = (high << 16) + low
            bits.append(pattern - (1 << 32) if pattern >> 31 else pattern)
    patterns = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    return torch.cat([spread, patterns, torch.randn(60)]).to(device)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["w32", "w16"])
def test_halves_are_an_fp32_tensor_bit_for_bit(on, adapter, dtype):
    full = torch.stack([awkward(on.device), awkward(on.device).flip(0)])
    high, low = split(full)
    assert same_bits(join(high, low), full)
    for step in range(5):
        weight = awkward(on.device).roll(step).repeat(2, 1).to(dtype)
        pair = ([], [])
        if adapter:
            pair = ([torch.randn(2, 3, device=on.device)], [torch.randn(3, 128, device=on.device)])
        options = {"scale": [1.7], "tau": (0.0, 0.5, 0.996, 1.0, 0.9)[step]}
        on([full], [weight], pair[0] or None, pair[1] or None, **options)
        on([high], [weight], pair[0] or None, pair[1] or None, remainder=[low], **options)
        assert same_bits(join(high, low), full), step
        # the high half alone is the nearest bf16, or one of two
        finite = high.isfinite()
        error = (high.float() - full).abs()[finite]
        assert bool((error <= (full.bfloat16().float() - full).abs()[finite]).all())


def test_an_exact_tie_rounds_up(on):
    """To nearest even, an even half would need the remainder +32768."""
    tie = torch.tensor([0x3F808000, 0x3F818000, 0x40008000], dtype=torch.int32)
    weight = tie.view(torch.float32).to(on.device)
    high, low = split(torch.zeros(3, device=on.device))
    on([high], [weight], remainder=[low], tau=0.0)
    assert high.view(torch.int16).tolist() == [0x3F81, 0x3F82, 0x4001]
    assert low.tolist() == [-32768] * 3
    assert same_bits(join(high, low), weight)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0x7F800001])
def test_a_nan_stays_one_in_the_half_that_is_read(on, bits):
    weight = torch.tensor([bits, 0x3F800000], dtype=torch.int32).view(torch.float32).to(on.device)
    high, low = split(torch.ones(2, device=on.device))
    on([high], [weight], remainder=[low], tau=TAU)
    assert high.isnan().tolist() == [True, False]
    if on.name == "cpp":
        # a processor keeps the sign of a NaN, a GPU has none with one
        high, low = split(torch.ones(2))
        on([high], [-weight], remainder=[low], tau=TAU)
        assert high.isnan().tolist() == [True, False]
    assert join(high, low).isnan().tolist() == [True, False]
    # the same by the reference
    high, low = split(weight)
    assert high.isnan().tolist() == [True, False] == join(high, low).isnan().tolist()


def test_tau_one_keeps_and_tau_zero_moves_all_the_way(on):
    full, weight = torch.randn(2, 5, 33, device=on.device)
    assert same_bits(moved(on, full, weight, tau=1.0), full)
    torch.testing.assert_close(moved(on, full, weight, tau=0.0), weight)


@storage
def test_many_matrices_in_one_call(on, halves):
    """Each with its own shape, scale, dtypes and rank, some unaligned, one empty."""
    device = on.device
    kinds = [
        # N, K, R, dtype of W, of B, of A, elements before the first of the storage
        (64, 64, 16, torch.bfloat16, torch.float32, torch.float32, 0),
        (64, 128, 16, torch.bfloat16, torch.float32, torch.float32, 0),
        (65, 48, 16, torch.bfloat16, torch.float32, torch.float32, 0),
        (20, 48, 16, torch.bfloat16, torch.float32, torch.float32, 3),
        (10, 10, 4, torch.float32, torch.bfloat16, torch.float32, 0),
        (10, 12, 2, torch.float32, torch.bfloat16, torch.bfloat16, 1),
        (0, 8, 2, torch.float32, torch.float32, torch.float32, 0),
        (6, 8, 0, torch.float32, torch.float32, torch.float32, 0),
    ]
    average, remainder, weight, b, a, expected = [], [], [], [], [], []
    scale = [0.25 * i for i in range(1, len(kinds) + 1)]
    for (N, K, R, w_dtype, b_dtype, a_dtype, offset), s in zip(kinds, scale, strict=True):
        full = torch.randn(N, K, device=device)
        w = torch.randn(N * K + offset, device=device).to(w_dtype)[offset:].view(N, K)
        b.append(whole_numbers(N, R, device=device).to(b_dtype))
        a.append(whole_numbers(R, K, device=device).to(a_dtype))
        expected.append(pinned(full, w, b[-1], a[-1], scale=s))
        high, low = stored(full, halves)
        average.append(high)
        remainder += low or []
        weight.append(w)
    on(average, weight, b, a, remainder=remainder or None, scale=scale, tau=TAU)
    for i, high in enumerate(average):
        found = join(high, remainder[i]) if halves else high
        assert same_bits(found, expected[i]), kinds[i]


def test_nothing_to_do(on):
    on([], [], tau=TAU)
    on([torch.empty(0, 3, device=on.device)], [torch.empty(0, 3, device=on.device)], tau=TAU)


def test_any_number_of_dimensions_without_an_adapter(on):
    full, weight = torch.randn(2, 3, 4, 5, device=on.device)
    assert same_bits(moved(on, full, weight), pinned(full, weight))
    full, weight = torch.randn(2, device=on.device)
    assert same_bits(moved(on, full, weight), pinned(full, weight))


def test_adapters_that_are_not_contiguous(on):
    full, weight = torch.randn(2, 20, 36, device=on.device)
    b_NR, a_RK = whole_numbers(20, 8, device=on.device), whole_numbers(8, 36, device=on.device)
    found = moved(on, full, weight, b_NR.T.contiguous().T, torch.cat([a_RK] * 2, 1)[:, :36])
    assert same_bits(found, pinned(full, weight, b_NR, a_RK))


def test_same_inputs_same_bits(on):
    full, weight = torch.randn(2, 33, 70, device=on.device)
    pair = torch.randn(33, 5, device=on.device), torch.randn(5, 70, device=on.device)
    assert same_bits(moved(on, full, weight, *pair), moved(on, full, weight, *pair))


def test_no_value_depends_on_where_it_lies(on):
    """A matrix alone, as a part of a longer one, and out of alignment."""
    full, weight, b_NR, a_RK = (
        torch.randn(s, device=on.device) for s in ((5, 70),) * 2 + ((5, 9), (9, 70))
    )
    found = moved(on, full, weight, b_NR, a_RK)
    longer = moved(on, *(torch.cat([x] * 14) for x in (full, weight, b_NR)), a_RK)
    assert same_bits(longer[:5], found) and same_bits(longer[-5:], found)
    narrow = [x[:, 3:].contiguous() for x in (full, weight)]
    assert same_bits(moved(on, *narrow, b_NR, a_RK[:, 3:].contiguous()), found[:, 3:].contiguous())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": []}, "weight must have one entry for each of 1 averages, got 0"),
        ({"scale": [1.0, 2.0]}, "scale must have one entry"),
        ({"b": None}, "b and a must be given together"),
        ({"average": [torch.zeros(4, 6).T]}, r"average\[0\] must be contiguous, got strides"),
        ({"average": [torch.zeros(6, 4).bfloat16()]}, "must be torch.float32, got torch.bfloat16"),
        ({"weight": [torch.zeros(4, 6)]}, r"weight\[0\] must be \[6, 4\], got \[4, 6\]"),
        ({"weight": [torch.zeros(6, 4).half()]}, "dtypes must be fp32 or bf16, got torch.float16"),
        ({"a": [torch.zeros(2, 4).double()]}, "dtypes must be fp32 or bf16, got torch.float64"),
        ({"a": [torch.zeros(3, 4)]}, r"must be \[N, R\] and \[R, K\] for \[6, 4\]"),
        ({"a": [torch.zeros(2, 4, device="meta")]}, r"a\[0\] must be on cpu, got meta"),
        (
            {
                "average": [torch.zeros(6, 4).bfloat16()],
                "remainder": [torch.zeros(6, 4, dtype=torch.int32)],
            },
            r"remainder\[0\] must be contiguous int16",
        ),
    ],
)
def test_bad_input_is_refused(on, change, message):
    if on.device != "cpu":
        pytest.skip("checked before a device matters")
    good = {
        "average": [torch.zeros(6, 4)],
        "weight": [torch.zeros(6, 4)],
        "b": [torch.zeros(6, 2)],
        "a": [torch.zeros(2, 4)],
    }
    with pytest.raises(ValueError, match=message):
        on(**{**good, **change}, tau=TAU)


@storage
def test_opcheck(on, halves):
    full, weight = torch.randn(2, 5, 6, device=on.device)
    average, remainder = stored(full, halves)
    b_NR, a_RK = torch.randn(5, 2, device=on.device), torch.randn(2, 6, device=on.device)
    op = getattr(torch.ops.smb, f"ema_update_{on.name}").default
    opcheck(op, ([average], remainder or [], [weight], [b_NR], [a_RK], [0.5], TAU))


def test_in_a_compiled_graph(on):
    function = ema_update_.on(on.name)

    def step(average, weight):
        function([average], [weight * 2], tau=0.5)
        return average + 1

    full, weight = torch.randn(2, 3, 4, device=on.device)
    expected, found = full.clone(), full.clone()
    step(expected, weight)
    after = torch.compile(step, fullgraph=True, backend="aot_eager")(found, weight)
    assert same_bits(found, expected) and same_bits(after, expected + 1)
