"""How much of the Bayes filter's posterior a linear model reads from an embedding.

The filter holds, at each decision node, the probability of each of the 20 living states given all
that was seen by then (`smbfast.simulation.oracles`). It is all that the record says of the future.
A ridge regression from the embedding to it is fitted on train, its penalty chosen on tuning, and
judged on held_out by R2 = 1 - residual / spread, with squares summed over nodes and states, about
the mean of the judged nodes. A constant has 0, the posterior itself 1.

Legend: K nodes, Z states, D width, R judged nodes, P patients, B draws.
"""

import numpy as np

from smbfast.data.nodes import SPLIT_NAMES, Nodes
from smbfast.simulation import cohort, oracles

PENALTIES = tuple(10.0**power for power in range(-4, 6))


def posterior(seed: int, num_patients: int, nodes: Nodes) -> np.ndarray:
    """Return the filter's posterior at each node of a simulated cohort, float64 [K, Z].

    Args:
        num_patients: of the cohort, all splits together.

    Raises:
        ValueError: a node is not of this cohort.
    """
    known: dict[tuple[int, int], np.ndarray] = {}
    for number in range(-(-num_patients // cohort.BLOCK)):
        block = cohort.draw_block(seed, number)
        drawn = cohort.draw_nodes(block, seed, 1)
        noon_BTZ, evening_BTZ = oracles.filter_states(block)
        for row, month, evening, time in zip(
            drawn.row_N, drawn.month_N, drawn.evening_N, drawn.time_N, strict=True
        ):
            belief_BTZ = evening_BTZ if evening else noon_BTZ
            known[int(block.index_B[row]) + 1, int(time)] = belief_BTZ[row, month]
    keys = list(zip(nodes.subject_K.tolist(), nodes.time_K.tolist(), strict=True))
    missing = sum(key not in known for key in keys)
    if missing:
        raise ValueError(f"every node must be of cohort {seed}; {missing} of {len(keys)} are not")
    return np.stack([known[key] for key in keys])


def residuals(
    embedding_KD: np.ndarray, posterior_KZ: np.ndarray, split_K: np.ndarray
) -> tuple[np.ndarray, float]:
    """Return the squared residual of each held-out node, float64 [R], and the penalty.

    Args:
        split_K: index into `SPLIT_NAMES`.
    """
    train_K, tuning_K, held_K = (
        split_K == SPLIT_NAMES.index(name) for name in ("train", "tuning", "held_out")
    )
    value_KD = embedding_KD.astype(np.float64)
    mean_D, std_D = value_KD[train_K].mean(0), value_KD[train_K].std(0)
    value_KD = (value_KD - mean_D) / np.where(std_D > 0, std_D, 1.0)
    mean_Z = posterior_KZ[train_K].mean(0)
    train_TD = value_KD[train_K]
    gram_DD, right_DZ = train_TD.T @ train_TD, train_TD.T @ (posterior_KZ[train_K] - mean_Z)
    best: tuple[float, float, np.ndarray] | None = None
    for penalty in PENALTIES:
        ridge_DD = gram_DD + penalty * len(train_TD) * 1e-3 * np.eye(len(gram_DD))
        fit_KZ = mean_Z + value_KD @ np.linalg.solve(ridge_DD, right_DZ)
        loss = float(((fit_KZ - posterior_KZ)[tuning_K] ** 2).sum())
        if best is None or loss < best[0]:
            best = loss, penalty, fit_KZ
    assert best is not None
    return ((best[2] - posterior_KZ)[held_K] ** 2).sum(1), best[1]


def spread(posterior_KZ: np.ndarray, split_K: np.ndarray) -> np.ndarray:
    """Return the squared distance of each held-out node to their mean, float64 [R]."""
    held_RZ = posterior_KZ[split_K == SPLIT_NAMES.index("held_out")]
    return ((held_RZ - held_RZ.mean(0)) ** 2).sum(1)
