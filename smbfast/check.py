"""python -m smbfast.check CONFIG: what training would meet, met before it, in a minute or so.

The stages of a run in their order, each with what it found and how long it took. Nothing of a run
is written but the simulated cohort and the token shards, which training finds and uses; an existing
run's checkpoints are not touched.
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from smbkernels import load as load_kernels
from smbkernels import use
from torch import Tensor

from smbfast import checkpoint, evaluation
from smbfast.batch import PackedBatch
from smbfast.data.loader import Step, WindowSet, make_step
from smbfast.files import cannot_write
from smbfast.model.backbone import PatientEncoder, make_encoder, parameter_counts
from smbfast.model.flops import ModelShape
from smbfast.model.memory import Memory, predict_peak
from smbfast.model.target import TargetEncoder
from smbfast.objective import Losses
from smbfast.optim import make_optimizer, trained
from smbfast.runfolder import check_windows, earlier, prepared_data
from smbfast.runtime import GIB, choose_device, duration, terminate_as_interrupt
from smbfast.settings import (
    PhaseSettings,
    TrainSettings,
    kernel_choice,
    load,
    presets,
    run_arguments,
    run_help,
)
from smbfast.startup import losses_of, micro_tokens, self_check

LOOK = 64  # steps of a phase whose packs are looked at, the first epoch at most
TIMED = 8  # micro-batches of a step that are timed
WITHIN = {"cuda": 0.10, "cpu": 0.20}  # of measured memory that the prediction should be
SMALL = 512 << 20  # bytes: below, what libraries take at their first use decides on a CPU
EPILOG = f"""This command takes the arguments of python -m smbfast.train and tries, in about a
minute, what that training run would do. PRESET is one of
{", ".join(presets())}, or a .toml file of your own.
The exit code is 0 if the run may start; otherwise it is 1, and one line says what to change.

The stages
  data        Read the MEDS folder and its labels; prepare the token shards if there are none.
  model       Load the tokenizer and the backbone; let LoRA find the layers it adapts.
  kernels     Say which implementation each operation runs on.
  memory      Choose the size of a micro-batch and predict the largest memory of a step.
  plan        Plan the first steps of each phase and find the largest micro-batch.
  worst pack  Run that micro-batch forward and backward; compare its memory with the prediction.
  self-check  Compare the shared forward with the reference.
  time        Time a step of each phase and estimate the whole run.
  checkpoint  Save a checkpoint, load it again and compare the two bit for bit.

