"""The preflight of a run: what training would meet, met before it, in a minute or so.

The stages of a run in their order, each with what it found and how long it took. Nothing of a run
is written but the simulated cohort and the token shards, which training finds and uses; an existing
run's checkpoints are not touched.
"""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from smbfast.base.progress import duration
from smbfast.base.runtime import (
    GIB,
    choose_device,
    held_memory,
    reset_peak_memory,
)
from smbfast.batch import PackedBatch
from smbfast.data.loader import Step
from smbfast.model.backbone import PatientEncoder
from smbfast.model.memory import predict_peak
from smbfast.model.target import TargetEncoder
from smbfast.objective import Losses
from smbfast.run import checkpoint
from smbfast.run.folder import earlier
from smbfast.run.open_run import OpenRun
from smbfast.run.optim import trained
from smbfast.run.startup import checks_itself, losses_of, self_check
from smbfast.run.step import LossScales, Updater, forward_backward
from smbfast.settings import (
    PhaseSettings,
    TrainSettings,
)

LOOK = 64  # steps of a phase whose packs are looked at, the first epoch at most
TIMED = 8  # micro-batches of a step that are timed
ALLOWED = {"cuda": 0.10, "cpu": 0.20}  # share of the measured memory that a prediction may be off
SMALL = 512 << 20  # bytes: below, what libraries take at their first use decides on a CPU


@dataclass(frozen=True)
class Plan:
    """A phase: its first step, and what was seen of its packs."""

    phase: PhaseSettings
    first: int  # number of its first step
    step: Step
    worst: PackedBatch
    tokens: float  # online tokens of a step, on average

    @property
    def scales(self) -> LossScales:
        """Of the losses of its first step."""
        return LossScales.of(
            self.phase.w_sft, self.phase.w_jepa, self.step.num_labels, self.step.num_masked
        )


def check(settings: TrainSettings) -> None:
    """Go through the stages, printing.

    Raises:
        ValueError: something would keep the run from starting or from going on.
    """
    device, state = choose_device(settings.run.device), earlier(settings.folder, settings)
    print(f"checking {settings.preset} on {device}; {settings.folder} is {state}", flush=True)
    stages = _Stages()
    run = OpenRun.open(settings, set_aside=False, report=stages.done)
    plans = list(_plans(run))
    plan = max(plans, key=lambda p: p.worst.segments.tokens)
    segments = plan.worst.segments
    num_segments = len(plan.worst.rows)
    stages.done("plan", f"largest pack {segments.tokens:,} tokens, {num_segments} segments")
    losses, target = losses_of(settings), run.take_target()
    if target is None and any(p.phase.w_jepa > 0 for p in plans):
        target = TargetEncoder(run.encoder, run.target_form)
    stages.done("worst pack", _worst_pack(run, target, plan, losses))
    if checks_itself(settings):
        gaps = self_check(run.encoder, target, run.windows, settings, plan.first, plan.phase)
        pairs = ", ".join(f"{name} {value:.1e}" for name, value in gaps.items())
        text = pairs or "nothing is predicted in the first step"
        stages.done("self-check", f"from the reference: {text}")
    stages.done("time", _times(run, target, plans, losses))
    stages.done("checkpoint", _round_trip(run, target))
    print(f"ready: python -m smbfast.train {settings.preset} starts", flush=True)


