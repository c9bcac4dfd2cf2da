"""Trackers get numbers and settings, offline, and never stop or hold up a run."""

import json
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from smbfast import train
from smbfast.run import loop, trackers
from smbfast.run.metrics import MetricsLog
from smbfast.run.trackers import (
    About,
    Tracker,
    close_trackers,
    numbers,
    open_trackers,
    shared_settings,
)
from smbfast.settings import load
from tests.refusal import refused


class Recorder:
    """A sink that keeps what it gets."""

    def __init__(self, about: About) -> None:
        self.about, self.logged, self.done = about, list[tuple[dict, int]](), list[bool]()

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((values, step))

    def finish(self, *, done: bool) -> None:
        self.done.append(done)


def about(folder: Path, *, online: bool = False) -> About:
    return About("an_id", "name", folder, {"optim.batch": 4, "data.path": "meds"}, online)


def test_only_numbers_of_a_record_go_to_a_tracker(tmp_path: Path) -> None:
    made: list[Recorder] = []

    def make(a: About) -> Recorder:
        made.append(Recorder(a))
        return made[-1]

    log = MetricsLog(tmp_path, trackers=[Tracker("x", make, about(tmp_path))])
    log.write("header", config={"data": {"path": "/home/me/meds"}}, text="Zebrafinch")
    log.write("step", step=3, phase="sft", sft=1.5, jepa=None, labels=7, held=True)
    log.write("eval", step=4, probe_task="Zebrafinch", probe_auroc=0.75)
    log.write("end", step=4, seconds=9.0, best={"sft": {"loss": 1.0}})
    log.close()
    (sink,) = made
    assert sink.logged == [
        ({"step/sft": 1.5, "step/labels": 7.0}, 3),
        ({"eval/probe_auroc": 0.75}, 4),
        ({"end/seconds": 9.0}, 4),
    ]
    assert sink.done == [True]
    assert numbers("step", {"step": 3, "loss": 2, "name": "x"}) == {"step/loss": 2.0}


def test_a_run_that_was_stopped_is_not_done(tmp_path: Path) -> None:
    made: list[Recorder] = []
    make = lambda a: made.append(Recorder(a)) or made[-1]  # noqa: E731
    log = MetricsLog(tmp_path, trackers=[Tracker("x", make, about(tmp_path))])
    log.write("step", step=3, sft=1.5)
    log.close()
    assert made[0].done == [False]


def test_on_a_full_disk_the_log_is_named_also_when_it_is_closed(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log._file.close()
    log._file = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115
    for do in (lambda: log.write("step", step=1, sft=1.5), log.close):
        with pytest.raises(OSError, match="No space left on device") as failed:
            do()
        assert failed.value.filename == str(tmp_path / "metrics.jsonl")


def test_a_line_of_the_log_is_legal_json_whatever_the_loss(tmp_path: Path) -> None:
    def refuses(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    log = MetricsLog(tmp_path)
    log.write("step", step=1, sft=float("nan"), jepa=float("inf"))
    log.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=refuses)
    assert (record["sft"], record["jepa"], record["step"]) == (None, None, 1)


def test_of_paths_the_last_part_is_shared() -> None:
    settings = load(
        "tiny",
        [
            "data.path=/home/me/secret/meds",
            "run.dir=../mine/run",
            "model.path=/models/of/me/base",
            "probe.labels=/home/me/labels/death,tte",
            "data.sections=rules/mine.toml",
        ],
    )
    shared = shared_settings(settings)
    assert shared["data.path"] == "meds" and shared["run.dir"] == "run"
    assert shared["model.path"] == "base" and shared["probe.labels"] == "death,tte"
    assert shared["data.sections"] == "mine.toml"
    assert shared["phases.0.steps"] == 6 and shared["optim.batch"] == 4
    assert not any(word in str(shared) for word in ("me/", "secret", "home", "mine/"))
    hub = load("tiny", ["model.path=Qwen/Qwen3-8B"])
    assert shared_settings(hub)["model.path"] == "Qwen/Qwen3-8B"


def test_a_tracker_that_fails_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(_about: About) -> Recorder:
        raise SystemExit("Zebrafinch")

    tracker = Tracker("wandb", fails, about(tmp_path))
    tracker.add({"a": 1.0}, 1)
    close_trackers([tracker], done=True)
    said = capsys.readouterr().err
    assert said.startswith("warning: wandb failed (SystemExit in test_trackers.py:")
    assert said.endswith("the run goes on without it\n") and "Zebrafinch" not in said


def test_a_tracker_that_hangs_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "RECORDS", 2)
    monkeypatch.setattr(trackers, "PATIENCE", 0.01)
    free = threading.Event()

    def hangs(a: About) -> Recorder:
        free.wait()
        made.append(Recorder(a))
        return made[-1]

    made: list[Recorder] = []
    tracker = Tracker("mlflow", hangs, about(tmp_path))
    for step in range(5):
        tracker.add({"a": 1.0}, step)  # returns though nothing is taken
    close_trackers([tracker], done=True)
    said = capsys.readouterr().err
    free.set()
    tracker._thread.join(60)
    assert "4 records are not in it" in said and "has not written all within" in said
    assert made[0].done == [True], "the end has a place where records have none"


