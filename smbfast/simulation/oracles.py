"""Computes the best possible predictions on a simulated cohort: two oracles of each task.

**Bayes filter** (the bound for any model: it sees what the model may see, and knows the model of
`cohort`). With L_t(z) = P(what was seen in month t | z), not visiting included,

    noon_t(z)    ~ b_t(z) * L_morning_t(z)          evening_t(z) ~ noon_t(z) * L_afternoon_t(z)
    b_0 = prior(age band)                           b_t+1 = evening_t @ A, A the living part of
                                                    the transition: alive at t + 1 is observed too

A lab value v with half a unit of rounding h has mass cdf(v + h) - cdf(v - h), down from -inf at
the least value. A node at noon of a visit's day conditions on `noon`: the visit and its morning,
none of its afternoon. The day and minute of a visit do not depend on z.

**Latent**: the same, with the true z of the node's month in place of the posterior; it too knows
nothing of the afternoon after a node at noon. The bound of a model that could read the state.

**Labels under censoring.** A row is labelled if the outcome is known at the horizon (the rule of
INSPECT: true if it was seen, false if it was not and the record reaches the horizon's end), and
only if the horizon ends before the study does, which is known at the node. Loss to follow-up
within the horizon then drops more negatives than positives, so the probability of a *labelled* row
being true is

    p(z) = pos(z) / (pos(z) + neg(z)),  averaged as  sum_z b(z) pos(z) / sum_z b(z) (pos + neg)(z)

where pos and neg weigh an outcome in month k after the node's with (1 - LOSS)^k, the chance of
being followed into month k. With K whole months to the horizon's end and f the fraction of month
K before it (D = month of death):

    pos = sum_{k<K} (1 - LOSS)^k P(D = k | z) + f (1 - LOSS)^K P(D = K | z)
    neg = (1 - LOSS)^K (P(D > K | z) + (1 - f) P(D = K | z))

`progression_1y` is the first diagnosis of an advanced stage (`cohort.ADVANCED`) among those with
none so far. Let x(z) be its chance in a month, M = diag(1 - x) A the chain that has had none:

    P(first in month k | z) = (A M^(k-1) x)(z),  death without it = (A M^(k-1) dead)(z)

and a node at noon may still see it that afternoon. Death without it is a known negative.

`tte_death` has a risk score, not a probability: the share of the next 60 months expected to be
lost to death, 1 - sum_k P(alive in month k | z) / 60.

B, T, Z, L, A, N as in `cohort`; K months after the node.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from smbfast.simulation import cohort
from smbfast.simulation.cohort import DAY, LOSS, STEP_DAYS, Block, Nodes, Z

HORIZON_DAYS = {"death_1y": 365, "death_3y": 1095, "progression_1y": 365}
TASKS = (*HORIZON_DAYS, "tte_death")
ABOUT = {
    "death_1y": "dies within 365 days",
    "death_3y": "dies within 1095 days",
    "progression_1y": (
        "first diagnosis of stage 4 or 5 within 365 days, among those without one; a death "
        "without it counts as False"
    ),
    "tte_death": "time to death; censored at loss to follow-up or the end of the study",
}
_RESTRICTED = 60


@dataclass(frozen=True)
class Outcome:
    """One task of a block: `node_M` places in the nodes; `label_M` bool (time to event: whether
    it happened); `days_M` fp64 days to event or censoring, None if binary; `bayes_M` and
    `latent_M` fp64 oracles."""

    node_M: np.ndarray
    label_M: np.ndarray
    days_M: np.ndarray | None
    bayes_M: np.ndarray
    latent_M: np.ndarray


def log_likelihood(block: Block) -> tuple[np.ndarray, np.ndarray]:
    """Return ln P(visit or none, morning | z) and ln P(afternoon | z), fp64 [B, T, Z] each.

    Terms that no z changes (the lab and the codes of pure noise) are left in: they cancel.
    """
    at = np.nonzero(block.visit_BT)
    morning_VZ = np.tile(np.log(cohort.VISIT_Z), (len(at[0]), 1))
    for number, lab in enumerate(cohort.LABS):
        value_V1 = block.lab_BTL[*at, number][:, None]
        half = 0.5 * lab.step
        low_VZ = (value_V1 - half - lab.mean_Z) / lab.sd
        low_VZ = np.where(value_V1 <= lab.least, -np.inf, low_VZ)
        high_VZ = (value_V1 + half - lab.mean_Z) / lab.sd
        # mirrored so that the difference is always taken in the lower tail, where it is exact
        upper = low_VZ > 0
        low_VZ, high_VZ = np.where(upper, -high_VZ, low_VZ), np.where(upper, -low_VZ, high_VZ)
        mass_VZ = np.maximum(ndtr(high_VZ) - ndtr(low_VZ), 1e-300)
        measured = np.log(lab.measured) + np.log(mass_VZ)
        absent = np.log(1 - lab.measured) if lab.measured < 1 else -np.inf
        morning_VZ += np.where(np.isnan(value_V1), absent, measured)
    afternoon_VZ = np.log(cohort.STAGE_CODE_ZS).T[block.stage_BT[at]]
    for number, code in enumerate(cohort.YES_NO):
        has_V1 = block.code_BTC[*at, number][:, None]
        afternoon_VZ += np.where(has_V1, np.log(code.chance_Z), np.log1p(-code.chance_Z))
    morning = np.tile(np.log1p(-cohort.VISIT_Z), (*block.visit_BT.shape, 1))
    afternoon = np.zeros_like(morning)
    morning[at], afternoon[at] = morning_VZ, afternoon_VZ
    return morning, afternoon


def filter_states(block: Block) -> tuple[np.ndarray, np.ndarray]:
    """Return the posterior of z_t given all seen up to noon, and up to the evening, of month t.

    Both are fp64 [B, T, Z], and every row sums to 1. A row holds for a patient who is alive in
    month t and still followed; after a death or the end of a record it has no meaning.
    """
    morning_BTZ, afternoon_BTZ = log_likelihood(block)
    move_AZZ = cohort.transition()[:, :Z, :Z]
    bands = [np.nonzero(block.band_B == band)[0] for band in range(len(move_AZZ))]
    noon, evening = np.empty_like(morning_BTZ), np.empty_like(morning_BTZ)
    belief_BZ = cohort.prior()[block.band_B]
    for month in range(morning_BTZ.shape[1]):
        noon[:, month] = belief_BZ = _updated(belief_BZ, morning_BTZ[:, month])
        evening[:, month] = belief_BZ = _updated(belief_BZ, afternoon_BTZ[:, month])
        following_BZ = np.empty_like(belief_BZ)
        for band, member in enumerate(bands):
            following_BZ[member] = belief_BZ[member] @ move_AZZ[band]
        belief_BZ = following_BZ
    return noon, evening


def _updated(belief_BZ: np.ndarray, log_BZ: np.ndarray) -> np.ndarray:
    weight_BZ = belief_BZ * np.exp(log_BZ - log_BZ.max(1, keepdims=True))
    return weight_BZ / weight_BZ.sum(1, keepdims=True)


def outcomes(block: Block, nodes: Nodes) -> dict[str, Outcome]:
    """Return the labels and both oracles of every task at the nodes of a block."""
    row_N, month_N = nodes.row_N, nodes.month_N
    noon_BTZ, evening_BTZ = filter_states(block)
    belief_NZ = np.where(
        nodes.evening_N[:, None], evening_BTZ[row_N, month_N], noon_BTZ[row_N, month_N]
    )
    latent_NZ = np.eye(Z)[block.state_BT[row_N, month_N]]
    entry_N = block.entry_B[row_N] * DAY
    end_N = entry_N + block.followed_B[row_N] * STEP_DAYS * DAY
    study_N = entry_N + block.study_B[row_N] * STEP_DAYS * DAY
    death_N = block.death_B[row_N]
    first_N, before_N = _first_advanced(block, nodes)

    tasks = {}
    for task, days in HORIZON_DAYS.items():
        horizon_N = nodes.time_N + days * DAY
        event_N = first_N if task == "progression_1y" else death_N
        true_N = (event_N >= 0) & (event_N <= horizon_N)
        false_N = ~true_N & (end_N >= horizon_N)
        if task == "progression_1y":
            false_N |= ~true_N & (death_N >= 0)
        known_N = (true_N | false_N) & (horizon_N <= study_N)
        if task == "progression_1y":
            known_N &= ~before_N
        at = np.nonzero(known_N)[0]
        weigh = _progression if task == "progression_1y" else _death
        pos_MZ, neg_MZ = weigh(block, nodes, at, days)
        bayes_M, latent_M = (
            (state[at] * pos_MZ).sum(1) / (state[at] * (pos_MZ + neg_MZ)).sum(1)
            for state in (belief_NZ, latent_NZ)
        )
        tasks[task] = Outcome(at, true_N[at], None, bayes_M, latent_M)
    died_N = death_N >= 0
    days_N = (np.where(died_N, death_N, end_N) - nodes.time_N) / DAY
    lost_NZ = _lost_share()[block.band_B[row_N]]
    tasks["tte_death"] = Outcome(
        np.arange(len(row_N)), died_N, days_N,
        (belief_NZ * lost_NZ).sum(1), (latent_NZ * lost_NZ).sum(1),
    )  # fmt: skip
    return tasks


def _first_advanced(block: Block, nodes: Nodes) -> tuple[np.ndarray, np.ndarray]:
    """Return the time of the first advanced diagnosis after each node (-1 = none), and whether one
    came before."""
    advanced_NT = np.isin(block.stage_BT, cohort.ADVANCED)[nodes.row_N]
    month_T = np.arange(advanced_NT.shape[1])
    shift = month_T < (nodes.month_N + nodes.evening_N)[:, None]
    after_NT = advanced_NT & ~shift
    month_N = after_NT.argmax(1)
    row_N = nodes.row_N
    day_N = block.entry_B[row_N] + month_N * STEP_DAYS + block.day_BT[row_N, month_N]
    minute_N = cohort.DIAGNOSIS_MINUTE + block.shift_BT[row_N, month_N]
    time_N = day_N * DAY + minute_N * (DAY // 1440)
    return np.where(after_NT.any(1), time_N, -1), (advanced_NT & shift).any(1)


def _ahead(block: Block, nodes: Nodes, at: np.ndarray, days: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the whole months from the start of the node's month to the day of the horizon's end,
    and which day of its month that is."""
    ahead = block.day_BT[nodes.row_N[at], nodes.month_N[at]] + days
    return ahead // STEP_DAYS, ahead % STEP_DAYS


