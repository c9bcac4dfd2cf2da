"""The head's cross-entropy in chunks against the formulas; logits are never held."""

from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from smbkernels import linear_cross_entropy
from smbkernels.cross_entropy import chunked, head_flops
from smbkernels.registry import OPS
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.tolerance import logits_size, rounding
from tests.oracle import assert_no_worse

pytestmark = pytest.mark.numeric

FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64
IN_BF16 = 2**-7  # a gradient element is rounded at other moments than eager's
NAMES = {"h": "hidden", "w": "weight", "t": "tokens"}
NEEDS = ["".join(n) for n in product("h ", "w ", "t ") if "".join(n).strip()]


def on(name: str, device: str):
    reason = OPS["linear_cross_entropy"].status(device)[name]
    if reason != "ok":
        pytest.skip(reason)
    return linear_cross_entropy.on(name)


@dataclass(frozen=True)
class Head:
    """Inputs of a call; `needs` says of which of hidden, weight and tokens a gradient is wanted."""

    hidden: Tensor
    weight: Tensor
    label: Tensor
    token: Tensor | None = None
    rows: Tensor | None = None
    needs: str = "hwt"

    @classmethod
    def of(cls, N, D, V, R=0, *, dtype=FP32, head=None, needs="hwt", device="cpu") -> "Head":
        """Random; some labels are rows that are trained apart."""

        def normal(*shape):
            return torch.randn(*shape, device=device).to(head or dtype)

        label = torch.randint(V, (N,), device=device)
        token = torch.randperm(V, device=device)[:R] if R else None
        if R and N:
            label[::3] = token[torch.arange(len(label[::3]), device=device) % R]
        hidden = normal(N, D).to(dtype)
        rows = normal(R, D) if R else None
        return cls(hidden, normal(V, D) / D**0.5, label, token, rows, needs)

    def to(self, dtype: torch.dtype) -> "Head":
        rows = None if self.rows is None else self.rows.to(dtype)
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), rows=rows)

    def leaves(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        hidden, weight, rows = (
            x if x is None else x.detach().requires_grad_(k in self.needs)
            for x, k in zip((self.hidden, self.weight, self.rows), "hwt", strict=True)
        )
        return hidden, weight, self.label, self.token, rows

    def run(self, f, scale: float = 0.25, grad: float = 1.0) -> dict[str, Tensor]:
        """The loss and the gradients by name."""
        leaves = self.leaves()
        loss = f(*leaves, scale=scale)
        loss.backward(torch.full_like(loss, grad))
        found = {"loss": loss.detach()}
        for key, leaf in zip("hwt", (leaves[0], leaves[1], leaves[4]), strict=True):
            wanted = leaf is not None and key in self.needs
            assert (leaf is not None and leaf.grad is not None) == wanted, key
            if wanted:
                found[key] = leaf.grad
        return found


def tolerance(name: str, head: Head) -> float:
    """A probability is off by as much as its logit, a sum over D; then comes a sum over N or V."""
    (N, D), V = head.hidden.shape, len(head.weight)
    if head.hidden.dtype == BF16:
        # the loss is summed in fp32 in either dtype
        return 2**-11 if name == "loss" else IN_BF16
    # logits stand in the loss as they are, and there their size is the loss's own
    size = 1.0 if name == "loss" else logits_size(head.hidden, head.weight)
    return rounding(D * size**2, max(N, V), dtype=head.hidden.dtype)


def check(f, head: Head, **options: float) -> None:
    # that the head is rounded to the dtype of the hidden states is part of the operation
    exact = head.to(head.hidden.dtype).to(FP64).run(linear_cross_entropy.reference, **options)
    eager, found = head.run(linear_cross_entropy.reference, **options), head.run(f, **options)
    assert found.keys() == eager.keys()
    for name, value in found.items():
        try:
            assert_no_worse(value, eager[name], exact[name], tolerance(name, head))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.fixture
def small_chunks(monkeypatch) -> None:
    for name in ("LEAST", "LEAST_ON_CUDA"):
        monkeypatch.setattr(f"smbkernels.cross_entropy.op.{name}", 4)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64])
