"""Weights & Biases and MLflow beside `metrics.jsonl`, for those who ask: numbers and settings.

Each tracker has a thread and a queue of limited length, so that one that fails, hangs or is slow
never stops or holds up a run: what does not fit is dropped, and that is said. Nothing leaves this
machine unless `run.track_online` asks for it.
"""

import logging
import os
import queue
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from smbfast.base import terminal
from smbfast.base.helpers import warn_failed
from smbfast.base.hub_names import is_local
from smbfast.settings import TrainSettings

PROJECT = "smbfast"  # the name of the project in wandb, and of the experiment in MLflow
RECORDS = 4096  # that wait for a tracker; more are dropped
PATIENCE = 20.0  # seconds in which trackers must write what is left at the end
_PATHS = ("data.path", "data.prepared", "data.sections", "model.adapter", "run.dir")
_PARAMETERS = 100  # of MLflow in a request


@dataclass(frozen=True)
class About:
    """Which run it is.

    run: its id, by which a resumed run goes on in the tracker.
    settings: by dotted key, as `shared_settings` gives them.
    """

    run: str
    name: str
    folder: Path
    settings: dict[str, Any]
    online: bool


class Sink(Protocol):
    """A tracker that is open."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Take the numbers of a record."""

    def finish(self, *, done: bool) -> None:
        """Write what is left; `done` is false where the run was stopped and may go on."""


class _Record(NamedTuple):
    values: dict[str, float]
    step: int


class _End(NamedTuple):
    done: bool


class Tracker:
    """A sink behind a queue, opened and fed by a thread of its own."""

    def __init__(self, name: str, make: Callable[[About], Sink], about: About) -> None:
        self._name, self._failed, self._dropped = name, False, 0
        self._queue: queue.Queue[_Record | _End] = queue.Queue(RECORDS)
        self._thread = threading.Thread(
            target=self._run, args=(make, about), name=name, daemon=True
        )
        try:
            self._thread.start()
        except RuntimeError as error:  # the system starts no more threads
            self._failed = True
            warn_failed(name, error, "the run goes on without it")

    def add(self, values: dict[str, float], step: int) -> None:
        """Hand over the numbers of a record; never waits."""
        self._put(_Record(values, step))

    def end(self, *, done: bool) -> None:
        """Let the tracker write what is left; `wait` waits for it."""
        # the end has a place, or the tracker would never come to it
        while self._queue.full() and not self._failed:
            with suppress(queue.Empty):
                self._queue.get_nowait()
                self._dropped += 1
        if self._dropped:
            many = "1 record is" if self._dropped == 1 else f"{self._dropped:,} records are"
            terminal.warn(f"{self._name} was too slow: {many} not in it")
        self._put(_End(done))

    def wait(self, until: float) -> None:
        """Wait for the end of what is left, until a time of `time.monotonic`."""
        if self._thread.ident is not None:  # it was started
            self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            terminal.warn(
                f"{self._name} has not written all within {PATIENCE:.0f} s and is left; "
                "metrics.jsonl holds everything"
            )

    def _put(self, item: _Record | _End) -> None:
        if self._failed:
            return
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._dropped += 1

    def _run(self, make: Callable[[About], Sink], about: About) -> None:
        try:
            sink = make(about)
            while isinstance(item := self._queue.get(), _Record):
                sink.log(item.values, item.step)
            sink.finish(done=item.done)
        except BaseException as error:  # some of these libraries end with SystemExit
            self._failed = True
            warn_failed(self._name, error, "the run goes on without it")


def open_trackers(settings: TrainSettings, run: str) -> list[Tracker]:
    """Return the trackers that a run asks for; see `decided_data` for what they need.

    Args:
        run: its id.
    """
    names, folder = settings.run.track, settings.folder.absolute()
    about = About(
        run, folder.name, folder, shared_settings(settings), online=settings.run.track_online
    )
    return [Tracker(name, SINKS[name], about) for name in names]


