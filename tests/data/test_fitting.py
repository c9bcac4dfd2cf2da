"""What a process that counts codes reads, and what is said of few."""

import json
from pathlib import Path
from typing import Any

import pytest

from smbfast.data import fitting
from smbfast.data.codes.tokenizer import code_tokenizer
from smbfast.data.meds import MedsDataset
from smbfast.data.preparing import prepare
from smbfast.data.tokens import save_tokenizer
from smbfast.settings import DataSettings
from tests.data.code_tables import fitted_on
from tests.data.event_tables import event
from tests.factory import SPLITS, at, split_rows, subject_rows, write_meds, write_table


def test_a_process_opens_a_dataset_once_for_all_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening reads the subjects of every file: once a file, that would grow with their square."""
    first, *others = SPLITS["train"]
    data = write_meds(tmp_path / "meds", {"train": subject_rows(first)})
    for number, subject in enumerate(others, start=1):
        write_table(data / "data" / "train" / f"{number}.parquet", subject_rows(subject))
    settings = DataSettings(path=str(data), format="codes", workers=1)
    dataset = MedsDataset.open(data)
    files = fitting.stamped(dataset, dataset.splits["train"])
    whole = fitting.code_statistics(settings, dataset)
    opened: list[Path] = []
    honest = MedsDataset.open

    def counting(folder: Path, **options: Any) -> MedsDataset:
        opened.append(folder)
        return honest(folder, **options)

    monkeypatch.setattr(MedsDataset, "open", counting)
    parts = [tmp_path / "parts" / f"{number}.counts" for number in range(len(files))]
    for file, part in zip(files, parts, strict=True):
        fitting.count_part(settings, (data, None, None), [file], part)
    assert len(files) == len(SPLITS["train"]) > 1 and opened == [data]
    joined = fitting.code_statistics(settings, dataset, parts)
    assert joined.num_events == whole.num_events and joined.code_ids == whole.code_ids


def trained_on_codes(folder: Path, gap_floor: int) -> str:
    """As much of a finished model as preparing its next data reads."""
    folder.mkdir()
    vocabulary = fitted_on([event("2150-01-31", "LAB//x")])
    vocabulary.save(folder / "codes.json")
    save_tokenizer(code_tokenizer(vocabulary), folder)
    record = {"options": {"gap_floor": gap_floor}}
    (folder / "smbfast.json").write_text(json.dumps(record))
    return str(folder)


def test_gaps_go_on_as_a_backbone_was_trained(tmp_path: Path) -> None:
    model = trained_on_codes(tmp_path / "model", 360)
    settings = DataSettings(path=str(write_meds(tmp_path / "meds")), workers=1)
    assert settings.decided(model).gap_floor == 360
    made = prepare(settings, tmp_path / "out", model, ("train",))
    assert made.options["gap_floor"] == 360
    chosen = settings.model_copy(update={"gap_floor": 60})
    assert chosen.decided(model).gap_floor == 60
    assert settings.decided(None).gap_floor == 5
    (tmp_path / "model" / "smbfast.json").unlink()  # as in an export
    assert settings.decided(model).gap_floor == 5


def test_other_section_rules_than_a_backbone_s_are_refused(tmp_path: Path) -> None:
    model = trained_on_codes(tmp_path / "model", 5)
    rules = tmp_path / "sections.toml"
    rules.write_text('fallback = "notes"\n[sections]\ndrugs = ["LAB"]\n')
    data = write_meds(tmp_path / "meds")
    settings = DataSettings(path=str(data), sections=str(rules), workers=1)
    with pytest.raises(ValueError, match=r"data\.sections must be the rules"):
        prepare(settings, tmp_path / "out", model, ("train",))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["codes", "text"])
def test_counts_of_few_events_are_not_told(tmp_path: Path, form: str) -> None:
    rows = [*split_rows("train"), (50, at(1), "LAB//x", float("nan"), "w" * 90)]
    rows += [(50, at(2), "MEDS_BIRTH", None, None), (50, at(2), "LAB//x", 3.0, None)]
    data = write_meds(tmp_path / "meds", {"train": rows})
    settings = DataSettings(path=str(data), format=form, bucket="day", vocab_size=500, workers=1)
    made = prepare(settings, tmp_path / "out", None, ("train",))
    told = made.left_out()
    assert made.counts["nonfinite_values"] == made.counts["late_births"] == 1
    assert "NaN or infinite <=10; births after a subject's first event <=10" in told
    assert "in no token <=10" in told if form == "codes" else "texts cut <=10" in told
