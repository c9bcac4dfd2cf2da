"""From the scores of all models to the record of a task: figures, intervals, paired differences.

Nothing is fitted here, so that out-of-fold predictions that were pooled are judged like those of
one split. The primary figure is of each patient's first node: a patient with many nodes counts
once, and how late a node is cannot stand in for what a model knows. Shape suffixes: J judged rows,
F rows that are first nodes, S versions of a model, H horizons, R replicates of a few-shot fit.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from smbfast.data.labels import Labels, splits_read
from smbfast.judging import measures
from smbfast.judging.estimates import LEAST_DRAWS, Cell, Estimate, estimates, num_draws, on_rows
from smbfast.judging.groups import Group, groups
from smbfast.judging.scored import Scored, Traits
from smbfast.statistics.resample import Metric

OWN, STACK = "smbfast", "stack"
_RIVALS = ("baseline", "beside")
_NONE: Cell = {"value": None, "low": None, "high": None}
Rows = Literal["first", "all"]
Key = tuple[str, str, Rows]  # model, metric, rows


@dataclass(frozen=True)
class Protocol:
    """The number of draws (`cox_bootstraps` for the secondary metrics of time to event), the seed,
    and the split that is judged."""

    bootstraps: int = 1000
    cox_bootstraps: int = 200
    seed: int = 0
    judged_on: Literal["tuning", "held_out"] = "tuning"

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that are read: held_out only where it is judged."""
        return splits_read(self.judged_on == "held_out")

    def draws(self, labels: Labels) -> int:
        """Return how many draws secondary metrics get; the primary one always has `bootstraps`, so
        that a p value can pass Holm's correction over many tasks."""
        asked = self.bootstraps if labels.kind == "binary" else self.cox_bootstraps
        return num_draws(asked, len(labels))


@dataclass(frozen=True)
class FewShot:
    """Scores float64 [R, J] of a model that was fitted to k rows of each class, in R replicates; k
    is "all" for the fit to all rows of train."""

    model: str
    k: int | Literal["all"]
    score_RJ: np.ndarray


def judge(
    judged: Labels,
    scored: list[Scored],
    traits: Traits,
    protocol: Protocol,
    *,
    horizons_H: tuple[float, ...] = (),
    few_shot: list[FewShot] | None = None,
    pairs: list[tuple[str, str]] | None = None,
) -> dict[str, Any]:
    """Return the record of a task.

    Args:
        judged: the judged rows alone; scored and traits are of these rows.
        horizons_H: days at which time to event is judged; chosen where nothing is judged.
        few_shot: of a binary task, or None if it was not asked for.
        pairs: names of models whose differences are given; None for the trained model and each
            other one, and the stack and each rival.

    Raises:
        ValueError: a model that is to be measured lacks a score.
    """
    record = outline(judged, traits, protocol, unmeasurable(judged, protocol.judged_on))
    if judged.kind != "binary":
        record["horizons_days"] = list(horizons_H)
        record["incidence"] = measures.incidence_curve(judged)
    record["models"] = [_about(model) for model in scored]
    if record["reason"]:
        return record
    task = _Task(judged, traits, protocol, horizons_H)
    usable = [model for model in scored if model.reason is None]
    for model in usable:
        if not np.isfinite(model.score_SN).all():
            raise ValueError(f"{model.name} must score every judged row of {judged.task}")
    estimated = task.estimates(usable)
    record["best"] = best = _best(usable, estimated, task.primary)
    _fill(record, task, usable, estimated)
    record["differences"] = list(
        _differences(estimated, _pairs(usable) if pairs is None else pairs)
    )
    beside = [model for model in usable if model.name in (OWN, best)]
    record["groups"] = task.groups(beside)
    record["few_shot"] = None if few_shot is None else task.few_shot(few_shot)
    return record


