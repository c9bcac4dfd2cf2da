"""Writes compare.json and compare.html: verdicts first, then a table of tasks, then each task."""

import json
import math
from pathlib import Path

from smbfast.base.files import committed_file, legal
from smbfast.base.ours import require_replaceable
from smbfast.judging.compare_table import COLUMNS, left_out, sizes
from smbfast.reporting import comparisons
from smbfast.reporting.cells import interval
from smbfast.reporting.comparisons import Curve, Estimate, look_of, written
from smbfast.reporting.html import plots, rendered
from smbfast.reporting.runlog import Record, number

_LEVELS = {"worse": "bad", "better": "good"}
_PLAIN = ("slope", "intercept")  # neither high nor low is good
_LOWER = ("ibs",)  # low is good
_SENTENCES = 4  # of more comparisons the undecided ones stand in the table alone
_CURVE = ("predicted", "observed", "low", "high")
_CURVES = 4  # of more, no curve can be told from the others


def require_outputs(out: Path | None) -> None:
    """Raise a ValueError if `out` is no folder, or holds files of others by the names of ours."""
    if out is None:
        return
    if out.exists() and not out.is_dir():
        raise ValueError(f"`out` must be a folder to write to; {out} is a file")
    for name in ("compare.json", "compare.html"):
        require_replaceable(out / name)


def write_comparison(out: Path, record: Record, command: str) -> Path:
    """Write both files into `out` and return the path of the page.

    Args:
        record: as `smbfast.judging.compare.compare` returns it.
        command: that made it.
    """
    with committed_file(out / "compare.json", private=True) as staging:
        text = json.dumps(legal({"command": command, **record}), indent=1, allow_nan=False)
        staging.write_text(text + "\n", encoding="utf-8")
    page = render(record, command)
    with committed_file(out / "compare.html", private=True) as staging:
        staging.write_bytes(page.encode("utf-8", errors="replace"))
    return out / "compare.html"


def render(record: Record, command: str) -> str:
    """Return the whole page as text, without script."""
    names = [method["name"] for method in record["methods"]]
    given = {method["given"] for method in record["methods"]}
    title = f"{names[0]} against {', '.join(names[1:])}"
    return rendered(
        "compare.html",
        title=title if len(given) > 1 else f"Models of {given.pop()}",
        paired=paired(record),
        methods=[_method(method) for method in record["methods"]],
        command=command,
    )


def paired(record: Record) -> Record:
    """Return what `paired.html` shows of a comparison of predictions, and its first sentences.

    Args:
        record: as `smbfast.judging.compare.compare` returns it.
    """
    order = [verdict["task"] for verdict in record["headline"]]
    tasks = sorted(record["tasks"], key=lambda task: order.index(task["task"]))
    others = [v for v in record["headline"] if not v["below_chance"]]
    said = [v for v in others if len(others) <= _SENTENCES or v["verdict"] in _LEVELS]
    return {
        "alarms": [_signed(v["text"]) for v in record["headline"] if v["below_chance"]],
        "verdicts": [_verdict(v) for v in said],
        "unsaid": len(others) - len(said),
        "summary": [_verdict(verdict) for verdict in record["headline"]],
        "notes": record["notes"],
        "forest": plots([_summary(record)]) if len(tasks) > 1 else [],
        "tasks": [_task(task, f"task-{at}") for at, task in enumerate(tasks)],
        "protocol": record["protocol"],
    }


def _method(method: Record) -> tuple[str, str]:
    runs = f"{method['runs']} run{'' if method['runs'] == 1 else 's'}"
    model = f"model {method['model']} · " if method["model"] else ""
    return method["name"], f"{method['given']} · {model}{runs}"


def _verdict(verdict: Record) -> Record:
    p = number(verdict["p_holm"])
    nothing = (math.nan, math.nan)
    below = verdict["below_chance"]
    return {
        "task": verdict["task"],
        "model": verdict.get("model", "smbfast"),
        "against": verdict["against"] or "–",
        "level": "bad" if below else _LEVELS.get(verdict["verdict"], "unknown"),
        "word": "below chance" if below else _word(verdict["verdict"]),
        "text": _signed(verdict["text"]),
        "value": written((number(verdict["value"]), *nothing)),
        "rival": written((number(verdict["rival"]), *nothing)),
        "difference": written(interval(verdict["difference"]), signed=True),
        "p": f"{p:.3f}" if math.isfinite(p) else "–",
    }


