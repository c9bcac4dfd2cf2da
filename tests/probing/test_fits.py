"""The two probes: fitted on train alone, penalty chosen on tuning, few classes or events."""

import warnings

import numpy as np
import pytest
from lifelines.utils import concordance_index
from scipy.sparse import csr_matrix
from scipy.special import expit
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score

from smbfast.probing import boosting, logistic, survival
from smbfast.probing.binary import Calibration, calibrate, not_measurable
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


def scaled(feature_NF: np.ndarray, sparse: bool = False) -> np.ndarray:
    train_NF = feature_NF[SPLIT_N == "train"]
    if sparse:
        return feature_NF / np.abs(train_NF).max(0)
    return (feature_NF - train_NF.mean(0)) / train_NF.std(0)


def exact(row_NF: np.ndarray, true_N: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
    """The logits of scikit-learn's Newton solver, and how far those of a fit may be from them.

    A fit stops where its gradient g is at most `_TOL` in each of W components, or where a step
    gains less than 64 eps. With e the least eigenvalue of the Hessian (half of it, since it moves
    between the two), its weights are then within |g| / e or √(2 · 64 eps / e) of the optimum.
    """
    train_N = SPLIT_N == "train"
    model = LogisticRegression(C=penalty, solver="newton-cholesky", tol=1e-12, max_iter=1000)
    model.fit(row_NF[train_N], true_N[train_N])
    chance_T = model.predict_proba(row_NF[train_N])[:, 1]
    row_NW = np.column_stack([row_NF, np.ones(len(true_N))])
    train_TW, num_train = row_NW[train_N], int(train_N.sum())
    hessian = (train_TW * (chance_T * (1 - chance_T))[:, None]).T @ train_TW / num_train
    ridge_W = np.append(np.full(row_NF.shape[1], 1 / (penalty * num_train)), 0.0)
    least = np.linalg.eigvalsh(hessian + np.diag(ridge_W))[0] / 2
    gradient = logistic._TOL * len(ridge_W) ** 0.5 / least
    gain = (2 * 64 * np.finfo(float).eps / least) ** 0.5
    reach = float(np.linalg.norm(row_NW, axis=1).max())
    return model.decision_function(row_NF), (gradient + gain) * reach


@pytest.mark.parametrize("sparse", [False, True])
def test_the_binary_probe_is_the_protocol_spelled_out(sparse: bool) -> None:
    feature_NF, true_N = binary()
    tuning = SPLIT_N == "tuning"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a deprecated argument would be noise for every user
        given = csr_matrix(feature_NF) if sparse else feature_NF
        probe = logistic.fit_logistic(given, true_N, SPLIT_N)
    row_NF = scaled(feature_NF, sparse)
    losses = {}
    for penalty in logistic.PENALTIES:
        logit_N, _ = exact(row_NF, true_N, penalty)
        losses[penalty] = log_loss(true_N[tuning], expit(logit_N[tuning]), labels=[False, True])
    assert probe.penalty == min(losses, key=losses.get)
    logit_N, within = exact(row_NF, true_N, probe.penalty)
    np.testing.assert_allclose(probe.logit_N, logit_N, rtol=0, atol=within)
    assert within < 1e-3 and probe.converged and not probe.at_border
    # the slope of the loss by a logit is at most 1
    assert probe.tuning_log_loss == pytest.approx(losses[probe.penalty], rel=0, abs=within)


def test_held_out_features_cannot_change_the_model() -> None:
    feature_NF, true_N = binary()
    before = logistic.fit_logistic(feature_NF, true_N, SPLIT_N)
    changed_NF, changed_N = feature_NF.copy(), true_N.copy()
    held = SPLIT_N == "held_out"
    changed_NF[held] *= 1e6
    changed_N[held] ^= True
    after = logistic.fit_logistic(changed_NF, changed_N, SPLIT_N)
    assert before.penalty == after.penalty and before.calibration == after.calibration
    np.testing.assert_array_equal(before.logit_N[~held], after.logit_N[~held])
    alone = logistic.fit_logistic(feature_NF[~held], true_N[~held], SPLIT_N[~held])
    # a product of fewer rows may be summed in another order
    np.testing.assert_allclose(alone.probability_N, before.probability_N[~held], rtol=1e-12)


def test_tuning_chooses_the_penalty_and_nothing_else() -> None:
    feature_NF, true_N = binary()
    tuning, row_NF = SPLIT_N == "tuning", scaled(feature_NF)
    chosen = set()
    for seed in range(6):
        changed_N = true_N.copy()
        changed_N[tuning] ^= np.random.default_rng(seed).random(60) < seed / 10
        probe = logistic.fit_logistic(feature_NF, changed_N, SPLIT_N)
        logit_N, within = exact(row_NF, true_N, probe.penalty)
        np.testing.assert_allclose(probe.logit_N, logit_N, rtol=0, atol=within)
        chosen.add(probe.penalty)
    assert len(chosen) > 2


def test_ties_go_to_the_stronger_penalty() -> None:
    # a feature without any spread: every penalty gives the same logits
    true_N = np.random.default_rng(0).random(240) < 0.3
    probe = logistic.fit_logistic(np.full((240, 1), 0.1), true_N, SPLIT_N)
    assert probe.penalty == logistic.PENALTIES[0] and probe.at_border
    train = true_N[SPLIT_N == "train"]
    np.testing.assert_allclose(expit(probe.logit_N), train.mean(), rtol=1e-9)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_one_class_is_not_measurable(split: str) -> None:
    _, true_N = binary()
    assert not_measurable(true_N, SPLIT_N) is None
    true_N[split == SPLIT_N] = True
    assert not_measurable(true_N, SPLIT_N) == f"{split} has one class only"
    assert not_measurable(true_N, SPLIT_N, "tuning") == (
        "train has one class only" if split == "train" else None
    )


def test_what_no_binary_probe_can_be_fitted_on() -> None:
    feature_NF, true_N = binary()
    with pytest.raises(ValueError, match="both classes in train"):
        logistic.fit_logistic(feature_NF, true_N | (SPLIT_N == "train"), SPLIT_N)
    rest = SPLIT_N != "tuning"
    with pytest.raises(ValueError, match="rows in tuning"):
        logistic.fit_logistic(feature_NF[rest], true_N[rest], SPLIT_N[rest])


def test_calibration_is_the_maximum_of_the_tuning_likelihood() -> None:
    """At the optimum the residuals sum to zero, as do those times the logit. Its solver stops at a
    gradient of 1e-10 in the mean, of logits of deviation 1 here: 1e-7 for 240 rows is a thousandth
    of what one row of them weighs."""
    rng = np.random.default_rng(0)
    logit_S = rng.normal(size=240)
    true_S = rng.random(240) < expit(0.5 * logit_S - 1)
    own = calibrate(logit_S, true_S)
    residual_S = own.probability(logit_S) - true_S
    assert abs(residual_S.sum()) < 1e-7 and abs((residual_S * logit_S).sum()) < 1e-7
    assert 0.2 < own.slope < 0.8 and own.intercept < -0.5
    shifted = calibrate(100 + 1e-3 * logit_S, true_S)
    np.testing.assert_allclose(
        shifted.probability(100 + 1e-3 * logit_S), own.probability(logit_S), rtol=1e-7
    )


def test_where_no_slope_can_be_fitted_the_mean_is_met() -> None:
    rng = np.random.default_rng(0)
    logit_S = 5 * rng.normal(size=200) - 3
    few_S = np.arange(200) < 9
    turned_S = logit_S < np.quantile(logit_S, 0.3)
    turned_S[:20] ^= True
    separated_S = logit_S > np.quantile(logit_S, 0.7)
    for true_S in (few_S, ~few_S, turned_S, separated_S):
        own = calibrate(logit_S, true_S)
        assert own.slope == 1
        # the root is found to 2e-12, and a mean moves by a quarter of it at most
        assert own.probability(logit_S).mean() == pytest.approx(true_S.mean(), rel=0, abs=1e-12)
    flat = calibrate(np.full(200, 7.0), separated_S)
    assert flat.probability(np.array([7.0]))[0] == pytest.approx(0.3)
    assert calibrate(logit_S, np.zeros(200, bool)) == Calibration(1.0, 0.0)
    assert calibrate(logit_S, np.arange(200) < 10).slope != 1


def curved() -> tuple[np.ndarray, np.ndarray]:
    """A label that no linear model reads, with a third of the values unknown."""
    feature_NF = np.random.default_rng(0).normal(size=(240, 3))
    true_N = np.abs(feature_NF[:, 0]) > 0.7
    feature_NF[::3, 1] = np.nan
    return feature_NF, true_N


@pytest.fixture
def fast_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boosting, "_SETTINGS", boosting._SETTINGS | {"learning_rate": 0.5})