def _death(block: Block, nodes: Nodes, at: np.ndarray, days: int) -> tuple[np.ndarray, np.ndarray]:
    months_M, day_M = _ahead(block, nodes, at, days)
    hour_M = np.where(nodes.evening_N[at], cohort.EVENING, cohort.NOON)
    fraction_M1 = ((day_M + hour_M / 24) / STEP_DAYS)[:, None]
    alive_AKZ = _alive_table(months_M.max(initial=0) + 1)
    dies_AKZ = alive_AKZ[:, :-1] - alive_AKZ[:, 1:]  # [:, k]: death in month k + 1
    follow_K = (1 - LOSS) ** np.arange(1, dies_AKZ.shape[1] + 1)
    seen_AKZ = np.cumsum(dies_AKZ * follow_K[:, None], axis=1)
    band_M = block.band_B[nodes.row_N[at]]
    last_MZ = dies_AKZ[band_M, months_M - 1]
    follow_M1 = follow_K[months_M - 1][:, None]
    pos_MZ = seen_AKZ[band_M, months_M - 2] + fraction_M1 * follow_M1 * last_MZ
    neg_MZ = follow_M1 * (alive_AKZ[band_M, months_M] + (1 - fraction_M1) * last_MZ)
    return pos_MZ, neg_MZ


