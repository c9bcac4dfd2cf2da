"""Phases that freeze the decoder or the predictor, or sync the target: weights, gradients, resume.

The decoder is all that an embedding is made of: the backbone or its adapter and token rows, and the
mask vector. The predictor goes with the head of codes to come.
"""

import json
import tomllib
from dataclasses import replace
from functools import partial
from importlib.resources import files

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import smbfast.train as entry
from smbfast import objective
from smbfast.batch import UNKNOWN, Ahead, PackedBatch, Timeline
from smbfast.data.horizons import Horizons
from smbfast.data.loader import make_batch
from smbfast.model.backbone import PatientEncoder, Predictor
from smbfast.model.codes_head import CodesHead
from smbfast.model.flops import ModelShape, flops_in_phase, step_flops
from smbfast.run import console, loop
from smbfast.run.optim import make_optimizer
from smbfast.run.startup import Kind, heaviest
from smbfast.run.step import LossScales, Updater, forward_backward
from smbfast.settings import ObjectiveSettings, OptimSettings, PhaseSettings, load
from smbfast.simulation.dataset import simulate
from tests.tiny import random_window
from tests.two_paths import CASES, Case, make_encoder, moved_target, run

DAY = 86_400_000_000
AHEAD = Horizons(("1d", "3d"), bucket=DAY)
CLASSES = 4
FORMS = {
    "mask": ObjectiveSettings(min_future=4),
    "horizon": ObjectiveSettings(jepa="horizon", positions=4),
}
KINDS = [case for case in CASES if case.tie and case.form == ("tracked" if case.lora else "merged")]


def window(seed: int) -> Timeline:
    """A window of six days, whose lines have classes."""
    plain = random_window(seed)
    class_L = np.arange(len(plain.line_time_L), dtype=np.int32) % CLASSES
    last = int(plain.bucket_time_B[-1]) + DAY
    return replace(plain, ahead=Ahead(plain.line_time_L, class_L, last, UNKNOWN))


def batch_of(jepa: str) -> PackedBatch:
    windows, sees = [window(seed) for seed in (1, 2, 3)], {"horizons": AHEAD, "codes": True}
    return make_batch(windows, FORMS[jepa], 0, 0, jepa=True, **sees)


def encoder_of(jepa: str, case: Case) -> PatientEncoder:
    encoder = make_encoder(lora=case.lora)
    if jepa == "horizon":
        encoder.predictor = Predictor(encoder.width, 2, len(AHEAD))
    encoder.codes = CodesHead(encoder.width, np.full((len(AHEAD), CLASSES), 0.2))
    return encoder


def parts_of(encoder: PatientEncoder) -> dict[str, set[str]]:
    """Names of the trained weights, by what freezes them."""
    names = {n for n, p in encoder.named_parameters() if p.requires_grad}
    predictor = {n for n in names if n.startswith(("predictor.", "codes."))}
    return {"none": set(), "predictor": predictor, "decoder": names - predictor}


@pytest.mark.numeric
@pytest.mark.parametrize("jepa", FORMS)
@pytest.mark.parametrize("path", ["shared", "reference"])
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_what_is_frozen_has_no_gradient_and_the_rest_has_its_own(case, path, jepa):
    """To the bit: a gradient is made by the same operations, whether others are made or not."""
    encoder, batch = encoder_of(jepa, case), batch_of(jepa)
    target, parts = moved_target(encoder, case.form), parts_of(encoder)
    if jepa == "horizon":
        parts["decoder"].discard("mask_vector")  # nothing is masked
    everything = parts["predictor"] | parts["decoder"]
    for freeze, sft in (("decoder", 0.0), ("predictor", 0.3)):
        losses, whole = run(path, encoder, target, [batch], sft=sft)
        same_losses, found = run(path, encoder, target, [batch], sft=sft, freeze=freeze)
        assert same_losses == losses and whole.keys() == everything
        assert found.keys() == everything - parts[freeze]
        assert all(torch.equal(found[n], whole[n]) for n in found)


