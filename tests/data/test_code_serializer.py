"""Events as tokens of codes: an example by hand, and a slow reference that goes event by event."""

from itertools import groupby, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smbfast.batch import UNKNOWN, Timeline
from smbfast.data.codes import GAP_EDGES, CodeVocabulary
from smbfast.data.codes.serializer import CodeSerializer
from smbfast.data.meds import BIRTH, STATIC
from smbfast.data.sections import SECTIONS
from smbfast.data.timelines import MOST_YEARS, YEAR
from tests.data.code_tables import FLOOR, code_serializer, fitted_on, generated_vocabulary
from tests.data.event_tables import (
    DAY,
    MINUTE,
    TEXTS,
    Event,
    assert_same_timeline,
    batch_of,
    event,
    nodes_of,
    one_subject,
    subjects,
    us,
    values,
)

# 50 years of 365.2425 days after 2100-05-02 03:00 end on 2150-05-02 at 06:00
PATIENT: list[Event] = [
    event(None, "RACE//x"),
    event(None, "GENDER//F"),
    event("2100-05-02 03:00", BIRTH),
    event("2150-01-31 07:10", "MEDICATION//b"),
    event("2150-01-31 07:10", "LAB//n", 7),
    event("2150-01-31 07:10", "LAB//n"),
    event("2150-01-31 07:10", "LAB//n", 1),
    event("2150-01-31 07:10", "LAB//a", None, "pos"),
    event("2150-01-31 07:10", "LAB//a", None, "neg"),
    event("2150-01-31 07:10", "DIAGNOSIS//z"),
    event("2150-01-31 07:14:59", "LAB//n", 1),
    event("2150-01-31 07:19:59", "LAB//n", 1),
    event("2150-05-02 05:59:59", "LAB//n", 7),
    event("2150-05-02 06:00", "LAB//n", 7),
    event("2160-05-02 06:00", "MEDS_DEATH"),
]
NAMES = """<begin> GENDER//F RACE//x <age 49>
DIAGNOSIS//z LAB//a = neg LAB//a = pos LAB//n < 7 LAB//n >= 7 LAB//n MEDICATION//b
LAB//n < 7
<5 minutes later> LAB//n < 7
<2 months later> LAB//n >= 7
<age 50> LAB//n >= 7
<5 years later> <age 60> MEDS_DEATH"""


@pytest.fixture(scope="module")
def vocabulary() -> CodeVocabulary:
    return fitted_on(PATIENT)


def lines_of(serializer: CodeSerializer, timeline: Timeline) -> list[list[str]]:
    """Names of tokens, a line for the header and for each bucket."""
    names = [t.name for t in serializer.vocabulary.tokens]
    first = serializer.vocabulary.first_id
    ends = [0, timeline.header, *timeline.bucket_end_B.tolist()]
    assert ends[-1] == len(timeline)
    return [[names[i - first] for i in timeline.ids_T[a:b]] for a, b in pairwise(ends)]


def test_a_patient_by_hand(vocabulary: CodeVocabulary) -> None:
    serializer = CodeSerializer(vocabulary, gap_floor=FLOOR)
    (timeline,) = serializer.timelines(batch_of(PATIENT))
    header, *moments = (" ".join(line) for line in lines_of(serializer, timeline))
    assert "\n".join([f"<begin> {header}", *moments]) == NAMES
    assert timeline.birth == us("2100-05-02 03:00")
    assert serializer.counts["events"] == len(PATIENT) and not serializer.unmapped.events
    (names,) = serializer.texts(batch_of(PATIENT))
    assert " ".join(["<begin>", *names]) == NAMES.replace("\n", " ")


