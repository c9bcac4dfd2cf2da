"""The two probes: fitted on train alone, penalty chosen on tuning, few classes or events."""

import warnings

import lifelines
import numpy as np
import pandas as pd
import pytest
from lifelines.utils import concordance_index
from scipy.sparse import csr_matrix
from scipy.special import expit
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score

from smbfast.probing import boosting, logistic, ridge, survival
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

    A fit stops where its gradient g is at most `TOL` in each of W components, or where a step
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
    gradient = ridge.TOL * len(ridge_W) ** 0.5 / least
    gain = (2 * ridge.FTOL / least) ** 0.5
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
    for penalty in ridge.PENALTIES:
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
    assert probe.penalty == ridge.PENALTIES[0] and probe.at_border
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
        **boosting._SETTINGS, max_iter=probe.num_trees + 20, early_stopping=False, random_state=0
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


@pytest.mark.usefixtures("fast_trees")
def test_trees_read_what_lies_in_a_file_and_refuse_too_many_features(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    feature_NF, true_N = curved()
    feature_NF = np.nan_to_num(feature_NF).astype(np.float32)
    whole = boosting.fit_boosting(feature_NF, true_N, SPLIT_N)
    rows = in_chunks(feature_NF, 9, monkeypatch)
    np.testing.assert_array_equal(
        boosting.fit_boosting(rows, true_N, SPLIT_N).logit_N, whole.logit_N
    )
    with pytest.raises(ValueError, match="at most 4,096 features, got 4,097"):
        boosting.fit_boosting(np.zeros((240, 4097)), true_N, SPLIT_N)


@pytest.mark.usefixtures("fast_trees")
def test_trees_grow_on_a_bounded_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boosting, "MOST_ROWS", 50)
    feature_NF, true_N = curved()
    train_N = SPLIT_N == "train"
    drawn = boosting._drawn(true_N, train_N, 50)
    assert 50 <= len(drawn) <= 51 < train_N.sum() and train_N[drawn].all()
    assert true_N[drawn].sum() == np.ceil(true_N[train_N].sum() * 50 / train_N.sum())
    others = np.setdiff1d(np.flatnonzero(train_N), drawn)
    before = boosting.fit_boosting(feature_NF, true_N, SPLIT_N)
    changed_NF = feature_NF.copy()
    changed_NF[others] = 9.0
    after = boosting.fit_boosting(changed_NF, true_N, SPLIT_N)
    np.testing.assert_array_equal(
        np.delete(before.logit_N, others), np.delete(after.logit_N, others)
    )
    changed_NF[drawn] = 9.0
    other = boosting.fit_boosting(changed_NF, true_N, SPLIT_N)
    assert not np.array_equal(
        before.logit_N[SPLIT_N == "tuning"], other.logit_N[SPLIT_N == "tuning"]
    )


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kind", ["logistic", "cox"])
def test_a_basis_shortens_the_way_to_the_same_minimum(
    kind: str, sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients end below 1e-8 and the ridge curves by 1 / 120 or more, so weights differ by less
    than 2 x 120 x 1e-8 x sqrt(40), and scores of rows 30 deviations long by less than 1e-3."""
    monkeypatch.setattr(ridge, "PENALTIES", (1.0,))
    monkeypatch.setattr(ridge, "TOL", 1e-8)
    monkeypatch.setattr(ridge, "FTOL", 0.0)
    module = logistic if kind == "logistic" else survival
    random = np.random.default_rng(3)
    # variances fall as those of an embedding do
    turn_FF, _ = np.linalg.qr(random.standard_normal((40, 40)))
    feature_NF = random.standard_normal((240, 40)) * np.arange(1, 41) ** -1.5 @ turn_FF
    risk_N = feature_NF @ turn_FF[0]
    true_N = risk_N + random.standard_normal(240) > 0.5
    duration_N = np.exp(-risk_N) * random.exponential(9, 240)
    feature_NF = csr_matrix(feature_NF) if sparse else feature_NF
    honest, calls, scores = module._objective, [], []

    def counted(*args: object, **named: object) -> object:
        calls[-1] += 1
        return honest(*args, **named)

    monkeypatch.setattr(module, "_objective", counted)
    for basis in (module.directions, lambda *_: None):
        calls.append(0)
        monkeypatch.setattr(module, "directions", basis)
        if kind == "logistic":
            scores.append(logistic.fit_logistic(feature_NF, true_N, SPLIT_N).logit_N)
        else:
            scores.append(survival.fit_cox(feature_NF, duration_N, true_N, SPLIT_N).risk_N)
    np.testing.assert_allclose(*scores, rtol=0, atol=1e-3)
    assert calls[0] < calls[1]


@pytest.mark.parametrize("sparse", [False, True])
def test_cox_finds_the_signal_and_sees_train_alone(sparse: bool) -> None:
    feature_NF, duration_N, event_N = times()
    form = csr_matrix if sparse else np.asarray
    probe = survival.fit_cox(form(feature_NF), duration_N, event_N, SPLIT_N)
    held, tuning = SPLIT_N == "held_out", SPLIT_N == "tuning"
    found = concordance_index(duration_N[held], -probe.risk_N[held], event_N[held])
    assert found > 0.7 and probe.converged and not probe.at_border
    changed_NF = feature_NF.copy()
    changed_NF[held] *= 100
    other_N = np.where(held, 1.0, duration_N)
    after = survival.fit_cox(form(changed_NF), other_N, event_N ^ held, SPLIT_N)
    np.testing.assert_array_equal(probe.risk_N[~held], after.risk_N[~held])
    # turned round, tuning takes the least of a model that train is sure of
    other_N = np.where(tuning, duration_N[tuning].max() - duration_N, duration_N)
    turned = survival.fit_cox(form(feature_NF), other_N, event_N, SPLIT_N)
    assert turned.penalty == ridge.PENALTIES[0] and turned.at_border
    assert np.corrcoef(turned.risk_N, probe.risk_N)[0, 1] > 0.9


@pytest.mark.parametrize("ties", [False, True])
def test_cox_is_the_regression_of_lifelines(ties: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit stops at a gradient of 1e-10 an event in each of 30 weights, and the ridge alone curves
    by 1 / (C events) > 0.02: the weights are within 3e-8 of the optimum, and a log hazard, of 30
    features with deviation 1 (none beyond 4), within 6e-7. Newton's last step is below 1e-12."""
    monkeypatch.setattr(ridge, "TOL", 1e-10)
    monkeypatch.setattr(ridge, "FTOL", 0.0)
    monkeypatch.setattr(ridge, "PENALTIES", (0.5,))
    feature_NF, duration_N, event_N = times()
    if ties:
        duration_N = np.ceil(8 * np.minimum(duration_N, 1.5))
    train = SPLIT_N == "train"
    probe = survival.fit_cox(feature_NF, duration_N, event_N, SPLIT_N)
    frame = pd.DataFrame(scaled(feature_NF)[train]).add_prefix("feature")
    frame["duration"], frame["event"] = duration_N[train], event_N[train]
    # its ridge counts rows, and features of which it has divided n - 1 squares, not n
    model = lifelines.CoxPHFitter(penalizer=1 / (0.5 * 120) * 119 / 120)
    model.fit(frame, "duration", "event", fit_options={"precision": 1e-12})
    expected_N = scaled(feature_NF) @ model.params_.to_numpy()
    assert probe.converged and expected_N.std() > 1
    np.testing.assert_allclose(probe.risk_N, expected_N, rtol=0, atol=1e-6)
    likelihood = survival.PartialLikelihood(duration_N[train], event_N[train])
    loss, slope_T = likelihood.loss(probe.risk_N[train])
    # which it counts with its ridge; the slope of the loss by all log hazards is 2 at most
    total = model.log_likelihood_ + float((model.params_**2).sum()) / (2 * 0.5)
    assert likelihood.num_events == event_N[train].sum()
    assert loss == pytest.approx(-total / likelihood.num_events, rel=0, abs=2e-6)
    assert abs(slope_T.sum()) < 1e-12


@pytest.mark.parametrize("ties", [False, True])
def test_the_gradient_of_the_partial_likelihood(ties: bool) -> None:
    """Against differences of a step h = 1e-5: h² of the third derivative, and eps / h, are 1e-10,
    each times a factor that rows and ties make less than 10."""
    _, duration_N, event_N = times()
    duration_N = np.ceil(4 * duration_N) if ties else duration_N
    likelihood = survival.PartialLikelihood(duration_N, event_N)
    risk_N = np.random.default_rng(2).normal(size=240)
    _, slope_N = likelihood.loss(risk_N)
    for row in range(0, 240, 12):
        step_N = 1e-5 * (np.arange(240) == row)
        rise = likelihood.loss(risk_N + step_N)[0] - likelihood.loss(risk_N - step_N)[0]
        assert slope_N[row] == pytest.approx(rise / 2e-5, rel=0, abs=1e-9)
    # hazards that no float holds; a shift of all log hazards changes nothing
    far = likelihood.loss(1000 * risk_N)
    assert np.isfinite(far[0]) and np.isfinite(far[1]).all()
    np.testing.assert_allclose(likelihood.loss(risk_N + 900)[1], slope_N, rtol=0, atol=1e-12)


def test_without_an_event_in_tuning_the_strongest_penalty_is_taken() -> None:
    feature_NF, duration_N, event_N = times()
    probe = survival.fit_cox(feature_NF, duration_N, event_N & (SPLIT_N != "tuning"), SPLIT_N)
    assert probe.penalty == ridge.PENALTIES[0] and probe.at_border and probe.tuning_loss == 0
    with pytest.raises(ValueError, match="needs events in train"):
        survival.fit_cox(feature_NF, duration_N, event_N & (SPLIT_N != "train"), SPLIT_N)


def test_what_cox_cannot_measure() -> None:
    _, duration_N, event_N = times()
    judged = (SPLIT_N, "held_out")
    assert survival.not_measurable(duration_N, event_N, *judged) is None
    held = SPLIT_N == "held_out"
    assert "train" in survival.not_measurable(duration_N, event_N & held, *judged)
    assert "held_out" in survival.not_measurable(duration_N, event_N & ~held, *judged)
    assert survival.not_measurable(duration_N, event_N & ~held, SPLIT_N, "tuning") is None
    last_N = np.where(held, 1.0, duration_N)
    assert "compared" in survival.not_measurable(last_N, event_N | held, *judged)


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


def test_a_cox_fit_in_chunks_is_the_one_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are as near to the optimum as where lifelines is compared."""
    monkeypatch.setattr(ridge, "TOL", 1e-10)
    monkeypatch.setattr(ridge, "FTOL", 0.0)
    monkeypatch.setattr(ridge, "PENALTIES", (0.05, 0.5))
    feature_NF, duration_N, event_N = times()
    feature_NF = feature_NF.astype(np.float32).astype(np.float64)
    one = survival.fit_cox(feature_NF, duration_N, event_N, SPLIT_N)
    rows = in_chunks(feature_NF, 9, monkeypatch)
    two = survival.fit_cox(rows, duration_N, event_N, SPLIT_N)
    assert one.penalty == two.penalty
    np.testing.assert_allclose(two.risk_N, one.risk_N, rtol=0, atol=2e-6)


def test_trees_do_without_a_feature_that_no_row_of_train_has() -> None:
    random = np.random.default_rng(0)
    value_NF = random.normal(size=(90, 3))
    true_N = value_NF[:, 0] + random.normal(size=90) > 0
    split_N = np.repeat(["train", "tuning", "held_out"], 30)
    value_NF[split_N == "train", 2] = np.nan
    before_N = boosting.fit_boosting(value_NF, true_N, split_N).logit_N
    value_NF[:, 2] = np.nan
    after_N = boosting.fit_boosting(value_NF, true_N, split_N).logit_N
    np.testing.assert_array_equal(before_N, after_N)
