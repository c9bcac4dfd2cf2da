"""Baselines and traits: what a node may see, and what is known of a row."""

import numpy as np

from smbfast.data.labels import Labels
from smbfast.probing.baselines import baselines
from tests.probing.test_counts import DAY, HELD_OUT, NODES, TRAIN, YEAR, dataset

SPLIT_N = np.array(["train", "train", "train", "held_out"])


def labels() -> Labels:
    """The nodes of `test_counts`, each once, and the later one of subject 1 before the other."""
    order = [1, 0, 2, 3]
    value_N = np.array([True, False, False, True])
    return Labels("a", "binary", NODES[0][order], NODES[1][order], SPLIT_N, value_N)


def test_traits_by_hand() -> None:
    own = labels()
    traits = baselines(dataset(), own.subject_N, own.time_N).traits(own)
    assert traits.order_N.tolist() == [1, 0, 0, 0]
    assert traits.sex_N.tolist() == ["F", "F", "M", ""]
    # an event at the prediction time is seen, one a microsecond after it is not
    assert traits.events_N.tolist() == [5, 5, 1, 2]
    ages = [(30 * 365 * DAY + time) / YEAR for time in own.time_N[:2]]
    np.testing.assert_allclose(traits.age_N, [*ages, np.nan, np.nan])


def test_age_and_sex_are_those_of_train() -> None:
    own = labels()
    held_out = [*HELD_OUT, (8, 0, "SEX//X")]
    plain = baselines(dataset(TRAIN, held_out), own.subject_N, own.time_N)
    assert plain.traits(own).sex_N[3] == "X"
    feature_NF = plain.features("age_sex", own)
    assert feature_NF[:, 1:].tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1], [0, 0, 0]]
