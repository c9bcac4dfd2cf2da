"""The simulated dataset on disk: valid MEDS, the same bytes, the same patient in every cohort."""

import json
from itertools import product
from pathlib import Path

import meds
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smbfast.data.splits import SPLITS
from smbfast.simulate import main
from smbfast.simulation import cohort, oracles
from smbfast.simulation.dataset import simulate

PATIENTS = 700
TASKS = oracles.TASKS


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    out = tmp_path_factory.mktemp("simulated") / "cohort"
    simulate(out, PATIENTS, 4, patients_per_file=300)
    return out


def events(folder: Path) -> pa.Table:
    files = sorted(folder.glob("data/*/*.parquet"))
    return pa.concat_tables([pq.read_table(f) for f in files]).sort_by(
        [("subject_id", "ascending"), ("time", "ascending"), ("code", "ascending")]
    )


def test_every_table_follows_its_meds_schema(dataset):
    assert len(list(dataset.glob("data/train/*.parquet"))) == 2
    for file in dataset.glob("data/*/*.parquet"):
        meds.DataSchema.validate(pq.read_table(file))
    meds.CodeMetadataSchema.validate(pq.read_table(dataset / "metadata/codes.parquet"))
    meds.SubjectSplitSchema.validate(pq.read_table(dataset / "metadata/subject_splits.parquet"))
    meds.DatasetMetadataSchema.validate(json.loads((dataset / "metadata/dataset.json").read_text()))
    for task in oracles.HORIZON_DAYS:
        for split in SPLITS:
            meds.LabelSchema.validate(pq.read_table(dataset / f"labels/{task}/{split}.parquet"))


def test_subjects_are_contiguous_sorted_and_in_their_split(dataset):
    splits = pq.read_table(dataset / "metadata/subject_splits.parquet").to_pydict()
    split_of = dict(zip(splits["subject_id"], splits["split"], strict=True))
    assert sorted(split_of) == list(range(1, PATIENTS + 1))
    seen: set[int] = set()
    described = set(pq.read_table(dataset / "metadata/codes.parquet")["code"].to_pylist())
    for file in dataset.glob("data/*/*.parquet"):
        table = pq.read_table(file)
        subject = table["subject_id"].to_numpy()
        starts = np.nonzero(np.diff(subject, prepend=-1))[0]
        assert len(np.unique(subject)) == len(starts)
        assert not seen & set(subject[starts].tolist())
        seen |= set(subject[starts].tolist())
        assert {split_of[s] for s in subject[starts].tolist()} == {file.parent.name}
        time = table["time"].cast(pa.int64()).fill_null(np.iinfo(np.int64).min).to_numpy()
        assert (time[1:] >= time[:-1])[np.diff(subject) == 0].all()
        assert set(table["code"].to_pylist()) <= described
    assert len(seen) == PATIENTS


def test_labels_and_oracles_stand_row_by_row_and_are_counted(dataset):
    tasks = {t["task"]: t for t in json.loads((dataset / "labels/tasks.json").read_text())}
    assert list(tasks) == list(oracles.TASKS)
    for task in oracles.TASKS:
        for split in SPLITS:
            label = pq.read_table(dataset / f"labels/{task}/{split}.parquet")
            oracle = pq.read_table(dataset / f"oracles/{task}/{split}.parquet")
            key = ["subject_id", "prediction_time"]
            assert label.select(key).equals(oracle.select(key))
            assert tasks[task]["splits"][split]["rows"] == label.num_rows > 0
            for column in ("bayes_filter", "latent"):
                value = oracle[column].to_numpy()
                assert ((value > 0) & (value < 1)).all()
    tte = pq.read_table(dataset / "labels/tte_death/train.parquet")
    assert tte.column_names == ["subject_id", "prediction_time", "duration_days", "event"]
    assert (tte["duration_days"].to_numpy() > 0).all()


def test_same_settings_same_bytes(dataset, tmp_path):
    simulate(tmp_path / "again", PATIENTS, 4, patients_per_file=300)
    ours = {f.relative_to(dataset): f.read_bytes() for f in dataset.rglob("*") if f.is_file()}
    for name, content in ours.items():
        assert (tmp_path / "again" / name).read_bytes() == content, name


def test_a_patient_is_the_same_in_a_smaller_cohort_and_in_other_files(dataset, tmp_path):
    simulate(tmp_path / "small", 100, 4, patients_per_file=10_000)
    large, small = events(dataset), events(tmp_path / "small")
    assert set(small["subject_id"].to_pylist()) == set(range(1, 101))
    assert large.slice(0, small.num_rows).equals(small)
    assert large["subject_id"][small.num_rows].as_py() == 101
    simulate(tmp_path / "other", 100, 5)
    assert not events(tmp_path / "other").equals(small)


def test_further_patients_are_held_out_and_change_nobody(tmp_path):
    """The next patients of a larger cohort, but all in held_out, with their labels and oracles."""
    simulate(tmp_path / "more", 100, 4, held_out=200)
    simulate(tmp_path / "alone", 100, 4)
    simulate(tmp_path / "larger", 300, 4)
    assert events(tmp_path / "more").equals(events(tmp_path / "larger"))
    for split in ("train", "tuning"):
        for file in (f"data/{split}/0.parquet", *(f"labels/{t}/{split}.parquet" for t in TASKS)):
            more, alone = (tmp_path / name / file for name in ("more", "alone"))
            assert more.read_bytes() == alone.read_bytes()
    splits = pq.read_table(tmp_path / "more/metadata/subject_splits.parquet").to_pydict()
    split_of = dict(zip(splits["subject_id"], splits["split"], strict=True))
    assert sorted(split_of) == list(range(1, 301))
    assert {split_of[i] for i in range(101, 301)} == {"held_out"}
    for kind, task in product(("labels", "oracles"), TASKS):
        whole = pa.concat_tables(
            pq.read_table(tmp_path / f"larger/{kind}/{task}/{split}.parquet") for split in SPLITS
        ).sort_by([("subject_id", "ascending")])
        mine = [split_of[i] == "held_out" for i in whole["subject_id"].to_pylist()]
        judged = pq.read_table(tmp_path / f"more/{kind}/{task}/held_out.parquet")
        assert judged.equals(whole.filter(pa.array(mine)))


def test_values_are_rounded_and_only_labs_have_them(dataset):
    table = events(dataset).to_pydict()
    steps = {lab.code: lab.step for lab in cohort.LABS}
    for code, value in zip(table["code"], table["numeric_value"], strict=True):
        assert (value is not None) == (code in steps)
        if value is not None:
            assert value == np.float32(round(value / steps[code]) * steps[code])


def test_a_folder_that_exists_is_kept_and_named(dataset):
    before = sorted(dataset.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main([f"--out={dataset}", "--patients=10"])
    assert stop.value.code.startswith(f"smbfast.simulate: {dataset} must not exist")  # status 1
    assert sorted(dataset.rglob("*")) == before


@pytest.mark.parametrize("name", ["patients", "nodes", "patients_per_file"])
def test_a_number_out_of_range_is_named(tmp_path, name):
    settings = {"patients": 10, "seed": 0, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        simulate(tmp_path / "none", **settings)
    with pytest.raises(ValueError, match="held_out must not be negative, got -1"):
        simulate(tmp_path / "none", 10, 0, held_out=-1)
    assert list(tmp_path.iterdir()) == []