def outline(
    judged: Labels, traits: Traits, protocol: Protocol, reason: str | None
) -> dict[str, Any]:
    """Return the record of a task without any figure of a model; `reason` says why there is none,
    or is None."""
    true_J = measures.outcome(judged)
    first_J = traits.order_N == 0
    split = protocol.judged_on
    return {
        "task": judged.task,
        "kind": judged.kind,
        "rows": {split: len(judged)},
        "positives": {split: int(true_J.sum())},
        "patients": {split: len(np.unique(judged.subject_N))},
        "first": {"rows": int(first_J.sum()), "positives": int(true_J[first_J].sum())},
        "prevalence": float(true_J.mean()) if len(true_J) else None,
        "unmatched": 0,
        "reason": reason,
        "horizons_days": None,
        "competing": None,
        "draws": protocol.draws(judged),
        "models": [],
        "differences": [],
        "best": None,
        "groups": [],
        "few_shot": None,
        "incidence": None,
    }


def unmeasurable(judged: Labels, judged_on: str) -> str | None:
    """Return why nothing can be measured on the judged rows, or None."""
    true_J = measures.outcome(judged)
    if judged.kind == "binary":
        return None if len(np.unique(true_J)) == 2 else f"{judged_on} has one class only"
    if not true_J.any():
        return f"{judged_on} has no event"
    duration_J, event_J = judged.survival_N
    first = duration_J[event_J].min()
    outlives = (duration_J > first) | ((duration_J == first) & ~event_J)
    return None if outlives.any() else f"{judged_on} has no two rows that can be compared"


@dataclass(frozen=True)
class _Task:
    """The judged rows of a task, and how they are judged."""

    judged: Labels
    traits: Traits
    protocol: Protocol
    horizons_H: tuple[float, ...]

    @property
    def primary(self) -> str:
        return measures.PRIMARY[self.judged.kind]

    def primary_on(self, score_J: np.ndarray, rows: np.ndarray) -> Metric:
        """Return the primary metric of `rows` (indices), under weights of all judged rows."""
        own = measures.primary(self.judged.take(rows), score_J[rows], self.horizons_H)
        return on_rows(own, rows)

    def resampled(self, metrics: dict, most: int | None = None) -> dict:
        """Return estimates under the draws of secondary metrics, at most `most` of them."""
        draws = self.protocol.draws(self.judged)
        draws = draws if most is None else min(draws, most)
        return estimates(metrics, self.judged.subject_N, draws, self.protocol.seed)

    def estimates(self, usable: list[Scored]) -> dict[Key, Estimate]:
        """Return the primary metric on first nodes, and every metric on all judged rows."""
        first_F = np.flatnonzero(self.traits.order_N == 0)
        first = self.judged.take(first_F)
        deciding: dict[Key, list[Metric]] = {}
        metrics: dict[Key, list[Metric]] = {}
        for model in usable:
            for version, score_J in enumerate(model.score_SN):
                own = measures.primary(first, score_J[first_F], self.horizons_H)
                deciding.setdefault((model.name, self.primary, "first"), []).append(own)
                chance = None if model.chance_SNH is None else model.chance_SNH[version]
                every = measures.metrics(self.judged, score_J, chance, self.horizons_H)
                for metric, compute in every.items():
                    metrics.setdefault((model.name, metric, "all"), []).append(compute)
        protocol = self.protocol
        decided = estimates(deciding, first.subject_N, protocol.bootstraps, protocol.seed)
        fitted = {key: own for key, own in metrics.items() if key[1] in measures.FITTED}
        quick = {key: own for key, own in metrics.items() if key not in fitted}
        return decided | self.resampled(quick) | self.resampled(fitted, LEAST_DRAWS)

    def groups(self, models: list[Scored]) -> list[dict[str, Any]]:
        """Return the primary figure of the trained model and the best rival in groups of rows."""
        true_J, binary = measures.outcome(self.judged), self.judged.kind == "binary"
        made = groups(self.traits)
        subject_J = self.judged.subject_N
        reasons = [group.reason(true_J, subject_J, binary) for group in made]
        metrics = {
            (model.name, at): [
                self.primary_on(score_J, np.flatnonzero(group.member_J))
                for score_J in model.score_SN
            ]
            for at, (group, reason) in enumerate(zip(made, reasons, strict=True))
            for model in models
            if reason is None
        }
        estimated = self.resampled(metrics)
        return [
            self._group(
                group, reason, {m.name: estimated[m.name, at] for m in models if not reason}
            )
            for at, (group, reason) in enumerate(zip(made, reasons, strict=True))
        ]

    def _group(self, group: Group, reason: str | None, own: dict[str, Estimate]) -> dict[str, Any]:
        rival = next((name for name in own if name != OWN), None)
        paired = OWN in own and rival is not None
        return {
            "by": group.by,
            "name": group.name,
            "rows": int(group.member_J.sum()),
            "positives": int(measures.outcome(self.judged)[group.member_J].sum()),
            "reason": reason,
            "models": {name: estimate.cell() for name, estimate in own.items()},
            "difference": (own[OWN] - own[str(rival)]).cell() if paired else None,
        }

    def few_shot(self, fits: list[FewShot]) -> list[dict[str, Any]]:
        """Return the primary figure on first nodes of every few-shot fit, the mean over
        replicates."""
        first_F = np.flatnonzero(self.traits.order_N == 0)
        metrics = {
            (fit.model, fit.k): [self.primary_on(score_J, first_F) for score_J in fit.score_RJ]
            for fit in fits
        }
        estimated = self.resampled(metrics)
        return [{"model": m, "k": k, **own.cell()} for (m, k), own in estimated.items()]


