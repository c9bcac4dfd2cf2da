"""What this machine reaches: copies for a second, and products for long enough to warm it up.

T tokens, N out and K in features.
"""

import subprocess
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.gpu.child import Bench, Item
from bench.timing import Clock, ceiling

WINDOW = 1.0  # seconds over which a rate is taken: a falling clock shows between them
ASKED = "name,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu,memory.used"


def items(bench: Bench) -> list[Item]:
    """The machine, its bandwidth, and each product."""
    products = [
        Item(name, partial(_product, bench, *shape), 30)
        for name, shape in bench.sizes.products.items()
    ]
    return [
        Item("machine", partial(_machine, bench), 30),
        Item("bandwidth", partial(_bandwidth, bench), 30),
        *products,
    ]


def _machine(bench: Bench) -> dict[str, Any]:
    figures: dict[str, Any] = {"clocks": clocks(), "tools": {}}
    for tool in ("nvcc", "compute-sanitizer", "ncu"):
        figures["tools"][tool] = output(tool, "--version").strip().splitlines()[-1:]
    if bench.device == "cuda":
        about = torch.cuda.get_device_properties(0)
        figures["memory_gib"] = about.total_memory / 2**30
        figures["multiprocessors"] = about.multi_processor_count
    return figures


def _bandwidth(bench: Bench) -> dict[str, Any]:
    best = ceiling(Clock(bench.device), bench.sizes.dtype, seconds=bench.sizes.seconds)
    patterns = {name: rate / 1e9 for name, rate in best.patterns.items()}
    return {"gb_per_s": patterns, "matmul_tflop_per_s": best.matmul / 1e12}


def _product(bench: Bench, T: int, N: int, K: int, seconds: float) -> dict[str, Any]:
    """x W' as in a forward for so long, then dy W as in a backward for a window at most."""
    sizes = bench.sizes
    shape = {"device": bench.device, "dtype": sizes.dtype}
    x_TK, w_NK = torch.randn(T, K, **shape), torch.randn(N, K, **shape)
    forward = sustained(bench, lambda: x_TK @ w_NK.T, seconds)
    y_TN = torch.randn(T, N, **shape)
    backward = sustained(bench, lambda: y_TN @ w_NK, min(seconds, WINDOW))
    work = 2 * T * N * K / 1e12
    moved = sizes.dtype.itemsize * (T * N + N * K + T * K) / 1e9
    return {
        "shape": {"T": T, "N": N, "K": K},
        "tflop_per_s": [work * rate for rate in forward],
        "tflop_per_s_backward": [work * rate for rate in backward],
        "gb_per_s": [moved * rate for rate in forward],
        "clocks": clocks(),
    }


def sustained(bench: Bench, call: Callable[[], object], seconds: float) -> list[float]:
    """Calls a second, in each window of that time."""
    call()
    bench.wait()
    began = time.perf_counter()
    call()
    bench.wait()
    # so many that waiting for them costs nothing
    times = max(1, int(min(0.05, seconds / 4) / max(time.perf_counter() - began, 1e-6)))
    rates, end = [], time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        calls, until = 0, min(start + WINDOW, end)
        while (now := time.perf_counter()) < until:
            for _ in range(times):
                call()
            bench.wait()
            calls += times
        now = time.perf_counter()
        rates.append(calls / (now - start))
    return rates


def clocks() -> dict[str, str]:
    """What nvidia-smi says of clocks, power and temperature; empty without it."""
    said = output("nvidia-smi", f"--query-gpu={ASKED}", "--format=csv,noheader").strip()
    return dict(zip(ASKED.split(","), said.split(", "), strict=False)) if said else {}


def output(*command: str) -> str:
    """What a command prints; empty where it is not there or does not end."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
