"""Task definitions: what they label, what they refuse, and leaks that are planted and caught."""

import json
from dataclasses import replace
from pathlib import Path

import meds
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smbfast.base.config import build
from smbfast.data.labels import Labels, read_labels, with_competing
from smbfast.data.meds import MedsDataset
from smbfast.labelling.checking import check_against_definitions, check_labels
from smbfast.labelling.making import make_labels
from smbfast.settings.tasks import TaskFile, TasksSettings, load_tasks, shipped_tasks

DATA = Path(__file__).parents[2].parent / "shared" / "data"
SETS = {
    "admission": {"prefix": ["ADMIT"]},
    "discharge": {"prefix": ["LEAVE"]},
    "alive": {"regex": ["LEAVE//.*"], "without": ["LEAVE//DIED"]},
    "high": {"exact": ["LAB//K"], "at_least": 6.0},
}
STAY = {"index": "admission", "offset_hours": [24], "not_after": ["discharge"]}
MORTALITY = {
    "name": "dies",
    "kind": "binary",
    **STAY,
    "outcome": "death",
    "until": "discharge",
}


def day(number: float) -> np.datetime64:
    return np.datetime64("2150-01-01", "us") + np.timedelta64(round(number * 86_400e6), "us")


def record(*events: tuple) -> list[tuple]:
    """Events of one patient, born on a day 40 years before: (day, code) or (day, code, value)."""
    born = (np.datetime64("2110-01-01", "us"), "MEDS_BIRTH", None)
    return [born, *((day(e[0]), e[1], e[2] if len(e) > 2 else None) for e in events)]


PATIENTS = {  # train: a stay with death, one without, one within a day; a record that breaks off
    1: record((0, "ADMIT//ER"), (3, "LEAVE//DIED"), (3, "MEDS_DEATH")),
    2: record((0, "ADMIT//ER"), (2, "LEAVE//HOME"), (20, "ADMIT//ER"), (30, "LEAVE//HOME")),
    3: record((0, "ADMIT//ER"), (0.5, "LEAVE//HOME")),
    4: record((0, "ADMIT//ER"), (0.2, "LAB//K", 6.5), (5, "LAB//K", 5.0)),
}


def write_meds(folder: Path, patients: dict[int, list[tuple]], split: str = "train") -> Path:
    rows = [(subject, *event) for subject, events in patients.items() for event in events]
    subject, time, code, value = zip(*rows, strict=True)
    table = pa.table(
        {
            "subject_id": pa.array(subject, pa.int64()),
            "time": pa.array(np.array(time, "datetime64[us]")),
            "code": list(code),
            "numeric_value": pa.array(value, pa.float32()),
        }
    )
    file = folder / "data" / split / "0.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file)
    return folder


def definitions(folder: Path, *tasks: dict) -> Path:
    """A file of definitions in TOML, with the sets above."""
    lines = []
    for name, keys in SETS.items():
        lines += [f"[sets.{name}]", *(f"{k} = {json.dumps(v)}" for k, v in keys.items())]
    for task in tasks:
        lines += ["[[tasks]]", *(f"{k} = {json.dumps(v)}" for k, v in task.items())]
    file = folder / "mine.toml"
    file.write_text("\n".join(lines))
    return file


def made(folder: Path, *tasks: dict, patients: dict = PATIENTS) -> tuple[dict, Path]:
    """Labels of every task by name, as {(subject, day): row}, and the folder of the labels."""
    data, out = write_meds(folder / "meds", patients), folder / "labels"
    config = TasksSettings(definitions=str(definitions(folder, *tasks)), data=data, out=out)
    entries = make_labels(config, say=lambda _: None)
    rows = {}
    for name in (entry["task"] for entry in entries):
        labels = read_labels(out / name)
        days = (labels.time_N - day(0).astype(np.int64)) / 86_400e6
        keys = zip(labels.subject_N.tolist(), days.tolist(), strict=True)
        if labels.kind == "binary":
            values = labels.binary_N.tolist()
        else:
            competing_N = labels.competing_N
            columns = [*labels.survival_N] + ([] if competing_N is None else [competing_N])
            values = [tuple(v.item() for v in row) for row in zip(*columns, strict=True)]
        rows[name] = dict(zip(keys, values, strict=True))
    return rows, out


