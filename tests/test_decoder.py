"""A layer that is written out against transformers' own: values, gradients, bits.

On a GPU in bf16 too.
"""

import copy
import importlib
import inspect
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from smbkernels import use
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from smbfast.batch import pack_segments
from smbfast.model import decoder as decoder_module
from smbfast.model.decoder import FAMILIES, PackedDecoder, run_layer
from tests.oracle import assert_no_worse
from tests.tiny import tiny_encoder, tiny_lm

pytestmark = pytest.mark.numeric

HERE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]
# a value goes through some 16 roundings of a layer, each of half an eps at most; in fp32 sums of a
# few dozen terms come to that
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 16 * 2**-9}
# one trunk, and a branch on three of its tokens
SEGMENTS = pack_segments([np.arange(3, 11)], [[(3, np.arange(30, 33))]]).segments.to(HERE)
FUSED = ("add_rms_norm", "qk_norm_rope", "swiglu")


def model_of(kind: str, **more) -> nn.Module:
    """A tiny model whose norms have weights that matter."""
    lm = tiny_lm(kind, **more)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return lm.to(HERE)


def run(layer: nn.Module, stream: tuple, rotary: tuple, grad_TD: Tensor) -> dict[str, Tensor]:
    """Output and gradients of a layer."""
    leaves = [x.detach().requires_grad_() for x in stream]
    layer.zero_grad()
    y_TD = sum(run_layer(layer, tuple(leaves), rotary, SEGMENTS))
    y_TD.backward(grad_TD)
    grads = {n: p.grad.clone() for n, p in layer.named_parameters() if p.requires_grad}
    inputs = dict(zip(("hidden", "pending"), (x.grad for x in leaves), strict=True))
    return {"y": y_TD.detach(), **inputs, **grads}


def inputs_of(model: nn.Module) -> tuple[tuple, tuple[Tensor, Tensor], Tensor]:
    """A stream, positions that repeat as those of branches do, and an outgoing gradient."""
    *stream, grad_TD = torch.randn(3, SEGMENTS.tokens, model.config.hidden_size, device=HERE)
    position_1T = torch.randint(0, 200, (1, SEGMENTS.tokens), device=HERE)
    dtype = next(model.parameters()).dtype
    cos_1TC, sin_1TC = model.rotary_emb(stream[0][None].to(dtype), position_1T)
    return tuple(stream), (cos_1TC[0], sin_1TC[0]), grad_TD


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_layer_is_no_worse_than_on_the_references(kind, dtype, frozen):
    model = model_of(kind).model.to(dtype)
    stream, rotary, grad_TD = inputs_of(model)
    stream, grad_TD = tuple(x.to(dtype) for x in stream), grad_TD.to(dtype)
    layer = model.layers[0]
    exact = copy.deepcopy(layer).double()
    for name, parameter in (*layer.named_parameters(), *exact.named_parameters()):
        parameter.requires_grad_(not (frozen and "norm" in name))
    fast = run(layer, stream, rotary, grad_TD)
    with use("torch"):
        eager = run(layer, stream, rotary, grad_TD)
    wide = tuple(v.double() for v in rotary)
    truth = run(exact, tuple(x.double() for x in stream), wide, grad_TD.double())
    assert fast.keys() == truth.keys()
    for name, value in fast.items():
        if dtype == torch.float32:
            assert_no_worse(value, eager[name], truth[name], TOLERANCE[dtype])
            continue
        # element by element one of so many roundings may be lucky: as a whole
        size = float(truth[name].norm())
        errors = [float((x.double() - truth[name]).norm()) / size for x in (value, eager[name])]
        assert errors[0] <= errors[1] + TOLERANCE[dtype], (name, errors)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@torch.no_grad()
def test_the_references_are_transformers_own_layer(kind):
    """On one trunk: attention alone is summed in another order, all else has the same bits."""
    model = model_of(kind).model.cpu()
    x_TD = torch.randn(8, 16)
    position_1T = torch.arange(8)[None]
    rotary = model.rotary_emb(x_TD[None], position_1T)
    mask = create_causal_mask(model.config, x_TD[None], None, None, position_ids=position_1T)
    expected = model.layers[0](x_TD[None], attention_mask=mask, position_embeddings=rotary)
    segments = pack_segments([np.arange(8)], [[]]).segments
    angles = (rotary[0][0], rotary[1][0])
    with use("torch"):
        found = sum(run_layer(model.layers[0], (x_TD, None), angles, segments))
    torch.testing.assert_close(found, expected[0], rtol=1e-6, atol=1e-6)


