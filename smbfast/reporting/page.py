"""Writes one page that says what a run did.

It reads the files of the run folder and nothing else, and writes `report.html` beside them: no
script, nothing fetched, so that it opens on a machine without a network and prints. Everything
that came from data is escaped, and counts of 1 to 10 people are not shown.
"""

import math
import re
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from smbfast.base.counts import FEW_TEXT
from smbfast.base.files import committed_file
from smbfast.base.held_out import count_look, num_looks, times
from smbfast.base.ours import require_replaceable
from smbfast.reporting import figures
from smbfast.reporting.runlog import (
    Finding,
    Phase,
    Record,
    Run,
    column,
    number,
    read_run,
)
from smbfast.reporting.verdict import collapse, judged, trivial_ratio

# below this nobody can be found again in a count: the rule of the US claims data (CMS)
SMALL = 10
_CONTEXT_LINES, _FUTURE_LINES = 45, 60
_METRICS = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "brier": "Brier",
    "c_index": "C-index",
}
_COPIES = (("", ""), (", copying the state", "copy_"))
_KINDS = {"binary": "yes or no within the horizon", "time_to_event": "time to event"}


def write_report(run: Path, *, final: bool = False, counted: str | None = None) -> Path:
    """Write `run/report.html` from the other files of the folder and return its path.

    The same files give the same bytes. What is missing (probe, sample, a broken last line of
    metrics.jsonl) is said on the page.

    Args:
        final: whether to show figures of held-out patients, if the probes were judged on them.
        counted: the command that is recorded if it shows them; None where that was done.

    Raises:
        ValueError: the folder is missing or has no metrics.jsonl with a readable line, or its
            report.html is of others.
    """
    run = Path(run)
    path = run / "report.html"
    require_replaceable(path)
    content = read_run(run)
    if final and counted and _judged_on(content) == "held_out":
        count_look(run, counted)
    page = render(content, final=final)
    with committed_file(path) as staging:
        # lone surrogates are legal in json and in no file
        staging.write_bytes(page.encode("utf-8", errors="replace"))
    return path


def render(run: Run, *, final: bool = False) -> str:
    """Return the whole page as text; the template escapes everything but our own SVG.

    Args:
        final: whether to show figures of held-out patients.
    """
    judged_on = _judged_on(run)
    hidden = judged_on == "held_out" and not final
    probe = {} if hidden else run.probe or {}
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = resources.files("smbfast.reporting").joinpath("templates/report.html")
    tasks = [_task(task) for task in _dicts(probe.get("tasks"))]
    finding = collapse(run.phases)
    page = environment.from_string(template.read_text("utf-8")).render(
        name=run.path.resolve().name,
        verdict=verdict(run),
        facts=_facts(run),
        notes=run.notes,
        losses=_markup(figures.losses(run.phases)),
        health=_markup(figures.health(run.phases)),
        finding=finding,
        health_rows=_health_rows(run.phases),
        optimizer=_markup(figures.optimizer(run.phases)),
        machine=_markup(figures.machine(run.phases)),
        tasks=tasks,
        probe_summary=_probe_summary(tasks),
        judges=_judges(run, hidden) if run.probe else None,
        judged_on=judged_on.replace("_", "-"),
        protocol=str(probe.get("protocol") or ""),
        forests=[
            _markup(figures.forest(_forest_rows(probe, key), _METRICS[key]))
            for key in ("auroc", "c_index")
            if _forest_rows(probe, key)
        ],
        oracles=any(task["groups"][1] for task in tasks),
        sample=_sample(run),
        card=_card_rows(run.header),
        card_warnings=[Finding("warn", text) for text in _card_warnings(run.header)],
        data=_table(run.header.get("data"), people=True),
        model=_table(_about(run.header)),
        versions=_table(run.header.get("versions")),
        config=run.config,
    )
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", " ", page)


def verdict(run: Run) -> Finding:
    """Say in one line whether the run finished, how many steps, on how much data and how long."""
    state = str(run.status.get("state") or run.status.get("status") or "")
    steps, total = _steps(run)
    data = _dict(run.header.get("data"))
    parts = [f"{steps:,} of {total:,} steps" if total else f"{steps:,} steps"]
    kind = "simulated subjects" if data.get("simulated") is True else "subjects"
    if (subjects := _training(data, "subjects")) is not None:
        parts.append(f"on {count(subjects)} {kind}")
    if (tokens := _training(data, "tokens")) is not None:
        parts.append(
            f"({count(tokens)} tokens)" if subjects is not None else f"on {count(tokens)} tokens"
        )
    if seconds := _seconds(run):
        parts.append(f"in {seconds}")
    if state in ("failed", "preempted"):
        return Finding("bad", f"Not finished, {state}: {' '.join(parts)}.")
    if state == "done" or run.end is not None:
        return Finding("good", f"Finished: {' '.join(parts)}.")
    return Finding("warn", f"Not finished: {' '.join(parts)} so far.")


