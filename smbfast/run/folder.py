"""The folder of a run: which run it holds, the status of that run, and its data."""

import json
import os
import platform
import shlex
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from smbfast.base.config import read_toml
from smbfast.base.entry import own_folder
from smbfast.base.files import read_json, write_text
from smbfast.base.ours import require_prepared_folder
from smbfast.data.labels import Labels, find_tasks, read_labels, require_splits, with_splits
from smbfast.data.meds import MedsDataset
from smbfast.data.prepared import Prepared
from smbfast.data.preparing import check_prepared, prepare
from smbfast.data.source_index import FOLDER
from smbfast.data.splits import folders_of_no_split
from smbfast.data.windows import WindowSet
from smbfast.labelling.checking import check_against_definitions
from smbfast.labelling.competing import competing_tasks
from smbfast.run import checkpoint
from smbfast.run.label_card import TaskFacts, require_none
from smbfast.run.model_record import FORMAT
from smbfast.run.ranks import ALONE, Ranks
from smbfast.settings import DataSettings, TrainSettings, decided_data, tokenizer_folder
from smbfast.simulation.dataset import simulate

# settings that may differ when a run resumes, as they change weights only by rounding, if at all
FREE_KEYS = (
    "data.workers",
    "eval.nodes",
    "eval.stop_on_collapse",
    "kernels",
    "model.fsdp",
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
    "run.share",
    "run.track",
    "probe.",
)
LOCATIONS = ("data.path", "data.prepared")  # may differ too where a checkpoint's digests agree


def earlier(run: Path, settings: TrainSettings) -> str:
    """Return how far this run is in the folder: "new" (not begun), "resumed" or "done".

    A run is done if its status says so and its folder `final` is whole; if that is not, it goes on
    from its last checkpoint and writes `final` again. Where the data lie may differ on a resume,
    because a checkpoint records what they are.

    Raises:
        ValueError: if the folder holds another run, or any run with `run.resume=never`, or
            checkpoints of a run whose `config.toml` is missing, unless `run.resume=restart`.
    """
    config, resume = run / "config.toml", settings.run.resume
    if not config.is_file():
        if resume != "restart" and (left := _left_by_a_run(run)):
            raise ValueError(
                f"{run} holds {left} and no config.toml, so it cannot be said of which settings "
                "they are; put the file back, name another --run.dir, or train from step 0 in "
                "this folder with --resume=restart"
            )
        return "new"
    if resume == "never":
        raise ValueError(
            f"{run} already holds a run and run.resume is never; name another --run.dir"
        )
    then, now = _flat(read_toml(config)), _flat(settings.model_dump(mode="json"))
    done = status_of(run).get("state") == "done"
    problem = _final_problem(run) if done else None
    moved = set() if done and not problem else {k for k in LOCATIONS if then.get(k) and now.get(k)}
    changed = changed_settings(
        {k: v for k, v in then.items() if k not in moved},
        {k: v for k, v in now.items() if k not in moved},
    )
    if changed:
        raise ValueError(
            f"{run} holds a run with other settings; name another --run.dir, or take back\n  "
            + "\n  ".join(changed)
        )
    if problem:
        print(
            f"smbfast: {run} says that it is done, but {problem}; it goes on from its last "
            "checkpoint and writes `final` again",
            file=sys.stderr,
        )
    return "done" if done and not problem else "resumed"


def compared_settings(settings: TrainSettings) -> dict[str, object]:
    """Return the settings that a checkpoint must agree with, by dotted key.

    Left out are those that may differ, and where data lie: a digest says what they are.
    """
    flat = _flat(settings.model_dump(mode="json"))
    return {k: v for k, v in flat.items() if k not in LOCATIONS and not k.startswith(FREE_KEYS)}


def settings_of_ranks(settings: TrainSettings) -> dict[str, object]:
    """Return the settings that ranks must have alike, by dotted key.

    They are more than those of a checkpoint: a rank that alone evaluates more nodes, or alone holds
    a whole backbone, would leave the others waiting. Left out is what a machine has of its own.
    """
    flat = _flat(settings.model_dump(mode="json"))
    own = (*LOCATIONS, "data.workers", "run.dir", "run.device", "run.threads")
    return {k: v for k, v in flat.items() if k not in own}