@pytest.mark.parametrize("N", [0, 1, 3, 4, 5, 8, 9, 41])
@pytest.mark.parametrize("R", [0, 3])
def test_values_and_gradients_at_every_boundary_of_chunks(N, R, dtype, device, small_chunks):
    head = Head.of(N, 24, 260, R, dtype=dtype, device=device)
    check(linear_cross_entropy.on("chunked"), head)
    if not N:
        found = head.run(linear_cross_entropy.on("chunked"))
        assert all(not v.any() for v in found.values())


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_thousand_rows(dtype, device):
    check(linear_cross_entropy.on("chunked"), Head.of(1100, 32, 700, 5, dtype=dtype, device=device))


@pytest.mark.parametrize("needs", NEEDS)
def test_gradients_of_what_is_trained_alone(needs, device, small_chunks):
    check(linear_cross_entropy.on("chunked"), Head.of(9, 16, 90, 2, needs=needs, device=device))


@pytest.mark.parametrize("dtype, head", [(BF16, FP32), (FP32, BF16), (FP32, FP64)])
def test_a_head_of_another_dtype(dtype, head, device, small_chunks):
    shape = dict(dtype=dtype, head=head, device=device)
    check(linear_cross_entropy.on("chunked"), Head.of(9, 16, 90, 2, **shape))


def test_the_head_s_gradient_is_summed_over_chunks_in_fp32(monkeypatch, device):
    head = Head.of(1024, 8, 40, 3, dtype=BF16, device=device)
    whole = head.run(linear_cross_entropy.on("chunked"))
    for name in ("LEAST", "LEAST_ON_CUDA", "MOST"):
        monkeypatch.setattr(f"smbkernels.cross_entropy.op.{name}", 1)
    by_row = head.run(linear_cross_entropy.on("chunked"))
    for name in "wt":
        gap = (by_row[name].double() - whole[name].double()).norm() / whole[name].double().norm()
        assert gap < 2**-10, name  # 1024 sums in bf16 would lose several per cent


def test_extreme_logits(device, small_chunks):
    head = Head.of(9, 16, 90, 2, device=device)
    for size in (1e3, 1e-6):
        check(linear_cross_entropy.on("chunked"), replace(head, weight=head.weight * size))


@pytest.mark.parametrize("backend", ["torch", "chunked"])
def test_trained_rows_stand_in_for_those_of_the_head(backend, small_chunks):
    head = Head.of(9, 8, 30, 4, dtype=FP64)
    found = head.run(linear_cross_entropy.on(backend), scale=1.0)
    whole = head.weight.clone()
    whole[head.token] = head.rows
    plain = Head(head.hidden, whole, head.label).run(linear_cross_entropy.reference, scale=1.0)
    torch.testing.assert_close(found["loss"], plain["loss"])
    torch.testing.assert_close(found["h"], plain["h"])
    torch.testing.assert_close(found["t"], plain["w"][head.token])
    assert not found["w"][head.token].any()
    rest = torch.ones(30, dtype=torch.bool).index_fill(0, head.token, False)
    torch.testing.assert_close(found["w"][rest], plain["w"][rest])


def test_a_head_that_is_the_embedding_too(small_chunks):
    ids, table, label = torch.randint(20, (9,)), torch.randn(20, 8), torch.randint(20, (9,))
    found = []
    for f, dtype in (("chunked", FP32), ("torch", FP32), ("torch", FP64)):
        weight = table.to(dtype, copy=True).requires_grad_()
        linear_cross_entropy.on(f)(weight[ids].tanh(), weight, label, scale=0.5).backward()
        found.append(weight.grad)
    size = logits_size(table[ids].tanh(), table)
    assert_no_worse(*found, rounding(8 * size**2, 20))


@pytest.mark.parametrize("grad", [1.0, -0.37])
@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_the_incoming_gradient_counts(dtype, grad, device):
    head = Head.of(9, 16, 90, 2, dtype=dtype, device=device)
    check(linear_cross_entropy.on("chunked"), head, grad=grad)


def test_strided_inputs(device, small_chunks):
    wide = Head.of(9, 48, 40, 2, device=device)
    narrow = replace(wide, hidden=wide.hidden[:, 1:25], weight=wide.weight[:, ::2])
    check(linear_cross_entropy.on("chunked"), replace(narrow, rows=wide.rows[:, 24:]))
    by_column = torch.randn(16, 9, device=device).t(), torch.randn(16, 40, device=device).t()
    check(linear_cross_entropy.on("chunked"), Head(*by_column, wide.label))