@pytest.mark.numeric
@pytest.mark.parametrize("freeze", ["decoder", "predictor"])
@pytest.mark.parametrize("jepa", FORMS)
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_what_is_frozen_stays_to_the_bit_with_its_moments(case, jepa, freeze):
    """Behind a step that left moments and with a weight decay, which moves a weight alone."""
    encoder, batch = encoder_of(jepa, case), batch_of(jepa)
    target = moved_target(encoder, case.form)
    updater = Updater(make_optimizer(encoder, OptimSettings(weight_decay=0.5)), clip=1.0)
    frozen, held = parts_of(encoder)[freeze], {}

    def step(freeze: str, sft: float) -> None:
        scales = LossScales(sft, 0.1, 0.1)
        losses = partial(objective.losses, normalize=True, freeze=freeze)
        forward_backward(losses, encoder, target, [batch], scales)
        updater.step(1e-2, target, 0.9)

    def state() -> dict[str, list[torch.Tensor]]:
        named = {n: p for n, p in encoder.named_parameters() if p.requires_grad}
        held = {n: [p, *updater.optimizer.state.get(p, {}).values()] for n, p in named.items()}
        return {n: [value.detach().clone() for value in values] for n, values in held.items()}

    step("none", 0.1)
    held = state()
    for _ in range(2):
        step(freeze, 0.0 if freeze == "decoder" else 0.1)
    still = {"mask_vector"} if jepa == "horizon" else set()  # nothing is masked
    for name, values in state().items():
        equal = [torch.equal(a, b) for a, b in zip(values, held[name], strict=True)]
        assert all(equal) if name in frozen | still else not any(equal), name


def test_a_phase_is_metered_with_its_own_losses_and_what_it_freezes():
    """Codes to come and a frozen decoder both show in the FLOPs that the loop counts."""
    encoder, batch = encoder_of("horizon", KINDS[0]), batch_of("horizon")
    shape = ModelShape.of(encoder)
    plain = PhaseSettings(name="a", steps=1, w_sft=0, w_jepa=1)
    codes = plain.model_copy(update={"w_codes": 1.0})
    frozen = codes.model_copy(update={"freeze": "decoder"})
    found = [flops_in_phase(shape, [batch, batch], phase) for phase in (plain, codes, frozen)]
    assert found[2] < found[0] < found[1]
    assert found[2] == 2 * step_flops(shape, batch, codes=True, freeze="decoder").total


def test_memory_is_that_of_the_heaviest_phases():
    sft, jepa = Kind(True, False, False, "none"), Kind(False, True, False, "none")
    both, warm = Kind(True, True, False, "none"), Kind(False, True, True, "decoder")
    assert heaviest([sft, both, both, jepa]) == [both]
    assert heaviest([sft, jepa]) == [sft, jepa]  # no step has both
    assert heaviest([warm, both]) == [warm, both]  # codes to come are in one alone
    assert heaviest([warm, warm._replace(freeze="none")]) == [warm._replace(freeze="none")]


def test_clin_jepa_is_a_preset_of_five_phases():
    settings = load("clin-jepa", ["model.path=somewhere"])
    assert settings.objective.jepa == "horizon" and settings.trains == "lora"
    phases = [(p.freeze, p.sync, p.w_sft > 0) for p in settings.phases]
    assert phases == [
        ("decoder", False, False),
        ("none", False, True),
        ("predictor", False, True),
        ("decoder", True, False),
        ("decoder", False, False),
    ]


@pytest.mark.parametrize("name", ["sft", "jepa", "hybrid", "curriculum", "lora", "tiny"])
def test_the_presets_of_the_paper_name_their_objective(name):
    """As they may begin from `default`, which has another."""
    text = (files("smbfast.configs") / f"{name}.toml").read_text()
    assert tomllib.loads(text)["objective"]["jepa"] == "mask"
    assert load("default", []).objective.jepa == "horizon"


FIVE = """
base = "tiny"
[objective]
jepa = "horizon"
horizons = ["30d", "365d"]
positions = 8
[[phases]]
name = "sft"
steps = 1
w_sft = 1.0
w_jepa = 0.0
[[phases]]
name = "warmup"
steps = 2
w_sft = 0.0
w_jepa = 1.0
w_codes = 1.0
freeze = "decoder"
[[phases]]
name = "joint"
steps = 2
w_sft = 0.1
w_jepa = 1.0
w_codes = 1.0
lr = 1e-2
[[phases]]
name = "alignment"
steps = 2
w_sft = 0.1
w_jepa = 1.0
freeze = "predictor"
lr = 1e-2
[[phases]]
name = "final"
steps = 2
w_sft = 0.0
w_jepa = 1.0
freeze = "decoder"
sync = true
"""
BORDERS = (1, 3, 5, 7, 9)


