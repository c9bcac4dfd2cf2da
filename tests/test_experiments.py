"""Experiments: what is said beforehand, what a verdict is, cosines of gradients, and the whole."""

import json
from dataclasses import replace

import numpy as np
import pytest

from smbfast import experiment
from smbfast.data.nodes import SPLIT_NAMES, Nodes
from smbfast.experiments import controls, interference, plans, posterior, results
from smbfast.experiments.plans import LEAST, PLANS
from smbfast.experiments.runs import Run
from smbfast.run.optim import total_steps
from smbfast.settings import EXPERIMENTS, ExperimentSettings, load
from smbfast.simulation import cohort


def size_of(work, **more: object) -> ExperimentSettings:
    return ExperimentSettings(**{"name": "regimes", "work": work, "first": 901, **more})


def test_every_experiment_says_beforehand_what_would_refute_it(tmp_path):
    assert tuple(PLANS) == EXPERIMENTS
    for plan in PLANS.values():
        text = plan.text()
        assert plan.question in text and plan.refuted in text and plan.primary in text
        assert text in plans.epilog()
        for claim in plan.claims:
            assert {claim.one, claim.other} <= set(plan.arms) and "null: " in claim.text


def test_arms_have_equal_steps_and_differ_in_what_they_say_alone(tmp_path):
    size = size_of(tmp_path)
    for plan in PLANS.values():
        if plan.name == "controls":
            continue
        names = set()
        for arm in plan.arms.values():
            settings = arm.of(size, 2)
            assert total_steps(settings) == size.steps
            assert (settings.cohort.seed, settings.run.seed) == (902, 2)
            assert {phase.lr for phase in settings.phases} == {plans.LR}
            if not arm.flops:
                names.add(Run(tmp_path, settings).name)
        assert len(names) == sum(not arm.flops for arm in plan.arms.values())


def test_experiments_share_runs_of_equal_settings(tmp_path):
    size = size_of(tmp_path)
    one = Run(tmp_path, PLANS["regimes"].arms["hybrid"].of(size, 1))
    assert one.name == Run(tmp_path, PLANS["mask_ratio"].arms["ratio_50"].of(size, 1)).name
    assert one.name == Run(tmp_path, PLANS["cuts"].arms["cuts_1"].of(size, 1)).name
    assert one.name != Run(tmp_path, PLANS["regimes"].arms["hybrid"].of(size, 2)).name
    # how often it is saved decides about no weight
    kept = one.settings.run.model_copy(update={"keep": 9})
    assert one.name == Run(tmp_path, one.settings.model_copy(update={"run": kept})).name


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.001, 0.1, "supported"),
        (-0.1, LEAST - 0.001, "refuted"),
        (-0.1, LEAST + 0.001, "open"),
        (0.001, LEAST - 0.001, "supported"),
    ],
)
def test_a_claim_is_supported_refuted_or_open(low, high, said):
    # the percentiles of 2.5 and 97.5 are the ends of the middle 39 of 41 draws
    drawn_B = np.array([low - 1, *np.linspace(low, high, 39), high + 1])
    assert results.verdict(((low + high) / 2, drawn_B))["verdict"] == said


def test_the_cosine_of_mean_gradients_is_without_the_noise_of_batches():
    """Two losses at 60 degrees, each half with noise of its own as long as the gradient: the
    cosine of one loss with itself is 1 / 2, and that of the means is cos(60) = 1 / 2, not 1 / 4."""
    batches = 50
    gram = np.empty((1, batches, 4, 4))
    for number in range(batches):
        half = np.zeros((4, 6))
        half[:2, 0] = 1
        half[2:, :2] = 0.5, np.sqrt(0.75)
        half[:, 2:] = np.eye(4)  # noise: of each half in a direction of its own
        gram[0, number] = half @ half.T
    own = {name: float(value_M[0]) for name, value_M in interference.figures(gram).items()}
    assert own["sft"] == pytest.approx(0.5) and own["jepa"] == pytest.approx(0.5)
    assert own["across"] == pytest.approx(0.25)
    assert own["mean"] == pytest.approx(0.5)
    # both halves together: <2a, 2b> = 2 over |2a|^2 + 2 = 6
    assert own["cosine"] == pytest.approx(2 / 6)
    turned = gram * np.array([1, 1, -1, -1])[:, None] * np.array([1, 1, -1, -1])
    assert interference.figures(turned)["mean"][0] == pytest.approx(-0.5)


