"""What the page says of probe.json: verdicts first, then a table of tasks, then each task.

The record is read as any JSON, so that a damaged one is shown as far as it goes.
"""

import math
import re
from dataclasses import dataclass

from smbfast.base.held_out import num_looks, times
from smbfast.reporting import comparisons
from smbfast.reporting.cells import count, interval, mapping, mappings, numbers, part, tells
from smbfast.reporting.comparisons import Curve, Estimate, look_of, written
from smbfast.reporting.html import plots
from smbfast.reporting.runlog import Finding, Record, Run, number

OWN, STACK = "smbfast", "stack"
_METRICS = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "brier": "Brier score",
    "brier_skill": "Brier skill",
    "slope": "calibration slope",
    "intercept": "calibration intercept",
    "auc": "mean AUC over time",
    "c_uno": "Uno's C",
    "c_harrell": "Harrell's C",
    "ibs": "integrated Brier score",
}
_LOWER = ("brier", "ibs")  # lower is better, also of a horizon
_NEITHER = ("slope", "intercept")  # best at 1 and 0
_BY_CONSTRUCTION = _NEITHER  # on tuning, by which probabilities were calibrated
_PRIMARY = {"binary": "auroc", "time_to_event": "auc"}
_KINDS = {"binary": "yes or no within the horizon", "time_to_event": "time to event"}
_BY = {
    "node": "by node",
    "events": "by number of past events",
    "sex": "by sex",
    "age": "by age",
}
_LEVELS = {"worse": "bad", "better": "good", "undecided": "unknown", "unmeasured": "unknown"}
_WORDS = {"unmeasured": "not measured"}
_ROLES = ("own", "baseline", "beside", "oracle")


@dataclass(frozen=True)
class Verdict:
    """One sentence of the headline.

    level: "bad" for a loss or a figure below chance, "good" for a win, else "unknown".
    """

    task: str
    level: str
    word: str
    text: str
    below_chance: bool


def judged_on(run: Run) -> str:
    """Return the split whose figures the probes give; earlier versions judged on held_out alone."""
    return "tuning" if (run.probe or {}).get("judged_on") == "tuning" else "held_out"


def view(run: Run, *, final: bool) -> Record:
    """Return what the template shows of the probes.

    Args:
        final: whether to show figures of held-out patients.
    """
    hidden = judged_on(run) == "held_out" and not final
    probe = {} if hidden else run.probe or {}
    old = bool(probe) and not isinstance(probe.get("headline"), list)
    verdicts = [] if old else [_verdict(item) for item in mappings(probe.get("headline"))]
    tasks = [] if old else mappings(probe.get("tasks"))
    primary = {**_PRIMARY, **{k: str(v) for k, v in mapping(probe.get("primary")).items()}}
    order, notes = [verdict.task for verdict in verdicts], probe.get("notes")
    # as the headline has them, worst first
    tasks.sort(key=lambda t: order.index(n) if (n := str(t.get("task"))) in order else len(order))
    links = {str(task.get("task")): f"task-{i}" for i, task in enumerate(tasks)}
    return {
        "alarms": [verdict for verdict in verdicts if verdict.below_chance],
        # of the others, those that stand with no task below
        "verdicts": [v for v in verdicts if not v.below_chance and v.task not in links],
        "judges": _judges(run, hidden) if run.probe else None,
        "old": old,
        "judged_on": judged_on(run).replace("_", "-"),
        "summary": [
            {**_summary(item), "link": links.get(str(item.get("task")))}
            for item in mappings(probe.get("headline"))
            if tasks
        ],
        "tasks": [
            {
                "verdict": next((v for v in verdicts if v.task == str(task.get("task"))), None),
                **_task(task, i, primary, judged_on(run)),
            }
            for i, task in enumerate(tasks)
        ],
        "oracles": any(
            model.get("role") == "oracle"
            for task in tasks
            for model in mappings(task.get("models"))
        ),
        "notes": [str(note) for note in notes] if isinstance(notes, list) and not old else [],
        "protocol": "" if old else str(probe.get("protocol") or ""),
    }


