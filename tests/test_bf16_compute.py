"""A model trained whole that computes in bf16 on weights in fp32.

A forward is that of a model in bf16, bit for bit, on every path; all that training keeps is fp32.

u = 2^-8 is the largest relative rounding of bf16.
"""

import json
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

import smbfast.train as entry
from smbfast import objective
from smbfast.data.loader import make_batch
from smbfast.model.backbone import PatientEncoder, compute_dtype, make_encoder
from smbfast.model.memory import full_batch, predict_peak
from smbfast.model.target import TargetEncoder, TargetForm, target_bytes
from smbfast.run.checkpoint import restore_final
from smbfast.run.optim import make_optimizer
from smbfast.run.step import LossScales, Updater, forward_backward
from smbfast.settings import ObjectiveSettings, OptimSettings, TrainSettings
from smbfast.simulation.dataset import simulate
from tests import two_paths
from tests.test_vocabulary import codes, names_of, tokenizer_of
from tests.tiny import random_window, tiny_lm
from tests.two_paths import PATHS, apart, move, moved_target, run, twin

BF16, FP32 = torch.bfloat16, torch.float32
CPU = torch.device("cpu")
FORM = ObjectiveSettings(min_future=4, cuts=2)
WINDOWS = [random_window(s, buckets=b) for s, b in ((1, 6), (2, 5), (3, 7))]
BATCH = make_batch(WINDOWS, FORM, 0, 0, sft=True, jepa=True)
IDS = torch.tensor([[1, 7, 50, 9, 33, 51, 4, 52, 20, 11, 50, 8]])
KINDS = ["qwen3", "llama"]


def encoder_of(kind: str = "qwen3", **more) -> PatientEncoder:
    encoder = two_paths.make_encoder(kind, lora=False, **more)
    encoder.compute = BF16
    return encoder


def in_bf16(encoder: PatientEncoder) -> PatientEncoder:
    """Another encoder, whose language model is rounded to bf16 as transformers loads one."""
    other = twin(encoder)
    other.compute = None
    for parameter in other.lm.parameters():
        parameter.data = parameter.data.bfloat16()
    return other


def states_of(encoder: PatientEncoder) -> dict[str, torch.Tensor]:
    pack = (BATCH.ids_T, BATCH.position_T, BATCH.segments, BATCH.masked_M)
    masked_BT = torch.zeros_like(IDS, dtype=torch.bool)
    masked_BT[0, 3:6] = True
    return {
        "padded": encoder.hidden(IDS, masked_BT),
        "packed": encoder.packed(*pack),
        "rows": encoder.packed(*pack, rows=BATCH.masked_M),
        "embedded": encoder.embed_packed(BATCH.ids_T),
    }


@torch.no_grad()
@pytest.mark.numeric
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_is_that_of_the_model_in_bf16(kind, tie):
    encoder = encoder_of(kind, tie=tie)
    expected = states_of(in_bf16(encoder))
    for name, state in states_of(encoder).items():
        assert state.dtype == BF16 and torch.equal(state, expected[name]), name


@torch.no_grad()
@pytest.mark.numeric
@pytest.mark.parametrize("kind", KINDS)
def test_the_target_reads_its_average_in_bf16(kind):
    """Also after an update and a load, when copies that were made before are of no use."""
    encoder = encoder_of(kind)
    target = moved_target(encoder)
    pack = (BATCH.target_ids_U, BATCH.target_position_U, BATCH.target_segments)
    for change in ("none", "update", "load"):
        if change == "update":
            move(encoder, 9)
            target.update(0.5)
        if change == "load":
            target.load({n: 1.25 * w for n, w in target.state().items()})
        averaged = in_bf16(two_paths.make_encoder(kind, lora=False))
        for name, weight in target.exact().items():
            assert weight.dtype == FP32
            averaged.decoder.get_parameter(name).copy_(weight)
        for norm in (True, False):
            found = target.packed(*pack, norm=norm)
            states = averaged.packed_decoder(averaged.embed_packed(pack[0]), *pack[1:], norm=norm)
            assert found.dtype == BF16 and torch.equal(found, states), change
        assert torch.equal(target.hidden(IDS), averaged.hidden(IDS)), change
        assert torch.equal(target.final_norm()[0], averaged.decoder.norm.weight)


