"""What evaluations look at and measure, and how a run ends that has collapsed."""

import json

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

import smbfast.train as entry
from smbfast.batch import FuturePairs
from smbfast.data.nodes import SPLIT_NAMES
from smbfast.model.codes_head import CodesHead, codes_sum, prevalence_sum
from smbfast.model.target import TargetEncoder
from smbfast.run import gradients as pulls
from smbfast.run import loop
from smbfast.run.evaluation import evaluate
from smbfast.run.fixed import Fixed, ProbeNodes
from smbfast.run.open_run import OpenRun
from smbfast.run.startup import losses_of
from smbfast.run.step import LossScales
from smbfast.settings import load
from smbfast.simulation.dataset import simulate

NODES = 20
WORDS = [
    "tiny",
    "--probe.labels=death_3y",
    "--phases.0.steps=2",
    "--phases.1.steps=2",
    "--eval.every=1",
    "--run.threads=1",
    "--data.window=128",
    "--objective.self_check=false",
    "--kernels=linear:torch",
]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    simulate(folder / "cohort", 150, 0)
    data = [f"--data.path={folder / 'cohort'}", f"--data.prepared={folder / 'prepared'}"]
    return [*WORDS, *data, f"--run.dir={folder / 'run'}", f"--eval.nodes={NODES}"]


@pytest.fixture(scope="module")
def run(words):
    return OpenRun.open(load(words[0], words[1:]))


@pytest.fixture(scope="module")
def fixed(run):
    return Fixed.of(run)


def test_nodes_are_of_train_and_tuning_with_their_own_labels(run, fixed):
    nodes, labels = fixed.nodes, run.tasks[0][1]
    assert nodes.task == "death_3y"
    value_of = {
        (int(s), int(t)): (name, bool(v))
        for s, t, name, v in zip(
            labels.subject_N, labels.time_N, labels.split_N, labels.binary_N, strict=True
        )
    }
    texts = [node for row in nodes.rows for node in row.nodes]
    assert len(texts) == len(nodes.true_K) == len(nodes.tuning_K)
    for text, true, tuning in zip(texts, nodes.true_K, nodes.tuning_K, strict=True):
        name = "tuning" if tuning else "train"
        assert value_of[text.subject, text.time] == (name, bool(true))
    for own_K in (nodes.tuning_K, ~nodes.tuning_K):
        assert 0 < own_K.sum() <= NODES
        assert 0 < nodes.true_K[own_K].sum() <= NODES // 2
    assert "held_out" in SPLIT_NAMES and "held_out" in labels.split_N


def test_the_probe_is_fitted_on_train_alone():
    """Labels of tuning do not reach the fit, and its score is theirs."""
    random = np.random.default_rng(0)
    embedding_KD, tuning_K = random.normal(size=(200, 8)), np.arange(200) >= 100
    true_K = embedding_KD[:, 0] + random.normal(size=200) > 0
    nodes = ProbeNodes("task", [], true_K, tuning_K)
    score = nodes.auroc(embedding_KD)
    inverted = ProbeNodes("task", [], np.where(tuning_K, ~true_K, true_K), tuning_K)
    assert inverted.auroc(embedding_KD) == pytest.approx(1 - score)  # no score is tied
    assert 0.6 < score <= roc_auc_score(true_K[tuning_K], embedding_KD[tuning_K, 0]) + 0.05
    assert nodes.auroc(embedding_KD * np.inf) is None
    assert ProbeNodes("task", [], true_K & tuning_K, tuning_K).auroc(embedding_KD) is None


