"""Every model of a task: what reaches a fit, what is scored, and what a model that fails says."""

from dataclasses import replace

import numpy as np
import pytest

from smbfast.data.labels import Labels
from smbfast.judging.scored import Scored
from smbfast.probing.models import Model, scored
from tests.probing.test_fits import SPLIT_N, binary, times

SUBJECT_N, TIME_N = np.arange(240), np.zeros(240, np.int64)


def task(kind: str) -> tuple[Labels, np.ndarray]:
    if kind == "binary":
        feature_NF, true_N = binary()
        return Labels("a", "binary", SUBJECT_N, TIME_N, SPLIT_N, true_N), feature_NF
    feature_NF, duration_N, event_N = times()
    own = Labels("b", "time_to_event", SUBJECT_N, TIME_N, SPLIT_N, None, duration_N, event_N)
    return own, feature_NF


def models(feature_NF: np.ndarray, kind: str) -> list[Model]:
    heads = ["linear", "boosting"] if kind == "binary" else ["linear"]
    return [
        *(Model(head, head, "own", lambda: [feature_NF], head) for head in heads),
        Model("two", "two versions", "baseline", lambda: [feature_NF, feature_NF[:, :2]]),
    ]


@pytest.mark.parametrize("kind", ["binary", "time_to_event"])
def test_held_out_rows_never_reach_a_fit(kind: str) -> None:
    labels, feature_NF = task(kind)
    held_out_N = SPLIT_N == "held_out"
    spoilt_NF = np.where(held_out_N[:, None], 1e6, feature_NF)
    turned = replace(labels, value_N=labels.value_N ^ held_out_N) if kind == "binary" else labels
    before = scored(labels, models(feature_NF, kind), {})
    after = scored(turned, models(spoilt_NF, kind), {})
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one.score_SN[:, ~held_out_N], other.score_SN[:, ~held_out_N])
        assert one.chosen == other.chosen
        assert not np.array_equal(one.score_SN[:, held_out_N], other.score_SN[:, held_out_N])


def test_versions_oracles_and_reasons() -> None:
    labels, feature_NF = task("binary")
    chance_N = np.linspace(0, 1, 240)
    absent = Model("absent", "x", "baseline", list, reason="there is no tokenizer")
    wide = Model("wide", "x", "baseline", lambda: [np.zeros((240, 5000))], "boosting")
    own = scored(labels, [*models(feature_NF, "binary"), absent, wide], {"latent": chance_N})
    by_name: dict[str, Scored] = {model.name: model for model in own}
    assert list(by_name) == ["linear", "boosting", "two", "absent", "wide", "oracle_latent"]
    assert by_name["linear"].score_SN.shape == (1, 240)
    assert ((by_name["linear"].score_SN >= 0) & (by_name["linear"].score_SN <= 1)).all()
    two = by_name["two"]
    assert two.score_SN.shape == (2, 240) and len(two.chosen["versions"]) == 2
    np.testing.assert_array_equal(two.score_SN[0], by_name["linear"].score_SN[0])
    for name, reason in (("absent", "there is no tokenizer"), ("wide", "at most 4,096 features")):
        assert by_name[name].score_SN.shape == (0, 240) and reason in by_name[name].reason
    assert by_name["oracle_latent"].role == "oracle"
    np.testing.assert_array_equal(by_name["oracle_latent"].score_SN, chance_N[None])
