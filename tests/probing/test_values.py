"""Summaries of values: what a node may see, and that nothing later reaches it."""

import numpy as np
import pytest

from smbfast.data.meds import STATIC
from smbfast.probing import counts, values
from smbfast.probing.features import Gapped, dense
from smbfast.probing.scaling import directions, scaling
from tests.probing.test_counts import DAY, NODES, TRAIN_N, Events, dataset

LAB = [
    (1, STATIC, "WEIGHT", 70.0),
    (1, 1 * DAY, "LAB", 4.0),
    (1, 1 * DAY, "LAB", -1.0),  # at the same time: the file names it last
    (1, 2 * DAY, "LAB", np.nan),
    (1, 2 * DAY, "A"),
    (1, 3 * DAY - 1, "LAB", 3.0),
    (1, 3 * DAY, "LAB", 99.0),
    (2, 1 * DAY, "LAB", 99.0),
]
HELD_OUT = [(8, 1 * DAY, "LAB", 7.0), (8, 1 * DAY, "ONLY_HERE", 5.0), (8, 5 * DAY, "LAB", 9.0)]


def features(data: Events) -> np.ndarray:
    return values.code_values(data, *NODES).features(*NODES, TRAIN_N)


@pytest.mark.parametrize("rows", [1, 4_000_000])
def test_values_by_hand(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "_ROWS", rows)  # one node a piece, and all at once
    data = dataset(LAB, HELD_OUT)
    feature_NF = features(data)
    count_NF = counts.count_codes(data, *NODES).features(*NODES, TRAIN_N).toarray()
    np.testing.assert_array_equal(feature_NF[:, : count_NF.shape[1]], count_NF)
    none = [np.nan] * 4
    weight, lab = {1: [70.0] * 4, 2: none, 8: none}, [-1.0, 1.5, -1.0, 4.0]
    expected = [lab, [3.0, 2.0, -1.0, 4.0], none, [7.0] * 4, lab]  # last, mean, min, max
    own = [[*weight[s], *row] for s, row in zip(NODES[0], expected, strict=True)]
    # WEIGHT and LAB have values in train, in either order; ONLY_HERE has none there
    given = feature_NF[:, count_NF.shape[1] :]
    if np.isnan(given[2, 0]) and given[0, 0] != 70:
        given = np.roll(given, 4, axis=1)
    np.testing.assert_array_equal(given, own)


def test_many_values_stay_sparse_until_rows_of_them_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = dataset(LAB, HELD_OUT)
    whole_NF = features(data)
    monkeypatch.setattr(values, "_DENSE", 0)
    sparse = features(data)
    assert isinstance(sparse, Gapped) and sparse.shape == whole_NF.shape
    np.testing.assert_array_equal(dense(sparse, np.array([3, 0])), whole_NF[[3, 0]])


def test_no_value_after_the_prediction_time_is_seen() -> None:
    before = features(dataset(LAB, HELD_OUT))
    later = [row for row in LAB if row[:2] not in ((1, 3 * DAY), (2, DAY))]
    later += [(1, 3 * DAY, "LAB", -1e6), (2, 1, "LAB", -1e6), (2, 1, "NEW", 1.0)]
    held_out = [*HELD_OUT[:2], (8, 2 * DAY + 1, "LAB", -1e6)]
    np.testing.assert_array_equal(before, features(dataset(later, held_out)))


def test_a_value_at_the_prediction_time_is_seen() -> None:
    before = features(dataset(LAB, HELD_OUT))
    after = features(dataset(LAB, [*HELD_OUT, (8, 2 * DAY, "LAB", 8.0)]))
    assert not np.array_equal(before[3], after[3], equal_nan=True)
    np.testing.assert_array_equal(np.delete(before, 3, 0), np.delete(after, 3, 0))


def test_without_any_value_the_counts_remain() -> None:
    count_NF = counts.count_codes(dataset(), *NODES).features(*NODES, TRAIN_N).toarray()
    np.testing.assert_array_equal(features(dataset()), count_NF)


def test_values_of_a_linear_model_by_hand() -> None:
    own = values.code_values(dataset(LAB, HELD_OUT), *NODES)
    count_NF = own.counts.features(*NODES, TRAIN_N)
    dense_NF = own.features(*NODES, TRAIN_N)[:, count_NF.shape[1] :]
    linear_NF = own.linear_features(*NODES, TRAIN_N)
    np.testing.assert_array_equal(linear_NF[:, : count_NF.shape[1]].toarray(), count_NF.toarray())
    # a summary after the other, each of two codes, then whether there is a value
    by_summary_NF = dense_NF[:, [0, 4, 1, 5, 2, 6, 3, 7]]
    mean_F = np.nanmean(by_summary_NF[TRAIN_N], 0)
    given_NF = linear_NF[:, count_NF.shape[1] :].toarray()
    np.testing.assert_array_equal(given_NF[:, :8], np.nan_to_num(by_summary_NF - mean_F))
    np.testing.assert_array_equal(given_NF[:, 8:], ~np.isnan(by_summary_NF[:, :2]))


def test_sparse_features_are_standardised_as_dense_ones() -> None:
    own = values.code_values(dataset(LAB, HELD_OUT), *NODES).linear_features(*NODES, TRAIN_N)
    sparse, dense = scaling(own, standardise=True), scaling(own.toarray())
    # a sum of the same numbers in another order
    np.testing.assert_allclose(sparse.shift_F, dense.shift_F, rtol=1e-14, atol=1e-14)
    np.testing.assert_allclose(sparse.factor_F, dense.factor_F, rtol=1e-14)


def test_of_too_many_features_those_that_most_rows_of_train_have_stay() -> None:
    data = dataset(LAB, HELD_OUT)
    own = values.code_values(data, *NODES)
    whole_NF = own.features(*NODES, TRAIN_N)
    width = whole_NF.shape[1]
    num_counts = counts.count_codes(data, *NODES).features(*NODES, TRAIN_N).shape[1]
    absent_NF = np.isnan(whole_NF)
    absent_NF[:, :num_counts] = whole_NF[:, :num_counts] == 0
    size_F = (~absent_NF)[TRAIN_N].sum(0)
    for most in range(1, width + 2):
        kept = np.sort(np.argsort(-size_F, kind="stable")[:most])
        given_NF = own.features(*NODES, TRAIN_N, most=most)
        np.testing.assert_array_equal(dense(given_NF, np.arange(len(whole_NF))), whole_NF[:, kept])


@pytest.mark.parametrize("standardise", [True, False])
def test_sparse_features_vary_along_the_directions_of_dense_ones(standardise: bool) -> None:
    own = values.code_values(dataset(LAB, HELD_OUT), *NODES).linear_features(*NODES, TRAIN_N)
    scaled = scaling(own[np.flatnonzero(TRAIN_N)], standardise=standardise)
    weight_N = np.linspace(0.5, 1.5, own.shape[0])
    sparse, dense = (directions(of, scaled, weight_N) for of in (own, own.toarray()))
    assert sparse is not None and dense is not None
    # directions of equal variance may be any; what they make together is one matrix. Its entries
    # are below 100, of which `directions` lifts variances of 0 by 1e-12 and sums round less
    products = [(basis.turn_WW * basis.curve_W) @ basis.turn_WW.T for basis in (sparse, dense)]
    np.testing.assert_allclose(*products, rtol=0, atol=1e-10)
    assert np.abs(products[1]).max() > 0.1
