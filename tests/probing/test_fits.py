"""The two probes: fitted on train alone, penalty chosen on tuning, few classes or events."""

import warnings

import numpy as np
import pytest
from lifelines.utils import concordance_index
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.preprocessing import MaxAbsScaler

from smbfast.probing import logistic, survival

SPLIT_N = np.repeat(["train", "tuning", "held_out"], [120, 60, 60])


def binary(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    feature_NF = rng.normal(size=(240, 12)) * np.logspace(-2, 2, 12)
    true_N = feature_NF[:, 0] * 100 + rng.normal(size=240) > 0
    return feature_NF, true_N


def times(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    latent_N = rng.normal(size=240)
    feature_NF = latent_N[:, None] * rng.normal(size=30) + rng.normal(size=(240, 30))
    duration_N = rng.exponential(np.exp(-1.5 * latent_N))
    return feature_NF, duration_N, rng.random(240) < 0.7


@pytest.mark.parametrize("sparse", [False, True])
def test_the_binary_probe_is_the_protocol_spelled_out(sparse: bool) -> None:
    feature_NF, true_N = binary()
    train, tuning = SPLIT_N == "train", SPLIT_N == "tuning"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a deprecated argument would be noise for every user
        given = csr_matrix(feature_NF) if sparse else feature_NF
        probe = logistic.probe_binary(given, true_N, SPLIT_N)
    scaled_NF = MaxAbsScaler().fit(feature_NF[train]).transform(feature_NF)
    best = (-1.0, None, None)
    for penalty in (1e-8, 1e-6, 1e-4, 1e-2, 1e-1, 1, 1e2, 1e4):
        model = LogisticRegression(C=penalty, max_iter=1000).fit(scaled_NF[train], true_N[train])
        probability_N = model.predict_proba(scaled_NF)[:, 1]
        score = roc_auc_score(true_N[tuning], probability_N[tuning])
        if score > best[0]:
            best = (score, penalty, probability_N)
    assert probe.penalty == best[1]
    np.testing.assert_allclose(probe.probability_N, best[2], atol=1e-6)
    assert probe.chosen_by == "tuning AUROC" and probe.converged


def test_held_out_features_cannot_change_the_model() -> None:
    feature_NF, true_N = binary()
    before = logistic.probe_binary(feature_NF, true_N, SPLIT_N)
    changed_NF, changed_N = feature_NF.copy(), true_N.copy()
    changed_NF[SPLIT_N == "held_out"] *= 1e6
    changed_N[SPLIT_N == "held_out"] ^= True
    after = logistic.probe_binary(changed_NF, changed_N, SPLIT_N)
    kept = SPLIT_N != "held_out"
    assert before.penalty == after.penalty
    np.testing.assert_array_equal(before.probability_N[kept], after.probability_N[kept])


def test_tuning_chooses_the_penalty_and_nothing_else() -> None:
    feature_NF, true_N = binary()
    tuning = SPLIT_N == "tuning"
    chosen = set()
    for seed in range(12):
        changed_N = true_N.copy()
        changed_N[tuning] = np.random.default_rng(seed).random(60) < 0.5
        probe = logistic.probe_binary(feature_NF, changed_N, SPLIT_N)
        scaled_NF = MaxAbsScaler().fit(feature_NF[:120]).transform(feature_NF)
        model = LogisticRegression(C=probe.penalty, max_iter=1000)
        model.fit(scaled_NF[:120], true_N[:120])
        np.testing.assert_allclose(
            probe.probability_N, model.predict_proba(scaled_NF)[:, 1], atol=1e-6
        )
        chosen.add(probe.penalty)
    assert len(chosen) > 1


def test_ties_go_to_the_stronger_penalty() -> None:
    # one feature: every penalty ranks the rows alike
    feature_NF = np.linspace(-1, 1, 240)[:, None]
    true_N = np.arange(240) % 3 == 0
    true_N |= feature_NF[:, 0] > 0.9
    order = np.random.default_rng(0).permutation(240)
    probe = logistic.probe_binary(feature_NF[order], true_N[order], SPLIT_N)
    assert probe.penalty == 1e-8


def test_one_class_in_tuning_is_chosen_by_log_loss() -> None:
    feature_NF, true_N = binary()
    tuning = SPLIT_N == "tuning"
    true_N[tuning] = False
    probe = logistic.probe_binary(feature_NF, true_N, SPLIT_N)
    assert "log loss" in probe.chosen_by
    scaled_NF = MaxAbsScaler().fit(feature_NF[:120]).transform(feature_NF)
    losses = {}
    for penalty in logistic.PENALTIES:
        model = LogisticRegression(C=penalty, max_iter=1000).fit(scaled_NF[:120], true_N[:120])
        probability_N = model.predict_proba(scaled_NF[tuning])[:, 1]
        losses[penalty] = log_loss(true_N[tuning], probability_N, labels=[False, True])
    assert probe.penalty == min(losses, key=losses.get)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_one_class_elsewhere_is_not_measurable(split: str) -> None:
    _, true_N = binary()
    assert logistic.not_measurable(true_N, SPLIT_N) is None
    true_N[split == SPLIT_N] = True
    assert logistic.not_measurable(true_N, SPLIT_N) == f"{split} has one class only"


@pytest.mark.parametrize("sparse", [False, True])
def test_cox_finds_the_signal_and_sees_train_alone(sparse: bool) -> None:
    feature_NF, duration_N, event_N = times()
    form = csr_matrix if sparse else np.asarray
    settings = {"wanted": 10, "seed": 0}
    probe = survival.probe_survival(form(feature_NF), duration_N, event_N, SPLIT_N, **settings)
    held = SPLIT_N == "held_out"
    found = concordance_index(duration_N[held], -probe.risk_N[held], event_N[held])
    assert found > 0.7 and probe.components == 10
    changed_NF = feature_NF.copy()
    changed_NF[held] *= 100
    other_N = np.where(held, 1.0, duration_N)
    after = survival.probe_survival(form(changed_NF), other_N, event_N, SPLIT_N, **settings)
    np.testing.assert_array_equal(probe.risk_N[~held], after.risk_N[~held])


def test_components_are_standardised_on_train_and_dead_ones_dropped() -> None:
    feature_NF, _, _ = times()
    component_NK = survival.components(feature_NF, SPLIT_N, 4, seed=0)
    train = SPLIT_N == "train"
    np.testing.assert_allclose(component_NK[train].mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(component_NK[train].std(0), 1)
    flat_NF = np.repeat(feature_NF[:, :1], 5, axis=1)  # rank one
    assert survival.components(flat_NF, SPLIT_N, 4, seed=0).shape == (240, 1)
    assert survival.components(np.ones((240, 5)), SPLIT_N, 4, seed=0).shape == (240, 0)


def test_few_events_get_few_components() -> None:
    feature_NF, duration_N, _ = times()
    event_N = np.zeros(240, bool)
    event_N[:11] = True
    probe = survival.probe_survival(feature_NF, duration_N, event_N, SPLIT_N, wanted=10, seed=0)
    assert probe.components == 2


def test_what_cox_cannot_measure() -> None:
    _, duration_N, event_N = times()
    assert survival.not_measurable(duration_N, event_N, SPLIT_N) is None
    held = SPLIT_N == "held_out"
    assert "train" in survival.not_measurable(duration_N, event_N & held, SPLIT_N)
    assert "held_out" in survival.not_measurable(duration_N, event_N & ~held, SPLIT_N)
    last_N = np.where(held, 1.0, duration_N)
    assert "compared" in survival.not_measurable(last_N, event_N | held, SPLIT_N)
