"""One verdict for each pair of methods and task: is the first better than the other?

What is lost is said as plainly as what is won, and first.
"""

from typing import Any

from smbfast.judging.headline import ALPHA, TITLES, place
from smbfast.statistics.holm import holm

_NO_GAP = {"value": None, "low": None, "high": None, "p": None}


def verdicts(
    tasks: list[dict[str, Any]], pairs: list[tuple[str, str]], primary: dict[str, str]
) -> list[dict[str, Any]]:
    """Return the verdict of every pair on every task as `headline` does: below chance first, then
    worse, undecided, better and unmeasured; within these the largest loss first.

    Args:
        tasks: as `judge` records them.
        primary: the metric that decides, named before, for each kind of task.
    """
    made = [
        _figures(task, pair, primary[task["kind"]])
        for task in tasks
        for pair in pairs
        if set(pair) <= {model["name"] for model in task["models"]}
    ]
    tested = [verdict for verdict in made if verdict["p"] is not None]
    for verdict, p in zip(tested, holm([verdict["p"] for verdict in tested]), strict=True):
        verdict["p_holm"] = p
        if p is not None and p <= ALPHA:
            verdict["verdict"] = "better" if verdict["difference"]["value"] > 0 else "worse"
    for verdict in made:
        verdict["text"] = _text(verdict, len(tested))
    return sorted(made, key=place)


def _figures(task: dict[str, Any], pair: tuple[str, str], metric: str) -> dict[str, Any]:
    own, other = (
        next(model for model in task["models"] if model["name"] == name)["primary"]["value"]
        for name in pair
    )
    gap = next(
        (
            d
            for d in task["differences"]
            if (d["model"], d["against"]) == pair and (d["rows"], d["metric"]) == ("first", metric)
        ),
        _NO_GAP,
    )
    below = [name for name, value in zip(pair, (own, other), strict=True) if _below(value)]
    return {
        "task": task["task"],
        "model": pair[0],
        "against": pair[1],
        "label": pair[1],
        "verdict": "unmeasured" if gap["p"] is None else "undecided",
        "metric": metric,
        "value": own,
        "rival": other,
        "difference": {name: gap[name] for name in ("value", "low", "high")},
        "p": gap["p"],
        "p_holm": None,
        "below_chance": pair[0] in below,
        "below": below,
        "reason": task["reason"],
    }


def _below(value: float | None) -> bool:
    return value is not None and value < 0.5


def _text(verdict: dict[str, Any], num_tested: int) -> str:
    """Return the verdict as a sentence."""
    one, other, title = verdict["model"], verdict["against"], TITLES[verdict["metric"]]
    start = f"{verdict['task']}: "
    if verdict["below"]:
        start += f"{' and '.join(verdict['below'])} BELOW CHANCE; "
    if verdict["verdict"] == "unmeasured":
        if verdict["value"] is None or verdict["rival"] is None:
            return f"{start}not measured ({verdict['reason'] or 'a method has no figure'})."
        shown = f"{one} {verdict['value']:.3f}, {other} {verdict['rival']:.3f}"
        return f"{start}no verdict, for there is no interval ({title}: {shown})."
    words = {
        "worse": f"{one} is worse than {other}",
        "better": f"{one} is better than {other}",
        "undecided": f"{one} and {other} cannot be told from each other",
    }[verdict["verdict"]]
    gap = verdict["difference"]
    shown = f"{title} {verdict['value']:.3f} and {verdict['rival']:.3f}"
    shown += f", difference {gap['value']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]"
    many = f" over {num_tested} comparisons" if num_tested > 1 else ""
    return f"{start}{words} ({shown}; p {verdict['p_holm']:.3f}{many})."