def count(value: object) -> str:
    """Return a count for readers; one of 1 to 10 is only said to be small."""
    if value == FEW_TEXT:  # a record that holds no small count either
        return f"≤{SMALL}"
    amount = number(value)
    if not math.isfinite(amount):
        return "–"
    return f"≤{SMALL}" if 1 <= amount <= SMALL else f"{amount:,.0f}"


def _positives(positives: object, rows: object) -> str:
    # so that rows minus positives does not tell a small count either
    if number(rows) > SMALL >= number(rows) - number(positives) >= 1:
        return f"all but ≤{SMALL}"
    return count(positives)


def _steps(run: Run) -> tuple[int, int]:
    config = _dict(run.header.get("config"))
    planned = [number(phase.get("steps")) for phase in _dicts(config.get("phases"))]
    total = sum(planned) if planned else math.nan
    return (run.phases[-1].end if run.phases else 0), (int(total) if math.isfinite(total) else 0)


def _training(data: Record, key: str) -> int | str | None:
    value = data.get(key)
    value = value.get("train") if isinstance(value, dict) else value
    if value == FEW_TEXT:
        return FEW_TEXT
    return int(number(value)) if math.isfinite(number(value)) else None


def _seconds(run: Run) -> str:
    seconds = number((run.end or {}).get("seconds"))
    if not math.isfinite(seconds):
        return ""
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds % 60:.0f} s" if minutes else f"{seconds:.0f} s"


def _facts(run: Run) -> list[tuple[str, str]]:
    evals = [record for phase in run.phases for record in phase.evals]
    steps = [record for phase in run.phases for record in phase.steps]
    facts = [("duration", _seconds(run))]
    for key, label, form in (
        ("sft", "tuning SFT loss, last", "{:.3f}"),
        ("jepa", "tuning JEPA loss, last", "{:.3f}"),
        ("codes", "tuning loss of codes to come, last", "{:.3f}"),
        ("online_rank", "online effective rank, last", "{:.1f}"),
        ("target_rank", "target effective rank, last", "{:.1f}"),
        ("r2", "R² of the latent loss, last", "{:.2f}"),
        ("probe_auroc", "probe AUROC on tuning nodes, last", "{:.3f}"),
    ):
        known_N = column(evals, key)
        known_N = known_N[known_N == known_N]
        facts.append((label, form.format(known_N[-1]) if len(known_N) else ""))
    speed_N = column(steps, "tokens_per_s")
    speeds = sorted(speed_N[speed_N == speed_N])
    facts.append(("tokens / s, median", f"{speeds[len(speeds) // 2]:,.0f}" if speeds else ""))
    if run.status.get("command"):
        facts.append(("to go on", str(run.status["command"])))
    return [(label, value) for label, value in facts if value]


def _health_rows(phases: list[Phase]) -> list[list[str]]:
    rows = []
    for phase in phases:
        series = [
            ("online effective rank", column(phase.evals, "online_rank"), "{:.1f}"),
            ("online std over size", column(phase.evals, "online_std"), "{:.3f}"),
            ("embeddings' effective rank", column(phase.evals, "embedding_rank"), "{:.1f}"),
            ("embeddings' std over size", column(phase.evals, "embedding_std"), "{:.3f}"),
            ("probe AUROC on tuning nodes", column(phase.evals, "probe_auroc"), "{:.3f}"),
            ("target effective rank", column(phase.evals, "target_rank"), "{:.1f}"),
            ("target std, mean over dimensions", column(phase.evals, "target_std"), "{:.3f}"),
            ("target std, 5th percentile", column(phase.evals, "target_std_p5"), "{:.3f}"),
            ("loss / best trivial predictor", trivial_ratio(phase.evals), "{:.3f}"),
            *((f"R², {name}", column(phase.evals, key), "{:.3f}") for name, key in _r2(phase)),
            ("codes to come: gain over prevalence", column(phase.evals, "codes_gain"), "{:.4f}"),
            ("online to target distance", column(phase.evals, "distance"), "{:.3g}"),
            ("tracked target: share discarded", column(phase.evals, "discarded"), "{:.2g}"),
            ("tracked target: bound of error", column(phase.evals, "target_error"), "{:.2g}"),
            *((name, column(phase.evals, key), "{:.3g}") for name, key in _pulls(phase)),
        ]
        for label, value_N, form in series:
            known_N = value_N[value_N == value_N]
            if judged(phase) and len(known_N):
                shown = (known_N[0], known_N.min(), known_N.max(), known_N[-1])
                rows.append([phase.name, label, *(form.format(value) for value in shown)])
    return rows


