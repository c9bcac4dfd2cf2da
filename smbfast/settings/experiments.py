"""Settings of the command `experiment`."""

from pathlib import Path
from typing import ClassVar, Literal, get_args

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


class FoldsSettings(Settings):
    """Cross-validate a method on your data: train an encoder for each fold, judge it on the fold
    that it never saw, and put the held-out predictions of all folds together.

    Every patient then judges once, so a small dataset has as many judged outcomes as it holds. A
    patient's fold is a hash of the id; splits of the dataset itself are set aside. Of the patients
    outside a fold 15 % are tuning. Tables hold every baseline, differences with intervals over
    patients, and a verdict for each task. Whatever is in `work` is used again: the same command
    goes on. Prediction files of another model, as runs/fold-N/predictions/<task>/<model>.parquet in
    `work`, are judged with ours.
    """

    epilog: ClassVar[str] = """Examples

  Five folds of a dataset on two tasks, with twice the steps of the preset:
    python -m smbfast.experiment folds --data=MEDS_FOLDER --work=FOLDER \\
        --labels=mortality,readmission --train="default --phases.1.steps=1000\""""

    data: Path = Field(description="Folder of the MEDS dataset, with its labels.")
    work: Path = Field(
        description="Folder for views of the folds, runs and results, which are written to "
        "<work>/folds. Views link the data and take no room. It is best outside the repository."
    )
    labels: list[str] = Field(
        [],
        description="Tasks to judge, by name of their folders under <data>/labels. If the list is "
        "empty, these are all that are there.",
    )
    folds: int = Field(5, ge=2, le=100, description="Number of folds, each with a run of its own.")
    train: str = Field(
        "",
        description="Words of `python -m smbfast.train` for every run: a preset or a TOML file, "
        "and settings. Choose them without the held-out figures of any fold.",
    )
    bootstraps: int = Field(
        1000, ge=100, description="Number of draws of patients for the 95 % intervals."
    )
    seed: int = Field(0, ge=0, description="Random seed of the draws.")
