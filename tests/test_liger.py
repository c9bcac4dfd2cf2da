"""Liger's parts of a layer against transformers' own: values and gradients.

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
from smbkernels import use
from smbkernels.triton_platform import INTERPRET
from torch import Tensor, nn

from smbfast.batch import pack_segments
from smbfast.model import liger
from smbfast.model.decoder import FAMILIES, PackedDecoder, run_layer
from smbfast.model.liger import rms_norm, rope, swiglu
from tests.oracle import assert_no_worse
from tests.tiny import tiny_encoder, tiny_lm

pytestmark = pytest.mark.numeric

CUDA = torch.cuda.is_available()
HERE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.bfloat16] if CUDA else [torch.float32]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-6}
# one trunk, and a branch on three of its tokens
SEGMENTS = pack_segments([np.arange(3, 11)], [[(3, np.arange(30, 33))]]).segments.to(HERE)


@pytest.fixture
def on_liger(monkeypatch) -> None:
    """Where there is no GPU, Liger's kernels take tensors of a CPU."""
    if CUDA:
        return
    if not INTERPRET:
        pytest.skip("Triton was imported without its interpreter")
    rms_norm_module = pytest.importorskip("liger_kernel.ops.rms_norm")
    interpreter = sys.modules["triton.runtime.interpreter"]
    convert = interpreter._implicit_cvt

    def with_floats(argument: object) -> object:
        if not isinstance(argument, float):
            return convert(argument)
        handle = interpreter.TensorHandle(np.array([argument], np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    # two things that a GPU has and the interpreter has not: scalars in fp32, and libdevice
    monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)
    monkeypatch.setattr(rms_norm_module, "rsqrt", lambda x: 1.0 / tl.sqrt(x))
    monkeypatch.setattr(liger, "DEVICE", "cpu")


def model_of(kind: str, **more) -> nn.Module:
    """A tiny model whose norms have weights that matter."""
    lm = tiny_lm(kind, **more)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return lm.to(HERE)


def in_fp64(module: nn.Module) -> nn.Module:
    """A copy whose norms are computed in fp64; transformers computes them in fp32."""

    def forward(norm: nn.Module, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)
        return norm.weight * x * scale

    exact = copy.deepcopy(module).double()
    for part in exact.modules():
        if hasattr(part, "variance_epsilon"):
            part.forward = partial(forward, part)
    return exact


def run(layer: nn.Module, x_TD: Tensor, rotary: tuple, grad_TD: Tensor) -> dict[str, Tensor]:
    """Output and gradients of a layer."""
    x_TD = x_TD.detach().requires_grad_()
    layer.zero_grad()
    y_TD = run_layer(layer, x_TD, rotary, SEGMENTS)
    y_TD.backward(grad_TD)
    grads = {n: p.grad.clone() for n, p in layer.named_parameters() if p.requires_grad}
    return {"y": y_TD.detach(), "x": x_TD.grad, **grads}


def inputs_of(model: nn.Module) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Hidden states, positions that repeat as those of branches do, and an outgoing gradient."""
    x_TD, grad_TD = torch.randn(2, SEGMENTS.tokens, model.config.hidden_size, device=HERE)
    position_1T = torch.randint(0, 200, (1, SEGMENTS.tokens), device=HERE)
    cos_1TC, sin_1TC = model.rotary_emb(x_TD[None].to(next(model.parameters()).dtype), position_1T)
    return x_TD, (cos_1TC[0], sin_1TC[0]), grad_TD


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_layer_is_that_of_transformers(on_liger, kind, dtype, frozen):
    model = model_of(kind).model.to(dtype)
    x_TD, rotary, grad_TD = inputs_of(model)
    x_TD, grad_TD = x_TD.to(dtype), grad_TD.to(dtype)
    layer = model.layers[0]
    exact = in_fp64(layer)
    for name, parameter in (*layer.named_parameters(), *exact.named_parameters()):
        parameter.requires_grad_(not (frozen and "norm" in name))
    fast = run(layer, x_TD, rotary, grad_TD)
    with use("torch"):
        eager = run(layer, x_TD, rotary, grad_TD)
    wide = tuple(v.double() for v in rotary)
    truth = run(exact, x_TD.double(), wide, grad_TD.double())
    assert fast.keys() == truth.keys()
    for name, value in fast.items():
        assert_no_worse(value, eager[name], truth[name], TOLERANCE[dtype])


@pytest.mark.parametrize(("kind", "parts"), [("qwen3", 6), ("llama", 4)])
def test_every_part_of_a_layer_runs_on_liger(on_liger, monkeypatch, kind, parts):
    """Two norms, RoPE and SwiGLU; Qwen3 has norms of queries and keys as well."""
    called = []
    fits = liger._fits
    monkeypatch.setattr(liger, "_fits", lambda *t: called.append(fits(*t)) or called[-1])
    model = model_of(kind).model
    run(model.layers[0], *inputs_of(model))
    assert called == [True] * parts
    called.clear()
    with use("torch"):
        run(model.layers[0], *inputs_of(model))
    assert called == [False] * parts


@pytest.mark.parametrize("recompute", ["none", "mlp", "full"])
def test_a_packed_forward_is_that_of_transformers(on_liger, monkeypatch, recompute):
    encoder = tiny_encoder("qwen3", lora=True).to(HERE)
    batch = pack_segments([np.arange(3, 8), np.arange(20, 23)], [[(3, np.arange(30, 32))], []])
    batch = batch.to(HERE)
    x_TD = encoder.embed_packed(batch.ids_T).detach()
    grad_TD = torch.randn_like(x_TD)
    decoder, results = PackedDecoder(encoder.decoder), []
    for device in ("none", liger.DEVICE):
        monkeypatch.setattr(liger, "DEVICE", device)
        leaf_TD = x_TD.clone().requires_grad_()
        encoder.zero_grad()
        y_TD = decoder(leaf_TD, batch.position_T, batch.segments, recompute=recompute)
        y_TD.backward(grad_TD)
        grads = [p.grad for p in encoder.decoder.parameters() if p.grad is not None]
        results.append([y_TD.detach(), leaf_TD.grad, *(g.clone() for g in grads)])
    assert len(results[0]) == len(results[1]) > 20
    gaps = [float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True)]
    assert 0 < max(gaps) < 1e-5  # Liger did run, and computes the same


def test_the_gradient_of_the_final_norm_s_output_is_left_alone(on_liger):
    norm = model_of("llama").model.norm
    x_TD = torch.randn(7, 16, device=HERE, requires_grad=True)
    grad_TD = torch.randn_like(x_TD)
    before_TD = grad_TD.clone()
    rms_norm(norm, x_TD).backward(grad_TD)
    assert torch.equal(grad_TD, before_TD)


def test_other_activations_stay(on_liger, monkeypatch):
    monkeypatch.setattr(liger, "_kernels", lambda: pytest.fail("Liger was called"))
    mlp = model_of("llama", hidden_act="gelu").model.layers[0].mlp
    gate_TF, up_TF = torch.randn(2, 3, 24, device=HERE)
    assert torch.equal(swiglu(mlp, gate_TF, up_TF), mlp.act_fn(gate_TF) * up_TF)


@pytest.mark.parametrize("case", ["fp64", "elsewhere"])
def test_what_liger_would_compute_otherwise_is_left_to_transformers(on_liger, monkeypatch, case):
    model = model_of("qwen3").model.to(torch.float64 if case == "fp64" else torch.float32)
    if case == "elsewhere":
        monkeypatch.setattr(liger, "DEVICE", "cuda:7")
    monkeypatch.setattr(liger, "_kernels", lambda: pytest.fail("Liger was called"))
    x_TD, rotary, grad_TD = inputs_of(model)
    dtype = model.norm.weight.dtype
    run(model.layers[0], x_TD.to(dtype), tuple(v.to(dtype) for v in rotary), grad_TD.to(dtype))


def test_mixed_dtypes_are_promoted_as_by_transformers(on_liger, monkeypatch):
    """As under autocast."""
    monkeypatch.setattr(liger, "_kernels", lambda: pytest.fail("Liger was called"))
    model = model_of("qwen3").model
    attention, rotary = model.layers[0].self_attn, inputs_of(model)[1]
    q_THC = torch.randn(SEGMENTS.tokens, 2, 8, device=HERE).bfloat16()
    k_TGC = q_THC[:, :1]
    normed_THC = rms_norm(attention.q_norm, q_THC)
    assert normed_THC.dtype == torch.float32
    assert torch.equal(normed_THC, attention.q_norm(q_THC))
    modeling = sys.modules[type(attention).__module__]
    expected = modeling.apply_rotary_pos_emb(q_THC, k_TGC, *rotary, unsqueeze_dim=1)
    for own, theirs in zip(rope(q_THC, k_TGC, *rotary), expected, strict=True):
        assert torch.equal(own, theirs) and own.dtype == theirs.dtype


def test_why_liger_is_not_used_is_logged_once(monkeypatch, caplog):
    liger._kernels.cache_clear()
    monkeypatch.setattr(liger, "DEVICE", "cpu")
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.rms_norm", ModuleType("empty"))
    norm = tiny_lm("llama").model.norm
    x_TD = torch.randn(3, 16)
    for _ in range(2):
        assert torch.equal(rms_norm(norm, x_TD), norm(x_TD))
    liger._kernels.cache_clear()
    assert len(caplog.messages) == 1 and "LigerRMSNormFunction" in caplog.messages[0]


def test_families_share_the_code_that_is_written_out():
    """What is checked of Llama and Qwen3 holds for all, and will until transformers changes one."""
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    assert tuple(names) == FAMILIES
    sources = set()
    for kind, family in names.items():
        modeling = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
        parts = (
            getattr(modeling, f"{family}RMSNorm").forward,
            getattr(modeling, f"{family}MLP").forward,
            getattr(modeling, f"{family}DecoderLayer").forward,
            modeling.apply_rotary_pos_emb,
        )
        sources.add(tuple(inspect.getsource(part) for part in parts))
    assert len(sources) == 1
