"""python -m bench.tracked: what a step of the target encoder costs, tracked against merged.

Counted for all of Qwen3-8B, and timed on one of its layers (seven linears at full width), on a CPU
unless there is a GPU. A step of a tracked target is the mean over the steps from one truncation to
the next. Both forms are checked against each other before a time is printed.
"""

import statistics
import time
from collections.abc import Callable
from typing import ClassVar

import torch
from pydantic import Field
from smbkernels import ema_update_
from smbkernels.registry import use
from smbkernels.tracked_ema import cost, truncate_

from bench.cases import LAYERS, LINEARS
from bench.records import append, columns, stamp
from smbfast.base.config import Settings, command_line
from smbfast.model.averages import Merged, Source, Tracked

TAU, SCALE = 0.996, 2.0
HALF_A_PERCENT = 0.005  # how far tracked may be from merged, of the averaged s B A


class TrackedBench(Settings):
    """Measure a step of the target encoder's average, tracked at low rank and merged.

    Bytes and operations are counted for all of Qwen3-8B. Times are those of one of its layers, on
    the GPU or, if there is none, on the CPU. Both forms are compared with each other first.
    """

    epilog: ClassVar[str] = """Examples

  As in bench/results/tracked.jsonl:
    python -m bench.tracked --rounds=7

  A tracked target of twice the rank, truncated half as often:
    python -m bench.tracked --rank=8 --every=8"""

    r: int = Field(16, ge=1, description="Rank of the LoRA adapters.")
    rank: int = Field(
        4, ge=1, description="Rank of the tracked target, as a multiple of `r`: 4 is 4 r."
    )
    every: int = Field(
        4, ge=1, description="Number of updates from one truncation to rank `rank` to the next."
    )
    rounds: int = Field(
        5, ge=1, description="Rounds of measuring; in each, every form is updated in turn."
    )
    threads: int = Field(0, ge=0, description="Threads of the CPU. 0 leaves the number to torch.")
    save: bool = Field(False, description="Append the result to bench/results/tracked.jsonl.")


def counted(settings: TrackedBench) -> dict[str, dict[str, float]]:
    """Bytes and floating-point operations of a step over the whole model, and bytes held."""
    shapes = list(LINEARS.values()) * LAYERS
    r, held = settings.r, (settings.rank + settings.every) * settings.r
    tracked = cost(shapes, r, settings.rank * r, settings.every)
    elements = sum(n * k for n, k in shapes)
    meta = [torch.empty(shape, device="meta") for shape in shapes]
    b = [torch.empty(n, r, device="meta") for n, _ in shapes]
    return {
        "merged": {
            "gbytes": 10 * elements / 1e9,
            "gflops": ema_update_.flops(meta, meta, b) / 1e9,
            "held_gb": 4 * elements / 1e9,
        },
        "tracked": {
            "gbytes": tracked.bytes / 1e9,
            "gflops": tracked.flops / 1e9,
            "held_gb": sum(4 * (n + k) * held for n, k in shapes) / 1e9,
        },
    }


def layer(settings: TrackedBench, dtype: torch.dtype, device: str) -> list[Source]:
    """One layer with an adapter as large as a trained one."""
    torch.manual_seed(0)
    sources = []
    for name, (n, k) in LINEARS.items():
        weight = (torch.randn(n, k, device=device) / k**0.5).to(dtype)
        b = 0.01 * torch.randn(n, settings.r, device=device)
        a = torch.randn(settings.r, k, device=device) / k**0.5
        sources.append(Source(f"{name}.base_layer.weight", weight, b, a, SCALE))
    return sources


def moved(sources: list[Source]) -> None:
    """A step of an optimizer, so that no two adapters are the same."""
    for source in sources:
        source.b.add_(torch.randn_like(source.b), alpha=2e-4)
        source.a.add_(torch.randn_like(source.a), alpha=2e-4)


