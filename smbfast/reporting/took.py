"""What a run was and what it took: its command, digests, tokens, FLOPs, time and memory.

Everything is read from records, and a run of an earlier version that did not write a figure shows
none. Captions of plots say what was logged, counted from the records that are drawn.
"""

import math

import numpy as np

from smbfast.reporting.cells import mapping
from smbfast.reporting.figures import POINTS
from smbfast.reporting.runlog import Phase, Run, column, number

Rows = list[tuple[str, str]]


def at_a_glance(run: Run) -> Rows:
    """Return the figures of the head of the page, name and text; unknown ones are left out."""
    evals = [record for phase in run.phases for record in phase.evals]
    rows = [
        (label, _fixed(_last(column(evals, key))))
        for key, label in (
            ("sft", "tuning SFT loss, last"),
            ("jepa", "tuning JEPA loss, last"),
            ("codes", "tuning loss of codes to come, last"),
        )
    ]
    tokens, epochs = _seen(run, "tokens"), _seen(run, "epochs")
    rows += [
        ("tokens seen", si(tokens)),
        ("epochs", f"{epochs:,.3g}" if math.isfinite(epochs) else ""),
        ("FLOPs", si(_seen(run, "flops"))),
        ("tokens / s, median", _whole(_median(run, "tokens_per_s"))),
        ("peak memory", _gib(_peak(run))),
    ]
    return [(label, text) for label, text in rows if text]


def command(run: Run) -> tuple[str, str] | None:
    """Return the command of a run and how it is called: one that has not ended goes on by it."""
    text = str(run.status.get("command") or "")
    over = run.end is not None or run.status.get("state") == "done"
    return ("command" if over else "to go on", text) if text else None


def fingerprint(run: Run) -> str:
    """Return the digest of the MEDS data that a run read, or nothing."""
    return str(mapping(run.header.get("digests")).get("data") or "")


def table(run: Run) -> Rows:
    """Return what the run took, name and text, each with the words that make it readable."""
    data, memory = mapping(run.header.get("data")), mapping(run.header.get("memory"))
    ranks = number(mapping(run.header.get("run")).get("ranks"))
    tokens, epochs, flops = (_seen(run, key) for key in ("tokens", "epochs", "flops"))
    rows: Rows = []
    if math.isfinite(tokens):
        rows.append(("tokens seen", f"{tokens:,.0f}, those of trunks, each once a step"))
    if math.isfinite(epochs):
        whole = number(data.get("window_tokens"))
        of = f"the {whole:,.0f} tokens of " if math.isfinite(whole) else "those of "
        rows.append(("epochs", f"{epochs:,.3f}: tokens seen over {of}all training windows"))
    if math.isfinite(flops):
        whose = f", of one of {ranks:.0f} ranks" if ranks > 1 else ""
        work = f"{si(flops)} in matrix products and attention{whose}, by formula"
        reached = _median(run, "matmul")
        if math.isfinite(reached):
            work += f"; {reached:.0%} of this device's rate for a large product, in the median"
        rows.append(("FLOPs", work))
    if math.isfinite(peak := _peak(run)):
        rows.append(("memory, measured", f"{_gib(peak)}, {_of_what(run)}"))
        predicted, before = number(memory.get("predicted")), number(memory.get("before"))
        if math.isfinite(predicted):
            less = f"; measured without what was there before, {_gib(peak - before)}"
            text = f"{_gib(predicted)} for model, optimizer and the largest step"
            rows.append(("memory, predicted", text + (less if math.isfinite(before) else "")))
        with_probes = number((run.end or {}).get("memory_gib"))
        if math.isfinite(with_probes):
            # of a run that went on in another process, the last one may have taken less
            most = max(peak, with_probes)
            rows.append(("memory, at the end", f"{_gib(most)}, with embedding and probing"))
    return rows


def _of_what(run: Run) -> str:
    if str(run.header.get("device", "")).startswith("cuda"):
        return "the peak of the GPU's allocator"
    before = number(mapping(run.header.get("memory")).get("before"))
    there = f", {_gib(before)} of which were there before the model" if before == before else ""
    return f"the peak of what was resident since the process began, preparing included{there}"


def captions(run: Run) -> dict[str, str]:
    """Return what plots of losses, of health and of steps show, counted from their records."""
    return {
        "losses": f"{_logged(run.phases)} {_pale(run.phases)} {_evaluated(run.phases)}",
        "health": _evaluated(run.phases),
        "steps": f"{_logged(run.phases)} A spike between two of them is not seen.",
    }


def _logged(phases: list[Phase]) -> str:
    logged = sum(len(phase.steps) for phase in phases)
    done = phases[-1].end if phases else 0
    if logged >= done:
        return f"Every step was logged: {logged:,} of {done:,}."
    gaps = [np.diff(column(phase.steps, "step")) for phase in phases]
    usual = int(np.median(np.concatenate(gaps))) if any(len(gap) for gap in gaps) else 0
    about = f", mostly one in {usual}" if usual > 1 else ""
    return f"Logged steps alone are drawn: {logged:,} of {done:,}{about}."


def _pale(phases: list[Phase]) -> str:
    text = "Pale: the loss of each such step alone. Blue: their exponential mean over a fortieth "
    text += "of the phase."
    if any(len(phase.steps) > POINTS for phase in phases):
        text += f" Of a phase with more than {POINTS}, {POINTS} evenly spaced ones are drawn."
    return text


def _evaluated(phases: list[Phase]) -> str:
    num = sum(len(phase.evals) for phase in phases)
    times = "1 evaluation" if num == 1 else f"{num:,} evaluations"
    return f"Points: {times}, on the same tuning windows throughout a phase."


def _seen(run: Run, key: str) -> float:
    return _last(column([record for phase in run.phases for record in phase.steps], key))


def _peak(run: Run) -> float:
    value_N = column([record for phase in run.phases for record in phase.steps], "memory_gib")
    return float(np.nanmax(value_N)) if np.isfinite(value_N).any() else math.nan


def _median(run: Run, key: str) -> float:
    value_N = column([record for phase in run.phases for record in phase.steps], key)
    finite_N = value_N[np.isfinite(value_N)]
    return float(np.median(finite_N)) if len(finite_N) else math.nan


def _last(value_N: np.ndarray) -> float:
    finite_N = value_N[np.isfinite(value_N)]
    return float(finite_N[-1]) if len(finite_N) else math.nan


def _fixed(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else ""


def _whole(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else ""


def _gib(value: float) -> str:
    return f"{value:,.2f} GiB" if math.isfinite(value) else ""


def si(value: float) -> str:
    """Return a large count with its unit, such as 1.32 M; nothing where it is unknown."""
    if not math.isfinite(value):
        return ""
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}"