def _verdict(item: Record) -> Verdict:
    below = item.get("below_chance") is True
    word = str(item.get("verdict"))
    return Verdict(
        task=str(item.get("task")),
        level="bad" if below else _LEVELS.get(word, "unknown"),
        word="below chance" if below else _WORDS.get(word, word),
        text=re.sub(r"(?<!\w)-(?=\d)", "−", str(item.get("text"))),
        below_chance=below,
    )


def _summary(item: Record) -> Record:
    difference, p = interval(item.get("difference")), number(item.get("p_holm"))
    value, rival = number(item.get("value")), number(item.get("rival"))
    nothing = (math.nan, math.nan)
    return {
        "verdict": _verdict(item),
        "metric": _METRICS.get(str(item.get("metric")), str(item.get("metric"))),
        "value": written((value, *nothing)),
        "rival": written((rival, *nothing)),
        "against": str(item.get("label") or item.get("against") or ""),
        "difference": written(difference, signed=True),
        "p": f"{p:.3f}" if math.isfinite(p) else "–",
    }


def _judges(run: Run, hidden: bool) -> Finding:
    """Say whose figures these are, and how often held-out patients were looked at."""
    looks = num_looks(run.path)
    seen = f" Held-out patients were looked at {times(looks)} in this run." if looks else ""
    if hidden:
        return Finding(
            "unknown",
            "The probes were judged on held-out patients, and their figures are not shown here: "
            f"python -m smbfast.report --run={run.path} --final shows them, and is counted.{seen}",
        )
    if judged_on(run) == "held_out":
        return Finding(
            "warn" if looks > 1 else "good",
            f"Judged on held-out patients, who were looked at {times(looks)} in this run. "
            "Figures of patients who were looked at once are worth most.",
        )
    return Finding(
        "unknown",
        "Judged on tuning patients, on whom penalty, read-out and calibration were chosen: new "
        "patients will be predicted somewhat worse. Slope 1 and intercept 0 of calibration are by "
        "construction there, and left out; weights of the stack were fitted on these very rows, in "
        f"its favour. --final judges on held-out patients.{seen}",
    )


def _task(task: Record, place: int, primary: dict[str, str], split: str) -> Record:
    models = sorted(
        mappings(task.get("models")),
        key=lambda m: _ROLES.index(m["role"]) if m.get("role") in _ROLES else 1,
    )
    hidden = _BY_CONSTRUCTION if split == "tuning" else ()
    about = _About(task, models, primary.get(str(task.get("kind")), ""), f"task-{place}", hidden)
    shares = [about.calibration(), about.incidence()]
    clear = tells(*(mapping(task.get(key)).get(split) for key in ("positives", "rows")))
    measured = [model for model in models if math.isfinite(interval(model.get("primary"))[0])]
    return {
        "id": about.id,
        "name": str(task.get("task")),
        "kind": _KINDS.get(str(task.get("kind")), str(task.get("kind"))),
        "reason": task.get("reason"),
        "facts": _facts(task, split),
        "forests": plots([about.values(measured), about.differences(), about.groups()]),
        "curves": plots([*(shares if clear else []), about.few_shot()]),
        "undrawn": bool(measured) and not clear,
        "unmeasured": [
            f"{_label(model)} ({model.get('reason')})" for model in models if model.get("reason")
        ],
        **about.table(measured),
        "best": about.names.get(about.best, ""),
        "pairs": about.pairs(),
        "group_rows": about.group_rows(),
    }


def _facts(task: Record, split: str) -> list[str]:
    event = "with the event" if task.get("kind") == "time_to_event" else "positive"
    rows, positives = mapping(task.get("rows")), mapping(task.get("positives"))
    patients = mapping(task.get("patients"))
    facts = []
    for name in [split, *(name for name in rows if name != split)]:
        if name not in rows:
            continue
        words = f"{name.replace('_', ' ')}: {count(rows[name])} rows"
        if name in patients:
            words += f" of {count(patients[name])} patients"
        shown = part(positives.get(name), rows[name])
        words += f", {shown} {event}"
        prevalence = number(task.get("prevalence"))
        if name == split and math.isfinite(prevalence) and shown.replace(",", "").isdigit():
            words += f" ({prevalence:.1%})"
        facts.append(words)
    if first := mapping(task.get("first")):
        shown = part(first.get("positives"), first.get("rows"))
        facts.append(f"first nodes, judged: {count(first.get('rows'))} rows, {shown} {event}")
    if horizons := numbers(task.get("horizons_days")):
        facts.append(f"horizons: {', '.join(f'{days:,.4g}' for days in horizons)} days")
    if task.get("competing"):
        facts.append(f"competing event: {task['competing']}")
    if task.get("unmatched"):
        facts.append(f"{count(task['unmatched'])} labels without an embedding")
    return facts