def test_online_states_are_those_at_the_ends_of_buckets(run, fixed):
    encoder, windows = run.encoder, [run.tuning[i] for i in range(len(run.tuning))]
    chosen = np.linspace(0, len(windows) - 1, min(run.settings.eval.windows, len(windows)))
    expected = []
    with torch.no_grad():
        for window in (windows[int(i)] for i in chosen):
            hidden_TD = encoder.hidden(torch.from_numpy(window.ids_T.astype(np.int64))[None])[0]
            expected.append(hidden_TD[window.bucket_end_B.astype(np.int64) - 1])
        states = [ends.states(encoder.packed, run.device) for ends in fixed.ends]
    same = torch.cat(states).double().sort(0).values - torch.cat(expected).double().sort(0).values
    # fp32 through two layers: some hundred roundings of 6e-8 of states of size 1
    assert same.abs().max() < 1e-4


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_gradient_norms_and_cosines_are_those_of_separate_backwards(words, run, fixed, recompute):
    settings = load(words[0], [*words[1:], f"--model.recompute={recompute}"])
    encoder = run.encoder
    target, batch, phase = TargetEncoder(encoder), fixed.gradients[True], settings.phases[1]
    phase = phase.model_copy(update={"w_sft": 0.1})
    measures = pulls.gradients(encoder, target, batch, settings, phase)
    assert all(p.grad is None for p in encoder.parameters())
    flat = {}
    for name, weights in (("sft", (1.0, 0.0)), ("jepa", (0.0, 1.0))):
        scales = LossScales.of(*weights, batch.num_labels, batch.num_masked)
        losses = losses_of(settings)(encoder, target, batch, **scales._asdict())
        sum(loss for loss in losses if loss is not None).backward()
        shared = [p for n, p in encoder.decoder.named_parameters() if "embed" not in n]
        flat[name] = torch.cat([p.grad.flatten() for p in shared]).double()
        encoder.zero_grad(set_to_none=True)
    cosine = torch.nn.functional.cosine_similarity(flat["sft"], flat["jepa"], dim=0)
    # the same operations, but backwards of both losses in one graph add in another order: fp32
    assert measures["grad_sft"] == pytest.approx(float(flat["sft"].norm()), rel=1e-5)
    assert measures["grad_jepa"] == pytest.approx(float(flat["jepa"].norm()), rel=1e-5)
    assert measures["cos_sft_jepa"] == pytest.approx(float(cosine), abs=1e-5)
    only = pulls.gradients(encoder, None, fixed.gradients[False], settings, settings.phases[0])
    assert set(only) == {"grad_sft"}