def test_a_stay_is_labelled_while_it_lasts(tmp_path):
    lasts = {
        "name": "long", "kind": "binary", **STAY, "outcome": "discharge", "value": "lasts",
        "horizon_days": 3, "horizon_from": "index",
    }  # fmt: skip
    time_to = {
        "name": "when", "kind": "time_to_event", **STAY, "outcome": "death", "until": "discharge",
        "competing": "alive",
    }  # fmt: skip
    rows, out = made(tmp_path, MORTALITY, lasts, time_to)
    # the stay of patient 3 is over at the node; the record of patient 4 breaks off within its own
    assert rows["dies"] == {(1, 1.0): True, (2, 1.0): False, (2, 21.0): False}
    # a stay of three days to the second lasts three days; that of patient 4 is seen for five
    assert rows["long"] == {(1, 1.0): True, (2, 1.0): False, (2, 21.0): True, (4, 1.0): True}
    assert rows["when"] == {
        (1, 1.0): (2.0, True, False),
        (2, 1.0): (1.0, False, True),
        (2, 21.0): (9.0, False, True),
        (4, 1.0): (4.0, False, False),
    }
    entry = json.loads((out / "tasks.json").read_text())[0]
    assert entry["excluded"] == {"after discharge": "<=10", "not followed to the end": "<=10"}
    assert entry["splits"]["train"]["rows"] == "<=10"
    assert load_tasks(out / "dies" / "task.toml").tasks[0].name == "dies"
    table = pq.read_table(out / "dies" / "train.parquet")
    meds.LabelSchema.validate(table)
    assert (out / "dies" / "train.parquet").stat().st_mode & 0o077 == 0


def test_horizons_follow_up_and_competing_deaths(tmp_path):
    alive = {"kind": "binary", "index": "alive", "outcome": "admission"}
    patients = PATIENTS | {
        5: record((0, "LEAVE//HOME"), (3, "MEDS_DEATH")),
        6: record((0, "LEAVE//HOME"), (10, "ADMIT//ER")),  # at the end of ten days: inside
    }
    rows, _ = made(
        tmp_path,
        alive | {"name": "again", "horizon_days": [10, 18]},
        alive | {"name": "assumed", "horizon_days": 10, "follow_up": "assumed"},
        alive | {"name": "living", "horizon_days": 10, "competing_is": "excluded"},
        alive
        | {"name": "followed", "horizon_days": 10, "followed_to": "alive", "followed_days": 9},
        patients=patients,
    )
    # nothing is known after the last event of patient 2 (day 30) and of 3 (day 0.5)
    assert rows["again_10d"] == {(2, 2.0): False, (5, 0.0): False, (6, 0.0): True}
    assert rows["again_18d"] == {(2, 2.0): True, (5, 0.0): False, (6, 0.0): True}
    assert rows["assumed"] == rows["again_10d"] | {(2, 30.0): False, (3, 0.5): False}
    assert rows["living"] == {(2, 2.0): False, (6, 0.0): True}
    assert rows["followed"] == rows["again_10d"]


