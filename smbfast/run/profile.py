"""Takes the time of each part of a training step, forward and backward, and a trace of it.

The parts are named where they run (`smbfast.base.parts`). Autograd numbers the operations of a
forward, and each node of the backward has the number of its operation: so a node belongs to the
part in which that operation ran. Parts may lie within each other. Time counts for the innermost,
except that all of the target encoder's forward is the target's, and all of an evaluation its own.

On a CPU the time of a part is that of the main thread, on a GPU that of the kernels which the part
launched. The rest of the wall time is `other`: what has no part, and on a GPU also its idle time.
"""

import json
import time
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from smbfast.base.files import committed_folder
from smbfast.base.helpers import helper
from smbfast.base.parts import PREFIX, naming, part
from smbfast.data.loader import Step
from smbfast.run.open_run import OpenRun
from smbfast.run.optim import place

WHOLE = ("target", "evaluation")  # parts whose inner parts are theirs
TITLES = {
    "norm": "RMSNorm",
    "qkv": "projections to queries, keys and values",
    "attention": "attention, with RoPE and the output projection",
    "mlp": "MLP",
    "head": "LM head, predictor and both losses",
    "target": "forward of the target encoder",
    "ema": "average of the target encoder",
    "optimizer": "clipping and AdamW",
    "data": "waiting for data",
    "evaluation": "evaluation",
    "checkpoint": "copying a checkpoint, or waiting for the one before",
    "other": "all else",
}
_NODE = "autograd::engine::evaluate_function: "
Event = Any  # torch.autograd.profiler_util.FunctionEvent, which declares no types


@dataclass(frozen=True)
class Span:
    """The time on a thread that counts for a part, less the spans within it. Microseconds."""

    part: str
    start: float
    end: float


def profiled(steps: Iterator[Step], run: OpenRun) -> Iterator[Step]:
    """Yield the steps, and write a profile of the steps of each phase that the settings ask for."""
    count = run.settings.run.profile
    if not (count and run.ranks.is_main):
        return steps
    return _profiled(steps, run, count)


def _profiled(steps: Iterator[Step], run: OpenRun, count: int) -> Iterator[Step]:
    done: Counter[str] = Counter()  # steps of each phase that this process has made
    recording: _Recording | None = None
    index = run.progress.step
    last = sum(phase.steps for phase in run.settings.phases)
    try:
        while index < last:
            at = place(run.settings, index)
            name = at.phase.name
            if recording is not None and (recording.name != name or recording.steps == count):
                with _helper():
                    recording.write()
                recording = None
            if recording is None and done[name] == min(1, at.phase.steps - 1):
                with _helper():
                    recording = _Recording(name, run)
            with part("data"):
                step = next(steps)
            yield step
            done[name] += 1
            index += 1
            if recording is not None:
                recording.steps += 1
        if recording is not None:
            with _helper():
                recording.write()
            recording = None
    finally:
        if recording is not None:  # a signal or an error: an incomplete step has no profile
            with _helper():
                recording.close()


_helper = partial(helper, "the profile")