def _label(model: Record) -> str:
    label = str(model.get("label") or model.get("name"))
    versions = number(model.get("versions"))
    return f"{label} (mean of {versions:.0f})" if versions > 1 else label


@dataclass(frozen=True)
class _About:
    """The plots and tables of one task; `models` in the order in which they are shown, `hidden`
    the metrics that are not."""

    task: Record
    models: list[Record]
    primary: str
    id: str
    hidden: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return _METRICS.get(self.primary, self.primary)

    @property
    def best(self) -> str:
        return str(self.task.get("best"))

    @property
    def names(self) -> dict[str, str]:
        return {str(model.get("name")): _label(model) for model in self.models}

    def metric(self, key: str) -> str:
        """Return the name of a metric, with the days of its horizon."""
        stem, _, place = key.rpartition("_")
        days = numbers(self.task.get("horizons_days"))
        if stem in ("auc", "brier") and place.isdigit() and int(place) < len(days):
            return f"{'AUC' if stem == 'auc' else 'Brier'} at {days[int(place)]:,.4g} d"
        return _METRICS.get(key, key)

    def values(self, measured: list[Record]) -> str | None:
        rows = [
            Estimate(_label(model), interval(model.get("primary")), str(model.get("role")))
            for model in measured
        ]
        # the best of each role first; sorting keeps the roles' order
        rows.sort(key=lambda row: (_place(row.look), -row.value[0]))
        title, unit = f"{self.title} of each model", f"{self.title} (0.5, dashed: chance)"
        return comparisons.forest(f"{self.id}-values", rows, title=title, unit=unit, level=0.5)

    def differences(self) -> str | None:
        rows = [
            Estimate(self.names.get(str(item.get("against")), "?"), value, look_of(value))
            for item in mappings(self.task.get("differences"))
            if (item.get("model"), item.get("metric")) == (OWN, self.primary)
            and item.get("rows") == "first"
            for value in [interval(item)]
        ]
        rows.sort(key=lambda row: row.value[0] if math.isfinite(row.value[0]) else math.inf)
        unit = f"difference in {self.title} (filled: the interval excludes 0)"
        return comparisons.forest(
            f"{self.id}-differences",
            rows,
            title="smbfast minus this model",
            unit=unit,
            level=0.0,
            signed=True,
        )

    def groups(self) -> str | None:
        rows = [
            Estimate(str(group.get("name")), value, look_of(value), _by(group))
            for group in mappings(self.task.get("groups"))
            for value in [interval(group.get("difference"))]
        ]
        title = f"Groups: smbfast minus {self.names.get(self.best, 'the best rival')}"
        unit = f"difference in {self.title}, all nodes of the group"
        return comparisons.forest(
            f"{self.id}-groups", rows, title=title, unit=unit, level=0.0, signed=True
        )

    def calibration(self) -> str | None:
        curves = []
        for model in self.models:
            if bins := mappings(model.get("curve")) * (model.get("name") in (OWN, self.best)):
                x, y, low, high = (
                    [number(item.get(key)) for item in bins]
                    for key in ("predicted", "observed", "low", "high")
                )
                curves.append(Curve(_label(model), x, y, low, high))
        return comparisons.calibration(f"{self.id}-calibration", curves)

    def incidence(self) -> str | None:
        record = mapping(self.task.get("incidence"))
        days, event = numbers(record.get("days")), numbers(record.get("event"))
        competing = numbers(record.get("competing"))
        if len(event) != len(days):
            return None
        curves = [(str(self.task.get("task")), event)]
        if competing and len(competing) == len(days):
            curves.append((str(self.task.get("competing") or "competing event"), competing))
        return comparisons.incidence(f"{self.id}-incidence", days, curves)

    def few_shot(self) -> str | None:
        items = mappings(self.task.get("few_shot"))
        counted = sorted({int(k) for i in items if math.isfinite(k := number(i.get("k")))})
        if not counted:
            return None
        # all rows stand one doubling behind the largest number
        ticks = [*((k, str(k)) for k in counted), (2 * counted[-1], "all")]
        curves = []
        for name in dict.fromkeys(str(item.get("model")) for item in items):
            own = [item for item in items if str(item.get("model")) == name]
            x = [ticks[-1][0] if i.get("k") == "all" else number(i.get("k")) for i in own]
            rows = sorted(zip(x, (interval(item) for item in own), strict=True))
            value, low, high = zip(*(row[1] for row in rows), strict=True)
            label = self.names.get(name, name)
            curves.append(Curve(label, [row[0] for row in rows], value, low, high))
        return comparisons.curve(
            f"{self.id}-few-shot",
            curves,
            title="Few labels",
            x="training rows of each class",
            y=self.title,
            level=(0.5, "chance"),
            ticks=ticks,
            log=True,
        )

    def table(self, measured: list[Record]) -> Record:
        """Return the columns of the table of all metrics, and its rows."""
        known = [key for model in measured for key in mapping(model.get("metrics"))]
        known = [key for key in known if key not in self.hidden]
        keys = [key for key in dict.fromkeys([self.primary, *_METRICS, *known]) if key in known]
        rows = [
            {
                "label": _label(model),
                "own": model.get("name") == OWN,
                "oracle": model.get("role") == "oracle",
                "cells": [
                    written(interval(model.get("primary"))),
                    *(written(interval(mapping(model.get("metrics")).get(key))) for key in keys),
                ],
            }
            for model in measured
        ]
        columns = [f"{self.title}, first nodes", *(self.metric(key) for key in keys)]
        return {"columns": columns if rows else [], "rows": rows}

    def pairs(self) -> list[Record]:
        """Return every difference of our models to the best rival."""
        rows = []
        for item in mappings(self.task.get("differences")):
            if item.get("against") != self.best or item.get("model") not in (OWN, STACK):
                continue
            if item.get("metric") in self.hidden:
                continue
            key, value, p = str(item.get("metric")), interval(item), number(item.get("p"))
            middle, low, high = value
            look = look_of((-middle, -high, -low) if _lower(key) else value)
            rows.append(
                {
                    "model": self.names.get(str(item.get("model")), ""),
                    "metric": self.metric(key),
                    "nodes": "first nodes" if item.get("rows") == "first" else "all nodes",
                    "value": written(value, signed=True),
                    "p": f"{p:.3f}" if math.isfinite(p) else "–",
                    "look": "" if key in _NEITHER else look,
                    "level": "" if key in _NEITHER else _LEVELS[look],
                }
            )
        return rows

    def group_rows(self) -> list[Record]:
        groups = mappings(self.task.get("groups"))
        shown = {by: _counts([g for g in groups if _by(g) == by]) for by in map(_by, groups)}
        rows = []
        for group in groups:
            models = mapping(group.get("models"))
            rows.append(
                {
                    "by": _by(group),
                    "name": str(group.get("name")),
                    "counts": shown[_by(group)].pop(0),
                    "values": [written(interval(models.get(n))) for n in (OWN, self.best)],
                    "difference": written(interval(group.get("difference")), signed=True),
                    "reason": str(group.get("reason") or ""),
                }
            )
        return rows


def _place(role: str) -> int:
    return _ROLES.index(role) if role in _ROLES else 1


def _by(group: Record) -> str:
    return _BY.get(str(group.get("by")), str(group.get("by")))


def _lower(key: str) -> bool:
    return key != "brier_skill" and key.startswith(_LOWER)


def _counts(groups: list[Record]) -> list[tuple[str, str]]:
    """Return rows and positives of the groups of one partition.

    Groups add up to the task: where one of them is small, the others are not shown either.
    """
    shown = [
        (count(group.get("rows")), part(group.get("positives"), group.get("rows")))
        for group in groups
    ]
    rows, positives = (_hidden([cells[column] for cells in shown]) for column in (0, 1))
    return list(zip(rows, positives, strict=True))


def _hidden(cells: list[str]) -> list[str]:
    small = any("≤" in cell for cell in cells)
    return [cell if "≤" in cell or not small else "–" for cell in cells]
