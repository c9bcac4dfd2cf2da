"""A task as a whole: which rows reach a fit, few-shot fits, horizons, and a planted leak."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from smbfast.data.labels import Labels
from smbfast.judging.judge import Protocol
from smbfast.judging.scored import Scored, Traits
from smbfast.probing import few_shot, logistic, models, survival, task
from smbfast.probing.horizons import horizons, with_chances
from smbfast.probing.models import Model, scored
from tests.probing.test_fits import SPLIT_N, binary, times

ROWS = len(SPLIT_N)
HELD = SPLIT_N == "held_out"


def labels_of(kind: str) -> tuple[Labels, np.ndarray]:
    keys = (np.arange(ROWS), np.zeros(ROWS, np.int64), SPLIT_N)
    if kind == "binary":
        feature_NF, true_N = binary()
        return Labels("a", "binary", *keys, true_N), feature_NF
    feature_NF, duration_N, event_N = times()
    return Labels("b", "time_to_event", *keys, None, duration_N, event_N), feature_NF


def only(feature_NF: np.ndarray) -> list[Model]:
    return [Model("smbfast", "smbfast", "own", lambda: [feature_NF])]


def blind_to_held_out(kind: str) -> None:
    """Features of held-out rows change no score of any other row."""
    labels, feature_NF = labels_of(kind)
    spoilt_NF = np.where(HELD[:, None], 1e3 * feature_NF, feature_NF)
    before, after = (scored(labels, only(f))[0] for f in (feature_NF, spoilt_NF))
    np.testing.assert_array_equal(before.score_SN[:, ~HELD], after.score_SN[:, ~HELD])


@pytest.mark.parametrize(("kind", "room"), [("binary", logistic), ("time_to_event", survival)])
def test_a_scaler_that_is_fitted_on_all_rows_is_caught(
    kind: str, room: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    blind_to_held_out(kind)
    name = "fit_logistic" if kind == "binary" else "fit_cox"
    fit, real = getattr(room, name), room.scaling  # type: ignore[attr-defined]

    def leaking(feature_NF: np.ndarray, *labels: np.ndarray, **more: object) -> object:
        whole: Callable = lambda _train, **how: real(feature_NF, **how)  # noqa: E731
        with monkeypatch.context() as patch:
            patch.setattr(room, "scaling", whole)
            return fit(feature_NF, *labels, **more)

    monkeypatch.setattr(models, name, leaking)
    with pytest.raises(AssertionError):
        blind_to_held_out(kind)


def traits() -> Traits:
    zero_N = np.zeros(ROWS, np.int64)
    return Traits(np.full(ROWS, 50.0), np.full(ROWS, ""), zero_N, zero_N)


def test_held_out_rows_are_refused_where_they_do_not_judge() -> None:
    labels, feature_NF = labels_of("binary")
    fits: list[np.ndarray] = []

    def scores() -> list[Scored]:
        fits.append(labels.split_N)
        return scored(labels, only(feature_NF))

    with pytest.raises(ValueError, match=r"train, tuning; \d+ are of held_out"):
        task.measure(labels, traits(), scores, Protocol(0, 0))
    assert not fits
    final = Protocol(0, 0, judged_on="held_out")
    measured = task.measure(labels, traits(), scores, final)
    assert len(measured.judged) == HELD.sum() and measured.record["rows"]["held_out"] == HELD.sum()
    assert measured.scored[0].score_SN.shape == (1, HELD.sum())


def test_few_shots_are_nested_and_draw_no_held_out_row(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, feature_NF = labels_of("binary")
    drawn: list[Labels] = []
    scores = models.Fitted(np.linspace(0, 1, ROWS), np.zeros(ROWS), 0.0, {})
    monkeypatch.setattr(few_shot, "fit", lambda own, *_: (drawn.append(own), scores)[1])
    whole = scored(labels, only(feature_NF))
    found = few_shot.few_shot(labels, only(feature_NF), whole, HELD, 0)
    most = min(int((labels.binary_N[SPLIT_N == "train"] == value).sum()) for value in (True, False))
    ks = [k for k in few_shot.SHOTS if k <= most]
    assert [own.k for own in found] == [*ks, "all"] and len(ks) >= 2
    assert found[0].score_RJ.shape == (few_shot.REPLICATES, HELD.sum())
    assert len(drawn) == few_shot.REPLICATES * len(ks)
    for number, own in enumerate(drawn):
        k = ks[number // few_shot.REPLICATES]
        taken = own.split_N == "train"
        assert taken.sum() == 2 * k and own.binary_N[taken].sum() == k
        assert not (own.split_N == "held_out").any()
        assert (labels.split_N[taken] == "train").all()
        if number >= few_shot.REPLICATES:  # the same replicate of the smaller k is part of it
            fewer = drawn[number - few_shot.REPLICATES].split_N == "train"
            assert (taken | ~fewer).all()
    assert not np.array_equal(drawn[0].split_N, drawn[1].split_N)


def test_horizons_come_from_train_and_probabilities_from_tuning() -> None:
    labels, feature_NF = labels_of("time_to_event")
    days = horizons(labels)
    assert 1 <= len(days) <= 3 and list(days) == sorted(days)
    duration_N = np.where(SPLIT_N == "train", labels.duration_N, 1e6)
    assert horizons(replace(labels, duration_N=duration_N)) == days
    model = scored(labels, only(feature_NF))[0]
    chance_NH = with_chances(labels, model, days).chance_SNH[0]
    assert ((chance_NH >= 0) & (chance_NH <= 1)).all() and (np.diff(chance_NH, axis=1) >= 0).all()
    order_N = np.argsort(model.score_SN[0])
    assert (np.diff(chance_NH[order_N], axis=0) >= 0).all()
    moved = replace(labels, duration_N=np.where(HELD, 1e6, labels.duration_N))
    again = with_chances(moved, model, days).chance_SNH[0]
    np.testing.assert_array_equal(again, chance_NH)
    oracle = replace(model, role="oracle")
    assert with_chances(labels, oracle, days).chance_SNH is None
    none = replace(labels, event_N=labels.event_N & (SPLIT_N != "train"))
    with pytest.raises(ValueError, match="need events in train"):
        horizons(none)


def test_scores_are_not_asked_for_where_a_task_cannot_be_measured() -> None:
    labels, _ = labels_of("binary")
    one_class = replace(labels, value_N=np.where(SPLIT_N == "train", False, labels.value_N))
    asked = partial(pytest.fail, "was fitted")
    final = Protocol(0, 0, judged_on="held_out")
    measured = task.measure(one_class, traits(), asked, final)
    assert measured.record["reason"] == "train has one class only" and measured.scored == []
