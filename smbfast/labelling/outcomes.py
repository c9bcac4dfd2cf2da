"""From a task definition and the moments of a batch: decision nodes, and the label of each.

With O the first outcome after the node, C the first competing event after it, W the end of the
outcome window and F the end of the record (all NEVER where there is none):

    event        O <= W and O <= C        an outcome at the node itself is never one: it may be read
    competing    not event, and C <= W
    known        event, competing, or W <= F

A label that says that something lasts is true where no outcome comes before W, strictly. Of time to
event, the duration is min(O, C, W, F) - node in days, and an outcome after F is not seen.

Legend: S subjects of a batch, X index events, Q nodes. Subjects are places in the batch.
"""

from dataclasses import dataclass

import numpy as np

from smbfast.labelling.moments import LONG_AGO, NEVER, Record
from smbfast.settings.tasks import DEATH, TaskDefinition

HOUR = 3_600_000_000  # microseconds
DAY = 24 * HOUR
YEAR = 365.25 * DAY
PRESENT = "outcome already present"  # reasons for which a moment is no node
DEAD = "after death"
UNFOLLOWED = "not followed to the end"


@dataclass(frozen=True)
class Candidates:
    """Moments at which a task may be asked: subject_Q, time_Q and the index event of each (its own
    time where nodes are given), sorted by subject and time, each once."""

    subject_Q: np.ndarray
    time_Q: np.ndarray
    index_Q: np.ndarray

    def __len__(self) -> int:
        return len(self.subject_Q)

    def take(self, rows: np.ndarray) -> "Candidates":
        """Return the given ones."""
        return Candidates(self.subject_Q[rows], self.time_Q[rows], self.index_Q[rows])


@dataclass(frozen=True)
class Answers:
    """The label of each node.

    true_Q bool: the value of a binary label, or whether the event was seen; days_Q float64 and
    competing_Q bool of time to event; reason_Q str: why there is no label, "" where there is one.
    """

    true_Q: np.ndarray
    days_Q: np.ndarray
    competing_Q: np.ndarray
    reason_Q: np.ndarray


def candidates(task: TaskDefinition, record: Record) -> Candidates:
    """Return the moments that index events and offsets of a task give in a batch."""
    assert task.index is not None
    index = record.moments[task.index]
    subject_X, index_X = index.subject_X, index.time_X
    if task.which == "first":
        subject_X, index_X = index.first_of()
    parts = []
    for hours in task.offset_hours:
        time_X = index_X + round(hours * HOUR)
        if task.clock is not None:
            hour, minute = (int(part) for part in task.clock.split(":"))
            time_X = time_X // DAY * DAY + hour * HOUR + minute * (HOUR // 60)
        parts.append(Candidates(subject_X, time_X, index_X))
    subject_Q, time_Q, index_Q = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("subject_Q", "time_Q", "index_Q")
    )
    # of two index events that give one node the later stands, as it is what was last known
    order_Q = np.lexsort((-index_Q, time_Q, subject_Q))
    subject_Q, time_Q, index_Q = subject_Q[order_Q], time_Q[order_Q], index_Q[order_Q]
    once_Q = np.ones(len(order_Q), bool)
    once_Q[1:] = (subject_Q[1:] != subject_Q[:-1]) | (time_Q[1:] != time_Q[:-1])
    return Candidates(subject_Q[once_Q], time_Q[once_Q], index_Q[once_Q])


def exclusions(task: TaskDefinition, record: Record, at: Candidates) -> np.ndarray:
    """Return why a moment is no node of a task, str [Q]: the first reason that holds, or ""."""
    where = at.subject_Q, at.time_Q
    of = record.moments
    reason_Q = np.full(len(at), "", dtype="<U32")

    def exclude(reason: str, wrong_Q: np.ndarray) -> None:
        reason_Q[wrong_Q & (reason_Q == "")] = reason

    exclude("before the index event", at.time_Q < at.index_Q)
    for name in task.not_after:
        exclude(f"after {name}", of[name].last_upto(*where) > at.index_Q)
    if task.inside is not None:
        opened_Q, closed_Q = (of[name].last_upto(*where) for name in task.inside)
        # at one time a transfer closes a stay and opens another; a stay of no length does not
        num_opened_Q, num_closed_Q = (of[name].num_upto(*where) for name in task.inside)
        over_Q = (closed_Q > opened_Q) | ((closed_Q == opened_Q) & (num_closed_Q >= num_opened_Q))
        exclude("not inside a stay", (opened_Q == LONG_AGO) | over_Q)
    exclude(DEAD, of[DEATH].last_upto(*where) != LONG_AGO)
    exclude("before the first event", record.first_S[at.subject_Q] > at.time_Q)
    if task.first_only:
        exclude(PRESENT, of[task.outcome].known(*where))
    for name in task.need:
        exclude(f"without {name}", ~of[name].known(*where))
    for name in task.without:
        exclude(f"with {name}", of[name].known(*where))
    if task.history_days:
        since_Q = np.minimum(record.first_S[at.subject_Q], at.time_Q)
        exclude("history too short", at.time_Q - since_Q < task.history_days * DAY)
    if task.age is not None:
        birth_Q = record.birth_S[at.subject_Q]
        exclude("age unknown", birth_Q == LONG_AGO)
        age_Q = (at.time_Q - birth_Q.astype(np.float64)) / YEAR
        exclude("outside the ages", (age_Q < task.age[0]) | (age_Q >= task.age[1]))
    return reason_Q


