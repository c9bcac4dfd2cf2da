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
from smbfast.probing.features import Rows

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


def quiet(_line: str) -> None:
    pass


def in_chunks(feature_NF: np.ndarray, rows: int, monkeypatch: pytest.MonkeyPatch) -> Rows:
    """The same numbers as rows of a map, in another order, read `rows` at a time."""
    monkeypatch.setattr("smbfast.probing.features._CHUNK", 8 * rows * feature_NF.shape[1])
    order_N = np.random.default_rng(1).permutation(len(feature_NF))
    matrix_MD = np.empty_like(feature_NF, np.float32)
    matrix_MD[order_N] = feature_NF
    return Rows(matrix_MD, order_N)


def test_a_fit_in_chunks_has_the_optimum_of_one_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same stopping rule for both, at each penalty.

    A solution stops where its gradient g is at most `tol` in each of W components, or where a step
    gains less than 64 eps. With λ the least eigenvalue of the Hessian (half of it, since it moves
    between the two), its weights are then within |g| / λ or √(2 · 64 eps / λ) of the optimum; a
    probability differs by at most a quarter of what its logit does.
    """
    tol = 1e-7
    monkeypatch.setattr(logistic, "_TOL", tol)
    feature_NF, true_N = binary()
    feature_NF = feature_NF.astype(np.float32).astype(np.float64)
    train_N, num_train = SPLIT_N == "train", int((SPLIT_N == "train").sum())
    rows = in_chunks(feature_NF, 7, monkeypatch)
    held = logistic._held(feature_NF, true_N, train_N, quiet)
    largest_F = np.abs(feature_NF[train_N]).max(0)
    row_NW = np.column_stack([feature_NF / largest_F, np.ones(len(true_N))])
    for (penalty, one_N, _), (other, two_N, converged) in zip(
        held, logistic._streamed(rows, true_N, train_N, quiet), strict=True
    ):
        assert penalty == other and converged
        ridge_W = np.append(np.full(feature_NF.shape[1], 1 / (penalty * num_train)), 0.0)
        middle_T = two_N[train_N]
        train_TW = row_NW[train_N]
        hessian = (train_TW * (middle_T * (1 - middle_T))[:, None]).T @ train_TW / num_train
        least = np.linalg.eigvalsh(hessian + np.diag(ridge_W))[0] / 2
        size = np.linalg.norm(row_NW, axis=1).max()
        weights = tol * len(ridge_W) ** 0.5 / least + (2 * 64 * np.finfo(float).eps / least) ** 0.5
        assert np.abs(one_N - two_N).max() <= 2 * weights * size / 4


def test_components_in_chunks_are_those_of_a_whole_decomposition(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The sign of a component is free. Rounding of a covariance, relative to its gaps, is 1e-9."""
    feature_NF = times()[0].astype(np.float32)
    rows = in_chunks(feature_NF, 9, monkeypatch)
    one_NK = survival.components(feature_NF.astype(np.float64), SPLIT_N, 3, 0)
    two_NK = survival.components(rows, SPLIT_N, 3, 0)
    sign_K = np.sign((one_NK * two_NK).sum(0))
    np.testing.assert_allclose(two_NK * sign_K, one_NK, atol=1e-9)
