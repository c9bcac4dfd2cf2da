"""Records that horizons are hard on, and the windows that show parts of them."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from smbfast.batch import Timeline
from smbfast.data.timelines import Preamble, window_of
from tests.horizon_oracle import Bucket, Record, View

HOUR, DAY = 3_600_000_000, 86_400_000_000
SPANS = (3 * DAY, 30 * DAY, 180 * DAY, 365 * DAY)
CLASSES = 7
DEATH = CLASSES - 1  # the class of the terminal event


def record(
    seed: int, times: Sequence[int], *, death: bool = False, after: Sequence[int] = (), length=0
) -> Record:
    """Random events at `times`; the last of them is a death, and `after` are later ones.

    Args:
        length: of a bucket; then the times are of buckets, and a death comes nine hours into one.
    """
    random = np.random.default_rng(seed)
    buckets = []
    for number, time in enumerate((*times, *after)):
        dies = death and number == len(times) - 1
        classes = random.integers(-1, CLASSES - 1, int(random.integers(1, 4))).tolist()
        classes += [DEATH] * dies
        each = random.integers(3, 50, (len(classes), 2 if length else 1)).ravel().tolist()
        gap = random.integers(3, 50, int(random.integers(0, 2))).tolist() if number else []
        ids = [2, 50, *each, 51] if length else [*gap, *each]
        buckets.append(Bucket(int(time), tuple(ids), tuple(classes)))
    inside = 9 * HOUR if length else 0
    last = buckets[-1].time + inside
    terminal = int(times[-1]) + inside if death else None
    return Record(tuple(buckets), last, terminal, length)


def days(*numbers: float) -> list[int]:
    """Microseconds."""
    return [int(number * DAY) for number in numbers]


RECORDS = {
    "death in every horizon": record(1, days(0, 100, 250, 362, 363, 364.5), death=True),
    "censored": record(2, days(0, 2, 5, 20, 34, 60, 400, 401)),
    "at the end of a horizon, and one microsecond behind it": record(
        3, [0, SPANS[0], SPANS[0] + 1, SPANS[1], SPANS[1] + 1, SPANS[3], SPANS[3] + 1]
    ),
    "followed exactly as long": record(4, [0, DAY, DAY + SPANS[0], DAY + SPANS[1]]),
    "one bucket": record(5, [0]),
    "dead on arrival": record(6, [0], death=True),
    "events after a death": record(7, days(0, 1, 2, 3), death=True, after=days(3.5, 20)),
    "long": record(8, days(*range(0, 280, 14), 281, 282.5, 283), death=True),
}
TEXT = {
    "days": record(11, days(0, 1, 2, 3, 4, 33, 34, 35, 400), length=DAY),
    "a death within a day": record(12, days(0, 3, 4, 30, 31), death=True, length=DAY),
    "a later day after a death": record(13, days(0, 2), death=True, after=days(4), length=DAY),
    "long days": record(14, days(*range(0, 60, 3)), length=DAY),
}


def timeline_of(own: Record, subject: int, **more: object) -> Timeline:
    """The record as `prepare` would hand it on."""
    ids, ends, starts, stops, times = list(own.header), [], [], [], []
    width = 2 if own.length else 1
    for bucket in own.buckets:
        first = len(ids) + (2 if own.length else len(bucket.ids) - len(bucket.classes))
        for line in range(len(bucket.classes)):
            starts.append(first + line * width)
            stops.append(first + (line + 1) * width)
            times.append(bucket.time + (9 * HOUR if own.length else 0))
        ids += bucket.ids
        ends.append(len(ids))
    return Timeline(
        subject=subject,
        ids_T=np.array(ids, np.int32),
        header=len(own.header),
        bucket_end_B=np.array(ends, np.int32),
        bucket_time_B=np.array([b.time for b in own.buckets], np.int64),
        bucket_head_B=np.full(len(ends), 1 if own.length else 0, np.uint16),
        line_start_L=np.array(starts, np.int32),
        line_end_L=np.array(stops, np.int32),
        line_time_L=np.array(times, np.int64),
        line_section_L=np.full(len(starts), 3, np.uint8),
        **more,
    )


def windows_of(own: Record, subject: int, edges: Sequence[int]) -> list[tuple[Timeline, View]]:
    """Windows that follow each other, cut at `edges`, tokens of the record."""
    timeline = timeline_of(own, subject)
    bounds = [len(own.header), *edges, len(timeline)]
    shown = []
    for start, stop in pairwise(bounds):
        window, _ = window_of(timeline, start, stop, start, 256, Preamble(begin=1))
        lead = window.ids_T[: window.header].tolist()
        view = View.of(own, start, stop, lead)
        assert view.ids == tuple(window.ids_T.tolist())
        shown.append((window, view))
    return shown