@pytest.mark.usefixtures("fast_trees")
def test_trees_find_what_is_not_linear_and_tuning_says_how_many() -> None:
    feature_NF, true_N = curved()
    probe = boosting.fit_boosting(feature_NF, true_N, SPLIT_N)
    held, tuning, train = (split == SPLIT_N for split in ("held_out", "tuning", "train"))
    assert roc_auc_score(true_N[held], probe.logit_N[held]) > 0.95
    model = HistGradientBoostingClassifier(
        **boosting._SETTINGS, max_iter=probe.num_trees + 20, early_stopping=False
    ).fit(feature_NF[train], true_N[train])
    staged = [p[:, 1] for p in model.staged_predict_proba(feature_NF)]
    losses = [log_loss(true_N[tuning], p[tuning]) for p in staged]
    assert probe.num_trees == 1 + np.argmin(losses) > 1
    # the same trees, grown at once and in blocks; rounding of sums of their leaves
    np.testing.assert_allclose(expit(probe.logit_N), staged[probe.num_trees - 1], rtol=1e-9)
    assert probe.tuning_log_loss == pytest.approx(min(losses))


@pytest.mark.usefixtures("fast_trees")
def test_trees_see_train_alone_and_tuning_stops_them() -> None:
    feature_NF, true_N = curved()
    before = boosting.fit_boosting(feature_NF, true_N, SPLIT_N)
    other_N = np.where(SPLIT_N == "held_out", ~true_N, true_N)
    after = boosting.fit_boosting(feature_NF, other_N, SPLIT_N)
    np.testing.assert_array_equal(before.probability_N, after.probability_N)
    turned_N = np.where(SPLIT_N == "tuning", ~true_N, true_N)
    assert boosting.fit_boosting(feature_NF, turned_N, SPLIT_N).num_trees == 1
    sparse = boosting.fit_boosting(csr_matrix(np.nan_to_num(feature_NF)), true_N, SPLIT_N)
    dense = boosting.fit_boosting(np.nan_to_num(feature_NF), true_N, SPLIT_N)
    np.testing.assert_array_equal(sparse.logit_N, dense.logit_N)


