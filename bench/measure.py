"""One case: its variants checked against each other, timed interleaved, their memory measured."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from smbkernels.registry import OPS, REFERENCE
from torch import Tensor

from bench.cases import FORWARD, Case, Inputs
from bench.timing import Ceiling, Clock, Timing, finished, peak_mib

ROOT = Path(__file__).resolve().parents[1]
EAGER, COMPILED = "eager", "torch.compile"


@dataclass
class Result:
    """A variant of a case in one mode."""

    variant: str
    mode: str
    nbytes: int
    flops: int
    floor_ms: float
    bound: str  # bytes or flops: which of the two is the floor
    timing: Timing | None = None
    reason: str = ""  # why it was not measured
    failed: bool = False  # ours, and it should have run
    peak_mib: float | None = None
    first_call_s: float | None = None  # with compilation, where there is any
    error: float | None = None  # from the baseline; None: not compared
    tol: float = 0.0
    baseline: str = EAGER  # what speed-ups are counted against

    @property
    def right(self) -> bool:
        """It computes what the baseline does, within the tolerance of the case."""
        return self.error is None or self.error <= self.tol


def files_of(op: str, device: str) -> list[str]:
    """The tests of an operation, and of its backends that run there but for how they are built."""
    ready = [name for name, reason in OPS[op].status(device).items() if reason == "ok"]
    folder = ROOT / "tests" / "ops"
    paths = {p for name in (op.rstrip("_"), *ready) for p in folder.glob(f"test_{name}*.py")}
    return sorted(str(p) for p in paths if not p.stem.endswith("_build"))


def gate(op: str, device: str) -> tuple[str, str]:
    """The tests of an operation on a kind of device: green, red or none, and how they ended."""
    files = files_of(op, device)
    if not files:
        return "none", f"tests/ops has no test_{op.rstrip('_')}*.py"
    env = dict(os.environ)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    if device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
        # Triton on a CPU is the interpreter, which is not measured
        command += ["-k", "not triton"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-300:]]
    if done.returncode == 5:
        return "none", lines[-1]
    if done.returncode:
        reasons = [line[:200] for line in lines if re.match(r"(FAILED|ERROR) ", line)]
        return "red", "; ".join([*reasons[:4], lines[-1]])
    return "green", lines[-1]


def variants(case: Case, inputs: Inputs) -> dict[str, Callable | str]:
    """Everything that computes the case, or why it cannot here."""
    entry = OPS[case.op]
    functions: dict[str, Callable | str] = {EAGER: inputs.rivals.get(REFERENCE, entry.reference)}
    if case.compiled:
        functions[COMPILED] = torch.compile(entry.reference, dynamic=False)
    status = entry.status(case.device)
    for backend in entry.backends:
        reason = status[backend.name]
        if reason == "ok":
            reason = backend.fits(*inputs.args, **inputs.kwargs) or "ok"
        functions[backend.name] = entry.on(backend.name) if reason == "ok" else reason
    functions |= {name: rival for name, rival in inputs.rivals.items() if name != REFERENCE}
    return functions


def difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative difference in the Frobenius norm; infinite where one is not finite."""
    worst = 0.0
    for x, y in zip(actual, expected, strict=True):
        x, y = x.double(), y.double()
        error = float((x - y).norm() / y.norm().clamp_min(1e-300))
        worst = max(worst, error) if error == error else float("inf")
    return worst


def set_up(case: Case) -> tuple[Inputs, dict[str, Callable | str]]:
    """The inputs of a case, always the same, and everything that computes it (`variants`)."""
    torch.manual_seed(0)
    inputs = case.make()
    return inputs, variants(case, inputs)


def measure(case: Case, clock: Clock, best: Ceiling, *, seconds: float) -> list[Result]:
    """All variants in all modes of a case; those that cannot run carry the reason."""
    inputs, functions = set_up(case)
    ours = {b.name for b in OPS[case.op].backends}
    baseline, errors, spent = compared(functions, inputs, ours)
    results = []
    for mode, (nbytes, flops) in inputs.modes.items():
        calls = {}
        for name, function in functions.items():
            result = Result(
                name,
                mode,
                nbytes,
                flops,
                best.floor_ms(nbytes, flops),
                best.bound(nbytes, flops),
                error=errors.get(name),
                tol=inputs.tol,
                baseline=baseline,
            )
            results.append(result)
            if isinstance(function, str):
                result.reason, result.failed = function, function.startswith("failed")
                continue
            call = inputs.call(function, mode)
            try:
                began = time.perf_counter()
                finished(call, case.device)()
                # gradients have been computed once before, to be compared
                before = 0.0 if mode == FORWARD else spent.get(name, 0.0)
                result.first_call_s = max(time.perf_counter() - began, before)
                result.peak_mib = peak_mib(call, case.device)
                calls[name] = call
            except Exception as error:
                result.reason, result.failed = _reason(error), name in ours
        times = clock.interleaved(calls, seconds=seconds, graph=inputs.graph)
        for result in results:
            if result.mode == mode:
                result.timing = times.get(result.variant)
    if case.compiled or case.device == "cuda":
        torch._dynamo.reset()
    if case.device == "cuda":
        torch.cuda.empty_cache()
    return results


def compared(
    functions: dict[str, Callable | str], inputs: Inputs, ours: set[str]
) -> tuple[str, dict[str, float], dict[str, float]]:
    """The baseline, the difference of each other variant from it, and seconds of first calls.

    What fails gives way to the reason. The baseline is that of the inputs, or the next that runs.
    """
    baseline = ""
    expected: list[Tensor] = []
    errors: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for name in sorted(functions, key=lambda n: n != inputs.baseline):
        function = functions[name]
        if isinstance(function, str) or name in inputs.unchecked:
            continue
        began = time.perf_counter()
        try:
            outcome = inputs.outcome(function)
        except Exception as error:
            functions[name] = ("failed: " if name in ours else "") + _reason(error)
            continue
        seconds[name] = time.perf_counter() - began
        if baseline:
            errors[name] = difference(outcome, expected)
        else:
            baseline, expected = name, outcome
    return baseline, errors, seconds


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "not enough memory"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def as_record(case: Case, r: Result, best: Ceiling, tests: str, nominal: tuple | None) -> dict:
    """A measured result for the JSONL file, without the part that is common to a run."""
    seconds = r.timing.p50 / 1e3
    record: dict[str, Any] = {
        "op": case.op,
        "case": case.name,
        "variant": r.variant,
        "mode": r.mode,
        "dtype": str(case.dtype).removeprefix("torch."),
        "shape": case.shape,
        "timer": r.timing.timer,
        "rounds": r.timing.rounds,
        "ms_p20": r.timing.p20,
        "ms_p50": r.timing.p50,
        "ms_p80": r.timing.p80,
        "first_call_s": r.first_call_s,
        "bytes": r.nbytes,
        "flops": r.flops,
        "gb_per_s": r.nbytes / seconds / 1e9,
        "tflop_per_s": r.flops / seconds / 1e12,
        "bound": r.bound,
        "floor_ms": r.floor_ms,
        "floor_share": r.floor_ms / r.timing.p50,
        "measured_gb_per_s": best.bandwidth / 1e9,
        "measured_tflop_per_s": best.matmul / 1e12,
        "measured_library": best.library,
        "peak_mib": r.peak_mib,
        "error": r.error,
        "tolerance": r.tol,
        "tests": tests,
    }
    if nominal:
        floor = 1e3 * max(r.nbytes / nominal[0], r.flops / nominal[1])
        record["nominal_floor_share"] = floor / r.timing.p50
    return record
