"""What a step on the shared forward does beside its sums: what it reads, waits for and leaves."""

import copy
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from smbkernels import load as load_kernels
from smbkernels import use
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

import smbfast.model.averages as averages
import smbfast.model.decoder as decoder_module
from smbfast import objective
from smbfast.batch import PackedBatch, pack_segments
from smbfast.data.loader import make_batch
from smbfast.model.backbone import PatientEncoder
from smbfast.model.target import TargetEncoder, TargetForm
from smbfast.run.optim import make_optimizer
from smbfast.run.step import LossScales, Updater, forward_backward
from smbfast.settings import ObjectiveSettings, OptimSettings
from tests.tiny import VOCABULARY, random_window
from tests.two_paths import CASES, FP64, assert_same, exact_norms, make_encoder, moved_target, run

pytestmark = pytest.mark.numeric

WINDOWS = [random_window(s, buckets=b) for s, b in ((1, 6), (2, 5), (3, 7))]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# each of these reads something on the host, or finds a shape on the device
WAITS = {
    f"aten::{name}"
    for name in (
        "_linalg_check_errors",
        "_linalg_eigh",
        "_local_scalar_dense",
        "_unique2",
        "bincount",
        "equal",
        "is_nonzero",
        "item",
        "lift_fresh",
        "masked_scatter",
        "masked_select",
        "nonzero",
        "unique_consecutive",
        "unique_dim",
    )
}


def batch_of(cuts: int = 2, **more: bool) -> PackedBatch:
    form = ObjectiveSettings(min_future=4, cuts=cuts)
    return make_batch(WINDOWS, form, 0, 0, jepa=True, **more)


