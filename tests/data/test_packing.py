"""Which windows share a row: all of them once, within capacity, few rows, level rows.

W windows, R rows.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smbfast.data.packing import online_cost, plan_micro_batches

CAPACITY = 32_768
RATIO = 7.4e-5  # of a visible pair to a token in the linears: Qwen3-8B with LoRA

# tokens, and a cost beside them that a sum holds exactly
windows = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 30)), max_size=24)


def first_fit(tokens: list[int], capacity: int) -> int:
    """Rows of first-fit decreasing; a window above capacity has one of its own."""
    room: list[int] = []
    for size in sorted(tokens, reverse=True):
        row = next((i for i, left in enumerate(room) if left >= size), len(room))
        room[row:] = room[row:] or [capacity]
        room[row] -= size
    return len(room)


def drawn(seed: int, count: int = 1024, longest: int = 8192) -> tuple[np.ndarray, np.ndarray]:
    """Online tokens and cost of log-normal timelines with one cut each, in windows."""
    random = np.random.default_rng(seed)
    length_W = np.exp(random.normal(np.log(2048), 0.8, count)).clip(16, longest).round()
    future_W = length_W - (random.uniform(0.3, 0.9, count) * length_W).round()
    tokens_W = (length_W + future_W).astype(np.int64)
    past_W = length_W - future_W
    pairs_W = length_W * (length_W + 1) / 2 + future_W * past_W + future_W * (future_W + 1) / 2
    return tokens_W, online_cost(tokens_W, pairs_W, RATIO)


def check(rows: list[np.ndarray], tokens_W: np.ndarray, capacity: int) -> None:
    placed = np.concatenate([*rows, np.empty(0, np.int64)])
    assert sorted(placed.tolist()) == list(range(len(tokens_W)))
    for row in rows:
        assert len(row) == 1 or tokens_W[row].sum() <= capacity


@given(chosen=windows, capacity=st.integers(1, 50), ranks=st.integers(1, 5))
def test_every_window_once_and_within_capacity(chosen, capacity, ranks):
    tokens_W = np.array([t for t, _ in chosen], np.int64)
    cost_W = tokens_W + np.array([c for _, c in chosen]) / 4
    rows = plan_micro_batches(tokens_W, cost_W, capacity, ranks)
    check(rows, tokens_W, capacity)
    assert all((np.diff(row) > 0).all() for row in rows)


@given(sizes=st.lists(st.integers(1, 15), max_size=8), capacity=st.integers(2, 15))
def test_no_more_rows_than_first_fit_needs(sizes, capacity):
    """Up to 15 tokens and 8 windows, where that holds without an exception (all were tried)."""
    tokens_W = np.array(sizes, np.int64)
    assert len(plan_micro_batches(tokens_W, tokens_W * 1.0, capacity)) <= first_fit(sizes, capacity)


@given(chosen=windows, capacity=st.integers(1, 50), ranks=st.integers(1, 3), data=st.data())
def test_the_order_of_windows_does_not_matter(chosen, capacity, ranks, data):
    shuffled = data.draw(st.permutations(chosen))
    plans = []
    for given_order in (chosen, shuffled):
        tokens_W = np.array([t for t, _ in given_order], np.int64)
        cost_W = tokens_W + np.array([c for _, c in given_order]) / 4
        rows = plan_micro_batches(tokens_W, cost_W, capacity, ranks)
        plans.append([sorted(given_order[w] for w in row) for row in rows])
    assert sorted(plans[0]) == sorted(plans[1])


@pytest.mark.parametrize("seed", range(8))
def test_rows_are_full(seed):
    tokens_W, cost_W = drawn(seed)
    rows = plan_micro_batches(tokens_W, cost_W, CAPACITY)
    check(rows, tokens_W, CAPACITY)
    assert tokens_W.sum() / (len(rows) * CAPACITY) >= 0.99


@pytest.mark.parametrize("seed", range(8))
def test_ranks_have_equal_work(seed):
    """Rows are rounded up to a multiple of the ranks: fuller ones would leave ranks waiting."""
    tokens_W, cost_W = drawn(seed)
    rows, fewest = (
        plan_micro_batches(tokens_W, cost_W, CAPACITY, 8),
        plan_micro_batches(tokens_W, cost_W, CAPACITY),
    )
    check(rows, tokens_W, CAPACITY)
    assert len(rows) == -(-len(fewest) // 8) * 8
    cost_R = np.array([cost_W[row].sum() for row in rows])
    work = [cost_R[rank::8].sum() for rank in range(8)]
    assert max(work) <= 1.02 * np.mean(work)
    slowest = cost_R.reshape(-1, 8).max(1).sum()  # ranks that wait for each other at every row
    assert slowest <= 1.02 * np.mean(work)


def test_rows_are_levelled_where_there_is_slack():
    tokens_W, cost_W = drawn(1, count=64)
    rows = plan_micro_batches(tokens_W, cost_W, 2 * CAPACITY)
    cost_R = np.array([cost_W[row].sum() for row in rows])
    assert len(rows) == first_fit(tokens_W.tolist(), 2 * CAPACITY) > 2
    assert cost_R.max() < 1.02 * cost_R.mean()
    assert (np.diff(cost_R) <= 0).all()


def test_a_window_above_capacity_has_a_row_of_its_own():
    tokens_W = np.array([3, 100, 4, 3])
    rows = plan_micro_batches(tokens_W, tokens_W * 1.0, 10)
    assert [row.tolist() for row in rows] == [[1], [0, 2, 3]]


def test_what_is_levelled_is_the_cost():
    """One of four windows of like length costs as much as the rest together: it is alone."""
    rows = plan_micro_batches(np.array([4, 4, 4, 4]), np.array([8.0, 24, 8, 8]), 12)
    assert sorted(row.tolist() for row in rows) == [[0, 2, 3], [1]]


def test_ranks_take_turns_with_the_costliest_row():
    rows = plan_micro_batches(np.array([2, 2, 2, 2]), np.array([10.0, 5, 4, 1]), 1, ranks=2)
    assert [row.tolist() for row in rows] == [[0], [1], [3], [2]]


@pytest.mark.parametrize(
    ("tokens", "costs", "told"),
    [([1, 2], [1.0], "one of each"), ([0, 2], [1.0, 1], "positive"), ([1], [-1.0], "positive")],
)
def test_bad_plans_are_refused(tokens, costs, told):
    with pytest.raises(ValueError, match=told):
        plan_micro_batches(np.array(tokens), np.array(costs), 10)
