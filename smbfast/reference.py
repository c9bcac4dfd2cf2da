"""The objective as three separate forwards, in plain PyTorch: the specification.

Per optimizer step, over all its micro-batches:
    SFT    sum of next-token cross-entropies on trunks / labelled tokens of the step
    JEPA   sum over masked positions of mean_d (g(z_i) - T(z̄_i))² / masked positions of the step
    total  w_sft SFT + w_jepa JEPA
z: the online encoder on [context | masked future]; z̄: the target encoder on the unmasked trunk.

Segments of a PackedBatch are unpacked into rows, padded on the right.

Legend: B rows, T positions (of a padded row, or of the pack), D width, M masked positions.
"""

from dataclasses import dataclass

import torch
from smbkernels import linear_cross_entropy, masked_jepa_mse
from torch import Tensor

from smbfast.batch import PackedBatch
from smbfast.model.backbone import PatientEncoder, padded
from smbfast.model.target import TargetEncoder


@dataclass(frozen=True)
class JepaStates:
    """What the JEPA loss compares, and what diagnostics look at."""

    prediction_MD: Tensor
    online_MD: Tensor  # online hidden state at the masked positions
    target_MD: Tensor  # target hidden state there, before T
    previous_MD: Tensor  # target hidden state at the last visible token before each


def sft_sum(encoder: PatientEncoder, batch: PackedBatch) -> Tensor:
    """First forward: the summed next-token loss of the trunks."""
    trunks = trunk_rows(batch)
    hidden_BTD = encoder.hidden(padded([batch.ids_T[r] for r in trunks], 0))
    labels_BT = padded([batch.labels_T[r] for r in trunks], -100)
    labelled = labels_BT >= 0
    return linear_cross_entropy.reference(
        hidden_BTD[labelled], encoder.head_VD, labels_BT[labelled]
    )


def jepa_sum(
    encoder: PatientEncoder, target: TargetEncoder, batch: PackedBatch, *, normalize: bool
) -> Tensor:
    """Second and third forward: the summed JEPA loss of the branches; 0 without a masked row."""
    if not batch.masked:
        return torch.zeros((), device=batch.ids_T.device)
    states = jepa_states(encoder, target, batch)
    rows = torch.arange(len(states.target_MD), device=states.target_MD.device)
    loss = masked_jepa_mse.reference
    return loss(states.prediction_MD, states.target_MD, rows, normalize=normalize)


def jepa_states(encoder: PatientEncoder, target: TargetEncoder, batch: PackedBatch) -> JepaStates:
    """Both encoders at the masked positions of a batch, in the order of `masked_M`."""
    target_TD = target_hidden(target, batch)
    online_MD = online_hidden(encoder, batch)
    # the head of an encoder in bf16 is fp32: predictions are compared at full width
    prediction_MD = encoder.predictor(online_MD.to(encoder.predictor[-1].weight.dtype))
    return JepaStates(
        prediction_MD,
        online_MD,
        target_TD[batch.target_M],
        target_TD[_last_visible(batch)],
    )


def online_hidden(encoder: PatientEncoder, batch: PackedBatch) -> Tensor:
    """The online encoder on [context | masked future], at the masked positions: [M, D]."""
    rows, masks, places = [], [], []
    masked_T = torch.zeros(len(batch.ids_T), dtype=torch.bool, device=batch.ids_T.device)
    masked_T[batch.masked_M] = True
    for row, (segment, prefix) in enumerate(branch_rows(batch)):
        rows.append(torch.cat([batch.ids_T[prefix], batch.ids_T[segment]]))
        masks.append(torch.cat([torch.zeros_like(masked_T[prefix]), masked_T[segment]]))
        column = torch.nonzero(masks[-1])[:, 0]
        places.append(torch.stack([torch.full_like(column, row), column]))
    hidden_BTD = encoder.hidden(padded(rows, 0), padded(masks, False))
    place_2M = torch.cat(places, 1)
    return hidden_BTD[place_2M[0], place_2M[1]]


@torch.no_grad()
def target_hidden(target: TargetEncoder, batch: PackedBatch) -> Tensor:
    """The target encoder on the unmasked trunks, in the order of the pack: [trunk tokens, D]."""
    trunks = trunk_rows(batch)
    hidden_BTD = target.hidden(padded([batch.ids_T[r] for r in trunks], 0))
    return torch.cat([h[: r.stop - r.start] for h, r in zip(hidden_BTD, trunks, strict=True)])


def trunk_rows(batch: PackedBatch) -> list[slice]:
    """The rows of each trunk."""
    table = zip(
        batch.start_S.tolist(), batch.length_S.tolist(), batch.prefix_S.tolist(), strict=True
    )
    return [slice(start, start + length) for start, length, prefix in table if prefix == 0]


def branch_rows(batch: PackedBatch) -> list[tuple[slice, slice]]:
    """The rows of each branch, and of the trunk's prefix that it sees."""
    columns = (batch.start_S, batch.length_S, batch.trunk_start_S, batch.prefix_S)
    table = zip(*(c.tolist() for c in columns), strict=True)
    return [(slice(s, s + n), slice(t, t + p)) for s, n, t, p in table if p > 0]


def _last_visible(batch: PackedBatch) -> Tensor:
    """For each masked position, the trunk row of the last token before it that is not masked."""
    segments = branch_rows(batch)
    masked_T = torch.zeros(len(batch.ids_T), dtype=torch.bool, device=batch.ids_T.device)
    masked_T[batch.masked_M] = True
    rows = []
    for segment, prefix in segments:
        position = torch.arange(segment.stop - segment.start, device=masked_T.device)
        seen = torch.where(masked_T[segment], -1, position)
        last = torch.cummax(seen, 0).values[masked_T[segment]]
        # -1, nothing seen in the branch yet, is the last token of the context
        rows.append(prefix.stop + last)
    return torch.cat(rows)
