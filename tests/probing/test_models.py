"""Every model of a task: what reaches a fit, what is scored, and what a model that fails says."""

from dataclasses import replace

import numpy as np
import pytest

from smbfast.data.labels import Labels
from smbfast.judging.scored import Scored
from smbfast.probing.models import Model, oracles, scored
from smbfast.probing.stack import RIDGE, stacked
from smbfast.probing.survival import PartialLikelihood
from tests.probing.test_fits import SPLIT_N, binary, times

OWN = ("smbfast", "smbfast_boosting", "stack")
SUBJECT_N, TIME_N = np.arange(240), np.zeros(240, np.int64)


def task(kind: str) -> tuple[Labels, np.ndarray]:
    if kind == "binary":
        feature_NF, true_N = binary()
        return Labels("a", "binary", SUBJECT_N, TIME_N, SPLIT_N, true_N), feature_NF
    feature_NF, duration_N, event_N = times()
    own = Labels("b", "time_to_event", SUBJECT_N, TIME_N, SPLIT_N, None, duration_N, event_N)
    return own, feature_NF


def models(feature_NF: np.ndarray, kind: str) -> list[Model]:
    heads = [("smbfast", "linear"), ("smbfast_boosting", "boosting")]
    heads = heads if kind == "binary" else heads[:1]
    return [
        *(Model(name, name, "own", lambda: [feature_NF], head) for name, head in heads),
        Model("two", "two versions", "baseline", lambda: [feature_NF, feature_NF[:, :2]]),
    ]


@pytest.mark.parametrize("kind", ["binary", "time_to_event"])
def test_held_out_rows_never_reach_a_fit(kind: str) -> None:
    labels, feature_NF = task(kind)
    held_out_N = SPLIT_N == "held_out"
    spoilt_NF = np.where(held_out_N[:, None], 1e6, feature_NF)
    turned = replace(labels, value_N=labels.value_N ^ held_out_N) if kind == "binary" else labels
    before = scored(labels, models(feature_NF, kind))
    after = scored(turned, models(spoilt_NF, kind))
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one.score_SN[:, ~held_out_N], other.score_SN[:, ~held_out_N])
        assert one.chosen == other.chosen
        assert not np.array_equal(one.score_SN[:, held_out_N], other.score_SN[:, held_out_N])


def test_versions_oracles_and_reasons() -> None:
    labels, feature_NF = task("binary")
    chance_N = np.linspace(0, 1, 240)
    absent = Model("absent", "x", "baseline", list, reason="there is no tokenizer")
    wide = Model("wide", "x", "baseline", lambda: [np.zeros((240, 5000))], "boosting")
    own = scored(labels, [*models(feature_NF, "binary"), absent, wide])
    own += oracles({"latent": chance_N})
    by_name: dict[str, Scored] = {model.name: model for model in own}
    assert list(by_name) == [*OWN, "two", "absent", "wide", "oracle_latent"]
    assert by_name["smbfast"].score_SN.shape == (1, 240)
    assert ((by_name["smbfast"].score_SN >= 0) & (by_name["smbfast"].score_SN <= 1)).all()
    two = by_name["two"]
    assert two.score_SN.shape == (2, 240) and len(two.chosen["versions"]) == 2
    np.testing.assert_array_equal(two.score_SN[0], by_name["smbfast"].score_SN[0])
    for name, reason in (("absent", "there is no tokenizer"), ("wide", "at most 4,096 features")):
        assert by_name[name].score_SN.shape == (0, 240) and reason in by_name[name].reason
    assert by_name["oracle_latent"].role == "oracle"
    np.testing.assert_array_equal(by_name["oracle_latent"].score_SN, chance_N[None])


@pytest.mark.parametrize("kind", ["binary", "time_to_event"])
def test_the_stack_takes_the_best_baseline_on_tuning(kind: str) -> None:
    labels, feature_NF = task(kind)
    noise_NF = np.random.default_rng(1).normal(size=(240, 2))
    named = {"noise": noise_NF, "good": feature_NF, "untrained": feature_NF}
    own = Model("smbfast", "x", "own", lambda: [noise_NF])
    rivals = [Model(n, n, "baseline", lambda f=f: [f]) for n, f in named.items()]
    by_name = {model.name: model for model in scored(labels, [own, *rivals])}
    stack, good = by_name["stack"], by_name["good"]
    assert stack.chosen["with"] == "good" and stack.role == "own"
    # an embedding of noise has next to no spread, and hardly moves an order
    ranks = [np.argsort(np.argsort(model.score_SN[0])) for model in (stack, good)]
    assert np.corrcoef(*ranks)[0, 1] > 0.98
    alone = scored(labels, [own])[1]
    assert alone.name == "stack" and alone.reason and alone.score_SN.shape == (0, 240)


@pytest.mark.parametrize("kind", ["binary", "time_to_event"])
def test_the_weights_of_a_stack_are_the_optimum(kind: str) -> None:
    labels, feature_NF = task(kind)
    own_N, other_N = feature_NF[:, 0], np.tanh(feature_NF[:, 1])
    _, chosen = stacked(labels, own_N, other_N)
    tuning = labels.take(SPLIT_N == "tuning")
    row_S2 = np.stack([own_N, other_N], 1)[SPLIT_N == "tuning"]

    def loss(weight_2: np.ndarray, intercept: float) -> float:
        score_S = row_S2 @ weight_2 + intercept
        pull = RIDGE * np.square(weight_2 - 0.5).sum() / 2
        if kind == "binary":
            return (
                np.where(tuning.binary_N, np.logaddexp(0, -score_S), 0).sum()
                + pull
                + (np.where(tuning.binary_N, 0, np.logaddexp(0, score_S)).sum())
            )
        own = PartialLikelihood(*tuning.survival_N)
        return own.loss(score_S)[0] * own.num_events + pull

    best = loss(np.array(chosen["weights"]), chosen["intercept"])
    assert min(chosen["weights"]) >= 0
    for at in range(2):
        for move in (-0.01, 0.01):
            moved_2 = np.array(chosen["weights"])
            moved_2[at] += move
            if moved_2[at] >= 0:
                assert loss(moved_2, chosen["intercept"]) > best


def test_without_an_event_of_tuning_a_stack_is_the_mean() -> None:
    labels, feature_NF = task("time_to_event")
    none = replace(labels, event_N=labels.event_N & (SPLIT_N != "tuning"))
    score_N, chosen = stacked(none, feature_NF[:, 0], feature_NF[:, 1])
    assert chosen["weights"] == [0.5, 0.5]
    np.testing.assert_allclose(score_N, feature_NF[:, :2].mean(1), rtol=1e-15)
