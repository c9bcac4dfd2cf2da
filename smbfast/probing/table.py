"""Prints the content of `probe.json` as text: the verdicts first, then each task."""

import textwrap
from typing import Any

from smbfast.base.counts import FEW
from smbfast.base.held_out import times
from smbfast.judging.small_cells import shown, without_small_cells

_WIDTH = 100
_WIDEST = 110  # of a table: a label that makes it wider is broken
_LEAST = 20  # letters of a label that stay on one line
_MANY = 4  # tasks above which a table of primary figures precedes
_PATIENTS = {"tuning": "tuning", "held_out": "held-out"}
_PRIMARY = {"auroc": "AUROC", "auc": "AUC(t)"}
_BESIDE = {
    "binary": {
        "auroc": "all",
        "auprc": "AUPRC",
        "brier_skill": "skill",
        "slope": "slope",
        "intercept": "icept",
    },
    "time_to_event": {
        "auc": "all",
        "c_harrell": "Harrell C",
        "c_uno": "Uno C",
        "ibs": "int. Brier",
    },
}
_BY_CONSTRUCTION = ("slope", "intercept")  # on tuning, by which probabilities were calibrated
_BORDER = "the penalty is the first or last of the grid"
_STOPPED = "the fit stopped at its iteration limit"
_GROUPS = {"node": "by node", "events": "by past events", "sex": "by sex", "age": "by age"}
_INTERVALS = (
    "95 % intervals by resampling patients, and versions where a model has several; differences on "
    "the same resamples. smbfast is one training run: an interval says nothing of another seed. "
    "The best rival is chosen on the very rows that judge, in its favour, so worse is shown sooner "
    "than p says, and better later. Neither of them is not equal: see what the interval holds."
)


def table(record: dict[str, Any]) -> str:
    """Return the content of `probe.json` as text: verdicts worst first, one block for each task
    with a line for each model, and what was not measured."""
    small = int(record.get("small_cells", FEW))
    record = record | {"tasks": [without_small_cells(task, small) for task in record["tasks"]]}
    lines = ["", "Verdicts, worst first:"]
    for verdict in record["headline"]:
        lines += textwrap.wrap(
            verdict["text"], _WIDTH, initial_indent="  ", subsequent_indent="    "
        )
    measured = [task for task in record["tasks"] if not task["reason"]]
    if len(measured) > _MANY:
        lines += ["", *_summary(record, measured)]
    for task in record["tasks"]:
        lines += ["", *_heading(task, record)]
        if not task["reason"]:
            metric = record["primary"][task["kind"]]
            lines += _models(task, metric, record["judged_on"])
            lines += [*_groups(task, metric), *_shots(task, metric)]
    lines += ["", *_not_measured(record)]
    for note in (*record.get("notes", []), _INTERVALS):
        lines += textwrap.wrap(note, _WIDTH)
    if any(m["role"] == "oracle" for t in record["tasks"] for m in t["models"]):
        lines.append(
            "Bayes filter = bound for any model in expectation, in log loss and AUROC, not in C."
        )
    return "\n".join([*lines, *_judges(record["judged_on"], record["num_looks"])])


def _heading(task: dict[str, Any], record: dict[str, Any]) -> list[str]:
    kind = "positive" if task["kind"] == "binary" else "events"
    judged_on = record["judged_on"]
    sizes = ", ".join(
        f"{split} {shown(task['rows'][split])} ({shown(task['positives'][split])} {kind})"
        for split in task["rows"]
    )
    patients = f"{shown(task['patients'][judged_on])} {_PATIENTS[judged_on]} patients"
    lines = textwrap.wrap(
        f"{task['task']}: {sizes}; judged on {patients}", _WIDEST, subsequent_indent="  "
    )
    if task["unmatched"]:
        lines.append(f"  {shown(task['unmatched'])} label rows have no embedding")
    if task["reason"]:
        return [*lines, f"  not measurable: {task['reason']}"]
    if task["horizons_days"]:
        lines.append(f"  horizons {', '.join(f'{days:g}' for days in task['horizons_days'])} days")
    if task["prevalence"] is not None and task["kind"] == "binary":
        lines.append(f"  prevalence {task['prevalence']:.3f}, the AUPRC of a model of no worth")
    return lines


def _models(task: dict[str, Any], metric: str, judged_on: str) -> list[str]:
    """Return a line for each model: the primary figure on first nodes with its interval, the
    trained model less it, and other metrics on all nodes."""
    hidden = _BY_CONSTRUCTION if judged_on == "tuning" else ()
    beside = {key: title for key, title in _BESIDE[task["kind"]].items() if key not in hidden}
    gaps = {
        d["against"]: d
        for d in task["differences"]
        if (d["model"], d["rows"], d["metric"]) == ("smbfast", "first", metric)
    }
    title = f"{_PRIMARY[metric]}, first nodes"
    cells = [["", title, "smbfast less it", *beside.values()]]
    notes: dict[str, list[str]] = {}
    for model in task["models"]:
        if model.get("reason"):
            continue
        label = model["label"] + (" *" if model["name"] == task["best"] else "")
        if model["versions"] > 1:
            label += f" (mean of {model['versions']})"
        own = [_number(model["metrics"].get(name)) for name in beside]
        cells.append([label, _shown(model["primary"]), _shown(gaps.get(model["name"]), "+"), *own])
        chosen = model["chosen"]
        if chosen.get("at_border"):
            notes.setdefault(_BORDER, []).append(model["label"])
        if chosen.get("converged") is False:
            notes.setdefault(_STOPPED, []).append(model["label"])
    legend = "  * best rival; from `all` on, figures of all nodes"
    legend += "; skill: Brier skill" if task["kind"] == "binary" else "; AUC(t): mean over horizons"
    if "intercept" in beside:
        legend += "; slope, icept (intercept): calibration"
    lines = [*_aligned(cells), legend]
    for note, labels in notes.items():
        lines += textwrap.wrap(
            f"{note}: {'; '.join(labels)}", _WIDTH, initial_indent="  ", subsequent_indent="    "
        )
    return lines


