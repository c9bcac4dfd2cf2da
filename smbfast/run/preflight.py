"""The preflight of a run: finds in about a minute what would stop training later.

It goes through the stages of a run in order, and prints the result and the duration of each. It
writes only the simulated cohort and the token shards, which training then uses. The checkpoints of
an existing run stay as they are.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from smbfast.base.progress import duration
from smbfast.base.runtime import GIB, choose_device, held_memory, reset_peak_memory
from smbfast.base.staging import staged
from smbfast.batch import PackedBatch
from smbfast.data.loader import Step, num_windows_read
from smbfast.model.backbone import PatientEncoder
from smbfast.model.memory import predict_peak
from smbfast.model.target import TargetEncoder
from smbfast.objective import Losses
from smbfast.run import checkpoint, console
from smbfast.run.background import Buffer
from smbfast.run.epochs import in_words
from smbfast.run.folder import earlier
from smbfast.run.open_run import OpenRun
from smbfast.run.optim import trained
from smbfast.run.startup import checks_itself, copied_bytes, losses_of, self_check
from smbfast.run.step import LossScales, Updater, forward_backward
from smbfast.settings import PhaseSettings, TrainSettings

LOOK = 64  # steps per phase whose packs are inspected, at most the first epoch
TIMED = 8  # micro-batches per phase that are timed
ALLOWED = {
    "cuda": 0.10,
    "cpu": 0.20,
}  # allowed error of the prediction, relative to the measurement
SMALL = 512 << 20  # bytes: on a CPU, what libraries allocate at first use hides smaller peaks


@dataclass(frozen=True)
class PhasePlan:
    """A phase with its first step, and a summary of its micro-batches."""

    phase: PhaseSettings
    first: int  # number of its first step
    step: Step  # that step
    largest: PackedBatch  # the micro-batch with the most online tokens
    mean_tokens: float  # online tokens per step
    masked: list[int]  # masked positions, or pairs that JEPA predicts, of each inspected step

    @property
    def scales(self) -> LossScales:
        """The loss scales of its first step."""
        return LossScales.of_batch(self.phase, self.step)

    @property
    def weight(self) -> tuple[bool, int]:
        """Orders phases by the memory of their largest micro-batch: a frozen decoder stores no
        activations."""
        return self.phase.freeze != "decoder", self.largest.segments.tokens


def check(settings: TrainSettings, command: str) -> None:
    """Go through the stages of a run and print each.

    Args:
        command: what starts that run, for the last line.

    Raises:
        ValueError: if something would keep the run from starting or from finishing.
    """
    device, state = choose_device(settings.run.device), earlier(settings.folder, settings)
    print(f"checking {settings.preset} on {device}; {settings.folder} is {state}", flush=True)
    stages = _Stages()
    run = OpenRun.open(
        settings, set_aside=False, verify="all", report=stages.done, show=console.show_data
    )
    with run.matmul.used():
        _go_through(run, stages)
    if number := len(run.card.warnings):
        one = "1 warning is" if number == 1 else f"{number} warnings are"
        print(f"{command} starts, but {one} above", flush=True)
        return
    print(f"ready: {command} starts", flush=True)


def _go_through(run: OpenRun, stages: "_Stages") -> None:
    """The stages from `plan` on."""
    settings = run.settings
    plans = list(_plans(run))
    plan = max(plans, key=lambda p: p.weight)
    segments = plan.largest.segments
    num_segments = len(plan.largest.segment_tuples)
    pack = f"largest pack {segments.tokens:,} tokens, {num_segments} segments"
    stages.done("plan", "; ".join([pack, *_predicted(plans, settings.objective.jepa)]))
    losses, target = losses_of(settings), run.take_target()
    if target is None and any(p.phase.w_jepa > 0 for p in plans):
        target = TargetEncoder(run.encoder, run.target_form)
    worst = partial(losses, freeze=plan.phase.freeze)
    stages.done("worst pack", _largest_pack(run, target, plan, worst))
    if checks_itself(settings):
        gaps = self_check(run.encoder, target, run.windows, settings, plan.first, plan.phase)
        pairs = ", ".join(f"{name} {value:.1e}" for name, value in gaps.items())
        text = pairs or "nothing is predicted in the first step"
        stages.done("self-check", f"from the reference: {text}")
    stages.done("time", _times(run, target, plans, losses))
    stages.done("checkpoint", _round_trip(run, target))


class _Stages:
    """Prints a line for each stage: its result, and the seconds it took."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def done(self, name: str, text: str) -> None:
        now = time.monotonic()
        print(f"{name:<11} ok  {text}  ({now - self._start:.1f} s)", flush=True)
        self._start = now


