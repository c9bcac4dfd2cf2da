"""What a run settles before its first step: rows, the ceiling, other backbones, a missing cut."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

import smbfast.run.startup as startup
from smbfast import train
from smbfast.base.config import to_toml
from smbfast.base.locks import LOCK, locked
from smbfast.base.runtime import matmul_rate
from smbfast.data.loader import Step
from smbfast.model.backbone import PatientEncoder
from smbfast.model.flops import ModelShape
from smbfast.run.folder import earlier
from smbfast.run.metrics import Meter
from smbfast.run.open_run import Progress
from smbfast.run.startup import layer_dtype, micro_tokens, self_check
from smbfast.settings import PhaseSettings, load
from tests.refusal import refused
from tests.tiny import random_window, tiny_encoder, window_set
from tests.two_paths import make_encoder

SFT = PhaseSettings(name="sft", steps=1, w_sft=1.0, w_jepa=0.0)


def test_the_ceiling_is_measured_however_short_the_time():
    rate = matmul_rate(torch.device("cpu"), torch.float32, seconds=0.0)
    assert rate.flops > 0 and Meter(10, Progress(), rate).read(1)["matmul"] == 0


def test_a_run_counts_its_tokens_and_flops_over_all_its_processes():
    rate, progress = matmul_rate(torch.device("cpu"), torch.float32, seconds=0.0), Progress()
    for _ in range(2):
        meter = Meter(10, progress, rate)
        for tokens in (70, 50):
            meter.add(Step(0, [], num_labels=9, num_masked=3, num_tokens=tokens), 10**15)
            meter.read(1)  # a line of the log begins no new count
    assert (progress.tokens, progress.flops) == (240, 4 * 10**15)
    assert Progress.of({"step": 3, "tokens": 7, "flops": 8}) == Progress(3, tokens=7, flops=8)


class Windows(list):
    """Windows in memory, of a run that does not look ahead."""

    horizons = None


def test_a_step_without_a_cut_is_still_checked(monkeypatch):
    """SFT is compared where no window has a cut: attention that returns zeros is refused."""
    windows = Windows(random_window(s, buckets=1) for s in range(4))
    encoder = make_encoder()
    settings = load("tiny", [])
    assert self_check(encoder, None, windows, settings, 0, SFT)["loss"] < 1e-5

    def nothing(query, key, value, segments, *, scale=None):
        return query * 0, None

    monkeypatch.setattr("smbfast.model.decoder.timeline_attention", nothing)
    with pytest.raises(ValueError, match="the shared forward and the reference differ"):
        self_check(encoder, None, windows, settings, 0, SFT)


@pytest.mark.parametrize(
    ("factor", "words"),
    [(float("nan"), "hold NaN"), (1e36, "hold NaN"), (1e3, r"and a guess has 4\.11")],
)
def test_weights_that_are_no_good_are_not_the_kernels_fault(factor, words):
    encoder, windows = make_encoder(), Windows(random_window(s) for s in range(4))
    with torch.no_grad():
        for weight in (p for p in encoder.parameters() if p.requires_grad):
            weight *= factor
    with pytest.raises(ValueError, match=words) as refusal:
        self_check(encoder, None, windows, load("tiny", []), 0, SFT)
    assert "checkpoint" not in str(refusal.value)  # there may be none


def test_a_model_that_magnifies_rounding_is_not_compared(capsys):
    """Its attention is so sharp that the last digit decides what is attended to."""
    encoder, settings = make_encoder("llama", lora=False), load("tiny", ["--objective.cuts=2"])
    windows = window_set([random_window(s) for s in range(6)], settings.objective)
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            weight *= 1e4 if "q_proj" in name else 1
    before = [p.detach().clone() for p in encoder.parameters()]
    gap = self_check(encoder, None, windows, settings, 0, SFT)["gradient"]
    # how large it is, other processors decide
    assert (gap > 5e-3) <= ("rounding alone changes the gradients" in capsys.readouterr().err)
    assert all(map(torch.equal, before, encoder.parameters()))


def test_a_resumed_run_keeps_its_rows_however_little_is_free(monkeypatch):
    monkeypatch.setattr(startup, "free_memory", lambda device: 1)
    assert micro_tokens(load("tiny", []), tiny_encoder(), 1536)[0] == 1536
    with pytest.raises(ValueError, match=r"optim\.micro_tokens"):
        micro_tokens(load("tiny", []), tiny_encoder())


def test_a_folder_that_holds_a_run_of_other_settings_is_refused(tmp_path):
    before = load("tiny", [])
    assert earlier(tmp_path, before) == "new"
    (tmp_path / "config.toml").write_text(to_toml(before))
    for more in (
        [],
        ["--run.keep=9"],
        ["--optim.micro_tokens=512"],
        ["--objective.path=reference"],
    ):
        assert earlier(tmp_path, load("tiny", more)) == "resumed"
    for name in ("run.seed", "optim.batch", "objective.span", "phases.1.steps", "data.window"):
        with pytest.raises(ValueError, match=rf"take back\n  {name}: \d+ -> 99$"):
            earlier(tmp_path, load("tiny", [f"--{name}=99"]))
    with pytest.raises(ValueError, match=r"run\.resume is never"):
        earlier(tmp_path, load("tiny", ["--run.resume=never"]))


def test_a_folder_in_use_is_left_to_the_run_that_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "_run", lambda *words: None)
    with locked(tmp_path / "run", "smbfast.train"):
        refused(lambda: train.main(["tiny", f"--run.dir={tmp_path / 'run'}"]), "is in use by")
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]


def test_the_largest_window_counts_the_horizon_of_its_branches(monkeypatch):
    """Eight futures of 16 tokens beside 128, not eight of three quarters of them."""
    asked = []
    monkeypatch.setattr(
        startup, "choose_micro_tokens", lambda *a, least, most: asked.append(least) or least
    )
    for horizon, expected in ((["--objective.horizon=16"], 256), ([], 128 + 8 * 96)):
        micro_tokens(load("tiny", ["--objective.cuts=8", *horizon]), tiny_encoder())
        assert asked[-1] == expected


def test_backbones_that_only_the_reference_takes_can_be_counted():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=16, n_layer=1, n_head=2))
    shape = dict(vocab_size=61, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    qwen2 = Qwen2ForCausalLM(
        Qwen2Config(**shape, num_key_value_heads=1, intermediate_size=24, tie_word_embeddings=True)
    )
    settings = load("tiny", ["--objective.path=reference"])
    for lm in (gpt2, qwen2):
        encoder = PatientEncoder(lm, 2)
        assert ModelShape.of(encoder).head_dim == 8
        assert layer_dtype(encoder) == torch.float32
        assert micro_tokens(settings, encoder) == (startup.MOST_ON_CPU, 0)
