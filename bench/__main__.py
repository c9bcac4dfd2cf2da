"""python -m bench [op ...]: each operation at each shape: eager, torch.compile, ours and rivals.

An operation's own tests run first, and no speed-up is printed unless they pass. Every time stands
beside its floor: counted bytes over the bandwidth, or counted operations over the matmul rate, that
this machine reached in the same run.
"""

import sys
import time
from typing import ClassVar

import torch
from pydantic import Field, field_validator
from smbkernels.registry import OPS

from bench import cases, records
from bench.measure import COMPILED, Result, as_record, gate, measure
from bench.timing import Ceiling, Clock, Device, ceiling
from smbfast.base.config import Settings, command_line
from smbfast.base.runtime import choose_device

NOMINAL = {"H200": (4.3e12, 788e12)}  # bytes and bf16 operations a second, sustained at best


class KernelBench(Settings):
    """Measure operations: the reference, plain and compiled, our implementations, and rivals.

    Operations may be given as plain arguments. The tests of each run first, and no speed-up is
    printed unless they pass. Every time stands beside its floor: the longer of counted bytes over
    the bandwidth and counted operations over the matmul rate that this machine reached in the same
    run. Red tests, a wrong result or an implementation that fails make the command exit with
    status 1. What the columns mean is in bench/README.md.
    """

    epilog: ClassVar[str] = """Examples

  Every operation at a shape or two, in minutes:
    python -m bench --quick

  Two operations at all their shapes, appended to bench/results/kernels.jsonl:
    python -m bench ema_update_ masked_jepa_mse --save"""

    ops: list[str] = Field(
        [],
        description="Operations to measure, the same as plain arguments. If the list is empty, all "
        "are measured.",
    )
    device: Device = Field(
        "auto", description="Device to measure on. `auto` is the GPU, or the CPU if there is none."
    )
    no_gate: bool = Field(
        False, description="Do not run the tests of the operations first. Prints no speed-up."
    )
    quick: bool = Field(
        False, description="Take a shape or two of each operation, and at most a second for each."
    )
    seconds: float = Field(
        3.0,
        gt=0,
        description="Seconds to measure a shape in one mode (forward, forward+backward or update), "
        "all variants together. Each is called at least three times.",
    )
    save: bool = Field(False, description="Append the results to bench/results/kernels.jsonl.")

    @field_validator("ops")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        for name in value:
            if name not in measured_ops():
                raise ValueError(f"must be among {', '.join(measured_ops())}; `{name}` is not")
        return value


