"""Probes frozen embeddings: how much do they say about outcomes?

Reads embeddings (`python -m smbfast.embed`) and labels, writes `probe.json` and for each binary
task `predictions/<task>.parquet` in the schema of meds-evaluation, and prints the table. Figures
and predictions are of tuning; those of held_out are made and counted (`smbfast.base.held_out`) only
where they are asked for, and nothing of held-out patients is used before.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smbfast.base.files import committed_file
from smbfast.base.held_out import count_look, num_looks, run_of
from smbfast.base.ours import require_replaceable
from smbfast.data.labels import (
    Labels,
    find_tasks,
    read_labels,
    require_splits,
    with_splits,
    without_held_out,
)
from smbfast.data.meds import MedsDataset
from smbfast.data.nodes import distinct_nodes
from smbfast.probing.counts import count_codes
from smbfast.probing.embedding_file import read_origin
from smbfast.probing.features import Embeddings, Features, matched, read_embeddings, read_oracle
from smbfast.probing.table import table
from smbfast.probing.task import Measured, Protocol, measure
from smbfast.settings import ProbeCommandSettings

PREDICTIONS = pa.schema(
    [
        ("subject_id", pa.int64()),
        ("prediction_time", pa.timestamp("us")),
        ("boolean_value", pa.bool_()),
        ("predicted_boolean_value", pa.bool_()),
        ("predicted_boolean_probability", pa.float64()),
    ]
)
_READABLE = {
    "untrained": "same backbone, untrained",
    "counts": "age, sex and code counts",
    "oracle_filter": "oracle: Bayes filter on the observed history",
    "oracle_latent": "oracle: sees the latent state",
}


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
    tasks = _read_tasks(config, dataset)
    _require_outputs(out, run, tasks)
    nodes = distinct_nodes(tasks)
    trained = read_embeddings(config.embeddings, nodes)
    untrained = read_embeddings(config.untrained, nodes) if config.untrained else None
    rows = [_matched_rows(labels, trained, untrained) for labels in tasks]
    matched_tasks = [
        labels.take(row_N >= 0) for labels, (row_N, _) in zip(tasks, rows, strict=True)
    ]
    subject_N = np.concatenate([labels.subject_N for labels in matched_tasks])
    time_N = np.concatenate([labels.time_N for labels in matched_tasks])
    counts = count_codes(dataset, subject_N, time_N, lambda text: progress(f"codes of {text}"))
    protocol = _protocol(config)
    readable = _readable(config.embeddings)
    measured: list[Measured] = []
    for labels, task, (row_N, untrained_N) in zip(matched_tasks, tasks, rows, strict=True):
        matched_N = row_N >= 0
        features: dict[str, Features] = {"smbfast": trained.features(row_N[matched_N])}
        if untrained is not None:
            features["untrained"] = untrained.features(untrained_N[matched_N])
        features["counts"] = counts.features(
            labels.subject_N, labels.time_N, labels.split_N == "train"
        )
        oracle = _oracle(config.data, labels, protocol.judged_on)
        result = measure(labels, features, oracle, readable, protocol, progress)
        result.record["unmatched"] = len(task) - len(labels)
        measured.append(result)
    # a look is counted before its figures are written, so that none is missed
    looks = count_look(run, command) if config.final else num_looks(run)
    record = _record(config, protocol, measured, looks)
    _write(out, record, matched_tasks, measured)
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
    """Return the content of `probe.json`."""
    return {
        "judged_on": protocol.judged_on,
        "num_looks": looks,
        "tasks": [result.record for result in measured],
        "protocol": _protocol_text(config),
        "read_out": _read_out(config.embeddings),
        "small_cells": config.small_cells,
    }


def _write(out: Path, record: dict, tasks: list[Labels], measured: list[Measured]) -> None:
    for labels, result in zip(tasks, measured, strict=True):
        judged_N = labels.split_N == record["judged_on"]
        score_J = None if result.score_N is None else result.score_N[judged_N]
        file = out / "predictions" / f"{labels.task}.parquet"
        _write_predictions(file, labels.take(judged_N), score_J)
    with committed_file(out / "probe.json") as staging:
        staging.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _require_outputs(out: Path, run: Path, tasks: list[Labels]) -> None:
    """Raise a ValueError if `out` is no folder, or holds files of others by the names of ours, or
    if the looks of `run` cannot be counted."""
    num_looks(run)
    if out.exists() and not out.is_dir():
        raise ValueError(f"`out` must be a folder to write to; {out} is a file")
    require_replaceable(out / "probe.json")
    for labels in tasks:
        require_replaceable(out / "predictions" / f"{labels.task}.parquet")


def _read_tasks(config: ProbeCommandSettings, dataset: MedsDataset) -> list[Labels]:
    folders = find_tasks(config.labels, config.data)
    tasks = [with_splits(read_labels(folder), dataset) for folder in folders]
    for labels in tasks:
        require_splits(labels, config.final)
    names = [labels.task for labels in tasks]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"`labels` must name each task once; `{name}` is there twice")
    return tasks if config.final else [without_held_out(labels) for labels in tasks]


def _matched_rows(
    labels: Labels, trained: Embeddings, untrained: Embeddings | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of both embeddings for each label row; -1 in both where either has none."""
    row_N = matched(labels, trained)
    if untrained is None:
        return row_N, row_N
    other_N = matched(labels, untrained)
    both_N = (row_N >= 0) & (other_N >= 0)
    if not both_N.any():
        raise ValueError(
            f"{untrained.path} must hold the nodes of {trained.path}; for {labels.task} they "
            "have none in common"
        )
    return np.where(both_N, row_N, -1), np.where(both_N, other_N, -1)


