"""Draws of training seeds beside draws of patients, for intervals of a method rather than of a run.

Two things are chance: which patients judge, and which training seed a run had. A draw of the
bootstrap takes both: patients with replacement, and training seeds with replacement. A draw is the
same for all models, so every difference is paired, by patient and by training seed.

Few seeds that are drawn with replacement vary too little, for two reasons. Of S seeds, the variance
of a drawn mean is (S - 1) / S of what it should be; and the true spread is only known from the
C (S - 1) degrees of freedom that runs on C cohorts leave. So the weights of a draw are stretched
from their mean by the square root of S / (S - 1), and by the quantile of the t distribution over
that of the normal one; they still sum to 1. In 2,000 simulated repetitions of 3 cohorts x 3 seeds,
true values lay in 95 to 96 % of these intervals, and in 82 to 93 % of those of plain draws: the
fewer, the more of the chance is of seeds.

Shape suffixes: B draws, S training seeds (or versions) of a model, R replicates.
"""

import numpy as np
from scipy.stats import norm, t

from smbfast.statistics.resample import Interval

_OF_SEEDS = 1  # the stream of draws of training seeds, beside that of patients


def seed_weights(seeds: int, draws: int, seed: int, cohorts: int = 1) -> np.ndarray:
    """Return the weight of each training seed in each draw, float64 [B, S]; rows sum to 1.

    See the top of this file. One training seed weighs 1: then an interval is of patients alone.
    Models with as many seeds have the same draws; those of other numbers of seeds are independent,
    as first seeds of 3 and of 5 have nothing in common.

    Args:
        seeds: of each cohort.
        draws: B.
        seed: that draws them.
        cohorts: how many the interval is of.
    """
    count_BS = np.empty((draws, seeds))
    for draw in range(draws):
        random = np.random.default_rng([seed, draw, _OF_SEEDS, seeds])
        count_BS[draw] = np.bincount(random.integers(seeds, size=seeds), minlength=seeds)
    return stretched(count_BS, cohorts)


def stretched(count_BS: np.ndarray, cohorts: int = 1) -> np.ndarray:
    """Return weights float64 [B, S] of training seeds from how often each was drawn."""
    seeds = count_BS.shape[1]
    if seeds == 1:
        return np.ones(count_BS.shape)
    known = t.ppf(0.975, cohorts * (seeds - 1)) / norm.ppf(0.975)
    return 1 / seeds + known * np.sqrt(seeds / (seeds - 1)) * (count_BS - 1) / seeds


def over_seeds(drawn_BS: np.ndarray, seed: int, cohorts: int = 1) -> np.ndarray:
    """Return the mean over training seeds in each draw of patients and seeds, float64 [B].

    Models with the same number of seeds have the same draw of them: their differences are paired.

    Args:
        drawn_BS: a metric of each seed's run in each draw of patients.
        seed, cohorts: those of `seed_weights`.
    """
    return (seed_weights(drawn_BS.shape[1], len(drawn_BS), seed, cohorts) * drawn_BS).sum(1)


def over_replicates(value_R: np.ndarray) -> tuple[Interval, float | None]:
    """Return the mean over replicates with its 95 % interval, and the two-sided p of its being 0.

    A replicate has patients and a training seed of its own, so the spread of replicates holds both
    kinds of chance, and no draw of patients is added: Student's t. Without a spread that is known
    (fewer than two replicates) there is neither interval nor p.

    Args:
        value_R: float64, a metric, or a difference paired within the replicate.

    Raises:
        ValueError: there is no value, or one is not finite.
    """
    value_R = np.asarray(value_R, np.float64)
    if len(value_R) == 0 or not np.isfinite(value_R).all():
        raise ValueError(
            f"replicates must be at least one finite value each; got {len(value_R)} values, "
            f"{int((~np.isfinite(value_R)).sum())} of them not finite"
        )
    mean, free = float(value_R.mean()), len(value_R) - 1
    if free == 0:
        return Interval(mean, None, None), None
    error = float(value_R.std(ddof=1) / np.sqrt(len(value_R)))
    half = float(t.ppf(0.975, free)) * error
    p = (1.0 if mean == 0 else 0.0) if error == 0 else float(2 * t.sf(abs(mean) / error, free))
    return Interval(mean, mean - half, mean + half), p