def check(settings: TrackedBench, sources: list[Source]) -> float:
    """How far the two forms are apart after two truncations, of the averaged s B A."""
    merged, tracked = Merged(sources), Tracked(sources, settings.rank, settings.every)
    for _ in range(2 * settings.every + 1):
        moved(sources)
        merged.update(TAU)
        tracked.update(TAU)
    exact, weight = dict(merged.exact()), {s.name: s.weight for s in sources}
    pairs = ((low - exact[n], exact[n] - weight[n]) for n, low in tracked.exact())
    return max(float(gap.norm() / delta.norm()) for gap, delta in pairs)


def timed(calls: dict[str, Callable[[], None]], between: Callable[[], None], rounds: int) -> dict:
    """Milliseconds of each call, and of the processors in it, in every round but the first."""
    device_wide = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            between()
            device_wide()
            start, spent = time.perf_counter(), time.process_time()
            call()
            device_wide()
            took = time.perf_counter() - start, time.process_time() - spent
            if turn:
                times[name].append((1e3 * took[0], 1e3 * took[1]))
    return times


def measure(settings: TrackedBench, device: str) -> dict[str, dict[str, float]]:
    """Milliseconds of a step of one layer, by form and storage.

    Raises:
        RuntimeError: the two forms are not the same average.
    """
    gap = check(settings, layer(settings, torch.float32, device))
    if not gap < HALF_A_PERCENT:
        raise RuntimeError(f"tracked is {gap:.2%} from merged: nothing is timed")
    sources = layer(settings, torch.bfloat16, device)
    halves, tracked = Merged(sources), Tracked(sources, settings.rank, settings.every)
    wide = layer(settings, torch.float32, device)
    full = Merged(wide)

    def reference() -> None:
        with use(ema_update_="torch"):
            full.update(TAU)

    def cycle() -> None:
        for _ in range(settings.every):
            tracked.update(TAU)

    def truncation() -> None:
        for group in tracked.groups:
            truncate_(group.u_MNQ, group.v_MQK, group.held_rank)

    calls = {
        "merged, bf16 and int16 halves": lambda: halves.update(TAU),
        "merged, fp32": lambda: full.update(TAU),
        "merged, fp32, torch": reference,
        "tracked": cycle,
        "tracked, truncation alone": truncation,
    }

    def between() -> None:
        moved(sources)

    rows = {}
    for name, times in timed(calls, between, settings.rounds).items():
        share = settings.every if name == "tracked" else 1
        wall, busy = ([x / share for x in side] for side in zip(*times, strict=True))
        rows[name] = {"ms": statistics.median(wall), "ms_min": min(wall), "ms_max": max(wall)}
        rows[name]["cpu_ms"] = statistics.median(busy)  # other work on the machine is not in it
    return rows


def main(argv: list[str] | None = None) -> None:
    settings = command_line(TrackedBench, argv, prog="python -m bench.tracked")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = stamp("tracked", device)
    counts = counted(settings)
    rows = [["Qwen3-8B, a step", "GB moved", "GFLOP", "GB held"]]
    for name, c in counts.items():
        rows.append([name, *(f"{c[k]:.1f}" for k in ("gbytes", "gflops", "held_gb"))])
    print(f"counted, r {settings.r}, rank {settings.rank} r, truncated every {settings.every}")
    print(columns(rows, "  "))
    times = measure(settings, device)
    print(f"timed, one layer on {about['device_name']}, {about['threads']} threads")
    rows = [["a step", "ms", "fastest", "slowest", "processor ms"]]
    for name, t in times.items():
        rows.append([name, *(f"{t[k]:.1f}" for k in ("ms", "ms_min", "ms_max", "cpu_ms"))])
    print(columns(rows, "  "))
    if settings.save:
        append("tracked", [{**about, **settings.model_dump(), "counted": counts, "timed": times}])


if __name__ == "__main__":
    main()
