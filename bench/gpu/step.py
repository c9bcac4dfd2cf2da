"""Our step on W1: rounds in parts, the peak of its memory, and its kernels by torch.profiler."""

from collections import defaultdict
from functools import cache, partial
from typing import Any

from torch.profiler import ProfilerActivity, profile, supported_activities

from bench.gpu.child import Bench, Item
from bench.gpu.sizes import workload

ROWS = 60  # of the table of kernels


def items(bench: Bench) -> list[Item]:
    """One variant, built once."""
    return [
        Item("W1", partial(_rounds, bench), 80),
        Item("W1/kernels", partial(_kernels, bench), 60),
    ]


@cache
def _ours(bench_device: str) -> tuple[Any, Any]:
    from bench.step.measure import OURS, variants

    load = workload("W1", bench_device)
    make = variants(load, bench_device, ablate=False)[OURS]
    variant = make(load.size.encoder(bench_device))
    variant.take(load)
    variant.ready()
    return load, variant


def _rounds(bench: Bench) -> dict[str, Any]:
    from bench.step.measure import Parts
    from bench.timing import MIB, peak_mib

    load, variant = _ours(bench.device)
    variant.step()  # compiles
    times = []
    for _ in range(bench.sizes.rounds[0]):
        bench.wait()
        parts = Parts(bench.device)
        variant.step(parts)
        times.append(parts.read())
    whole = sorted(sum(t.values()) for t in times)[len(times) // 2]
    return {
        "variant": type(variant).__name__,
        "tokens": load.num_tokens,
        "tokens_per_s": load.num_tokens / whole * 1e3,
        "ms": whole,
        "ms_parts": times,
        "held_mib": variant.held() / MIB,
        "step_mib": peak_mib(variant.step, bench.device),
    }


def _kernels(bench: Bench) -> dict[str, Any]:
    """Of one micro-batch, forward and backward, once it is warm."""
    from bench.step.variants import untimed

    _, variant = _ours(bench.device)
    variant.batches = variant.batches[:1]
    for _ in range(2):  # with the gradients of an earlier micro-batch, as in a step
        variant.accumulate(untimed)
    bench.wait()
    gpu = ProfilerActivity.CUDA in supported_activities()
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as seen:
        variant.accumulate(untimed)
        bench.wait()
    spans: dict[str, list[float]] = defaultdict(list)
    ends: list[tuple[float, float]] = []
    for event in seen.events():
        if event.device_type.name == ("CUDA" if gpu else "CPU"):
            spans[event.name].append(event.time_range.elapsed_us())
            ends.append((event.time_range.start, event.time_range.end))
    return {"tokens": variant.batches[0].segments.tokens, **summed(spans, ends)}


def summed(spans: dict[str, list[float]], ends: list[tuple[float, float]]) -> dict[str, Any]:
    """Microseconds and calls of each kernel, of all together, and between them."""
    order = sorted(spans, key=lambda name: -sum(spans[name]))
    busy, until = 0.0, float("-inf")
    for start, end in sorted(ends):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    whole = until - min(start for start, _ in ends) if ends else 0.0
    return {
        "us": whole,
        "us_busy": busy,
        "calls": len(ends),
        "kernels": [
            {"name": name[:160], "us": sum(spans[name]), "calls": len(spans[name])}
            for name in order[:ROWS]
        ],
        "us_of_the_rest": sum(sum(spans[name]) for name in order[ROWS:]),
    }