class NoWait(TorchDispatchMode):
    """Fails where a GPU would be waited for.

    Sees ATen inside our own operations; not what a C++ operation does, nor what CUDA's kernels
    would do that a CPU's do not.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name
        assert name not in WAITS, name
        if name.startswith("aten::index"):
            found = [x for a in args if isinstance(a, list | tuple) for x in a]
            assert not any(isinstance(x, Tensor) and x.dtype == torch.bool for x in found), name
        if name == "aten::repeat_interleave":
            assert (kwargs or {}).get("output_size") is not None, name
        if name in OPDEFS:
            with self:
                return OPDEFS[name]._init_fn(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def micro_step(updater, encoder, target, batch) -> Tensor:
    """A step of one micro-batch, as training takes it; the sum of its losses."""
    losses = partial(objective.losses, normalize=True)
    summed = forward_backward(losses, encoder, target, [batch], LossScales(0.1, 0.1))
    updater.step(1e-3, target, 0.9)
    return summed.sft + summed.jepa


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_waits_for_the_device(case, monkeypatch):
    """Once all is allocated; a tracked target is truncated in this step."""
    for name in ("jepa_mse", "cross_entropy"):
        module = sys.modules[
            f"smbkernels.{name}.op"
        ]  # on a CPU alone they read a scalar, for nothing
        monkeypatch.setattr(module, "scaled", lambda grad, grad_loss, **_: grad * grad_loss)
    encoder, batch = make_encoder(lora=case.lora, tie=case.tie), batch_of()
    target = TargetEncoder(encoder, TargetForm(case.form, rank=1, every=1))
    updater = Updater(make_optimizer(encoder, OptimSettings()), clip=1.0)
    micro_step(updater, encoder, target, batch)  # makes moments and tables
    tables = {batch.segments.host_S6.data_ptr(), batch.target_segments.host_S6.data_ptr()}
    for name in ("tolist", "numpy", "cpu"):
        real = getattr(Tensor, name)

        def on_host(x, *args, name=name, real=real):
            assert x.data_ptr() in tables, name
            return real(x, *args)

        monkeypatch.setattr(Tensor, name, on_host)
    with NoWait():
        total = micro_step(updater, encoder, target, batch)
        for act in (total.item, total.tolist, lambda: total[total > 0], lambda: bool(total)):
            with pytest.raises(AssertionError):
                act()


@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_nothing_of_the_batch_is_read_on_the_host(case, monkeypatch):
    """Tensors without numbers: whatever reads one fails."""
    monkeypatch.setattr(averages, "ema_update_", lambda *_args, **_kwargs: None)
    encoder = make_encoder(lora=case.lora).to("meta")
    target = TargetEncoder(encoder, TargetForm(case.form))
    with use("torch", timeline_attention="sdpa"):
        parts = objective.losses(
            encoder, target, batch_of().to("meta"), sft_scale=1.0, jepa_scale=1.0, normalize=True
        )
        torch.autograd.backward([part for part in parts if part is not None])
    for name, parameter in encoder.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@torch.no_grad()
@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_a_branch_sees_its_prefix_and_itself_alone(case):
    """Other tokens anywhere else: its bits stay; a token that it sees: they do not."""
    encoder = make_encoder("llama", lora=case.lora)
    batch = batch_of(cuts=3)

    def hidden(ids_T: Tensor) -> Tensor:
        rows = (batch.position_T, batch.segments, batch.masked_M)
        return encoder.packed(ids_T, *rows)

    before_TD = hidden(batch.ids_T)
    for start, length, trunk, prefix in batch.segment_tuples:
        own = slice(start, start + length)
        seen_T = torch.zeros(len(batch.ids_T), dtype=torch.bool)
        seen_T[own] = seen_T[trunk : trunk + prefix] = True
        changed_T = torch.where(seen_T, batch.ids_T, (batch.ids_T + 7) % 49 + 1)
        assert torch.equal(hidden(changed_T)[own], before_TD[own])
        inside = trunk + prefix - 1 if prefix else start
        ids_T = batch.ids_T.clone()
        ids_T[inside] = (ids_T[inside] + 7) % 49 + 1
        assert not torch.equal(hidden(ids_T)[own], before_TD[own])


@torch.no_grad()
def test_the_identity_of_a_masked_token_is_not_read():
    encoder, batch = make_encoder(), batch_of()
    rows = (batch.position_T, batch.segments, batch.masked_M)
    ids_T = batch.ids_T.index_fill(0, batch.masked_M, 7)
    assert torch.equal(encoder.packed(ids_T, *rows), encoder.packed(batch.ids_T, *rows))
    vector_D = encoder.mask_vector.data
    encoder.mask_vector.data = vector_D + 1
    assert not torch.equal(encoder.packed(ids_T, *rows), encoder.packed(batch.ids_T, *rows[:2]))


@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_the_target_reads_each_trunk_through_its_last_masked_token(case):
    """Not further: what stands behind is not in the batch, and nothing before sees it."""
    windows = [*WINDOWS, random_window(9, buckets=1)]
    form = ObjectiveSettings(min_future=4, cuts=2, horizon=4)
    batch = make_batch(windows, form, 0, 0, jepa=True)
    table = batch.target_segments.host_S6.tolist()
    assert len(table) == len(WINDOWS)  # the last window has no cut
    for window, (start, length, *_) in zip(WINDOWS, table, strict=True):
        rows_M = batch.target_M[(batch.target_M >= start) & (batch.target_M < start + length)]
        assert int(rows_M.max()) == start + length - 1
        ids_U = batch.target_ids_U[start : start + length]
        assert torch.equal(ids_U, torch.from_numpy(window.ids_T[:length]).long())
    encoder = make_encoder(lora=case.lora)
    target = moved_target(encoder, case.form)
    weights = {"sft_scale": 1.0, "jepa_scale": 1.0, "normalize": True}
    sft, jepa, _ = objective.losses(encoder, target, batch, **weights)
    # the very trunks, another token after the last that the target reads
    ids_T = batch.ids_T.clone()
    for (start, length, *_), (_, read, *_) in zip(batch.segment_tuples, table, strict=False):
        ids_T[start + read : start + length] = 7
    assert not torch.equal(ids_T, batch.ids_T)
    changed = replace(batch, ids_T=ids_T)
    again = objective.losses(encoder, target, changed, **weights)
    assert torch.equal(again[1], jepa) and not torch.equal(again[0], sft)
    first = batch.target_ids_U.clone()
    first[0] += 1
    unlike = objective.losses(encoder, target, replace(batch, target_ids_U=first), **weights)
    assert torch.equal(unlike[0], sft) and not torch.equal(unlike[1], jepa)


def test_without_sft_a_trunk_ends_at_its_last_cut():
    whole, short = batch_of(), batch_of(sft=False)
    assert short.num_labels == 0 and short.num_masked == whole.num_masked
    assert short.num_trunk_tokens == whole.num_trunk_tokens == sum(len(w) for w in WINDOWS)
    cuts = [
        max(p for _, _, t, p in short.segment_tuples if t == s)
        for s, _, _, p in short.segment_tuples
        if p == 0
    ]
    assert [n for _, n, _, p in short.segment_tuples if p == 0] == cuts
    assert torch.equal(short.target_ids_U, whole.target_ids_U)


@pytest.mark.parametrize("recompute", ["none", "mlp", "full"])
@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_the_model_is_as_it_was(case, recompute):
    """Nothing is put into a module, and the reference keeps its bits in the same process."""
    encoder, batch = make_encoder(lora=case.lora), batch_of()
    target = moved_target(encoder, case.form)
    expected = run("reference", encoder, target, [batch])
    before = [sorted(vars(m)) for m in encoder.decoder.modules()]
    run("shared", encoder, target, [batch], recompute=recompute)
    assert [sorted(vars(m)) for m in encoder.decoder.modules()] == before
    losses, gradients = run("reference", encoder, target, [batch])
    assert losses == expected[0]
    assert all(torch.equal(gradients[n], g) for n, g in expected[1].items())


def test_after_an_error_inside_a_layer_the_next_step_is_the_same():
    """The weights that the target lent, and the adapters it switched off, are put back."""
    encoder, batch = make_encoder(), batch_of()
    for form in ("merged", "tracked"):
        target = moved_target(encoder, form)
        expected = run("shared", encoder, target, [batch])
        mlp = encoder.decoder.layers[1].mlp
        config, mlp.config = mlp.config, None  # which names the activation
        with pytest.raises(AttributeError):
            run("shared", encoder, target, [batch])
        mlp.config = config
        encoder.zero_grad(set_to_none=True)
        losses, gradients = run("shared", encoder, target, [batch])
        assert losses == expected[0]
        assert all(torch.equal(gradients[n], g) for n, g in expected[1].items())


def test_a_compiled_layer_holds_the_fused_operations():
    """One graph: nothing but our operations, and no plain linear or product beside them."""
    encoder, batch = make_encoder(), batch_of()
    embedded_TD = encoder.embed_packed(batch.ids_T).detach().requires_grad_()
    cos_1TC, sin_1TC = encoder.decoder.rotary_emb(embedded_TD[None], batch.position_T[None])
    stream = (embedded_TD, torch.randn_like(embedded_TD))
    inputs = (encoder.decoder.layers[0], stream, (cos_1TC[0], sin_1TC[0]), batch.segments)
    names: list[str] = []

    def record(graph: torch.fx.GraphModule, _inputs: list) -> object:
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    load_kernels("cpu")
    compiled = torch.compile(decoder_module.run_layer, backend=record, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), decoder_module.run_layer(*inputs))
    counts = {"lora_linear": 4, "timeline_attention": 1, "add_rms_norm": 2}
    counts |= {"qk_norm_rope": 1, "swiglu": 1}
    for operation, count in counts.items():
        assert sum(operation in name for name in names) == count, operation
    assert not any(name in str(names) for name in ("mul", "rsqrt", "cat", "silu", "transpose"))
    assert not any("linear" in name and "lora_linear" not in name for name in names)


@pytest.mark.parametrize(
    ("targets", "groups"),
    [
        (ALL, [3, 1, 2, 1]),
        (["q_proj", "v_proj"], [2]),
        (["k_proj", "down_proj"], [1, 1]),
        (["up_proj"], [1]),
    ],
)
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_linears_of_one_input_are_one_call(kind, targets, groups, monkeypatch):
    """Any subset of them, and it equals PEFT's own forward."""
    sizes = []
    real = decoder_module.lora_linear

    def counted(x_TK, weight, *args, **kwargs):
        sizes.append(len(weight))
        return real(x_TK, weight, *args, **kwargs)

    encoder, batch = make_encoder(kind, targets=targets, dtype=FP64), batch_of()
    for form in ("merged", "tracked"):
        target = moved_target(encoder, form)
        expected = run("reference", encoder, target, [batch])
        with monkeypatch.context() as patch:
            patch.setattr(decoder_module, "lora_linear", counted)
            found = run("shared", encoder, target, [batch])
        # the merged target's weights hold the adapters: its linears are plain
        forwards = 1 if form == "merged" else 2
        assert sizes == groups * 2 * forwards  # layers
        sizes.clear()
        assert_same(found, expected, 1e-12)