def window_ends(task: TaskDefinition, record: Record, at: Candidates) -> np.ndarray:
    """Return the end of the outcome window of each node, int64 [Q]; NEVER where it has none."""
    end_Q = np.full(len(at), NEVER)
    if task.horizon_days:
        start_Q = at.time_Q if task.horizon_from == "node" else at.index_Q
        end_Q = start_Q + round(task.horizon_days[0] * DAY)
    if task.until is not None:
        until_Q = record.moments[task.until].first_after(at.subject_Q, at.time_Q)
        end_Q = np.minimum(end_Q, until_Q)
    return end_Q


def record_ends(task: TaskDefinition, record: Record, at: Candidates) -> np.ndarray:
    """Return up to when outcomes are known, int64 [Q]; LONG_AGO where that is never."""
    last_S = record.last_S
    if task.followed_to is not None:
        last_S = np.full(len(last_S), LONG_AGO)
        moments = record.moments[task.followed_to]
        last_S[moments.subject_X] = moments.time_X  # sorted by time: the last assigned stays
    more = round(task.followed_days * DAY)
    return np.where(last_S == LONG_AGO, LONG_AGO, last_S + more)[at.subject_Q]


def answers(task: TaskDefinition, record: Record, at: Candidates) -> Answers:
    """Return the label of each node of a task by the rules at the top of this file."""
    where = at.subject_Q, at.time_Q
    outcome_Q = record.moments[task.outcome].first_after(*where)
    if task.competing == task.outcome:
        competing_Q = np.full(len(at), NEVER)
    else:
        competing_Q = record.moments[task.competing].first_after(*where)
    window_Q = window_ends(task, record, at)
    followed_Q = record_ends(task, record, at)
    if task.kind == "binary":
        return _binary(task, outcome_Q, competing_Q, window_Q, followed_Q)
    return _time_to_event(task, at.time_Q, outcome_Q, competing_Q, window_Q, followed_Q)


def _binary(
    task: TaskDefinition,
    outcome_Q: np.ndarray,
    competing_Q: np.ndarray,
    window_Q: np.ndarray,
    followed_Q: np.ndarray,
) -> Answers:
    lasts = task.value == "lasts"
    inside_Q = (outcome_Q < window_Q) if lasts else (outcome_Q <= window_Q)
    event_Q = inside_Q & (outcome_Q <= competing_Q) & (outcome_Q != NEVER)
    competed_Q = ~event_Q & (competing_Q <= window_Q) & (competing_Q != NEVER)
    if lasts:
        competed_Q &= (competing_Q < window_Q) & (competing_Q < outcome_Q)
    seen_Q = (window_Q <= followed_Q) & (window_Q != NEVER)
    if lasts:
        seen_Q |= (outcome_Q != NEVER) & (outcome_Q >= window_Q)
    reason_Q = np.full(len(outcome_Q), "", dtype="<U32")
    if task.on_competing == "excluded":
        reason_Q[competed_Q] = f"{task.competing} first"
    if task.follow_up == "required":
        reason_Q[~(event_Q | competed_Q | seen_Q)] = UNFOLLOWED
    true_Q = ~(event_Q | competed_Q) if lasts else event_Q
    none_Q = np.zeros(len(outcome_Q), bool)
    return Answers(true_Q, np.full(len(outcome_Q), np.nan), none_Q, reason_Q)


def _time_to_event(
    task: TaskDefinition,
    time_Q: np.ndarray,
    outcome_Q: np.ndarray,
    competing_Q: np.ndarray,
    window_Q: np.ndarray,
    followed_Q: np.ndarray,
) -> Answers:
    end_Q = np.minimum(window_Q, followed_Q)
    event_Q = (outcome_Q <= end_Q) & (outcome_Q <= competing_Q) & (outcome_Q != NEVER)
    competed_Q = ~event_Q & (competing_Q <= end_Q) & (competing_Q != NEVER)
    stop_Q = np.minimum(end_Q, np.minimum(outcome_Q, competing_Q))
    reason_Q = np.full(len(outcome_Q), "", dtype="<U32")
    reason_Q[stop_Q <= time_Q] = "not followed after the node"
    if task.on_competing == "excluded":
        reason_Q[competed_Q] = f"{task.competing} first"
    days_Q = np.where(reason_Q == "", (stop_Q - np.minimum(time_Q, stop_Q)) / DAY, 0.0)
    return Answers(event_Q, days_Q, competed_Q & (task.on_competing == "competing"), reason_Q)
