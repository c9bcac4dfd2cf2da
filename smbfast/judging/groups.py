"""Groups of judged rows: by node, by number of past events, by sex and by age.

Shape suffixes: J judged rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from smbfast.judging.scored import Traits

FEW = 10  # people of either outcome below which a group has no figure: our choice
_NODES = ("first node", "second", "third", "fourth and later")
_AGES = ((0, 45, "below 45"), (45, 65, "45 to 64"), (65, 80, "65 to 79"), (80, np.inf, "80 and up"))


@dataclass(frozen=True)
class Group:
    """Rows that share a trait. by: "node", "events", "sex" or "age"; member_J: bool."""

    by: str
    name: str
    member_J: np.ndarray

    def reason(self, true_J: np.ndarray, subject_J: np.ndarray, binary: bool) -> str | None:
        """Return why no figure of the group is given, or None.

        People count, not rows: ten rows of one patient are a figure of one patient.

        Args:
            true_J: bool, the outcome or whether an event was observed.
            subject_J: int64, whose the row is.
            binary: of time-to-event labels, people who are censored need not be as many.
        """
        if len(np.unique(subject_J[self.member_J & true_J])) < FEW:
            return f"fewer than {FEW} people with the outcome"
        if binary and len(np.unique(subject_J[self.member_J & ~true_J])) < FEW:
            return f"fewer than {FEW} people without the outcome"
        return None


def groups(traits: Traits) -> list[Group]:
    """Return the groups of the judged rows; a trait that puts all rows into one group has none."""
    made = [*_by_node(traits), *_by_events(traits), *_by_sex(traits), *_by_age(traits)]
    made = [group for group in made if group.member_J.any()]
    several = {g.by for g in made if sum(other.by == g.by for other in made) > 1}
    return [group for group in made if group.by in several]


def _by_node(traits: Traits) -> Iterator[Group]:
    place_J = np.minimum(traits.order_N, len(_NODES) - 1)
    for place, name in enumerate(_NODES):
        yield Group("node", name, place_J == place)


def _by_events(traits: Traits) -> Iterator[Group]:
    """Yield thirds of the rows, with the edges in their names."""
    events_J = traits.events_N
    low, high = np.quantile(events_J, [1 / 3, 2 / 3], method="lower").astype(int)
    yield Group("events", f"up to {low:,} events", events_J <= low)
    yield Group("events", f"up to {high:,}", (events_J > low) & (events_J <= high))
    yield Group("events", f"more than {high:,}", events_J > max(low, high))


def _by_sex(traits: Traits) -> Iterator[Group]:
    for name in sorted(set(traits.sex_N.tolist())):
        yield Group("sex", name or "unknown", traits.sex_N == name)


def _by_age(traits: Traits) -> Iterator[Group]:
    for low, high, name in _AGES:
        yield Group("age", name, (traits.age_N >= low) & (traits.age_N < high))
    yield Group("age", "unknown", ~np.isfinite(traits.age_N))
