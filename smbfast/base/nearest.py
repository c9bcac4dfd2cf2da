"""Which name was meant: the nearest ones, and names that other programs use.

A wrong hint costs more than none, so only what plausibly was meant is named: a name that is one or
two letters off, or the same key in another group.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

MOST_HINTS = 3  # more would be a list to search: our choice


@dataclass(frozen=True)
class Foreign:
    """A name that users of other programs type, in the terms of this one.

    `key` is the key here, dotted, or empty if there is none; `phases.*.lr` is one of each phase.
    `why` says what differs, or why there is no such key.
    """

    key: str = ""
    why: str = ""


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Return up to 3 dotted names that `name` may have been meant for, none if none is near.

    Upper case and the difference of `.`, `_` and `-` do not count. Then, in this order: a name with
    at most two letters added, left out, changed or exchanged; the same last part in another group;
    a last part that is nearly the same.
    """
    known = list(known)
    plain = _plain(name)
    if not plain:
        return []
    same = [k for k in known if _plain(k) == plain]
    if same:
        return same[:MOST_HINTS]
    leaf = _leaf(name)
    close = _closest(known, plain, _plain, _allowed(plain, leaf))
    if close:
        return close
    same = [k for k in known if _leaf(k) == leaf]
    if 0 < len(same) <= MOST_HINTS:
        return same
    return _closest(known, leaf, _leaf, 1 if len(leaf) >= 4 else 0)


def hint(names: list[str]) -> str:
    """Return the question about nearest names that ends a message; empty if there are none."""
    return f"; did you mean {' or '.join(f'`{n}`' for n in names)}?" if names else ""


def edits(one: str, other: str) -> int:
    """Return the number of letters to add, leave out, change or exchange with their neighbour."""
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        two_before, before, row = before, row, [i]
        for j, b in enumerate(other, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b))
            if i > 1 and j > 1 and a == other[j - 2] and b == one[i - 2]:
                cost = min(cost, two_before[j - 2] + 1)
            row.append(cost)
    return row[-1]


def _allowed(plain: str, leaf: str) -> int:
    """Return how many edits a typing mistake may have: two, in a short name one."""
    return 2 if len(plain) >= 8 and len(leaf) >= 4 else 1


def _closest(known: list[str], word: str, part: Callable[[str], str], most: int) -> list[str]:
    """Return the known names whose part is nearest to `word`, with at most `most` edits."""
    near = [k for k in known if abs(len(part(k)) - len(word)) <= most]  # others are further off
    distance = {k: edits(part(k), word) for k in near}
    least = min(distance.values(), default=most + 1)
    close = [name for name, d in distance.items() if d == least <= most]
    return close if len(close) <= MOST_HINTS else []


def _plain(name: str) -> str:
    return re.sub(r"[._-]", "", name.lower())


def _leaf(name: str) -> str:
    return _plain(name.rsplit(".", 1)[-1])
