"""Plans sequence packing: which windows share a micro-batch, that is one forward without padding.

A micro-batch holds at most a given number of online tokens. Its memory grows with its tokens, and
its time with its tokens and visible pairs. The plan is a pure function of these, without random
draws. The order of the windows only decides ties between windows of equal cost.

Legend: W windows, M micro-batches.
"""

import numpy as np


def online_cost(tokens_W: np.ndarray, pairs_W: np.ndarray, ratio: float) -> np.ndarray:
    """Return the cost of each window in units of a token, float64 [W].

    Args:
        tokens_W: the number of online tokens.
        pairs_W: the number of visible pairs (query, key).
        ratio: FLOPs of a visible pair over those of a token in the linears
            (`smbfast.model.flops.ModelShape.attention_ratio`).
    """
    return tokens_W + ratio * pairs_W


def plan_micro_batches(
    tokens_W: np.ndarray, cost_W: np.ndarray, capacity: int, ranks: int = 1
) -> list[np.ndarray]:
    """Return the windows of each micro-batch; every window is in exactly one of them.

    Best-fit decreasing on tokens gives the number of micro-batches. For several ranks it is rounded
    up to a multiple of them (if there are as many windows), because ranks wait for each other.
    Then each window, in descending cost, goes to the cheapest micro-batch with room (longest
    processing time first). If all windows fit in this way, that is the plan, because micro-batches
    of equal cost need less peak memory. Otherwise there is almost no slack, and best-fit is the
    plan.

    Args:
        tokens_W: int [W], the online tokens of each window, those of its trunk and branches.
        cost_W: float [W], the cost that micro-batches should share equally (`online_cost`).
        capacity: the tokens that a micro-batch may hold; a longer window has one of its own.
        ranks: the number of processes that share the micro-batches.

    Returns:
        For each micro-batch the indices of its windows, int64, ascending. Rank r runs
        `plan[r::ranks]`, and the numbers of micro-batches of two ranks differ by one at most.
        Micro-batches that run at the same time are neighbours in cost, and the costliest come
        first.

    Raises:
        ValueError: if tokens and costs differ in length, or one of them is not positive.
    """
    tokens_W, cost_W = np.asarray(tokens_W, np.int64), np.asarray(cost_W, np.float64)
    if tokens_W.shape != cost_W.shape or tokens_W.ndim != 1:
        raise ValueError(
            f"tokens_W and cost_W must be one of each per window, got shapes {tokens_W.shape} and "
            f"{cost_W.shape}"
        )
    if not ((tokens_W > 0).all() and (cost_W > 0).all()):
        raise ValueError("tokens_W and cost_W must all be positive")
    if ranks == 1 and tokens_W.sum() <= capacity:
        return [np.arange(len(tokens_W))][: len(tokens_W)]
    fits_W = tokens_W <= capacity
    alone = [[w] for w in np.flatnonzero(~fits_W).tolist()]
    shared = np.flatnonzero(fits_W)
    # best fit never opens two micro-batches that one could hold, so this many are enough
    enough = 2 * -(-int(tokens_W[shared].sum()) // capacity)
    largest_first = shared[np.lexsort((-cost_W[shared], -tokens_W[shared]))]
    best_fit = _placed(largest_first, tokens_W, cost_W, capacity, enough, level=False)
    needed = -(-(len(alone) + len(best_fit)) // ranks) * ranks - len(alone)
    costliest_first = shared[np.lexsort((-tokens_W[shared], -cost_W[shared]))]
    even = _placed(
        costliest_first, tokens_W, cost_W, capacity, min(needed, len(shared)), level=True
    )
    return _dealt([np.sort(own) for own in alone + (even or best_fit)], cost_W, ranks)


def _placed(
    order: np.ndarray,
    tokens_W: np.ndarray,
    cost_W: np.ndarray,
    capacity: int,
    count: int,
    *,
    level: bool,
) -> list[list[int]]:
    """Put windows, in `order`, into at most `count` micro-batches with room.

    With `level`, a window goes to the cheapest micro-batch, else to the fullest. The result is
    empty if a window finds no room.
    """
    room_M, spent_M = np.full(count, capacity), np.zeros(count)
    plan: list[list[int]] = [[] for _ in range(count)]
    for w, tokens in zip(order.tolist(), tokens_W[order].tolist(), strict=True):
        fits = np.flatnonzero(room_M >= tokens)
        if not len(fits):
            return []
        chosen = int(fits[(spent_M if level else room_M)[fits].argmin()])
        plan[chosen].append(w)
        room_M[chosen] -= tokens
        spent_M[chosen] += cost_W[w]
    return [own for own in plan if own]


def _dealt(plan: list[np.ndarray], cost_W: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Sort micro-batches by descending cost, so that `plan[rank::ranks]` cost about the same."""
    plan = sorted(plan, key=lambda own: -cost_W[own].sum())
    dealt: list[np.ndarray] = []
    spent = np.zeros(ranks)
    for first in range(0, len(plan), ranks):
        group = plan[first : first + ranks]
        # the costliest goes to the rank that spent least; a short last group to the first ranks
        order = np.argsort(spent[: len(group)], kind="stable")
        placed = [group[i] for i in np.argsort(order)]
        spent[: len(group)] += [cost_W[own].sum() for own in placed]
        dealt += placed
    return dealt
