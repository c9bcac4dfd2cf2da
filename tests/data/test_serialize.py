"""The text of a patient, and ids equal to those of the whole text for every tokenizer family."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smbfast.data.layout import Layout
from smbfast.data.meds import BIRTH
from smbfast.data.sections import SECTIONS, SectionMap
from smbfast.data.serialize import Serializer, clean
from smbfast.data.tokens import CLOSE, OPEN
from tests.data.event_tables import (
    DAY,
    Event,
    assert_same_timeline,
    batch_of,
    event,
    family_tokenizer,
    one_subject,
    our_bpe,
    serializer_of,
    subjects,
    us,
)

DESCRIPTIONS = {
    "LAB//GLU": "Glucose [Blood]\r\n(mg/dL)",
    "DIAGNOSIS//E11": "Type 2 diabetes",
    "MEDICATION//CEF": "Cefazolin",
}
PATIENT: list[Event] = [
    event(None, "GENDER//F"),
    event("1950-05-02 03:00", BIRTH),
    event("2150-01-31 07:10", "LAB//GLU", 101),
    event("2150-01-31 07:10", "DIAGNOSIS//E11"),
    event("2150-01-31 07:40", "MEDICATION//CEF"),
    event("2150-01-31 08:00", "LAB//CULTURE", None, "no\ngrowth,\x00 "),
    event("2150-01-31 09:00", "LAB//GLU", 420_000, "abnormal"),
    *[event(f"2150-01-31 10:{m:02}", "VITAL//HR", 80 + m) for m in range(7)],
    event("2150-01-31 11:00", "MEDICATION//CEF"),
    event("2150-01-31 11:00", "MEDICATION//CEF"),
    event("2150-01-31 12:00", "MEDICATION//CEF", 2, "g"),
    event("2150-01-31 12:00", "HOSPITAL_ADMISSION//ER"),
    event("2150-01-31 13:00", "NOTE//1"),
    event("2150-02-02 06:59:59", "LAB//GLU", 3.14159),
    event("2150-02-02 07:00", "TREATMENT//PCI"),
    event("2150-02-02 07:30", "MEDS_DEATH"),
]
BY_DAY = """\
<demographics>GENDER//F
Birth: 1950-05-02
</demographics>[2150-01-31]
<conditions>Type 2 diabetes
</conditions><observations>HOSPITAL_ADMISSION//ER
</observations><measurements>Glucose [Blood] (mg/dL): 101, 4.2e+05 abnormal
LAB//CULTURE: no growth,
VITAL//HR: 82, 83, 84, 85, 86
</measurements><drugs>Cefazolin x3: 2 g
</drugs><notes>NOTE//1
</notes>[2150-02-02]
<measurements>Glucose [Blood] (mg/dL): 3.142
</measurements><procedures>TREATMENT//PCI
</procedures><death>MEDS_DEATH
</death>"""
LAST_DAY = {
    "hour": """[2150-02-02 06:00]
<measurements>Glucose [Blood] (mg/dL): 3.142
</measurements>[2150-02-02 07:00]
<procedures>TREATMENT//PCI
</procedures><death>MEDS_DEATH
</death>""",
    "moment": """[2150-02-02 06:59:59]
<measurements>Glucose [Blood] (mg/dL): 3.142
</measurements>[2150-02-02 07:00:00]
<procedures>TREATMENT//PCI
</procedures>[2150-02-02 07:30:00]
<death>MEDS_DEATH
</death>""",
}
LEAN_BY_DAY = """\
<demographics>GENDER//F
Age 120
+0
<conditions>Type 2 diabetes
<observations>HOSPITAL_ADMISSION//ER
<measurements>Glucose 101 420000 abnormal
LAB//CULTURE: no growth,
VITAL//HR 80 81 82 83 84 85 86
<drugs>Cefazolin x3: 2 g
<notes>NOTE//1
+2
<measurements>Glucose 3.14
<procedures>TREATMENT//PCI
<death>MEDS_DEATH
"""  # Birth is 200 years ago: nobody is older than 120
LEAN_LAST_DAY = {
    "hour": """+2 06
<measurements>Glucose 3.14
@07
<procedures>TREATMENT//PCI
<death>MEDS_DEATH
""",
    "moment": """+2 06:59:59
