"""python -m bench.coverage: how often the truth lies in a 95 % interval by resampling patients.

Datasets are simulated in which the truth is known. A patient has 1 to 4 rows, a tendency to the
outcome and one to high scores, so that rows of one patient are alike. Two models that share a part
of their error score the rows. Given the outcome a score is normal, so that its AUROC between
patients is a formula: Phi(gap / sqrt(2 (1 + patient²))), with noise of variance 1 within a patient.

A share of D datasets is uncertain by itself: at a true 95 % and 500 datasets it lies between 93 and
97 % in 95 of 100 benches.

Legend: N rows, P patients.
"""

from typing import Any, ClassVar

import numpy as np
from pydantic import Field
from scipy.special import expit
from scipy.stats import norm

from bench import records
from smbfast.base.config import Settings, command_line
from smbfast.statistics import resample
from smbfast.statistics.binary import auroc

PREVALENCE = 0.15
ROWS = 4  # at most, of a patient
PATIENT = 0.7  # sd of what a score owes to its patient
GAPS = {
    "one": 1.45,
    "other": 1.30,
}  # between mean scores with and without the outcome: AUROC .80, .77
SHARED = 0.6  # correlation of the two models' errors


class CoverageBench(Settings):
    """Simulate datasets and count how often the true AUROC, and the true difference of two models,
    lie in their 95 % intervals."""

    epilog: ClassVar[str] = """Examples

  The published figures (about ten minutes on one core):
    python -m bench.coverage --save"""

    datasets: int = Field(500, ge=1, description="Simulated datasets for each number of positives.")
    draws: int = Field(1000, ge=20, description="Draws of patients for an interval.")
    positives: list[int] = Field(
        [45, 100, 300, 1000], min_length=1, description="Rows with the outcome, on average."
    )
    seed: int = Field(0, description="Of the simulation.")
    save: bool = Field(False, description="Append the results to bench/results/coverage.jsonl.")


def truth() -> dict[str, float]:
    """Return the AUROC of each model, and their difference."""
    values = {
        name: float(norm.cdf(gap / np.sqrt(2 * (1 + PATIENT**2)))) for name, gap in GAPS.items()
    }
    return {**values, "difference": values["one"] - values["other"]}


def simulated(positives: int, random: np.random.Generator) -> tuple[Any, Any, dict[str, Any]]:
    """Return patient and outcome of each row, and the scores of each model."""
    patients = round(positives / PREVALENCE / ((1 + ROWS) / 2))
    rows_P = random.integers(1, ROWS + 1, patients)
    subject_N = np.repeat(np.arange(patients), rows_P)
    # a normal tendency with sd 1 moves the mean of expit: -2.05 gives 15 %
    true_N = random.random(len(subject_N)) < expit(-2.05 + random.normal(size=patients))[subject_N]
    both_P, both_N = random.normal(size=patients), random.normal(size=len(subject_N))
    scores = {}
    for name, gap in GAPS.items():
        own_P, own_N = random.normal(size=patients), random.normal(size=len(subject_N))
        error_P = np.sqrt(SHARED) * both_P + np.sqrt(1 - SHARED) * own_P
        error_N = np.sqrt(SHARED) * both_N + np.sqrt(1 - SHARED) * own_N
        scores[name] = gap * true_N + PATIENT * error_P[subject_N] + error_N
    return subject_N, true_N, scores


def measured(positives: int, draws: int, seed: int) -> tuple[int, dict[str, resample.Interval]]:
    """Return the number of positive rows of one dataset, and the intervals."""
    subject_N, true_N, scores = simulated(positives, np.random.default_rng([seed, positives]))
    metrics = {name: auroc(score_N, true_N) for name, score_N in scores.items()}
    values, drawn = resample.resampled(metrics, subject_N, draws, seed)
    intervals = {name: resample.interval(values[name], drawn[name]) for name in GAPS}
    intervals["difference"] = resample.interval(
        values["one"] - values["other"], drawn["one"] - drawn["other"]
    )
    return int(true_N.sum()), intervals


def covered(bench: CoverageBench, positives: int) -> dict[str, Any]:
    """Return for one number of positives the shares of intervals that hold, and miss, the truth."""
    first = 1_000_000 * bench.seed
    runs = [measured(positives, bench.draws, first + at) for at in range(bench.datasets)]
    said: dict[str, Any] = {
        "positives": positives,
        "positives_mean": round(float(np.mean([number for number, _ in runs])), 1),
        "datasets": bench.datasets,
        "draws": bench.draws,
    }
    for name, true in truth().items():
        own = [intervals[name] for _, intervals in runs if intervals[name].low is not None]
        low, high = np.array([[i.low, i.high] for i in own]).T
        said[name] = {
            "true": round(true, 4),
            "mean": round(float(np.mean([i.value for i in own])), 4),
            "without": bench.datasets - len(own),
            "covered": round(float(((low <= true) & (true <= high)).mean()), 4),
            "below": round(float((high < true).mean()), 4),
            "above": round(float((low > true).mean()), 4),
            "half_width": round(float((high - low).mean() / 2), 4),
        }
    return said


def main(argv: list[str] | None = None) -> None:
    bench = command_line(CoverageBench, argv, prog="python -m bench.coverage")
    stamp = records.stamp("coverage", "cpu")
    print("positives  what        true    covered  interval below, above the truth  half-width")
    for positives in bench.positives:
        said = covered(bench, positives)
        for name in truth():
            cell = said[name]
            print(
                f"{positives:9}  {name:10}  {cell['true']:.4f}  {cell['covered']:7.1%}"
                f"  {cell['below']:7.1%} {cell['above']:7.1%}  {cell['half_width']:.4f}",
                flush=True,
            )
        if bench.save:
            records.append("coverage", [{**stamp, **said}])


if __name__ == "__main__":
    main()