class _Recording:
    """The profile of successive steps of a phase, under way."""

    def __init__(self, name: str, run: OpenRun) -> None:
        self.name, self.steps = name, 0
        self._folder, self._device = run.folder / "profile" / name, run.device
        kinds = [ProfilerActivity.CPU]
        kinds += [ProfilerActivity.CUDA] if run.device.type == "cuda" else []
        self._profile = profile(activities=kinds)
        self._stack = ExitStack()
        self._stack.enter_context(self._profile)
        self._stack.enter_context(naming())
        self._begin = time.perf_counter()

    def close(self) -> None:
        self._stack.close()

    def write(self) -> None:
        """End it; write the table and the trace, and print the table."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        wall = time.perf_counter() - self._begin
        self.close()
        events = self._profile.events() or []
        seconds = part_seconds(events, wall, on_gpu=self._device.type == "cuda")
        title = f"profile of {self.steps} steps of phase {self.name} on {self._device}"
        text = table(title, seconds, self.steps)
        with committed_folder(self._folder, replace=True) as staging:
            self._profile.export_chrome_trace(str(staging / "trace.json.gz"))
            record = {
                "phase": self.name,
                "device": str(self._device),
                "steps": self.steps,
                "wall_s": wall,
                "parts_s": seconds,
            }
            (staging / "profile.json").write_text(json.dumps(record, indent=1))
            (staging / "profile.txt").write_text(text + "\n")
        print(text, flush=True)


def part_seconds(events: list[Event], wall: float, *, on_gpu: bool) -> dict[str, float]:
    """Return the seconds of each part, largest first; together they are the wall time.

    Args:
        events: those of a profile.
        wall: seconds that the profile lasted.
        on_gpu: whether to count the time of kernels and not that of the CPU.
    """
    host = [e for e in events if e.device_type == DeviceType.CPU]
    host.sort(key=lambda e: (e.time_range.start, -e.time_range.end))
    spans = _spans(host)
    seconds: dict[str, float] = defaultdict(float)
    if on_gpu:
        starts = {thread: [s.start for s in own] for thread, own in spans.items()}
        for event in host:
            if event.kernels and event.thread in spans:
                name = _part_at(spans[event.thread], starts[event.thread], event.time_range.start)
                seconds[name] += sum(kernel.duration for kernel in event.kernels) / 1e6
    else:
        for own in spans.values():
            for span in own:
                seconds[span.part] += (span.end - span.start) / 1e6
    seconds.pop("other", None)
    named = dict(sorted(seconds.items(), key=lambda item: -item[1]))
    return {**named, "other": max(wall - sum(named.values()), 0.0)}


def _spans(host: list[Event]) -> dict[int, list[Span]]:
    """Return for each thread with parts its time, cut into spans of one part each, in order."""
    part_of = _part_of_operations(host)
    threads: dict[int, list[Event]] = {}
    for event in host:
        if _named(event) or (event.sequence_nr in part_of and event.name.startswith(_NODE)):
            threads.setdefault(event.thread, []).append(event)
    spans = {}
    for thread, own in threads.items():
        named = [
            Span(_named(e) or part_of[e.sequence_nr], e.time_range.start, e.time_range.end)
            for e in own
        ]
        spans[thread] = _innermost(named)
    return spans


def _part_of_operations(host: list[Event]) -> dict[int, str]:
    """Return the part of each numbered operation of a forward.

    An operation that makes no node of the graph has the number of the next one that does, so the
    last operation with a number is its owner.
    """
    owner: dict[int, Event] = {}
    for event in host:
        if event.sequence_nr >= 0 and not (_is_node(event) or _named(event)):
            owner[event.sequence_nr] = event
    return {n: name for n, e in owner.items() if (name := _enclosing(e))}


def _is_node(event: Event) -> bool:
    """Whether an event is a node of the backward, or its function, which has the same number."""
    parent = event.cpu_parent
    return event.name.startswith(_NODE) or (
        parent is not None
        and parent.name.startswith(_NODE)
        and parent.sequence_nr == event.sequence_nr
    )


def _named(event: Event) -> str:
    """Return the part that an event names, or "" if it is an operation."""
    return event.name.removeprefix(PREFIX) if event.name.startswith(PREFIX) else ""


def _enclosing(event: Event) -> str:
    """Return the part that an event lies in: the innermost, or the one that is counted whole."""
    innermost = ""
    while (event := event.cpu_parent) is not None:
        name = _named(event)
        if name in WHOLE:
            return name
        innermost = innermost or name
    return innermost


def _innermost(spans: list[Span]) -> list[Span]:
    """Cut nested spans, in order of their start, into successive ones that do not overlap."""
    cut: list[Span] = []
    open_: list[Span] = []  # around the present moment, the innermost last
    now = 0.0

    def until(end: float) -> None:
        nonlocal now
        if open_ and end > now:
            whole = next((s.part for s in open_ if s.part in WHOLE), open_[-1].part)
            cut.append(Span(whole, now, end))
        now = max(now, end)

    for span in spans:
        while open_ and open_[-1].end <= span.start:
            until(open_[-1].end)
            open_.pop()
        until(span.start)
        open_.append(span)
    while open_:
        until(open_[-1].end)
        open_.pop()
    return cut


def _part_at(spans: list[Span], starts: list[float], moment: float) -> str:
    at = bisect_right(starts, moment) - 1
    return spans[at].part if at >= 0 and moment < spans[at].end else "other"


def table(title: str, seconds: dict[str, float], steps: int) -> str:
    """Return the parts as lines: milliseconds a step, and the share of the wall time."""
    wall = max(sum(seconds.values()), 1e-9)
    lines = [
        f"  {name:<11}{1e3 * spent / steps:>10.1f} ms{spent / wall:>7.1%}  {TITLES.get(name, '')}"
        for name, spent in seconds.items()
    ]
    return "\n".join([f"{title}: {1e3 * wall / steps:.1f} ms a step", *lines])
