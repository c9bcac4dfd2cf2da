"""The training loop: the phases (SFT, then JEPA), then embeddings, probes and a report.

`_train` is one flat function, to be read from top to bottom. It builds on `open_run` (all that
comes before the first step), `loader` (a step is a pure function of seed and number), `objective`
(one forward for both losses, specified by `reference`), `step` (forward, backward, update),
`evaluation` and `checkpoint`.

Between two lines of the log, the CPU never waits for the GPU: the loader counts tokens on the CPU,
losses stay on the GPU, and the optimizer's own kernel skips a step whose gradient is not finite.
"""

from contextlib import ExitStack, closing
from functools import partial

import torch

from smbfast.base.helpers import helper
from smbfast.base.progress import AHEAD
from smbfast.base.runtime import matmul_rate, stop_on_signals
from smbfast.data.loader import prefetched
from smbfast.model.flops import flops_in_phase
from smbfast.model.target import TargetEncoder
from smbfast.reporting.page import write_report
from smbfast.run import alarms, checkpoint, console
from smbfast.run.evaluation import evaluate_entry, evaluate_step
from smbfast.run.fixed import Fixed
from smbfast.run.metrics import Meter, log_end, log_step, open_log
from smbfast.run.open_run import OpenRun
from smbfast.run.optim import due_after, learning_rate, place, tau, total_steps
from smbfast.run.outlook import REPORT, Outlook
from smbfast.run.probes import probe_run
from smbfast.run.profile import profiled
from smbfast.run.ranks import ALONE, Ranks
from smbfast.run.startup import checks_itself, layer_dtype, losses_of, self_check
from smbfast.run.step import LossScales, StepLosses, Updater, forward_backward
from smbfast.settings import TrainSettings


def train(settings: TrainSettings, command: str, ranks: Ranks = ALONE) -> str:
    """Run all phases of `settings`, from the start or from the newest checkpoint.

    However it ends, the log is closed, so that trackers know of it.

    Args:
        command: what goes on with this run, for its status.
        ranks: the processes that train it together, each of which calls this function.

    Returns:
        "done", or "preempted" when a signal asked to stop; then everything is saved.

    Raises:
        ValueError: if data are bad, a model does not load, or the folder belongs to another run.
        RunFailed: if the gradient was not finite in several steps in a row, no step of a phase had
            anything to learn from, or the run collapsed and `eval.stop_on_collapse` asks to stop
            then.
    """
    AHEAD.expect({}, before="the first step")
    with ExitStack() as at_end:
        return _train(settings, command, ranks, at_end)


