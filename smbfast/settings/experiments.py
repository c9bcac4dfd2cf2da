"""Settings of the command `experiment`."""

from pathlib import Path
from typing import Literal, get_args

from pydantic import Field

from smbfast.base.config import Settings

Experiment = Literal[
    "regimes",
    "mask_ratio",
    "depth",
    "tau",
    "cuts",
    "interference",
    "posterior",
    "format",
    "controls",
]
EXPERIMENTS: tuple[Experiment, ...] = get_args(Experiment)


class ExperimentSettings(Settings):
    """Run an experiment on simulated cohorts: arms that differ in one thing, over replicates.

    A replicate is a fresh cohort and a training seed of its own. Each of its runs is judged on the
    cohort's held-out patients, who serve for nothing else, by linear probes on the state at the
    last token. Baselines and the Bayes filter stand beside. Intervals are over replicates x
    patients. Question, arms, primary figure and what would refute the claim are printed before
    anything is trained, and are part of the record. Whatever is in `work` is used again: a command
    that was stopped goes on, and experiments share their runs.
    """

    name: Experiment = Field(
        description="Which experiment. It may also stand first, without --name=."
    )
    work: Path = Field(
        description="Folder for patients, runs, scores and results. What is there is used again, "
        "so that a command that was stopped goes on. The results are written to <work>/<name>."
    )
    replicates: int | None = Field(
        None,
        ge=1,
        description="Number of replicates. `none` takes that of the experiment: 5 for regimes, 3 "
        "for the others. With one, intervals are of patients alone.",
    )
    first: int = Field(
        51,
        ge=0,
        description="Seed of the first cohort; replicate r has the cohort with seed first + r - 1 "
        "and the training seed r. Try other settings on other cohorts than those of a result.",
    )
    steps: int = Field(
        250,
        ge=5,
        description="Number of optimizer steps of every run, but for the arms that say otherwise.",
    )
    patients: int = Field(
        4000,
        ge=200,
        description="Number of patients of a cohort: about 60 % train, 15 % tune, 25 % judge.",
    )
    held_out: int = Field(
        5000, ge=0, description="Number of further patients of a cohort, all of whom judge."
    )
    run: list[Path] = Field(
        [],
        description="For the experiment controls: folders of finished runs of one method, one for "
        "each training seed, which get their controls of SFT alone.",
    )
    jobs: int = Field(
        1,
        ge=1,
        description="Number of processes, of one thread each. The results do not depend on it.",
    )
    draws: int = Field(1000, ge=100, description="Number of draws of the bootstrap.")