class _Stages:
    """Prints a line for each stage: what it came to, and the seconds it took."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def done(self, name: str, text: str) -> None:
        now = time.monotonic()
        print(f"{name:<11} ok  {text}  ({now - self._start:.1f} s)", flush=True)
        self._start = now


def _plans(run: OpenRun) -> Iterator[Plan]:
    settings, first = run.settings, 0
    epoch = -(-len(run.windows) // settings.optim.batch)
    for phase in settings.phases:
        look = min(LOOK, epoch, phase.steps)
        opening, worst, tokens = None, None, 0
        for index in range(first, first + look):
            step = run.make_step(index)
            opening = opening or step
            tokens += sum(m.segments.tokens for m in step.micro)
            for micro in step.micro:
                if worst is None or micro.segments.tokens > worst.segments.tokens:
                    worst = micro
        if opening is None or worst is None or not (phase.w_sft > 0 or opening.num_masked):
            raise ValueError(
                f"phase `{phase.name}` has a step with nothing to predict: raise data.window or "
                "optim.batch, or lower objective.min_future"
            )
        yield Plan(phase, first, opening, worst, tokens / look)
        first += phase.steps


def _worst_pack(run: OpenRun, target: TargetEncoder | None, plan: Plan, losses: Losses) -> str:
    """Run it forward, backward and through the optimizer, whose learning rate is 0 here."""
    device, updater = run.device, Updater(run.optimizer, run.settings.optim.clip)
    predicted = predict_peak(
        run.encoder,
        plan.worst,
        partial(losses, **plan.scales._asdict()),
        target=run.target_form if target else None,
        accumulates=False,
    ).total
    smallest = min(plan.step.micro, key=lambda m: m.segments.tokens)
    forward_backward(losses, run.encoder, target, [smallest], plan.scales)
    updater.step(lr=0.0)
    tokens = plan.worst.segments.tokens
    resettable, start = reset_peak_memory(device), time.monotonic()
    try:
        forward_backward(losses, run.encoder, target, [plan.worst], plan.scales)
    except torch.OutOfMemoryError:
        raise ValueError(
            f"the largest pack, {tokens:,} tokens, does not fit in memory: lower "
            "optim.micro_tokens, or set model.recompute=full"
        ) from None
    grad_norm = updater.step(lr=0.0)
    seconds = _synchronized(device) - start
    peak = held_memory(device, peak=True)
    if not bool(torch.isfinite(grad_norm)):
        raise ValueError("the gradient of the largest pack must be finite; it is not")
    text = f"{tokens:,} tokens in {seconds:.2f} s; predicted {predicted / GIB:.2f} GiB"
    if not resettable:
        return f"{text}, the peak cannot be measured here"
    measured = peak - run.bytes_before
    return f"{text}, measured {measured / GIB:.2f} ({_verdict(predicted, measured, device)})"


def _verdict(predicted: int, measured: int, device: torch.device) -> str:
    allowed, error = ALLOWED[device.type], predicted / max(measured, 1) - 1
    if device.type == "cpu" and measured < SMALL:
        return "too small to tell from the process"
    verdict = "within" if abs(error) <= allowed else "NOT within"
    return f"{error:+.0%}: {verdict} {allowed:.0%}"


def _times(run: OpenRun, target: TargetEncoder | None, plans: list[Plan], losses: Losses) -> str:
    """Measured on the first packs of each phase's first step; of the run an estimate."""
    texts, whole = [], 0.0
    for plan in plans:
        phase = plan.phase
        micros = [m.to(run.device) for m in plan.step.micro[:TIMED]]
        start = _synchronized(run.device)
        forward_backward(
            losses, run.encoder, target if phase.w_jepa > 0 else None, micros, plan.scales
        )
        seconds = _synchronized(run.device) - start
        run.encoder.zero_grad(set_to_none=True)
        step = seconds * plan.tokens / sum(m.segments.tokens for m in micros)
        whole += step * phase.steps
        texts.append(
            f"{phase.name} {step:.2f} s a step, {duration(step * phase.steps)} for {phase.steps}"
        )
    return f"{'; '.join(texts)}; about {duration(whole)} without evaluations and probes"


def _round_trip(run: OpenRun, target: TargetEncoder | None) -> str:
    """Save, verify, overwrite what was saved, load, compare."""
    encoder, optimizer = run.encoder, run.optimizer
    before = _state(encoder, target, optimizer)
    with tempfile.TemporaryDirectory(prefix="check-", dir=run.folder) as folder:
        saved = checkpoint.save(Path(folder), 1, encoder, target, optimizer, {}, 1)
        size = sum(f.stat().st_size for f in saved.iterdir())
        with torch.no_grad():
            for parameter in trained(encoder).values():
                parameter.zero_()
        optimizer.state.clear()
        newest = checkpoint.latest(Path(folder))
        if newest is None:
            raise ValueError(f"a checkpoint written under {run.folder} must verify; it does not")
        target = checkpoint.load(newest, encoder, optimizer)
    after = _state(encoder, target, optimizer)
    changed = [n for n in before.keys() | after.keys() if not _same(before.get(n), after.get(n))]
    if changed:
        raise ValueError(
            f"a checkpoint must give back what was saved; {len(changed)} of {len(before)} tensors "
            f"differ, such as {min(changed)}"
        )
    return f"{len(before)} tensors, {size / GIB:.2f} GiB, the same bit for bit after loading"


def _state(
    encoder: PatientEncoder, target: TargetEncoder | None, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    state = {}
    for name, parameter in trained(encoder).items():
        state[name] = parameter.detach()
        moments = optimizer.state.get(parameter, {})
        state |= {f"{name}.{key}": value for key, value in moments.items()}
    state |= {f"target.{n}": w for n, w in (target.state() if target else {}).items()}
    return {n: w.to("cpu", copy=True) for n, w in state.items()}


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and one.dtype == other.dtype and one.equal(other)


def _synchronized(device: torch.device) -> float:
    """The time, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()