def _alive_table(months: int) -> np.ndarray:
    """Return P(alive k months later | z, age band), fp64 [A, months + 1, Z]."""
    move_AZZ = cohort.transition()[:, :Z, :Z]
    steps = [np.ones((len(move_AZZ), Z))]
    for _ in range(months):
        steps.append(np.einsum("azy,ay->az", move_AZZ, steps[-1]))
    return np.stack(steps, axis=1)


def _lost_share() -> np.ndarray:
    return 1 - _alive_table(_RESTRICTED)[:, 1:].mean(1)


def _progression(
    block: Block, nodes: Nodes, at: np.ndarray, days: int
) -> tuple[np.ndarray, np.ndarray]:
    months_M, day_M = _ahead(block, nodes, at, days)
    full = cohort.transition()
    move_AZZ, dead_AZ = full[:, :Z, :Z], full[:, :Z, cohort.DEAD]
    advanced_Z = cohort.STAGE_CODE_ZS[:, list(cohort.ADVANCED)].sum(1)
    monthly_Z = cohort.VISIT_Z * advanced_Z
    # column k - 1 of each: in month k after the node's, from the state of the node's month
    first, dies, none = [], [], []
    path_AZZ = move_AZZ
    dies_AZ = dead_AZ
    for _ in range(int(months_M.max(initial=1))):
        first.append(path_AZZ @ monthly_Z)
        dies.append(dies_AZ)
        none.append(path_AZZ.sum(2))
        without_AZZ = path_AZZ * (1 - monthly_Z)
        dies_AZ = np.einsum("azy,ay->az", without_AZZ, dead_AZ)
        path_AZZ = without_AZZ @ move_AZZ
    first_AKZ, dies_AKZ, none_AKZ = (np.stack(table, axis=1) for table in (first, dies, none))
    follow_K = (1 - LOSS) ** np.arange(1, len(first) + 1)
    seen_AKZ = np.cumsum(first_AKZ * follow_K[:, None], axis=1)
    gone_AKZ = np.cumsum(dies_AKZ * follow_K[:, None], axis=1)

    band_M, last_M = block.band_B[nodes.row_N[at]], months_M - 1
    evening_M1 = nodes.evening_N[at][:, None]
    # the afternoon of the last day counts only for a node in the evening
    share_M1 = (day_M[:, None] + evening_M1) / STEP_DAYS
    final_MZ = share_M1 * first_AKZ[band_M, last_M]
    follow_M1 = follow_K[last_M][:, None]
    pos_MZ = seen_AKZ[band_M, last_M - 1] + follow_M1 * final_MZ
    neg_MZ = gone_AKZ[band_M, last_M] + follow_M1 * (none_AKZ[band_M, last_M] - final_MZ)
    pos_noon_MZ = advanced_Z + (1 - advanced_Z) * pos_MZ
    return (
        np.where(evening_M1, pos_MZ, pos_noon_MZ),
        np.where(evening_M1, neg_MZ, (1 - advanced_Z) * neg_MZ),
    )
