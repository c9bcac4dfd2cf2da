"""Settings of the command `compare`, and how its words are read."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from smbfast.base.config import Settings, build, joined, known_keys, with_overrides


class CompareSettings(Settings):
    """Compare predictions on the same patients: is one method better than another, on which task?

    Words without a key name methods. A method is a prediction file (MEDS columns subject_id,
    prediction_time and boolean_value, with predicted_boolean_probability, as meds-evaluation reads
    it; or those of time to event that a probe writes), a folder of them (predictions/), or the
    folder of a run that was probed. Several training seeds of one method are joined by commas or
    named by a quoted pattern; each is one run, and intervals are then over runs and patients. A run
    holds predictions of many models: `PATH:MODEL` takes one of them, and without it that is
    `smbfast`. `NAME=PATH` gives a method another name. One word alone compares the models that
    lie in it.

    Rows are paired by patient and prediction time. What only one method has is left out and
    counted, and outcomes that disagree are refused. For each task: figures of every method,
    differences with 95 % intervals on the same draws of patients, calibration side by side. The
    verdict of a task is about AUROC, or the mean cumulative/dynamic AUC of time to event, on each
    patient's first row; its p is corrected by Holm over all comparisons that are made.

    Nothing is fitted, and no patient is looked at that the files do not hold. Predictions of
    held-out patients were counted as a look when they were written.
    """

    epilog: ClassVar[str] = """Examples

  Compare two runs on every task that both were probed on:
    python -m smbfast.compare runs/jepa runs/sft

  Compare two methods of three training seeds each:
    python -m smbfast.compare "jepa=runs/jepa-*" "sft=runs/sft-*" --out=jepa-against-sft

  Compare a run with the file of a peer, and with the run's own baseline:
    python -m smbfast.compare runs/jepa meds_tab=peer/mortality_1y.parquet
    python -m smbfast.compare runs/jepa runs/jepa:values_boosting

  Put the folds of a cross-validation together and compare all models in them:
    python -m smbfast.compare runs/eicu --folds"""

    methods: list[str] = Field(
        description="The methods to compare, which are given as words without this key; see "
        "above. Where a path holds a comma, a copy or link without one must be named."
    )
    folds: bool = Field(
        False,
        description="Whether the paths of a method are folds of a cross-validation, not training "
        "seeds: their rows are put together, each row once. A pattern names the folds, and a "
        "folder that holds fold-1, fold-2 and so on stands for these; what a comma separates are "
        "training seeds. --folds is short for it.",
    )
    against: Literal["first", "all"] = Field(
        "first",
        description="Which pairs of more than two methods are compared: `first`, the first method "
        "with each other one; `all`, every pair. More pairs make the correction of p stricter.",
    )
    tasks: list[str] = Field(
        [],
        description="Tasks to compare. If the list is empty, these are all that two methods have "
        "in common.",
    )
    out: Path | None = Field(
        None,
        description="Folder that receives compare.json and the page compare.html, which needs no "
        "network and no script. `none` prints the table alone.",
    )
    bootstraps: int = Field(
        1000,
        ge=0,
        description="Number of draws of patients, and of training seeds where there are several, "
        "for the 95 % intervals and p. No p is below 2 / (draws + 1); 0 gives no intervals and no "
        "verdict.",
    )
    seed: int = Field(
        0,
        ge=0,
        description="Random seed of the draws. The same seed gives the same intervals.",
    )
    small_cells: int = Field(
        10,
        ge=0,
        description="Privacy of small groups: in the printed table, in compare.json and on "
        "the page a count from 1 to this number appears as <=N, and one that leaves so many of its "
        "whole as all but <=N. 0 shows every count as it is.",
    )

    @field_validator("methods")
    @classmethod
    def _has_one(cls, methods: list[str]) -> list[str]:
        if not methods:
            raise ValueError("must name a method: a prediction file, a folder of them or a run")
        return methods


def compare_arguments(argv: list[str]) -> CompareSettings:
    """Return the settings that a command line gives: words name methods, the rest are settings.

    Raises:
        ValueError: an unknown key, a wrong value, or no method.
    """
    keys = set(known_keys(CompareSettings))
    settings: list[str] = []
    words: list[str] = []
    for word in joined(CompareSettings, argv):
        name, given_value, _ = word.partition("=")  # a folder may be called `out`
        is_key = word.startswith("-") or (given_value and name.replace("-", "_") in keys)
        (settings if is_key and word != "-" else words).append(word)
    with_overrides(CompareSettings, {}, settings)  # an unknown key is named before what is missing
    if not words and not any(s.lstrip("-").startswith("methods=") for s in settings):
        raise ValueError(
            "must be given at least one method to compare: a prediction file, a folder of them or "
            "the folder of a run; see --help"
        )
    return build(CompareSettings, {"methods": words} if words else {}, settings)