def _r2(phase: Phase) -> list[tuple[str, str]]:
    """Return the name and the key of R² by horizon, with that of copying the state."""
    keys = {key for record in phase.evals for key in record if key.startswith("r2_")}
    names = figures.horizons(phase.evals)
    both = [(f"{name}{words}", f"r2_{copy}{name}") for name in names for words, copy in _COPIES]
    return [(name, key) for name, key in both if key in keys]


def _pulls(phase: Phase) -> list[tuple[str, str]]:
    """Return the name and the key of gradient norms and cosines."""
    keys = [key for record in phase.evals for key in record]
    words = {"grad": "gradient norm of", "cos": "cosine of the gradients of"}
    return [
        (f"{words[key.split('_')[0]]} {' and '.join(key.split('_')[1:])}", key)
        for key in dict.fromkeys(keys)
        if key.split("_")[0] in words
    ]


def _task(task: Record) -> Record:
    models = _dicts(task.get("models"))
    labels = {str(model.get("name")): _label(model) for model in models}
    keys = [key for model in models for key in _dict(model.get("metrics"))]
    keys = [key for key in dict.fromkeys([*_METRICS, *keys]) if key in keys]
    rows, positives = _dict(task.get("rows")), _dict(task.get("positives"))
    differences = []
    for item in _dicts(task.get("differences")):
        value, low, high = _interval(item)
        sure = low > 0 or high < 0
        gain = math.copysign(1, value if item.get("metric") != "brier" else -value)
        ends = [str(item.get(end)) for end in ("model", "against")]
        differences.append(
            {
                "ends": ends,
                "what": " − ".join(labels.get(end, end) for end in ends),
                "metric": _METRICS.get(str(item.get("metric")), str(item.get("metric"))),
                "value": _with_interval(item, signed=True),
                "sure": sure,
                "says": ("better" if gain > 0 else "worse") if sure else "cannot be told apart",
            }
        )
    return {
        "name": str(task.get("task")),
        "kind": _KINDS.get(str(task.get("kind")), str(task.get("kind"))),
        "reason": task.get("reason"),
        "unmatched": count(task["unmatched"]) if task.get("unmatched") else "",
        "sizes": [
            (split.replace("_", " "), count(n), _positives(positives.get(split), n))
            for split, n in rows.items()
        ],
        "metrics": [
            _METRICS.get(key, key) + " (lower is better)" * (key == "brier") for key in keys
        ],
        "groups": [
            [_row(model, keys) for model in models if _oracle(model) is oracle]
            for oracle in (False, True)
        ],
        "differences": differences,
    }


def _row(model: Record, keys: list[str]) -> Record:
    metrics = _dict(model.get("metrics"))
    values = [_with_interval(metrics.get(key)) for key in keys]
    return {"label": _label(model), "own": model.get("name") == "smbfast", "values": values}


def _oracle(model: Record) -> bool:
    return str(model.get("name")).startswith("oracle")


def _judged_on(run: Run) -> str:
    """Return the split whose figures the probes give; earlier versions judged on held_out alone."""
    return "tuning" if (run.probe or {}).get("judged_on") == "tuning" else "held_out"


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
    if _judged_on(run) == "held_out":
        return Finding(
            "warn" if looks > 1 else "good",
            f"Judged on held-out patients, who were looked at {times(looks)} in this run. "
            "Figures of patients who were looked at once are worth most.",
        )
    return Finding(
        "unknown",
        "Judged on tuning patients, on whom penalty, read-out and calibration were chosen: new "
        f"patients will be predicted somewhat worse. --final judges on held-out ones.{seen}",
    )


def _probe_summary(tasks: list[Record]) -> str:
    """Say on how many tasks training changed the metric that comes first, AUROC or the C-index.

    One metric a task: the best of several would be better by chance more often than the 95 % of an
    interval say.
    """
    says = [
        str(difference["says"])
        for task in tasks
        for difference in task["differences"]
        if difference["ends"] == ["smbfast", "untrained"]
        and difference["metric"] in (_METRICS["auroc"], _METRICS["c_index"])
    ]
    if not says:
        return ""
    return (
        f"By AUROC or the C-index training made the embeddings better on {says.count('better')} of "
        f"{len(says)} measured tasks, and worse on {says.count('worse')}: there the interval of "
        "trained minus untrained excludes zero."
    )


