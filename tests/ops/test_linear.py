"""Linears by oneDNN against the formulas in fp64, and what multiplies as they are told to."""

import pytest
import torch
from smbkernels import linear, linear_cross_entropy, lora_linear, use
from smbkernels.matmul import measure, products
from smbkernels.operation import FORCED, Op
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.tolerance import rounding
from tests.oracle import assert_no_worse

pytestmark = pytest.mark.numeric
BACKENDS = ["onednn", "onednn_rows"]
# rows that are padded and rows that are not, on both sides of `NARROW` and of `LEAST_SIZE`
SIZES = [(0, 8, 4), (1, 33, 5), (1000, 96, 256), (513, 255, 96), (1025, 256, 96), (300, 512, 257)]


@pytest.fixture(autouse=True)
def _onednn():
    if reason := products.missing("cpu"):
        pytest.skip(reason)


@pytest.fixture(params=[0, products.LEAST_SIZE], ids=["all", "large"])
def least(request, monkeypatch) -> None:
    """Small products are oneDNN's as well, or torch's."""
    monkeypatch.setattr(products, "LEAST_SIZE", request.param)


def outcome(function, inputs: list[Tensor], dy_TN: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The output and the gradients of what needs one."""
    leaves = [v.to(dtype).detach().requires_grad_(v.requires_grad) for v in inputs]
    y_TN = function(*leaves)
    y_TN.backward(dy_TN.to(dtype))
    return [y_TN.detach(), *(v.grad for v in leaves if v.requires_grad)]


@pytest.mark.parametrize("T, K, N", SIZES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients(backend, T, K, N, least):
    inputs = [torch.randn(s).requires_grad_() for s in ((T, K), (N, K), (N,))]
    dy_TN = torch.randn(T, N)
    fast = outcome(linear.on(backend), inputs, dy_TN, torch.float32)
    eager = outcome(linear.reference, inputs, dy_TN, torch.float32)
    exact = outcome(linear.reference, inputs, dy_TN, torch.float64)
    # y, dx, dW and dbias are sums of K, N, T and T products, one of them each
    for triple, length in zip(zip(fast, eager, exact, strict=True), (K, N, T, T), strict=True):
        assert_no_worse(*triple, rounding(length + 1))
        if T:
            error = float((triple[0] - triple[2]).norm() / triple[2].norm())
            assert error <= products.MOST_ERROR


@pytest.mark.parametrize("needs", ["x", "w", "b", "xw", "xb"])
def test_only_gradients_that_are_wanted(needs):
    inputs = [torch.randn(s) for s in ((700, 96), (80, 96), (80,))]
    for name, tensor in zip("xwb", inputs, strict=True):
        tensor.requires_grad_(name in needs)
    leaves = [v.detach().requires_grad_(v.requires_grad) for v in inputs]
    linear.on("onednn")(*leaves).sum().backward()
    assert [v.grad is not None for v in leaves] == [name in needs for name in "xwb"]


def test_any_number_of_dimensions():
    x, weight_NK = torch.randn(3, 5, 7, requires_grad=True), torch.randn(4, 7)
    y = linear.on("onednn")(x, weight_NK)
    torch.testing.assert_close(y, linear.reference(x, weight_NK))
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    (expected,) = torch.autograd.grad(linear.reference(x, weight_NK).square().sum(), x)
    torch.testing.assert_close(dx, expected)
    assert linear.on("onednn")(torch.randn(7), weight_NK).shape == (4,)


def test_a_row_does_not_depend_on_how_many_there_are(least):
    """The record after a prediction time must not change a bit of what is before it."""
    for K in (96, 512):
        x_TK, weight_NK = torch.randn(700, K), torch.randn(160, K)
        whole_TN = linear.on("onednn")(x_TK, weight_NK)
        for T in (2, 31, 64, 333):
            assert torch.equal(linear.on("onednn")(x_TK[:T], weight_NK), whole_TN[:T]), (T, K)


def test_the_same_bits_again_and_through_the_op(least):
    x_TK, weight_NK = torch.randn(777, 200, requires_grad=True), torch.randn(300, 200)
    first = linear.on("onednn")(x_TK, weight_NK)
    assert torch.equal(first, linear.on("onednn")(x_TK, weight_NK))
    assert torch.equal(first, torch.ops.smb.linear_onednn(x_TK, weight_NK, None))


def test_an_output_may_be_written_into(least):
    """As the norm of queries and keys does; a view made in a backward by hand would refuse it."""
    x_TK, weight_NK = torch.randn(1001, 96, requires_grad=True), torch.randn(96, 96)
    y_TN = linear.on("onednn")(x_TK, weight_NK)
    y_TN.mul_(2.0).sum().backward()
    assert x_TK.grad is not None and torch.isfinite(x_TK.grad).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, least):
    operation = getattr(torch.ops.smb, f"linear_{backend}").default
    for bias_N in (None, torch.randn(40, requires_grad=True)):
        x_TK, weight_NK = (torch.randn(s, requires_grad=True) for s in ((50, 24), (40, 24)))
        opcheck(operation, (x_TK, weight_NK, bias_N))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_into_one_graph(backend):
    x_TK, weight_NK = (torch.randn(s, requires_grad=True) for s in ((50, 24), (40, 24)))
    results = []
    for function in (
        linear.on(backend),
        torch.compile(linear.on(backend), fullgraph=True, backend="aot_eager"),
    ):
        y_TN = function(x_TK, weight_NK)
        results.append([y_TN, *torch.autograd.grad(y_TN.square().sum(), (x_TK, weight_NK))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", ["torch", *BACKENDS])
@pytest.mark.parametrize("trained", [True, False])
def test_flops_are_counted(backend, trained):
    x_TK = torch.randn(9, 8, requires_grad=True)
    weight_NK = torch.randn(6, 8, requires_grad=trained)
    with use(linear=backend), FlopCounterMode(display=False) as counter:
        linear(x_TK, weight_NK).sum().backward()
    assert counter.get_total_flops() == (2 + trained) * linear.flops(x_TK, weight_NK)
    assert linear.flops(x_TK, weight_NK) == 2 * 9 * 8 * 6


def test_bad_input_is_refused():
    fast = linear.on("onednn")
    with pytest.raises(ValueError, match=r"weight_NK must be \[N, 3\], got \[2, 4\]"):
        fast(torch.ones(5, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"bias_N must be \[2\], got \[3\]"):
        fast(torch.ones(5, 4), torch.ones(2, 4), torch.ones(3))
    with pytest.raises(ValueError, match=r"dtypes must be fp32, got torch\.float64"):
        fast(torch.ones(5, 4).double(), torch.ones(2, 4).double())


def test_autocast_is_torch_s():
    x_TK, weight_NK = torch.randn(50, 24), torch.randn(40, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y_TN = linear.on("onednn")(x_TK, weight_NK)
        assert y_TN.dtype == torch.bfloat16
        assert torch.equal(y_TN, linear.reference(x_TK, weight_NK))


@pytest.fixture
def anew():
    """The reason why oneDNN cannot run is asked for anew, in the test and after it."""
    products.reason_against.cache_clear()
    yield
    products.reason_against.cache_clear()


def reasons() -> str:
    """Why, said by each that multiplies."""
    x_TK, weight_NK = torch.ones(4, 3), torch.ones(2, 3)
    told = set()
    for call in (
        lambda: linear(x_TK, weight_NK),
        lambda: lora_linear(x_TK, [weight_NK], [weight_NK], [torch.ones(3, 3)], scale=[1.0]),
        lambda: linear_cross_entropy(x_TK, weight_NK, torch.zeros(4, dtype=torch.long)),
    ):
        with use(linear="onednn"), pytest.raises(ValueError, match="linear cannot run on") as error:
            call()
        told.add(str(error.value))
    (reason,) = told
    return reason


def test_amx_is_refused(monkeypatch, anew):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert "AMX" in reasons() and "bf16" in reasons()
    assert "AMX" in linear.status("cpu")["onednn"]
    assert measure.measured([(512, 512)]).fastest == "torch"


def test_products_that_are_not_exact_enough_are_refused(monkeypatch, anew):
    exact = products._product
    rounded = lambda left, right, bias=None: exact(left.bfloat16().float(), right, bias)  # noqa: E731
    monkeypatch.setattr(products, "_product", rounded)
    assert "its products must be within 1e-06 of fp64, got 1" in reasons()


def test_a_library_whose_rows_depend_on_their_number_is_refused(monkeypatch, anew):
    monkeypatch.setattr(products, "_rows_are_alike", lambda: False)
    assert "depend on how many rows there are" in products.missing("cpu")


def test_a_torch_without_onednn_is_refused(monkeypatch, anew):
    monkeypatch.setattr(products, "has_onednn", lambda: False)
    assert "was built without oneDNN" in reasons()


def test_on_another_device_it_says_so():
    assert products.missing("cuda") == "tensors are on cuda"


def grads_of(operation: Op, backend: str, dtype: torch.dtype) -> list[Tensor]:
    """Outputs and gradients of an operation that multiplies inside, always on the same numbers."""
    torch.manual_seed(0)
    if operation is lora_linear:
        x_TK = torch.randn(515, 120)
        groups = [
            [torch.randn(n, k) for n, k in s]
            for s in (((120, 120), (64, 120)), ((120, 8), (64, 8)), ((8, 120), (8, 120)))
        ]
        x_TK, (weight, b, a) = x_TK.to(dtype), ([v.to(dtype) for v in g] for g in groups)
        leaves = [v.requires_grad_() for v in (x_TK, *b, *a)]
        with use(linear=backend):
            ys = lora_linear(x_TK, weight, b, a, scale=[2.0, 0.5])
            return [*ys, *torch.autograd.grad([y.square().sum() for y in ys], leaves)]
    hidden_ND, weight_VD, token_RD = (
        torch.randn(s).to(dtype) for s in ((515, 60), (700, 60), (2, 60))
    )
    leaves = [v.requires_grad_() for v in (hidden_ND, weight_VD, token_RD)]
    label_N, token_R = torch.randint(700, (515,)), torch.tensor([3, 5])
    with use(linear=backend):
        loss = linear_cross_entropy(hidden_ND, weight_VD, label_N, token_R, token_RD, scale=0.5)
        return [loss, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("operation", [lora_linear, linear_cross_entropy], ids=lambda o: o.name)
def test_what_multiplies_inside_follows(operation, monkeypatch):
    """Values and gradients, and that oneDNN is really asked."""
    monkeypatch.setattr(products, "LEAST_SIZE", 0)
    asked, product = [], products._product
    monkeypatch.setattr(
        products, "_product", lambda *factors: asked.append(len(factors[0])) or product(*factors)
    )
    fast = grads_of(operation, "onednn_rows", torch.float32)
    # 515 rows, padded to 544; the head in two chunks of 258 and 257, padded to 288
    assert set(asked) == ({544} if operation is lora_linear else {288})
    asked.clear()
    eager = grads_of(operation, "torch", torch.float32)
    assert not asked
    exact = grads_of(operation, "torch", torch.float64)
    for triple in zip(fast, eager, exact, strict=True):
        # outputs are squared: a value goes through sums of at most 120, 120, 8 and 515 terms
        assert_no_worse(*triple, rounding(120, 120, 8, 700, size=4.0))


class Clock:
    """Seconds that a thread was on a processor, by which backend is forced meanwhile."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.now = seconds, 0.0

    def thread_time(self) -> float:
        self.now += self.seconds[FORCED.get("linear", "torch")]
        return self.now


@pytest.mark.parametrize(
    "seconds, fastest",
    [
        ((1.0, 0.5, 0.6), "onednn"),
        ((1.0, 0.6, 0.5), "onednn_rows"),
        ((1.0, 0.95, 0.96), "torch"),  # too little to be sure of
        ((1.0, 1.5, 1.6), "torch"),
    ],
)
def test_the_fastest_is_chosen_if_it_is_clearly_faster(seconds, fastest, monkeypatch):
    times = dict(zip(("torch", "onednn", "onednn_rows"), seconds, strict=True))
    monkeypatch.setattr(measure, "time", Clock(times))
    threads = torch.get_num_threads()
    result = measure.measured([(64, 64), (1024, 1024)])
    assert result.fastest == fastest
    assert result.gain("onednn") == pytest.approx(times["torch"] / times["onednn"])
    assert torch.get_num_threads() == threads


def test_adapters_and_small_products_are_measured_as_they_are():
    adapted = measure.measured([(64, 64)], rank=4)
    assert set(adapted.seconds) == {"torch", "onednn_rows"}
    small = measure.measured([(32, 64)])
    assert small.fastest == "torch" and "too small" in small.reason


@pytest.mark.parametrize("T", [1, 37, 2001])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lora_groups_with_widths_on_both_sides_of_the_padding(backend, frozen, T):
    """Queries wider than what is padded and keys narrower, as in models with grouped heads."""
    K, widths, R = 64, (products.NARROW * 2, 128, 128), 4
    x_TK = torch.randn(T, K, requires_grad=not frozen)
    weight = [torch.randn(n, K) for n in widths]
    b = [torch.randn(n, R, requires_grad=True) for n in widths]
    a = [torch.randn(R, K, requires_grad=True) for _ in widths]
    dy = [torch.randn(T, n) for n in widths]
    leaves = [*([] if frozen else [x_TK]), *b, *a]
    with use(linear=backend):
        ours = torch.autograd.grad(lora_linear(x_TK, weight, b, a, scale=[0.5] * 3), leaves, dy)
    exact_leaves = [v.detach().double().requires_grad_() for v in leaves]
    x, *rest = exact_leaves if not frozen else [x_TK.double(), *exact_leaves]
    wide = [w.double() for w in weight]
    outputs = lora_linear.reference(x, wide, rest[:3], rest[3:], scale=[0.5] * 3)
    exact = torch.autograd.grad(outputs, exact_leaves, [v.double() for v in dy])
    for one, other in zip(ours, exact, strict=True):
        assert float((one - other).norm() / other.norm()) < products.MOST_ERROR


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_of_any_stride(backend):
    x_TK, weight_NK = torch.randn(70, 96), torch.randn(200, 96)
    for bias_N in (torch.randn(400)[::2], torch.randn(1).expand(200)):
        with use(linear=backend):
            ours = linear(x_TK, weight_NK, bias_N)
        torch.testing.assert_close(ours, torch.nn.functional.linear(x_TK, weight_NK, bias_N))
