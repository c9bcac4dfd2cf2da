"""Liger's parts of a layer against transformers' own: values, gradients, and nothing left behind.

On a CPU they run in Triton's interpreter, in fp32; on a GPU as they are, in bf16 too.
"""

import copy
import importlib
import inspect
import sys
from functools import partial
from types import ModuleType

import numpy as np
import pytest
import torch
import triton.language as tl
from smbkernels.triton.platform import INTERPRET
from torch import Tensor, nn

from smbfast.batch import pack_segments
from smbfast.model import liger, packed
from smbfast.model.liger import liger_patches
from tests.oracle import assert_no_worse
from tests.tiny import tiny_encoder, tiny_lm

pytestmark = pytest.mark.numeric

CUDA = torch.cuda.is_available()
HERE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.bfloat16] if CUDA else [torch.float32]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-6}


@pytest.fixture
def on_liger(monkeypatch) -> None:
    """Where there is no GPU, Liger's kernels take tensors of a CPU."""
    if CUDA:
        return
    if not INTERPRET:
        pytest.skip("Triton was imported without its interpreter")
    rms_norm = pytest.importorskip("liger_kernel.ops.rms_norm")
    interpreter = sys.modules["triton.runtime.interpreter"]
    convert = interpreter._implicit_cvt

    def with_floats(argument: object) -> object:
        if not isinstance(argument, float):
            return convert(argument)
        handle = interpreter.TensorHandle(np.array([argument], np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    # two things that a GPU has and the interpreter has not: scalars in fp32, and libdevice
    monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)
    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: 1.0 / tl.sqrt(x))
    monkeypatch.setattr(liger, "DEVICE", "cpu")


def model_of(kind: str, **more) -> nn.Module:
    """A tiny model whose norms have weights that matter."""
    lm = tiny_lm(kind, **more)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return lm.to(HERE)


def norms_in_fp64(module: nn.Module) -> list[liger.Patch]:
    """transformers computes them in fp32."""

    def forward(norm: nn.Module, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)
        return norm.weight * x * scale

    norms = [m for m in module.modules() if hasattr(m, "variance_epsilon")]
    return [(vars(m), "forward", partial(forward, m)) for m in norms]


def run(layer: nn.Module, patches, x: Tensor, rotary, grad: Tensor) -> dict[str, Tensor]:
    """Output and gradients of a layer with these parts in place."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    with pytest.MonkeyPatch.context() as patch:
        for space, name, value in patches:
            patch.setitem(space, name, value)
        y = layer(x, attention_mask=None, position_embeddings=rotary)
    y.backward(grad)
    found = {n: p.grad.clone() for n, p in layer.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": x.grad, **found}


def inputs_of(model: nn.Module, tokens: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, positions that repeat as those of branches do, and an outgoing gradient."""
    x, grad = torch.randn(2, 1, tokens, model.config.hidden_size, device=HERE)
    position_1T = torch.randint(0, 200, (1, tokens), device=HERE)
    return x, position_1T, grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_layer_is_that_of_transformers(on_liger, kind, dtype, frozen):
    model = model_of(kind).model.to(dtype)
    x, position_1T, grad = (v if v.dtype == torch.int64 else v.to(dtype) for v in inputs_of(model))
    layer, exact = model.layers[0], copy.deepcopy(model.layers[0]).double()
    rotary = model.rotary_emb(x, position_1T)
    for name, parameter in (*layer.named_parameters(), *exact.named_parameters()):
        parameter.requires_grad_(not (frozen and "norm" in name))
    patches = liger_patches(layer)
    assert len(patches) == {"qwen3": 6, "llama": 4}[kind]
    fast, eager = run(layer, patches, x, rotary, grad), run(layer, [], x, rotary, grad)
    wide = (v.double() for v in rotary)
    truth = run(exact, norms_in_fp64(exact), x.double(), tuple(wide), grad.double())
    assert fast.keys() == truth.keys()
    for name, value in fast.items():
        assert_no_worse(value, eager[name], truth[name], TOLERANCE[dtype])


def test_every_part_of_a_layer_runs_on_liger(on_liger, monkeypatch):
    called = []
    model = model_of("qwen3").model
    x, position_1T, grad = inputs_of(model)
    fits = liger._fits
    monkeypatch.setattr(liger, "_fits", lambda *t: called.append(fits(*t)) or fits(*t))
    layer = model.layers[0]
    run(layer, liger_patches(layer), x, model.rotary_emb(x, position_1T), grad)
    assert called == [True] * 6


@pytest.mark.parametrize("recompute", ["none", "mlp", "full"])
def test_a_packed_forward_is_that_of_transformers(on_liger, monkeypatch, recompute):
    encoder = tiny_encoder("qwen3", lora=True).to(HERE)
    batch = pack_segments([np.arange(3, 8), np.arange(20, 23)], [[(3, np.arange(30, 32))], []])
    batch = batch.to(HERE)
    x = encoder.embed_packed(batch.ids_T).detach()
    grad = torch.randn_like(x)
    found = []
    for give in (lambda _: [], liger_patches):
        monkeypatch.setattr(packed, "liger_patches", give)
        decoder, leaf = packed.PackedDecoder(encoder.trunk), x.clone().requires_grad_()
        encoder.zero_grad()
        y = decoder(leaf, batch.position_T, batch.segments, recompute=recompute)
        y.backward(grad)
        grads = [p.grad for p in encoder.trunk.parameters() if p.grad is not None]
        found.append([y.detach(), leaf.grad, *(g.clone() for g in grads)])
    assert len(found[0]) == len(found[1]) > 20
    for own, theirs in zip(*found, strict=True):
        assert float((own - theirs).norm() / theirs.norm()) < 1e-5
    assert not any("forward" in vars(m) for m in encoder.modules())


