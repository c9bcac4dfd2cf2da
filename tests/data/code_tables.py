"""Vocabularies of codes fitted on small tables, for the tests of the format `codes`."""

from functools import cache

from smbfast.data.codes import CodeStatistics, CodeVocabulary
from smbfast.data.codes.serializer import CodeSerializer
from smbfast.data.sections import SectionMap
from tests.data.event_tables import CODES, MINUTE, TEXTS, Event, batch_of, event

FLOOR = 5 * MINUTE


def fitted_on(events: list[Event], first_id: int = 0) -> CodeVocabulary:
    """The vocabulary of ten subjects who all have the same events."""
    statistics = CodeStatistics()
    statistics.add(batch_of(*[events] * 10))
    return CodeVocabulary.fit(statistics, SectionMap.read(), {}, {}, first_id=first_id)


@cache
def generated_vocabulary() -> CodeVocabulary:
    """Tokens of codes, bins and values for some events of the generated tables, not for all."""
    codes = ("GENDER//F", "LAB//GLU", "LAB//GLU.", "DIAGNOSIS//E11", "MEDS_DEATH", "<odd", " ")
    assert set(codes) <= set(CODES)
    return fitted_on(
        [
            *[event("2150-01-31", code) for code in codes],
            *[event("2150-01-31", "LAB//GLU", v) for v in (-3.0, 0.0, 101.0, 4.2e9) * 3],
            *[event("2150-01-31", "DIAGNOSIS//E11", None, text) for text in TEXTS],
        ]
    )


def code_serializer(gap_floor: int = FLOOR) -> CodeSerializer:
    return CodeSerializer(generated_vocabulary(), gap_floor=gap_floor)
