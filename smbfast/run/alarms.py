"""Warns while a run trains nothing, and ends it after a phase in which no step had a signal.

What is judged, and how, stands in `smbfast.reporting.signals`; it is heard here as it happens.
"""

from smbfast.base import terminal
from smbfast.base.entry import RunFailed
from smbfast.data.loader import Step
from smbfast.reporting.runlog import Record
from smbfast.reporting.signals import weights_of
from smbfast.run.open_run import OpenRun
from smbfast.settings import PhaseSettings

_ALSO_PRINTED = "skipped"  # by `Updater.report_skips`, at once


def count(run: OpenRun, phase: PhaseSettings, step: Step) -> None:
    """Take note of a step that was done; nothing of it waits for the device."""
    run.progress.watch.count(
        phase.name, labels=step.num_labels, masked=step.num_masked, pairs=step.num_pairs
    )


def hear(run: OpenRun, phase: PhaseSettings, kind: str, record: Record) -> None:
    """Warn of what a line of the log or an evaluation is the first to show in its phase.

    All ranks hear the same, and the main one warns.
    """
    watch, weights = run.progress.watch, weights_of(phase.model_dump())
    said = watch.line(record, weights) if kind == "step" else watch.evaluation(record, weights)
    for alarm in said:
        if run.ranks.is_main and alarm.cause != _ALSO_PRINTED:
            terminal.warn(alarm.finding.text)


def require_signal(run: OpenRun, phase: PhaseSettings, step: int) -> None:
    """Raise RunFailed after the last step of a phase in which no step can have trained anything.

    Args:
        step: number of steps done.
    """
    watch = run.progress.watch
    why = watch.without_signal()
    if why is None or watch.counts["steps"] < phase.steps:
        return
    raise RunFailed(
        f"phase `{phase.name}` has trained nothing up to step {step}: {why}. Nothing more was "
        f"saved, and checkpoints before stay in {run.folder}. Change the data, the weights of the "
        "losses or the learning rate, and begin again in another --run.dir"
    )
