"""Which windows share a row: one forward of at most so many online tokens, no padding.

A row costs memory by its tokens and time by its tokens and visible pairs. The plan is a pure
function of both: no draw, no state, and the order of the windows changes nothing but which of two
alike windows goes where.

Legend: W windows, R rows.
"""

import numpy as np


def online_cost(tokens_W: np.ndarray, pairs_W: np.ndarray, ratio: float) -> np.ndarray:
    """Cost of each window in tokens: its online tokens, and its visible pairs at `ratio` each.

    Args:
        ratio: FLOPs of a visible pair over those of a token in the linears
            (`smbfast.model.flops.ModelShape.attention_ratio`).
    """
    return tokens_W + ratio * pairs_W


def plan_rows(
    tokens_W: np.ndarray, cost_W: np.ndarray, capacity: int, ranks: int = 1
) -> list[np.ndarray]:
    """The windows of each row; every window is in exactly one.

    Best-fit decreasing on tokens says how many rows are needed; for several ranks that is rounded
    up to a multiple (where there are as many windows), because ranks wait for each other. If the
    windows also fit into that many rows when each, in descending cost, goes to the cheapest row
    with room (longest processing time), the rows are those: level ones need less memory at their
    peak. If not, there is next to no slack, and they are best-fit's.

    Args:
        tokens_W: int, online tokens of each window: trunk and branches.
        cost_W: float, what is levelled (`online_cost`).
        capacity: tokens of a row; a window with more has a row of its own.
        ranks: processes that share the rows.

    Returns:
        Indices of windows, ascending, row by row. Rank r runs `rows[r::ranks]`: ranks have equal
        numbers of rows up to one, and rows that run at the same time are neighbours in cost, the
        costliest first.

    Raises:
        ValueError: tokens and costs of unlike length, or one that is not positive.
    """
    tokens_W, cost_W = np.asarray(tokens_W, np.int64), np.asarray(cost_W, np.float64)
    if tokens_W.shape != cost_W.shape or tokens_W.ndim != 1:
        raise ValueError(
            f"tokens_W and cost_W must be one of each per window, got shapes {tokens_W.shape} and "
            f"{cost_W.shape}"
        )
    if not ((tokens_W > 0).all() and (cost_W > 0).all()):
        raise ValueError("tokens_W and cost_W must be positive; some are not")
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
    """Each window into the cheapest row with room (`level`), or the fullest; [] if one has none."""
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
    """Rows in descending cost, so ordered that `rows[rank::ranks]` cost alike."""
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