def _forest_rows(probe: Record, metric: str) -> list[figures.ForestRow]:
    rows = []
    for task in _dicts(probe.get("tasks")):
        against = {
            str(item.get("against")): _interval(item)
            for item in _dicts(task.get("differences"))
            if item.get("metric") == metric and item.get("model") == "smbfast"
        }
        for model in _dicts(task.get("models")):
            value = _interval(_dict(_dict(model.get("metrics")).get(metric)))
            if math.isfinite(value[0]):
                name = str(model.get("name"))
                row = (str(task.get("task")), _label(model), name, value, against.get(name))
                rows.append(figures.ForestRow(*row))
    return rows


def _sample(run: Run) -> Record | None:
    # a second lock: the file is only written for simulated data
    if run.sample is None or _dict(run.header.get("data")).get("simulated") is False:
        return None
    lines = _dicts(run.sample.get("lines"))
    context = [line for line in lines if line.get("part") != "future"]
    future = [line for line in lines if line.get("part") == "future"]
    fixed = [line for line in context if line.get("kind") == "demographics"]
    moving = [line for line in context if line.get("kind") != "demographics"]
    facts = [
        (key.replace("_", " "), run.sample.get(key))
        for key in ("tokens", "window", "cut_token", "mask_ratio")
    ]
    return {
        "fixed": [_line(line) for line in fixed],
        "context": [_line(line) for line in moving[-_CONTEXT_LINES:]],
        "left_out": max(0, len(moving) - _CONTEXT_LINES),
        "future": [_line(line) for line in future[:_FUTURE_LINES]],
        "more": max(0, len(future) - _FUTURE_LINES),
        "facts": [
            (key, f"{value:,}" if isinstance(value, int) else str(value))
            for key, value in facts
            if value is not None
        ],
        "note": str(run.sample.get("note") or ""),
    }


def _line(line: Record) -> Record:
    kind = line.get("kind")
    return {
        "text": str(line.get("text")),
        "truth": str(line.get("truth") or ""),
        "kind": kind if kind in ("header", "tag", "line", "demographics") else "line",
        "masked": line.get("masked") is True,
    }


def _about(header: Record) -> Record:
    elsewhere = ("kind", "config", "card", "data", "versions")  # on the page
    return {key: value for key, value in header.items() if key not in elsewhere}


def _card_rows(header: Record) -> list[Record]:
    """Return the rows of the data card: name, text, and level, empty where it judges nothing."""
    return [
        {
            "name": str(row.get("name")),
            "text": str(row.get("text")),
            "level": row["level"] if row.get("level") in ("good", "warn", "bad") else "",
        }
        for row in _dicts(_dict(header.get("card")).get("rows"))
    ]


def _card_warnings(header: Record) -> list[str]:
    warnings = _dict(header.get("card")).get("warnings")
    return [str(text) for text in warnings] if isinstance(warnings, list) else []


def _table(value: object, prefix: str = "", *, people: bool = False) -> list[tuple[str, str]]:
    """Return rows of key and value of nested dicts, whatever keys they have.

    Args:
        people: whole numbers may count subjects, so small ones are not shown.
    """
    if not isinstance(value, dict):
        return [(prefix, _cell(value, people))] if prefix else []
    rows = []
    for key, inner in value.items():
        words = str(key).replace("_", " ")
        rows += _table(inner, f"{prefix} · {words}" if prefix else words, people=people)
    return rows


def _cell(value: Any, people: bool) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return count(value) if people else f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, list):
        return ", ".join(_cell(item, people) for item in value) or "none"
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_cell(item, people)}" for key, item in value.items())
    return str(value)


def _interval(item: Record) -> tuple[float, float, float]:
    return number(item.get("value")), number(item.get("low")), number(item.get("high"))


def _with_interval(item: object, signed: bool = False) -> str:
    value, low, high = _interval(_dict(item))
    if not math.isfinite(value):
        return "–"
    form = "{:+.3f}" if signed else "{:.3f}"
    known = math.isfinite(low) and math.isfinite(high)
    text = form.format(value) + (f" [{form.format(low)}, {form.format(high)}]" if known else "")
    return text.replace("-", "−")


def _label(model: Record) -> str:
    return str(model.get("label") or model.get("name"))


def _markup(svg: str | None) -> Markup | None:
    return None if svg is None else Markup(svg)


def _dict(value: object) -> Record:
    return value if isinstance(value, dict) else {}


def _dicts(value: object) -> list[Record]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
