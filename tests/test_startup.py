"""What a run does before its first step: the self-check, the path and the kernels it is told."""

import json

import pytest
import torch
from smbkernels import use
from smbkernels.registry import OPS

import smbfast.model.decoder as decoder_module
import smbfast.run.startup as startup
import smbfast.train as entry
from smbfast import objective
from smbfast.data.loader import make_batch
from smbfast.model.backbone import PatientEncoder
from smbfast.model.target import TargetEncoder
from smbfast.run.startup import losses_of, self_check
from smbfast.settings import ObjectiveSettings, PhaseSettings, TrainSettings, kernel_choice, load
from smbfast.simulation.dataset import simulate
from tests.refusal import refused
from tests.tiny import random_window, window_set
from tests.two_paths import CASES, FP64, assert_same, make_encoder, moved_target, run

WINDOWS = [random_window(s, buckets=b) for s, b in ((1, 6), (2, 5), (3, 7), (4, 1))]
PHASES = {
    name: PhaseSettings(name=name, steps=1, w_sft=sft, w_jepa=jepa)
    for name, sft, jepa in (("sft", 1.0, 0.0), ("jepa", 0.0, 1.0), ("both", 0.1, 1.0))
}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory, no_report):
    folder = tmp_path_factory.mktemp("data") / "cohort"
    simulate(folder, 40, 0)
    return folder


def settings_of(*more: str) -> TrainSettings:
    return load("tiny", ["--objective.min_future=4", "--objective.cuts=2", *more])


def checked(
    encoder: PatientEncoder, target: TargetEncoder | None, phase: str, *more: str
) -> dict[str, float]:
    settings = settings_of(*more)
    windows = window_set(WINDOWS, settings.objective)
    return self_check(encoder, target, windows, settings, 0, PHASES[phase])


def held(encoder: PatientEncoder, target: TargetEncoder) -> dict[str, torch.Tensor]:
    """Copies of all that a check could change."""
    state = {**encoder.state_dict(), **{f"target.{n}": w for n, w in target.state().items()}}
    return {n: w.clone() for n, w in state.items()}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_right_model_passes_and_is_as_it_was(case, phase):
    encoder = make_encoder("llama", lora=case.lora, tie=case.tie)
    target = moved_target(encoder, case.form)
    before, wanted = held(encoder, target), [p.requires_grad for p in encoder.parameters()]
    norm = "layer" if case.tie else "none"
    found = checked(encoder, target, phase, f"--objective.target_norm={norm}")
    assert 0 <= found["loss"] < 1e-6 and 0 < found["gradient"] < 1e-4
    assert all(p.grad is None for p in encoder.parameters())
    assert [p.requires_grad for p in encoder.parameters()] == wanted
    after = held(encoder, target)
    assert list(after) == list(before)
    assert all(torch.equal(after[n], w) for n, w in before.items())
    if phase == "sft":
        assert checked(encoder, None, phase) == found  # no target is held there


@pytest.mark.parametrize("recompute", ["mlp", "full"])
def test_the_check_is_of_what_is_trained_with(recompute, monkeypatch):
    seen = []
    real = objective.losses
    monkeypatch.setattr(
        objective, "losses", lambda *a, **k: (seen.append(k["recompute"]), real(*a, **k))[1]
    )
    encoder = make_encoder()
    assert checked(encoder, moved_target(encoder), "both", f"--model.recompute={recompute}")
    assert seen == [recompute]


def spoiled(monkeypatch, place, name, spoil):
    real = getattr(place, name)
    monkeypatch.setattr(place, name, lambda *args, **kwargs: spoil(real, *args, **kwargs))


def shorter_prefix(real, q, k, v, segments, **kwargs):
    """Branches that see one token of the trunk less."""
    columns = segments.host_S6[:, :4].clone()
    columns[:, 3] -= (columns[:, 3] > 1).int()
    return real(q, k, v, type(segments).of(*columns.unbind(1)), **kwargs)


def nan_gradient(real, *args, **kwargs):
    first, *others = real(*args, **kwargs)
    if first.requires_grad:
        first.register_hook(lambda g: g * torch.nan)
    return [first, *others]


