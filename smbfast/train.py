"""python -m smbfast.train: SFT, then JEPA, then embeddings at decision nodes, probes and a report.

The loop is `train`, one flat function, read from top to bottom. What it stands on: `open_run` (all
that comes before the first step), `loader` (a step is a pure function of seed and number),
`objective` (one forward for both losses; `reference` says what they are), `step` (forward,
backward, update), `evaluation` and `checkpoint`.

Between two lines of the log nothing waits for the device: counts are made with the batch, losses
stay where they are, and a step whose gradient is not finite is skipped by the optimizer's own
kernel. One exception is not ours to mend: on a GPU the truncation of a tracked target waits, every
`tracked_every` steps.
"""

import shlex
import sys
import time
from concurrent.futures.process import BrokenProcessPool

import torch
from smbkernels import use

from smbfast import checkpoint, console
from smbfast.config import help_text, to_toml
from smbfast.data.loader import prefetched
from smbfast.evaluation import evaluate, evaluate_step, fixed_batches, probe_run
from smbfast.files import cannot_write
from smbfast.metrics import Meter, log_step, open_log
from smbfast.model.flops import step_flops
from smbfast.model.target import TargetEncoder
from smbfast.open_run import OpenRun
from smbfast.optim import due_after, learning_rate, place, tau, total_steps
from smbfast.progress import duration
from smbfast.reporting.page import write_report
from smbfast.runfolder import earlier, write_end, write_status
from smbfast.runtime import (
    choose_device,
    matmul_rate,
    stop_on_signals,
    terminate_as_interrupt,
)
from smbfast.settings import TrainSettings, kernel_choice, load, presets, run_arguments
from smbfast.startup import checks_itself, layer_dtype, losses_of, refuse_empty, self_check
from smbfast.step import LossScales, RunFailed, Updater, forward_backward

EPILOG = f"""first argument: a preset ({", ".join(presets())}) or a .toml file; default `default`
  --print            show the resolved run as TOML and stop
  --resume=never     short for --run.resume=never
  --export=merged    short for --run.export=merged

examples
  python -m smbfast.train
  python -m smbfast.train --data.path=MEDS_FOLDER --probe.labels=mortality_1y
  python -m smbfast.train lora --data.path=MEDS_FOLDER --model.path=Qwen/Qwen3-8B"""


def train(settings: TrainSettings, command: str) -> str:
    """Run all phases of `settings`, from the start or from the newest checkpoint.

    Returns "done", or "preempted" when a signal asked to stop (everything is saved then).

    Raises:
        ValueError: bad data, a model that does not load, a run folder that is of another run.
        RunFailed: the gradient was not finite several steps in a row.
    """
    run = OpenRun.open(settings)
    encoder, target, first = run.encoder, run.take_target(), run.progress.step
    total, losses = total_steps(settings), losses_of(settings)
    updater = Updater(run.optimizer, settings.optim.clip)
    fixed = fixed_batches(run)
    meter = Meter(total, first, matmul_rate(run.device, layer_dtype(encoder)))
    log = open_log(run)
    health: dict = {}
    entry: dict = {}  # the health when the phase began
    write_status(run.folder, "running", first, command)
    with stop_on_signals() as stop:
        for batch in meter.waits(prefetched(run.steps_to_do(), pin=run.device.type == "cuda")):
            step, at = batch.index, place(settings, batch.index)
            phase = at.phase
            if phase.w_jepa == 0:
                target = None
            elif target is None:
                target = TargetEncoder(encoder, run.target_form)
            if at.begins:
                health = entry = evaluate(encoder, target, fixed, settings, phase)
                log.write("eval", step=step, phase=phase.name, **health)
            refuse_empty(batch, phase)
            if checks_itself(settings) and (at.begins or step == first):
                gaps = self_check(encoder, target, run.windows, settings, step, phase)
                log.write("self_check", step=step, phase=phase.name, **gaps)

            lr = learning_rate(settings, at)
            scales = LossScales.of(phase.w_sft, phase.w_jepa, batch.labels, batch.masked)
            summed = forward_backward(losses, encoder, target, batch.micro, scales)
            grad_norm = updater.step(lr, target, tau(settings, step))
            # FLOPs of the shared forward: what the reference computes beyond it is no use
            meter.add(batch, sum(step_flops(run.shape, m).total for m in batch.micro))

            # a signal may come at any moment: whether one came is read once
            due = due_after(settings, at, step + 1, first, bool(stop))
            if due.anything:  # here the device is waited for
                skipped = updater.report_skips(step + 1, phase.name)
            if due.log:
                norm = None if skipped else float(grad_norm)
                pace = meter.read(step + 1)
                log_step(log, run, batch, summed, health, lr=lr, grad_norm=norm, pace=pace)
            if due.evaluate:
                health = evaluate_step(run, target, fixed, phase, step + 1, entry, log)
            if due.save and not skipped:
                run.save(target, step + 1, log.offset, command)
            if due.stop:
                write_status(run.folder, "preempted", run.progress.step, command)
                log.close()
                at_step = f"step {run.progress.step} is saved"
                print(f"{stop.name}: stopped, {at_step}; the same command goes on")
                return "preempted"
    run.save_model(run.folder / "final", target, total)
    seconds = run.seconds()
    _export(settings, run.device)
    probe_run(run, target)
    log.write("end", step=total, seconds=seconds, best=run.progress.best)
    log.close()
    write_report(run.folder)
    write_status(run.folder, "done", total, command)
    console.end_card(run, seconds, health)
    return "done"


def _export(settings: TrainSettings, device: torch.device) -> None:
    run = settings.folder
    if settings.run.export == "merged" and not (run / "merged").is_dir():
        print(checkpoint.export_merged(run / "final", run / "merged", device))


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    prog = "python -m smbfast.train"
    if {"-h", "--help"} & set(argv):
        print(help_text(TrainSettings, f"{prog} [preset]", EPILOG))
        return
    show = "--print" in argv
    name, words = run_arguments([a for a in argv if a != "--print"])
    command = shlex.join([*prog.split(), name, *words])
    ours = None
    try:
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
