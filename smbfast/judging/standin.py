"""Stand-ins of metrics until those of `smbfast.statistics` are there."""

import numpy as np
from scipy.special import expit, logit

from smbfast.statistics import resample


def seed_weights(seeds, draws, seed, cohorts=1):
    from scipy.stats import norm, t

    if seeds == 1:
        return np.ones((draws, 1))
    count_BS = np.empty((draws, seeds))
    for draw in range(draws):
        random = np.random.default_rng([seed, draw, 1])
        count_BS[draw] = np.bincount(random.integers(seeds, size=seeds), minlength=seeds)
    known = t.ppf(0.975, cohorts * (seeds - 1)) / norm.ppf(0.975)
    return 1 / seeds + known * np.sqrt(seeds / (seeds - 1)) * (count_BS - 1) / seeds


def holm(p):
    p = np.asarray(p, float)
    order = np.argsort(p)
    out = np.empty(len(p))
    out[order] = np.minimum(1, np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order]))
    return out


def brier_skill(probability_N, true_N):
    own = resample.brier(probability_N, true_N)

    def metric(weight_BN):
        share = weight_BN @ true_N.astype(float) / weight_BN.sum(1)
        return 1 - own(weight_BN) / (share * (1 - share))

    return metric


def slope(probability_N, true_N, *, intercept=False):
    x = logit(np.clip(probability_N, 1e-12, 1 - 1e-12))

    def metric(w):
        a = np.zeros(len(w))
        b = np.ones(len(w))
        for _ in range(12):
            p = expit(a[:, None] + b[:, None] * x)
            e = w * (true_N - p)
            v = w * p * (1 - p)
            if intercept:
                a += e.sum(1) / v.sum(1)
                continue
            g0, g1 = e.sum(1), e @ x
            h00, h01, h11 = v.sum(1), v @ x, v @ (x * x)
            det = h00 * h11 - h01**2
            a += (h11 * g0 - h01 * g1) / det
            b += (h00 * g1 - h01 * g0) / det
        return a if intercept else b

    return metric


def auc_at(score_N, duration_N, event_N, time):
    case = event_N & (duration_N <= time)
    known = case | (duration_N > time)
    rows = np.flatnonzero(known)
    own = resample.auroc(score_N[rows], case[rows])
    return lambda w: own(w[:, rows])


def brier_at(chance_N, duration_N, event_N, time):
    case = event_N & (duration_N <= time)
    rows = np.flatnonzero(case | (duration_N > time))
    own = resample.brier(chance_N[rows], case[rows])
    return lambda w: own(w[:, rows])
