"""What the C++ implementations promise on a CPU, and whether this run met it."""

from bench.cases import BOTH, UPDATE
from bench.measure import COMPILED, EAGER, Result
from bench.rivals import ADDMM_LERP
from bench.timing import Ceiling

Results = dict[tuple[str, str], list[Result]]  # of each operation and case

MSE_CASES = ("8192x4096", "8192x4096 normed before")
EMA_CASE = "gate 12288x4096 fp32"


def judged(results: Results, tests: dict[str, str], best: Ceiling) -> list[str]:
    """A line for each promise: the figures, and met or not met.

    Args:
        tests: how the tests of each operation ended; without green ones there are no speed-ups.
    """
    lines = []
    for case in MSE_CASES:
        if ("masked_jepa_mse", case) in results:
            found = _variants(results["masked_jepa_mse", case], BOTH)
            lines.append(_line("masked_jepa_mse", case, _mse(found), tests))
    if ("ema_update_", EMA_CASE) in results:
        found = _variants(results["ema_update_", EMA_CASE], UPDATE)
        lines.append(_line("ema_update_", EMA_CASE, _ema(found, best), tests))
    return lines


def _line(op: str, case: str, told: str, tests: dict[str, str]) -> str:
    if tests[op] != "green":
        told = f"not judged: its tests are {tests[op]}"
    return f"{op} {case}: {told}"


def _variants(results: list[Result], mode: str) -> dict[str, Result]:
    return {r.variant: r for r in results if r.mode == mode}


def _missing(found: dict[str, Result], *names: str) -> str:
    for name in names:
        if name not in found or found[name].timing is None:
            return f"not measured: {name}: {found[name].reason if name in found else 'not run'}"
        if not found[name].right:
            return f"not met: {name} is off by {found[name].error:.1e}"
    return ""


def _mse(found: dict[str, Result]) -> str:
    missing = _missing(found, "cpp", EAGER)
    if missing:
        return missing
    ms = found["cpp"].timing.p50
    eager = found[EAGER].timing.p50 / ms
    told = f"cpp {ms:.1f} ms, {eager:.2f}x eager (at least 3: {_met(eager >= 3)})"
    missing = _missing(found, COMPILED)
    if missing:
        return f"{told}; {missing}"
    compiled = found[COMPILED].timing.p50 / ms
    return f"{told}, {compiled:.2f}x torch.compile (at least 1.5: {_met(compiled >= 1.5)})"


def _ema(found: dict[str, Result], best: Ceiling) -> str:
    missing = _missing(found, "cpp", ADDMM_LERP)
    if missing:
        return missing
    cpp = found["cpp"]
    faster = found[ADDMM_LERP].timing.p50 / cpp.timing.p50
    floor = 1e3 * cpp.nbytes / best.bandwidth
    floors = cpp.timing.p50 / floor
    return (
        f"cpp {cpp.timing.p50:.1f} ms, {faster:.2f}x {ADDMM_LERP} (at least 2: {_met(faster >= 2)})"
        f", {floors:.2f}x the bandwidth floor of {floor:.1f} ms (at most 1.5: "
        f"{_met(floors <= 1.5)}); either is enough: {_met(faster >= 2 or floors <= 1.5)}"
    )


def _met(yes: bool) -> str:
    return "met" if yes else "not met"
