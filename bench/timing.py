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
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator

from smbfast.base.runtime import held_memory, matmul_rate, reset_peak_memory

MIB = 1 << 20
Call = Callable[[], object]


def _present(device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("needs a CUDA GPU; torch sees none")
    return device


Device = Annotated[Literal["auto", "cpu", "cuda"], AfterValidator(_present)]  # a setting


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
    library: str = ""  # that reached them

    def raised(self, other: "Ceiling") -> "Ceiling":
        """The better of two measurements: what else runs on the machine comes and goes."""
        patterns = {n: max(rate, other.patterns[n]) for n, rate in self.patterns.items()}
        best = max(self, other, key=lambda measured: measured.matmul)
        return Ceiling(max(patterns.values()), patterns, best.matmul, best.library)

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
        return {name: _timing(taken, ready[name][1]) for name, taken in times.items()}


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
        result = call()

    def replay() -> object:
        graph.replay()
        return result  # its memory belongs to the graph

    return replay


def last_cache_bytes(device: str) -> int:
    """Of the GPU's L2 or the processor's last level; a guess of 64 MiB where it cannot be read."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [
        p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("*/size")
    ]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(s[:-1]) * units[s[-1]] for s in sizes if s[-1] in units), default=64 * MIB)


def finished(call: Call, device: str) -> Call:
    """The call together with its work on the GPU, which a call only starts."""
    if device == "cpu":
        return call

    def waiting() -> object:
        result = call()
        torch.cuda.synchronize()
        return result

    return waiting


def peak_mib(call: Call, device: str) -> float | None:
    """MiB that a call holds at its peak above what was held before it, results included.

    On a CPU by the kernel's high-water mark of resident memory, reset before the call; None where
    it cannot be reset.
    """
    gc.collect()
    where = torch.device(device)
    if device == "cuda":
        torch.cuda.synchronize()
    else:
        try:
            # freed memory that the allocator keeps would hide what the call takes
            ctypes.CDLL(None).malloc_trim(0)
        except (OSError, AttributeError):
            return None
    if not reset_peak_memory(where):
        return None
    before = held_memory(where)
    if held_memory(where, peak=True) > before + MIB:
        return None
    result = finished(call, device)()
    peak = held_memory(where, peak=True) - before
    del result
    return max(peak, 0) / MIB


def ceiling(
    clock: Clock, dtype: torch.dtype, *, seconds: float = 1.5, cpu_time: bool = False
) -> Ceiling:
    """Measure the best bandwidth of three access patterns, and the rate of a large matmul.

    The rate is that of `smbfast.base.runtime.matmul_rate`, which a training run logs as `matmul`:
    on a CPU of the faster of two libraries; records before it say none, and hold torch's own.
    Records whose `git` is 350b7de or 36594bb hold another figure: the 20 % quantile of products
    that took turns with the patterns, of 2048 x 2048 matrices on a CPU.

    Args:
        cpu_time: the seconds of a product are those of the process on the CPU.
    """
    device = clock.device
    num_elements = (256 if device == "cuda" else 64) * MIB  # of 4 bytes
    a, b = torch.ones(num_elements, device=device), torch.ones(num_elements, device=device)
    calls: dict[str, Call] = {
        "read": lambda: torch.sum(a),
        "scale in place": lambda: a.mul_(1.0),
        "copy": lambda: b.copy_(a),
    }
    moved = {"read": 4 * num_elements, "scale in place": 8 * num_elements, "copy": 8 * num_elements}
    for call in calls.values():
        call()
    times = clock.interleaved(calls, seconds=seconds)
    # the quick end: a floor is what the machine can do when nothing disturbs it
    patterns = {name: moved[name] / times[name].p20 * 1e3 for name in moved}
    now = time.process_time if cpu_time else time.perf_counter
    rate = matmul_rate(torch.device(device), dtype, now=now)
    return Ceiling(max(patterns.values()), patterns, rate.flops, rate.library)
