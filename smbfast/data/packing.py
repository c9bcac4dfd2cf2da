"""Plans sequence packing: which windows share a row, that is one forward without padding.

A row holds at most a given number of online tokens. It costs memory by its tokens, and time by its
tokens and visible pairs. The plan is a pure function of both, without draws or state. The order of
the windows only decides which of two windows of equal cost goes where.

Legend: W windows, R rows.
"""

import numpy as np


def online_cost(tokens_W: np.ndarray, pairs_W: np.ndarray, ratio: float) -> np.ndarray:
    """Return the cost of each window in tokens: its online tokens, and `ratio` per visible pair.

    Args:
        ratio: FLOPs of a visible pair over those of a token in the linears
            (`smbfast.model.flops.ModelShape.attention_ratio`).
    """
    return tokens_W + ratio * pairs_W


def plan_rows(
    tokens_W: np.ndarray, cost_W: np.ndarray, capacity: int, ranks: int = 1
) -> list[np.ndarray]:
    """Return the windows of each row; every window is in exactly one row.

    Best-fit decreasing on tokens gives the number of rows. For several ranks it is rounded up to a
    multiple of them (if there are as many windows), because ranks wait for each other. Then each
    window, in descending cost, goes to the cheapest row with room (longest processing time). If all
    windows fit in this way, these are the rows: rows of equal cost need less peak memory. If not,
    there is next to no slack, and the rows are those of best fit.

    Args:
        tokens_W: int [W], the online tokens of each window, those of its trunk and branches.
        cost_W: float [W], the cost that rows should share equally (`online_cost`).
        capacity: the tokens that a row may hold; a longer window has a row of its own.
        ranks: processes that share the rows.

    Returns:
        Indices of windows, ascending, row by row. Rank r runs `rows[r::ranks]`. The numbers of rows
        of two ranks differ by one at most. Rows that run at the same time are neighbours in cost,
        and the costliest come first.

    Raises:
        ValueError: tokens and costs differ in length, or one of them is not positive.
    """
    tokens_W, cost_W = np.asarray(tokens_W, np.int64), np.asarray(cost_W, np.float64)
    if tokens_W.shape != cost_W.shape or tokens_W.ndim != 1:
        raise ValueError(
            f"tokens_W and cost_W must be one of each per window, got shapes {tokens_W.shape} and "
            f"{cost_W.shape}"
        )
    if not ((tokens_W > 0).all() and (cost_W > 0).all()):
        raise ValueError("tokens_W and cost_W must all be positive")
    fits_W = tokens_W <= capacity
    alone = [[w] for w in np.flatnonzero(~fits_W).tolist()]
    shared = np.flatnonzero(fits_W)
    # two rows that one could hold are never both opened, so that there are always enough
    enough = 2 * -(-int(tokens_W[shared].sum()) // capacity)
    largest_first = shared[np.lexsort((-cost_W[shared], -tokens_W[shared]))]
    rows = _placed(largest_first, tokens_W, cost_W, capacity, enough, level=False)
    needed = -(-(len(alone) + len(rows)) // ranks) * ranks - len(alone)
    costliest_first = shared[np.lexsort((-tokens_W[shared], -cost_W[shared]))]
    even = _placed(
        costliest_first, tokens_W, cost_W, capacity, min(needed, len(shared)), level=True
    )
    return _dealt([np.sort(row) for row in alone + (even or rows)], cost_W, ranks)


def _placed(
    order: np.ndarray,
    tokens_W: np.ndarray,
    cost_W: np.ndarray,
    capacity: int,
    count: int,
    *,
    level: bool,
) -> list[list[int]]:
    """Put each window into the cheapest row with room (`level`) or the fullest; [] if none has."""
    room_R, spent_R = np.full(count, capacity), np.zeros(count)
    rows: list[list[int]] = [[] for _ in range(count)]
    for w, tokens in zip(order.tolist(), tokens_W[order].tolist(), strict=True):
        fit_R = np.flatnonzero(room_R >= tokens)
        if not len(fit_R):
            return []
        row = int(fit_R[(spent_R if level else room_R)[fit_R].argmin()])
        rows[row].append(w)
        room_R[row] -= tokens
        spent_R[row] += cost_W[w]
    return [row for row in rows if row]


def _dealt(rows: list[np.ndarray], cost_W: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Sort rows by descending cost, so that `rows[rank::ranks]` cost about the same."""
    rows = sorted(rows, key=lambda row: -cost_W[row].sum())
    dealt: list[np.ndarray] = []
    spent = np.zeros(ranks)
    for first in range(0, len(rows), ranks):
        group = rows[first : first + ranks]
        # the costliest of a group goes to the rank that has least; a short last one to the first
        order = np.argsort(spent[: len(group)], kind="stable")
        placed = [group[i] for i in np.argsort(order)]
        spent[: len(group)] += [cost_W[row].sum() for row in placed]
        dealt += placed
    return dealt