def test_exclusions_and_given_nodes(tmp_path):
    base = {"kind": "binary", "index": "admission", "outcome": "high", "horizon_days": 1}
    base |= {"follow_up": "assumed"}
    rows, out = made(
        tmp_path,
        base | {"name": "first", "offset_hours": [6], "first_only": True},
        base | {"name": "need", "offset_hours": [6], "need": ["high"]},
        base | {"name": "history", "history_days": 15},
        base | {"name": "aged", "age": [40.05, 60.0]},
        base | {"name": "evening", "which": "first", "clock": "18:00"},
    )
    assert rows["first"] == {
        (1, 0.25): False,
        (2, 0.25): False,
        (2, 20.25): False,
        (3, 0.25): False,
    }
    assert rows["need"] == {(4, 0.25): False}  # what was high lies before, and 5.0 is not high
    assert rows["history"] == rows["aged"] == {(2, 20.0): False}
    assert {key[1] for key in rows["evening"]} == {0.75}
    (tmp_path / "more").mkdir()
    again, _ = made(
        tmp_path / "more",
        {"name": "x", "kind": "binary", "nodes": str(out / "need"), "outcome": "high"}
        | {"horizon_days": 1, "follow_up": "assumed"},
    )
    assert again["x"] == rows["need"]


@pytest.mark.parametrize("name", shipped_tasks())
def test_shipped_definitions_load(name):
    assert load_tasks(name).each()


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"index": "admision"}, "must use sets that the file defines"),
        ({"horizon_days": [-1.0]}, "horizon_days must be above 0"),
        ({"until": None}, "needs horizon_days or until"),
        ({"competing_is": "competing"}, "must be negative or excluded in a binary task"),
        ({"nodes": "labels"}, "one of index and nodes"),
        ({"clock": "25:00"}, "clock must be HH:MM"),
        ({"horizon_days": [1e9]}, "must be at most 200 years"),
        ({"age": [60, 40]}, "the first age must be below the second"),
    ],
)
def test_a_definition_that_contradicts_itself_is_refused(keys, words):
    with pytest.raises(ValueError, match=words):
        build(TaskFile, {"sets": SETS, "tasks": [MORTALITY | keys]}, [])


def test_folders_of_others_are_not_replaced(tmp_path):
    made(tmp_path, MORTALITY)
    made(tmp_path, MORTALITY)
    (tmp_path / "labels" / "dies" / "task.toml").unlink()
    with pytest.raises(ValueError, match="was not made from a definition"):
        made(tmp_path, MORTALITY)


def replanted(out: Path, task: str, **columns: list) -> list[str]:
    """What is said of labels whose columns are replaced."""
    file = out / task / "train.parquet"
    table = pq.read_table(file)
    for name, values in columns.items():
        at = table.schema.get_field_index(name)
        table = table.set_column(at, name, pa.array(values, table.schema.field(name).type))
    pq.write_table(table, file)
    dataset = MedsDataset.open(out.parent / "meds")
    found = check_against_definitions(dataset, [(out / task, read_labels(out / task))])
    return [f"{finding.level}: {finding.text}" for finding in found]


def test_labels_as_made_have_no_fault(tmp_path):
    _, out = made(tmp_path, MORTALITY)
    assert replanted(out, "dies") == []


def test_a_label_inside_the_window_that_may_be_read_is_caught(tmp_path):
    """The label counts what lies at or before the prediction time."""
    task = {"name": "high", "kind": "binary", "index": "admission", "offset_hours": [24]}
    _, out = made(tmp_path, task | {"outcome": "high", "horizon_days": 2, "follow_up": "assumed"})
    rows = pq.read_table(out / "high" / "train.parquet")["subject_id"].to_pylist()
    [said] = replanted(out, "high", boolean_value=[subject == 4 for subject in rows])
    assert said.startswith("fault: <=10 of") and "at or before the prediction time alone" in said


def test_an_event_already_present_is_caught(tmp_path):
    """Prediction times are moved to where the outcome has been."""
    high = {"name": "high", "kind": "binary", "index": "admission", "outcome": "high"}
    _, out = made(tmp_path, MORTALITY, high | {"first_only": True, "horizon_days": 4})
    for task, subject, moment, words in (
        ("dies", 1, day(3), "at or after the patient's death"),
        ("high", 4, day(0.2), "outcome already present"),
    ):
        table = pq.read_table(out / task / "train.parquet")
        mine = np.array(table["subject_id"].to_pylist()) == subject
        times = np.where(mine, moment, table["prediction_time"].to_numpy())
        said = replanted(out, task, prediction_time=times.astype("datetime64[us]").tolist())
        assert [s for s in said if s.startswith("fault") and words in s]
    (out / "dies" / "task.toml").unlink()  # a death is seen without a definition too
    lines: list[str] = []
    config = TasksSettings(data=tmp_path / "meds", check=[str(out / "dies")])
    assert not check_labels(config, lines.append)
    assert any("at or after the patient's death" in line for line in lines)