def changed_settings(then: dict[str, object], now: dict[str, object]) -> list[str]:
    """Return the settings that differ, as `key: before -> now`, without those that may.

    A setting that did not exist when the run began counts as its default.
    """
    known = TrainSettings.model_construct().model_dump(mode="json", exclude={"phases"})
    then = {k: v for k, v in _flat(known).items() if k not in LOCATIONS} | then
    keys = [k for k in {**then, **now} if not k.startswith(FREE_KEYS)]
    pairs = [(k, then.get(k), now.get(k)) for k in keys]
    return [f"{k}: {_typed(a)} -> {_typed(b)}" for k, a, b in pairs if a != b]


def _typed(value: object) -> object:
    """Return a value as a command line has it."""
    return "none" if value is None else value


def _left_by_a_run(run: Path) -> str | None:
    """Return what a run has left in the folder that another must not go on from, or None."""
    if checkpoint.folders(run) or checkpoint.were_damaged(run):
        return "checkpoints"
    if (run / "final").is_dir():
        return "the folder final"
    return "the status of a run" if status_of(run).get("step") else None


def status_of(run: Path) -> dict:
    """Return what `status.json` holds, empty if it cannot be read."""
    try:
        return read_json(run / "status.json")
    except ValueError:
        return {}


def run_id(run: Path) -> str | None:
    """Return the id in `run.json`, or None if there is no such file."""
    file = run / "run.json"
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        name, version = content["run"], content["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        name, version = None, FORMAT
    if version != FORMAT:
        raise ValueError(
            f"{file} has format {version}, and this version reads {FORMAT} alone; name another "
            "--run.dir"
        )
    if not isinstance(name, str):
        raise ValueError(
            f"{file} must hold the id of the run, as JSON; put it back or name another --run.dir"
        )
    return name


def _final_problem(run: Path) -> str | None:
    """Return in words why `final` of a finished run cannot be believed, or None.

    Raises:
        ValueError: if it is intact and of another run.
    """
    final = run / "final"
    try:
        record = checkpoint.verified_final(final)
    except ValueError as error:
        return str(error)
    mine, theirs = run_id(run), record.get("run")
    if mine != theirs:
        raise ValueError(
            f"{final} is of run {theirs or 'of an earlier version'}, and {run} holds run "
            f"{mine or 'of an earlier version'}; move that folder away, and the same command "
            "writes its own"
        )
    return None


def _flat(values: object, prefix: str = "") -> dict[str, object]:
    if isinstance(values, dict):
        items = [(f"{prefix}.{k}" if prefix else k, v) for k, v in values.items()]
    elif isinstance(values, list) and any(isinstance(v, dict) for v in values):
        items = [(f"{prefix}.{i}", v) for i, v in enumerate(values)]
    else:
        return {} if values is None else {prefix: values}
    return {k: v for name, value in items for k, v in _flat(value, name).items()}


def data_of(settings: TrainSettings, run: Path) -> DataSettings:
    """Return the data settings with format and path filled in; simulate a cohort if there is none.

    Raises:
        ValueError: if settings of the data contradict each other or the backbone.
    """
    data = decided_data(settings)
    if data.path is None:
        # the name says which cohort it is, so other settings never reuse it
        asked = settings.cohort
        cohort = run / asked.folder_name
        if not cohort.is_dir():
            simulate(cohort, asked.patients, asked.seed, held_out=asked.held_out)
        data = data.model_copy(update={"path": str(cohort)})
    return data


def prepared_data(
    settings: TrainSettings,
    data: DataSettings,
    run: Path,
    verify: Literal["once", "all"] = "once",
    ranks: Ranks = ALONE,
) -> Prepared:
    """Return the token shards of `data`, from `data_of`; make those that are missing.

    Args:
        verify: of shards that are there; see `Prepared.open`.
        ranks: the main one checks what the others then read.

    Raises:
        ValueError: if the data are bad, or shards were made from others; if several ranks would
            have to wait for shards of a dataset.
    """
    backbone = tokenizer_folder(settings)
    if ranks.world > 1 and settings.data.path is not None:
        _require_prepared(data, run, backbone, ranks.world)
    if not ranks.is_main:
        folder = Path(data.prepared or run / "prepared")
        return Prepared.open(folder, verify, spare=run / "prepared" if data.prepared else None)
    if data.prepared and (Path(data.prepared) / "prepare.json").is_file():
        prepared = Prepared.open(Path(data.prepared), verify, spare=run / "prepared")
        check_prepared(prepared, data, backbone)
        return prepared
    out = Path(data.prepared) if data.prepared else run / "prepared"
    prepared = prepare(data, out, backbone, ("train", "tuning"), verify)
    own_folder(out)
    return prepared


def _require_prepared(data: DataSettings, run: Path, tokenizer: str | None, world: int) -> None:
    """Raise a ValueError with the command that prepares `data`, unless its shards are finished."""
    out = Path(data.prepared or run / "prepared")
    if (out / "prepare.json").is_file():
        return
    defaults = DataSettings().model_dump(mode="json")
    given = {k: v for k, v in data.model_dump(mode="json").items() if v != defaults[k]}
    given |= {"prepared": None, "out": str(out), "tokenizer": tokenizer}
    words = [
        f"--{k}={','.join(map(str, v)) if isinstance(v, list) else v}"
        for k, v in given.items()
        if v is not None
    ]
    raise ValueError(
        f"{out} must hold prepared data before {world} processes train on them, because all but "
        f"one would only wait. Prepare first: python -m smbfast.prepare {shlex.join(words)}"
    )


def read_tasks(
    settings: TrainSettings, data: DataSettings
) -> tuple[list[tuple[Path, Labels]], list[TaskFacts]]:
    """Read and check the tasks to probe, before anything is prepared or trained.

    Args:
        data: from `data_of`, with its path filled in.

    Returns:
        Folder and labels of each task, and how its labels fit the data.

    Raises:
        ValueError: if a task does not exist, or its labels cannot be used.
    """
    names, root = settings.probe.labels, data.folder
    if names is None and settings.data.path is None:
        names = sorted(p.name for p in (root / "labels").iterdir() if p.is_dir())
    if not names:
        return [], []
    prepared = Path(data.prepared) if data.prepared else settings.folder / "prepared"
    if not (prepared / "prepare.json").is_file():
        require_prepared_folder(prepared)  # before the index is written into it
    dataset = MedsDataset.open(root, index=prepared / FOLDER, split=data.split)
    tasks = [(f, with_splits(read_labels(f), dataset)) for f in find_tasks(names, root)]
    facts = [TaskFacts.of(labels, dataset) for _, labels in tasks]
    for (_, labels), fact in zip(tasks, facts, strict=True):
        # labels of another dataset have no split where files name none: say that first
        require_none(fact.refusals())
        require_splits(labels, settings.probe.final)
    read = [labels for _, labels in tasks]
    competing_tasks(read, settings.probe.competing, root, dataset)  # refused before training
    findings = check_against_definitions(dataset, tasks)
    facts = [
        replace(fact, findings=tuple(f.text for f in findings if f.task == fact.task))
        for fact in facts
    ]
    return tasks, facts


def check_windows(windows: WindowSet, tuning: WindowSet, path: str | None) -> None:
    """Raise a ValueError unless both splits have windows."""
    for split, window_set in (("train", windows), ("tuning", tuning)):
        if not len(window_set):
            raise ValueError(
                f"{path}: split `{split}` must have subjects with timed events; it has none"
                + _others(path)
            )


def write_status(run: Path, state: str, step: int, command: str) -> None:
    """Write `status.json`: running, preempted, failed or done, and the command to continue.

    Beside them stand when that was, and which process on which host said it: one that runs no more
    has died.
    """
    content = {"state": state, "step": step, "command": command, **_now()}
    write_text(run / "status.json", json.dumps(content, indent=1))


def _now() -> dict[str, object]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"time": now, "pid": os.getpid(), "host": platform.node()}


def write_end(settings: TrainSettings, state: str) -> None:
    """Set the status of a run that had begun and ended early to `state`."""
    status = settings.folder / "status.json"
    try:
        before = status.read_text()
        content = json.loads(before)
        if content["state"] != "running":
            return
        text = json.dumps({**content, "state": state, **_now()}, indent=1)
        try:
            write_text(status, text)
        except OSError:  # on a full disk, the blocks that the file has are still its own
            with status.open("r+") as file:
                file.write(text.ljust(len(before)))
    except (OSError, ValueError, KeyError):
        return  # no run had begun, or its folder is not writable; the caller prints the error


def _others(path: str | None) -> str:
    names = folders_of_no_split(Path(path)) if path else []
    return f", and these folders are of no split: {', '.join(names)}" if names else ""