def test_every_element_wise_part_is_an_operation(monkeypatch):
    """Two norms, one call for both kinds of heads, SwiGLU; on their references under `use`."""
    called: Counter = Counter()
    for name in FUSED:
        operation = getattr(decoder_module, name)

        def counted(*args, _name=name, _operation=operation, **kwargs):
            called[_name] += 1
            return _operation(*args, **kwargs)

        monkeypatch.setattr(decoder_module, name, counted)
    model = model_of("qwen3").model
    run(model.layers[0], *inputs_of(model))
    assert called == {"add_rms_norm": 2, "qk_norm_rope": 1, "swiglu": 1}


@pytest.mark.parametrize("recompute", ["none", "mlp", "full"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_recomputed_activations_have_the_same_bits(dtype, recompute):
    """In bf16 too, where a gradient that was rounded once more would show."""
    model = model_of("qwen3").model.to(dtype)
    batch = pack_segments([np.arange(3, 8), np.arange(20, 23)], [[(3, np.arange(30, 32))], []])
    batch = batch.to(HERE)
    x_TD, grad_TD = torch.randn(2, len(batch.ids_T), 16, device=HERE).to(dtype)
    results = []
    for how in ("none", recompute):
        leaf_TD = x_TD.clone().requires_grad_()
        model.zero_grad()
        y_TD = PackedDecoder(model)(leaf_TD, batch.position_T, batch.segments, recompute=how)
        y_TD.backward(grad_TD)
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append({"y": y_TD.detach(), "x": leaf_TD.grad, **grads})
    assert results[0].keys() == results[1].keys() and len(results[0]) > 20
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_a_layer_that_is_computed_again_stores_one_tensor():
    model = model_of("qwen3").model
    model.requires_grad_(False)
    x_TD = torch.randn(SEGMENTS.tokens, 16, device=HERE, requires_grad=True)
    position_T = torch.arange(SEGMENTS.tokens, device=HERE)
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call = partial(PackedDecoder(model), x_TD, position_T, SEGMENTS, norm=False)
        y_TD = call(recompute="full")
    # the hooks of a checkpoint stand in for these inside it; outside, sums save nothing
    assert sum(saved.values()) == 0 and y_TD.requires_grad


def test_the_last_sum_without_a_norm():
    model = model_of("llama").model
    x_TD = torch.randn(SEGMENTS.tokens, 16, device=HERE)
    position_T = torch.arange(SEGMENTS.tokens, device=HERE)
    decoder = PackedDecoder(model)
    y_TD = decoder(x_TD, position_T, SEGMENTS, norm=False)
    normed_TD = decoder(x_TD, position_T, SEGMENTS)
    torch.testing.assert_close(normed_TD, model.norm(y_TD))


def test_other_activations_are_those_of_transformers(monkeypatch):
    monkeypatch.setattr(decoder_module, "swiglu", lambda *_: pytest.fail("it is not silu"))
    mlp = model_of("llama", hidden_act="gelu").model.layers[0].mlp
    x_TD = torch.randn(3, 16, device=HERE)
    assert torch.equal(decoder_module._mlp(mlp, x_TD), mlp(x_TD))


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_autocast_is_that_of_transformers(kind):
    """As transformers' own forward under autocast, up to roundings of bf16; gradients as well."""
    results = []
    for packed in (True, False):
        encoder = tiny_encoder(kind, lora=True).to(HERE)
        ids_T = torch.arange(45, 56, device=HERE)  # delimiters, which LoRA trains, among them
        with torch.autocast(HERE, torch.bfloat16):
            if packed:
                batch = pack_segments([ids_T.cpu().numpy()], [[]]).to(HERE)
                y_TD = encoder.packed(batch.ids_T, batch.position_T, batch.segments)
            else:
                y_TD = encoder.hidden(ids_T[None])[0]
        torch.manual_seed(1)
        y_TD.backward(torch.randn_like(y_TD))
        grads = [p.grad for p in encoder.decoder.parameters() if p.grad is not None]
        results.append([y_TD.detach(), *grads])
    assert len(results[0]) == len(results[1]) > 20
    assert results[0][0].dtype == results[1][0].dtype
    for own, theirs in zip(*results, strict=True):
        # two layers, forward and backward, of two computations that round otherwise
        gap = float((own - theirs).norm() / theirs.norm())
        assert gap < 2 * 2 * TOLERANCE[torch.bfloat16], gap


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
