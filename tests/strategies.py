"""Hypothesis strategies: windows of timelines, and settings of cuts and masks."""

import numpy as np
from hypothesis import strategies as st

from smbfast.batch import Timeline
from smbfast.settings import ObjectiveSettings
from tests.tiny import DELIMITERS

DAY = 86_400_000_000  # microseconds
UNITS = ["token", "event", "span"]


@st.composite
def windows(draw: st.DrawFn, subject: int = 0) -> Timeline:
    """[header | buckets]; a bucket is a header token, then sections `<tag> lines </tag>`.

    A single bucket has no future, and demographics (section 0) are never masked: some windows
    have no cut.
    """
    header = draw(st.integers(0, 4))
    random = np.random.default_rng(draw(st.integers(0, 2**16)))
    ends, starts, stops, times, sections = [], [], [], [], []
    ids = random.integers(3, 50, header).tolist()
    for bucket in range(draw(st.sampled_from([5, 4, 7, 1]))):
        ids.append(2)
        for _ in range(draw(st.sampled_from([2, 1] + [0] * (bucket > 0)))):
            section = draw(st.sampled_from([3, 4, 0]))
            ids.append(DELIMITERS[section % len(DELIMITERS)])
            for lines in draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)):
                starts.append(len(ids))
                ids += random.integers(3, 50, lines).tolist()
                stops.append(len(ids))
                times.append(bucket * DAY)
                sections.append(section)
            ids.append(DELIMITERS[-1])
        ends.append(len(ids))
    return Timeline(
        subject=subject,
        ids_T=np.array(ids, np.int32),
        header=header,
        bucket_end_B=np.array(ends, np.int32),
        bucket_time_B=np.arange(len(ends), dtype=np.int64) * DAY,
        bucket_head_B=np.ones(len(ends), np.uint16),
        line_start_L=np.array(starts, np.int32),
        line_end_L=np.array(stops, np.int32),
        line_time_L=np.array(times, np.int64),
        line_section_L=np.array(sections, np.uint8),
        start=(start := draw(st.sampled_from([0, 0, 3]))),
        labels_from=header if start else 0,
    )


def steps(most: int = 5) -> st.SearchStrategy[list[Timeline]]:
    """The windows of a step, each of another subject."""
    counts = st.sampled_from([3, most, 2, 1])
    return counts.flatmap(lambda n: st.tuples(*map(windows, range(n)))).map(list)


@st.composite
def objectives(draw: st.DrawFn) -> ObjectiveSettings:
    """Settings of cuts, masks, labels and targets."""
    return ObjectiveSettings(
        mask_ratio=draw(st.sampled_from([0.5, 1.0, 0.1])),
        mask_unit=draw(st.sampled_from(UNITS)),
        span=draw(st.integers(1, 4)),
        cuts=draw(st.sampled_from([3, 1])),
        context=draw(st.sampled_from([(0.0, 1.0), (0.25, 0.9)])),
        min_future=draw(st.sampled_from([1, 6])),
        skeleton=draw(st.sampled_from(["visible", "hidden"])),
        horizon=draw(st.sampled_from([None, 7, 1])),
        sft_labels=draw(st.sampled_from(["all", "future"])),
        target_norm=draw(st.sampled_from(["layer", "none"])),
    )
