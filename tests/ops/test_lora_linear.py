"""LoRA linears: fused ATen and Triton against the formulas, forward and backward."""

from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from smbkernels import lora_linear
from smbkernels.lora import lora_flops
from smbkernels.registry import OPS
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.tolerance import rounding
from tests.oracle import assert_no_worse

pytestmark = pytest.mark.numeric

triton_lora = pytest.importorskip("smbkernels.lora.triton")

FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64
# a gradient of three linears is rounded after each of six products, where a single element may be
# unlucky and eager lucky: there the root mean square is held to what eager has, too
IN_BF16 = 2**-6


@dataclass(frozen=True)
class Group:
    """Inputs of a call; `needs` says of which x, B and A a gradient is wanted."""

    x: Tensor
    weight: list[Tensor]
    b: list[Tensor]
    a: list[Tensor]
    scale: list[float]
    bias: list[Tensor] | None
    dy: list[Tensor]
    needs: str = "xba"

    @classmethod
    def of(cls, lead, K, N, R, *, dtype=FP32, factor=None, bias=False, device="cpu") -> "Group":
        """Random, of a size that makes base and adapter count alike."""

        def normal(*shape, dtype=dtype):
            return torch.randn(*shape, device=device).to(dtype)

        factor = factor or dtype
        return cls(
            x=normal(*lead, K),
            weight=[normal(n, K) / K**0.5 for n in N],
            b=[normal(n, r, dtype=factor) / r**0.5 for n, r in zip(N, R, strict=True)],
            a=[normal(r, K, dtype=factor) / K**0.5 for r in R],
            scale=[2.0, 0.5, 1.25][: len(N)],
            bias=[normal(n) for n in N] if bias else None,
            dy=[normal(*lead, n) for n in N],
        )

    def to(self, dtype: torch.dtype) -> "Group":
        lists = {k: [v.to(dtype) for v in getattr(self, k)] for k in ("weight", "b", "a", "dy")}
        bias = None if self.bias is None else [v.to(dtype) for v in self.bias]
        return replace(self, x=self.x.to(dtype), bias=bias, **lists)

    def tolerance(self) -> float:
        """No value goes through more than one sum over tokens, over K, over all N and over R."""
        if self.x.dtype == BF16:
            return IN_BF16
        K, outputs = self.x.shape[-1], sum(len(w) for w in self.weight)
        return rounding(self.x.numel() // K, K, outputs, max(len(a) for a in self.a))

    def leaves(self) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        x = self.x.detach().requires_grad_("x" in self.needs)
        b = [v.detach().requires_grad_("b" in self.needs) for v in self.b]
        return x, b, [v.detach().requires_grad_("a" in self.needs) for v in self.a]

    def run(self, f) -> dict[str, Tensor]:
        """Outputs and gradients by name."""
        x, b, a = self.leaves()
        ys = f(x, self.weight, b, a, scale=self.scale, bias=self.bias)
        torch.autograd.backward(ys, self.dy)
        found = {f"y{i}": y.detach() for i, y in enumerate(ys)}
        grads = {"x": x.grad}
        for i in range(len(a)):
            grads |= {f"b{i}": b[i].grad, f"a{i}": a[i].grad}
        assert all((g is not None) == (name[0] in self.needs) for name, g in grads.items())
        return found | {f"d{k}": g for k, g in grads.items() if g is not None}


def check(f, group: Group) -> None:
    # that factors are rounded to the dtype of x is part of the operation
    exact = group.to(group.x.dtype).to(FP64).run(lora_linear.reference)
    eager, found = group.run(lora_linear.reference), group.run(f)
    assert found.keys() == exact.keys()
    for name, value in found.items():
        try:
            assert_no_worse(value, eager[name], exact[name], group.tolerance())
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
        if group.x.dtype == BF16 and value.numel() > 1000:
            error, allowed = (rms(v.double() - exact[name]) for v in (value, eager[name]))
            assert error <= 1.05 * allowed, (name, error, allowed)


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


CASES = {
    "one": dict(lead=(70,), K=96, N=[80], R=[16]),
    # a group of the shape of Q K V, with ragged everything, three dimensions and a bias
    "qkv": dict(lead=(3, 11), K=67, N=[130, 33, 33], R=[16, 16, 16], bias=True),
    # unequal ranks: the parts of a stack do not begin where a 16-byte load may
    "unequal": dict(lead=(65,), K=40, N=[40, 72], R=[5, 16]),
    "rank 1": dict(lead=(33,), K=48, N=[36], R=[1], bias=True),
    # more than one block of ranks in x A' of the group, and the two-kernel backward
    "rank 64": dict(lead=(66,), K=80, N=[72, 72], R=[64, 64]),
    # several spans of columns in the rows kernel, summed into parts of a stack; and of rows in the
    # columns kernel
    "wide": dict(lead=(10,), K=300, N=[290, 270], R=[4, 3]),
    "long": dict(lead=(520,), K=24, N=[20], R=[4]),
    "one token": dict(lead=(1,), K=64, N=[48, 16], R=[8, 8]),
    "no token": dict(lead=(2, 0), K=64, N=[48, 16], R=[8, 8], bias=True),
    "a vector": dict(lead=(), K=32, N=[48], R=[8]),
}
BACKENDS = ["fused", "triton"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients_in_fp32(backend, case, device):
    check(lora_linear.on(backend), Group.of(**CASES[case], device=device))


@pytest.mark.parametrize("factor", [BF16, FP32])
@pytest.mark.parametrize("case", CASES)
def test_fused_in_bf16(case, factor, device):
    check(
        lora_linear.on("fused"), Group.of(**CASES[case], dtype=BF16, factor=factor, device=device)
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter gets bf16 wrong")
@pytest.mark.parametrize("factor", [BF16, FP32])
@pytest.mark.parametrize("case", CASES)
def test_triton_in_bf16(case, factor):
    group = Group.of(**CASES[case], dtype=BF16, factor=factor, device="cuda")
    check(lora_linear.on("triton"), group)


@pytest.mark.parametrize("low_first", [True, False])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_either_order_of_the_products(low_first, dtype, monkeypatch, device):
    monkeypatch.setattr("smbkernels.lora.products.low_first", lambda device: low_first)
    check(lora_linear.on("fused"), Group.of(**CASES["qkv"], dtype=dtype, device=device))
    check(lora_linear.on("fused"), Group.of(**CASES["unequal"], dtype=dtype, device=device))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="oneDNN rounds a product before it adds")
def test_the_low_product_first_rounds_less(monkeypatch):
    group = Group.of((256,), 128, [128], [16], dtype=BF16, device="cuda")
    exact, error = group.to(FP64).run(lora_linear.reference)["y0"], {}
    for first in (True, False):
        monkeypatch.setattr("smbkernels.lora.products.low_first", lambda device, first=first: first)
        error[first] = rms(group.run(lora_linear.on("fused"))["y0"].double() - exact)
    assert error[True] < 0.9 * error[False]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", ["x", "a", "b", "ba", "xa", "xb"])
def test_only_what_is_needed(backend, needs, device):
    check(lora_linear.on(backend), replace(Group.of(**CASES["qkv"], device=device), needs=needs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_frozen_factor_of_a_group(backend, device):
    group = Group.of(**CASES["unequal"], device=device)
    every = group.run(lora_linear.on(backend))
    for x_needed in (True, False):
        x, b, a = group.leaves()
        a[0].requires_grad_(False)
        b[1].requires_grad_(False)
        x.requires_grad_(x_needed)
        ys = lora_linear.on(backend)(x, group.weight, b, a, scale=group.scale)
        torch.autograd.backward(ys, group.dy)
        assert a[0].grad is None and b[1].grad is None and (x.grad is None) != x_needed
        # other columns of a product, summed in another order
        torch.testing.assert_close(a[1].grad, every["da1"])
        torch.testing.assert_close(b[0].grad, every["db0"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_output_that_no_loss_reads(backend, device):
    group = Group.of(**CASES["unequal"], device=device)
    found = []
    for f in (lora_linear.on(backend), lora_linear.reference):
        x, b, a = group.leaves()
        ys = f(x, group.weight, b, a, scale=group.scale)
        ys[1].backward(group.dy[1])
        found.append((x.grad, b[1].grad, a[1].grad))
    torch.testing.assert_close(*found)
    assert b[0].grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend, device):
    group = Group.of((6, 10), 64, [48], [8], device=device)
    wide = torch.randn(6, 10, 128, device=device)
    by_token = torch.randn(10, 6, 64, device=device).transpose(0, 1)
    expanded = torch.ones((), device=device).expand(6, 10, 48)
    for x, dy in ((wide[..., 3:67], expanded), (wide[..., ::2], wide[..., 70:118])):
        check(lora_linear.on(backend), replace(group, x=x, dy=[dy]))
    check(lora_linear.on(backend), replace(group, x=by_token))
    # factors that are views, as a sharded or transposed parameter may be
    b, a = torch.randn(8, 48, device=device).t(), torch.randn(8, 96, device=device)[:, 1:65]
    check(lora_linear.on(backend), replace(group, b=[b], a=[a]))


def test_the_tiles_of_bf16_in_fp32(monkeypatch, device):
    if device != "cpu":
        pytest.skip("fp32 does not fit the shared memory; the tests in bf16 run these tiles")
    of, asked = triton_lora.Settings.of, []
    monkeypatch.setattr(
        triton_lora.Settings, "of", lambda r, _, kind: asked.append(kind) or of(r, 2, kind)
    )
    check(lora_linear.on("triton"), Group.of((260,), 140, [290], [16]))
    assert {"rows", "both", "columns"} <= set(asked)


def test_fused_backward_by_finite_differences():
    for needs, bias in product(["xba", "ba", "xb", "xa"], [False, True]):
        group = Group.of((2, 3), 5, [4, 3], [2, 1], dtype=FP64, bias=bias)
        x, b, a = replace(group, needs=needs).leaves()

        def f(x, b0, b1, a0, a1, g=group):
            ys = lora_linear.on("fused")(
                x, g.weight, [b0, b1], [a0, a1], scale=g.scale, bias=g.bias
            )
            return tuple(ys)

        assert torch.autograd.gradcheck(f, (x, *b, *a))


def test_no_second_derivative_rather_than_a_wrong_one():
    x, b, a = (group := Group.of((3,), 5, [4], [2])).leaves()
    (y,) = lora_linear.on("fused")(x, group.weight, b, a, scale=group.scale)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_custom_ops(backend, device):
    group = Group.of((2, 9), 24, [20, 12], [4, 3], bias=True, device=device)
    x, b, a = group.leaves()
    fwd = getattr(torch.ops.smb, f"lora_linear_{backend}").default
    opcheck(fwd, (x, group.weight, b, a, group.scale, group.bias))
    low = torch.randn(18, 7, device=device)
    bwd = getattr(torch.ops.smb, f"lora_linear_{backend}_bwd").default
    tensors = (group.dy, group.x, low, group.weight, group.b, group.a, group.scale)
    opcheck(bwd, (*tensors, True, [True, True], [True, True]))
    opcheck(bwd, (*tensors, False, [False, True], [True, False]))
    kept = (group.dy, None, None, *tensors[3:])
    opcheck(bwd, (*kept, True, [False, False], [False, False]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_into_one_graph(backend, device):
    group = Group.of(**CASES["qkv"], device=device)
    f = lora_linear.on(backend)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    plain, traced = group.run(f), group.run(compiled)
    for name, value in plain.items():
        assert torch.equal(value, traced[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["wide", "long", "unequal"])
def test_same_bits_again_and_through_the_op(backend, case, device):
    group = Group.of(**CASES[case], device=device)
    first, second = group.run(lora_linear.on(backend)), group.run(lora_linear.on(backend))
    with FlopCounterMode(display=False):  # any mode takes the way of the custom op
        through_op = group.run(lora_linear.on(backend))
    with torch.no_grad():
        x, b, a = group.leaves()
        without = lora_linear.on(backend)(x, group.weight, b, a, scale=group.scale)
    assert torch.equal(without[0], first["y0"]) and not without[0].requires_grad
    for name, value in first.items():
        assert torch.equal(value, second[name]) and torch.equal(value, through_op[name]), name


NEEDS = [n for n in ("".join(v) for v in product(*[(c, "") for c in "xba"])) if n]


@pytest.mark.parametrize("where", ["cpu", "meta"])
@pytest.mark.parametrize("needs", NEEDS)
def test_flops_are_those_of_the_reference(needs, where):
    group = replace(Group.of((2, 5), 24, [20, 12], [4, 3], device=where), needs=needs)
    counted = {}
    for name in ("torch", "fused"):
        x, b, a = group.leaves()
        with FlopCounterMode(display=False) as forward:
            ys = lora_linear.on(name)(x, group.weight, b, a, scale=group.scale)
        with FlopCounterMode(display=False) as backward:
            torch.autograd.backward(ys, group.dy)
        counted[name] = forward.get_total_flops(), backward.get_total_flops()
    assert counted["fused"] == counted["torch"]
    wants = {f"needs_{c}": [c in needs] * 2 for c in "ba"} | {"needs_x": "x" in needs}
    shapes = ([(20, 24), (12, 24)], [4, 3])
    assert counted["fused"][1] == lora_flops(10, *shapes, backward=True, **wants)
    arguments = (group.x, group.weight, group.b, group.a)
    assert counted["fused"][0] == lora_linear.flops(*arguments, scale=group.scale)


def test_triton_counts_the_same_flops(device):
    group = Group.of((5,), 24, [20, 12], [4, 3], device=device)
    with FlopCounterMode(display=False) as counter:
        group.run(lora_linear.on("triton"))
    shapes = ([(20, 24), (12, 24)], [4, 3])
    expected = [lora_flops(5, *shapes, backward=way) for way in (False, True)]
    assert counter.get_total_flops() == sum(expected)


def test_flops_at_the_shape_of_an_8b_model_without_its_memory():
    group = Group.of((4096,), 4096, [4096, 1024, 1024], [16] * 3, dtype=BF16, device="meta")
    with FlopCounterMode(display=False) as counter:
        found = group.run(lora_linear.on("fused"))
    assert found["dx"].shape == (4096, 4096) and found["db1"].shape == (1024, 16)
    base = 2 * 4096 * 6144 * 4096
    low = 2 * 4096 * 16 * (6144 + 3 * 4096)
    assert counter.get_total_flops() == 2 * base + 3 * low


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "needs, kept", [("xba", 33 * 48 + 33 * 12), ("xb", 33 * 12), ("a", 33 * 48), ("x", 0)]
)
def test_what_is_kept_for_the_backward(backend, needs, kept, device):
    group = replace(Group.of((33,), 48, [40, 56], [4, 8], device=device), needs=needs)
    x, b, a = group.leaves()
    parameters = {v.data_ptr() for v in (*group.weight, *b, *a)}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear.on(backend)(x, group.weight, b, a, scale=group.scale)
    sizes = [t.numel() for t in saved if t.data_ptr() not in parameters]
    assert sum(sizes) == kept


def _offset_tensor(path, rows: int, stride: int, columns: int) -> Tensor:
    """[rows, columns], rows far apart in a file with a hole: only what is touched takes memory."""
    path.touch()
    flat = torch.from_file(str(path), shared=True, size=(rows - 1) * stride + columns, dtype=BF16)
    view = flat.as_strided((rows, columns), (stride, 1))
    view.copy_(torch.randint(-4, 5, view.shape))
    return view


def test_offsets_above_31_bits(tmp_path, monkeypatch, device):
    if device != "cpu":
        pytest.skip("a sparse file stands in for a tensor of 4 GB on a CPU alone")
    # tiles of 16 rows, 2^27 elements apart: the second tile begins at 2^31
    small = triton_lora.Settings(16, 16, 16, 4, 1)
    monkeypatch.setattr(triton_lora.Settings, "of", lambda *_: small)
    monkeypatch.setattr(triton_lora, "_PROGRAMS", 1)
    x_TC = _offset_tensor(tmp_path / "x", 17, 2**27, 20)
    # small integers: exact in any dtype
    factor_CR, low_TR = (torch.randint(-4, 5, (n, 3)).float() for n in (20, 17))
    out_TR, db_CR, columns_CR = torch.empty(17, 3), torch.empty(20, 3), torch.empty(20, 3)
    triton_lora._launch_rows(out_TR, x_TC, factor_CR, 2.0, low_TR, db_CR)
    triton_lora._launch_columns(columns_CR, x_TC, low_TR, 2.0, transposed=False)
    assert torch.equal(out_TR, 2 * x_TC.float() @ factor_CR)
    assert torch.equal(db_CR, 2 * x_TC.float().t() @ low_TR)
    assert torch.equal(columns_CR, db_CR)


def test_bad_input_is_refused(device):
    group = Group.of((4,), 8, [6, 5], [2, 3], device=device)
    good = dict(weight=group.weight, b=group.b, a=group.a, scale=group.scale, bias=None)
    bad = {
        "weight must hold at least one": dict(weight=[], b=[], a=[], scale=[]),
        "scale must have one entry": dict(scale=[1.0]),
        "bias must have one entry": dict(bias=[torch.ones(6)]),
        r"weight\[0\] must be torch.float32 \[N, 8\]": dict(weight=[torch.ones(6, 7)] * 2),
        r"weight\[0\] must be torch.float32 ": dict(weight=[group.weight[0].bfloat16()] * 2),
        r"b\[0\] and a\[0\] must be \[6, R\]": dict(b=group.b[::-1]),
        r"b\[1\] and a\[1\] must be fp32": dict(b=[group.b[0], group.b[1].double()]),
        r"bias\[1\] must be": dict(bias=[torch.ones(6), torch.ones(6)]),
    }
    for backend, (message, change) in product(BACKENDS, bad.items()):
        with pytest.raises(ValueError, match=message):
            lora_linear.on(backend)(group.x, **(good | change))
    with pytest.raises(ValueError, match="dtype must be fp32 or bf16"):
        lora_linear.on("triton")(group.x.double(), **good)


def test_fused_is_the_choice_and_triton_is_not():
    group = Group.of((4,), 8, [6], [2])
    f = lora_linear(group.x.requires_grad_(), group.weight, group.b, group.a, scale=group.scale)
    assert "Eager" in f[0].grad_fn.name()
    assert not any(b.devices for b in OPS["lora_linear"].backends if b.name == "triton")


def test_builds_describe_every_argument():
    builds = triton_lora.builds()
    assert len({b.name for b in builds}) == len(builds) == 14
    for build in builds:
        assert list(build.signature) == build.kernel.arg_names
        assert {n for n, k in build.signature.items() if k == "constexpr"} == set(build.constexprs)
