"""Counts by recency: windows by hand, which of them are taken, and that nothing later counts."""

import numpy as np
import pytest

from smbfast.data.meds import STATIC
from smbfast.probing import counts
from smbfast.probing.baselines import baselines
from smbfast.probing.recency import WINDOWS, CodeRecency
from tests.probing.test_counts import DAY, Events, dataset

NOW = 1000 * DAY
ROWS = [
    (1, STATIC, "GENDER//F"),
    (1, NOW - 900 * DAY, "MEDS_BIRTH"),
    (1, NOW - 800 * DAY, "A"),
    (1, NOW - 40 * DAY, "A"),
    (1, NOW - 7 * DAY, "A"),  # as old as a window: outside of it
    (1, NOW - 2 * DAY, "B"),
    (1, NOW - DAY // 4 + 1, "A"),
    (1, NOW, "A"),
    (1, NOW + 1, "A"),
    (2, NOW - 3 * DAY, "B"),
    (2, NOW - 3 * DAY, "B"),
]
NODES = (np.array([1, 2, 8]), np.full(3, NOW))
TRAIN_N = np.array([True, True, False])
HELD_OUT = [(8, NOW - 1, "ONLY_HERE"), (8, NOW - 2 * DAY, "B")]


def recency(data: Events) -> CodeRecency:
    return baselines(data, *NODES).recency


@pytest.mark.parametrize("rows", [1, 4_000_000])
def test_windows_by_hand(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "_ROWS", rows)
    own = recency(dataset(ROWS, HELD_OUT))
    held_W2 = [[2, 0], [2, 0], [3, 2], [4, 2], [5, 2]]  # events of a window by subject, nested
    so_far_W2 = np.cumsum([part.sum(1).A1[:2] for part in own.between_WKC], 0)
    assert so_far_W2.tolist() == held_W2
    assert own.older_K.tolist() == [1, 0, 0]
    # a quarter of a day holds what one day does, for all of train
    assert own.windows(np.array([0, 1])) == [1, 2, 3, 4]
    # for subject 2 all windows but those below three days hold the whole record
    assert own.windows(np.array([1])) == [1]


def test_features_are_those_of_counts_and_of_the_windows() -> None:
    data = dataset(ROWS, HELD_OUT)
    feature_NF = recency(data).features(*NODES, TRAIN_N).toarray()
    count_NF = counts.count_codes(data, *NODES).features(*NODES, TRAIN_N).toarray()
    np.testing.assert_array_equal(feature_NF[:, : count_NF.shape[1]], count_NF)
    given = np.expm1(feature_NF[:, count_NF.shape[1] :]).round(9)
    # one day: A alone in train; the others: A and B, in the order of their first appearance
    assert given[:, 0].tolist() == [2, 0, 0]
    assert given[:, 1:].tolist() == [
        [2, 1, 3, 1, 4, 1],
        [0, 2, 0, 2, 0, 2],
        [0, 1, 0, 1, 0, 1],
    ]
    assert len(WINDOWS) == 5


def test_nothing_after_the_prediction_time_counts() -> None:
    before = recency(dataset(ROWS, HELD_OUT)).features(*NODES, TRAIN_N)
    later = [*HELD_OUT, (8, NOW + 1, "B"), (8, NOW + DAY, "A")]
    fewer = [row for row in ROWS if row[1] <= NOW]
    after = recency(dataset(fewer, later)).features(*NODES, TRAIN_N)
    np.testing.assert_array_equal(before.toarray(), after.toarray())
