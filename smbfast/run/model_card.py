"""The card of a model, README.md in its folder: what it is, made of what, how good, how to load it.

It is filled from the run, makes no claim, and is for people to edit: it lies outside the manifest.
Its head is metadata of the Hugging Face Hub. Counts are rounded to two digits, and none below a
hundred is in it; a figure stands in it only if more than ten patients have the outcome, and more
than ten have not.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

import smbfast
from smbfast.base.counts import FEW
from smbfast.base.digests import short
from smbfast.base.hub_names import is_repository
from smbfast.run.card_text import BODY, LORA, MERGED, WHOLE
from smbfast.settings import TrainSettings

CARD = "README.md"
NO_LICENSE = "not-decided"  # `license_name` until somebody has decided
_POOLS = {
    "last": "state of the last token",
    "mean": "mean of all tokens",
    "layers": "means of all tokens after every layer, side by side",
    "spread": "state of the last token beside mean, maximum and deviation of all tokens",
}
_COUNTED = ("subjects", "events", "tokens")
_METRICS = {  # what is shown of a task: what tuning fixes by construction is left out
    "binary": {"auroc": "AUROC", "auprc": "AUPRC", "brier": "Brier score"},
    "time_to_event": {
        "auc": "mean AUC over time",
        "c_uno": "Uno's C",
        "ibs": "integrated Brier score",
    },
}
_HUB_METRICS = {"auroc": "roc_auc", "auprc": "average_precision", "brier": "brier_score"}
_OWN = "smbfast"  # the trained model among those of a task


class _Figure(NamedTuple):
    """A figure of a task: `low` and `high` are the ends of its 95 % interval, None without one."""

    task: str
    kind: str
    key: str
    value: float
    low: float | None
    high: float | None
    rival: str
    patients: str

    @property
    def metric(self) -> str:
        return _METRICS[self.kind][self.key]

    @property
    def text(self) -> str:
        return _with_interval(self.value, self.low, self.high)


def model_card(
    record: dict,
    folder: Path,
    prepared: dict,
    best: dict,
    settings: TrainSettings,
    *,
    target: bool,
    probe: dict | None = None,
) -> str:
    """Return the card of a model as Markdown.

    Args:
        record: what `smbfast.json` holds.
        folder: of the model.
        prepared: the record of the token shards that it was trained on (prepare.json).
        best: step and loss of each phase's best evaluation.
        settings: of the run.
        target: whether the EMA teacher is stored beside it.
        probe: what `probe.json` of the run holds; None before the probes.
    """
    lora, backbone = record["trains"] == "lora", record["backbone"]
    local = backbone is not None and Path(backbone).is_absolute()
    name = Path(backbone).name if local else backbone or "made from scratch"
    counts = prepared["counts"].get("train", {})
    title = f"Patient model {folder.resolve().parent.name}/{folder.name}"
    figures, left_out = _figures(probe or {})
    judged_on = (probe or {}).get("judged_on", "tuning")
    body = _rendered(
        BODY,
        title=title,
        what=f"A LoRA adapter of {name}." if lora else f"A causal language model ({name}).",
        version=smbfast.__version__,
        step=record["step"],
        rows=_rows(record, name, target=target),
        data_digest=prepared["data"],
        counts=[(n, about(int(counts[n]))) for n in _COUNTED if n in counts],
        settings=_settings_rows(settings, lora=lora),
        losses=[(n, b["step"], f"{b['loss']:.4g}") for n, b in best.items()],
        figures=figures,
        verdicts=_verdicts(probe or {}, {figure.task for figure in figures}),
        left_out=left_out,
        judged_on=judged_on,
        num_looks=(probe or {}).get("num_looks", 0),
        folder=folder.name,
        moved=', path="BACKBONE_FOLDER"' if lora and local else "",
        plain=_rendered(LORA if lora else WHOLE, folder=folder.name),
    )
    data = ModelCardData(
        library_name="peft" if lora else "transformers",
        base_model=None if local else backbone,
        license="other",
        license_name=NO_LICENSE,
        tags=["smbfast", "ehr", "meds"],
        model_name=title.removeprefix("Patient model "),
        eval_results=_eval_results(figures, judged_on, prepared["data"]) or None,
    )
    return _card(data, body)


def merged_card(card: str, folder: Path) -> str:
    """Return the card of an adapter for the model that it was merged into.

    Args:
        card: that of the adapter, which people may have edited.
        folder: of the merged model.
    """
    content = ModelCard(card, ignore_metadata_errors=True)
    data, body = content.data, content.text.lstrip("\n")
    assert isinstance(data, ModelCardData)
    data.library_name = "transformers"
    use = "## How to use\n\n" + _rendered(MERGED, folder=folder.name) + "\n\n"
    body = re.sub(r"^## How to use\n.*?(?=^## |\Z)", lambda _: use, body, flags=re.S | re.M)
    return _card(data, body.replace("# Patient model", "# Merged patient model", 1))


def shared_card(
    card: str, folder: Path, name: str, record: dict, license: str | None
) -> tuple[str, bool]:
    """Return a card as it stands on the Hub, and whether it names a license that was decided.

    Args:
        card: that in the folder, which people may have edited.
        folder: of the model, whose name the card has where it says how to load it.
        name: of the repository, which takes its place.
        record: what `smbfast.json` holds there; empty without one.
        license: what the card is to name; None for what it says.

    Raises:
        ValueError: the head of the card is no YAML of the Hub.
    """
    try:
        content = ModelCard(card)
        data = content.data
        assert isinstance(data, ModelCardData)
    except Exception:  # of YAML, of the Hub's own rules
        raise ValueError(
            f"{folder / CARD} must begin with metadata of the Hub; it does not"
        ) from None
    if license is not None:
        data.license, data.license_name = license, None
    base = record.get("backbone")
    if base and is_repository(base):
        data.base_model = base
        content.text = content.text.replace(', path="BACKBONE_FOLDER"', "")
    text = re.sub(rf'(?<=")({re.escape(folder.name)})(?=")', name, content.text)
    text = text.replace(f"--model={folder.name} ", f"--model={name} ")
    if license is not None:
        text = re.sub(r"(?<=^## Licence\n\n)Not decided\. ", f"{license}. ", text, flags=re.M)
    is_licensed = data.license is not None and data.license_name != NO_LICENSE
    return _card(data, text.lstrip("\n")), is_licensed


def _card(data: ModelCardData, body: str) -> str:
    return f"---\n{data.to_yaml()}\n---\n\n{body.rstrip()}\n"


def _rendered(template: str, **values: Any) -> str:
    environment = Environment(
        undefined=StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(template).render(**values).rstrip("\n")


def _rows(record: dict, backbone: str, *, target: bool) -> list[tuple[str, str]]:
    """Return what the model is, as the rows of a table."""
    weights = "adapter" if record["trains"] == "lora" else "all trained"
    return [
        ("backbone", backbone),
        ("commit of the backbone", record.get("backbone_revision") or "none"),
        ("digest of the backbone", short(record.get("weights_digest"))),
        ("weights", f"{weights}, {record['dtype']}"),
        ("format of the records", f"{record['data_format']}, version {record['format']}"),
        ("context length", f"{record['window']} tokens"),
        ("embedding", _POOLS[record["pool"]]),
        ("EMA teacher", "stored beside it" if target else "none"),
    ]


def _settings_rows(settings: TrainSettings, *, lora: bool) -> list[tuple[str, str]]:
    """Return what decides about the weights: names of settings with their values."""
    objective, phases = settings.objective, []
    for phase in settings.phases:
        weights = {"SFT": phase.w_sft, "JEPA": phase.w_jepa, "codes to come": phase.w_codes}
        parts = [f"{name} x {weight:g}" for name, weight in weights.items() if weight]
        phases.append(f"{phase.name}: {phase.steps} steps of {' + '.join(parts)}")
    rows = [
        ("phases", "; ".join(phases)),
        ("windows of a step", f"{settings.optim.batch}"),
        ("learning rate", ", ".join(f"{p.lr:g}" for p in settings.phases if p.lr is not None)),
        ("JEPA", objective.jepa),
        ("seed", f"{settings.run.seed}"),
    ]
    if any(phase.w_jepa or phase.w_codes for phase in settings.phases):
        horizons = objective.horizons
        rows.append(("horizons", horizons if isinstance(horizons, str) else ", ".join(horizons)))
    if lora and not settings.model.adapter:
        own = settings.lora
        rows.append(("LoRA", f"rank {own.r}, alpha {own.alpha}, on {', '.join(own.targets)}"))
    elif lora:
        rows.append(("LoRA", "went on with an earlier adapter"))
    return [(name, value) for name, value in rows if value]


def _figures(probe: dict) -> tuple[list[_Figure], list[str]]:
    """Return what may be shown of the probes, and the tasks that have too few patients for that."""
    figures: list[_Figure] = []
    left_out: list[str] = []
    for task in probe.get("tasks", []):
        models = {model["name"]: model for model in task["models"] if model.get("metrics")}
        if _OWN not in models:
            continue
        if not _has_enough(task):
            left_out.append(task["task"])
            continue
        metrics, best = models[_OWN]["metrics"], models.get(task.get("best"))
        for key in _METRICS[task["kind"]]:
            cell = metrics.get(key) or {}
            if cell.get("value") is None:
                continue
            rival = (best or {}).get("metrics", {}).get(key) or {}
            shown = f"{_with_interval(**rival)}, {best['label']}" if best and rival else "none"
            patients = about(task["first"]["rows"])
            figures.append(
                _Figure(task["task"], task["kind"], key, **cell, rival=shown, patients=patients)
            )
    return figures, left_out


def _has_enough(task: dict) -> bool:
    """Whether more than ten judged patients have the outcome, and more than ten have not."""
    first = task.get("first") or {}
    rows, positives = first.get("rows"), first.get("positives")
    if not isinstance(rows, int) or not isinstance(positives, int):  # a small count is in words
        return False
    return min(positives, rows - positives) > FEW


def _with_interval(value: float, low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return f"{value:.3f}"
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _verdicts(probe: dict, tasks: set[str]) -> list[str]:
    """Return the verdicts of the tasks that are shown, worst first as the probes have them."""
    return [line["text"] for line in probe.get("headline", []) if line.get("task") in tasks]


def _eval_results(figures: Iterable[_Figure], judged_on: str, data: str) -> list[EvalResult]:
    """Return figures as the Hub shows them beside the card, with their intervals as arguments."""
    return [
        EvalResult(
            task_type="tabular-classification" if figure.kind == "binary" else "survival-analysis",
            task_name=figure.task,
            dataset_type="meds",
            dataset_name=f"MEDS data {data}",
            dataset_config=figure.task,  # the Hub joins what differs in its task's name alone
            dataset_split=judged_on,
            metric_type=_HUB_METRICS.get(figure.key, figure.key),
            metric_name=f"{figure.metric}, {judged_on} patients",
            metric_value=round(figure.value, 4),
            metric_args={
                "interval_95": [round(x, 4) for x in (figure.low, figure.high) if x is not None]
            },
        )
        for figure in figures
    ]


def about(count: int) -> str:
    """Return a count rounded to two digits, so that nobody is seen to enter or leave it."""
    if count < 100:
        return "fewer than 100"
    unit = 10 ** (len(str(count)) - 2)
    return f"about {(count + unit // 2) // unit * unit:,}"