def _about(model: Scored) -> dict[str, Any]:
    about: dict[str, Any] = {
        "name": model.name,
        "label": model.label,
        "role": model.role,
        "versions": len(model.score_SN),
        "metrics": {},
        "primary": dict(_NONE),
        "chosen": model.chosen,
        "curve": [],
    }
    return about | ({} if model.reason is None else {"reason": model.reason})


def _fill(
    record: dict[str, Any], task: _Task, usable: list[Scored], estimated: dict[Key, Estimate]
) -> None:
    """Enter the figures of the models into their records."""
    scores = {model.name: model for model in usable}
    for about in record["models"]:
        if about["name"] not in scores:
            continue
        model = scores[about["name"]]
        about["metrics"] = {
            metric: estimate.cell()
            for (name, metric, rows), estimate in estimated.items()
            if name == model.name and rows == "all"
        }
        about["primary"] = estimated[model.name, task.primary, "first"].cell()
        if task.judged.kind == "binary" or model.role == "own" or model.name == record["best"]:
            about["curve"] = measures.curve(task.judged, model, task.horizons_H)


def _pairs(usable: list[Scored]) -> list[tuple[str, str]]:
    """Return the trained model with every other model, and the stack with every rival."""
    roles = {model.name: model.role for model in usable}
    pairs = [(OWN, name) for name in roles if name != OWN and OWN in roles]
    return pairs + [(STACK, name) for name in roles if STACK in roles and roles[name] in _RIVALS]


def _differences(
    estimated: dict[Key, Estimate], pairs: list[tuple[str, str]]
) -> Iterator[dict[str, Any]]:
    """Yield the first model of each pair less the second, in every metric that both have."""
    for one, other in pairs:
        for (name, metric, rows), estimate in estimated.items():
            if name == one and (other, metric, rows) in estimated:
                gap = estimate - estimated[other, metric, rows]
                named = {"model": one, "against": other, "metric": metric, "rows": rows}
                yield named | gap.cell() | {"p": gap.p()}


def _best(usable: list[Scored], estimated: dict[Key, Estimate], primary: str) -> str | None:
    """Return the rival with the best primary figure on the judged first nodes."""
    values = {
        model.name: estimated[model.name, primary, "first"].value
        for model in usable
        if model.role in _RIVALS
    }
    values = {name: value for name, value in values.items() if np.isfinite(value)}
    return max(values, key=lambda name: values[name]) if values else None
