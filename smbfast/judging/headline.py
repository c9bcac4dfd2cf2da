"""One verdict for each task: the trained model against the best rival, worst first.

The rival is the baseline, or the model given beside, with the best primary figure on the very rows
that judge: chosen in its favour. Verdicts follow p values after Holm's correction over the tasks,
so that many tasks do not make a finding by chance. What is lost is said as plainly as what is won.
"""

import math
from typing import Any

from smbfast.judging.groups import FEW
from smbfast.statistics.holm import holm

ALPHA = 0.05
_ORDER = ("worse", "undecided", "better", "unmeasured")
TITLES = {"auroc": "AUROC", "auc": "mean AUC over time"}


def headline(tasks: list[dict[str, Any]], primary: dict[str, str]) -> list[dict[str, Any]]:
    """Return the verdicts of tasks as `judge` records them: below chance first, then worse,
    undecided, better and unmeasured; within these the largest loss first.

    Args:
        primary: the metric that decides, named before, for each kind of task.
    """
    verdicts = [_figures(task, primary[task["kind"]]) for task in tasks]
    tested = [verdict for verdict in verdicts if verdict["p"] is not None]
    for verdict, p in zip(tested, holm([verdict["p"] for verdict in tested]), strict=True):
        verdict["p_holm"] = p
        if p is not None and p <= ALPHA:
            verdict["verdict"] = "better" if verdict["difference"]["value"] > 0 else "worse"
    for verdict in verdicts:
        verdict["text"] = _text(verdict, len(tested))
    return sorted(verdicts, key=place)


def too_few_draws(verdicts: list[dict[str, Any]], draws: int) -> list[str]:
    """Return a warning where no p can be small enough for a verdict, however clear a difference.

    Args:
        verdicts: of `headline`, or of pairs.
        draws: of the primary metric, from which p is.
    """
    tested = sum(verdict["p"] is not None for verdict in verdicts)
    least = 2 / (draws + 1)
    if not tested or tested * least <= ALPHA:
        return []
    return [
        f"Too few draws for a verdict: of {draws:,} no p is below {least:.3f}, which over {tested} "
        f"comparisons cannot reach {ALPHA}. Ask for --bootstraps={math.ceil(tested * 2 / ALPHA)} "
        "or more, or compare fewer tasks."
    ]


def _figures(task: dict[str, Any], metric: str) -> dict[str, Any]:
    own = next((m for m in task["models"] if m["name"] == "smbfast"), None)
    rival = next((m for m in task["models"] if m["name"] == task["best"]), None)
    value = own["primary"]["value"] if own else None
    difference = next(
        (
            d
            for d in task["differences"]
            if (d["model"], d["against"]) == ("smbfast", task["best"])
            and (d["rows"], d["metric"]) == ("first", metric)
        ),
        {"value": None, "low": None, "high": None, "p": None},
    )
    measured = value is not None and rival is not None
    return {
        "task": task["task"],
        "verdict": "undecided" if measured else "unmeasured",
        "against": task["best"],
        "label": rival["label"] if rival else None,
        "metric": metric,
        "value": value,
        "rival": rival["primary"]["value"] if rival else None,
        "difference": {name: difference[name] for name in ("value", "low", "high")},
        "p": difference["p"],
        "p_holm": None,
        "below_chance": value is not None and value < 0.5,
        "reason": task["reason"] or (own or {}).get("reason"),
        "caution": _caution(task),
    }


def _caution(task: dict[str, Any]) -> str | None:
    """Return what is said of a task whose deciding rows are too few for a group's figure."""
    first = task.get("first") or {"rows": 2 * FEW, "positives": FEW}
    others = first["rows"] - first["positives"]
    few = "with" if first["positives"] < FEW else "without"
    if few == "without" and (others >= FEW or task["kind"] != "binary"):
        return None
    return f"fewer than {FEW} patients {few} the outcome: chance, not a comparison"


def place(verdict: dict[str, Any]) -> tuple[bool, int, float]:
    """Return by what verdicts are sorted: worst first."""
    lost = verdict["difference"]["value"]
    return (
        not verdict["below_chance"],
        _ORDER.index(verdict["verdict"]),
        0.0 if lost is None else lost,
    )


def _text(verdict: dict[str, Any], tested: int) -> str:
    """Return the verdict as a sentence, which says where it rests on few patients."""
    caution = verdict.pop("caution")
    text = _verdict(verdict, tested)
    return text if caution is None or verdict["value"] is None else f"{text[:-1]}; {caution}."


def _verdict(verdict: dict[str, Any], tested: int) -> str:
    name, title = verdict["task"], TITLES[verdict["metric"]]
    start = f"{name}: BELOW CHANCE and " if verdict["below_chance"] else f"{name}: "
    if verdict["verdict"] == "unmeasured":
        if verdict["below_chance"]:
            return (
                f"{name}: BELOW CHANCE ({title} {verdict['value']:.3f}); no baseline was measured."
            )
        return (
            f"{name}: not measured ({verdict['reason'] or 'no model or no baseline has a figure'})."
        )
    words = {
        "worse": f"worse than {verdict['label']}",
        "better": f"better than {verdict['label']}",
        "undecided": f"neither better nor worse than {verdict['label']} can be shown",
    }[verdict["verdict"]]
    gap = verdict["difference"]
    shown = f"{title} {verdict['value']:.3f} against {verdict['rival']:.3f}"
    if gap["low"] is None:
        return f"{start}{words} ({shown}; no interval)."
    shown += f", difference {gap['value']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]"
    tasks = f" over {tested} tasks" if tested > 1 else ""
    return f"{start}{words} ({shown}; p {verdict['p_holm']:.3f}{tasks})."
