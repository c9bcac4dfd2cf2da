"""python -m smbfast.train: SFT, then JEPA, then embeddings at decision nodes, probes and a report.

The loop is `train`, one flat function, read from top to bottom. What it stands on: `loader` (a step
is a pure function of seed and number), `objective` (one forward for both losses; `reference` says
what they are), `target` (the EMA), `checkpoint`. What comes before the first step is in
`smbfast.startup`, what comes after the last in `smbfast.evaluation`.

Between two lines of the log nothing waits for the device: counts are made with the batch, losses
stay where they are, and a step that is not finite is skipped by the optimizer's own kernel (the
average then takes the unchanged weights once more). One exception is not ours to mend: on a GPU
the truncation of a tracked target waits, every `tracked_every` steps.
"""

import shlex
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import torch
from smbkernels import use

from smbfast import checkpoint, console, evaluation
from smbfast.config import to_toml
from smbfast.data.loader import WindowSet, make_step, prefetched
from smbfast.files import cannot_write, write_text
from smbfast.metrics import Meter, MetricsLog, step_line
from smbfast.model.backbone import make_encoder
from smbfast.model.flops import ModelShape, step_flops
from smbfast.model.target import TargetEncoder, form_of
from smbfast.optim import learning_rate, make_optimizer, place, tau, total_steps
from smbfast.report import write_report
from smbfast.runfolder import check_windows, earlier, prepared_data, write_end, write_status
from smbfast.runtime import (
    choose_device,
    duration,
    peak_memory_gib,
    stop_on_signals,
    terminate_as_interrupt,
)
from smbfast.settings import TrainSettings, kernel_choice, load, presets, run_arguments, run_help
from smbfast.startup import layer_dtype, losses_of, matmul_rate, micro_tokens, self_check

PATIENCE = 3  # steps in a row with a gradient that is not finite before a run gives up
EPILOG = f"""PRESET is one of {", ".join(presets())},
or a .toml file of your own, which may begin from a preset with the line base = "default". Without
it the preset `default` is used. In a file, a setting that is none is left out.

  --print            Print the settings of the run as TOML, and stop.
  --resume=never     Short for --run.resume=never.
  --export=merged    Short for --run.export=merged.

Examples

  Train a small model on a simulated cohort, in a few minutes on a CPU:
    python -m smbfast.train

  Train a small model on your own patients and probe one task:
    python -m smbfast.train --data.path=MEDS_FOLDER --probe.labels=mortality_1y

  Train LoRA adapters of a pretrained backbone:
    python -m smbfast.train lora --data.path=MEDS_FOLDER --model.path=Qwen/Qwen3-8B

  See the settings of a preset with their explanations:
    python -m smbfast.train lora --help"""


class RunFailed(RuntimeError):
    """Training itself broke; the message says where."""