WRONG = {
    "attention a little off": (
        "timeline_attention",
        lambda real, *a, **k: (1.003 * real(*a, **k)[0], None),
    ),
    "a token less of each prefix": ("timeline_attention", shorter_prefix),
    "adapters at another scale": (
        "lora_linear",
        lambda real, *a, scale, **k: real(*a, scale=[1.01 * s for s in scale], **k),
    ),
    "a gradient that is dropped": (
        "lora_linear",
        lambda real, x, w, b, a, **k: real(x, w, b, [v.detach() for v in a], **k),
    ),
    "a gradient that is not finite": ("lora_linear", nan_gradient),
}


@pytest.mark.parametrize("phase", ["sft", "both"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_kernel_is_refused(wrong, phase, monkeypatch):
    """With the name of a parameter and the ways out; no gradient stays."""
    encoder = make_encoder()
    target = moved_target(encoder)
    name, spoil = WRONG[wrong]
    spoiled(monkeypatch, decoder_module, name, spoil)
    if phase == "sft" and wrong == "a token less of each prefix":
        assert checked(encoder, target, phase)  # no branch, nothing wrong
        return
    message = refused(lambda: checked(encoder, target, phase), "shared forward and the reference")
    names = [n for n, p in encoder.named_parameters() if p.requires_grad]
    assert any(n in message for n in names)
    if wrong != "a gradient that is dropped":
        for way in ("--kernels=torch", "--objective.path=reference", "self_check=false"):
            assert way in message
    assert all(p.grad is None for p in encoder.parameters())


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("masked_jepa_mse", lambda real, *a, scale, **k: real(*a, scale=1.01 * scale, **k)),
        ("masked_jepa_mse", lambda real, *a, **k: real(*a, **k) * torch.nan),
        ("masked_jepa_mse", lambda real, *a, **k: None),
        # a head without the rows that are trained beside it
        (
            "linear_cross_entropy",
            lambda real, h, w, label, *_, scale: real(h, w, label, scale=scale),
        ),
    ],
)
def test_a_wrong_loss_is_refused(name, spoil, monkeypatch):
    encoder = make_encoder()
    target = moved_target(encoder)
    assert checked(encoder, target, "both")
    spoiled(monkeypatch, objective, name, spoil)
    refused(lambda: checked(encoder, target, "both"), "shared forward and the reference")


def test_each_single_parameter_is_watched(monkeypatch):
    """A gradient that is a hundredth off, of any one: refused by its name."""
    encoder = make_encoder()
    target = moved_target(encoder)
    real = objective.losses
    for name, parameter in encoder.named_parameters():
        if not parameter.requires_grad or ".layers.0." in name:
            continue

        def off(*args, parameter=parameter, **kwargs):
            parts = real(*args, **kwargs)
            handle = parameter.register_hook(lambda g: (handle.remove(), 1.01 * g)[1])
            return parts

        with monkeypatch.context() as patch:
            patch.setattr(objective, "losses", off)
            refused(lambda: checked(encoder, target, "both"), f"the gradient of {name} by")


def test_the_slice_is_of_short_windows_that_have_a_part(monkeypatch):
    seen = []
    real = startup.make_batch
    monkeypatch.setattr(
        startup, "make_batch", lambda w, *a, **k: (seen.append(w), real(w, *a, **k))[1]
    )
    encoder = make_encoder()
    target = moved_target(encoder)
    for limit, count in ((10_000, 3), (1, 1)):
        monkeypatch.setattr(startup, "SLICE", limit)
        checked(encoder, target, "both")
        lengths = [len(w) for w in seen[-1]]
        # the shortest has no cut, and says nothing about JEPA
        assert lengths == sorted(len(w) for w in WINDOWS[:3])[:count]


def test_the_path_is_that_of_the_settings():
    encoder, batch = (
        make_encoder(),
        make_batch(WINDOWS, ObjectiveSettings(min_future=4), 0, 0, jepa=True),
    )
    target = moved_target(encoder)
    weights = {"sft_scale": 1.0, "jepa_scale": 1.0}
    for more in ([], ["--objective.path=reference"]):
        for norm in ("layer", "none"):
            settings = settings_of(f"--objective.target_norm={norm}", *more)
            path = startup.reference if more else objective
            expected = path.losses(encoder, target, batch, normalize=norm == "layer", **weights)
            assert losses_of(settings)(encoder, target, batch, **weights) == expected