def test_draws_of_cosines_are_of_batches_and_replicates():
    random = np.random.default_rng(0)
    grams = []
    for aim in (0.5, -0.5, 0.1):
        half = random.normal(size=(2, 16, 4, 30)) * 0.1
        half[..., :2, 0] += 1
        half[..., 2:, 0] += aim
        half[..., 2:, 1] += np.sqrt(1 - aim**2)
        grams.append(half @ half.swapaxes(-1, -2))
    value_M, drawn_BM = interference.estimates(grams, 200, 0)["cosine"]
    assert value_M.shape == (3,) and drawn_BM.shape == (200, 3)
    assert value_M[-1] == pytest.approx(value_M[:2].mean())
    alone = interference.estimates(grams[:1], 200, 0)["cosine"][1]
    assert drawn_BM[:, -1].std() > 5 * alone[:, -1].std()  # replicates differ, batches hardly


def test_the_posterior_is_read_from_itself_and_not_from_noise():
    block = cohort.draw_block(907, 0)
    drawn = cohort.draw_nodes(block, 907, 1)
    split = {"train": 1, "tuning": 2, "held_out": 3}
    assert [SPLIT_NAMES[at] for at in split.values()] == list(split)
    nodes = Nodes(
        block.index_B[drawn.row_N] + 1,
        drawn.time_N,
        np.array([split[str(name)] for name in block.split_B[drawn.row_N]], np.int8),
    )
    belief_KZ = posterior.posterior(907, 256, nodes)
    assert np.allclose(belief_KZ.sum(1), 1)
    spread = posterior.spread(belief_KZ, nodes.split_K).sum()
    itself, penalty = posterior.residuals(belief_KZ, belief_KZ, nodes.split_K)
    assert itself.sum() < 1e-6 * spread and penalty == posterior.PENALTIES[0]
    noise_KD = np.random.default_rng(0).normal(size=(len(belief_KZ), 8))
    assert posterior.residuals(noise_KD, belief_KZ, nodes.split_K)[0].sum() > 0.9 * spread
    with pytest.raises(ValueError, match="every node must be of cohort 908"):
        posterior.posterior(908, 256, nodes)


def test_controls_have_sft_alone_at_equal_steps_and_flops():
    given = load("default", [])
    alone = controls.sft_alone(given)
    assert total_steps(alone) == total_steps(given)
    assert all((p.w_sft, p.w_jepa, p.w_codes) == (1, 0, 0) for p in alone.phases)
    assert [p.lr for p in alone.phases] == [p.lr for p in given.phases]
    steps = controls.longer(550, 3e12, 2e12)
    assert steps == 825
    assert total_steps(controls.sft_alone(given, steps - 550)) == 825
    assert controls.longer(550, 1e12, 2e12) == 550
    with pytest.raises(ValueError, match="must name folders of finished runs"):
        controls.controls([], None, "x")


@pytest.mark.slow
@pytest.mark.usefixtures("no_report", "few_trees")
def test_an_experiment_from_its_plan_to_its_page(tmp_path, monkeypatch, capsys):
    regimes = PLANS["regimes"]
    arms = {name: regimes.arms[name] for name in ("sft", "sft_flops", "hybrid")}
    claims = tuple(c for c in regimes.claims if {c.one, c.other} <= set(arms))
    monkeypatch.setitem(PLANS, "regimes", replace(regimes, arms=arms, claims=claims))
    monkeypatch.setitem(
        PLANS, "interference", replace(PLANS["interference"], arms={"hybrid": arms["hybrid"]})
    )
    monkeypatch.setattr(interference, "BATCHES", 2)
    words = [f"--work={tmp_path}", "--first=901", "--replicates=1", "--steps=5", "--patients=300"]
    words += ["--held_out=0", "--draws=100"]
    experiment.main(["regimes", *words])
    printed = capsys.readouterr().out
    assert printed.index(regimes.question) < printed.index("replicate 1")
    record = json.loads((tmp_path / "regimes" / "experiment.json").read_text())
    assert regimes.question in record["plan"] and record["held_out_looks"] == 1
    assert set(record["figures"]) >= {"sft", "hybrid", "untrained", "counts", "boosting", "filter"}
    assert "tte_death" in record["figures"]["sft"] and "tte_death" not in record["share"]["sft"]
    assert record["arms"]["sft_flops"]["steps"] > 5
    least = record["arms"]["hybrid"]["flops"]
    assert record["arms"]["sft_flops"]["flops"] == pytest.approx(least, rel=0.15)  # whole steps
    assert [claim["one"] for claim in record["claims"]] == ["hybrid"]
    assert (tmp_path / "regimes" / "experiment.html").read_text().count("<svg") == 2
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "scores").iterdir()}
    experiment.main(["regimes", *words])
    assert "replicate 1:" not in capsys.readouterr().out  # nothing is done twice
    assert files == {file: file.stat().st_mtime_ns for file in (tmp_path / "scores").iterdir()}
    experiment.main(["interference", *words])
    cosines = json.loads((tmp_path / "interference" / "experiment.json").read_text())["cosines"]
    assert len(cosines["hybrid"]["cosine"]) == 6  # five moments and their mean