def train(settings: TrainSettings, command: str) -> str:
    """Run all phases of `settings`, from the start or from the newest checkpoint.

    Returns "done", or "preempted" when a signal asked to stop (everything is saved then).

    Raises:
        ValueError: bad data, a model that does not load, a run folder that is of another run.
        RunFailed: the gradient was not finite several steps in a row.
    """
    started = time.monotonic()
    run = settings.folder
    device = choose_device(settings.run.device)
    run.mkdir(parents=True, exist_ok=True, mode=0o700)
    if settings.run.threads:
        torch.set_num_threads(settings.run.threads)
    data, prepared = prepared_data(settings, run)
    objective, total = settings.objective, total_steps(settings)
    windows = WindowSet.of(prepared.shards("train"), data.window, prepared.encoder.begin)
    tuning = WindowSet.of(prepared.shards("tuning"), data.window, prepared.encoder.begin)
    check_windows(windows, tuning, data.path)
    tasks = evaluation.read_tasks(settings, data)  # a typo there must not cost a training run
    new_tokens = prepared.record["new_tokens"]
    encoder = make_encoder(settings, prepared.tokenizer, device, new_tokens)
    optimizer = make_optimizer(encoder, settings.optim)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    found = checkpoint.latest(run)
    target, first, offset, best, seconds, capacity = None, 0, 0, {}, 0.0, None
    if found:
        target = checkpoint.load(found, encoder, optimizer)
        record = found.record
        first, offset, best = record["step"], record["metrics_offset"], record["best"]
        seconds, capacity = record["seconds"], record.get("micro_tokens")
    capacity, predicted = micro_tokens(settings, encoder, capacity)
    tracks = {"rank": objective.tracked_rank, "every": objective.tracked_every}
    tracked = form_of(encoder, objective.target_form, **tracks) == "tracked"
    shape = ModelShape.of(encoder, tracked=tuple(tracks.values()) if tracked else None)
    layout = {"tokens": capacity, "ratio": shape.attention_ratio}
    fixed = evaluation.fixed_batches(tuning, settings, layout)
    losses = losses_of(settings)
    ceiling = matmul_rate(device, layer_dtype(encoder))
    log = MetricsLog(run, offset, first)
    if not found:  # nothing below is the user's to mend: from here on the folder is this run's
        write_text(run / "config.toml", to_toml(settings))
    header = console.header(
        settings, prepared, encoder, windows, tuning, first, device, capacity, predicted
    )
    if not found:
        log.write("header", **header)
    steps = (
        partial(
            make_step,
            windows,
            objective,
            step,
            batch=settings.optim.batch,
            seed=settings.run.seed,
            sft=place(settings, step).phase.w_sft > 0,
            jepa=place(settings, step).phase.w_jepa > 0,
            **layout,
        )
        for step in range(first, total)
    )
    health: dict = {}
    entry: dict = {}
    # steps that were not finite: in a row up to now, in a row at worst, all since the last look
    bad = worst = skips = torch.zeros((), device=device)
    saved = first
    checks = settings.objective.self_check and settings.objective.path == "shared"
    meter = Meter(total, first, ceiling)
    fetched = time.monotonic()
    write_status(run, "running", first, command)
    with stop_on_signals() as stop:
        for batch in prefetched(steps, pin=device.type == "cuda"):
            waited = time.monotonic() - fetched
            step = batch.index
            at = place(settings, step)
            phase = at.phase
            if phase.w_jepa > 0 and target is None:
                target = TargetEncoder(encoder, objective.target_form, **tracks)
            if phase.w_jepa == 0:
                target = None
            if at.begins:
                health = entry = evaluation.evaluate(encoder, target, fixed, settings, phase)
                log.write("eval", step=step, phase=phase.name, **health)
            if phase.w_sft == 0 and batch.masked == 0:
                raise ValueError(
                    f"step {step + 1} has no masked position and phase `{phase.name}` no SFT: "
                    "raise data.window or optim.batch, or lower objective.min_future"
                )
            if checks and (at.begins or step == first):
                apart = self_check(encoder, target, windows, settings, step, phase)
                log.write("self_check", step=step, phase=phase.name, **apart)
            lr = learning_rate(settings, at)
            for group in optimizer.param_groups:
                group["lr"] = lr
            sft = jepa = torch.zeros((), device=device)
            for micro in batch.micro:
                parts = losses(
                    encoder,
                    target,
                    micro.to(device),
                    sft_scale=phase.w_sft / max(batch.labels, 1),
                    jepa_scale=phase.w_jepa / max(batch.masked, 1),
                )
                if any(part is not None for part in parts):
                    torch.autograd.backward([part for part in parts if part is not None])
                sft, jepa = (
                    so_far if part is None else so_far + part.detach()
                    for so_far, part in zip((sft, jepa), parts, strict=True)
                )
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, settings.optim.clip)
            # read on the device by the optimizer: where it is set no weight and no moment moves
            optimizer.found_inf = (~torch.isfinite(grad_norm)).float()
            bad = (bad + 1) * optimizer.found_inf
            worst, skips = torch.maximum(worst, bad), skips + optimizer.found_inf
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if target is not None:
                target.update(tau(settings, step))
            done = step + 1
            # of the shared forward: what the reference computes beyond it is no use
            meter.add(batch, sum(step_flops(shape, m).total for m in batch.micro), waited)
            last = at.step + 1 == phase.steps
            logs = done % settings.run.log_every == 0 or last or done == first + 1
            evaluates = done % settings.eval.every == 0 or last
            stopping = bool(stop)  # read once: a signal may come at any moment
            saves = done % settings.run.save_every == 0 or last or stopping
            if logs or evaluates or saves:  # here the device is waited for
                skipped, in_a_row, some = map(int, torch.stack([bad, worst, skips]).tolist())
                worst = skips = torch.zeros_like(bad)
                if some:
                    told = f"step {done}: gradient not finite, steps skipped since the last line"
                    print(f"{told}: {some}", file=sys.stderr)
                if in_a_row >= PATIENCE:
                    raise RunFailed(
                        f"the gradient was not finite in {in_a_row} steps in a row, up to step "
                        f"{done} (phase `{phase.name}`); the last good checkpoint is kept"
                    )
            if logs:
                record = {
                    "step": done,
                    "phase": phase.name,
                    "sft": float(sft) / phase.w_sft if phase.w_sft > 0 else None,
                    "jepa": float(jepa) / phase.w_jepa if batch.masked else None,
                    "grad_norm": None if skipped else float(grad_norm),
                    "lr": lr,
                    **meter.read(done),
                    "memory_gib": peak_memory_gib(device),
                    "masked": batch.masked,
                    "labels": batch.labels,
                }
                log.write("step", **record)
                print(step_line(record, total, health if phase.w_jepa > 0 else None), flush=True)
            if evaluates:
                health = evaluation.evaluate(encoder, target, fixed, settings, phase)
                log.write("eval", step=done, phase=phase.name, **health)
                console.warn(health, entry)
                if health["loss"] < best.get(phase.name, {}).get("loss", float("inf")):
                    best[phase.name] = {"loss": health["loss"], "step": done}
                    final = run / "best" / phase.name
                    info = evaluation.final_record(settings, prepared, encoder, data, done)
                    checkpoint.save_final(final, encoder, target, prepared.tokenizer, info)
            if saves and not skipped:
                record = {
                    "metrics_offset": log.offset,
                    "best": best,
                    "micro_tokens": capacity,
                    "seconds": seconds + time.monotonic() - started,
                }
                checkpoint.save(run, done, encoder, target, optimizer, record, settings.run.keep)
                saved = done
                write_status(run, "running", saved, command)
            if stopping:
                write_status(run, "preempted", saved, command)
                log.close()
                print(f"{stop.name}: stopped, step {saved} is saved; the same command goes on")
                return "preempted"
            fetched = time.monotonic()
    info = evaluation.final_record(settings, prepared, encoder, data, total)
    checkpoint.save_final(run / "final", encoder, target, prepared.tokenizer, info)
    seconds += time.monotonic() - started
    _export(settings, device)
    evaluation.finish(settings, data, tasks, prepared, encoder, target, device)
    log.write("end", step=total, seconds=seconds, best=best)
    log.close()
    write_report(run)
    write_status(run, "done", total, command)
    console.end_card(run, settings, seconds, time.monotonic() - started, best, health)
    return "done"