def test_a_node_after_the_end_of_the_stay_is_caught(tmp_path):
    """The patient has left: that no death in this stay comes any more may be read."""
    _, out = made(tmp_path, MORTALITY)
    table = pq.read_table(out / "dies" / "train.parquet")
    late = [day(2.5) if s == 2 else day(1) for s in table["subject_id"].to_pylist()][:2]
    pq.write_table(table.slice(0, 2), out / "dies" / "train.parquet")
    [said] = replanted(out, "dies", prediction_time=late)
    assert said.startswith("fault") and "after an event that ends what the index" in said


def test_labels_of_others_are_checked_against_definitions_that_are_given(tmp_path):
    made(tmp_path, MORTALITY)
    labels = tmp_path / "labels" / "dies"
    (labels / "task.toml").unlink()
    table = pq.read_table(labels / "train.parquet")
    pq.write_table(
        table.set_column(2, "boolean_value", [[True, True, False]]), labels / "x.parquet"
    )
    (labels / "train.parquet").unlink()
    lines: list[str] = []
    given = TasksSettings(
        data=tmp_path / "meds", check=[str(labels)], definitions=str(tmp_path / "mine.toml")
    )
    assert not check_labels(given, lines.append)
    assert lines[0].endswith("against its definition") and "without an outcome" in lines[1]


def test_a_set_without_an_event_is_named(tmp_path):
    data = write_meds(tmp_path / "meds", PATIENTS)
    lines: list[str] = []
    task = MORTALITY | {"name": "typo", "outcome": "high", "need": ["alive"]}
    file = tmp_path / "mine.toml"
    definitions(tmp_path, task)
    file.write_text(file.read_text().replace(json.dumps(SETS["high"]["exact"]), '["LAB//k"]'))
    make_labels(TasksSettings(definitions=str(file), data=data, out=tmp_path / "l"), lines.append)
    assert lines[-1] == "warning: the set high of typo has no event at all in these data."
    assert len([line for line in lines if line.startswith("warning")]) == 1


def test_a_window_that_is_not_followed_is_caught(tmp_path):
    _, out = made(tmp_path, MORTALITY | {"follow_up": "assumed"})
    file = out / "dies" / "task.toml"
    file.write_text(file.read_text().replace('"assumed"', '"required"'))
    [said] = replanted(out, "dies")
    assert said.startswith("fault") and "the record ends within the outcome window" in said


def test_a_duration_that_is_not_its_definition_s_is_caught(tmp_path):
    task = {"name": "when", "kind": "time_to_event", **STAY, "outcome": "death"}
    _, out = made(tmp_path, task)
    length = pq.read_table(out / "when" / "train.parquet").num_rows
    [said] = replanted(out, "when", duration_days=[0.5] * length)
    assert said.startswith("warning") and "another duration" in said


@pytest.mark.parametrize("num_leaks, named", [(30, True), (22, False)])
def test_a_code_that_gives_the_outcome_away_is_named(tmp_path, num_leaks, named):
    """30 of 30 positives have it; 22 of 30 have an AUROC of 1/2 + 22/60 = 0.87 alone."""
    patients = {
        i: record(
            (0, "ADMIT//ER"),
            *([(0.5, "BILLED//DEATH")] if i < num_leaks else []),
            *([(3, "MEDS_DEATH")] if i < 30 else []),
            (3, "LEAVE//HOME"),
        )
        for i in range(60)
    }
    _, out = made(tmp_path, MORTALITY, patients=patients)
    lines: list[str] = []
    assert check_labels(
        TasksSettings(data=tmp_path / "meds", check=[str(out / "dies")]), lines.append
    )
    assert any("BILLED//DEATH" in line and "1.000 alone" in line for line in lines) == named