def close_trackers(trackers: Sequence[Tracker], *, done: bool) -> None:
    """Let trackers write what is left, all together for a limited time.

    Args:
        done: whether the run is; otherwise it may go on.
    """
    for tracker in trackers:
        tracker.end(done=done)
    until = time.monotonic() + PATIENCE
    for tracker in trackers:
        tracker.wait(until)


def numbers(kind: str, values: dict[str, object]) -> dict[str, float]:
    """Return the numbers of a record, named as in TensorBoard; no text ever goes to a tracker."""
    return {
        f"{kind}/{name}": float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
    }


def shared_settings(settings: TrainSettings) -> dict[str, Any]:
    """Return settings by dotted key, of paths the last part alone."""
    return dict(_flat("", settings.model_dump(mode="json")))


def _flat(key: str, value: Any) -> Sequence[tuple[str, Any]]:
    if isinstance(value, dict):
        return [pair for k, v in value.items() for pair in _flat(f"{key}.{k}".lstrip("."), v)]
    if isinstance(value, list) and any(isinstance(v, dict) for v in value):
        return [pair for i, v in enumerate(value) for pair in _flat(f"{key}.{i}", v)]
    if isinstance(value, list):
        return [(key, ",".join(str(_reduced(key, v)) for v in value))]
    return [(key, _reduced(key, value))]


def _reduced(key: str, value: Any) -> Any:
    if not isinstance(value, str) or os.sep not in value:
        return value
    is_path = key in _PATHS or value.startswith((os.sep, ".", "~")) or is_local(value)
    return Path(value).name if is_path else value


class _Wandb:
    """A run of Weights & Biases, in the folder `wandb` of the run."""

    def __init__(self, about: About) -> None:
        import wandb

        options = wandb.Settings(
            silent=True,
            console="off",  # what is printed stays here
            disable_git=True,
            disable_job_creation=True,
            save_code=False,
            login_timeout=PATIENCE,
            init_timeout=PATIENCE,
            x_disable_meta=True,  # host, user, paths and the command
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        self._run = wandb.init(
            project=PROJECT,
            name=about.name,
            id=about.run,
            resume="allow",
            dir=str(about.folder),
            mode="online" if about.online else "offline",
            config=about.settings,
            settings=options,
        )
        # a resumed run repeats steps, which wandb's own counter would not take
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log({"step": step, **values})

    def finish(self, *, done: bool) -> None:
        self._run.finish(exit_code=0 if done else 1)


class _Mlflow:
    """A run of MLflow, in the folder `mlruns` of the run or where MLFLOW_TRACKING_URI says."""

    def __init__(self, about: About) -> None:
        # its files are what is asked for; that a server with a database does more is no news here
        warnings.filterwarnings("ignore", module="mlflow")
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient

        uri = os.environ["MLFLOW_TRACKING_URI"] if about.online else None
        self._client = MlflowClient(tracking_uri=uri or (about.folder / "mlruns").as_uri())
        experiment = self._client.get_experiment_by_name(PROJECT)
        number = experiment.experiment_id if experiment else self._client.create_experiment(PROJECT)
        named = f"tags.smbfast_run = '{about.run}'"
        earlier = self._client.search_runs([number], filter_string=named, max_results=1)
        if earlier:
            self._run = earlier[0].info.run_id
            self._client.set_terminated(self._run, status="RUNNING")
            return
        tags = {"smbfast_run": about.run, "mlflow.user": "", "mlflow.source.name": PROJECT}
        made = self._client.create_run(number, tags=tags, run_name=about.name)
        self._run = made.info.run_id
        self._settle(about.settings)

    def _settle(self, settings: dict[str, Any]) -> None:
        from mlflow.entities import Param

        rows = [Param(key, str(value)) for key, value in settings.items()]
        for first in range(0, len(rows), _PARAMETERS):
            self._client.log_batch(self._run, params=rows[first : first + _PARAMETERS])

    def log(self, values: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def finish(self, *, done: bool) -> None:
        self._client.set_terminated(self._run, status="FINISHED" if done else "KILLED")


SINKS: dict[str, Callable[[About], Sink]] = {"wandb": _Wandb, "mlflow": _Mlflow}
