"""Predicted memory against what a step really takes, and the choice of a micro-batch from it."""

import gc
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch._subclasses import FakeTensorMode

from smbfast.model import memory
from smbfast.model.backbone import PatientEncoder, lora_config
from smbfast.model.memory import Memory, choose_micro_tokens, full_batch, predict_peak
from smbfast.model.target import TargetEncoder, TargetForm
from smbfast.objective import losses
from smbfast.run.step import backward
from smbfast.settings import LoraSettings, ObjectiveSettings
from tests.rank_server import ranks_give
from tests.tiny import tiny_encoder, tiny_lm

FORM = ObjectiveSettings()
TOKENS, WINDOW = 1024, 512


def encoder_of(kind: str, width: int, layers: int, vocabulary: int) -> PatientEncoder:
    lm = tiny_lm(
        "qwen3",
        hidden_size=width,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        intermediate_size=3 * width,
        num_attention_heads=width // 64,
        num_key_value_heads=max(width // 128, 1),
        head_dim=64,
        max_position_embeddings=WINDOW,
    )
    if kind == "lora":
        lm = get_peft_model(lm, lora_config(lm, LoraSettings(), [1, 2]))
    return PatientEncoder(lm, 2, torch.bfloat16 if kind == "bf16" else None)


def objective(recompute: str):
    options = {"sft_scale": 1.0, "jepa_scale": 1.0, "normalize": True}
    return partial(losses, recompute=recompute, **options)


def predicted(kind: str, recompute: str, device: str = "cpu", width: int = 512) -> Memory:
    encoder = encoder_of(kind, width, 6, 8192).to(device)
    batch = full_batch(TOKENS, WINDOW, FORM, sft=True, jepa=True)
    return predict_peak(encoder, batch, objective(recompute), target=TargetForm())


def train(kind: str, recompute: str, width: int, layers: int, tokens: int, device="cpu") -> None:
    """A step of a small micro-batch, which makes the moments, then one of two of `tokens`."""
    encoder = encoder_of(kind, width, layers, 8192).to(device)
    small, whole = (
        full_batch(n, WINDOW, FORM, sft=True, jepa=True).to(device) for n in (WINDOW // 4, tokens)
    )
    trained = [p for p in encoder.parameters() if p.requires_grad]
    optimizer, target = torch.optim.AdamW(trained, fused=True), TargetEncoder(encoder)
    for micro in ([small], [whole, whole]):
        for batch in micro:
            backward(objective(recompute)(encoder, target, batch))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        target.update(0.99)


def measure(kind: str, recompute: str) -> int | None:
    """The peak resident memory above what a process holds that has trained a tiny model; None where
    the peak cannot be reset."""
    torch.set_num_threads(1)
    train(kind, recompute, 64, 1, 256)
    gc.collect()
    before = resident("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    train(kind, recompute, 512, 6, TOKENS)
    return resident("VmHWM") - before


def resident(name: str) -> int:
    status = dict(x.split(":", 1) for x in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) << 10


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "recompute"), [("lora", "none"), ("whole", "full")])
def test_cpu_within_20_percent_of_peak_resident_memory(kind, recompute):
    """In a process of its own, which holds what has been imported and nothing else."""
    options = {"kind": kind, "recompute": recompute, "timeout": 120.0}
    (peak,) = ranks_give(0, "tests.test_memory:measure", **options)
    if peak is None:
        pytest.skip("the peak of resident memory cannot be reset here")
    assert predicted(kind, recompute).total == pytest.approx(peak, rel=0.2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("kind", ["lora", "whole", "bf16"])
def test_gpu_within_10_percent_of_the_allocators_peak(kind, recompute):
    train(kind, recompute, 64, 1, 256, "cuda")
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train(kind, recompute, 512, 6, TOKENS, "cuda")
    measured = torch.cuda.max_memory_allocated() - before
    assert predicted(kind, recompute, "cuda").total == pytest.approx(measured, rel=0.1)


def test_parts_of_a_prediction_are_what_they_are_made_of():
    encoder = tiny_encoder()
    size = sum(p.numel() * 4 for p in encoder.parameters())
    batch = full_batch(512, 128, FORM, sft=True, jepa=True)
    found = predict_peak(encoder, batch, objective("none"), target=TargetForm("merged"))
    rounding = 512 * len(list(encoder.parameters()))
    assert size <= found.gradients <= size + rounding
    assert found.moments == 2 * found.gradients
    assert size <= found.weights <= size + rounding + 4096  # buffers of the rotary embedding
    trunk = sum(p.numel() * 4 for p in encoder.decoder.parameters())
    assert trunk <= found.target <= trunk + rounding
    # of each layer the backward needs, at the least, the inputs of its linears and of attention
    config = encoder.base.config
    kept = 2 * config.hidden_size + 2 * config.intermediate_size
    assert found.activations >= 4 * 512 * kept * config.num_hidden_layers
    first = predict_peak(
        encoder, batch, objective("none"), target=TargetForm("merged"), accumulates=False
    )
    assert first.total < found.total


def test_nothing_of_the_encoder_is_touched():
    encoder = tiny_encoder(lora=True)
    before = {n: p.detach().clone() for n, p in encoder.named_parameters()}
    batch = full_batch(256, 128, FORM, sft=True, jepa=True)
    predict_peak(encoder, batch, objective("full"), target=TargetForm("tracked"))
    for name, parameter in encoder.named_parameters():
        assert type(parameter) is torch.nn.Parameter and parameter.grad is None, name
        assert torch.equal(parameter, before[name]), name


def test_recomputing_and_smaller_rows_need_less():
    encoder = tiny_encoder(lora=True)
    needs = {
        (tokens, how): predict_peak(
            encoder,
            full_batch(tokens, 128, FORM, sft=True, jepa=True),
            objective(how),
            target=TargetForm("tracked"),
        ).activations
        for tokens in (512, 1024)
        for how in ("none", "mlp", "full")
    }
    for tokens in (512, 1024):
        assert needs[tokens, "full"] < needs[tokens, "mlp"] < needs[tokens, "none"]
    assert needs[1024, "none"] == pytest.approx(2 * needs[512, "none"], rel=0.1)


@pytest.mark.parametrize("tokens", [1, 700, 4096, 5000])
@pytest.mark.parametrize(("sft", "jepa"), [(True, True), (True, False), (False, True)])
def test_a_full_batch_is_full(tokens, sft, jepa):
    batch = full_batch(tokens, 512, ObjectiveSettings(cuts=2), sft=sft, jepa=jepa)
    batch.check()
    assert batch.segments.tokens == tokens
    assert bool(batch.num_labels) == sft
    assert bool(batch.num_masked) == (jepa and tokens > 1)


@pytest.mark.parametrize("jepa", [True, False])
def test_a_full_batch_that_looks_ahead_has_all_its_pairs(jepa):
    """Each position has all horizons; but for a window's last token, they hold its other tokens."""
    form = ObjectiveSettings(jepa="horizon", positions=8)
    batch = full_batch(700, 512, form, sft=False, jepa=jepa, num_horizons=3)
    batch.check()
    assert batch.segments.tokens == 700 and batch.num_masked == 0
    assert batch.num_pairs == 2 * 8 * 3
    assert batch.num_latent == (2 * 7 * 3 if jepa else 0)
    assert batch.target_segments.tokens == (700 if jepa else 0)


@pytest.mark.parametrize(
    ("free", "bend", "expected"),
    [
        (10**9, 1000, 32768),
        (930_000, 1000, 5120),
        (400_000, 1000, 2300),
        (520_000, 1000, 3072),
        (1_000_000, -1500, 7168),  # the line between both ends says 8192
    ],
)
def test_the_most_tokens_that_fit_are_chosen(free, bend, expected):
    def needs(tokens: int) -> int:
        asked.append(tokens)
        return 100_000 + 105 * tokens + tokens**2 // bend  # not quite a line

    asked: list[int] = []
    assert choose_micro_tokens(needs, free, least=2300) == expected
    assert len(asked) < 6


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"2300 tokens, .* model\.recompute=full"):
        choose_micro_tokens(lambda tokens: 1 << 30, 1 << 29, least=2300)


def test_a_container_may_have_less_than_the_machine(monkeypatch):
    files = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 4096 kB\n"}
    monkeypatch.setattr(memory, "_read", lambda path: files.get(path, ""))
    assert memory.free_memory(torch.device("cpu")) == 4 << 20
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    files["/sys/fs/cgroup/memory.current"] = "1000\n"
    assert memory.free_memory(torch.device("cpu")) == 4 << 20
    files["/sys/fs/cgroup/memory.max"] = "3000\n"
    assert memory.free_memory(torch.device("cpu")) == 2000
    # what was read from files is given back
    files["/sys/fs/cgroup/memory.stat"] = "active_file 9\ninactive_file 500\n"
    assert memory.free_memory(torch.device("cpu")) == 2500


@pytest.mark.parametrize(("device", "rows"), [("cpu", 512), ("cuda", 2048)])
def test_a_chunk_of_logits_is_what_the_operation_makes(device, rows):
    """Larger on a GPU; in bf16 it has an fp32 copy but where a kernel needs none."""
    with FakeTensorMode():
        hidden_ND = torch.empty(4096, 64, dtype=torch.bfloat16, device=device)
        weight_VD = torch.empty(900_000, 64, dtype=torch.bfloat16, device=device)
        assert memory._logits(hidden_ND, weight_VD, copied=True) == rows * 900_000 * 6
        assert memory._logits(hidden_ND, weight_VD, copied=False) == rows * 900_000 * 2
        wide_ND = hidden_ND.float()
        assert memory._logits(wide_ND, weight_VD, copied=True) == rows * 900_000 * 4
