"""Records that horizons are hard on, and the windows that show parts of them."""

from collections.abc import Iterable, Sequence

import numpy as np

from smbfast.batch import UNKNOWN, Timeline
from smbfast.data.code_classes import CodeClasses
from smbfast.data.horizons import Horizons
from smbfast.data.timelines import Preamble
from smbfast.data.windows import WindowSet
from smbfast.settings import ObjectiveSettings
from tests.horizon_oracle import Bucket, Record, View

HOUR, DAY = 3_600_000_000, 86_400_000_000
SPANS = (DAY, 3 * DAY, 30 * DAY, 365 * DAY)
WINDOW = 30  # tokens
CLASSES = 7
DEATH = CLASSES - 1  # the class of the terminal event
CODES = [40 + 3 * c for c in range(CLASSES)] + [7]  # ids of the classes, and of what has none


def record(
    seed: int,
    times: Sequence[int],
    *,
    death: bool = False,
    after: Sequence[int] = (),
    length: int = 0,
    large: int = -1,
) -> Record:
    """Random events at `times`; the last of them is a death, and `after` are later ones.

    Args:
        length: of a bucket; then the times are of buckets, and a death comes nine hours into one.
        large: the number of a bucket with more events than a window has tokens.
    """
    random = np.random.default_rng(seed)
    buckets = []
    for number, time in enumerate((*times, *after)):
        dies = death and number == len(times) - 1
        events = WINDOW if number == large else int(random.integers(1, 4))
        classes = random.integers(-1, CLASSES - 1, events).tolist()
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
    "long": record(8, days(*range(0, 140, 14), 141, 142.5, 143), death=True, large=6),
}
TEXT = {
    "days": record(11, days(0, 1, 2, 3, 4, 33, 34, 35, 400), length=DAY),
    "a death within a day": record(12, days(0, 3, 4, 30, 31), death=True, length=DAY),
    "a later day after a death": record(13, days(0, 2), death=True, after=days(4), length=DAY),
    "long days": record(14, days(*range(0, 21, 3)), length=DAY, large=3),
}


def timeline_of(own: Record, subject: int) -> Timeline:
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
    classes = [c for bucket in own.buckets for c in bucket.classes]
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
        last=own.last,
        terminal=UNKNOWN if own.terminal is None else own.terminal,
        line_code_L=np.array([CODES[c] for c in classes], np.int32),
    )


def window_set(own: Record, horizons: Horizons, window: int = WINDOW) -> WindowSet:
    """The training windows of a record."""
    names = [f"class {number}" for number in range(CLASSES)]
    classes = CodeClasses(names, np.array(CODES[:CLASSES]))
    timelines = [timeline_of(own, own.buckets[0].ids[-1])]
    options = {"horizons": horizons, "classes": classes}
    return WindowSet.of([timelines], window, Preamble(begin=1), ObjectiveSettings(), **options)


def views_of(own: Record, windows: WindowSet) -> list[tuple[Timeline, View]]:
    """The windows as the loader gets them, and what they show of their record."""
    views = []
    for index in range(len(windows)):
        one = windows[index]
        stop = one.start + len(one) - one.header
        view = View.of(own, one.start, stop, one.ids_T[: one.header].tolist())
        assert view.ids == tuple(one.ids_T.tolist())
        views.append((one, view))
    assert sum(len(view.ends) for _, view in views) == len(own.buckets)
    return views


def shown(
    records: Iterable[Record], horizons: Horizons, window: int = WINDOW
) -> list[tuple[Timeline, View]]:
    """All windows of the records."""
    return [one for own in records for one in views_of(own, window_set(own, horizons, window))]