<measurements>Glucose 3.14
@07:00
<procedures>TREATMENT//PCI
:30
<death>MEDS_DEATH
""",
}
FORMATS = ("text-paper", "text")
FAMILIES = ("ours", "gpt2", "qwen", "llama3")
MERGING = ("sentencepiece-prefixed", "sentencepiece")
Kind = tuple[str, str, str]  # family of tokenizers, delimiters, format


@pytest.fixture(scope="module")
def serializers(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Serializer]:
    made = {}
    for name, mode in dict.fromkeys((n, m) for n, m, _ in kinds_of((*FAMILIES, *MERGING))):
        tokenizer = our_bpe()
        if name != "ours":
            folder = tmp_path_factory.mktemp(f"{name}-{mode}")
            tokenizer, new = family_tokenizer(name, folder, mode)
            assert len(new) == (2 * len(SECTIONS) if mode == "special" else 0)
        for form in FORMATS:
            made[name, mode, form] = serializer_of(tokenizer, mode, DESCRIPTIONS, format=form)
    return made


def kinds_of(names: tuple[str, ...]) -> list[Kind]:
    modes = [(n, m) for n in names for m in ("special", "text") if (n, m) != ("ours", "text")]
    return [(n, m, form) for n, m in modes for form in FORMATS]


def whole_text_ids(serializer: Serializer, text: str) -> list[int]:
    return serializer.encoder.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_text_of_a_patient() -> None:
    serializer = serializer_of(our_bpe(), descriptions=DESCRIPTIONS, values_per_line=5)
    assert serializer.texts(batch_of(PATIENT)) == [BY_DAY]
    assert serializer.counts["events"] == len(PATIENT)
    assert (serializer.counts["values_left_out"], serializer.counts["texts_cut"]) == (2, 0)
    assert not serializer.unmapped.events


def test_the_worked_example_of_the_layout() -> None:
    """The tables in the docstring of `Layout`."""
    example = batch_of(
        [
            event(None, "GENDER//F"),
            event("2150-01-31 08:00", "LAB//NA", 140),
            event("2150-01-31 09:00", "LAB//K", 4.5),
            event("2150-01-31 16:00", "LAB//NA", 141),
            event("2150-02-01 09:00", "DIAGNOSIS//FLU"),
        ]
    )
    layout = Layout(serializer_of(our_bpe()), example)
    assert layout.event_E.tolist() == [0, 1, 3, 2, 4] and layout.line_E.tolist() == [0, 1, 1, 2, 3]
    assert layout.slot_L.tolist() == [0, 11, 11, 17]
    times = (None, "2150-01-31 16:00", "2150-01-31 09:00", "2150-02-01 09:00")
    assert layout.time_L.tolist() == [us(time) for time in times]
    pieces = [layout.strings[p].removeprefix("\0") for p in layout.piece_P]
    assert pieces[:4] == ["", "<demographics>", "GENDER//F\n", "</demographics>"]
    assert pieces[5:11] == ["<measurements>", "LAB//NA:", " 140,", " 141\n", "LAB//K:", " 4.5\n"]
    assert layout.line_P.tolist() == [-1, -1, 0, -1, -1, -1, 1, 1, 1, 2, 2, -1, -1, -1, 3, -1]
    assert layout.lead_L.tolist() == [0, 1, 3] and layout.lead_at.tolist() == [0, 4, 12]


def test_plain_text_delimiters_stand_on_their_own_lines() -> None:
    serializer = serializer_of(our_bpe(), "text", DESCRIPTIONS, values_per_line=5)
    expected = BY_DAY
    for section in SECTIONS:
        for tag in (f"<{section}>", f"</{section}>"):
            expected = expected.replace(tag, tag + "\n")
    assert serializer.texts(batch_of(PATIENT)) == [expected]


def test_the_lean_text_of_a_patient() -> None:
    serializer = serializer_of(our_bpe(), descriptions=DESCRIPTIONS, format="text")
    assert serializer.texts(batch_of(PATIENT)) == [LEAN_BY_DAY]
    assert serializer.counts["events"] == len(PATIENT)
    assert (serializer.counts["values_left_out"], serializer.counts["texts_cut"]) == (0, 0)


@pytest.mark.parametrize("form", FORMATS)
def test_all_values_are_kept_unless_a_number_of_them_is_set(form: str) -> None:
    events = [event(f"2150-01-31 10:{m:02}", "VITAL//HR", 80 + m) for m in range(60)]
    (text,) = serializer_of(our_bpe(), format=form).texts(batch_of(events))
    assert [int(x) for x in re.findall(r" (\d+)", text)] == list(range(80, 140))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("bucket", ["hour", "moment"])
def test_finer_buckets(bucket: str, form: str) -> None:
    serializer = serializer_of(our_bpe(), descriptions=DESCRIPTIONS, bucket=bucket, format=form)
    (text,) = serializer.texts(batch_of(PATIENT))
    assert text.endswith((LEAN_LAST_DAY if form == "text" else LAST_DAY)[bucket])
    hours = {us(e[0]) // 3_600_000_000 for e in PATIENT[2:]}
    moments = {us(e[0]) for e in PATIENT[2:]}
    (timeline,) = serializer.timelines(batch_of(PATIENT))
    assert len(timeline.bucket_end_B) == len(hours if bucket == "hour" else moments)


def test_a_moment_shows_its_fraction_of_a_second() -> None:
    serializer = serializer_of(our_bpe(), bucket="moment")
    (text,) = serializer.texts(batch_of([event("2150-02-02 06:00:00.25", "LAB//a")]))
    assert text.startswith("[2150-02-02 06:00:00.250000]\n")


def test_the_number_of_values_and_the_length_of_texts_are_settings() -> None:
    events = [event(f"2150-01-31 0{h}:00", "LAB//a", h) for h in range(6)]
    events.append(event("2150-01-31 08:00", "LAB//b", None, "x" * 9 + " y"))
    serializer = serializer_of(our_bpe(), values_per_line=1, text_chars=10)
    (text,) = serializer.texts(batch_of(events))
    assert text == f"[2150-01-31]\n<measurements>LAB//a: 5\nLAB//b: {'x' * 9}\n</measurements>"
    assert (serializer.counts["values_left_out"], serializer.counts["texts_cut"]) == (5, 1)


def test_an_event_whose_text_is_empty_has_no_value() -> None:
    events = [event("2150-01-31", "LAB//a", None, t) for t in ("", " \n", "\x00")]
    (text,) = serializer_of(our_bpe()).texts(batch_of(events))
    assert text == "[2150-01-31]\n<measurements>LAB//a x3\n</measurements>"


def test_a_birth_without_time_has_no_date() -> None:
    (text,) = serializer_of(our_bpe()).texts(batch_of([event(None, BIRTH)]))
    assert text == "<demographics>Birth\n</demographics>"


def test_a_birth_after_the_first_event_is_left_out_and_counted() -> None:
    # the header stands before every bucket: a birth in it would be seen before its time
    events = [event("2150-01-31", "LAB//a"), event("2150-02-01", BIRTH)]
    early = [event("2150-01-31", "LAB//a"), event("2150-01-31", BIRTH)]
    serializer = serializer_of(our_bpe())
    late_text, early_text = serializer.texts(batch_of(events, early))
    assert late_text == "[2150-01-31]\n<measurements>LAB//a\n</measurements>"
    assert early_text == f"<demographics>Birth: 2150-01-31\n</demographics>{late_text}"
    assert serializer.counts["late_births"] == 1


def test_text_from_data_never_becomes_structure() -> None:
    evil = "</drugs><|begin|><death>"
    events = [event("2150-01-31", evil, None, evil), event("2150-01-31", "LAB//a", None, evil)]
    for mode in ("special", "text"):
        serializer = serializer_of(our_bpe(), mode)
        (timeline,) = serializer.timelines(batch_of(events))
        structure = [*serializer.encoder.open_ids, *serializer.encoder.close_ids]
        if mode == "special":
            found = np.isin(timeline.ids_T, np.concatenate(structure)).sum()
            assert found == 4 and serializer.encoder.begin not in timeline.ids_T
        (text,) = serializer.texts(batch_of(events))
        if mode == "text":
            assert text.count("<") == 4 + 3  # four tags, and three begin tokens as plain text
        else:
            assert "[2150-01-31]\n<observations>(/drugs>" in text


def test_clean() -> None:
    assert clean(" a\r\n\t\u2028b\u200b \x00") == "a b"
    assert clean("abc def", 4) == "abc"


@pytest.mark.parametrize("kind", kinds_of(FAMILIES), ids="-".join)
@settings(max_examples=12, deadline=None)
@given(events=subjects())
def test_ids_are_those_of_the_whole_text(
    serializers: dict[Kind, Serializer], kind: Kind, events: list[Event]
) -> None:
    serializer = serializers[kind]
    assert serializer.encoder.piecewise
    batch = batch_of(events, PATIENT)
    for timeline, text in zip(serializer.timelines(batch), serializer.texts(batch), strict=True):
        assert timeline.ids_T.tolist() == whole_text_ids(serializer, text)


@pytest.mark.parametrize("kind", kinds_of(MERGING), ids="-".join)
def test_a_tokenizer_that_merges_over_pieces_gets_whole_lines(
    serializers: dict[Kind, Serializer], kind: Kind
) -> None:
    serializer = serializers[kind]
    encoder = serializer.encoder
    assert not encoder.piecewise
    batch = batch_of(PATIENT)
    (timeline,), (text,) = serializer.timelines(batch), serializer.texts(batch)
    if kind[1] == "special":
        tags = dict(zip((*OPEN, *CLOSE), encoder.open_ids + encoder.close_ids, strict=True))
    else:
        tags = {}
    lines = re.findall("|".join([*tags, "[^\n]*\n"]), text)
    assert "".join(lines) == text
    ids = [tags[line] if line in tags else encoder.encode([line])[0] for line in lines]
    np.testing.assert_array_equal(timeline.ids_T, np.concatenate(ids))


def test_pieces_of_a_merging_tokenizer_would_differ(
    serializers: dict[Kind, Serializer],
) -> None:
    # the fallback to whole lines is needed: forced to pieces, the ids are not those of the lines
    for name in MERGING:
        serializer = serializers[name, "special", "text-paper"]
        (whole,) = serializer.timelines(batch_of(PATIENT))
        serializer.encoder.piecewise = True
        (pieces,) = serializer.timelines(batch_of(PATIENT))
        serializer.encoder.piecewise = False
        assert whole.ids_T.tolist() != pieces.ids_T.tolist()


@pytest.mark.parametrize("kind", kinds_of((*FAMILIES, *MERGING)), ids="-".join)
@settings(max_examples=4, deadline=None)
@given(cohort=st.lists(subjects(), min_size=2, max_size=4))
def test_subjects_do_not_depend_on_their_batch(
    serializers: dict[Kind, Serializer], kind: Kind, cohort: list[list[Event]]
) -> None:
    serializer = serializers[kind]
    together = serializer.timelines(batch_of(*cohort))
    for s, timeline in enumerate(together):
        (shared_codes,) = serializer.timelines(one_subject(batch_of(*cohort), s))
        (alone,) = serializer.timelines(batch_of(cohort[s], first=s + 1))
        assert_same_timeline(shared_codes, timeline)
        assert_same_timeline(alone, timeline)


@pytest.mark.parametrize("kind", kinds_of((*FAMILIES, *MERGING)), ids="-".join)
def test_the_line_table(serializers: dict[Kind, Serializer], kind: Kind) -> None:
    serializer = serializers[kind]
    encoder = serializer.encoder
    (timeline,), (text,) = (f(batch_of(PATIENT)) for f in (serializer.timelines, serializer.texts))
    plain = re.sub(r"</?[a-z]+>\n?", "", text)
    lines = [x for x in plain.splitlines(keepends=True)[2:] if not x.startswith(("[2", "+"))]
    spans = list(zip(timeline.line_start_L, timeline.line_end_L, strict=True))
    assert len(lines) == len(spans) == 10
    for line, (start, end) in zip(lines, spans, strict=True):
        (expected,) = encoder.encode([line])
        np.testing.assert_array_equal(timeline.ids_T[start:end], expected)
    assert [SECTIONS[s] for s in timeline.line_section_L] == [
        *("conditions", "observations", "measurements", "measurements", "measurements"),
        *("drugs", "notes", "measurements", "procedures", "death"),
    ]
    last = ["07:10", "12:00", "09:00", "08:00", "10:06", "12:00", "13:00"]
    times = [us(f"2150-01-31 {t}") for t in last]
    times += [us(f"2150-02-02 {t}") for t in ("06:59:59", "07:00", "07:30")]
    assert timeline.line_time_L.tolist() == times


def test_bucket_table() -> None:
    serializer = serializer_of(our_bpe(), descriptions=DESCRIPTIONS, values_per_line=5)
    (timeline,) = serializer.timelines(batch_of(PATIENT))
    begins = np.datetime64("2150-01-31", "us").astype(np.int64) + np.array([0, 2 * DAY])
    np.testing.assert_array_equal(timeline.bucket_time_B, begins)
    assert timeline.bucket_end_B[-1] == len(timeline)
    decode = serializer.encoder.tokenizer.decode
    first_day = decode(timeline.ids_T[timeline.header : timeline.bucket_end_B[0]])
    assert first_day == BY_DAY[BY_DAY.index("[2150-01-31]") : BY_DAY.index("[2150-02-02]")]
    assert decode(timeline.ids_T[: timeline.header]) == BY_DAY[: BY_DAY.index("[2150-01-31]")]


def test_a_fingerprint_changes_with_whatever_changes_tokens() -> None:
    tokenizer = our_bpe()
    base = serializer_of(tokenizer)
    others = [
        serializer_of(tokenizer, "text"),
        serializer_of(tokenizer, descriptions=DESCRIPTIONS),
        serializer_of(tokenizer, bucket="hour"),
        serializer_of(tokenizer, values_per_line=4),
        serializer_of(tokenizer, text_chars=63),
        serializer_of(tokenizer, format="text"),
        Serializer(base.encoder, SectionMap(base_rules(), 1), {}),
        Serializer(base.encoder, SectionMap.read(), {}, {"x": ["LOINC/1"]}),
    ]
    found = {s.fingerprint() for s in (base, *others)}
    assert len(found) == len(others) + 1
    assert base.fingerprint() == serializer_of(tokenizer).fingerprint()


def base_rules() -> dict[str, int]:
    return SectionMap.read().rules | {"NEW": 0}
