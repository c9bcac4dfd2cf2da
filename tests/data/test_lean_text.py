"""The format `text`: its headers tell all times, its names stay apart, its marks are its own."""

import re
import unicodedata
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smbfast.batch import UNKNOWN
from smbfast.data.clean import clean, lean_head
from smbfast.data.meds import BIRTH
from smbfast.data.sections import SECTIONS
from smbfast.data.style import LEAN, PAPER, SPAN, age_at, number, short_names, times_since
from smbfast.data.timelines import YEAR, training_spans, window_of
from tests.data.event_tables import Event, batch_of, event, our_bpe, serializer_of, subjects, us

BUCKETS = ("day", "hour", "moment")
OURS = our_bpe()
TAGS = [f"<{section}>" for section in SECTIONS]
HEADER = re.compile(r"(?:\+(\d+)|@|)(?: ?(\d\d))?(?::(\d\d)(?::(\d\d(?:\.\d+)?))?)?\n")


def read_times(headers: list[str], first: int, bucket: str) -> list[int]:
    """The times of buckets, from the day of the first one and headers alone."""
    day, hour, times = first // SPAN["day"], 0, []
    for header in headers:
        found = HEADER.fullmatch(header)
        assert found, header
        days, at, minute, second = found.groups()
        day += int(days or 0)
        hour = int(at) if at else hour
        clock = hour * SPAN["hour"] if bucket != "day" else 0
        clock += int(minute or 0) * 60_000_000 + round(float(second or 0) * 1_000_000)
        times.append(day * SPAN["day"] + clock)
    return times