@pytest.mark.parametrize("targets", [ALL, ["q_proj", "o_proj"]])
@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_linears_with_bias(case, targets):
    """As Qwen2's q, k and v; here o has one as well."""
    config = {"attention_bias": True, "mlp_bias": True}
    encoder = make_encoder("llama", lora=case.lora, targets=targets, dtype=FP64, **config)
    assert bool(encoder.decoder.layers[0].self_attn.q_proj.bias.abs().min() > 0)
    target, batch = moved_target(encoder, case.form), batch_of()
    expected = run("reference", encoder, target, [batch])
    assert_same(run("shared", encoder, target, [batch]), expected, 1e-12)


def test_a_copy_of_an_encoder_is_run_by_its_own_weights():
    encoder, batch = make_encoder(), batch_of()
    before = run("shared", encoder, None, [batch], jepa=0)
    other = copy.deepcopy(encoder)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
    assert run("shared", other, None, [batch], jepa=0)[0] == before[0]


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "initializer_range": 0.3,
}


def encoder_of(config: PreTrainedConfig) -> PatientEncoder:
    return PatientEncoder(AutoModelForCausalLM.from_config(config), 2)


@pytest.mark.parametrize(
    "config", [Qwen2Config(**SMALL), MistralConfig(**SMALL, sliding_window=None)], ids=type
)
def test_its_other_kinds(config):
    encoder, batch = encoder_of(config).double(), batch_of()
    exact_norms(encoder)
    target = moved_target(encoder)
    expected = run("reference", encoder, target, [batch])
    assert_same(run("shared", encoder, target, [batch]), expected, 1e-12)


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2), "gpt2"),
        (Qwen3Config(**SMALL, attention_dropout=0.1), "attention_dropout 0, got 0.1"),
        (
            Qwen3Config(**SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=0),
            "full attention in every layer",
        ),
        (MistralConfig(**SMALL, sliding_window=8), "full attention in every layer"),
        (LlamaConfig(**SMALL, rope_parameters=DYNAMIC), "dynamic"),
    ],
    ids=["gpt2", "dropout", "sliding layers", "sliding window", "rope"],
)
def test_other_decoders_are_refused_with_the_way_out(config, words):
    encoder = encoder_of(config)
    batch = pack_segments([WINDOWS[0].ids_T], [[]])
    with pytest.raises(ValueError) as refused:
        encoder.packed(batch.ids_T, batch.position_T, batch.segments)
    for word in (words, "the shared path needs", "objective.path=reference", "takes it"):
        assert word in str(refused.value)