def _groups(task: dict[str, Any], metric: str) -> list[str]:
    """Return a line for each group that has a figure, and one for all others."""
    if not task["groups"]:
        return []
    if all(group["reason"] for group in task["groups"]):
        return ["  no group (node, past events, sex, age) has rows enough for a figure"]
    cells = [[f"{_PRIMARY[metric]} in groups", "rows", "smbfast", "best rival", "difference"]]
    without: dict[str, dict[str, list[str]]] = {}
    for group in task["groups"]:
        by = _GROUPS[group["by"]]
        if group["reason"]:
            without.setdefault(group["reason"], {}).setdefault(by, []).append(group["name"])
            continue
        own = [_number(group["models"].get(name)) for name in ("smbfast", task["best"])]
        difference = _shown(group["difference"], "+")
        cells.append([f"{by}: {group['name']}", shown(group["rows"]), *own, difference])
    lines = ["", *_aligned(cells)] if len(cells) > 1 else [""]
    for reason, kinds in without.items():
        groups = "; ".join(f"{by}: {', '.join(names)}" for by, names in kinds.items())
        lines += textwrap.wrap(
            f"no figure in groups ({reason}): {groups}",
            _WIDTH,
            initial_indent="  ",
            subsequent_indent="    ",
        )
    return lines


def _shots(task: dict[str, Any], metric: str) -> list[str]:
    if not task["few_shot"]:
        return []
    ks = list(dict.fromkeys(shot["k"] for shot in task["few_shot"]))
    cells = [[f"{_PRIMARY[metric]} of few shots, by rows of each class", *(str(k) for k in ks)]]
    for name in dict.fromkeys(shot["model"] for shot in task["few_shot"]):
        own = {shot["k"]: shot for shot in task["few_shot"] if shot["model"] == name}
        label = next((m["label"] for m in task["models"] if m["name"] == name), name)
        cells.append([label, *(_number(own.get(k)) for k in ks)])
    return ["", *_aligned(cells)]


def _summary(record: dict[str, Any], tasks: list[dict[str, Any]]) -> list[str]:
    cells = [["primary figure, first nodes", "smbfast", "best rival", "", "difference"]]
    by_task = {verdict["task"]: verdict for verdict in record["headline"]}
    for task in tasks:
        verdict = by_task[task["task"]]
        own = [_number(verdict), _number({"value": verdict["rival"]})]
        gap = _shown(verdict["difference"], "+")
        cells.append([task["task"], *own, verdict["against"] or "-", gap])
    return _aligned(cells)


def _not_measured(record: dict[str, Any]) -> list[str]:
    """Return which models could not be measured, each reason once."""
    why: dict[tuple[str, str], list[str]] = {}
    for task in record["tasks"]:
        for model in task["models"]:
            if model.get("reason"):
                why.setdefault((model["label"], model["reason"]), []).append(task["task"])
    lines = []
    for (label, reason), tasks in why.items():
        text = f"not measured: {label} ({', '.join(tasks)}): {reason}"
        lines += textwrap.wrap(text, _WIDTH, subsequent_indent="  ", break_long_words=False)
    return [*lines, ""] if lines else []


def _judges(judged_on: str, num_looks: int) -> list[str]:
    """Say what the figures are worth, by the patients that they are of."""
    if judged_on == "held_out":
        return [f"Held-out patients: looked at {times(num_looks)} in this run."]
    lines = [
        "Tuning patients: penalty, read-out and calibration were chosen on them, so new patients "
        "will be",
        "predicted somewhat worse. Slope 1 and intercept 0 are by construction there, and left "
        "out; weights of",
        "the stack were fitted on these very rows, in its favour. --final judges on held-out "
        "patients; it is",
        "for the end, and counted.",
    ]
    if num_looks:
        lines.append(f"Held-out patients: looked at {times(num_looks)} in this run.")
    return lines


def _number(cell: dict[str, Any] | None) -> str:
    return "-" if cell is None or cell["value"] is None else f"{cell['value']:.3f}"


def _shown(cell: dict[str, Any] | None, sign: str = "") -> str:
    if cell is None or cell["value"] is None:
        return "-"
    value = f"{cell['value']:{sign}.3f}"
    if cell["low"] is None:
        return f"{value} [no interval]"
    return f"{value} [{cell['low']:{sign}.3f}, {cell['high']:{sign}.3f}]"


def _aligned(cells: list[list[str]]) -> list[str]:
    """Return the rows of a table; labels, the first column, are broken where it is too wide."""
    widths = [max(len(row[at]) for row in cells) for at in range(len(cells[0]))]
    room = max(_LEAST, _WIDEST - sum(width + 2 for width in widths[1:]) - 2)
    widths[0] = min(widths[0], room)
    lines = []
    for label, *row in cells:
        first, *more = textwrap.wrap(label, widths[0], subsequent_indent="  ") or [""]
        padded = [c.ljust(w) for c, w in zip([first, *row], widths, strict=True)]
        lines += [("  " + "  ".join(padded)).rstrip(), *(f"  {part}" for part in more)]
    return lines