def test_chunks_are_as_large_as_the_hidden_states_and_even():
    assert chunked.chunk_rows(32768, 4096, 151936) == 863  # in 38 chunks, N D / V = 883
    assert chunked.chunk_rows(4096, 4096, 151936) == 512
    assert chunked.chunk_rows(32768, 4096, 4096) == 2048
    assert chunked.chunk_rows(513, 64, 1000) == 257
    assert chunked.chunk_rows(1, 64, 1000) == 1 and chunked.chunk_rows(0, 64, 1000) == 0


class Large(TorchDispatchMode):
    """Holds every tensor of at least so many elements that an operation of torch returns."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.held = least, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor) and x.numel() >= self.least:
                self.held.append(x)
        return result


@pytest.mark.parametrize("dtype, buffers", [(FP32, 1), (BF16, 2)])
def test_logits_are_never_held(dtype, buffers):
    N, D, V = 2000, 8, 900
    head = Head.of(N, D, V, 3, dtype=dtype)
    C = chunked.chunk_rows(N, D, V)
    assert C == 500
    with Large(C * V) as large:
        arguments = (head.hidden, head.weight, head.label, head.token, head.rows, 1.0)
        chunked._launch(*arguments, True, False, True)
    # the same one or two buffers of a chunk, by all four chunks
    assert {x.untyped_storage().nbytes() // x.itemsize for x in large.held} == {C * V}
    assert len({x.untyped_storage().data_ptr() for x in large.held}) == buffers


def test_without_gradients_there_are_none(device, small_chunks):
    head = Head.of(9, 16, 90, 2, device=device)
    hidden, weight, label, token, rows = head.leaves()
    f = linear_cross_entropy.on("chunked")
    trained = f(hidden, weight, label, token, rows)
    with torch.no_grad():
        loss = f(hidden, weight, label, token, rows)
    assert trained.requires_grad and not loss.requires_grad
    assert torch.equal(loss, trained.detach())
    _, dhidden, dweight, dtoken = chunked._launch(
        head.hidden, head.weight, label, token, head.rows, 1.0, False, False, False
    )
    assert dhidden.numel() == dweight.numel() == dtoken.numel() == 0


def test_a_loss_may_be_differentiated_again_whatever_became_of_its_gradient():
    hidden, weight, label, *_ = Head.of(9, 16, 90).leaves()
    loss = linear_cross_entropy.on("chunked")(hidden, weight, label)
    (once,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    once = once.clone()
    loss.backward(retain_graph=True)
    hidden.grad.data.zero_()
    (3 * loss).backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(hidden.grad, 4 * once)


def test_a_second_derivative_is_refused_not_wrong():
    hidden, weight, label, *_ = Head.of(3, 8, 20).leaves()
    loss = linear_cross_entropy.on("chunked")(hidden, weight, label)
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    for penalized in (grad.square().sum(), loss + grad.square().sum()):
        with pytest.raises(NotImplementedError, match="no second derivative"):
            torch.autograd.grad(penalized, hidden, retain_graph=True)


def test_the_same_bits_again(device):
    head = Head.of(1100, 32, 300, 3, device=device)
    first, second = (head.run(linear_cross_entropy.on("chunked")) for _ in range(2))
    assert all(torch.equal(v, second[k]) for k, v in first.items())


@pytest.mark.parametrize("needs", NEEDS)
def test_custom_op(needs, device, small_chunks):
    head = Head.of(9, 12, 30, 2, needs=needs, device=device)
    wants = [k in needs for k in "hwt"]
    forward = torch.ops.smb.linear_cross_entropy_chunked.default
    # not the check that differentiates the gradients too, which is refused
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(forward, (*head.leaves(), 0.5, *wants), test_utils=tests)
    plain = Head.of(9, 12, 30, dtype=BF16, needs=needs, device=device)
    opcheck(forward, (*plain.leaves(), 0.5, *wants[:2], False), test_utils=tests)


@pytest.mark.parametrize("R", [0, 2])
def test_compiles_into_one_graph(R, device, small_chunks):
    head = Head.of(9, 12, 30, R, device=device)
    f = linear_cross_entropy.on("chunked")
    plain = head.run(f, grad=0.5)
    traced = head.run(torch.compile(f, fullgraph=True, backend="aot_eager"), grad=0.5)
    assert all(torch.equal(v, traced[k]) for k, v in plain.items())


@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
def test_under_autocast_it_is_the_reference(inside, small_chunks):
    head = Head.of(41, 32, 70, 3)
    found = []
    for name in ("torch", "chunked"):
        leaves = head.leaves()
        with torch.autocast("cpu", BF16):
            loss = linear_cross_entropy.on(name)(*leaves)
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found.append([loss.detach(), *(leaves[i].grad for i in (0, 1, 4))])
    for own, reference in zip(found[1], found[0], strict=True):
        assert own.dtype == reference.dtype == FP32
        assert float((own - reference).norm() / reference.norm()) < 2**-7  # roundings of bf16
    exact = linear_cross_entropy.reference(*head.leaves()).detach()
    assert not torch.equal(found[1][0], exact)  # it is bf16 that is multiplied


@pytest.mark.parametrize("needs", ["hwt", "ht", "h", "w", ""])
@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_flops_are_those_of_the_reference(needs, where):
    counted = {}
    for name in ("torch", "chunked"):
        leaves = Head.of(10, 24, 50, 3, needs=needs, device=where).leaves()
        f = linear_cross_entropy.on(name)
        with FlopCounterMode(display=False) as counter:
            loss = f(*leaves)
            if needs:
                loss.backward()
        counted[name] = counter.get_total_flops()
    wants = {NAMES[k]: k in needs for k in "hwt"}
    assert counted["chunked"] == counted["torch"] == head_flops(10, 24, 50, 3, **wants)


@pytest.mark.parametrize("needs, products", [("", 1), ("h", 2), ("w", 2), ("hw", 3)])
def test_flops_at_the_shape_of_an_8b_model_without_its_memory(needs, products):
    N, D, V = 4096, 4096, 151936
    head = Head.of(N, D, V, dtype=BF16, needs=needs, device="meta")
    f, leaves = linear_cross_entropy.on("chunked"), head.leaves()
    with FlopCounterMode(display=False) as counter:
        loss = f(*leaves)
        if needs:
            loss.backward()
    assert counter.get_total_flops() == products * 2 * N * V * D
    assert loss.dtype == FP32 and all(
        x.grad.shape == x.shape for x in leaves[:2] if x.requires_grad
    )
    assert linear_cross_entropy.flops(*leaves[:3]) == 2 * N * V * D
    rows = Head.of(4, 8, 20, 3, device="meta")
    assert linear_cross_entropy.flops(*rows.leaves()) == 2 * 4 * 8 * (20 + 3)


def test_bad_input_is_refused():
    f, head = linear_cross_entropy.on("chunked"), Head.of(4, 8, 20, 2)
    good = dict(zip(("hidden_ND", "weight_VD", "label_N"), head.leaves(), strict=False))
    rows = {"token_R": head.token, "token_weight_RD": head.rows}
    bad = {
        r"hidden_ND must be \[N, D\]": {"hidden_ND": head.hidden[0]},
        r"weight_VD must be \[V, 8\]": {"weight_VD": head.weight[:, :7]},
        "label_N must be int64": {"label_N": head.label.int()},
        r"label_N must be int64 of shape \[4\]": {"label_N": head.label[:3]},
        "must be given together, got token_R alone": {"token_R": head.token},
        "together, got token_weight_RD alone": {"token_weight_RD": head.rows},
        "token_R must be int64": {**rows, "token_R": head.token.int()},
        r"token_weight_RD must be \[2, 8\]": {**rows, "token_weight_RD": head.rows.t()},
        "label_N must be on cpu, got meta": {"label_N": head.label.to("meta")},
    }
    for message, change in bad.items():
        with pytest.raises(ValueError, match=message):
            f(**(good | change))


def test_chunked_is_the_choice():
    loss = linear_cross_entropy(*Head.of(4, 8, 20).leaves())
    assert "smb_linear_cross_entropy_chunked" in type(loss.grad_fn).__name__
