"""The bag of tokens: what a node sees, and the columns of train."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from smbfast.batch import Timeline
from smbfast.data.meds import EventBatch
from smbfast.probing.bag import DAY, TokenBag, bag_of_tokens, seen_tokens
from tests.probing.test_counts import Events
from tests.tiny import random_window

LINES = np.array([3, 40, 80, 200, 400, 500, 700, 900]) * DAY


def record(seed: int, subject: int = 1) -> Timeline:
    timeline = random_window(seed, buckets=8)
    times_L = LINES[timeline.line_time_L // DAY]
    return replace(timeline, line_time_L=times_L, subject=subject)


def by_hand(timeline: Timeline, time: int, days: float) -> tuple[list, list]:
    ever, recent = list(timeline.ids_T[: timeline.header]), []
    for start, end, at in zip(
        timeline.line_start_L, timeline.line_end_L, timeline.line_time_L, strict=True
    ):
        ids = list(timeline.ids_T[start:end])
        ever += ids if at <= time else []
        recent += ids if time - days * DAY < at <= time else []
    return ever, recent


@dataclass
class Recorded:
    """Gives a record of its own to every subject of a batch."""

    text_chars: int = 0

    def timelines(self, batch: EventBatch) -> list[Timeline]:
        return [record(int(s), int(s)) for s in batch.subject_N[batch.offset_S1[:-1]]]


@pytest.mark.parametrize("seed", range(3))
def test_a_node_sees_the_tokens_up_to_its_time_and_of_the_days_before_it(seed: int) -> None:
    timeline = record(seed)
    for time in (*LINES, LINES[-1] + 365 * DAY - 1, LINES[-1] + 365 * DAY, -1):
        seen = seen_tokens(timeline, int(time), 365)
        assert [list(ids) for ids in seen] == list(by_hand(timeline, int(time), 365))


def test_counts_of_nodes_in_several_batches() -> None:
    subject_K, time_K = np.array([1, 1, 2, 9]), np.array([LINES[1], LINES[4], LINES[2], LINES[7]])
    data = Events({"train": [[(1, 0, "A")], [(2, 0, "A")]], "tuning": [[(9, 0, "A")]]})
    bag = bag_of_tokens(data, Recorded(), subject_K, time_K, 30.0)
    for k, (subject, time) in enumerate(zip(subject_K, time_K, strict=True)):
        ever, recent = by_hand(record(int(subject)), int(time), 30)
        width = bag.ever_KV.shape[1]
        assert bag.ever_KV[[k]].toarray()[0].tolist() == np.bincount(ever, minlength=width).tolist()
        recent_V = np.bincount(np.array(recent, int), minlength=width)
        assert bag.recent_KV[[k]].toarray()[0].tolist() == recent_V.tolist()
    assert bag_of_tokens(data, Recorded(), subject_K, time_K, None).recent_KV is None


def test_columns_are_those_of_train() -> None:
    count_KV = csr_matrix(np.array([[2.0, 0, 1, 0], [0, 0, 1, 0], [0, 1, 0, 0]]))
    key = np.arange(3), np.zeros(3, np.int64)
    age_N2 = np.array([[50.0, 1.0], [60.0, 1.0], [0.0, 0.0]])
    bag = TokenBag(*key, count_KV, None)
    feature_NF = bag.features(*key, np.array([True, True, False]), age_N2).toarray()
    log2, log3 = np.log(2), np.log(3)
    assert feature_NF.tolist() == [[50, 1, log3, log2], [60, 1, 0, log2], [0, 0, 0, 0]]