def test_a_share_of_the_weights_is_spread_over_the_depth(run, monkeypatch):
    everything = pulls.shared_weights(run.encoder)
    sizes = [p.numel() for p in everything]
    monkeypatch.setattr(pulls, "MOST", sum(sizes) // 2)
    chosen = pulls.shared_weights(run.encoder)
    places = [next(i for i, p in enumerate(everything) if p is q) for q in chosen]
    assert sum(sizes) // 4 < sum(p.numel() for p in chosen) <= sum(sizes) // 2
    assert places == sorted(places) and min(places) < len(sizes) / 3
    assert max(places) > 2 * len(sizes) / 3


@pytest.fixture
def short(monkeypatch):
    """A run whose end has no probes and no report."""
    monkeypatch.setattr(loop, "probe_run", lambda *_, **__: None)
    monkeypatch.setattr(loop, "write_report", lambda *_, **__: None)


def evals_of(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == "eval"]


def test_a_run_says_how_it_is(words, tmp_path, capsys, short):
    words = [*words, "--objective.jepa=horizon", "--objective.horizons=30d,365d"]
    folder = tmp_path / "run"
    entry.main([*words, "--phases.1.w_codes=1.0", f"--run.dir={folder}"])
    out = capsys.readouterr().out
    assert all(text in out for text in ("death_3y auroc", "rank online", "cos sft/jepa", "r2 "))
    first, *rest = evals_of(folder)
    assert first["untrained"] and not any("untrained" in r for r in rest)
    keys = {"online_std", "online_rank", "embedding_std", "embedding_rank", "grad_sft"}
    assert all(keys <= set(r) and 0 <= r["probe_auroc"] <= 1 for r in [first, *rest])
    begins, *later = [r for r in rest if r["phase"] == "jepa"]
    assert begins["jepa"] is None and all(r["jepa"] > 0 for r in later)
    keys = {"r2", "r2_copy", "r2_30d", "r2_copy_365d"}
    assert all(keys <= set(r) for r in later)
    assert not any(key.startswith("r2") for key in begins)  # without a scale there is no R²
    keys = {"codes", "codes_gain", "target_rank", "cos_jepa_codes"}
    assert all(keys <= set(r) for r in [begins, *later])


def test_an_evaluation_changes_nothing(run, fixed):
    """No weight, no gradient, no draw: what training does next is the same without it."""
    target, draws = TargetEncoder(run.encoder), torch.get_rng_state()
    before = {n: p.clone() for n, p in run.encoder.state_dict().items()}
    measures = evaluate(run.encoder, target, fixed, run.settings, run.settings.phases[1])
    assert {"jepa", "embedding_rank", "cos_sft_jepa"} <= set(measures)
    assert all(torch.equal(before[n], p) for n, p in run.encoder.state_dict().items())
    assert all(p.grad is None for p in run.encoder.parameters())
    assert torch.equal(draws, torch.get_rng_state()) and torch.is_grad_enabled()
    again = evaluate(run.encoder, target, fixed, run.settings, run.settings.phases[1])
    assert again == measures


def test_a_head_without_states_predicts_the_prevalence():
    """Also where codes are weighted; a bias that has moved is no prevalence."""
    pairs = FuturePairs(
        row_N=torch.tensor([3, 5]),
        position_P=torch.tensor([0, 0, 1]),
        horizon_P=torch.tensor([0, 1, 1]),
        latent_Q=torch.tensor([], dtype=torch.int64),
        first_Q=torch.tensor([], dtype=torch.int64),
        end_Q=torch.tensor([], dtype=torch.int64),
        pair_Z=torch.tensor([0, 2, 2]),
        class_Z=torch.tensor([4, 0, 3]),
        num_by_trunk=(),
        num_by_horizon=(0, 0),
    )
    for weighted in (False, True):
        head = CodesHead(8, np.random.default_rng(0).uniform(0.01, 0.6, (2, 5)), weighted)
        torch.nn.init.zeros_(head.class_KE)
        expected = codes_sum(head, torch.randn(2, 8), pairs).item()
        torch.nn.init.zeros_(head.bias_HK)
        # fp32 sums of 18 numbers of size 1
        assert float(prevalence_sum(head, pairs)) == pytest.approx(expected, rel=1e-5)


def test_a_constant_encoder_is_called_collapsed_at_the_next_evaluation(
    words, tmp_path, monkeypatch, capsys, short
):
    """In the phase of SFT, at its second evaluation; the run that goes on stores no such model."""
    real, calls = loop.evaluate_step, []

    def constant(run, *args):
        calls.append(args)
        with torch.no_grad():
            run.encoder.decoder.norm.weight.mul_(len(calls) not in (2, 3, 4))
        return real(run, *args)

    monkeypatch.setattr(loop, "evaluate_step", constant)
    folder = tmp_path / "run"
    own = [*words, f"--run.dir={folder}", "--phases.0.steps=3", "--run.save_every=1"]
    with pytest.raises(SystemExit, match=r"nearly constant.*Lower the learning rate") as stop:
        entry.main([*own, "--eval.stop_on_collapse=true"])
    assert stop.value.code != 0 and len(calls) == 2
    assert evals_of(folder)[2]["online_std"] == 0
    assert "collapsed: the states of the online encoder are nearly" in capsys.readouterr().err
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-000001"]
    entry.main([*own, "--eval.stop_on_collapse=false"])
    assert len(calls) == 6  # steps 2 and 3, and the two of JEPA
    assert "collapsed: the states of the online encoder are nearly" in capsys.readouterr().err
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    record = json.loads((folder / "best" / "sft" / "smbfast.json").read_text())
    assert record["step"] == 1  # although the loss of constant states is lower
