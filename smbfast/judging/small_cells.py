"""Hides small counts in the record of a task, before it is printed, drawn or written.

A count from 1 to `small` becomes `<=small`, and one that leaves so many of its whole becomes
`all but <=small`. What would tell it all the same goes too: the share of positives, the other
groups of a partition, and curves of shares.
"""

from typing import Any

from smbfast.base.counts import FEW

Count = int | str


def hidden(count: Count | None, small: int, whole: Count | None = None) -> Count | None:
    """Return a count, or text where it or what it leaves of `whole` is small."""
    if count is None or isinstance(count, str):
        return count
    if 0 < count <= small:
        return f"<={small}"
    if isinstance(whole, int) and 0 < whole - count <= small:
        return f"all but <={small}"
    return count


def shown(count: Count | None) -> str:
    """Return a count of a record as text."""
    return "-" if count is None else count if isinstance(count, str) else f"{count:,}"


def without_small_cells(task: dict[str, Any], small: int) -> dict[str, Any]:
    """Return the record of a task, as `smbfast.judging.judge` makes it, without small counts.

    Args:
        small: the largest count that is hidden; 0 hides none.
    """
    if not small:
        return task
    rows = task["rows"]
    positives = {s: hidden(n, small, rows[s]) for s, n in task["positives"].items()}
    first = task["first"]
    made = task | {
        "rows": {split: hidden(n, small) for split, n in rows.items()},
        "positives": positives,
        "patients": {split: hidden(n, small) for split, n in task["patients"].items()},
        "first": {
            "rows": hidden(first["rows"], small),
            "positives": hidden(first["positives"], small, first["rows"]),
        },
        "unmatched": hidden(task["unmatched"], small),
        "groups": _groups(task["groups"], small),
    }
    if "left_out" in task:
        made["left_out"] = {name: hidden(n, small) for name, n in task["left_out"].items()}
    tells = any(isinstance(n, str) for n in positives.values())
    if tells:
        made["prevalence"] = None
    if tells or small > FEW:  # a place of a curve has more people than FEW of either kind, or none
        made["incidence"] = None
        made["models"] = [model | {"curve": []} for model in task["models"]]
    return made


def _groups(groups: list[dict[str, Any]], small: int) -> list[dict[str, Any]]:
    """Hide the counts of a whole partition, whose sum is known, where one of them is small."""
    made = [
        group
        | {
            "rows": hidden(group["rows"], small),
            "positives": hidden(group["positives"], small, group["rows"]),
        }
        for group in groups
    ]
    for name in ("rows", "positives"):
        few = {group["by"] for group in made if isinstance(group[name], str)}
        for group in made:
            if group["by"] in few and not isinstance(group[name], str):
                group[name] = None
    return made
