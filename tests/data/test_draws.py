"""Draws by identity: every part of an identity counts, and permutations are fair bijections."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smbfast.data.draws import below, generator, permuted, word

PARTS = [(0, "cut", 1, 2), (1, "cut", 1, 2), (0, "mask", 1, 2), (0, "cut", 2, 2), (0, "cut", 1, 3)]
PARTS += [(0, "cut", 1, -2), (0, "cut", 1, 2 + (1 << 40)), (0, "cut", 1), (0, "cut", 0, 1, 2)]


def test_draws_depend_on_every_part_of_an_identity() -> None:
    for draw in (lambda *i: generator(*i).random(), word):
        assert len({draw(*identity) for identity in PARTS}) == len(PARTS)
        assert draw(*PARTS[0]) == draw(*PARTS[0])


def test_two_generators_do_not_share_their_state() -> None:
    one, other = generator(*PARTS[0]), generator(*PARTS[1])
    first = one.random()
    assert other.random() == generator(*PARTS[1]).random()
    assert one.random() != first == generator(*PARTS[0]).random()


def test_numbers_below_are_even() -> None:
    """Of 7,000 draws below 7 each has 1,000 within five standard deviations, 5 * 29.3."""
    drawn = np.bincount([below(7, 0, "cut", i) for i in range(7000)])
    assert len(drawn) == 7 and np.abs(drawn - 1000).max() < 147
    assert below(1, 0, "cut", 0) == 0


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 600), seed=st.integers(0, 2**32))
def test_a_permutation_has_every_value_once(size: int, seed: int) -> None:
    key = word(seed, "order")
    assert sorted(permuted(place, size, key) for place in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 10])
def test_permutations_by_many_keys_are_even(size: int) -> None:
    """Each ordered pair of values is as likely as any other at the first two places.

    The statistic has k - 1 degrees of freedom for k pairs, a mean of k - 1 and a standard deviation
    of sqrt(2 (k - 1)); five of those are allowed. That of a fixed order would be 300 k (k - 1).
    """
    pairs = [p for p in product(range(size), repeat=2) if p[0] != p[1]]
    number, counts = 300 * len(pairs), dict.fromkeys(pairs, 0)
    for epoch in range(number):
        key = word(0, "stratum", epoch)
        counts[permuted(0, size, key), permuted(1, size, key)] += 1
    expected = number / len(pairs)
    statistic = sum((n - expected) ** 2 / expected for n in counts.values())
    free = len(pairs) - 1
    assert statistic < free + 5 * (2 * free) ** 0.5


def test_neighbours_do_not_stay_neighbours() -> None:
    """In a large range: distances of successive values spread over the range."""
    size, key = 1_000_003, word(0, "order", 0)
    values = np.array([permuted(place, size, key) for place in range(2000)])
    assert len(set(values.tolist())) == 2000 and values.min() >= 0 and values.max() < size
    # of two even draws a third of the range on average, with a deviation of 0.236 / sqrt(2000)
    assert abs(np.abs(np.diff(values)).mean() / size - 1 / 3) < 5 * 0.0053