@pytest.mark.parametrize("bucket", BUCKETS)
@settings(max_examples=60, deadline=None)
@given(
    times=st.lists(
        st.one_of(
            st.integers(us("1900-01-01"), us("2200-01-01")),
            st.integers(us("2150-01-31"), us("2150-02-02")),
            st.integers(0, 4000).map(lambda minute: us("2150-01-31") + minute * 60_000_000),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_headers_tell_the_time_of_every_bucket(bucket: str, times: list[int]) -> None:
    time_K = np.unique(np.array(times) // SPAN[bucket] * SPAN[bucket])
    headers, which_K = times_since(time_K, np.append(UNKNOWN, time_K[:-1]), bucket)
    written = [headers[i] for i in which_K]
    assert read_times(written, int(time_K[0]), bucket) == time_K.tolist()
    for header in written:
        assert lean_head(clean(header)) != clean(header)  # no line from data begins like it


def test_headers_are_as_short_as_they_can_be() -> None:
    times = ["2150-01-31 07:10", "2150-01-31 07:10:05", "2150-01-31 09:00", "2150-02-03 06:59:59.5"]
    time_K = np.array([us(t) for t in times])
    written = {}
    for bucket in BUCKETS:
        starts = np.unique(time_K // SPAN[bucket] * SPAN[bucket])
        headers, which = times_since(starts, np.append(UNKNOWN, starts[:-1]), bucket)
        written[bucket] = [headers[i].rstrip("\n") for i in which]
    assert written == {
        "day": ["+0", "+3"],
        "hour": ["@07", "@09", "+3 06"],
        "moment": ["@07:10", ":10:05", "@09:00", "+3 06:59:59.5"],
    }


def structure_of(text: str) -> tuple[list[str], list[str], list[str], list[str]]:
    """Headers, ages, tags and other lines of a lean text with plain-text delimiters."""
    lines = text.splitlines(keepends=True)
    tags = [x for x in lines if x.rstrip("\n") in TAGS]
    headers = [x for x in lines if x[0] in "+@:"]
    ages = [x for x in lines if re.match(r"Age \d", x)]
    rest = [x for x in lines if x not in tags and x not in headers and x not in ages]
    return headers, ages, tags, rest


@settings(max_examples=150, deadline=None)
@given(events=subjects(), bucket=st.sampled_from(BUCKETS))
def test_whatever_the_data_says_the_structure_is_ours(events: list[Event], bucket: str) -> None:
    serializer = serializer_of(OURS, "text", bucket=bucket, format="text")
    (text,), (timeline,) = (f(batch_of(events)) for f in (serializer.texts, serializer.timelines))
    # to a tokenizer that normalizes, a full-width sign is the sign itself
    for form in (text, unicodedata.normalize("NFKC", text)):
        headers, ages, tags, rest = structure_of(form)
        times = timeline.bucket_time_B
        assert read_times(headers, int(times[0]), bucket) == times.tolist()
        assert ages == [a for a in [age_at(timeline.birth, int(times[0]))] if a]
        num_static = len({e[1] for e in events if e[0] is None and e[1] != BIRTH})
        assert len(rest) == len(timeline.line_start_L) + num_static
        bucket_L = np.searchsorted(timeline.bucket_end_B, timeline.line_start_L, side="right")
        slots = set(zip(bucket_L.tolist(), timeline.line_section_L.tolist(), strict=True))
        assert len(tags) == len(slots) + (num_static > 0)


def test_marks_at_the_beginning_of_a_name() -> None:
    assert [lean_head(x) for x in ("+3", "@07", ":40", "[a]", "<b", "＋3", "")] == [
        *("(3", "(07", "(40", "(a]", "(b", "(3"),
        "?",
    ]
    assert lean_head("Age") == "age" and lean_head("Age 63") == "age 63"
    assert lean_head("Ageusia") == "Ageusia" and lean_head("A+ 3") == "A+ 3"


def test_words_are_told_from_the_name_and_the_value_before_them() -> None:
    day = "2150-01-31"
    rows = {
        "LAB//B12": [(88, None), (None, "held"), (90, None)],
        "LAB//CULTURE": [(None, "no growth"), (None, "E. coli"), (1, None)],
        "LAB//GLU": [(101, "abnormal"), (99, None)],
        "LAB//X": [(None, None), (None, None), (2, "g")],
    }
    events = [
        event(f"{day} 0{hour}:00", code, *value)
        for code, values in rows.items()
        for hour, value in enumerate(values)
    ]
    (text,) = serializer_of(OURS, format="text").texts(batch_of(events))
    assert sorted(text.removeprefix("+0\n<measurements>").splitlines()) == [
        "LAB//B12: 88, held 90",
        "LAB//CULTURE: no growth, E. coli 1",
        "LAB//GLU 101 abnormal 99",
        "LAB//X x2: 2 g",
    ]


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_numbers_have_three_digits_and_the_shorter_form(value: float) -> None:
    text = number(value, LEAN)
    assert float(text) == float(f"{value:.3g}")
    assert len(text) <= len(f"{value:.3g}")
    assert number(value, PAPER) == f"{value:.4g}"


def test_forms_of_numbers() -> None:
    values = {1234: "1230", 1230000: "1.23e6", 420_000: "420000", 3.14159: "3.14", -0.0: "0"}
    values |= {0.5: "0.5", 1e-5: "1e-5", 4.2e9: "4.2e9", 999.9: "1000", 101: "101"}
    assert {v: number(v, LEAN) for v in values} == values


NAMES = ("Glucose [Blood, Chem] (mg/dL)", "Sodium [Blood] (mEq/L)", "Sodium [Urine] (mEq/L)")


def test_names_lose_what_does_not_tell_them_apart() -> None:
    short = short_names([*NAMES, "pH", "pH [Urine]", "Weight (kg)", "Weight (lb)", "[x]"])
    assert list(short.values()) == [
        *("Glucose", "Sodium [Blood]", "Sodium [Urine]", "pH", "pH [Urine]"),
        *("Weight (kg)", "Weight (lb)", "[x]"),
    ]


@given(st.sets(st.text("ab []()", min_size=1, max_size=12).map(clean).filter(bool), max_size=12))
def test_short_names_stay_apart_and_never_grow(names: set[str]) -> None:
    short = short_names(sorted(names))
    assert short.keys() == names and len(set(short.values())) == len(names)
    assert all(len(form) <= len(name) and form for name, form in short.items())


def test_names_are_compared_within_their_section() -> None:
    codes = ("LAB//a", "LAB//b", "MEDICATION//c")
    described = dict(zip(codes, ("Iron [Blood]", "Iron [Urine]", "Iron [Oral]"), strict=True))
    events = [event("2150-01-31", code) for code in codes]
    serializer = serializer_of(OURS, descriptions=described, format="text")
    (text,) = serializer.texts(batch_of(events))
    assert text == "+0\n<measurements>Iron [Blood]\nIron [Urine]\n<drugs>Iron\n"


def test_every_window_tells_the_age_at_its_start() -> None:
    birth = us("1950-06-01")
    years = range(0, 70, 5)
    events = [event(birth, BIRTH), event(None, "GENDER//F")]
    events += [event(birth + n * YEAR + 3_600_000_000, "LAB//a", n) for n in years]
    serializer = serializer_of(OURS, format="text")
    decode, preamble = serializer.encoder.tokenizer.decode, serializer.preamble
    (timeline,) = serializer.timelines(batch_of(events))
    # a bucket begins at midnight, some hours before the whole year is over
    assert decode(timeline.ids_T[: timeline.header]) == "<demographics>GENDER//F\nAge 0\n"
    spans = training_spans(timeline, 96, 96, preamble)
    assert len(spans) > 2
    for span, following in pairwise([*spans, None]):
        cut, lost = window_of(timeline, *span, 96, preamble)
        age = (int(cut.bucket_time_B[0]) - birth) // YEAR
        assert f"\nAge {age}\n" in decode(cut.ids_T[: cut.header]) and not lost
        assert following is None or following[0] == span[1]


def test_an_age_that_nobody_knows_is_not_told() -> None:
    events = [event("2150-01-31 12:00", "LAB//a")]
    born_that_day = [*events, event("2150-01-31 11:00", BIRTH)]
    for rows in (events, born_that_day, [*events, event(None, BIRTH)]):
        serializer = serializer_of(OURS, format="text")
        (timeline,) = serializer.timelines(batch_of(rows))
        assert timeline.header == 0
        assert serializer.texts(batch_of(rows)) == ["+0\n<measurements>LAB//a\n"]


def test_a_patient_who_was_only_born_has_no_text() -> None:
    serializer = serializer_of(OURS, format="text")
    alone, other = [event("2150-01-31", BIRTH)], [event("2150-02-01", "LAB//a")]
    first, second = serializer.timelines(batch_of(alone, other))
    assert (first.subject, len(first), second.subject) == (1, 0, 2) and len(second)
    assert serializer.counts["events"] == 2