def test_trees_do_not_take_features_that_are_too_many_or_in_a_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    feature_NF, true_N = curved()
    rows = in_chunks(np.nan_to_num(feature_NF), 9, monkeypatch)
    with pytest.raises(ValueError, match="at most 4,096 features in memory, got 3 in a file"):
        boosting.fit_boosting(rows, true_N, SPLIT_N)
    with pytest.raises(ValueError, match="got 4,097 in memory"):
        boosting.fit_boosting(np.zeros((240, 4097)), true_N, SPLIT_N)


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


def in_chunks(feature_NF: np.ndarray, rows: int, monkeypatch: pytest.MonkeyPatch) -> Rows:
    """The same numbers as rows of a map, in another order, read `rows` at a time."""
    monkeypatch.setattr("smbfast.probing.features._CHUNK", 8 * rows * feature_NF.shape[1])
    order_N = np.random.default_rng(1).permutation(len(feature_NF))
    matrix_MD = np.empty_like(feature_NF, np.float32)
    matrix_MD[order_N] = feature_NF
    return Rows(matrix_MD, order_N)


def test_a_fit_in_chunks_has_the_optimum_of_one_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    feature_NF, true_N = binary()
    feature_NF = feature_NF.astype(np.float32).astype(np.float64)
    one = logistic.fit_logistic(feature_NF, true_N, SPLIT_N)
    two = logistic.fit_logistic(in_chunks(feature_NF, 7, monkeypatch), true_N, SPLIT_N)
    assert one.penalty == two.penalty and two.converged
    _, within = exact(scaled(feature_NF), true_N, one.penalty)
    np.testing.assert_allclose(two.logit_N, one.logit_N, rtol=0, atol=2 * within)


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
