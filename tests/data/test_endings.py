"""When a record ends, and which event is terminal; both formats say the same."""

import pytest

from smbfast.batch import UNKNOWN
from smbfast.data.codes.serializer import CodeSerializer
from smbfast.data.endings import are_terminal, endings
from tests.data.code_tables import generated_vocabulary
from tests.data.event_tables import batch_of, event, our_bpe, serializer_of, us

RULES = ("MEDS_DEATH", "Hospital_Discharge//Died")


@pytest.mark.parametrize(
    "code, is_terminal",
    [
        ("MEDS_DEATH", True),
        ("meds_death", True),
        ("MEDS_DEATH//cancer", True),
        ("MEDS_DEATHS", False),
        ("HOSPITAL_DISCHARGE//DIED", True),
        ("HOSPITAL_DISCHARGE//DIED/ICU", True),
        ("HOSPITAL_DISCHARGE//DIEDX", False),
        ("HOSPITAL_DISCHARGE", False),
        ("X//MEDS_DEATH", False),
    ],
)
def test_a_code_matches_whole_or_up_to_a_boundary(code: str, is_terminal: bool) -> None:
    assert are_terminal([code, "LAB"], RULES).tolist() == [is_terminal, False]
    assert not are_terminal([code], ["", "LAB"]).any()


SUBJECTS = [
    # an event after the death, a second death, and one without a time, which is no end
    [
        event(None, "MEDS_DEATH"),
        event("2150-01-31", "LAB//a", 1),
        event("2150-02-01 10:00", "MEDS_DEATH"),
        event("2150-02-03", "MEDS_DEATH//again"),
        event("2150-02-04 09:30", "LAB//a", 1),
    ],
    [event(None, "GENDER//F"), event("2149-01-31", "LAB//a", 1), event("2150-01-31", "LAB//b")],
    [event(None, "GENDER//F")],
    [event("2150-01-31", "HOSPITAL_DISCHARGE//DIED")],
]
LAST = [us("2150-02-04 09:30"), us("2150-01-31"), UNKNOWN, us("2150-01-31")]
TERMINAL = [us("2150-02-01 10:00"), UNKNOWN, UNKNOWN, us("2150-01-31")]


def test_the_last_event_and_the_first_terminal_one() -> None:
    last_S, terminal_S = endings(batch_of(*SUBJECTS), RULES)
    assert last_S.tolist() == LAST and terminal_S.tolist() == TERMINAL


def test_timelines_of_both_formats_carry_them_and_the_codes_of_their_lines() -> None:
    text = serializer_of(our_bpe(), terminal=RULES)
    codes = CodeSerializer(generated_vocabulary(), gap_floor=0, terminal=RULES)
    for serializer in (text, codes):
        made = serializer.timelines(batch_of(*SUBJECTS))
        assert [(t.last, t.terminal) for t in made] == list(zip(LAST, TERMINAL, strict=True))
        assert all(t.line_code_L.shape == t.line_start_L.shape for t in made)
    for timeline in codes.timelines(batch_of(*SUBJECTS)):
        assert (timeline.line_code_L == timeline.ids_T[timeline.line_start_L]).all()
    made, names = text.timelines(batch_of(*SUBJECTS)), list(text.codes)
    lines = [[names[c] for c in t.line_code_L.tolist()] for t in made]
    deaths = ["MEDS_DEATH", "MEDS_DEATH//again"]
    left = ["HOSPITAL_DISCHARGE//DIED"]
    assert lines == [["LAB//a", *deaths, "LAB//a"], ["LAB//a", "LAB//b"], [], left]