def short_run(cohort, folder, *more: str) -> list[dict]:
    """Two steps, one of each phase; what the log says."""
    words = [
        f"--data.path={cohort}",
        f"--data.prepared={cohort.parent / 'prepared'}",
        f"--run.dir={folder}",
        "--probe.labels=[]",
        "--phases.0.steps=1",
        "--phases.1.steps=1",
        "--run.log_every=1",
        "--run.threads=1",
        "--eval.windows=2",
        "--optim.micro_tokens=512",
    ]
    entry.main(["tiny", *words, *more])
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_checks_itself_before_each_phase(cohort, tmp_path):
    log = short_run(cohort, tmp_path / "run")
    kinds = [r["kind"] for r in log if r["kind"] in ("step", "self_check")]
    assert kinds == ["self_check", "step"] * 2
    assert all(0 < r["gradient"] < 1e-4 for r in log if r["kind"] == "self_check")
    told = [(r["sft"], r["jepa"] or 0.0) for r in log if r["kind"] == "step"]
    assert [jepa > 0 for _, jepa in told] == [False, True]
    for way in (
        ["--objective.path=reference"],
        ["--objective.self_check=false", "--kernels=torch"],
    ):
        other = short_run(cohort, tmp_path / str(len(way)), *way)
        assert not any(r["kind"] == "self_check" for r in other)
        found = [(r["sft"], r["jepa"] or 0.0) for r in other if r["kind"] == "step"]
        for left, right in zip(found, told, strict=True):
            assert left == pytest.approx(right, rel=1e-5)


def test_a_run_on_a_wrong_kernel_takes_no_step(cohort, tmp_path, monkeypatch):
    spoiled(monkeypatch, decoder_module, "timeline_attention", WRONG["attention a little off"][1])
    refused(lambda: short_run(cohort, tmp_path / "run"), "smbfast.train:", "self_check=false")
    log = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"step"' not in {json.loads(line)["kind"] for line in log.splitlines()}
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed"


def test_words_of_kernels():
    assert kernel_choice("auto") == ("auto", {})
    assert kernel_choice("torch") == ("torch", {})
    assert kernel_choice("lora_linear:torch, timeline_attention:sdpa") == (
        None,
        {"lora_linear": "torch", "timeline_attention": "sdpa"},
    )
    assert kernel_choice("torch,timeline_attention:sdpa") == (
        "torch",
        {"timeline_attention": "sdpa"},
    )
    for word in ("auto", "torch", "lora_linear:fused", "torch,timeline_attention:sdpa"):
        assert load("tiny", [f"--kernels={word}"]).kernels == word


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("nonsense", "one of"),
        ("lora_linear:nonsense", "backend of lora_linear must be one of fused"),
        ("nonsense:torch", "operation must be one of add_rms_norm, ema_update_"),
        ("backend:torch", "operation must be one of add_rms_norm, ema_update_"),
        ("lora_linear:", "auto, torch or pairs operation:backend"),
        (":torch", "auto, torch or pairs operation:backend"),
        ("torch,auto", "one backend for all operations"),
        ("torch,", "auto, torch or pairs operation:backend"),
    ],
)
def test_kernels_that_do_not_exist_are_refused(word, expected):
    refused(lambda: load("tiny", [f"--kernels={word}"]), "`kernels`", expected)


@pytest.mark.numeric
@pytest.mark.parametrize("case", [CASES[0], CASES[5]], ids=str)
@pytest.mark.parametrize("word", ["torch", *(f"{name}:torch" for name in sorted(OPS))])
def test_references_of_the_kernels_compute_the_same(word, case):
    encoder = make_encoder(lora=case.lora, dtype=FP64)
    target = moved_target(encoder, case.form)
    batch = make_batch(WINDOWS, ObjectiveSettings(min_future=4, cuts=2), 0, 0, jepa=True)
    expected = run("shared", encoder, target, [batch])
    everywhere, by_op = kernel_choice(word)
    with use(everywhere, **by_op):
        assert_same(run("shared", encoder, target, [batch]), expected, 1e-12)