@pytest.mark.numeric
@pytest.mark.parametrize("recompute", ["none", "mlp", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_fp32_and_those_of_the_model_in_bf16(kind, recompute):
    """Of a layer's matrices bit for bit: each is read once, so nothing is summed in bf16.

    Without JEPA, whose target of a model in bf16 is rounded half up, and here half to even.
    """
    encoder = encoder_of(kind)
    other = in_bf16(encoder)
    found_losses, found = run("shared", encoder, None, [BATCH], jepa=0.0, recompute=recompute)
    losses, expected = run("shared", other, None, [BATCH], jepa=0.0, recompute=recompute)
    names = {n for n, _ in encoder.named_parameters(remove_duplicate=True) if n.startswith("lm.")}
    assert found.keys() == expected.keys() >= names
    assert {g.dtype for g in found.values()} == {FP32}
    assert found_losses == losses
    layers = [n for n in found if ".layers." in n and n.endswith("proj.weight")]
    assert len(layers) == 14
    for name in layers:
        assert torch.equal(found[name], expected[name].float()), name


@pytest.mark.numeric
@pytest.mark.parametrize("path", list(PATHS))
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_near_those_of_fp32(kind, path):
    """Input, weight and output of 2 layers of 7 linears are rounded, forward and backward.

    That leaves u sqrt(3 * 2 * 7) = 2.5 % of a state's norm, and u sqrt(2 * 3 * 2 * 7) = 3.6 % of a
    gradient's; norms and softmax let it grow, at most three times as tests/test_equivalence.py has
    it. A loss is a mean over many states, whose errors have any sign.
    """
    encoder = encoder_of(kind)
    target = moved_target(encoder)
    losses, found = run(path, encoder, target, [BATCH])
    encoder.compute = None
    exact_losses, exact = run(
        path, encoder, TargetEncoder.of_state(encoder, target.state()), [BATCH]
    )
    assert losses == pytest.approx(exact_losses, rel=0.025)
    assert losses != exact_losses
    floor = 0.03 * sum(float(g.square().sum()) for g in exact.values()) ** 0.5
    for name, gradient in exact.items():
        assert 0 < apart(found[name], gradient, floor) < 0.11, name


@pytest.mark.numeric
@pytest.mark.parametrize("kind", KINDS)
def test_thirty_steps_learn_on_weights_in_fp32(kind):
    encoder = encoder_of(kind)
    target = TargetEncoder(encoder, TargetForm("merged"))
    updater = Updater(make_optimizer(encoder, OptimSettings()), clip=1.0)
    scales = LossScales.of(1.0, 1.0, BATCH.num_labels, BATCH.num_masked)
    losses = partial(objective.losses, normalize=True)
    totals = []
    for _ in range(30):
        summed = forward_backward(losses, encoder, target, [BATCH], scales)
        updater.step(3e-3, target, 0.9)
        totals.append(float(summed.sft) + float(summed.jepa))
    assert totals[-1] < 0.7 * totals[0]
    moments = [v for s in updater.optimizer.state.values() for v in s.values()]
    kept = [*encoder.parameters(), *moments, *target.state().values()]
    assert {t.dtype for t in kept} == {FP32}


@pytest.mark.numeric
def test_updates_below_the_rounding_of_bf16_are_kept():
    """A weight near 1 moves by 40 steps of 1e-4, each a fortieth of what bf16 can hold there."""
    results = {}
    for name, dtype in (("ours", FP32), ("plain", BF16)):
        encoder = encoder_of()
        if dtype == BF16:
            encoder = in_bf16(encoder)
        weight = encoder.decoder.layers[0].mlp.up_proj.weight
        with torch.no_grad():
            weight.fill_(0.99)
            before = encoder.hidden(IDS)
        updater = Updater(make_optimizer(encoder, OptimSettings(weight_decay=0)), clip=1e9)
        for _ in range(40):
            weight.grad = torch.ones_like(weight)
            updater.step(1e-4)
        with torch.no_grad():
            changed = not torch.equal(encoder.hidden(IDS), before)
        results[name] = (float(weight.detach().mean()), changed)
    assert results["plain"] == (float(torch.tensor(0.99, dtype=BF16)), False)
    # AdamW moves by the learning rate where a gradient is always the same
    assert results["ours"] == (pytest.approx(0.99 - 40e-4, abs=1e-5), True)


def test_the_dtype_follows_setting_device_and_width():
    gpu = torch.device("cuda")
    assert compute_dtype("auto", 512, gpu) == BF16
    assert compute_dtype("auto", 511, gpu) is compute_dtype("auto", 4096, CPU) is None
    assert compute_dtype("bfloat16", 16, CPU) == BF16
    assert compute_dtype("float32", 4096, gpu) is None


def settings_of(**model) -> TrainSettings:
    phase = {"name": "only", "steps": 1, "w_sft": 1.0, "w_jepa": 1.0}
    sizes = {"hidden": 16, "heads": 2, "kv_heads": 1, "ffn": 24, "layers": 2}
    return TrainSettings(
        model={**sizes, **model}, data={"window": 128}, phases=[phase], run={"dir": "unused"}
    )


def test_a_pretrained_model_that_is_trained_whole_loses_no_digit(tmp_path):
    lm = tiny_lm("llama", tie=False)
    lm.save_pretrained(tmp_path)
    settings = settings_of(path=str(tmp_path), train="all", dtype="bfloat16")
    encoder = make_encoder(settings, tokenizer_of(), CPU)
    assert encoder.dtype == BF16 and all(p.requires_grad for p in encoder.parameters())
    assert all(map(torch.equal, encoder.lm.parameters(), lm.parameters()))
    # and its new rows are trained as everything is
    tokens = codes(20)
    grown = make_encoder(settings, tokenizer_of(names_of(tokens)), CPU, tokens)
    assert grown.head_VD.shape[0] == 81 and grown.head_VD.dtype == FP32


def test_a_model_made_from_scratch_computes_as_it_is_told():
    for chosen, dtype in (("auto", FP32), ("float32", FP32), ("bfloat16", BF16)):
        encoder = make_encoder(settings_of(dtype=chosen), tokenizer_of(), CPU)
        assert encoder.dtype == dtype and {p.dtype for p in encoder.parameters()} == {FP32}
        assert encoder.hidden(IDS).dtype == dtype


def test_memory_is_foretold():
    """Weights and averages in fp32, copies and activations in bf16."""
    encoder = encoder_of()
    run = partial(objective.losses, sft_scale=1.0, jepa_scale=1.0, normalize=True)
    batch = full_batch(2048, 128, ObjectiveSettings(), sft=True, jepa=True)
    form = TargetForm("merged")
    narrow = predict_peak(encoder, batch, run, target=form)
    copied = target_bytes(encoder, form)
    target = TargetEncoder(encoder, form)
    target.hidden(IDS)
    held = [*target.state().values(), *target._weights().values()]
    assert copied == sum(w.numel() * w.element_size() for w in held)
    encoder.compute = None
    wide = predict_peak(encoder, batch, run, target=form)
    assert narrow.gradients == wide.gradients and narrow.target == wide.target
    # of so small a model all but the predictor's and the loss's fp32 is half as large
    assert 0.4 * wide.activations < narrow.activations < 0.75 * wide.activations


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_a_run_in_bf16_checks_itself_resumes_and_is_saved_in_fp32(tmp_path, capsys):
    cohort = tmp_path / "cohort"
    simulate(cohort, 60, 0)
    steps = ["--phases.0.steps=2", "--phases.1.steps=2", "--phases.0.lr=0.01"]
    more = ["--data.window=128", "--run.threads=1", "--probe.labels=[]", "--run.save_every=1"]
    paths = [f"--data.path={cohort}", "--model.dtype=bfloat16"]
    command = ["tiny", *paths, f"--run.dir={tmp_path / 'run'}", *steps, *more]
    entry.main(command)
    final = tmp_path / "run" / "final"
    whole = load_file(final / "model.safetensors")
    shutil.rmtree(final)
    (tmp_path / "run" / "status.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
    entry.main(command)  # goes on after step 3
    again = load_file(final / "model.safetensors")
    assert "resumed after step 3" in capsys.readouterr().out
    assert all(torch.equal(again[n], w) for n, w in whole.items())
    assert {w.dtype for w in load_file(final / "model.safetensors").values()} == {FP32}
    assert {w.dtype for w in load_file(final / "target.safetensors").values()} == {FP32}
    record = json.loads((final / "smbfast.json").read_text())
    assert (record["dtype"], record["compute"]) == ("float32", "bfloat16")
    encoder, target, _ = restore_final(final, CPU)
    assert encoder.dtype == BF16
    state = load_file(tmp_path / "run" / "checkpoints" / "step-000004" / "state.safetensors")
    assert {t.dtype for t in state.values() if t.is_floating_point()} == {FP32}
    own = dict(encoder.named_parameters())
    for name, value in own.items():
        assert torch.equal(value, state[f"model.{name}"]), name
    assert target.hidden(IDS).dtype == BF16
