"""Codes without a section rule: told by family only where ten subjects stand behind it."""

from pathlib import Path

import pytest

from smbfast.data.preparing import prepare
from smbfast.data.unmapped import RARE, Unmapped
from smbfast.settings import DataSettings
from tests.data.code_tables import code_serializer
from tests.data.event_tables import Event, batch_of, event, our_bpe, serializer_of
from tests.factory import at, write_meds


def subject(*codes: str) -> list[Event]:
    return [event("2150-01-31", code) for code in codes]


@pytest.mark.parametrize("form", ["codes", "text"])
def test_subjects_are_counted_once_and_events_each(form: str) -> None:
    """Twelve subjects in two batches; `one` is in many events of a single one."""
    serializer = code_serializer() if form == "codes" else serializer_of(our_bpe(), format=form)
    everyone = [subject("all//a", "all//b", "LAB//x") for _ in range(11)]
    serializer.timelines(batch_of(*everyone[:6]))
    serializer.timelines(batch_of(*everyone[6:], subject(*["one//a"] * 50), first=7))
    assert serializer.unmapped.events == {"all": 22, "one": 50}
    subjects = serializer.unmapped.subjects
    assert len(subjects["all"]) >= 10 and subjects["one"] == {12}
    assert serializer.unmapped.shown() == {"all": 22}


def test_records_of_files_are_added() -> None:
    """Nine and nine subjects of one family are eighteen; those of `rare` are the same nine."""
    total = Unmapped()
    for first in (1, 10):
        serializer = code_serializer()
        batch = batch_of(*[subject("both//a", f"r{first}//a")] * 9, first=first)
        serializer.timelines(batch)
        total.update(serializer.unmapped.record())
    assert total.events == {"both": 18, "r1": 9, "r10": 9}
    # neither of the two has ten subjects, but both together have
    assert total.shown() == {"both": 18, RARE: 18}
    alone = Unmapped().update({"a": [900, [1, 2, 3]], "b": [8, [3, 4]]})
    assert alone.shown() == {}


@pytest.mark.parametrize("form", ["codes", "text-paper"])
def test_a_family_of_one_subject_is_in_no_record(tmp_path: Path, form: str) -> None:
    """However many events it has."""
    rows = [(s, at(day), "shared//x", None, None) for s in range(110, 130) for day in (1, 2)]
    rows += [(140, at(day), f"zyxomma//{day}", None, None) for day in range(60)]
    data = write_meds(tmp_path / "meds", {"train": rows})
    settings = DataSettings(path=str(data), format=form, vocab_size=500, workers=1)
    made = prepare(settings, tmp_path / "out", None, ("train",))
    assert made.record["unmapped"] == {"shared": 40}
    assert "zyxomma" not in (made.folder / "prepare.json").read_text()
