"""Numbers become decimal keys and bins: the values they stand for, and ten subjects in each bin.

Legend: N values, K keys.
"""

from decimal import ROUND_FLOOR, ROUND_HALF_EVEN, Context, Decimal

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from smbfast.data.codes.bins import (
    KEY_OFFSET,
    MAX_BINS,
    MIN_SUBJECTS,
    decimal_keys,
    fit_edges,
    key_value,
)

numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
SIX, THREE = Context(prec=6, rounding=ROUND_HALF_EVEN), Context(prec=3, rounding=ROUND_FLOOR)


def keys_of(*values: float) -> list[int]:
    return decimal_keys(np.array(values, np.float32)).tolist()


def floored(value: float) -> Decimal:
    """A float32 in decimal, to 6 digits and then floored to 3."""
    return THREE.plus(SIX.plus(Decimal(value)))


@given(numbers)
def test_a_key_is_the_decimal_value_floored_to_three_digits(value):
    exact = Decimal(value)
    step = Decimal(1).scaleb(SIX.plus(exact).adjusted() - 5) if value else Decimal(1)
    tie = abs(abs(exact - SIX.plus(exact)) * 2 - step) < step * Decimal("1e-6")
    assume(not tie)  # in fp64 it may go either way
    assert Decimal(repr(key_value(keys_of(value)[0]))) == floored(value)


@given(st.lists(numbers, min_size=2, max_size=20))
def test_keys_are_monotone(values):
    keys = keys_of(*sorted(values))
    assert keys == sorted(keys)
    assert all(abs(k) < KEY_OFFSET for k in keys)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((7.2, 7.2), (-7.2, -7.2), (0.0, 0.0), (-0.0, 0.0), (9.999999, 10.0), (-9.991, -10.0)),
        *((1234.5, 1230.0), (-1234.5, -1240.0), (3.4028234e38, 3.4e38), (1e-45, 1.4e-45)),
        *((0.1, 0.1), (99.9999, 99.9), (1000.0, 1000.0), (37.05, 37.0)),
    ],
)
def test_values_are_floored(value, expected):
    assert key_value(keys_of(value)[0]) == expected


def test_a_key_s_value_has_that_key():
    keys = [*range(-77_401, 77_402, 97), -77_401, -1, 0, 1, 77_401]
    again = decimal_keys(np.array([key_value(k) for k in keys]))
    assert again.tolist() == keys


@st.composite
def counted(draw):
    """Keys of one code: who has each, and how often; at least ten subjects."""
    num_keys, num_subjects = draw(st.integers(1, 40)), draw(st.integers(10, 60))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    concentration = draw(st.sampled_from([0.05, 1.0, 20.0]))
    share_K = rng.dirichlet(np.full(num_keys, concentration))
    events = []
    for subject in range(num_subjects):
        for _ in range(int(rng.integers(1, 6))):
            events.append((int(rng.choice(num_keys, p=share_K)), subject))
    return events


@given(counted())
def test_bins_have_ten_subjects_and_cover(events):
    keys = sorted({k for k, _ in events})
    have = {k: {s for j, s in events if j == k} for k in keys}
    per_subject = {s: sum(t == s for _, t in events) for _, s in events}
    weights = {k: sum(2520 // per_subject[s] for j, s in events if j == k) for k in keys}
    few = [list(have[k]) if len(have[k]) < MIN_SUBJECTS else [] for k in keys]
    edges = fit_edges(
        np.array(keys),
        np.array([weights[k] for k in keys]),
        np.array([len(have[k]) for k in keys]),
        few,
    )
    assert edges == sorted(set(edges)) and set(edges) <= set(keys[1:])
    assert len(edges) < MAX_BINS
    for low, high in zip([keys[0], *edges], [*edges, keys[-1] + 1], strict=True):
        assert len(set().union(*(have[k] for k in keys if low <= k < high))) >= MIN_SUBJECTS


def test_a_value_with_a_tenth_of_the_weight_is_a_bin_of_its_own():
    keys = np.arange(100)
    weight = np.full(100, 10)
    weight[40] = 900
    edges = fit_edges(keys, weight, np.full(100, 20), [[]] * 100)
    assert {40, 41} <= set(edges)


def test_quantiles_cut_even_weights_evenly():
    edges = fit_edges(np.arange(1000), np.full(1000, 5), np.full(1000, 20), [[]] * 1000)
    assert edges == list(range(100, 1000, 100))


def test_neighbours_without_ten_subjects_are_merged():
    few = [[s] for s in range(12)]
    edges = fit_edges(np.arange(12), np.full(12, 7), np.ones(12, np.int64), few)
    assert edges == []
    few = [[s] for s in range(20)]
    edges = fit_edges(np.arange(20), np.full(20, 7), np.ones(20, np.int64), few)
    assert edges == [10]