def test_labels_of_another_tool_read_as_they_are(tmp_path):
    """ACES writes all four value columns, in folders of its own, and no split."""
    table = pa.table(
        {
            "subject_id": pa.array([1, 2], pa.int64()),
            "prediction_time": pa.array([day(1), day(1)]),
            "boolean_value": [True, False],
            "integer_value": pa.nulls(2, pa.int64()),
            "float_value": pa.nulls(2, pa.float64()),
            "categorical_value": pa.nulls(2, pa.string()),
        }
    )
    file = tmp_path / "dies" / "shards" / "a.parquet"
    file.parent.mkdir(parents=True)
    pq.write_table(table, file)
    data = write_meds(tmp_path / "meds", PATIENTS)
    lines: list[str] = []
    assert check_labels(TasksSettings(data=data, check=[str(tmp_path / "dies")]), lines.append)
    assert lines[0] == "dies: <=10 rows checked without a definition"


def test_the_event_of_another_task_competes():
    split_N, at = np.array(["train"] * 3), np.arange(3)

    def task(name: str, days: list[float], event: list[bool]) -> Labels:
        days_N, event_N = np.array(days), np.array(event)
        return Labels(name, "time_to_event", at, at, split_N, duration_N=days_N, event_N=event_N)

    death = task("death", [2, 5, 9], [True, False, False])
    home = task("home", [2, 5, 4], [False, True, True])
    joined = with_competing(death, home)
    assert joined.competing_N.tolist() == [False, True, True]
    assert joined.duration_N.tolist() == [2, 5, 4]
    with pytest.raises(ValueError, match="<=10 are missing"):
        with_competing(death, home.take(np.array([0])))
    with pytest.raises(ValueError, match="<=10 rows have their own event after it"):
        with_competing(death, task("early", [1, 5, 9], [True, False, False]))


def test_what_a_count_leaves_of_all_rows_is_no_small_count_either():
    at_N = np.arange(14)
    event_N, days_N = at_N < 12, np.full(14, 2.0)
    rows = Labels("death", "time_to_event", at_N, at_N, np.full(14, "train"))
    death = replace(rows, duration_N=days_N, event_N=event_N)
    with pytest.raises(ValueError, match="; all but <=10 are missing"):
        with_competing(death, death.take(at_N[:3]))
    with pytest.raises(ValueError, match="; all but <=10 rows have their own event after it"):
        with_competing(death, replace(death, task="early", duration_N=days_N / 2))


@pytest.mark.slow  # 6 s of CPU
@pytest.mark.skipif(not DATA.is_dir(), reason="the demo datasets are not beside the project")
def test_the_shipped_definitions_give_the_labels_of_mimic(tmp_path):
    data = DATA / "mimic-iv-demo"
    make_labels(TasksSettings(definitions="mimic", data=data, out=tmp_path / "l"), lambda _: None)
    for folder in (p for p in (data / "labels").iterdir() if p.is_dir()):
        one, other = read_labels(folder), read_labels(tmp_path / "l" / folder.name)
        order, again = (np.lexsort((x.time_N, x.subject_N)) for x in (one, other))
        one, other = one.take(order), other.take(again)
        assert np.array_equal(one.subject_N, other.subject_N)
        assert np.array_equal(one.time_N, other.time_N)
        if one.kind == "binary":
            assert np.array_equal(one.binary_N, other.binary_N)
        else:
            assert np.array_equal(one.survival_N[1], other.survival_N[1])
            # days in float64: times are whole microseconds, of which one is 1.2e-11 days
            assert np.abs(one.survival_N[0] - other.survival_N[0]).max() < 1.2e-11
