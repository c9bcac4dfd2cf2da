"""What a process that counts codes reads, and what is said of few."""

from pathlib import Path

import pytest

from smbfast.data import fitting
from smbfast.data.meds import MedsDataset
from smbfast.data.preparing import prepare
from smbfast.settings import DataSettings
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
    files = MedsDataset.open(data).splits["train"]
    whole = fitting.code_statistics(settings, MedsDataset.open(data))
    opened: list[Path] = []
    honest = MedsDataset.open

    def counting(folder: Path) -> MedsDataset:
        opened.append(folder)
        return honest(folder)

    monkeypatch.setattr(MedsDataset, "open", counting)
    parts = [fitting._count(settings, str(file)) for file in files]
    assert len(files) == len(SPLITS["train"]) > 1 and opened == [data]
    assert sum(part.num_events for part in parts) == whole.num_events


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