def _word(verdict: str) -> str:
    return "not measured" if verdict == "unmeasured" else verdict


def _signed(text: str) -> str:
    return text.replace("-0.", "−0.")


def _summary(record: Record) -> str | None:
    """Plot the difference that decides, of all tasks and pairs."""
    several = len({(v.get("model"), v["against"]) for v in record["headline"]}) > 1
    rows = [
        Estimate(
            f"{v.get('model', 'smbfast')} − {v['against']}" if several else v["task"],
            interval(v["difference"]),
            v["verdict"] if v["verdict"] != "unmeasured" else "undecided",
            v["task"] if several else "",
        )
        for v in sorted(record["headline"], key=lambda v: v["task"])
    ]
    pair = "first − second" if several else _pair(record["headline"][0])
    return comparisons.forest(
        "summary", rows, title=pair, unit="difference in the primary metric", level=0.0, signed=True
    )


def _pair(verdict: Record) -> str:
    return f"{verdict.get('model', 'smbfast')} − {verdict['against']}"


def _task(task: Record, name: str) -> Record:
    columns = COLUMNS[task["kind"]]
    titles = {key: title + _direction(key) for key, title in columns.items() if _known(task, key)}
    return {
        "id": name,
        "name": task["task"],
        "sizes": sizes(task),
        "left_out": left_out(task),
        "reason": task["reason"],
        "forests": plots([] if task["reason"] else _forests(task, name)),
        "calibration": plots(_calibration(task, name)),
        "columns": list(titles.values()),
        "rows": [
            (_label(model), [written(interval(_figures(model).get(key))) for key in titles])
            for model in task["models"]
        ],
        "pairs": [
            (f"{one} − {other}", [_gap(task, one, other, key) for key in titles])
            for one, other in dict.fromkeys((d["model"], d["against"]) for d in task["differences"])
        ],
    }


def _direction(key: str) -> str:
    if key in _PLAIN:
        return " (best at 1)" if key == "slope" else " (best at 0)"
    return " (low is good)" if key in _LOWER else ""


def _figures(model: Record) -> Record:
    return {"primary": model["primary"], **model["metrics"]}


def _known(task: Record, key: str) -> bool:
    return any(_figures(model).get(key) for model in task["models"])


def _label(model: Record) -> str:
    runs = f" ({model['versions']} runs)" if model["versions"] > 1 else ""
    return f"{model['name']}{runs}"


def _gap(task: Record, one: str, other: str, key: str) -> str:
    for gap in task["differences"]:
        own = "primary" if gap["rows"] == "first" else gap["metric"]
        if (gap["model"], gap["against"], own) == (one, other, key):
            return written(interval(gap), signed=True)
    return "–"


def _forests(task: Record, name: str) -> list[str | None]:
    """Return the primary metric of every method, and the differences."""
    values = [
        Estimate(_label(model), interval(model["primary"]), _look(model, at))
        for at, model in enumerate(task["models"])
    ]
    gaps = [
        Estimate(f"{gap['model']} − {gap['against']}", interval(gap), look_of(interval(gap)))
        for gap in task["differences"]
        if gap["rows"] == "first"
    ]
    metric = "AUROC" if task["kind"] == "binary" else "mean AUC over time"
    unit = "of each patient's first row"
    return [
        comparisons.forest(f"{name}-values", values, title=metric, unit=unit, level=0.5),
        comparisons.forest(
            f"{name}-gaps", gaps, title=f"Difference in {metric}", unit=unit, level=0.0, signed=True
        ),
    ]


def _calibration(task: Record, name: str) -> list[str | None]:
    """Return the calibration of the methods; of many, that of those whom the verdict is about."""
    models = [model for model in task["models"] if model["curve"]]
    if len(models) > _CURVES:
        models = [m for m in models if m["name"] in (task["models"][0]["name"], task["best"])]
    curves = [
        Curve(model["name"], *([place[key] for place in model["curve"]] for key in _CURVE))
        for model in models
    ]
    days = task["horizons_days"]
    # the horizon that `judge` takes
    title = f"Calibration at {days[len(days) // 2]:,.4g} days" if days else "Calibration"
    return [comparisons.calibration(f"{name}-calibration", curves, title=title)]


def _look(model: Record, place: int) -> str:
    """Return how a method is drawn: the first one as our own, each other by its role."""
    if place == 0:
        return "own"
    return "beside" if model["role"] == "own" else str(model["role"])
