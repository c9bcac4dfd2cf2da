"""The predicted risk of one patient over time, for a page: of a simulated one, or one asked for.

At each moment the embedding sees what was known by then, and the risk functions that the probe has
fitted make probabilities of it. A run of a simulated cohort does this at its end for one patient,
by a rule that looks at outcomes of tuning alone and at no prediction. Real patients are asked for
by id, and never those of held_out.

Legend: K moments, N events, D width, H horizons.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoTokenizer

from smbfast.base.config import build, read_toml
from smbfast.base.files import committed_file, legal
from smbfast.base.ours import require_patient_page
from smbfast.base.runtime import choose_device
from smbfast.data.formats import PatientSerializer, read_encoding, serializer_of
from smbfast.data.labels import Labels, find_tasks, read_labels, with_splits
from smbfast.data.meds import BIRTH, STATIC, EventBatch, MedsDataset
from smbfast.data.nodes import node_texts, sorted_nodes, split_index
from smbfast.data.sections import SECTIONS, SectionMap
from smbfast.judging.risk_function import RiskFunction, read_risk_functions
from smbfast.probing.embedding import Model, Task, embed_tasks, packed_of
from smbfast.probing.embedding_file import EmbeddingTable
from smbfast.reporting.risk import patient_page
from smbfast.run.checkpoint import restore_final
from smbfast.run.matmul import recorded
from smbfast.run.open_run import OpenRun
from smbfast.run.origin import origin_of
from smbfast.settings import Pool, TrainSettings

FILE = "risk.json"
_MOST = 60  # moments of one patient: of more, those at the ends of months; our choice
_DAY = 86_400_000_000  # microseconds
_TRAINED_ON = ("train", "tuning")  # splits of the shards that a run makes
_TEXT = 48  # characters of a text value that the page shows
_OF_SIMULATED = (
    "of the simulated tuning patients who had the outcome of the first task that any had, the one "
    "with the most days of events, of equal ones that with the least id; no prediction was looked "
    "at for it"
)


@dataclass(frozen=True)
class Scorer:
    """What embeds a patient as the probe's embeddings were made.

    record: of the model, for its window, section rules and options.
    """

    model: Model
    serializer: PatientSerializer
    pool: Pool
    device: torch.device
    record: dict[str, Any]

    def embed(self, dataset: MedsDataset, subject: int, time_K: np.ndarray, split: str) -> Any:
        """Return which moments can be embedded, int64 [M], and their embeddings, float32 [M, D]."""
        split_K = split_index(np.full(len(time_K), split))
        nodes = sorted_nodes(np.full(len(time_K), subject), time_K, split_K)
        sink = EmbeddingTable(nodes)
        texts = node_texts(dataset, self.serializer, nodes, self.record["window"], {})
        tasks = iter([Task([({self.pool: sink}, self.model)], texts)])
        embed_tasks(
            tasks, self.device, tokens=16384, stopped=Event(), progress=lambda _number: None
        )
        return sink.written()


def write_simulated(
    run: OpenRun, model: Model, dataset: MedsDataset, tasks: Sequence[Labels]
) -> None:
    """Write `risk.json` of one simulated patient into the folder of a run that was probed.

    Real data, and a run whose probes could not be measured, get none.

    Args:
        model: that was probed. tasks: their labels, with splits.
    """
    if run.settings.data.path is not None:
        return
    functions, _ = read_risk_functions(run.folder)
    subject = chosen_subject(dataset, tasks)
    if subject is None or not functions:
        return
    record = json.loads((run.folder / "final" / "smbfast.json").read_text())
    serializer = run.prepared.serializer(dataset)
    scorer = Scorer(model, serializer, record["pool"], run.device, record)
    about = {"simulated": True, "rule": _OF_SIMULATED}
    risk = about | patient_risk(dataset, subject, "tuning", scorer, functions, tasks)
    with committed_file(run.folder / FILE, private=True) as staging:
        staging.write_text(json.dumps(legal(risk), indent=1) + "\n", encoding="utf-8")


def chosen_subject(dataset: MedsDataset, tasks: Sequence[Labels]) -> int | None:
    """Return the patient of tuning that a report shows, or None where no task has one.

    Of those with the outcome of the first task that any has (without one, of all with a label), it
    is the one with the most days of events, of equal ones that with the least id.
    """
    tuning = [task.take(task.split_N == "tuning") for task in tasks]
    options = [task.subject_N[_happened(task)] for task in tuning]
    options += [task.subject_N for task in tuning]
    wanted = next((own for own in options if len(own)), None)
    if wanted is None:
        return None
    best: tuple[int, int] | None = None
    for batch in dataset.batches("tuning", wanted, text_chars=1):
        for start, end in zip(batch.offset_S1[:-1], batch.offset_S1[1:], strict=True):
            own = batch.rows(np.arange(start, end), np.array([0, end - start]))
            days = len(np.unique(own.time_N[_timed(own)] // _DAY))
            best = max(best or (-1, 0), (days, -int(own.subject_N[0])))
    return None if best is None else -best[1]


def patient_risk(
    dataset: MedsDataset,
    subject: int,
    split: str,
    scorer: Scorer,
    functions: dict[str, RiskFunction],
    tasks: Sequence[Labels],
) -> dict[str, Any]:
    """Return the risks of a patient over time, and their events, as JSON values.

    Args:
        split: of the patient. Outcomes are of tuning alone: those of train were fitted to.
        functions: by task. tasks: labels of these tasks, with splits.

    Raises:
        ValueError: the patient has no event with a time before the end of their record, or an
            embedding is not of the width that was probed.
    """
    batch = next(dataset.batches(split, np.array([subject])))
    end = _end(batch, scorer.record["options"].get("terminal") or [])
    time_K = _moments(batch, end)
    if not len(time_K):
        raise ValueError(
            "`patient` must have an event with a time, before the end of their record; this one "
            "has none"
        )
    at_M, vector_MD = scorer.embed(dataset, subject, time_K, split)
    known = {task.task: task for task in tasks if split == "tuning"}
    shown = []
    for name, function in functions.items():
        days = function.horizons_H
        place = len(days) // 2  # the horizon whose calibration the report shows
        risk_M = function.probability(vector_MD)[:, place]
        own = _outcomes(known.get(name), subject, days[place] if days else None)
        shown.append({"task": name, "days": days[place] if days else None, **own})
        shown[-1]["risk"] = risk_M.tolist()
    return {
        "subject": subject,
        "split": split,
        "moments": _texts(time_K[at_M]),
        "tasks": shown,
        "end": None if end is None else _texts(np.array([end]))[0],
        **_events(batch, dataset, SectionMap(**scorer.record["section_rules"])),
    }


def write_patient(
    folder: Path,
    subject: int,
    command: str,
    *,
    out: Path | None = None,
    data: Path | None = None,
) -> Path:
    """Write the page of one patient of train or tuning and return its path.

    Args:
        folder: of a finished run that was probed.
        command: that asked for it.
        out: the page, readable by its owner alone; None for `patient.html` in the folder.
        data: the dataset, if it is no longer where it was.

    Raises:
        ValueError: the run was not probed or its final model is not the one that was, the data are
            not there or others, the patient is not of train or tuning, or `out` is of others.
    """
    if not folder.is_dir():
        raise ValueError(f"run must be the folder of a training run, got {folder}: no such folder")
    out = out or folder / "patient.html"
    require_patient_page(out)
    functions, origin = read_risk_functions(folder)
    if not functions:
        raise ValueError(f"{folder} must have a probed task; no task of its probe was measured")
    settings = _settings(folder)
    path = data or Path(settings.data.path or folder / settings.cohort.folder_name)
    dataset = MedsDataset.open(path, split=settings.data.split)
    if data is not None:
        _require_same_data(dataset, folder, settings)
    split = _split_of(dataset, subject)
    scorer = final_scorer(folder, settings, dataset, origin)
    tasks = _labels(settings, path, dataset, list(functions)) if split == "tuning" else []
    with recorded(scorer.record.get("matmul"), scorer.device):
        risk = patient_risk(dataset, subject, split, scorer, functions, tasks)
    risk |= {"simulated": settings.data.path is None, "rule": "asked for by id"}
    page = patient_page(risk, folder.resolve().name, command)
    with committed_file(out, private=True) as staging:
        staging.write_bytes(page.encode("utf-8", errors="replace"))
    return out


def final_scorer(
    folder: Path, settings: TrainSettings, dataset: MedsDataset, origin: dict[str, Any]
) -> Scorer:
    """Load the final model of a run as it was probed.

    Args:
        origin: of the embeddings that were probed.

    Raises:
        ValueError: they are of another model, or it cannot be loaded.
    """
    final, pool = folder / "final", origin.get("pool")
    encoder: Literal["online", "target"] = "online"
    if origin.get("encoder") == "target":
        encoder = "target"
    if pool is None or origin_of(final, encoder, pool)["model"] != origin.get("model"):
        raise ValueError(
            f"{folder} must be probed with its final model, whose risks are shown; the probe there "
            "is of another one"
        )
    device = choose_device(settings.run.device)
    online, target, record = restore_final(final, device)
    tokenizer = AutoTokenizer.from_pretrained(final, local_files_only=True)
    serializer = serializer_of(dataset, read_encoding(final, tokenizer, record), record)
    model = Model(packed_of(online, target, encoder, settings.objective.path))
    return Scorer(model, serializer, pool, device, record)


def _settings(folder: Path) -> TrainSettings:
    config = folder / "config.toml"
    if not config.is_file():
        raise ValueError(f"run must be the folder of a training run, got {folder}: no config.toml")
    return build(TrainSettings, read_toml(config), [])


def _require_same_data(dataset: MedsDataset, folder: Path, settings: TrainSettings) -> None:
    """Raise ValueError where a dataset that was moved is not the one of the run: its splits would
    not say who was held out."""
    record = json.loads((folder / "final" / "smbfast.json").read_text())
    shards = Path(settings.data.prepared or folder / "prepared") / "prepare.json"
    splits = json.loads(shards.read_text())["splits"] if shards.is_file() else _TRAINED_ON
    trained_on = record.get("data_digest")
    missing = [split for split in splits if split not in dataset.splits]
    if trained_on is not None and (missing or dataset.digest(splits) != trained_on):
        raise ValueError(
            f"`data` must be the dataset of the run, with the fingerprint {trained_on}, in which "
            f"held_out has the same patients; {dataset.path} is another"
        )


def _split_of(dataset: MedsDataset, subject: int) -> str:
    split = next((s for s in dataset.splits if subject in dataset.subjects(s)), None)
    if split in ("train", "tuning"):
        return split
    where = "no subject has this id" if split is None else f"this one is of {split or 'no split'}"
    raise ValueError(
        f"`patient` must be the id of a subject of train or tuning in {dataset.path}; {where}"
    )


def _labels(
    settings: TrainSettings, path: Path, dataset: MedsDataset, names: list[str]
) -> list[Labels]:
    """Return the labels of the tasks that were probed, as far as they are still there."""
    try:
        folders = find_tasks(settings.probe.labels or [], path)
    except ValueError:
        return []
    tasks = [with_splits(read_labels(folder), dataset) for folder in folders]
    return [task for task in tasks if task.task in names]


def _timed(batch: EventBatch) -> np.ndarray:
    """Return which events have a time and are no birth, bool [N]."""
    birth_C = np.array([code == BIRTH for code in batch.codes], bool)
    return (batch.time_N != STATIC) & ~birth_C[batch.code_N]


def _end(batch: EventBatch, terminal: Sequence[str]) -> int | None:
    """Return the time of the first event that ends a record, or None."""
    ends_C = np.array([code in terminal for code in batch.codes], bool)
    time_E = batch.time_N[_timed(batch) & ends_C[batch.code_N]]
    return int(time_E.min()) if len(time_E) else None


def _moments(batch: EventBatch, end: int | None) -> np.ndarray:
    """Return the time of the last event of each day before the end; of many days, of each month,
    and of many months some evenly spaced, the last among them."""
    time_N = np.unique(batch.time_N[_timed(batch)])
    time_N = time_N if end is None else time_N[time_N < end]
    for unit in ("D", "M"):
        stamp_N = time_N.astype("datetime64[us]").astype(f"datetime64[{unit}]").astype(np.int64)
        time_K = time_N[np.append(stamp_N[1:] != stamp_N[:-1], True)] if len(time_N) else time_N
        if len(time_K) <= _MOST:
            return time_K
    return time_K[np.unique(np.linspace(0, len(time_K) - 1, _MOST).round().astype(int))]


def _happened(labels: Labels) -> np.ndarray:
    return labels.binary_N if labels.kind == "binary" else labels.survival_N[1]


def _outcomes(labels: Labels | None, subject: int, days: float | None) -> dict[str, Any]:
    """Return the outcome at each label of a patient (None where it was censored before), and when
    the event came, where the labels say it."""
    if labels is None:
        return {"labels": [], "event": None}
    own = labels.take(labels.subject_N == subject)
    times = _texts(own.time_N)
    if days is None:
        values: list[bool | None] = own.binary_N.tolist()
        return {"labels": _pairs(times, values), "event": None}
    duration_N, event_N = own.survival_N
    values = [
        True if happens and lasts <= days else False if lasts > days else None
        for lasts, happens in zip(duration_N.tolist(), event_N.tolist(), strict=True)
    ]
    came_N = own.time_N[event_N] + (duration_N[event_N] * _DAY).astype(np.int64)
    return {
        "labels": _pairs(times, values),
        "event": _texts(came_N[:1])[0] if len(came_N) else None,
    }


def _pairs(times: list[str], values: list[bool | None]) -> list[dict[str, Any]]:
    return [{"time": t, "value": v} for t, v in zip(times, values, strict=True)]


def _events(batch: EventBatch, dataset: MedsDataset, rules: SectionMap) -> dict[str, Any]:
    """Return the times of the events of each section, and the events of each day in words."""
    timed = np.flatnonzero(_timed(batch))
    section_C = [rules(code, list(dataset.parents.get(code, ())))[0] for code in batch.codes]
    times: dict[str, list[str]] = {}
    days: dict[str, list[str]] = {}
    for row, time in zip(timed.tolist(), _texts(batch.time_N[timed]), strict=True):
        times.setdefault(SECTIONS[section_C[batch.code_N[row]]], []).append(time)
        days.setdefault(time[:10], []).append(_words(batch, dataset, row))
    return {
        "events": [{"section": name, "times": own} for name, own in times.items()],
        "days": [{"day": day, "events": own} for day, own in days.items()],
    }


def _words(batch: EventBatch, dataset: MedsDataset, row: int) -> str:
    code = batch.codes[batch.code_N[row]]
    words = dataset.descriptions.get(code) or code
    if np.isfinite(batch.value_N[row]):
        return f"{words} {batch.value_N[row]:.4g}"
    if batch.text_N[row] >= 0:
        return f"{words} {batch.texts[batch.text_N[row]][:_TEXT]}"
    return words


def _texts(time_N: np.ndarray) -> list[str]:
    """Return times as ISO 8601, to the second."""
    return [str(t) for t in time_N.astype("datetime64[us]").astype("datetime64[s]")]