Examples

  Check the default run:
    python -m smbfast.check

  Check LoRA training of a pretrained backbone:
    python -m smbfast.check lora --data.path=MEDS_FOLDER --model.path=Qwen/Qwen3-8B"""


@dataclass(frozen=True)
class Plan:
    """A phase: its first step, and what was seen of its packs."""

    phase: PhaseSettings
    first: int  # number of its first step
    step: Step
    worst: PackedBatch
    tokens: float  # online tokens of a step, on average


def check(settings: TrainSettings) -> None:
    """Go through the stages, printing.

    Raises:
        ValueError: something would keep the run from starting or from going on.
    """
    run, device = settings.folder, choose_device(settings.run.device)
    state = earlier(run, settings)
    run.mkdir(parents=True, exist_ok=True, mode=0o700)
    if settings.run.threads:
        torch.set_num_threads(settings.run.threads)
    print(f"checking {settings.preset} on {device}; {run} is {state}", flush=True)
    with _stage("data") as say:
        data, prepared = prepared_data(settings, run)
        windows, tuning = (
            WindowSet.of(prepared.shards(split), data.window, prepared.encoder.begin)
            for split in ("train", "tuning")
        )
        check_windows(windows, tuning, data.path)
        tasks = evaluation.read_tasks(settings, data)
        say(f"{len(windows):,} windows, {windows.tokens:,} tokens, {len(tasks)} tasks to probe")
    with _stage("model") as say:
        before = _held(device)
        encoder = make_encoder(settings, prepared.tokenizer, device, prepared.record["new_tokens"])
        optimizer = make_optimizer(encoder, settings.optim)
        counts = parameter_counts(encoder)
        say(f"{counts[0]:,} of {counts[1]:,} parameters trained, {len(prepared.tokenizer):,} ids")
    with _stage("kernels") as say:
        say("; ".join(load_kernels(device.type)))
    with _stage("memory") as say:
        rows, predicted = micro_tokens(settings, encoder)
        say(f"up to {rows:,} tokens a forward, {predicted / GIB:.2f} GiB at the peak predicted")
    with _stage("plan") as say:
        ratio = ModelShape.of(encoder).attention_ratio
        plans = list(_plans(settings, windows, {"tokens": rows, "ratio": ratio}))
        plan = max(plans, key=lambda p: p.worst.segments.tokens)
        worst = plan.worst.segments
        say(f"largest pack {worst.tokens:,} tokens, {len(plan.worst.rows)} segments")
    losses = losses_of(settings)
    form = settings.objective
    kept = (form.target_form, form.tracked_rank, form.tracked_every)
    with _stage("worst pack") as say:
        target = None
        if any(p.phase.w_jepa > 0 for p in plans):
            target = TargetEncoder(encoder, kept[0], rank=kept[1], every=kept[2])
        found = predict_peak(
            encoder,
            plan.worst,
            _scaled(losses, plan),
            target=kept if target else None,
            accumulates=False,
        )
        say(_worst_pack(encoder, target, optimizer, plan, losses, found, before))
    if form.self_check and form.path == "shared":
        with _stage("self-check") as say:
            apart = self_check(encoder, target, windows, settings, plan.first, plan.phase)
            pairs = ", ".join(f"{name} {value:.1e}" for name, value in apart.items())
            say(f"from the reference: {pairs or 'nothing is predicted in the first step'}")
    with _stage("time") as say:
        say(_times(encoder, target, plans, losses, device))
    with _stage("checkpoint") as say:
        say(_round_trip(run, encoder, target, optimizer))
    print(f"ready: python -m smbfast.train {settings.preset} starts", flush=True)


@contextmanager
def _stage(name: str) -> Iterator:
    """A line with what was found, and the seconds it took."""
    start, text = time.monotonic(), []
    yield text.append
    print(f"{name:<11} ok  {text[0]}  ({time.monotonic() - start:.1f} s)", flush=True)


def _plans(settings: TrainSettings, windows: WindowSet, layout: dict) -> Iterator[Plan]:
    first = 0
    epoch = -(-len(windows) // settings.optim.batch)
    for phase in settings.phases:
        make = partial(
            make_step,
            windows,
            settings.objective,
            batch=settings.optim.batch,
            seed=settings.run.seed,
            sft=phase.w_sft > 0,
            jepa=phase.w_jepa > 0,
            **layout,
        )
        look = min(LOOK, epoch, phase.steps)
        opening, worst, tokens = None, None, 0
        for step in range(first, first + look):
            made = make(step)
            opening = opening or made
            tokens += sum(m.segments.tokens for m in made.micro)
            for micro in made.micro:
                if worst is None or micro.segments.tokens > worst.segments.tokens:
                    worst = micro
        if worst is None or not (phase.w_sft > 0 or opening.masked):
            raise ValueError(
                f"phase `{phase.name}` has a step with nothing to predict: raise data.window or "
                "optim.batch, or lower objective.min_future"
            )
        yield Plan(phase, first, opening, worst, tokens / look)
        first += phase.steps


def _scaled(losses: Losses, plan: Plan) -> partial:
    """Losses with the weights of a phase."""
    labels, masked = max(plan.step.labels, 1), max(plan.step.masked, 1)
    return partial(
        losses, sft_scale=plan.phase.w_sft / labels, jepa_scale=plan.phase.w_jepa / masked
    )


def _forward_backward(
    encoder: PatientEncoder,
    target: TargetEncoder | None,
    plan: Plan,
    losses: Losses,
    micro: PackedBatch,
) -> None:
    found = _scaled(losses, plan)(encoder, target, micro)
    found = [loss for loss in found if loss is not None]
    if found:
        torch.autograd.backward(found)


def _worst_pack(
    encoder: PatientEncoder,
    target: TargetEncoder | None,
    optimizer: torch.optim.Optimizer,
    plan: Plan,
    losses: Losses,
    predicted: Memory,
    before: int,
) -> str:
    """Run it forward, backward and through the optimizer, whose learning rate is 0 here.

    Args:
        before: bytes held before there was a model; memory is measured from there.
    """
    device = encoder.mask_vector.device
    batch = plan.worst.to(device)
    smallest = min(plan.step.micro, key=lambda m: m.segments.tokens).to(device)
    _forward_backward(encoder, target, plan, losses, smallest)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    resettable, start = _reset_peak(device), time.monotonic()
    try:
        _forward_backward(encoder, target, plan, losses, batch)
    except torch.OutOfMemoryError:
        raise ValueError(
            f"the largest pack, {batch.segments.tokens:,} tokens, does not fit in memory: lower "
            "optim.micro_tokens, or set model.recompute=full"
        ) from None
    optimizer.step()
    seconds = _synchronized(device) - start
    peak = _held(device, peak=True)
    gradients = [p.grad for p in encoder.parameters() if p.grad is not None]
    finite = all(bool(torch.isfinite(g).all()) for g in gradients)
    optimizer.zero_grad(set_to_none=True)
    if not finite:
        raise ValueError("the gradient of the largest pack must be finite; it is not")
    text = f"{batch.segments.tokens:,} tokens in {seconds:.2f} s; "
    text += f"predicted {predicted.total / GIB:.2f} GiB"
    if not resettable:
        return f"{text}, the peak cannot be measured here"
    measured = peak - before
    return f"{text}, measured {measured / GIB:.2f} ({_verdict(predicted.total, measured, device)})"


def _verdict(predicted: int, measured: int, device: torch.device) -> str:
    allowed, apart = WITHIN[device.type], predicted / max(measured, 1) - 1
    if device.type == "cpu" and measured < SMALL:
        return "too small to tell from the process"
    said = "within" if abs(apart) <= allowed else "NOT within"
    return f"{apart:+.0%}: {said} {allowed:.0%}"


def _times(
    encoder: PatientEncoder,
    target: TargetEncoder | None,
    plans: list[Plan],
    losses: Losses,
    device: torch.device,
) -> str:
    """Measured on some packs of each phase's first step; of the run an estimate."""
    said, whole = [], 0.0
    for plan in plans:
        held = target if plan.phase.w_jepa > 0 else None
        micros = [m.to(device) for m in plan.step.micro[:TIMED]]
        start = _synchronized(device)
        for micro in micros:
            _forward_backward(encoder, held, plan, losses, micro)
        seconds = _synchronized(device) - start
        encoder.zero_grad(set_to_none=True)
        step = seconds * plan.tokens / sum(m.segments.tokens for m in micros)
        whole += step * plan.phase.steps
        said.append(
            f"{plan.phase.name} {step:.2f} s a step, {duration(step * plan.phase.steps)} for "
            f"{plan.phase.steps}"
        )
    return f"{'; '.join(said)}; about {duration(whole)} without evaluations and probes"


