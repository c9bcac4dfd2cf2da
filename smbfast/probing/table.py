"""Prints the content of `probe.json` as text."""

from typing import Any

from smbfast.base.held_out import times

_COLUMNS = {"binary": ["auroc", "auprc", "brier"], "time_to_event": ["c_index"]}
_PATIENTS = {"tuning": "tuning", "held_out": "held-out"}
_TITLES = {"auroc": "AUROC", "auprc": "AUPRC", "brier": "Brier (low is good)", "c_index": "C-index"}


def table(record: dict[str, Any]) -> str:
    """Return the content of `probe.json` as text: one block per task, one line per model."""
    small = int(record.get("small_cells", 10))
    judged_on = record["judged_on"]
    lines: list[str] = []
    for task in record["tasks"]:
        kind = "positive" if task["kind"] == "binary" else "events"
        sizes = ", ".join(
            f"{split} {_count(task['rows'][split], small)} "
            f"({_count(task['positives'][split], small)} {kind})"
            for split in task["rows"]
        )
        patients = f"{_count(task['patients'][judged_on], small)} {_PATIENTS[judged_on]} patients"
        lines += ["", f"{task['task']}: {sizes}; judged on {patients}"]
        if task["unmatched"]:
            lines.append(f"  {_count(task['unmatched'], small)} label rows have no embedding")
        if task["reason"]:
            lines.append(f"  not measurable: {task['reason']}")
            continue
        metrics = _COLUMNS[task["kind"]]
        cells = [["", *(_TITLES[metric] for metric in metrics)]]
        notes: list[str] = []
        for model in task["models"]:
            cells.append(
                [model["label"], *(_shown(model["metrics"].get(metric)) for metric in metrics)]
            )
            chosen = model.get("chosen", {})
            if chosen.get("at_border"):
                notes.append(f"  {model['label']}: the penalty is the first or last of the grid")
            if chosen.get("converged") is False:
                notes.append(f"  {model['label']}: the fit stopped at its iteration limit")
            if model.get("reason"):
                notes.append(f"  {model['label']}: not measurable: {model['reason']}")
        for against in dict.fromkeys(d["against"] for d in task["differences"]):
            shown = {d["metric"]: d for d in task["differences"] if d["against"] == against}
            cells.append([f"smbfast - {against}", *(_shown(shown.get(m), "+") for m in metrics)])
        lines += [*_aligned(cells), *notes]
    oracle = any(m["name"] == "oracle_filter" for t in record["tasks"] for m in t["models"])
    lines += ["", "95 % intervals by resampling patients; differences on the same resamples."]
    if oracle:
        lines.append("Bayes filter = bound for any model that sees the observed history.")
    return "\n".join([*lines, *_judges(judged_on, record["num_looks"])])


def _judges(judged_on: str, num_looks: int) -> list[str]:
    """Say what the figures are worth, by the patients that they are of."""
    if judged_on == "held_out":
        return [f"Held-out patients: looked at {times(num_looks)} in this run."]
    lines = [
        "Tuning patients: penalty, read-out and calibration were chosen on them, so new patients "
        "will be",
        "predicted somewhat worse. --final judges on held-out patients; it is for the end, and "
        "counted.",
    ]
    if num_looks:
        lines.append(f"Held-out patients: looked at {times(num_looks)} in this run.")
    return lines


def _count(number: int, small: int) -> str:
    return f"<={small}" if 0 < number <= small else f"{number:,}"


def _shown(cell: dict[str, float | None] | None, sign: str = "") -> str:
    if cell is None:
        return "-"
    value = f"{cell['value']:{sign}.3f}"
    if cell["low"] is None:
        return f"{value} [no interval]"
    return f"{value} [{cell['low']:{sign}.3f}, {cell['high']:{sign}.3f}]"


def _aligned(cells: list[list[str]]) -> list[str]:
    widths = [max(len(row[at]) for row in cells) for at in range(len(cells[0]))]
    return [
        ("  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True))).rstrip()
        for row in cells
    ]
