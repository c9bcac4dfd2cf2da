"""How the gradients of two losses lie to each other, over many batches of a run's checkpoints.

A batch of windows, drawn as those of training are, is cut into two halves at random. Each half has
a gradient of SFT, a1 and a2, and one of JEPA, b1 and b2, with respect to the weights that both
losses share (`smbfast.run.gradients.shared_weights`). All figures come from the inner products of
these four:

    cosine      cos(a1 + a2, b1 + b2), of the batch as a whole: the primary figure
    sft, jepa   cos(a1, a2), cos(b1, b2): of one loss with itself, on other windows. It is the
                noise: losses of one aim would have no larger cosine on two halves
    across      mean of cos(a1, b2) and cos(a2, b1): of two losses on other windows
    mean        <a1, b2> / sqrt(<a1, a2> <b1, b2>), each averaged over batches first: the cosine of
                the mean gradients, without the noise of batches; nan where either is not above 0

Legend: M moments of a run, C batches, R replicates, B draws.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from smbfast.base.files import read_json, verify_folder
from smbfast.data.loader import make_batch, step_windows
from smbfast.experiments.runs import Run
from smbfast.model.target import TargetEncoder
from smbfast.run import checkpoint
from smbfast.run.checkpoint import Checkpoint
from smbfast.run.gradients import shared_weights
from smbfast.run.open_run import OpenRun
from smbfast.run.optim import place
from smbfast.run.startup import losses_of
from smbfast.run.step import LossScales
from smbfast.statistics.seeds import seed_weights

BATCHES = 16  # at each moment
FIGURES = ("cosine", "sft", "jepa", "across", "mean")
_APART = 1_000_000  # from a run's seed to that by which these batches are drawn


def products(run: Run, opened: OpenRun) -> tuple[np.ndarray, np.ndarray]:
    """Return the inner products of the four gradients, float64 [M, C, 4, 4], at each checkpoint of
    a finished run whose phase has both losses, and the steps done there, int64 [M].

    Args:
        opened: the run, whose weights are replaced by those of its checkpoints.

    Raises:
        ValueError: no checkpoint is of such a phase, or one is damaged.
    """
    steps, grams = [], []
    for folder in checkpoint.folders(run.folder):
        verify_folder(folder)
        own = Checkpoint(folder, read_json(folder / "record.json"))
        target = checkpoint.load(own, opened.encoder, opened.optimizer)
        phase = place(opened.settings, own.step - 1).phase
        if target is not None and phase.w_sft > 0 and phase.w_jepa > 0:
            steps.append(own.step)
            grams.append([_gram(opened, target, own.step, number) for number in range(BATCHES)])
    if not grams:
        raise ValueError(f"{run.folder} must hold a checkpoint with both losses; it has none")
    return np.array(grams), np.array(steps)


def _gram(opened: OpenRun, target: TargetEncoder, step: int, number: int) -> np.ndarray:
    """Return the inner products of a1, a2, b1, b2 of one batch, float64 [4, 4]."""
    settings = opened.settings
    seed, draw = settings.run.seed + _APART, step * BATCHES + number
    phase = place(settings, step - 1).phase
    chosen = step_windows(
        opened.windows, settings.objective, settings.optim.batch, seed, draw, jepa=True
    )
    order = np.random.default_rng([seed, draw]).permutation(len(chosen))
    gradients: list[list[Tensor]] = [[], []]
    for half in (order[0::2], order[1::2]):
        windows = [opened.windows[int(i)] for i in np.sort(chosen[half])]
        batch = make_batch(
            windows, settings.objective, seed, draw,
            sft=True, jepa=True, horizons=opened.windows.horizons,
        )  # fmt: skip
        scales = LossScales.of_batch(phase.model_copy(update={"w_sft": 1.0, "w_jepa": 1.0}), batch)
        losses = losses_of(settings)(opened.encoder, target, batch, **scales._asdict())
        for own, loss, again in (
            (gradients[0], losses.sft, True),
            (gradients[1], losses.jepa, False),
        ):
            own.append(_gradient(opened, loss, again))
    flat = torch.stack([*gradients[0], *gradients[1]]).double()
    return (flat @ flat.T).numpy()


def _gradient(opened: OpenRun, loss: Tensor | None, again: bool) -> Tensor:
    """Return the gradient of a loss by the shared weights as one vector; 0 without a loss."""
    weights = shared_weights(opened.encoder)
    if loss is None:
        return torch.zeros(sum(weight.numel() for weight in weights))
    with torch.enable_grad():
        parts = torch.autograd.grad(loss, weights, retain_graph=again, allow_unused=True)
    return torch.cat(
        [
            torch.zeros(weight.numel()) if part is None else part.reshape(-1)
            for weight, part in zip(weights, parts, strict=True)
        ]
    )


def figures(gram: np.ndarray) -> dict[str, np.ndarray]:
    """Return `FIGURES` of inner products [..., C, 4, 4], each float64 [...], means over batches."""

    def cosine(one: np.ndarray, two: np.ndarray, product: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return product / np.sqrt(one * two)

    g = {(i, j): gram[..., i, j] for i in range(4) for j in range(4)}
    size = {i: g[i, i] for i in range(4)}
    sft, jepa = size[0] + size[1] + 2 * g[0, 1], size[2] + size[3] + 2 * g[2, 3]
    both = g[0, 2] + g[0, 3] + g[1, 2] + g[1, 3]
    across = (cosine(size[0], size[3], g[0, 3]) + cosine(size[1], size[2], g[1, 2])) / 2
    crossed = (g[0, 3] + g[1, 2]).mean(-1) / 2
    return {
        "cosine": cosine(sft, jepa, both).mean(-1),
        "sft": cosine(size[0], size[1], g[0, 1]).mean(-1),
        "jepa": cosine(size[2], size[3], g[2, 3]).mean(-1),
        "across": across.mean(-1),
        "mean": cosine(g[0, 1].mean(-1), g[2, 3].mean(-1), crossed),
    }


def estimates(
    grams: list[np.ndarray], draws: int, seed: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return each figure at each moment and as the mean over moments, [M + 1], and in each draw of
    batches and replicates, [B, M + 1].

    Args:
        grams: of each replicate, [M, C, 4, 4].
    """
    whole: dict[str, list[np.ndarray]] = {name: [] for name in FIGURES}
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in FIGURES}
    for number, gram in enumerate(grams):
        for name, value_M in figures(gram).items():
            whole[name].append(_with_mean(value_M))
        random = np.random.default_rng([seed, number])
        count = gram.shape[1]
        each = [figures(gram[:, random.integers(count, size=count)]) for _ in range(draws)]
        for name in FIGURES:
            drawn[name].append(np.stack([_with_mean(own[name]) for own in each]))
    weight_BR = seed_weights(len(grams), draws, seed)
    return {
        name: (
            np.mean(whole[name], axis=0),
            np.einsum("br,rbm->bm", weight_BR, np.stack(drawn[name])),
        )
        for name in FIGURES
    }


def _with_mean(value_M: np.ndarray) -> np.ndarray:
    return np.append(value_M, value_M.mean())


def write(path: Path, gram: np.ndarray, steps: np.ndarray) -> None:
    """Write inner products and steps."""
    with open(path, "wb") as file:
        np.savez(file, gram=gram, steps=steps)
