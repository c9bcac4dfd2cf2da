"""AdamW over the trained parameters, and the schedules of a run as pure functions of the step."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from smbfast.model.backbone import PatientEncoder
from smbfast.settings import OptimSettings, PhaseSettings, TrainSettings

DEFAULT_LR = {"lora": 2e-4, "all": 1e-3}  # our choice


@dataclass(frozen=True)
class Place:
    """The position of a step in the schedule."""

    phase: PhaseSettings
    phase_index: int  # number of the phase, from 0
    phase_step: int  # number of the step in its phase, from 0

    @property
    def begins_phase(self) -> bool:
        """Whether this is the first step of the phase."""
        return self.phase_step == 0


def place(settings: TrainSettings, step: int) -> Place:
    """Return the place of step `step` (from 0, over all phases)."""
    for index, phase in enumerate(settings.phases):
        if step < phase.steps:
            return Place(phase, index, step)
        step -= phase.steps
    raise AssertionError("the step is beyond the last phase")


@dataclass(frozen=True)
class Due:
    """What to do after a step."""

    log: bool
    evaluate: bool
    save: bool
    stop: bool

    @property
    def anything(self) -> bool:
        """Whether there is something to do that waits for the device."""
        return self.log or self.evaluate or self.save


def due_after(settings: TrainSettings, at: Place, done: int, first: int, stop: bool) -> Due:
    """Return what to do once `done` steps are done, in a process that began after `first` steps.

    Args:
        at: the place of the step that was just done.
        stop: whether a signal asked to stop.
    """
    run, last = settings.run, at.phase_step + 1 == at.phase.steps
    return Due(
        log=done % run.log_every == 0 or last or done == first + 1,
        evaluate=done % settings.eval.every == 0 or last,
        save=done % run.save_every == 0 or last or stop,
        stop=stop,
    )


def total_steps(settings: TrainSettings) -> int:
    """Return the number of optimizer steps of all phases."""
    return sum(p.steps for p in settings.phases)


def learning_rate(settings: TrainSettings, at: Place) -> float:
    """Return the learning rate: linear warm-up, then a cosine to `min_lr` of the phase's peak."""
    peak = at.phase.lr or DEFAULT_LR[settings.trains]
    warmup = min(at.phase.warmup, at.phase.steps - 1)
    if at.phase_step < warmup:
        return peak * (at.phase_step + 1) / warmup
    done = (at.phase_step - warmup) / max(at.phase.steps - 1 - warmup, 1)
    low = settings.optim.min_lr
    return peak * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))


def tau(settings: TrainSettings, step: int) -> float:
    """Return the EMA decay at a step: constant, or linear from `tau` to `tau_end`.

    It is `tau` at the first step with JEPA and `tau_end` at the last one; other steps, which have
    no EMA, do not count.
    """
    first, last = settings.objective.tau, settings.objective.tau_end
    if last is None:
        return first
    done, total, begin = 0, 0, 0  # steps with JEPA before this one and in all, first of the phase
    for phase in settings.phases:
        if phase.w_jepa > 0:
            done += min(max(step - begin, 0), phase.steps)
            total += phase.steps
        begin += phase.steps
    return first + (last - first) * min(done / max(total - 1, 1), 1.0)


def make_optimizer(encoder: PatientEncoder, optim: OptimSettings) -> torch.optim.AdamW:
    """Return AdamW with weight decay only on matrices that are trained whole, and on no bias.

    It is fused: one pass over all parameters, which skips a step on the device when `found_inf`
    is set.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in encoder.named_parameters():
        if not parameter.requires_grad:
            continue
        partial = any(word in name for word in ("lora_", "trainable_tokens"))
        # the bias of codes to come has a row for each horizon
        is_bias = name.rpartition(".")[2].startswith("bias")
        whole = parameter.ndim >= 2 and not partial and not is_bias
        (decayed if whole else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    return torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, fused=True)


def trained(encoder: nn.Module) -> dict[str, nn.Parameter]:
    """Return trained parameters by name, in the order of the optimizer's saved state."""
    return {n: p for n, p in encoder.named_parameters() if p.requires_grad}