def _export(settings: TrainSettings, device: torch.device) -> None:
    run = settings.folder
    if settings.run.export == "merged" and not (run / "merged").is_dir():
        print(checkpoint.export_merged(run / "final", run / "merged", device))


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    prog = "python -m smbfast.train"
    show = "--print" in argv
    name, words = run_arguments([a for a in argv if a != "--print"])
    command = shlex.join([*prog.split(), name, *words])
    ours = None
    try:
        if {"-h", "--help"} & set(argv):
            print(run_help(argv, prog, EPILOG))
            return
        settings = load(name, words)
        terminate_as_interrupt()
        if show:
            print(to_toml(settings), end="")
            return
        start = time.monotonic()
        if earlier(settings.folder, settings) == "done":
            _export(settings, choose_device(settings.run.device))
            console.already_done(settings.folder)
            return
        ours = settings  # from here on an error is one of this run
        everywhere, by_op = kernel_choice(settings.kernels)
        with use(everywhere, **by_op):
            state = train(settings, command)
    except (ValueError, RunFailed) as error:
        write_end(ours, "failed")
        raise SystemExit(f"smbfast.train: {error}") from None
    except OSError as error:
        write_end(ours, "failed")
        raise SystemExit(f"smbfast.train: {cannot_write(error)}") from None
    except BrokenProcessPool:
        raise SystemExit(
            "smbfast.train: a worker that prepared data was killed; go on with --data.workers=1"
        ) from None
    except KeyboardInterrupt:
        write_end(ours, "preempted")
        print("\nsmbfast.train: stopped; the same command goes on", file=sys.stderr)
        raise SystemExit(75) from None
    except BaseException:
        write_end(ours, "failed")
        raise
    if state == "preempted":
        raise SystemExit(75)  # EX_TEMPFAIL: run it again
    print(f"total {duration(time.monotonic() - start)}")


if __name__ == "__main__":
    main()
