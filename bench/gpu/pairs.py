"""Our step and a rival's in turn, two in memory at a time: the headline, and its opponents."""

from functools import partial
from typing import Any

from bench.gpu.child import Bench, Item
from bench.gpu.journal import FAILED, WRONG
from bench.gpu.sizes import workload

LEFT = ("B0", "B0c", "B1", "B1c")  # nobody who is in a hurry would use them on a GPU
WORKLOADS = ("W1", "W2")


def items(bench: Bench) -> list[Item]:
    """Each rival on both workloads before the next."""
    from bench.step.measure import OURS, variants

    makes = variants(workload("W1", bench.device), bench.device, ablate=False)
    there = [name for name, make in makes.items() if not isinstance(make, str)]
    shared = next(n for n in ("B3' compiled", "B3'") if n in there)
    rivals = [n for n in ("B2", shared, "B3") if n in there]
    rivals += [n for n in there if n not in (*rivals, *LEFT, OURS)]
    if bench.device == "cpu":  # one that is not compiled, which takes minutes there
        rivals = ["B3'"]
    return [
        Item(f"{w}/{rival}", partial(_pair, bench, w, rival), 200)
        for rival in rivals
        for w in WORKLOADS
    ]


def _pair(bench: Bench, name: str, rival: str) -> dict[str, Any]:
    """Both compared with the reference, then timed; what one cannot do does not hide the other."""
    from bench.step.measure import OURS, measure, variants

    load = workload(name, bench.device)
    makes = variants(load, bench.device, ablate=False)
    both = {n: makes[n] for n in (OURS, rival)}
    results = {r.variant: r for r in measure(load, bench.device, both, bench.sizes.rounds[1])}
    rows = {n: _row(r) for n, r in results.items()}
    bad = [f"{n} {r.reason}" for n, r in results.items() if not r.times]
    figures: dict[str, Any] = {"variants": rows}
    if not bad:
        figures["ours_is_faster_by"] = rows[rival]["ms_p50"] / rows[OURS]["ms_p50"]
        return figures
    state = WRONG if any(r.reason.startswith("wrong") for r in results.values()) else FAILED
    return figures | {"state": state, "reason": "; ".join(bad)}


def _row(result: Any) -> dict[str, Any]:
    """What was measured of a variant."""
    row = {"errors": result.errors, "reason": result.reason, "rounds": len(result.times)}
    if not result.times:
        return row
    ms = {f"ms_p{round(100 * q)}": result.quantile(q) for q in (0.2, 0.5, 0.8)}
    return row | {
        **ms,
        "ms_parts": result.times,
        "tokens_per_s": result.workload.num_tokens / ms["ms_p50"] * 1e3,
        "tflop_per_s": result.flops / ms["ms_p50"] / 1e9,
        "flops": result.flops,
        "first_s": result.first_s,
        "held_mib": result.held_mib,
        "step_mib": result.step_mib,
    }