class StopAt:
    """A flag like that of a signal, up once `steps` further steps are made."""

    name = "SIGTERM"

    def __init__(self, patch: pytest.MonkeyPatch, steps: int) -> None:
        self.left, real = steps, loop.learning_rate

        def counted(*args):
            self.left -= 1
            return real(*args)

        patch.setattr(loop, "learning_rate", counted)
        patch.setattr(loop, "stop_on_signals", lambda: self)

    def __enter__(self):
        return self

    def __exit__(self, *_exc):
        return None

    def __bool__(self):
        return self.left <= 0


@pytest.fixture(scope="module")
def never(tmp_path_factory, no_report):
    """A run of five phases that is never stopped, with the command that made it."""
    folder = tmp_path_factory.mktemp("phases")
    simulate(folder / "cohort", 60, 0)
    (folder / "five.toml").write_text(FIVE)
    words = [str(folder / "five.toml"), f"--data.path={folder / 'cohort'}", "--probe.labels=[]"]
    words += ["--run.save_every=1", "--run.keep=20", "--eval.every=100", "--run.threads=1"]
    words += ["--optim.micro_tokens=256", "--objective.self_check=false"]
    entry.main([*words, f"--run.dir={folder / 'never'}"])
    return folder / "never", words


def states(folder) -> list[dict[str, torch.Tensor]]:
    """What the checkpoints behind each step hold, from step 1."""
    paths = sorted((folder / "checkpoints").iterdir())
    assert len(paths) == BORDERS[-1]
    return [load_file(path / "state.safetensors") for path in paths]


def test_a_run_of_five_phases_freezes_and_syncs(never):
    after, phase_of = states(never[0]), [0, 1, 1, 2, 2, 3, 3, 4, 4]
    frozen = {1: "decoder", 3: "predictor", 4: "decoder"}
    for step in range(1, 9):
        before, now, freeze = after[step - 1], after[step], frozen.get(phase_of[step])
        model = {n: torch.equal(w, before[n]) for n, w in now.items() if n.startswith("model.")}
        own = {n for n in model if n.startswith(("model.predictor.", "model.codes."))}
        decoder = model.keys() - own - {"model.mask_vector"}
        assert own and decoder
        if freeze == "decoder":
            assert all(model[n] for n in decoder)
        elif freeze is None:
            assert not any(model[n] for n in decoder)
        moved = {n for n in own if not model[n]}
        assert bool(moved) == (freeze != "predictor")
    assert not any(n.startswith("target.") for n in after[0])
    averages = [n for n in after[8] if n.startswith("target.") and "horizon_scale" not in n]

    def gap(step: int) -> float:
        state = after[step]
        own = {n: state[n.replace("target.", "model.lm.model.", 1)] for n in averages}
        return max(float((state[n] - w).abs().max()) for n, w in own.items())

    assert gap(2) == 0.0 and gap(6) > 1e-4  # a frozen encoder; one that moved away from its average
    assert gap(7) == gap(8) == 0.0  # synced, and frozen from then on
    weight = "target.horizon_scale.weight_H1"  # (1 - 0.99^n) behind n steps
    assert torch.equal(after[8][weight], after[2][weight])
    assert bool((after[6][weight] > after[2][weight]).all())
    updates = [
        json.loads((path / "record.json").read_text())["target_updates"]
        for path in sorted((never[0] / "checkpoints").iterdir())
    ]
    assert updates == [None, 1, 2, 3, 4, 5, 6, 1, 2]


def test_the_header_says_what_a_phase_holds():
    names = [console._holds(phase) for phase in load("clin-jepa", ["model.path=x"]).phases]
    frozen, synced = " (decoder frozen)", " (decoder frozen, target synced)"
    assert names == [frozen, "", " (predictor frozen)", synced, frozen]


def test_stopped_at_each_border_of_phases_and_resumed_equals_never_stopped(
    never, tmp_path, monkeypatch
):
    whole, words = never
    folder, done = tmp_path / "stopped", 0
    for border in BORDERS[:-1]:
        with monkeypatch.context() as patch:
            StopAt(patch, border - done)
            with pytest.raises(SystemExit) as stop:
                entry.main([*words, f"--run.dir={folder}"])
        assert stop.value.code == 75
        done = border
    entry.main([*words, f"--run.dir={folder}"])
    for path in sorted(whole.glob("checkpoints/*/*.safetensors")) + sorted(
        whole.glob("final/*.safetensors")
    ):
        other = folder / path.relative_to(whole)
        assert path.read_bytes() == other.read_bytes(), other
