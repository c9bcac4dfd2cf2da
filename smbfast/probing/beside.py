"""Reads what is judged beside the models of a probe: another embeddings file, or predictions.

Predictions are one parquet file, or a folder of them with a file or a folder for each task, as a
probe writes it: subject_id and prediction_time, and `predicted_boolean_probability` of a binary
task (meds-evaluation's schema) or `log_hazard` of a time-to-event one. Shape suffixes: N label
rows, J judged rows, M rows of a file.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from smbfast.base.counts import few, of_whole
from smbfast.data.labels import Labels, integer_column, key_table, time_column
from smbfast.data.parquet import open_parquet
from smbfast.judging.scored import Scored
from smbfast.probing.features import join

COLUMNS = {"binary": "predicted_boolean_probability", "time_to_event": "log_hazard"}
OWN = "smbfast"  # the model that is taken where a folder holds those of a whole probe


@dataclass(frozen=True)
class Beside:
    """A name and what lies at its path; embeddings: whether that is a file of embeddings."""

    name: str
    path: Path
    embeddings: bool

    @classmethod
    def open(cls, name: str, path: Path) -> "Beside":
        """Look at what is there.

        Raises:
            ValueError: there is nothing, or a file that is neither.
        """
        if path.is_dir():
            return cls(name, path, False)
        if not path.is_file():
            raise ValueError(f"beside `{name}` must be a parquet file or a folder; {path} is none")
        columns = open_parquet(path).schema_arrow.names
        if "embedding" not in columns and not set(COLUMNS.values()) & set(columns):
            raise ValueError(
                f"beside `{name}`: {path} must have a column `embedding` or one of "
                f"{', '.join(COLUMNS.values())}; it has {', '.join(columns)}"
            )
        return cls(name, path, "embedding" in columns)

    def scored(self, labels: Labels, judged_on: str) -> Scored:
        """Return the predictions of a task: those of the judged rows, and nan elsewhere.

        A folder without a file for the task gives a reason.

        Raises:
            ValueError: a judged row is missing, has another outcome or no finite score, or the
                files do not say which of them is meant.
        """
        files = self._files(labels.task)
        if not files:
            none = np.empty((0, len(labels)))
            reason = "it has no predictions of this task"
            return Scored(self.name, self.name, "beside", none, {}, reason)
        score_SN = np.stack([_scores(file, self.name, labels, judged_on) for file in files])
        return Scored(self.name, self.name, "beside", score_SN)

    def _files(self, task: str) -> list[Path]:
        """Return the files of a task, one for each version of the model."""
        if self.path.is_file():
            return [self.path]
        roots = (self.path, self.path / "predictions")
        alone = [root / f"{task}.parquet" for root in roots if (root / f"{task}.parquet").is_file()]
        if alone:
            return alone[:1]
        folder = next((root / task for root in roots if (root / task).is_dir()), None)
        files = sorted(folder.glob("*.parquet")) if folder else []
        models: dict[str, list[Path]] = {}
        for file in files:
            models.setdefault(re.sub(r"-\d+$", "", file.stem), []).append(file)
        if len(models) > 1 and OWN not in models:
            raise ValueError(
                f"beside `{self.name}`: {folder} must hold one model, or one called {OWN}; it has "
                f"{', '.join(models)}. Name one file"
            )
        return models.get(OWN) or next(iter(models.values()), [])


def parsed(given: list[str], reserved: set[str]) -> list[Beside]:
    """Return what the words NAME=PATH name.

    Raises:
        ValueError: a word has another form, or its name is one of `reserved` or there twice.
    """
    others: list[Beside] = []
    for word in given:
        name, separator, path = word.partition("=")
        if not (separator and path and re.fullmatch(r"[A-Za-z0-9_.+]+", name)):
            raise ValueError(
                f"beside must be NAME=PATH, with a name of letters, digits and _.+, got `{word}`"
            )
        if name in reserved or name in {own.name for own in others}:
            raise ValueError(f"beside must give every model a name of its own; `{name}` is taken")
        others.append(Beside.open(name, Path(path)))
    return others


def _scores(file: Path, name: str, labels: Labels, judged_on: str) -> np.ndarray:
    """Return the scores of a file for every label row, nan where it is not judged, float64 [N]."""
    column = COLUMNS[labels.kind]
    outcome = "boolean_value" if labels.kind == "binary" else "event"
    has_outcome = outcome in open_parquet(file).schema_arrow.names
    table = key_table(file, [column, *([outcome] if has_outcome else [])])
    subject_M = integer_column(table, "subject_id", file)
    time_M = time_column(table, "prediction_time", file)
    judged_J = np.flatnonzero(labels.split_N == judged_on)
    if len(np.unique(np.stack([subject_M, time_M], 1), axis=0)) < len(subject_M):
        raise ValueError(f"{file} must hold each subject and prediction time once; rows repeat")
    row_J = join(labels.subject_N[judged_J], labels.time_N[judged_J], subject_M, time_M)
    _require(row_J >= 0, f"beside `{name}`: {file} must score every {judged_on} row", labels)
    values = table.column(column)
    if not pa.types.is_floating(values.type):
        raise ValueError(f"column `{column}` of {file} must be double, is {values.type}")
    score_J = values.to_numpy().astype(np.float64)[row_J]
    fine_J = np.isfinite(score_J)
    if labels.kind == "binary":
        fine_J &= (score_J >= 0) & (score_J <= 1)
    _require(fine_J, f"column `{column}` of {file} must hold scores of every judged row", labels)
    if has_outcome:
        own_N = labels.binary_N if labels.kind == "binary" else labels.survival_N[1]
        given_J = np.array(table.column(outcome).to_pylist(), dtype=object)[row_J]
        same_J = np.array(
            [value == own for value, own in zip(given_J, own_N[judged_J], strict=True)]
        )
        _require(same_J, f"column `{outcome}` of {file} must agree with the labels", labels)
    score_N = np.full(len(labels), np.nan)
    score_N[judged_J] = score_J
    return score_N


def _require(fine_J: np.ndarray, text: str, labels: Labels) -> None:
    if not fine_J.all():
        wrong = int(np.sum(~fine_J))
        share = f"{of_whole(wrong, len(fine_J))} of {few(len(fine_J))}"
        raise ValueError(f"{text} of {labels.task}; {share} are not so")