def test_the_gradient_of_the_final_norm_s_output_is_left_alone(on_liger):
    norm = model_of("llama").model.norm
    [(space, name, forward)] = liger_patches(norm)
    assert space is vars(norm) and name == "forward"
    x = torch.randn(1, 7, 16, device=HERE, requires_grad=True)
    grad = torch.randn_like(x)
    kept = grad.clone()
    forward(x).backward(grad)
    assert torch.equal(grad, kept)


def test_the_mlp_calls_the_model_s_own_linears(on_liger):
    mlp = model_of("llama").model.layers[0].mlp
    [(_, _, forward)] = liger_patches(mlp)
    x = torch.randn(1, 3, 16, device=HERE)
    doubled = nn.Linear(24, 16, bias=False, device=HERE)
    with torch.no_grad():
        doubled.weight.copy_(2 * mlp.down_proj.weight)
        expected = 2 * mlp(x)
        mlp.down_proj = doubled
        torch.testing.assert_close(forward(x), expected)


def test_other_activations_stay(on_liger):
    layer = model_of("llama", hidden_act="gelu").model.layers[0]
    assert not any(space is vars(layer.mlp) for space, _, _ in liger_patches(layer))


@pytest.mark.parametrize("case", ["fp64", "mixed", "elsewhere"])
def test_what_liger_would_compute_otherwise_is_left_to_transformers(on_liger, monkeypatch, case):
    model = model_of("qwen3").model.to(torch.float64 if case == "fp64" else torch.float32)
    layer = model.layers[0]
    patches = liger_patches(layer)
    by_name = {name: value for space, name, value in patches if space is not vars(layer.mlp)}
    x, position_1T, grad = inputs_of(model)
    rotary = model.rotary_emb(x, position_1T)
    if case == "elsewhere":
        monkeypatch.setattr(liger, "DEVICE", "cuda:7")
    monkeypatch.setattr(liger, "_kernels", lambda: pytest.fail("Liger was called"))
    if case == "mixed":  # as under autocast: transformers promotes to fp32
        norm, x = layer.self_attn.q_norm, torch.randn(1, 5, 2, 8, device=HERE).bfloat16()
        [forward] = [v for space, _, v in patches if space is vars(norm)]
        assert forward(x).dtype == torch.float32 and torch.equal(forward(x), norm(x))
        cos, sin = (v[:, :5] for v in rotary)
        q, k = x.transpose(1, 2), x[:, :, :1].transpose(1, 2)
        found = by_name[liger.ROPE](q, k, cos, sin)
        expected = sys.modules[type(layer).__module__].apply_rotary_pos_emb(q, k, cos, sin)
        assert all(
            torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True)
        )
        return
    dtype = layer.input_layernorm.weight.dtype
    arguments = (x.to(dtype), tuple(v.to(dtype) for v in rotary), grad.to(dtype))
    found, expected = run(layer, patches, *arguments), run(layer, [], *arguments)
    assert all(torch.equal(v, expected[k]) for k, v in found.items())


def test_nothing_is_left_behind(on_liger):
    model = model_of("qwen3").model
    modeling = sys.modules[type(model).__module__]
    function = modeling.apply_rotary_pos_emb
    x, position_1T, grad = inputs_of(model)
    rotary = model.rotary_emb(x, position_1T)
    before = run(model.layers[0], [], x, rotary, grad)
    run(model.layers[0], liger_patches(model.layers[0]), x, rotary, grad)
    after = run(model.layers[0], [], x, rotary, grad)
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert modeling.apply_rotary_pos_emb is function
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.fixture
def unsaid():
    liger._say.cache_clear()
    yield
    liger._say.cache_clear()
    liger._kernels.cache_clear()


def test_off_a_gpu_there_are_none(unsaid, caplog):
    model = tiny_lm("qwen3").model
    for device in ("cpu", "meta"):
        assert liger_patches(model.layers[0].to(device)) == []
    assert liger_patches(nn.Identity()) == [] and not caplog.messages


def test_why_there_are_none_is_said_once(monkeypatch, unsaid, caplog):
    monkeypatch.setattr(liger, "DEVICE", "cpu")
    for _ in range(2):
        assert liger_patches(nn.Linear(2, 2)) == []
    reason = "Liger's RMSNorm, RoPE and SwiGLU are not used: "
    assert caplog.messages == [reason + "Linear is not a layer of a known family"]
    liger._kernels.cache_clear()
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.rms_norm", ModuleType("empty"))
    for layer in tiny_lm("llama").model.layers:
        assert liger_patches(layer) == []
    assert len(caplog.messages) == 2 and "LigerRMSNormFunction" in caplog.messages[1]


def test_families_share_the_code_that_is_replaced():
    """What is checked of Llama and Qwen3 holds for all."""
    kinds = {}
    for module, family in liger.FAMILIES.items():
        modeling = importlib.import_module(module)
        parts = (
            getattr(modeling, f"{family}RMSNorm").forward,
            getattr(modeling, f"{family}MLP").forward,
            getattr(modeling, liger.ROPE),
        )
        kinds[family] = tuple(inspect.getsource(part) for part in parts)
    assert len(kinds) == 4 and len(set(kinds.values())) == 1
