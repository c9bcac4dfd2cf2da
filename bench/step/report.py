"""What `bench.step` found, as tables, as records, as verdicts on targets, and as a plot."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.records import columns
from bench.step.catalog import BF16, OURS, RIVALS
from bench.step.measure import Result
from bench.step.variants import PARTS
from bench.step.workloads import Workload, padded_fill
from bench.timing import Ceiling

# workload, rival, speed-up that ours must reach; all at width 512 or less, on a CPU
TARGETS = (
    ("W2", "B1", 1.25, "c = 0.75, against three packed forwards"),
    ("W1", "B1", 1.05, "c = 0.5, against three packed forwards"),
    ("W3", "B0", 2.5, "log-normal lengths, against the padded reference"),
    ("W1-256", "B1", 0.95, "width 256, c = 0.5, against three packed forwards"),
    ("W2-256", "B1", 0.95, "width 256, c = 0.75, against three packed forwards"),
    ("E8", "B1", 3.0, "8 decision nodes of a window, against a packed forward each"),
)
# told apart with every common colour vision deficiency
COLOURS = dict(
    zip(PARTS, ("#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#009E73", "#AA4499"), strict=True)
)
OTHER = "#8a8f98"
Ceilings = dict[torch.dtype, Ceiling]  # by the dtype of the products


def table(results: list[Result], best: Ceilings) -> str:
    """The variants of a workload: the step, then its parts."""
    workload = results[0].workload
    ours = next((r for r in results if r.variant == OURS and r.times), None)
    rows = [
        [
            "variant",
            "ms 20/50/80 %",
            f"{OURS} is",
            "tokens/s",
            "GFLOP",
            "% of matmul",
            "held MiB",
            "step MiB",
            "first s",
            "error",
        ]
    ]
    for r in results:
        if not r.times:
            rows.append([r.variant, f"not measured: {r.reason}"])
            continue
        seconds = r.quantile(0.5) / 1e3
        faster = f"{speed_up(ours, r):.2f} x" if ours and r is not ours else ""
        rows.append(
            [
                r.variant,
                " / ".join(_ms(r.quantile(q)) for q in (0.2, 0.5, 0.8)),
                faster,
                f"{workload.num_tokens / seconds:,.0f}",
                f"{r.flops / 1e9:,.4g}",
                f"{100 * share(r, best):.0f}",
                f"{r.held_mib:,.0f}",
                "not measured" if r.step_mib is None else f"{r.step_mib:,.0f}",
                f"{r.first_s:.1f}",
                f"{max(r.errors.values()):.0e}",
            ]
        )
    parts = [["% of the step", *PARTS, "other"]]
    for r in results:
        if r.times and not workload.nodes:
            whole = r.quantile(0.5)
            shares = [f"{100 * r.quantile(0.5, part) / whole:.0f}" for part in parts[0][1:]]
            parts.append([r.variant, *shares])
    text = f"{workload.name}: {workload.description}\n{columns(rows, '  ')}"
    return text if len(parts) == 1 else f"{text}\n{columns(parts, '  ')}"


def share(r: Result, best: Ceilings) -> float:
    """Of the ceiling: the products of a step over those of large matrices in the same time."""
    return r.flops / (r.quantile(0.5) / 1e3) / best[r.dtype].matmul


def too_fast(results: list[Result], best: Ceilings) -> list[str]:
    """What cannot be: a step above the ceiling has products counted twice, or a wrong ceiling."""
    return [
        f"{r.workload.name} {r.variant} reaches {100 * share(r, best):.0f} % of the matmul ceiling:"
        " its operations or the ceiling are wrong"
        for r in results
        if r.times and share(r, best) > 1
    ]


def speed_up(ours: Result, rival: Result) -> float:
    """Of medians; those of ours in the same rounds, where they were measured in pairs."""
    beside = replace(ours, times=rival.ours) if rival.ours else ours
    return rival.quantile(0.5) / beside.quantile(0.5)


def fastest(results: list[Result]) -> list[str]:
    """For each workload and dtype, ours against the fastest rival."""
    lines = []
    for ours in (r for r in results if r.variant in (OURS, BF16) and r.times):
        same = [r for r in results if r.workload is ours.workload and r.dtype == ours.dtype]
        rivals = [r for r in same if r.variant in RIVALS and r.times]
        if rivals:
            best = min(rivals, key=lambda r: r.quantile(0.5))
            lines.append(
                f"{ours.workload.name}: {ours.variant} is {speed_up(ours, best):.2f} x as fast as "
                f"{best.variant}, the fastest rival in {_name(ours.dtype)}"
            )
    return lines


def judged(results: list[Result]) -> list[str]:
    """A line for each target whose workload was asked for."""
    by_name = {(r.workload.name, r.variant): r for r in results}
    lines = []
    for workload, rival, least, description in TARGETS:
        ours, other = (by_name.get((workload, name)) for name in (OURS, rival))
        if not (ours or other):
            continue
        if not (ours and ours.times and other and other.times):
            reasons = [r.reason or "no round" if r else "not asked for" for r in (ours, other)]
            lines.append(
                f"{workload} {description}: not measured: {OURS} {reasons[0]}, {rival} {reasons[1]}"
            )
            continue
        factor = speed_up(ours, other)
        met = "met" if factor >= least else "NOT MET"
        lines.append(f"{workload} {description}: {factor:.2f} x, at least {least:g} x: {met}")
    return lines


def record(r: Result, best: Ceilings, ours: Result | None) -> dict[str, Any]:
    """A result for the JSONL file, without the part that is common to a run."""
    w = r.workload
    about: dict[str, Any] = {
        "workload": w.name,
        "about": w.description,
        "model": w.size.name,
        "lengths": list(w.lengths),
        "micro_batch": w.micro,
        "padded_fill": padded_fill(w.lengths),
        "variant": r.variant,
        "dtype": _name(r.dtype),
        "linear": r.linear,
        "errors": r.errors,
        "tolerance": {"losses": r.tolerance[0], "gradients": r.tolerance[1]},
    }
    if not r.times:
        return about | {"not_measured": r.reason}
    seconds = r.quantile(0.5) / 1e3
    return about | {
        "rounds": len(r.times),
        **{f"ms_p{round(100 * q)}": r.quantile(q) for q in (0.2, 0.5, 0.8)},
        "ms_parts": {part: r.quantile(0.5, part) for part in (*PARTS, "other")},
        "first_s": r.first_s,
        "tokens": w.num_tokens,
        "tokens_per_s": w.num_tokens / seconds,
        "flops": r.flops,
        "tflop_per_s": r.flops / seconds / 1e12,
        "measured_tflop_per_s": best[r.dtype].matmul / 1e12,
        "measured_library": best[r.dtype].library,
        "matmul_share": share(r, best),
        "held_mib": r.held_mib,
        "step_mib": r.step_mib,
        "ours_is_faster_by": speed_up(ours, r) if ours and ours.times else None,
    }


def plot(results: list[Result], path: Path, title: str) -> None:
    """Stacked bars of the parts of a step, a panel for each workload: SVG or PNG by the suffix."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    panels: dict[str, list[Result]] = {}
    for r in (r for r in results if r.times):
        name = r.workload.name
        if r.variant in (*RIVALS, OURS, BF16):
            panels.setdefault(name, []).append(r)
        else:  # ours, changed: beside ours, in a panel of their own
            own = panels.setdefault(f"{name}, {OURS} changed", [])
            own += [] if own else [x for x in panels.get(name, []) if x.variant == OURS]
            own.append(r)
    panels = dict(sorted(panels.items(), key=lambda item: OURS in item[0]))
    wide = min(2, len(panels))
    deep = math.ceil(len(panels) / wide)
    bars = [max(len(v) for v in list(panels.values())[i * wide :][:wide]) for i in range(deep)]
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "smbfast", "font.size": 8.5}
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(
            deep,
            wide,
            figsize=(5.6 * wide, 0.9 + sum(0.28 * b + 0.75 for b in bars)),
            squeeze=False,
            height_ratios=[0.28 * b + 0.3 for b in bars],
            layout="constrained",
        )
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis, (name, panel) in zip(axes.flat, panels.items(), strict=False):
            _panel(axis, name, panel)
        handles = [Patch(color=colour, label=part) for part, colour in COLOURS.items()]
        handles.append(Patch(color=OTHER, label="other"))
        figure.legend(handles=handles, loc="outside lower center", ncols=4 * wide, frameon=False)
        figure.suptitle(title, x=0.01, ha="left", fontsize=9)
        path.parent.mkdir(exist_ok=True)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, metadata=metadata, dpi=110)
        pyplot.close(figure)