def _round_trip(
    run: Path,
    encoder: PatientEncoder,
    target: TargetEncoder | None,
    optimizer: torch.optim.Optimizer,
) -> str:
    """Save, verify, overwrite what was saved, load, compare."""
    before = _state(encoder, target, optimizer)
    with tempfile.TemporaryDirectory(prefix="check-", dir=run) as folder:
        saved = checkpoint.save(Path(folder), 1, encoder, target, optimizer, {}, 1)
        size = sum(f.stat().st_size for f in saved.iterdir())
        with torch.no_grad():
            for parameter in trained(encoder).values():
                parameter.zero_()
        optimizer.state.clear()
        found = checkpoint.latest(Path(folder))
        if found is None:
            raise ValueError(f"a checkpoint written under {run} must verify; it does not")
        target = checkpoint.load(found, encoder, optimizer)
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


def _reset_peak(device: torch.device) -> bool:
    """Let the peak count from here; False where a process cannot reset its own."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _held(device: torch.device, *, peak: bool = False) -> int:
    """Bytes allocated on a GPU, or resident; 0 where that cannot be read."""
    if device.type == "cuda":
        read = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
        return read(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    status = dict(line.split(":", 1) for line in lines)
    return int(status["VmHWM" if peak else "VmRSS"].split()[0]) << 10


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if {"-h", "--help"} & set(argv):
            print(run_help(argv, "python -m smbfast.check", EPILOG))
            return
        settings = load(*run_arguments(argv))
        terminate_as_interrupt()
        everywhere, by_op = kernel_choice(settings.kernels)
        with use(everywhere, **by_op):
            check(settings)
    except ValueError as error:
        raise SystemExit(f"smbfast.check: {error}") from None
    except OSError as error:
        raise SystemExit(f"smbfast.check: {cannot_write(error)}") from None
    except BrokenProcessPool:
        raise SystemExit(
            "smbfast.check: a worker that prepared data was killed; go on with --data.workers=1"
        ) from None
    except KeyboardInterrupt:
        raise SystemExit("smbfast.check: stopped") from None


if __name__ == "__main__":
    main()