def measured_ops() -> list[str]:
    """Operations that have an implementation beside their reference."""
    return [name for name, entry in OPS.items() if entry.backends]


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    plain = [a for a in argv if not a.startswith("-") and "=" not in a]
    options = [a for a in argv if a not in plain]
    settings = command_line(
        KernelBench,
        [*options, *([f"--ops={','.join(plain)}"] if plain else [])],
        prog="python -m bench",
    )
    device, began = choose_device(settings.device).type, time.perf_counter()
    stamp = records.stamp("kernels", device)
    clock = Clock(device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    best = ceiling(clock, dtype)
    nominal = next((v for k, v in NOMINAL.items() if k in stamp["device_name"]), None)
    print("\n".join(_head(stamp, best, nominal)))

    seconds = min(settings.seconds, 1.0) if settings.quick else settings.seconds
    wanted, lines, problems = settings.ops or measured_ops(), [], []
    for op in wanted:
        tests, summary = ("skipped", "--no-gate") if settings.no_gate else gate(op, device)
        print(f"\n{op}: tests {tests} ({summary})")
        if tests != "green":
            print("  no speed-up is printed")
        problems += [f"{op}: its tests are red"] if tests == "red" else []
        best = best.raised(ceiling(clock, dtype))
        for case in (c for c in cases.on(device, quick=settings.quick) if c.op == op):
            results = measure(case, clock, best, seconds=seconds)
            for mode in dict.fromkeys(r.mode for r in results):
                print("\n" + _printed(case, [r for r in results if r.mode == mode], tests, best))
            problems += _problems(case, results)
            lines += [stamp | as_record(case, r, best, tests, nominal) for r in results if r.timing]
    if device == "cpu":
        print("\n" + _not_here([c for c in cases.on_cuda() if c.op in wanted]))
    if settings.save:
        print(f"{len(lines)} records appended to {records.append('kernels', lines)}")
    print(f"{time.perf_counter() - began:.0f} s")
    if problems:
        print("\n".join(["failed:", *dict.fromkeys(problems)]))
        raise SystemExit(1)


def _problems(case: cases.Case, results: list[Result]) -> list[str]:
    """Implementations of ours that failed, and variants that compute something else."""
    failed = [f"{case.op} {case.name}: {r.variant} {r.reason}" for r in results if r.failed]
    return failed + [f"{case.op} {case.name}: {r.variant} is wrong" for r in results if not r.right]


def _head(stamp: dict, best: Ceiling, nominal: tuple[float, float] | None) -> list[str]:
    used = {k: v for k, v in stamp["versions"].items() if k in ("python", "torch", "triton")}
    patterns = ", ".join(f"{name} {rate / 1e9:.4g}" for name, rate in best.patterns.items())
    lines = [
        f"{stamp['device']}: {stamp['device_name']}, {stamp['threads']} threads, load "
        f"{stamp['load']}; {', '.join(f'{k} {v}' for k, v in used.items())}; git {stamp['git']}",
        f"measured here: {best.bandwidth / 1e9:.4g} GB/s (the best of {patterns}), "
        f"{best.matmul / 1e12:.4g} TFLOP/s ({best.library} matmul)",
    ]
    if nominal:
        lines.append(f"nominal: {nominal[0] / 1e9:.4g} GB/s, {nominal[1] / 1e12:.4g} TFLOP/s")
    return lines


def _printed(case: cases.Case, results: list[Result], tests: str, best: Ceiling) -> str:
    """The variants of a case in one mode."""
    first = results[0]
    flop_unit, per = ("GFLOP/s", 1e9) if case.device == "cpu" else ("TFLOP/s", 1e12)
    if first.bound == "bytes":
        unit, per, amount = "GB/s", 1e9, first.nbytes
        floor = f"{amount / 1e6:.4g} MB at {best.bandwidth / 1e9:.4g} GB/s"
    else:
        unit, amount = flop_unit, first.flops
        floor = f"{amount / 1e9:.4g} GFLOP at {best.matmul / per:.4g} {unit}"
    dtype = str(case.dtype).removeprefix("torch.")
    title = f"{case.op} {case.name} {dtype}, {first.mode}: floor {_ms(first.floor_ms)} ms ({floor})"
    by_name = {r.variant: r for r in results}
    against = [first.baseline, COMPILED] if tests == "green" else []
    against = [n for n in against if n in by_name and by_name[n].timing]
    header = ["variant", "ms 20/50/80 %", unit, "% of floor", "peak MiB", "first call s", "error"]
    rows = [header + [f"x {name}" for name in against]]
    for r in results:
        if r.timing is None:
            rows.append([r.variant, f"not measured: {r.reason}"])
            continue
        t = r.timing
        error = "-" if r.error is None else f"{r.error:.0e}" + ("" if r.right else " WRONG")
        row = [
            r.variant + (" (with launches)" if t.timer == "events" else ""),
            f"{_ms(t.p20)} / {_ms(t.p50)} / {_ms(t.p80)}",
            _ms(1e3 * amount / t.p50 / per),
            f"{100 * r.floor_ms / t.p50:.0f}",
            "not measured" if r.peak_mib is None else f"{r.peak_mib:.0f}",
            f"{r.first_call_s:.2f}",
            error,
        ]
        for name in against:
            shown = name != r.variant and r.right
            row.append(f"{by_name[name].timing.p50 / t.p50:.2f}" if shown else "")
        rows.append(row)
    return f"{title}\n{records.columns(rows, indent='  ')}"


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _not_here(there: list[cases.Case]) -> str:
    """The cases of a GPU, where there is none."""
    names: dict[str, list[str]] = {}
    for case in there:
        names.setdefault(case.op, []).append(case.name)
    rows = [f"  {op}: not measured: no CUDA device ({', '.join(n)})" for op, n in names.items()]
    return "\n".join(["On a GPU, bf16:", *rows])


if __name__ == "__main__":
    main()