def _panel(axis: Any, name: str, results: list[Result]) -> None:
    """Bars from the top in the order of the table; ours is bold."""
    workload: Workload = results[0].workload
    ours = next((r for r in results if r.variant == OURS), None)
    longest = max(r.quantile(0.5) for r in results)
    for row, r in enumerate(results):
        left, whole = 0.0, r.quantile(0.5)
        parts = {part: r.quantile(0.5, part) for part in (*PARTS, "other")}
        scale = whole / sum(parts.values())  # medians of parts do not add up to that of the whole
        for part, ms in parts.items():
            colour = COLOURS.get(part, OTHER)
            axis.barh(row, scale * ms / 1e3, left=left, color=colour, height=0.72)
            left += scale * ms / 1e3
        faster = f"  {speed_up(ours, r):.2f} x" if ours and r is not ours else ""
        weight = "bold" if r is ours else "normal"
        axis.text(left, row, f" {whole / 1e3:.3g} s{faster}", va="center", weight=weight)
    axis.set_yticks(range(len(results)), [r.variant for r in results])
    for label in axis.get_yticklabels():
        label.set_weight("bold" if label.get_text() == OURS else "normal")
    axis.invert_yaxis()
    axis.set_xlim(0, 1.4 * longest / 1e3)
    axis.set_xlabel("seconds", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(f"{name}: {workload.description.split(' (scaled')[0]}", loc="left", fontsize=8.5)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
