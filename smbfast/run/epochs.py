"""Phases that are given in epochs: their steps, once the training windows are known.

An epoch of a phase reads each window once that the phase trains on; see `num_windows_read`. Its
steps follow from the settings and the data alone, so they are the same on every rank and whenever
the run goes on; checkpoints and the log record them. `config.toml` has what was asked for, and can
be given again.
"""

import math
from collections.abc import Callable
from fractions import Fraction

from smbfast.data.loader import num_windows_read
from smbfast.data.windows import WindowSet
from smbfast.settings import PhaseSettings, TrainSettings


def resolved(settings: TrainSettings, windows: WindowSet) -> TrainSettings:
    """Return the settings of a run with the steps of all phases.

    Args:
        windows: of the training split.
    """

    def num(phase: PhaseSettings) -> int:
        return num_windows_read(windows, settings.objective, jepa=phase.w_jepa > 0)

    return with_steps(settings, num, settings.optim.batch)


def with_steps(
    settings: TrainSettings, num_windows: Callable[[PhaseSettings], int], batch: int
) -> TrainSettings:
    """Return the settings with steps in place of epochs that have none yet.

    Args:
        num_windows: of an epoch of a phase.
        batch: windows of a step; a step has fewer if an epoch has.
    """
    phases = []
    for phase in settings.phases:
        if phase.epochs is not None:
            num = max(num_windows(phase), 1)
            # a decimal as it was written: 0.1 of 1,000 windows are 100 and no fraction more
            windows = Fraction(str(phase.epochs)) * num
            steps = math.ceil(windows / min(batch, num))
            phase = phase.model_copy(update={"steps": steps})
        phases.append(phase)
    return settings.model_copy(update={"phases": phases})


def as_asked(settings: TrainSettings) -> TrainSettings:
    """Return the settings as they were before `resolved`: without steps that epochs say."""
    phases = [
        phase if phase.epochs is None else phase.model_copy(update={"steps": 0})
        for phase in settings.phases
    ]
    return settings.model_copy(update={"phases": phases})


def by_steps(settings: TrainSettings) -> TrainSettings:
    """Return resolved settings with the steps alone, for a run of as many steps on other terms."""
    phases = [phase.model_copy(update={"epochs": None}) for phase in settings.phases]
    return settings.model_copy(update={"phases": phases})


def in_words(phase: PhaseSettings) -> str:
    """Return the number of steps of a resolved phase, such as `500` or `2 epochs = 340`."""
    if phase.epochs is None:
        return f"{phase.steps:,}"
    return f"{phase.epochs:g} epoch{'' if phase.epochs == 1 else 's'} = {phase.steps:,}"
