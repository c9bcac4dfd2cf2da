"""The objective as three separate forwards, in plain PyTorch: the specification.

Per optimizer step, over all its micro-batches:
    SFT    sum of next-token cross-entropies on trunks / labelled tokens of the step
    JEPA   sum over masked positions of mean_d (g(z_i) - T(z̄_i))² / masked positions of the step
    total  w_sft SFT + w_jepa JEPA
z: the online encoder on [context | masked future]; z̄: the target encoder on the unmasked trunk.

Segments of a PackedBatch are unpacked into rows, padded on the right.

Legend: B rows, T positions (of a padded row, or of the pack), U tokens of the target encoder,
D width, N labelled rows, M masked positions.
"""

import torch
import torch.nn.functional as F
from smbkernels import linear_cross_entropy, masked_jepa_mse
from torch import Tensor

from smbfast.batch import PackedBatch
from smbfast.model.backbone import PatientEncoder, padded
from smbfast.model.target import JepaStates, TargetEncoder


def losses(
    encoder: PatientEncoder,
    target: TargetEncoder | None,
    batch: PackedBatch,
    *,
    sft_scale: float,
    jepa_scale: float,
    normalize: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The summed SFT loss times `sft_scale` and the summed JEPA loss times `jepa_scale`.

    None where the scale is 0 or the batch has nothing to predict.
    """
    sft = jepa = None
    if sft_scale > 0 and batch.num_labels:
        sft = sft_sum(encoder, batch) * sft_scale
    if jepa_scale > 0 and batch.num_masked:
        jepa = jepa_sum(encoder, target, batch, normalize=normalize) * jepa_scale
    return sft, jepa


def sft_sum(encoder: PatientEncoder, batch: PackedBatch) -> Tensor:
    """First forward: the summed next-token loss of the trunks."""
    trunks = [batch.ids_T[r] for r in trunk_rows(batch)]
    hidden_BTD = encoder.hidden(padded(trunks, 0))
    hidden_TD = torch.cat([h[: len(t)] for h, t in zip(hidden_BTD, trunks, strict=True)])
    hidden_ND = hidden_TD[batch.labelled_N]
    return linear_cross_entropy.reference(hidden_ND, encoder.head_VD, batch.label_N)


def jepa_sum(
    encoder: PatientEncoder, target: TargetEncoder, batch: PackedBatch, *, normalize: bool
) -> Tensor:
    """Second and third forward: the summed JEPA loss of the branches; 0 without a masked row."""
    if not batch.num_masked:
        return torch.zeros((), device=batch.ids_T.device)
    target_UD = target_hidden(target, batch)
    prediction_MD = predict(encoder, online_hidden(encoder, batch))
    loss = masked_jepa_mse.reference
    return loss(prediction_MD, target_UD, batch.target_M, normalize=normalize)


def measure(
    encoder: PatientEncoder, target: TargetEncoder | None, batch: PackedBatch
) -> tuple[Tensor, JepaStates | None]:
    """The summed SFT loss, and both encoders at the masked positions if there is a target."""
    sft = sft_sum(encoder, batch)
    if target is None or not batch.num_masked:
        return sft, None
    online_MD, target_UD = online_hidden(encoder, batch), target_hidden(target, batch)
    return sft, JepaStates(
        prediction_MD=predict(encoder, online_MD),
        online_MD=online_MD,
        target_MD=target_UD[batch.target_M],
        previous_MD=target_UD[last_visible(batch)],
    )


def predict(encoder: PatientEncoder, online_MD: Tensor) -> Tensor:
    """g, written out: Linear and GELU, repeated, then Linear.

    The predictor of an encoder in bf16 is fp32: predictions are compared at full width.
    """
    linears = [part for part in encoder.predictor if isinstance(part, torch.nn.Linear)]
    value_MD = online_MD.to(linears[0].weight.dtype)
    for linear in linears[:-1]:
        value_MD = F.gelu(F.linear(value_MD, linear.weight, linear.bias))
    return F.linear(value_MD, linears[-1].weight, linears[-1].bias)


def online_hidden(encoder: PatientEncoder, batch: PackedBatch) -> Tensor:
    """The online encoder on [context | masked future], at the masked positions: [M, D]."""
    masked_T = torch.zeros_like(batch.ids_T, dtype=torch.bool)
    masked_T = masked_T.index_fill(0, batch.masked_M, True)
    branches = branch_rows(batch)
    rows = [torch.cat([batch.ids_T[prefix], batch.ids_T[own]]) for own, prefix in branches]
    masks = [torch.cat([masked_T[prefix], masked_T[own]]) for own, prefix in branches]
    hidden_BTD = encoder.hidden(padded(rows, 0), padded(masks, False))
    lengths = [(own.stop - own.start, prefix.stop - prefix.start) for own, prefix in branches]
    states = [h[p : p + n] for h, (n, p) in zip(hidden_BTD, lengths, strict=True)]
    return torch.cat(states)[batch.masked_M - branches[0][0].start]


@torch.no_grad()
def target_hidden(target: TargetEncoder, batch: PackedBatch) -> Tensor:
    """The target encoder on the unmasked trunks, in the order of the pack: [U, D]."""
    table = batch.target_segments.host_S6.tolist()
    rows = [batch.target_ids_U[start : start + length] for start, length, *_ in table]
    hidden_BTD = target.hidden(padded(rows, 0))
    return torch.cat([h[: len(r)] for h, r in zip(hidden_BTD, rows, strict=True)])


def trunk_rows(batch: PackedBatch) -> list[slice]:
    """The rows of each trunk."""
    return [slice(start, start + length) for start, length, _, prefix in batch.rows if prefix == 0]


def branch_rows(batch: PackedBatch) -> list[tuple[slice, slice]]:
    """The rows of each branch, and of the trunk's prefix that it sees."""
    return [(slice(s, s + n), slice(t, t + p)) for s, n, t, p in batch.rows if p > 0]


def last_visible(batch: PackedBatch) -> list[int]:
    """For each masked position, the row of U of the last token before it that is not masked."""
    masked, rows = set(batch.masked_M.tolist()), []
    start_of = {
        row: own.start for own, _ in branch_rows(batch) for row in range(own.start, own.stop)
    }
    for row, target_row in zip(batch.masked_M.tolist(), batch.target_M.tolist(), strict=True):
        back = 1
        # what precedes the first token of a branch is the last token of its context
        while row - back >= start_of[row] and row - back in masked:
            back += 1
        rows.append(target_row - back)
    return rows
