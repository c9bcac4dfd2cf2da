"""Trains one run of an experiment, in the process that calls it, and says what it cost."""

import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from smbkernels import use

from smbfast.base.entry import RunFailed
from smbfast.base.files import digest_of, write_text
from smbfast.base.locks import locked
from smbfast.experiments.patients import Shared
from smbfast.model.backbone import PatientEncoder, make_encoder
from smbfast.model.flops import flops_in_phase
from smbfast.run.checkpoint import restore_final
from smbfast.run.folder import earlier, status_of
from smbfast.run.loop import train
from smbfast.run.open_run import OpenRun
from smbfast.run.optim import place, total_steps
from smbfast.settings import TrainSettings, kernel_choice

_SAMPLED = 20  # steps of each phase whose FLOPs are counted: our choice
_FREE = {"dir", "keep", "save_every", "threads"}  # settings of a run that change no weight


@dataclass(frozen=True)
class Run:
    """A run of an arm in a replicate; runs of equal settings are one, whatever arm they are of."""

    work: Path
    settings: TrainSettings

    @property
    def cohort(self) -> int:
        """The seed of its cohort."""
        return self.settings.cohort.seed

    @cached_property
    def name(self) -> str:
        """Cohort, training seed and a digest of all settings that decide about the weights."""
        made_of = self.settings.model_dump(mode="json", exclude={"run": _FREE, "probe": True})
        return f"{self.cohort}-{self.settings.run.seed}-{digest_of(made_of)[:8]}"

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.work / "runs" / self.name

    def placed(self, shared: Shared) -> TrainSettings:
        """Return the settings with the run's folder and the shards that it shares."""
        own = self.settings
        prepared = str(shared.prepared.folder.resolve())
        return own.model_copy(
            update={
                "run": own.run.model_copy(update={"dir": str(self.folder)}),
                "data": own.data.model_copy(update={"prepared": prepared}),
            }
        )

    def train(self, shared: Shared, command: str) -> None:
        """Train it, or go on with it, unless it is finished. What it prints goes to a file.

        Raises:
            RunFailed: a signal stopped it.
            ValueError: see `smbfast.run.loop.train`.
        """
        shared.lend(self.folder)
        settings = self.placed(shared)
        with (
            open(self.folder.with_suffix(".log"), "a") as log,
            redirect_stdout(log),
            redirect_stderr(log),
            locked(self.folder, "smbfast.experiment"),
        ):
            everywhere, by_op = kernel_choice(settings.kernels)
            with use(everywhere, **by_op):
                if earlier(self.folder, settings) != "done" and train(settings, command) != "done":
                    raise RunFailed(f"{self.folder} was stopped; the same command goes on")
                if not self.cost_file.is_file():
                    write_text(self.cost_file, json.dumps(cost(settings)) + "\n")

    @property
    def done(self) -> bool:
        """Whether it is finished and its cost is known."""
        return status_of(self.folder).get("state") == "done" and self.cost_file.is_file()

    @property
    def cost_file(self) -> Path:
        """The file that says what it cost."""
        return self.folder.with_suffix(".cost.json")

    def cost(self) -> dict[str, Any]:
        """Return its steps, FLOPs, tokens and seconds of training."""
        return dict(json.loads(self.cost_file.read_text()))

    def trained(self) -> PatientEncoder:
        """Return the encoder of the finished run."""
        encoder, _, _ = restore_final(self.folder / "final", torch.device("cpu"))
        return encoder

    def untrained(self, shared: Shared) -> PatientEncoder:
        """Return the encoder that the run began with."""
        own = shared.prepared
        return make_encoder(self.settings, own.tokenizer, torch.device("cpu"), own.new_tokens)


def cost(settings: TrainSettings) -> dict[str, Any]:
    """Return steps, FLOPs and tokens of a finished run, and the seconds of its training.

    FLOPs and tokens are those of up to 20 steps of each phase, spread evenly, times its steps.
    """
    run = OpenRun.open(settings, set_aside=False)
    settings = run.settings
    flops = tokens = 0.0
    begin = 0
    for phase in settings.phases:
        chosen = np.unique(np.linspace(begin, begin + phase.steps - 1, _SAMPLED).astype(int))
        steps = [run.make_step(int(index)) for index in chosen]
        share = phase.steps / len(steps)
        flops += share * sum(
            flops_in_phase(run.shape, step.micro_batches, place(settings, step.index).phase)
            for step in steps
        )
        tokens += share * sum(step.num_tokens for step in steps)
        begin += phase.steps
    return {
        "steps": total_steps(settings),
        "flops": float(flops),
        "tokens": float(tokens),
        "seconds": round(run.progress.seconds, 1),
    }


def quiet() -> None:
    """Let this process compute with one thread."""
    torch.set_num_threads(1)
    sys.stdout.flush()
