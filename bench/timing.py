"""Times, peak memory, and what the machine could do at best.

Variants are interleaved: each round calls every one of them once, in a shuffled order, so that a
drift of clocks or of other work hits all alike; quantiles are over rounds. Before each timed call a
buffer larger than the last cache is written, so that inputs come from memory.
"""

import ctypes
import gc
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

MIB = 1 << 20
Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one variant."""

    p20: float
    p50: float
    p80: float
    rounds: int
    timer: str  # clock (CPU), graph (a CUDA graph between events) or events


@dataclass(frozen=True)
class Ceiling:
    """What this machine reached in this run: floors are counted against it."""

    bandwidth: float  # bytes a second, the best of `patterns`
    patterns: dict[str, float]
    matmul: float  # floating-point operations a second, of the dtype asked for

    def raised(self, other: "Ceiling") -> "Ceiling":
        """The better of two measurements: what else runs on the machine comes and goes."""
        patterns = {n: max(rate, other.patterns[n]) for n, rate in self.patterns.items()}
        return Ceiling(max(patterns.values()), patterns, max(self.matmul, other.matmul))

    def floor_ms(self, nbytes: int, flops: int) -> float:
        """No less is possible: the longer of moving the bytes and doing the arithmetic."""
        return 1e3 * max(nbytes / self.bandwidth, flops / self.matmul)

    def bound(self, nbytes: int, flops: int) -> str:
        """Which of the two it is: bytes or flops."""
        return "bytes" if nbytes / self.bandwidth >= flops / self.matmul else "flops"


class Clock:
    """Times calls on one kind of device."""

    def __init__(self, device: str) -> None:
        self.device = device
        # on a GPU also long enough to hide the launch of what is timed
        size = max(2 * last_cache_bytes(device), 256 * MIB if device == "cuda" else 0)
        self.flush = torch.zeros(size // 4, device=device)

    def ready(self, call: Call, graph: bool) -> tuple[Call, str]:
        """What is timed of a call that has been made before, and by which timer."""
        if self.device == "cpu":
            return call, "clock"
        if not graph or _waits(call):
            return call, "events"
        try:
            return _captured(call), "graph"
        except RuntimeError:
            torch.cuda.synchronize()
            return call, "events"

    def once(self, call: Call) -> float:
        """Milliseconds of one call, with cold caches."""
        self.flush.add_(1.0)
        if self.device == "cpu":
            began = time.perf_counter_ns()
            result = call()
            spent = time.perf_counter_ns() - began
            del result  # what it allocated is given back outside the measured time
            return spent / 1e6
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()  # the flush still runs, so that launching is hidden behind it
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def interleaved(
        self,
        calls: dict[str, Call],
        *,
        seconds: float,
        least: int = 3,
        most: int = 100,
        graph: bool = True,
    ) -> dict[str, Timing]:
        """Times of each call.

        Args:
            calls: made before, so that nothing is compiled any more.
            seconds: of measuring, all calls together; `least` rounds come first.
            graph: on a GPU, calls may be captured: they read nothing from host memory.
        """
        ready = {name: self.ready(call, graph) for name, call in calls.items()}
        times: dict[str, list[float]] = {name: [] for name in calls}
        order, draw = list(calls), random.Random(0)
        began = time.perf_counter()
        gc.collect()
        gc.disable()
        try:
            for done in range(most):
                if done >= least and time.perf_counter() - began > seconds:
                    break
                draw.shuffle(order)
                for name in order:
                    times[name].append(self.once(ready[name][0]))
        finally:
            gc.enable()
        return {name: _timing(found, ready[name][1]) for name, found in times.items()}


def _timing(times: list[float], timer: str) -> Timing:
    p20, p50, p80 = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return Timing(p20, p50, p80, len(times), timer)


def _waits(call: Call) -> bool:
    """Whether a call waits for the GPU, which a capture does not survive."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def _captured(call: Call) -> Call:
    """The call as one CUDA graph: its kernels without the time to launch each."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay() -> object:
        graph.replay()
        return kept  # its memory belongs to the graph

    return replay


def last_cache_bytes(device: str) -> int:
    """Of the GPU's L2 or the processor's last level; a guess of 64 MiB where it is not told."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [
        p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("*/size")
    ]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(s[:-1]) * units[s[-1]] for s in sizes if s[-1] in units), default=64 * MIB)


def peak_mib(call: Call, device: str) -> float | None:
    """MiB that a call holds at its peak above what was held before it, results included.

    On a CPU by the kernel's high-water mark of resident memory, reset before the call; None where
    it cannot be reset.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / MIB
        del result
        return peak
    try:
        # freed memory that the allocator keeps would hide what the call takes
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before, mark = _resident("VmRSS"), _resident("VmHWM")
    except (OSError, AttributeError):
        return None
    if mark > before + MIB:
        return None
    result = call()
    peak = _resident("VmHWM") - before
    del result
    return max(peak, 0) / MIB


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def ceiling(clock: Clock, dtype: torch.dtype, *, seconds: float = 1.5) -> Ceiling:
    """Measure the best bandwidth of three access patterns, and the rate of a large matmul."""
    device = clock.device
    count = (256 if device == "cuda" else 64) * MIB  # elements of 4 bytes
    a, b = torch.ones(count, device=device), torch.ones(count, device=device)
    size = 8192 if device == "cuda" else 2048
    x, y = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    z = x @ y
    calls: dict[str, Call] = {
        "read": lambda: torch.sum(a),
        "scale in place": lambda: a.mul_(1.0),
        "copy": lambda: b.copy_(a),
        "matmul": lambda: torch.mm(x, y, out=z),
    }
    moved = {"read": 4 * count, "scale in place": 8 * count, "copy": 8 * count}
    for call in calls.values():
        call()
    times = clock.interleaved(calls, seconds=seconds)
    # the quick end: a floor is what the machine can do when nothing disturbs it
    patterns = {name: moved[name] / times[name].p20 * 1e3 for name in moved}
    return Ceiling(max(patterns.values()), patterns, 2 * size**3 / times["matmul"].p20 * 1e3)
