"""How the losses of a phase pull at the weights that they share, on one fixed micro-batch."""

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from smbfast.batch import PackedBatch
from smbfast.model.backbone import PatientEncoder
from smbfast.model.target import TargetEncoder
from smbfast.run.startup import losses_of
from smbfast.run.step import LossScales
from smbfast.settings import PhaseSettings, TrainSettings

MOST = 1 << 24  # numbers of a gradient that are held for each loss: our choice


@torch.enable_grad()
def gradients(
    encoder: PatientEncoder,
    target: TargetEncoder | None,
    batch: PackedBatch | None,
    settings: TrainSettings,
    phase: PhaseSettings,
) -> dict[str, float | None]:
    """Return the norm of the gradient of each loss of the phase, and the cosine of each two.

    Gradients are of the mean losses without their weights in the phase, with respect to
    `shared_weights`. They come from one forward and a backward for each loss, and nothing is
    accumulated in the encoder. What the phase freezes is not frozen here. `grad_<loss>` is a norm
    and `cos_<loss>_<loss>` a cosine, which is None where a gradient is 0. A loss that the phase or
    the batch does not have is left out.

    Args:
        batch: not larger than a micro-batch of the run; on any device.
    """
    weights = shared_weights(encoder)
    if batch is None or not weights:
        return {}
    ones = {name: float(getattr(phase, name) > 0) for name in ("w_sft", "w_jepa", "w_codes")}
    scales = LossScales.of_batch(phase.model_copy(update=ones), batch)
    batch = batch.to(encoder.mask_vector.device)
    losses = losses_of(settings)(encoder, target, batch, **scales._asdict())
    present = {n: v for n, v in losses._asdict().items() if v is not None}
    grads = {}
    for place, (name, loss) in enumerate(present.items(), start=1):
        again = place < len(present)
        grads[name] = torch.autograd.grad(loss, weights, retain_graph=again, allow_unused=True)
    dots = {
        pair: _dot(grads[pair[0]], grads[pair[1]])
        for pair in [*((n, n) for n in grads), *combinations(grads, 2)]
    }
    norms = {n: dots[n, n] ** 0.5 for n in grads}
    values: dict[str, float | None] = {f"grad_{n}": norm for n, norm in norms.items()}
    for a, b in combinations(grads, 2):
        size = norms[a] * norms[b]
        values[f"cos_{a}_{b}"] = dots[a, b] / size if size > 0 else None
    return values


def shared_weights(encoder: PatientEncoder) -> list[Tensor]:
    """Return the trained weights of the trunk that every loss reaches.

    These are adapters, or all weights of a backbone that is trained whole without its table of
    token embeddings, in which SFT trains the rows of a tied head. Of more than `MOST` numbers as
    many whole tensors as fit, spread evenly over the depth.
    """
    rows = {id(p) for p in encoder.base.get_input_embeddings().parameters()}
    weights = [p for p in encoder.decoder.parameters() if p.requires_grad and id(p) not in rows]
    total = sum(p.numel() for p in weights)
    if total <= MOST:
        return weights
    chosen, held, passed = [], 0, 0
    for weight in weights:
        passed += weight.numel()
        # never more of the first tensors than their share
        if (held + weight.numel()) * total <= passed * MOST:
            held += weight.numel()
            chosen.append(weight)
    return chosen


def _dot(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> float:
    """Return the inner product of two gradients, summed in fp64; a missing one is 0."""
    both = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    sums = [(x.double() * y.double()).sum() for x, y in both]
    return float(torch.stack(sums).sum()) if sums else 0.0
