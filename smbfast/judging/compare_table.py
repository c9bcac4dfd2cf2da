"""Prints the content of `compare.json` as text: verdicts first, then a block a task."""

from typing import Any

from smbfast.judging.small_cells import shown

COLUMNS = {
    "binary": {
        "primary": "AUROC (first)",
        "auroc": "AUROC",
        "auprc": "AUPRC",
        "brier_skill": "Brier skill",
        "slope": "slope",
        "intercept": "intercept",
    },
    "time_to_event": {
        "primary": "mean AUC (first)",
        "auc": "mean AUC",
        "c_harrell": "Harrell's C",
        "c_uno": "Uno's C",
        "ibs": "integrated Brier",
    },
}


def table(record: dict[str, Any]) -> str:
    """Return the content of `compare.json` as text."""
    lines = ["", *(verdict["text"] for verdict in record["headline"])]
    for task in record["tasks"]:
        lines += ["", *_block(task)]
    notes = [*record["notes"], "95 % intervals in brackets. (first): each patient's first row."]
    return "\n".join([*lines, "", *notes])


def sizes(task: dict[str, Any]) -> str:
    """Return in words on how many rows and patients a task is compared."""
    # all rows count as those of one split
    rows, positives, patients = (
        shown(next(iter(task[name].values()))) for name in ("rows", "positives", "patients")
    )
    kind = "positive" if task["kind"] == "binary" else "with the event"
    days = task["horizons_days"] or []
    horizons = f"; horizons of {', '.join(f'{h:,.4g}' for h in days)} days" if days else ""
    return f"{rows} shared rows ({positives} {kind}) of {patients} patients{horizons}"


def left_out(task: dict[str, Any]) -> str:
    """Return in words how many rows were left out; empty if none was."""
    parts = [f"{shown(number)} of {name}" for name, number in task["left_out"].items() if number]
    return f"Rows left out, because not all have them: {', '.join(parts)}." if parts else ""


def _block(task: dict[str, Any]) -> list[str]:
    lines = [f"{task['task']}: {sizes(task)}"]
    if words := left_out(task):
        lines.append(f"  {words}")
    if task["reason"]:
        return [*lines, f"  not measured: {task['reason']}"]
    columns = _columns(task)
    cells = [["", *columns.values()]]
    for model in task["models"]:
        figures = {"primary": model["primary"], **model["metrics"]}
        name = model["name"] + (f" ({model['versions']} runs)" if model["versions"] > 1 else "")
        cells.append([name, *(_cell(figures.get(metric)) for metric in columns)])
    for one, other in dict.fromkeys((d["model"], d["against"]) for d in task["differences"]):
        gaps = {
            ("primary" if gap["rows"] == "first" else gap["metric"]): gap
            for gap in task["differences"]
            if (gap["model"], gap["against"]) == (one, other)
        }
        cells.append([f"{one} - {other}", *(_cell(gaps.get(metric), "+") for metric in columns)])
    return [*lines, *_aligned(cells)]


def _columns(task: dict[str, Any]) -> dict[str, str]:
    """Return the metrics that a method has, by name, with their titles."""
    known = {name for model in task["models"] for name in model["metrics"]} | {"primary"}
    return {name: title for name, title in COLUMNS[task["kind"]].items() if name in known}


def _cell(figure: dict[str, float | None] | None, sign: str = "") -> str:
    if figure is None or figure["value"] is None:
        return "-"
    value = f"{figure['value']:{sign}.3f}"
    if figure["low"] is None:
        return f"{value} [no interval]"
    return f"{value} [{figure['low']:{sign}.3f}, {figure['high']:{sign}.3f}]"


def _aligned(cells: list[list[str]]) -> list[str]:
    widths = [max(len(row[at]) for row in cells) for at in range(len(cells[0]))]
    return [
        ("  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True))).rstrip()
        for row in cells
    ]