def _train(settings: TrainSettings, command: str, ranks: Ranks, at_end: ExitStack) -> str:
    """Do what `train` says.

    Args:
        at_end: what is closed at the end.
    """
    run = OpenRun.open(settings, ranks)
    settings = run.settings  # with the steps of phases that are given in epochs
    encoder, target, first = run.encoder, run.take_target(), run.progress.step
    total, losses = total_steps(settings), losses_of(settings)
    updater = Updater(run.optimizer, settings.optim.clip)
    fixed = Fixed.of(run)
    meter = Meter(
        total, run.progress, matmul_rate(run.device, layer_dtype(encoder)), Outlook.of(run)
    )
    AHEAD.expect({})
    log = open_log(run)
    at_end.callback(log.close)
    health: dict = {}
    run.write_status("running", first, command)
    with stop_on_signals() as stop, run.matmul.used(), run.saves_in_background():
        ahead = at_end.enter_context(
            closing(prefetched(run.steps_to_do(), pin=run.device.type == "cuda", stop=lambda: stop))
        )
        for batch in profiled(meter.waits(ahead), run):
            step, at = batch.index, place(settings, batch.index)
            phase = at.phase
            if phase.w_jepa == 0 or (phase.sync and at.begins_phase):
                target = None  # gone before its successor is made: no two at a time
            if phase.w_jepa > 0 and target is None:
                target = TargetEncoder(encoder, run.target_form)
            if at.begins_phase:
                health = evaluate_entry(run, target, fixed, phase, step, log)
            if checks_itself(settings) and (at.begins_phase or step == first):
                gaps = self_check(encoder, target, run.windows, settings, step, phase)
                log.write("self_check", step=step, phase=phase.name, **gaps)

            lr = learning_rate(settings, at)
            scales = LossScales.of_batch(phase, batch)
            summed = forward_backward(
                partial(losses, freeze=phase.freeze),
                encoder,
                target,
                batch.micro_batches,
                scales,
                num_by_horizon=batch.num_by_horizon,
                ranks=ranks,
            )
            # a signal may come at any moment, so the flag is read only once per step; where a
            # checkpoint could not be written, all ranks stop to hear of it in `save`
            summed_3, stopping = ranks.summed(
                updater.parameters,
                torch.stack(summed),
                bool(stop) or run.lost_a_checkpoint,
                batch.digest,
            )
            grad_norm = updater.step(lr, target, tau(settings, step))
            # FLOPs of the shared forward; what the reference path computes beyond them is waste
            meter.add(batch, flops_in_phase(run.shape, batch.micro_batches, phase))
            alarms.count(run, phase, batch)

            due = due_after(settings, at, step + 1, first, stopping)
            if due.anything:  # only here the CPU waits for the device
                skipped = updater.report_skips(step + 1, phase.name, run.progress.watch)
            if due.log:
                log_step(
                    log,
                    run,
                    batch,
                    StepLosses(*summed_3),
                    lr=lr,
                    grad_norm=None if skipped else float(grad_norm),
                    pace=meter.read(step + 1),
                )
                alarms.require_signal(run, phase, step + 1)
            if due.evaluate:
                health = evaluate_step(run, target, fixed, phase, step + 1, log)
            if due.save:
                run.save(target, step + 1, log.offset, command, skipped=skipped)
            if due.stop:
                run.settle()
                run.write_status("preempted", run.progress.step, command)
                log.close()
                why = stop.name or "a signal to another rank"
                print(
                    f"{why}: stopped, step {run.progress.step} is saved; the same command goes on"
                )
                return "preempted"
    run.save_model(run.folder / "final", target, total)
    seconds = run.seconds()
    if ranks.is_main:
        export(settings, run.device)
    meter.begin_stages()
    with run.matmul.used():
        probe_run(run, target, final=settings.probe.final, command=command)
    AHEAD.begin(REPORT)
    if not ranks.is_main:
        return "done"
    log_end(log, run, seconds)
    log.close()
    with helper("the report"):
        write_report(run.folder, final=settings.probe.final)
    run.write_status("done", total, command)
    console.end_card(run, seconds, health)
    return "done"


def judge(settings: TrainSettings, command: str, ranks: Ranks = ALONE) -> None:
    """Probe a finished run on held-out patients, and write its report again. Nothing is trained.

    All ranks call it, and embed.

    Raises:
        ValueError: the checkpoint of the last step is not there, or data or labels are bad.
    """
    folder = settings.folder
    has_any = checkpoint.folders(folder)
    run = OpenRun.open(settings, ranks, set_aside=False) if has_any else None
    settings = settings if run is None else run.settings
    total = total_steps(settings)
    if run is None or run.progress.step != total:
        known = f", {total}," if all(phase.steps for phase in settings.phases) else ""
        raise ValueError(
            f"{folder} must hold the checkpoint of its last step{known} to be judged on "
            f"held-out patients; it does not. Use smbfast.embed --model={folder}/final, then "
            "smbfast.probe --final"
        )
    with run.matmul.used():
        probe_run(run, run.take_target(), final=True, command=command)
    if ranks.is_main:
        write_report(run.folder, final=True)


def export(settings: TrainSettings, device: torch.device) -> None:
    """Write a finished run as a plain Hugging Face model, if the settings ask for it."""
    run = settings.folder
    if settings.run.export == "merged" and not (run / "merged").is_dir():
        print(checkpoint.export_merged(run / "final", run / "merged", device))
