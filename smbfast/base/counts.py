"""Counts of people, of their events and of their windows, so that no reader learns a small one.

A count of 1 to 10 is only said to be small, and so is one that leaves 1 to 10 of a known whole.
"""

FEW = 10


def few(count: int) -> str:
    """Return a count of people or of their events as text, where 1 to 10 are all `<=10`."""
    return "<=10" if 0 < count <= 10 else f"{count:,}"


FEW_TEXT = few(1)


def of_whole(count: int, whole: int) -> str:
    """Return a count of a known whole as text, such as `all but <=10`."""
    return f"all but {FEW_TEXT}" if 0 < whole - count <= FEW < count else few(count)


def share(count: int, whole: int, digits: int = 1) -> str:
    """Return a count over its whole in percent; in words where that would tell a small count."""
    if 0 < count <= FEW:
        return few(count)
    if 0 < whole - count <= FEW:
        return f"all but {FEW_TEXT}"
    return f"{count / max(whole, 1):.{digits}%}"


def recorded(count: int, whole: int | None = None) -> int | str:
    """Return a count as a JSON value: a number, or text where that is small or leaves few."""
    text = few(count) if whole is None else of_whole(count, whole)
    return count if text == f"{count:,}" else text
