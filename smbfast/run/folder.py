"""The folder of a run: which run it holds, the status of that run, and its data."""

import json
from pathlib import Path

from smbfast.base.config import read_toml
from smbfast.base.files import write_text
from smbfast.data.labels import Labels, find_tasks, read_labels, require_splits, with_splits
from smbfast.data.meds import MedsDataset
from smbfast.data.prepared import Prepared
from smbfast.data.preparing import check_prepared, prepare
from smbfast.data.windows import WindowSet
from smbfast.settings import DataSettings, TrainSettings
from smbfast.settings.data import VOCABULARY
from smbfast.simulation.dataset import simulate

# settings that may differ when a run resumes, as they change weights only by rounding, if at all
FREE_KEYS = (
    "data.workers",
    "kernels",
    "model.recompute",
    "objective.path",
    "objective.self_check",
    "optim.micro_",
    "run.dir",
    "run.export",
    "run.resume",
    "run.log_every",
    "run.save_every",
    "run.keep",
    "run.threads",
    "run.profile",
    "probe.",
)


def earlier(run: Path, settings: TrainSettings) -> str:
    """Return how far this run is in the folder: "new" (not begun), "resumed" or "done".

    Raises:
        ValueError: if the folder holds another run, or any run with `run.resume=never`.
    """
    config = run / "config.toml"
    if not config.is_file():
        return "new"
    if settings.run.resume == "never":
        raise ValueError(
            f"{run} already holds a run and run.resume is never; name another --run.dir"
        )
    # a setting that did not exist when the run began counts as its default
    known = TrainSettings.model_construct().model_dump(mode="json", exclude={"phases"})
    then = _flat(known) | _flat(read_toml(config))
    now = _flat(settings.model_dump(mode="json"))
    keys = [k for k in {**then, **now} if not k.startswith(FREE_KEYS)]
    changed = [f"{k}: {then.get(k)} -> {now.get(k)}" for k in keys if then.get(k) != now.get(k)]
    if changed:
        raise ValueError(
            f"{run} holds a run with other settings; name another --run.dir, or take back\n  "
            + "\n  ".join(changed)
        )
    try:
        state = json.loads((run / "status.json").read_text())["state"]
    except (OSError, ValueError, KeyError):
        state = "unknown"
    return "done" if state == "done" else "resumed"


def _flat(values: object, prefix: str = "") -> dict[str, object]:
    if isinstance(values, dict):
        items = [(f"{prefix}.{k}" if prefix else k, v) for k, v in values.items()]
    elif isinstance(values, list) and any(isinstance(v, dict) for v in values):
        items = [(f"{prefix}.{i}", v) for i, v in enumerate(values)]
    else:
        return {} if values is None else {prefix: values}
    return {k: v for name, value in items for k, v in _flat(value, name).items()}


def prepared_data(settings: TrainSettings, run: Path) -> tuple[DataSettings, Prepared]:
    """Return the data settings with paths filled in, and the token shards; make what is missing."""
    backbone = _tokenizer_folder(settings)
    data = settings.data.decided(backbone, simulated=settings.data.path is None)
    if data.path is None:
        # the name says which cohort it is, so other settings never reuse it
        cohort = run / f"cohort-{settings.cohort.patients}-{settings.cohort.seed}"
        if not cohort.is_dir():
            simulate(cohort, settings.cohort.patients, settings.cohort.seed)
        data = data.model_copy(update={"path": str(cohort)})
    if data.prepared and (Path(data.prepared) / "prepare.json").is_file():
        prepared = Prepared.open(Path(data.prepared))
        check_prepared(prepared, data, backbone)
        return data, prepared
    out = Path(data.prepared) if data.prepared else run / "prepared"
    return data, prepare(data, out, backbone, ("train", "tuning"))


def _tokenizer_folder(settings: TrainSettings) -> str | None:
    """Return what the tokens come from: the backbone, or an adapter that was trained on codes."""
    adapter = settings.model.adapter
    if adapter and (Path(adapter) / VOCABULARY).is_file():
        return adapter
    return settings.model.path


def read_tasks(settings: TrainSettings, data: DataSettings) -> list[tuple[Path, Labels]]:
    """Read and check the tasks to probe, before anything is trained.

    Args:
        data: from `prepared_data`, with its path filled in.

    Raises:
        ValueError: if a task does not exist, or its labels cannot be used.
    """
    names, root = settings.probe.labels, data.folder
    if names is None and settings.data.path is None:
        names = sorted(p.name for p in (root / "labels").iterdir() if p.is_dir())
    if not names:
        return []
    dataset = MedsDataset.open(root)
    tasks = [(f, with_splits(read_labels(f), dataset)) for f in find_tasks(names, root)]
    for _, labels in tasks:
        require_splits(labels)
    return tasks


def check_windows(windows: WindowSet, tuning: WindowSet, path: str | None) -> None:
    """Raise a ValueError unless both splits have windows."""
    for split, window_set in (("train", windows), ("tuning", tuning)):
        if not len(window_set):
            raise ValueError(
                f"{path}: split `{split}` must have subjects with timed events; it has none"
            )


def write_status(run: Path, state: str, step: int, command: str) -> None:
    """Write `status.json`: running, preempted, failed or done, and the command to continue."""
    content = {"state": state, "step": step, "command": command}
    write_text(run / "status.json", json.dumps(content, indent=1))


def write_end(settings: TrainSettings, state: str) -> None:
    """Set the status of a run that had begun and ended early to `state`."""
    try:
        status = settings.folder / "status.json"
        content = json.loads(status.read_text())
        if content["state"] == "running":
            write_text(status, json.dumps({**content, "state": state}, indent=1))
    except (OSError, ValueError, KeyError):
        return  # no run had begun, or its folder is not writable; the caller prints the error
