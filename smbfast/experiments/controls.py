"""Trains what a given run must beat: SFT alone at as many steps, and at as many FLOPs.

A control is a whole run with the data, sizes, seed and probes of the given one. Its phases have the
same learning rates, but neither JEPA nor codes to come. At equal FLOPs the last phase is longer.
"""

from pathlib import Path
from typing import Any

from smbkernels import use

from smbfast.base.config import build, read_toml
from smbfast.base.entry import RunFailed
from smbfast.base.locks import locked
from smbfast.experiments.runs import cost
from smbfast.run.epochs import by_steps
from smbfast.run.folder import earlier, status_of
from smbfast.run.loop import train
from smbfast.run.open_run import OpenRun
from smbfast.run.optim import total_steps
from smbfast.settings import TrainSettings, kernel_choice

NAMES = ("sft", "sft_flops")


def controls(runs: list[Path], work: Path, command: str) -> dict[str, list[Path]]:
    """Train the controls of each run, or go on with them; return the folders by their name.

    Raises:
        ValueError: no run is given, or one is not finished.
        RunFailed: a signal stopped one.
    """
    if not runs:
        raise ValueError("`run` must name folders of finished runs for the experiment controls")
    folders: dict[str, list[Path]] = {name: [] for name in NAMES}
    for folder in runs:
        if status_of(folder).get("state") != "done":
            raise ValueError(f"{folder} must be the folder of a finished run; it is not")
        given = build(TrainSettings, read_toml(folder / "config.toml"), [])
        given = placed(given, folder)
        as_many = by_steps(OpenRun.open(given, set_aside=False).settings)
        alone = placed(sft_alone(as_many), work / "controls" / f"{folder.name}-sft")
        _trained(alone, command)
        steps = longer(total_steps(alone), cost(given)["flops"], cost(alone)["flops"])
        more = sft_alone(as_many, steps - total_steps(alone))
        more = placed(more, work / "controls" / f"{folder.name}-sft_flops")
        _trained(more, command)
        for name, own in zip(NAMES, (alone, more), strict=True):
            folders[name].append(own.folder)
    return folders


def longer(steps: int, flops: float, alone: float) -> int:
    """Return the steps of SFT, at least `steps`, that have `flops`, if `steps` have `alone`."""
    return max(steps, round(steps * flops / alone))


def placed(settings: TrainSettings, folder: Path) -> TrainSettings:
    """Return the settings with another run folder."""
    own = settings.run.model_copy(update={"dir": str(folder)})
    return settings.model_copy(update={"run": own})


def sft_alone(settings: TrainSettings, more: int = 0) -> TrainSettings:
    """Return the settings with SFT alone in every phase, and `more` steps in the last one."""
    changed: dict[str, Any] = {"w_sft": 1.0, "w_jepa": 0.0, "w_codes": 0.0, "freeze": "none"}
    phases = [phase.model_copy(update=changed) for phase in settings.phases]
    last = phases[-1]
    phases[-1] = last.model_copy(update={"steps": last.steps + more})
    return settings.model_copy(update={"phases": phases})


def _trained(settings: TrainSettings, command: str) -> None:
    everywhere, by_op = kernel_choice(settings.kernels)
    with locked(settings.folder, "smbfast.experiment"), use(everywhere, **by_op):
        if earlier(settings.folder, settings) != "done" and train(settings, command) != "done":
            raise RunFailed(f"{settings.folder} was stopped; the same command goes on")


def text(runs: list[Path], folders: dict[str, list[Path]]) -> str:
    """Return the commands that compare the runs with their controls."""
    own = ",".join(map(str, runs))
    lines = [
        f"python -m smbfast.compare {own} {','.join(map(str, folders[name]))}" for name in NAMES
    ]
    return "\n".join(["Compare the runs with their controls:", *lines])
