"""Probes frozen embeddings: how much do they say about outcomes?

Reads embeddings (`python -m smbfast.embed`) and labels, writes `probe.json`, for each task the
predictions of every model, `predictions/<task>/<model>.parquet`, and what was fitted to the trained
model's embeddings, `risk_functions.safetensors`, and prints the table. Figures and
predictions are of tuning; those of held_out are made and counted (`smbfast.base.held_out`) only
where they are asked for, and nothing of held-out patients is used before.
"""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from smbfast.base.files import committed_file
from smbfast.base.held_out import count_look, num_looks, run_of
from smbfast.base.ours import require_replaceable
from smbfast.base.progress import time_left
from smbfast.data.labels import (
    Labels,
    find_tasks,
    read_labels,
    require_splits,
    with_splits,
    without_held_out,
)
from smbfast.data.meds import MedsDataset
from smbfast.judging.headline import headline, too_few_draws
from smbfast.judging.judge import OWN
from smbfast.judging.measures import PRIMARY
from smbfast.judging.predictions import require_predictions, write_predictions
from smbfast.judging.risk_function import FILE, RiskFunction, write_risk_functions
from smbfast.judging.small_cells import without_small_cells
from smbfast.labelling.checking import check_against_definitions
from smbfast.labelling.competing import competing_tasks
from smbfast.probing.contestants import Contestants
from smbfast.probing.embedding_file import read_origin
from smbfast.probing.table import table
from smbfast.probing.task import Measured, Protocol, measure
from smbfast.settings import ProbeCommandSettings


def run_probe(
    config: ProbeCommandSettings,
    say: Callable[[str], None] = print,
    index: Path | None = None,
    command: str = "python -m smbfast.probe",
) -> dict[str, Any]:
    """Probe every task, write `probe.json` and the predictions, and print the table.

    Args:
        index: that of the dataset (see `MedsDataset.open`), if it has one.
        command: what is recorded if held-out figures are asked for, in the folder of the run that
            wrote the embeddings, or else in `out`.

    Returns the content of `probe.json`.

    Raises:
        ValueError: a file, which is named, is missing, unreadable or of the wrong form, or labels
            have no embeddings. Nothing is written then.
    """
    started = time.monotonic()

    def progress(text: str) -> None:
        say(f"probe {time.monotonic() - started:6.1f} s  {text}")

    out = config.out or config.embeddings.parent
    run = run_of(config.embeddings) or out
    dataset = MedsDataset.open(config.data, index=index, split=config.split)
    tasks = _read_tasks(config, dataset, say)
    _require_outputs(out, run, tasks)
    contestants = Contestants.open(config, dataset, tasks, progress)
    protocol = _protocol(config)
    measured: list[Measured] = []
    begun = time.monotonic()
    for number, labels in enumerate(contestants.tasks):
        if number:
            each = (time.monotonic() - begun) / number
            left = time_left(each * (len(contestants.tasks) - number))
            progress(f"{number} of {len(contestants.tasks)} tasks, {left}")
        result = measure(
            labels,
            contestants.traits(labels),
            partial(contestants.scored, labels, protocol.judged_on, progress),
            protocol,
            models=partial(contestants.models, labels) if config.few_shot else None,
            progress=progress,
        )
        result.record["unmatched"] = contestants.unmatched[labels.task]
        measured.append(result)
    # a look is counted before its figures are written, so that none is missed
    looks = count_look(run, command) if config.final else num_looks(run)
    record = _record(config, protocol, measured, looks)
    _write(out, record, measured)
    _write_risk_functions(out, config, measured)
    say(table(record))
    return record


def _protocol(config: ProbeCommandSettings) -> Protocol:
    return Protocol(
        config.bootstraps,
        config.cox_bootstraps,
        config.seed,
        "held_out" if config.final else "tuning",
    )


def _record(
    config: ProbeCommandSettings, protocol: Protocol, measured: list[Measured], looks: int
) -> dict[str, Any]:
    """Return the content of `probe.json`, which holds no small count."""
    tasks = [result.record for result in measured]
    verdicts = headline(tasks, PRIMARY)
    tasks = [without_small_cells(task, config.small_cells) for task in tasks]
    return {
        "judged_on": protocol.judged_on,
        "num_looks": looks,
        "primary": PRIMARY,
        "headline": verdicts,
        "notes": too_few_draws(verdicts, protocol.bootstraps),
        "tasks": tasks,
        "protocol": _protocol_text(config),
        "read_out": _read_out(config.embeddings),
        "small_cells": config.small_cells,
    }