def slowly(events: list[Event], vocabulary: CodeVocabulary, gap_floor: int) -> Timeline:
    """The reference: the tokens of one subject, event by event, in Python's integers."""

    def encoded(e: Event) -> tuple[int, int]:
        one = vocabulary.encode(batch_of([e]))
        return int(one.token_N[0]), int(one.section_N[0])

    def place(e: Event) -> tuple:
        _, code, value, text = e
        number = (1, 0.0) if value is None else (0, value)
        return encoded(e)[1], code, number, (0, "") if text is None else (1, text)

    timed = sorted({us(e[0]) for e in events if e[0] is not None and e[1] != BIRTH})
    born = [us(e[0]) for e in events if e[0] is not None and e[1] == BIRTH]
    birth = min((b for b in born if not timed or b <= timed[0]), default=UNKNOWN)

    def age(time: int) -> int | None:
        return None if birth == UNKNOWN else min((time - birth) // YEAR, MOST_YEARS)

    static = [e for e in events if e[0] is None and e[1] != BIRTH]
    ids = [encoded(e)[0] for e in sorted(static, key=place)]
    if timed and age(timed[0]) is not None:
        ids.append(int(vocabulary.age_ids[age(timed[0])]))
    header, ends, starts, line_times, sections = len(ids), [], [], [], []
    for before, time in zip([None, *timed], timed, strict=False):
        if before is not None:
            gap = time - before
            edges = [g for g, edge in enumerate(GAP_EDGES.tolist()) if edge <= gap]
            if edges and gap >= gap_floor:
                ids.append(int(vocabulary.gap_ids[edges[-1]]))
            if age(before) != age(time):
                ids.append(int(vocabulary.age_ids[age(time)]))
        own = [e for e in events if e[0] is not None and us(e[0]) == time and e[1] != BIRTH]
        for e in sorted(own, key=place):
            token, section = encoded(e)
            starts.append(len(ids))
            line_times.append(time)
            sections.append(section)
            ids.append(token)
        ends.append(len(ids))
    return Timeline(
        subject=1,
        ids_T=np.array(ids, np.int32),
        header=header,
        bucket_end_B=np.array(ends, np.int32),
        bucket_time_B=np.array(timed, np.int64),
        bucket_head_B=np.zeros(len(ends), np.uint16),
        line_start_L=np.array(starts, np.int32),
        line_end_L=np.array(starts, np.int32) + 1,
        line_time_L=np.array(line_times, np.int64),
        line_section_L=np.array(sections, np.uint8),
        line_code_L=np.array(ids, np.int32)[starts],
        birth=birth,
        last=timed[-1] if timed else birth,
    )


moments = st.integers(0, 3).map(lambda n: us("2150-01-31") + n * DAY)
tied_events = st.one_of(
    st.tuples(moments, st.just("LAB//GLU"), values, st.sampled_from([None, *TEXTS])),
    st.tuples(moments, st.just("DIAGNOSIS//E11"), st.none(), st.sampled_from([None, *TEXTS])),
)


@st.composite
def spread(draw: st.DrawFn) -> list[Event]:
    """A subject's events over days, months or decades, many of them at one time."""
    start, factor = us("2150-01-31"), draw(st.sampled_from([1, 60, 5000]))
    events = draw(subjects()) + draw(st.lists(tied_events, max_size=12))
    return [
        (start + (us(t) - start) * factor if us(t) > start else t, *rest) for t, *rest in events
    ]


@settings(max_examples=150, deadline=None)
@given(events=spread(), gap_floor=st.sampled_from([0, FLOOR, 40 * MINUTE, 6 * 60 * MINUTE]))
def test_tokens_are_those_of_the_slow_reference(events: list[Event], gap_floor: int) -> None:
    (timeline,) = code_serializer(gap_floor).timelines(batch_of(events))
    assert_same_timeline(timeline, slowly(events, generated_vocabulary(), gap_floor))


def test_the_reference_is_compared_on_gaps_ages_bins_and_values() -> None:
    """The generated tables reach every kind of token."""
    kinds = {t.kind for t in generated_vocabulary().tokens}
    assert kinds == {"structure", "gap", "age", "section", "code", "bin", "value"}
    vocabulary, seen = generated_vocabulary(), set()

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(events=spread())
    def collect(events: list[Event]) -> None:
        (timeline,) = code_serializer().timelines(batch_of(events))
        seen.update(vocabulary.tokens[i].kind for i in timeline.ids_T[timeline.header :])

    collect()
    assert seen == kinds - {"structure"}


@settings(max_examples=60, deadline=None)
@given(cohort=st.lists(spread(), min_size=2, max_size=4))
def test_subjects_do_not_depend_on_their_batch(cohort: list[list[Event]]) -> None:
    serializer = code_serializer()
    together = serializer.timelines(batch_of(*cohort))
    for s, timeline in enumerate(together):
        (shared_codes,) = serializer.timelines(one_subject(batch_of(*cohort), s))
        (alone,) = serializer.timelines(batch_of(cohort[s], first=s + 1))
        (turned,) = serializer.timelines(batch_of(cohort[s][::-1], first=s + 1))
        for other in (shared_codes, alone, turned):
            assert_same_timeline(other, timeline)


@settings(max_examples=60, deadline=None)
@given(events=spread())
def test_what_is_seen_at_a_time_is_a_prefix(events: list[Event]) -> None:
    serializer = code_serializer()
    (whole,) = serializer.timelines(batch_of(events))
    for time in nodes_of(events):
        seen = [e for e in events if us(e[0]) <= time]
        if not any(e[0] is not None and e[1] != BIRTH for e in seen):
            continue
        (record,) = serializer.timelines(batch_of(seen))
        num_moments = int(np.searchsorted(whole.bucket_time_B, serializer.bucket_key(time)))
        end = whole.bucket_start(num_moments)
        assert record.ids_T.tolist() == whole.ids_T[:end].tolist()
        assert (record.header, record.birth) == (whole.header, whole.birth)


def test_times_at_the_ends_of_their_range_do_not_wrap() -> None:
    last = int(np.iinfo(np.int64).max)
    times = [STATIC + 1, STATIC + 2 + 6 * MINUTE, 0, last - 1]
    events = [event(times[0], BIRTH), *[event(t, "LAB//GLU") for t in times]]
    serializer = code_serializer()
    (timeline,) = serializer.timelines(batch_of(events))
    header, *moments = lines_of(serializer, timeline)
    ancient, long = "<age 120>", "<5 years later>"
    assert header == ["<age 0>"]
    assert moments == [
        ["LAB//GLU"],
        ["<5 minutes later>", "LAB//GLU"],
        [long, ancient, "LAB//GLU"],
        [long, "LAB//GLU"],
    ]
    key_N = serializer.bucket_key(np.array([*times, last], np.int64))
    assert np.searchsorted(timeline.bucket_time_B, key_N).tolist() == [1, 2, 3, 4, 4]
    assert_same_timeline(timeline, slowly(events, generated_vocabulary(), FLOOR))


def test_gaps_at_their_edges() -> None:
    edges = GAP_EDGES.tolist()
    for floor in (0, FLOOR, edges[3]):
        serializer = code_serializer(floor)
        for gap in [1, *edges, *(e - 1 for e in edges), *(e + 1 for e in edges)]:
            events = [event(0, "LAB//GLU"), event(gap, "LAB//GLU")]
            (timeline,) = serializer.timelines(batch_of(events))
            due = max((g for g, e in enumerate(edges) if e <= gap and gap >= floor), default=None)
            expected = [] if due is None else [serializer.vocabulary.gap_ids[due]]
            assert timeline.ids_T[1:-1].tolist() == expected


def test_births() -> None:
    late = [event("2150-01-31", "LAB//GLU"), event("2150-02-01", BIRTH)]
    early = [event("2150-01-31", "LAB//GLU"), event("2150-01-31", BIRTH)]
    untimed = [event("2150-01-31", "LAB//GLU"), event(None, BIRTH)]
    alone = [event("2150-01-31", BIRTH)]
    twice = [event("2100-01-31", BIRTH), event("2101-01-31", BIRTH), early[0]]
    static = [event(None, "GENDER//F"), event("2100-01-31", BIRTH)]
    serializer = code_serializer()
    cohort = serializer.timelines(batch_of(late, early, untimed, alone, twice, twice, static))
    assert [t.subject for t in cohort] == [1, 2, 3, 4, 5, 6, 7]
    assert [lines_of(serializer, t) for t in cohort] == [
        [[], ["LAB//GLU"]],
        [["<age 0>"], ["LAB//GLU"]],
        [[], ["LAB//GLU"]],
        [[]],
        [["<age 49>"], ["LAB//GLU"]],  # three hours before 50 years of 365.2425 days
        [["<age 49>"], ["LAB//GLU"]],
        [["GENDER//F"]],
    ]
    times = [UNKNOWN, us("2150-01-31"), UNKNOWN, us("2150-01-31"), *[us("2100-01-31")] * 3]
    assert [t.birth for t in cohort] == times
    assert serializer.counts["late_births"] == 1 and serializer.counts["events"] == 14


def test_subjects_without_a_timed_event_have_no_bucket() -> None:
    static, one = [event(None, "GENDER//F")], [event("2150-01-31", "LAB//GLU")]
    serializer = code_serializer()
    first, second, third = serializer.timelines(batch_of(static, one, static))
    assert lines_of(serializer, first) == lines_of(serializer, third) == [["GENDER//F"]]
    assert lines_of(serializer, second) == [[], ["LAB//GLU"]]
    assert not len(first.line_start_L) and not len(third.bucket_end_B)
    assert [len(t) for t in serializer.timelines(batch_of(static))] == [1]


def test_only_the_sections_of_a_moment_are_grouped() -> None:
    """Strict time order: a later moment's conditions do not come before this one's drugs."""
    names = [e[1] for e in PATIENT]
    assert len(names) > len(set(names))
    serializer = code_serializer()
    sections = [SECTIONS[s] for s in serializer.timelines(batch_of(PATIENT))[0].line_section_L]
    assert [s for s, _ in groupby(sections)] == [
        *("conditions", "measurements", "drugs", "measurements", "death"),
    ]


def test_codes_that_no_rule_maps_are_counted_by_family() -> None:
    events = [event("2150-01-31", "ODD//a"), event(None, "ODD//b"), event("2150-01-31", "LAB//x")]
    serializer = code_serializer()
    serializer.timelines(batch_of(events, events))
    assert serializer.unmapped.events == {"ODD": 4}


def test_a_fingerprint_changes_with_whatever_changes_tokens() -> None:
    vocabulary, events = generated_vocabulary(), [event("2150-01-31", "LAB//GLU")]
    other = fitted_on(events)
    made = [
        CodeSerializer(vocabulary, gap_floor=FLOOR),
        CodeSerializer(vocabulary, gap_floor=FLOOR + 1),
        CodeSerializer(other, gap_floor=FLOOR),
        CodeSerializer(fitted_on(events, first_id=5), gap_floor=FLOOR),
        CodeSerializer(CodeVocabulary(other.content, {"x": ["LAB//GLU"]}), gap_floor=FLOOR),
    ]
    assert len({s.fingerprint() for s in made}) == len(made)
    assert made[2].fingerprint() == CodeSerializer(fitted_on(events), gap_floor=FLOOR).fingerprint()


def test_a_negative_floor_is_refused() -> None:
    with pytest.raises(ValueError, match="`gap_floor` must be 0 microseconds or more, got -1"):
        code_serializer(-1)


def test_ids_begin_where_the_vocabulary_does() -> None:
    events = [event(None, "GENDER//F"), event("2140-01-31", BIRTH), *PATIENT[3:]]
    own, added = (CodeSerializer(fitted_on(events, first_id=n), gap_floor=FLOOR) for n in (0, 1000))
    (a,), (b,) = own.timelines(batch_of(events)), added.timelines(batch_of(events))
    assert (a.ids_T + 1000).tolist() == b.ids_T.tolist() and a.ids_T.min() >= 0
    assert own.texts(batch_of(events)) == added.texts(batch_of(events))
    assert added.preamble.begin == own.preamble.begin + 1000
    assert added.preamble.age(0, DAY).tolist() == (own.preamble.age(0, DAY) + 1000).tolist()