def _oracle(data: Path, labels: Labels, judged_on: str) -> dict[str, np.ndarray]:
    """Return scores for each row: those of the judged split, and nan elsewhere, as nothing is
    fitted."""
    file = data / "oracles" / labels.task / f"{judged_on}.parquet"
    if not file.is_file():
        return {}
    judged_N = labels.split_N == judged_on
    scores = read_oracle(file, labels.take(judged_N)) if judged_N.any() else {}
    full = {name: np.full(len(labels), np.nan) for name in scores}
    for name, score_J in scores.items():
        full[name][judged_N] = score_J
    return full


def _write_predictions(path: Path, judged: Labels, probability_J: np.ndarray | None) -> None:
    if judged.kind != "binary" or probability_J is None:
        return
    columns = [
        pa.array(judged.subject_N),
        pa.array(judged.time_N).cast(pa.timestamp("us")),
        pa.array(judged.binary_N),
        pa.array(probability_J >= 0.5),
        pa.array(probability_J),
    ]
    with committed_file(path, private=True) as staging:
        pq.write_table(pa.table(columns, schema=PREDICTIONS), staging)


def _protocol_text(config: ProbeCommandSettings) -> str:
    return (
        "Binary tasks: features scaled and L2 logistic regression fitted on train; penalty (half "
        "decades) by tuning log loss, ties to the stronger; probabilities calibrated on tuning by "
        "slope and intercept. Boosted trees: as many as give the least tuning log loss. "
        "Time to event: Cox regression fitted on train with a ridge on all scaled features, its "
        "penalty by tuning partial likelihood, Harrell's C. All metrics on "
        f"{'held_out' if config.final else 'tuning'}; 95 % intervals from {config.bootstraps} "
        f"resamples of patients ({config.cox_bootstraps} for C). Counts: age, sex and log(1 + "
        "count) of the codes seen in train, up to the prediction time. The untrained backbone has "
        "the read-out that was chosen for the trained one. Bayes filter = bound for any model."
    )


def _read_out(embeddings: Path) -> dict[str, Any]:
    """Return the pool of the embeddings and why a run chose it, as far as the file says."""
    origin = read_origin(embeddings) or {}
    return {"pool": origin.get("pool"), "choice": origin.get("pool_choice")}


def _readable(path: Path) -> dict[str, str]:
    """Return what the models are called in the table, by name."""
    own = f"smbfast, {path.stem} encoder" if path.stem in ("online", "target") else "smbfast"
    return {"smbfast": own, "smbfast_boosting": f"{own}, boosted trees"} | _READABLE
