"""Writes the page of an experiment: what was said before it, claims, plots, and all figures."""

import math
import re
from pathlib import Path
from typing import Any

from smbfast.base.files import committed_file
from smbfast.reporting import comparisons
from smbfast.reporting.comparisons import Curve, Estimate, Interval, look_of, written
from smbfast.reporting.html import plots, rendered

_LEVELS = {"supported": "good", "refuted": "bad"}
_MEAN = "mean"


def write_experiment(path: Path, record: dict[str, Any]) -> Path:
    """Write the page of a record, as `smbfast.experiments.conduct` makes it; return its path."""
    page = render(record)
    with committed_file(path, private=True) as staging:
        staging.write_bytes(page.encode("utf-8", errors="replace"))
    return path


def render(record: dict[str, Any]) -> str:
    """Return the whole page as text, without script."""
    claims = [
        {
            "level": _LEVELS.get(claim["verdict"], "unknown"),
            "verdict": claim["verdict"],
            "pair": f"{claim['one']} > {claim['other']}",
            "text": claim["text"],
            "difference": written(_interval(claim["difference"]), signed=True),
            "p": "–" if claim["p_holm"] is None else f"{claim['p_holm']:.3f}",
        }
        for claim in record.get("claims", [])
    ]
    return rendered(
        "experiment.html",
        title=record["experiment"],
        plan=record["plan"],
        text=re.sub(r"(?<![\w.])-(?=\d)", "−", record["text"]),
        claims=claims,
        plots=plots(figures(record)),
        columns=_columns(record),
        rows=_rows(record),
        replicates=record["replicates"],
    )


def figures(record: dict[str, Any]) -> list[str | None]:
    """Return the plots of a record: each arm's figure and the claims, or cosines by moment."""
    if "cosines" in record:
        return [_cosine_plot(arm, own) for arm, own in record["cosines"].items()]
    arms = record["arms"]
    values = [
        Estimate(
            name,
            _interval(own[_MEAN]),
            "own" if name in arms else "oracle" if name == "filter" else "baseline",
        )
        for name, own in record["figures"].items()
        if _MEAN in own
    ]
    gaps = [
        Estimate(f"{c['one']} − {c['other']}", own, look_of(own))
        for c in record["claims"]
        for own in [_interval(c["difference"])]
    ]
    unit = record["unit"]
    return [
        comparisons.forest("values", values, title="Each arm and baseline", unit=unit),
        comparisons.forest(
            "claims", gaps, title="Claims", unit=f"difference in {unit}", level=0.0, signed=True
        ),
    ]


def _cosine_plot(arm: str, own: dict[str, Any]) -> str | None:
    moments = [moment for moment in own["cosine"] if moment != _MEAN]
    place = [float(moment.split()[-1]) for moment in moments]
    labels = {"cosine": "SFT and JEPA", "sft": "SFT, two halves", "jepa": "JEPA, two halves"}
    curves = [
        Curve(label, place, *zip(*(_interval(own[key][m]) for m in moments), strict=True))
        for key, label in labels.items()
    ]
    return comparisons.curve(
        f"cosines-{arm}", curves, title=arm, x="step", y="cosine of gradients", level=(0.0, "null")
    )


def _interval(cell: dict[str, Any]) -> Interval:
    value, low, high = (
        math.nan if cell[key] is None else cell[key] for key in ("value", "low", "high")
    )
    return value, low, high


def _columns(record: dict[str, Any]) -> list[str]:
    return list(next(iter(_table(record).values()), {}))


def _rows(record: dict[str, Any]) -> list[tuple[str, list[str]]]:
    columns = _columns(record)
    return [
        (name, [written(_interval(own[c])) if c in own else "–" for c in columns])
        for name, own in _table(record).items()
    ]


def _table(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return cells by row and column."""
    if "cosines" not in record:
        return dict(record["figures"])
    return {
        f"{arm}, {figure}": cell
        for arm, own in record["cosines"].items()
        for figure, cell in own.items()
    }