def _write(out: Path, record: dict[str, Any], measured: list[Measured]) -> None:
    for result in measured:
        judged_on, horizons_H = record["judged_on"], result.horizons_H
        write_predictions(out, result.judged, result.scored, judged_on, horizons_H)
    with committed_file(out / "probe.json", private=True) as staging:
        staging.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _write_risk_functions(
    out: Path, config: ProbeCommandSettings, measured: list[Measured]
) -> None:
    """Write how the trained model scores any node, of tasks that could be measured."""
    functions = {
        result.judged.task: model.risk
        for result in measured
        for model in result.scored
        if model.name == OWN and model.risk is not None and _gives_probability(result, model.risk)
    }
    write_risk_functions(out, functions, read_origin(config.embeddings))


def _gives_probability(result: Measured, risk: RiskFunction) -> bool:
    """Whether a risk function has a baseline where it needs one: tuning may have had no event."""
    return result.judged.kind == "binary" or risk.baseline is not None


def _require_outputs(out: Path, run: Path, tasks: list[Labels]) -> None:
    """Raise a ValueError if `out` is no folder, or holds files of others by the names of ours, or
    if the looks of `run` cannot be counted."""
    num_looks(run)
    if out.exists() and not out.is_dir():
        raise ValueError(f"`out` must be a folder to write to; {out} is a file")
    require_replaceable(out / "probe.json")
    require_replaceable(out / FILE)
    require_predictions(out, [labels.task for labels in tasks])


def _read_tasks(
    config: ProbeCommandSettings, dataset: MedsDataset, say: Callable[[str], None]
) -> list[Labels]:
    folders = find_tasks(config.labels, config.data)
    tasks = [with_splits(read_labels(folder), dataset) for folder in folders]
    for labels in tasks:
        require_splits(labels, config.final)
    tasks = competing_tasks(tasks, config.competing, config.data, dataset)
    tasks = tasks if config.final else [without_held_out(labels) for labels in tasks]
    for finding in check_against_definitions(dataset, zip(folders, tasks, strict=True)):
        say(f"warning: labels of {finding.task}: {finding.text}")
    return tasks


def _protocol_text(config: ProbeCommandSettings) -> str:
    return (
        "Binary tasks: features scaled and L2 logistic regression fitted on train; penalty (half "
        "decades) by tuning log loss, ties to the stronger; probabilities calibrated on tuning by "
        "slope and intercept. Boosted trees: as many as give the least tuning log loss. "
        "Time to event: Cox regression fitted on train with a ridge on all scaled features, its "
        "penalty by tuning partial likelihood; horizons by the quartiles of event times in train; "
        "probabilities by a slope and Breslow's baseline of tuning; censoring weighed out by its "
        "Kaplan-Meier estimate on the judged rows. All metrics on "
        f"{'held_out' if config.final else 'tuning'}. Primary, named before: AUROC, and the mean "
        "of the cumulative/dynamic AUC over the horizons, of each patient's first node. 95 % "
        f"intervals from {config.bootstraps} resamples of patients for the primary figure (of "
        f"other metrics at most as many, and {config.cox_bootstraps} for time to event), and for "
        "models with several versions of versions too. Verdicts: smbfast against the baseline "
        "with the best primary figure on the judged rows themselves, p from the resamples, Holm "
        "over tasks. Untrained backbones each have the read-out that tuning chooses for them. "
        "Stack: weights of 0 and above of the logits of smbfast and the baseline with the least "
        "tuning loss, fitted on tuning with a ridge to their mean. "
        "The Bayes filter bounds every model in expectation in log loss and AUROC, not in C."
    )


def _read_out(embeddings: Path) -> dict[str, Any]:
    """Return the pool of the embeddings and why a run chose it, as far as the file says."""
    origin = read_origin(embeddings) or {}
    return {"pool": origin.get("pool"), "choice": origin.get("pool_choice")}
