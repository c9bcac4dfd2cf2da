"""Held-out patients are for the end: nothing of their outcomes shows before `--final`."""

import contextlib
import io
import json
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import smbfast.train as entry
from smbfast.reporting import figures
from smbfast.run import loop
from smbfast.settings import load
from smbfast.simulation.dataset import simulate
from tests.same_run import records

TASKS = ("death_3y", "tte_death")
# what a clock says, with the spaces that align it, or a memory meter, and digests of a random id
CLOCK = re.compile(r" *[\d.]+ s\b|[\d.,]+k? +tok/s|waits +[\d.]+%|[\d.]+ GiB|\S+ left|about .*")


def words(root: Path) -> list[str]:
    run = [f"--data.path={root / 'cohort'}", f"--run.dir={root / 'run'}", "--run.threads=1"]
    short = ["--phases.0.steps=1", "--phases.1.steps=1", "--objective.self_check=false"]
    short += ["--probe.bootstraps=100"]
    return ["tiny", *run, *short, f"--probe.labels={','.join(TASKS)}"]


def labels_of(root: Path, task: str) -> Path:
    return root / "cohort" / "labels" / task / "held_out.parquet"


def invert(labels: Path) -> None:
    """True becomes false and false true; a time to event is mirrored besides."""
    table = pq.read_table(labels)
    name = "event" if "event" in table.column_names else "boolean_value"
    columns = {c: table[c] for c in table.column_names} | {name: pc.invert(table[name])}
    if name == "event":
        columns["duration_days"] = pc.subtract(10_000.0, table["duration_days"])
    pq.write_table(table.from_pydict(columns, schema=table.schema), labels)


def left_by(run: Path) -> dict[str, Any]:
    """What a run shows: records by name, and the bytes of what only probes write."""
    files = [*run.glob("predictions/*/*"), run / "probe.json"]
    events = [e.stat().st_size for e in run.glob("tensorboard/*")]
    shown = {str(f.relative_to(run)): f.read_bytes() for f in files}
    return records(run) | shown | {"events": events}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, few_trees: None) -> dict[str, Any]:
    """A run, and by the same command one for which held-out outcomes were inverted."""
    root = tmp_path_factory.mktemp("final")
    simulate(root / "cohort", 120, 3, held_out=40)
    made: dict[str, Any] = {"root": root, "said": [], "left": []}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("losses", "health", "optimizer", "machine"):  # drawn from metrics.jsonl
            patch.setattr(figures, name, lambda _phases: None)
        for inverted in (False, True):
            if inverted:
                (root / "first").mkdir()
                (root / "run").rename(root / "first" / "run")
                for task in TASKS:
                    invert(labels_of(root, task))
            stream = io.StringIO()
            with contextlib.redirect_stdout(stream):
                entry.main(words(root))
            made["said"].append(stream.getvalue())
            made["left"].append(left_by(root / "run"))
        yield made


@pytest.fixture
def run_as_it_was(runs: dict) -> Iterator[None]:
    """Put the run back where a test has judged or broken it: each finds it as it was made."""
    run, aside = runs["root"] / "run", runs["root"] / "aside"
    shutil.copytree(run, aside)
    yield
    shutil.rmtree(run)
    aside.rename(run)


def test_inverted_outcomes_of_held_out_patients_change_nothing(runs: dict) -> None:
    before, after = (re.sub(" +", " ", CLOCK.sub("", text)) for text in runs["said"])
    assert before == after and "judged on" in before
    one, other = runs["left"]
    assert one.keys() == other.keys() and "metrics.jsonl:0" in one
    for name, content in one.items():
        assert content == other[name], name
    # the page is made of these files and the log, whose clocks differ
    first, second = runs["root"] / "first" / "run", runs["root"] / "run"
    for name in ("metrics.jsonl", "status.json"):
        (first / name).write_bytes((second / name).read_bytes())
    page = loop.write_report(second).read_bytes()
    assert loop.write_report(first).read_bytes() == page
    assert b"Judged on tuning patients" in page and not (second / "held_out.json").exists()
    card = (second / "final" / "README.md").read_text()
    assert "as ten tuning patients or fewer" in card and "held-out patients" not in card


def test_held_out_patients_are_not_embedded(runs: dict) -> None:
    for name in ("online", "untrained"):
        table = pq.read_table(runs["root"] / "run" / "embeddings" / f"{name}.parquet")
        assert set(table["split"].to_pylist()) == {"train", "tuning"}


@pytest.mark.usefixtures("run_as_it_was")
def test_a_finished_run_is_judged_by_the_same_command_and_that_is_counted(runs: dict) -> None:
    run, root = runs["root"] / "run", runs["root"]
    weights = {f: f.read_bytes() for f in run.rglob("*.safetensors")}
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream):
        entry.main([*words(root), "--final"])
    assert "looked at 1 time in this run" in stream.getvalue()
    assert {f: f.read_bytes() for f in run.rglob("*.safetensors")} == weights
    look = json.loads((run / "held_out.json").read_text())["looks"]
    assert len(look) == 1 and look[0]["command"].endswith("--probe.final=true")
    assert stat.S_IMODE((run / "held_out.json").stat().st_mode) == 0o600
    record = json.loads((run / "probe.json").read_text())
    assert (record["judged_on"], record["num_looks"]) == ("held_out", 1)
    for task in record["tasks"]:
        assert task["rows"]["held_out"] == pq.read_metadata(labels_of(root, task["task"])).num_rows
        assert all(model["metrics"] or model["reason"] for model in task["models"])
    key = ["subject_id", "prediction_time", "boolean_value"]
    files = run / "predictions" / "death_3y" / "smbfast.parquet", labels_of(root, "death_3y")
    predicted, labels = (pq.read_table(file).select(key).to_pydict() for file in files)
    assert predicted == labels
    assert "looked at 1 time in this run" in (run / "report.html").read_text()
    card = (run / "final" / "README.md").read_text()
    assert "as ten held-out patients or fewer" in card and "tuning patients" not in card
    assert json.loads((run / "status.json").read_text())["state"] == "done"


@pytest.mark.usefixtures("run_as_it_was")
def test_final_needs_tasks_and_the_last_checkpoint(runs: dict) -> None:
    newest = runs["root"] / "run" / "checkpoints" / "step-000002"
    checkpoints = newest.parent.rename(runs["root"] / "elsewhere")
    with pytest.raises(SystemExit, match=r"last step, 2, .* smbfast\.embed"):
        entry.main([*words(runs["root"]), "--final"])
    checkpoints.rename(newest.parent)
    newest.rename(newest.with_name("unused-1"))
    with pytest.raises(SystemExit, match="last step, 2, "):
        entry.main([*words(runs["root"]), "--final"])
    assert load("tiny", ["--probe.final=true"]).probe.final
    with pytest.raises(ValueError, match=r"probe\.labels"):
        load("tiny", ["--probe.final=true", "--probe.labels=[]"])
    with pytest.raises(ValueError, match=r"probe\.labels"):
        load("tiny", ["--probe.final=true", "--data.path=x"])