def _plans(run: OpenRun) -> Iterator[PhasePlan]:
    settings, windows, first = run.settings, run.windows, 0
    for phase in settings.phases:
        num_windows = num_windows_read(windows, settings.objective, jepa=phase.w_jepa > 0)
        look = min(LOOK, -(-num_windows // settings.optim.batch), phase.steps)
        masked: list[int] = []
        first_step, largest, tokens = None, None, 0
        for index in range(first, first + look):
            step = run.make_step(index)
            first_step = first_step or step
            tokens += sum(m.segments.tokens for m in step.micro_batches)
            masked.append(step.num_masked)
            for micro in step.micro_batches:
                if largest is None or micro.segments.tokens > largest.segments.tokens:
                    largest = micro
        assert first_step is not None and largest is not None  # windows and steps are not empty
        yield PhasePlan(phase, first, first_step, largest, tokens / look, masked)
        first += phase.steps


def _predicted(plans: list[PhasePlan], jepa: str) -> Iterator[str]:
    """Yield how much the steps of each phase with JEPA predict."""
    verb, noun = ("masks", "positions") if jepa == "mask" else ("predicts", "pairs")
    for plan in plans:
        if plan.phase.w_jepa > 0:
            mean = sum(plan.masked) / len(plan.masked)
            yield (
                f"{plan.phase.name} {verb} {mean:,.0f} {noun} a step, {min(plan.masked):,} to "
                f"{max(plan.masked):,} in the first {len(plan.masked)}"
            )


def _largest_pack(
    run: OpenRun, target: TargetEncoder | None, plan: PhasePlan, losses: Losses
) -> str:
    """Run the largest pack through a whole step with learning rate 0; return time and memory."""
    device, updater = run.device, Updater(run.optimizer, run.settings.optim.clip)
    copied = copied_bytes(run.settings, run.encoder)
    buffer = Buffer(copied, device)  # as a run has it from its first step on
    predicted = predict_peak(
        run.encoder,
        plan.largest,
        partial(losses, **plan.scales._asdict()),
        target=run.target_form if target else None,
        accumulates=False,
    ).total + (copied if device.type == "cpu" else 0)
    smallest = min(plan.step.micro_batches, key=lambda m: m.segments.tokens)
    forward_backward(losses, run.encoder, target, [smallest], plan.scales)
    updater.step(lr=0.0)
    tokens = plan.largest.segments.tokens
    resettable, start = reset_peak_memory(device), time.monotonic()
    try:
        forward_backward(losses, run.encoder, target, [plan.largest], plan.scales)
    except torch.OutOfMemoryError:
        raise ValueError(
            f"the largest pack, {tokens:,} tokens, does not fit in memory: lower "
            "optim.micro_tokens, or set model.recompute=full"
        ) from None
    grad_norm = updater.step(lr=0.0)
    seconds = _synchronized(device) - start
    peak = held_memory(device, peak=True)
    buffer.close()
    if not bool(torch.isfinite(grad_norm)):
        raise ValueError("the gradient of the largest pack must be finite; it is not")
    text = f"{tokens:,} tokens in {seconds:.2f} s; predicted {predicted / GIB:.2f} GiB"
    if not resettable:
        return f"{text}; the peak cannot be measured on this system"
    measured = peak - run.bytes_before
    return f"{text}, measured {measured / GIB:.2f} ({_verdict(predicted, measured, device)})"


def _verdict(predicted: int, measured: int, device: torch.device) -> str:
    allowed, error = ALLOWED[device.type], predicted / max(measured, 1) - 1
    if device.type == "cpu" and measured < SMALL:
        return "too small to compare"
    verdict = "within" if abs(error) <= allowed else "NOT within"
    return f"{error:+.0%}: {verdict} {allowed:.0%}"


def _times(
    run: OpenRun, target: TargetEncoder | None, plans: list[PhasePlan], losses: Losses
) -> str:
    """Time the first micro-batches of each phase, and return estimates for steps and the run."""
    texts, whole = [], 0.0
    for plan in plans:
        phase = plan.phase
        micros = [m.to(run.device) for m in plan.step.micro_batches[:TIMED]]
        start = _synchronized(run.device)
        own, held = partial(losses, freeze=phase.freeze), target if phase.w_jepa > 0 else None
        forward_backward(own, run.encoder, held, micros, plan.scales)
        seconds = _synchronized(run.device) - start
        run.encoder.zero_grad(set_to_none=True)
        step = seconds * plan.mean_tokens / sum(m.segments.tokens for m in micros)
        whole += step * phase.steps
        texts.append(
            f"{phase.name} {step:.2f} s a step, {duration(step * phase.steps)} for "
            f"{in_words(phase)} steps"
        )
    return f"{'; '.join(texts)}; about {duration(whole)} without evaluations and probes"


def _round_trip(run: OpenRun, target: TargetEncoder | None) -> str:
    """Save a checkpoint, verify it, erase the state, load it again, and compare."""
    encoder, optimizer = run.encoder, run.optimizer
    before = _state(encoder, target, optimizer)
    with staged(run.folder / "check") as folder:
        saved = checkpoint.save(folder, 1, encoder, target, optimizer, {}, 1)
        size = sum(f.stat().st_size for f in saved.iterdir())
        with torch.no_grad():
            for parameter in trained(encoder).values():
                parameter.zero_()
        optimizer.state.clear()
        newest, _ = checkpoint.latest(folder)
        if newest is None:
            raise ValueError(f"a checkpoint written under {run.folder} must verify; it does not")
        target = checkpoint.load(newest, encoder, optimizer)
    after = _state(encoder, target, optimizer)
    changed = [n for n in before.keys() | after.keys() if not _same(before.get(n), after.get(n))]
    if changed:
        raise ValueError(
            f"loading a checkpoint must restore what was saved; {len(changed)} of {len(before)} "
            f"tensors differ, such as {min(changed)}"
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
    """Wait until the device has finished its work, and return the time in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()
