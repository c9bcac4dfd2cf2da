"""One patient's predicted risks over time above their events, as a figure and a table.

In report.html the patient is simulated, always: `view` reads `risk.json` of a run of a simulated
cohort alone. A patient who was asked for by id has a page of their own.

Legend: K moments.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from matplotlib import dates
from matplotlib.axes import Axes

from smbfast.reporting.cells import mapping, mappings, numbers
from smbfast.reporting.drawing import (
    BLUE,
    DASHED,
    EDGE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PAPER,
    PURPLE,
    SOFT,
    WIDE,
    legend_below,
    panel,
    plain,
)
from smbfast.reporting.html import plots, rendered
from smbfast.reporting.runlog import Record, Run

FILE = "risk.json"
_LOOKS = ((BLUE, "o"), (GREEN, "D"), (ORANGE, "s"), (PURPLE, "^"))  # as many tasks are drawn
_RISKS, _ROW, _REST = 1.9, 0.26, 1.1  # inches: the risks, a row of events, titles, axis and names
_ORDER = ("conditions", "observations", "measurements", "procedures", "drugs", "notes", "death")
_TICKS = 1500  # events of a row that are drawn: more are one line


@dataclass(frozen=True)
class _Line:
    """The risks of one task: label, risks [K], and the outcomes that are known at moments."""

    label: str
    risk_K: list[float]
    outcomes: list[tuple[datetime, bool]]
    event: datetime | None


def view(run: Run) -> Record | None:
    """Return what `risk.html` shows of a run of simulated patients, else None."""
    simulated = mapping(run.header.get("data")).get("simulated") is True
    file = run.path / FILE
    if not simulated or not file.is_file():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return None
    # a second lock: the file says itself whose it is
    return shown(record) if mapping(record).get("simulated") is True else None


def patient_page(record: Record, run: str, command: str) -> str:
    """Return the page of a patient who was asked for by id, as text without script.

    Args:
        record: as `smbfast.run.risk.patient_risk` returns it, with `simulated` and `rule`.
        run: name of the run.
        command: that asked for it.
    """
    return rendered(
        "patient.html",
        run=run,
        subject=record["subject"],
        real=record["simulated"] is not True,
        risk=shown(record),
        command=command,
    )


def shown(record: Record) -> Record | None:
    """Return the figure, the rows of the table and what is said of them; None without a moment."""
    moments = [time for text in _list(record.get("moments")) if (time := _time(text))]
    lines = [_line(task) for task in mappings(record.get("tasks"))]
    lines = [line for line in lines if len(line.risk_K) == len(moments)]
    if not moments or not lines:
        return None
    drawn = lines[: len(_LOOKS)]
    events = {
        str(row.get("section")): [t for text in _list(row.get("times")) if (t := _time(text))]
        for row in mappings(record.get("events"))
    }
    end = _time(record.get("end"))
    days = mappings(record.get("days"))
    return {
        "simulated": record.get("simulated") is True,
        "rule": str(record.get("rule") or ""),
        "split": str(record.get("split") or ""),
        "figure": plots([_figure(moments, drawn, events, end)]),
        "labels": [line.label for line in lines],
        "left_out": [line.label for line in lines[len(_LOOKS) :]],
        "rows": [
            (f"{moment:%Y-%m-%d %H:%M}", [_percent(line.risk_K[at]) for line in lines])
            for at, moment in enumerate(moments)
        ],
        "days": [
            (str(day.get("day")), [str(words) for words in _list(day.get("events"))])
            for day in days
        ],
        "outcomes": any(line.outcomes for line in drawn),
        "num_events": sum(len(_list(day.get("events"))) for day in days),
    }


def _line(task: Record) -> _Line:
    days = numbers([task.get("days")])[0]
    label = str(task.get("task"))
    label += f", {days:,.4g} days" if math.isfinite(days) else ""
    outcomes = [
        (time, bool(item["value"]))
        for item in mappings(task.get("labels"))
        if (time := _time(item.get("time"))) and isinstance(item.get("value"), bool)
    ]
    risk_K = numbers(task.get("risk"))
    return _Line(label, risk_K, outcomes, _time(task.get("event")))


def _figure(
    moments: Sequence[datetime],
    lines: Sequence[_Line],
    events: dict[str, list[datetime]],
    end: datetime | None,
) -> str:
    rows = [name for name in _ORDER if events.get(name)]
    rows += [name for name in events if name not in _ORDER and events[name]]

    def draw(ax: Axes) -> None:
        top = max([0.01, *(r for line in lines for r in line.risk_K if math.isfinite(r))])
        top *= 1.06
        row = top * _ROW / _RISKS
        seen = [time for own in events.values() for time in own]
        _draw_risks(ax, moments, lines, end or max([moments[-1], *seen]))
        _draw_events(ax, rows, events, row)
        for time, label in _ends(lines, end):
            words = plain(f"{label}: {time:%Y-%m-%d}", 56)
            at = dates.date2num(time)
            ax.axvline(at, color=INK, linewidth=1.0, linestyle=DASHED, label=words)
        ax.set_ylim(-row * (len(rows) + 0.6), top)
        ax.set_yticks([tick for tick in ax.get_yticks() if 0 <= tick <= top])
        ax.set_ylim(-row * (len(rows) + 0.6), top)
        ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
        locator = dates.AutoDateLocator(minticks=3, maxticks=6)
        ax.xaxis.set_major_locator(locator)
        ax.xaxis.set_major_formatter(dates.ConciseDateFormatter(locator))
        ax.set_title("Predicted risk, and events below", pad=6)
        legend_below(ax, columns=2)

    label = "Predicted risk of one patient over time, with their events below"
    return panel("risk", label, draw, WIDE, _RISKS + _ROW * len(rows) + _REST)


def _draw_risks(
    ax: Axes, moments: Sequence[datetime], lines: Sequence[_Line], last: datetime
) -> None:
    x_K = dates.date2num(list(moments))
    for line, (color, marker) in zip(lines, _LOOKS, strict=False):
        # a risk stands until more is known
        until = [*x_K, dates.date2num(last)], [*line.risk_K, line.risk_K[-1]]
        ax.step(*until, where="post", color=color, label=plain(line.label, 36))
        ax.plot(x_K, line.risk_K, ".", color=color, markersize=3)
        for time, came in line.outcomes:
            at = max((k for k, moment in enumerate(moments) if moment <= time), default=None)
            if at is not None:
                face = color if came else PAPER
                y = line.risk_K[at]
                point = dates.date2num(time)
                ax.plot([point], [y], marker, color=color, markerfacecolor=face, markersize=8)
    ax.axhline(0, color=EDGE, linewidth=0.8)


def _draw_events(
    ax: Axes, rows: Sequence[str], events: dict[str, list[datetime]], row: float
) -> None:
    ground = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.6}
    for place, name in enumerate(rows):
        middle = -row * (place + 0.8)
        x = dates.date2num(sorted(events[name])[:_TICKS])
        ax.vlines(x, middle - 0.3 * row, middle + 0.3 * row, color=GREY, linewidth=1.1)
        ax.text(
            0.004,
            middle,
            plain(name, 24),
            transform=ax.get_yaxis_transform(),
            va="center",
            color=SOFT,
            bbox=ground,
            zorder=3,
        )
    if rows:
        first = min(time for name in rows for time in events[name])
        last = max(time for name in rows for time in events[name])
        low, high = dates.date2num(first), dates.date2num(last)
        # room at the left for the names of rows
        ax.set_xlim(low - 0.3 * max(high - low, 1.0), high + 0.04 * max(high - low, 1.0))


def _ends(lines: Sequence[_Line], end: datetime | None) -> list[tuple[datetime, str]]:
    """Return when outcomes came, those of one day under one name."""
    came = [(line.event, line.label.split(",")[0]) for line in lines if line.event]
    came += [(end, "end of the record")] if end else []
    together: dict[str, tuple[datetime, str]] = {}
    for time, label in came:
        day = f"{time:%Y-%m-%d}"
        before = together.get(day)
        together[day] = (time, f"{before[1]}, {label}" if before else label)
    return list(together.values())


def _percent(risk: float) -> str:
    return f"{100 * risk:.1f} %" if math.isfinite(risk) else "–"


def _time(value: object) -> datetime | None:
    try:
        return datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        return None


def _list(value: object) -> list:
    return value if isinstance(value, list) else []