def test_a_tracker_that_failed_was_not_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "RECORDS", 2)
    full = threading.Event()

    def fails(_about: About) -> Recorder:
        full.wait()
        raise OSError("no server")

    tracker = Tracker("mlflow", fails, about(tmp_path))
    for step in range(2):
        tracker.add({"a": 1.0}, step)
    full.set()
    tracker._thread.join(60)
    close_trackers([tracker], done=True)
    said = capsys.readouterr().err
    assert "mlflow failed" in said and "slow" not in said


def test_trackers_that_hang_are_waited_for_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that was asked to stop must have left before a scheduler kills it."""
    monkeypatch.setattr(trackers, "PATIENCE", 0.2)
    free, waited = threading.Event(), list[float]()

    def hangs(a: About) -> Recorder:
        free.wait()
        return Recorder(a)

    def joined(thread: threading.Thread, seconds: float = 0.0) -> None:
        waited.append(seconds)  # of a clock of its own: all that time goes by here

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "join", joined)
        patched.setattr(trackers, "time", SimpleNamespace(monotonic=lambda: sum(waited)))
        both = [Tracker(name, hangs, about(tmp_path)) for name in "ab"]
        MetricsLog(tmp_path, trackers=both).close()
    free.set()
    for tracker in both:
        tracker._thread.join(60)
    assert capsys.readouterr().err.count("has not written all within") == 2
    assert waited == [0.2, 0.0], "the second has what the first has left of it"


def test_a_tracker_without_a_thread_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none)
    log = MetricsLog(tmp_path, trackers=[Tracker("wandb", Recorder, about(tmp_path))])
    log.write("step", step=3, sft=1.5)
    log.close()
    assert capsys.readouterr().err.startswith("warning: wandb failed (RuntimeError")


def fake_wandb(calls: dict[str, Any]) -> ModuleType:
    module: Any = ModuleType("wandb")
    run = SimpleNamespace(
        define_metric=lambda *args, **more: calls.setdefault("axis", []).append((args, more)),
        log=lambda values: calls.setdefault("log", []).append(values),
        finish=lambda **more: calls.update(finish=more),
    )
    module.Settings = lambda **more: calls.update(settings=more) or more
    module.init = lambda **more: calls.update(init=more) or run
    return module


def test_wandb_is_offline_quiet_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[str, Any] = {}
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(calls))
    sink = trackers.SINKS["wandb"](about(tmp_path))
    init = calls["init"]
    assert (init["mode"], init["id"], init["resume"]) == ("offline", "an_id", "allow")
    assert init["dir"] == str(tmp_path) and init["config"]["data.path"] == "meds"
    # neither what is printed, nor host, user, paths, code or the state of git
    assert calls["settings"]["console"] == "off" and calls["settings"]["save_code"] is False
    assert all(calls["settings"][f"x_disable_{n}"] for n in ("meta", "machine_info", "stats"))
    assert calls["settings"]["x_save_requirements"] is False
    sink.log({"step/sft": 1.0}, 3)
    sink.finish(done=False)
    assert calls["log"] == [{"step": 3, "step/sft": 1.0}] and calls["finish"] == {"exit_code": 1}
    trackers.SINKS["wandb"](about(tmp_path, online=True))
    assert calls["init"]["mode"] == "online"


def fake_mlflow(runs: dict[str, dict], calls: list) -> dict[str, Any]:
    class Client:
        def __init__(self, tracking_uri: str) -> None:
            calls.append(tracking_uri)

        def get_experiment_by_name(self, name: str) -> Any:
            return SimpleNamespace(experiment_id="7") if runs else None

        def create_experiment(self, name: str) -> str:
            return "7"

        def search_runs(self, numbers: list, filter_string: str, max_results: int) -> list:
            same = [n for n, r in runs.items() if f"'{r['tags']['smbfast_run']}'" in filter_string]
            return [SimpleNamespace(info=SimpleNamespace(run_id=n)) for n in same]

        def create_run(self, number: str, tags: dict, run_name: str) -> Any:
            runs["r1"] = {"tags": tags, "metrics": [], "params": {}}
            return SimpleNamespace(info=SimpleNamespace(run_id="r1"))

        def log_batch(self, run: str, metrics: list = (), params: list = ()) -> None:
            assert len(params) <= 100
            runs[run]["metrics"] += [m[:2] + m[3:] for m in metrics]
            runs[run]["params"] |= dict(params)

        def set_terminated(self, run: str, status: str) -> None:
            runs[run]["status"] = status

    module, entities = ModuleType("mlflow"), ModuleType("mlflow.entities")
    module.MlflowClient = Client  # type: ignore[attr-defined]
    entities.Metric = entities.Param = lambda *args: args  # type: ignore[attr-defined]
    return {"mlflow": module, "mlflow.entities": entities}


def test_mlflow_writes_files_and_a_resumed_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: dict[str, dict] = {}
    calls: list = []
    for name, module in fake_mlflow(runs, calls).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")  # not asked for, so not used
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # which the sink sets for its process
    for done, status in ((False, "KILLED"), (True, "FINISHED")):
        sink = trackers.SINKS["mlflow"](about(tmp_path))
        sink.log({"step/sft": 1.0}, 3)
        sink.finish(done=done)
        assert runs["r1"]["status"] == status
    assert list(runs) == ["r1"] and runs["r1"]["metrics"] == [("step/sft", 1.0, 3)] * 2
    assert runs["r1"]["params"] == {"optim.batch": "4", "data.path": "meds"}
    assert calls == [(tmp_path / "mlruns").as_uri()] * 2
    trackers.SINKS["mlflow"](about(tmp_path, online=True))
    assert calls[-1] == "http://server"


def test_a_run_asks_for_its_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_trackers(load("tiny", []), "id") == []
    made: list[About] = []
    monkeypatch.setitem(trackers.SINKS, "mlflow", lambda a: made.append(a) or Recorder(a))
    run = [f"run.dir={tmp_path / 'here' / 'run'}", "run.track=mlflow"]
    (tracker,) = open_trackers(load("tiny", run), "id")
    close_trackers([tracker], done=True)
    assert made[0].run == "id" and made[0].name == "run" and not made[0].online


def test_a_run_that_fails_closes_its_trackers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Recorder] = []
    monkeypatch.setitem(trackers.SINKS, "mlflow", lambda a: made.append(Recorder(a)) or made[-1])
    monkeypatch.setattr("smbfast.settings.decide.find_spec", lambda name: name)

    def fails(*_args: Any, **_more: Any) -> None:
        raise ValueError("the step fails")

    monkeypatch.setattr(loop, "evaluate_entry", fails)
    words = ["tiny", f"--run.dir={tmp_path / 'run'}", "--run.track=mlflow"]
    refused(lambda: train.main(words), "the step fails")
    assert [sink.done for sink in made] == [[False]]


def test_what_a_tracker_needs_is_asked_for_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = f"--run.dir={tmp_path / 'run'}"
    monkeypatch.setattr("smbfast.settings.decide.find_spec", lambda name: None)
    refused(
        lambda: train.main(["tiny", run, "--run.track=wandb"]),
        "run.track=wandb needs the package wandb",
        "pip install 'smbfast[wandb]'",
    )
    monkeypatch.setattr("smbfast.settings.decide.find_spec", lambda name: name)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    online = ["--run.track=mlflow", "--run.track_online=true"]
    refused(lambda: train.main(["tiny", run, *online]), "MLFLOW_TRACKING_URI", "not set")
    refused(lambda: train.main(["tiny", run, "--run.track=comet"]), "run.track", "wandb")
    assert not (tmp_path / "run").exists()
