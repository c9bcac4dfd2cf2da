"""Writes one page that says what a run did.

It reads the files of the run folder and nothing else, and writes `report.html` beside them: no
script, nothing fetched, so that it opens on a machine without a network and prints. Everything
that came from data is escaped, and counts of 1 to 10 people are not shown.
"""

import math
from pathlib import Path
from typing import Any

from smbfast.base.counts import FEW_TEXT
from smbfast.base.files import committed_file
from smbfast.base.held_out import count_look
from smbfast.base.ours import require_replaceable
from smbfast.reporting import figures, probes, risk, took
from smbfast.reporting.cells import count, mapping, mappings
from smbfast.reporting.html import plots, rendered
from smbfast.reporting.runlog import (
    Finding,
    Phase,
    Record,
    Run,
    column,
    number,
    read_run,
)
from smbfast.reporting.signals import signals
from smbfast.reporting.verdict import collapse, judged, trivial_ratio

_CONTEXT_LINES, _FUTURE_LINES = 45, 60
_COPIES = (("", ""), (", copying the state", "copy_"))


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
    if final and counted and probes.judged_on(content) == "held_out":
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
    return rendered(
        "report.html",
        name=run.path.resolve().name,
        verdict=verdict(run),
        wrong=signals(run),
        facts=took.at_a_glance(run),
        command=took.command(run),
        notes=run.notes,
        probe=probes.view(run, final=final),
        risk=risk.view(run),
        losses=plots(figures.losses(run.phases)),
        health=plots(figures.health(run.phases)),
        finding=collapse(run.phases),
        health_rows=_health_rows(run.phases),
        machine=[*plots(figures.optimizer(run.phases)), *plots(figures.machine(run.phases))],
        captions=took.captions(run),
        took=took.table(run),
        fingerprint=took.fingerprint(run),
        sample=_sample(run),
        card=_card_rows(run.header),
        card_warnings=[Finding("warn", text) for text in _card_warnings(run.header)],
        data=_table(run.header.get("data"), people=True),
        model=_table(_about(run.header)),
        versions=_table(run.header.get("versions")),
        config=run.config,
    )


def verdict(run: Run) -> Finding:
    """Say in one line whether the run finished, how many steps, on how much data and how long."""
    state = str(run.status.get("state") or run.status.get("status") or "")
    steps, total = _steps(run)
    data = mapping(run.header.get("data"))
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


def _steps(run: Run) -> tuple[int, int]:
    config = mapping(run.header.get("config"))
    planned = [number(phase.get("steps")) for phase in mappings(config.get("phases"))]
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


def _sample(run: Run) -> Record | None:
    # a second lock: the file is only written for simulated data
    if run.sample is None or mapping(run.header.get("data")).get("simulated") is False:
        return None
    lines = mappings(run.sample.get("lines"))
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
    elsewhere = ("kind", "config", "card", "data", "versions", "memory")  # on the page
    return {key: value for key, value in header.items() if key not in elsewhere}


def _card_rows(header: Record) -> list[Record]:
    """Return the rows of the data card: name, text, and level, empty where it judges nothing."""
    return [
        {
            "name": str(row.get("name")),
            "text": str(row.get("text")),
            "level": row["level"] if row.get("level") in ("good", "warn", "bad") else "",
        }
        for row in mappings(mapping(header.get("card")).get("rows"))
    ]


def _card_warnings(header: Record) -> list[str]:
    warnings = mapping(header.get("card")).get("warnings")
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
