"""The specification: both losses from three separate forwards, in plain PyTorch.

Per optimizer step, over all its micro-batches:
    SFT    sum of next-token cross-entropies on trunks / labelled tokens of the step
    JEPA   sum over masked positions of mean_d (g(z_i) - T(z̄_i))² / masked positions of the step
    total  w_sft SFT + w_jepa JEPA
z is the online encoder's state on [context | masked future], g the predictor, z̄ the state of the
target encoder (EMA teacher) on the unmasked trunk, T a layer norm without weights or the identity.

Each segment of a PackedBatch becomes one padded sequence (padding on the right), without packing.

Legend: B padded sequences, T positions (of a padded sequence, or tokens of the pack), U tokens of
the target encoder, D width, N labelled tokens, M masked tokens.
"""

import torch
import torch.nn.functional as F
from smbkernels import linear_cross_entropy, masked_jepa_mse
from torch import Tensor

from smbfast.batch import PackedBatch
from smbfast.model.backbone import PatientEncoder, padded
from smbfast.model.target import JepaStates, TargetEncoder
from smbfast.model.tf32 import predictor_linear


def losses(
    encoder: PatientEncoder,
    target: TargetEncoder | None,
    batch: PackedBatch,
    *,
    sft_scale: float,
    jepa_scale: float,
    normalize: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the summed SFT loss times `sft_scale` and the summed JEPA loss times `jepa_scale`.

    A loss is None where its scale is 0 or the batch has nothing to predict.
    """
    sft = jepa = None
    if sft_scale > 0 and batch.num_labels:
        sft = sft_sum(encoder, batch) * sft_scale
    if jepa_scale > 0 and batch.num_masked:
        assert target is not None
        jepa = jepa_sum(encoder, target, batch, normalize=normalize) * jepa_scale
    return sft, jepa


def sft_sum(encoder: PatientEncoder, batch: PackedBatch) -> Tensor:
    """First forward: return the summed next-token cross-entropy of the trunks, a scalar."""
    trunks = [batch.ids_T[r] for r in trunk_rows(batch)]
    hidden_BTD = encoder.hidden(padded(trunks, 0))
    hidden_TD = torch.cat([h[: len(t)] for h, t in zip(hidden_BTD, trunks, strict=True)])
    hidden_ND = hidden_TD[batch.labelled_N]
    return linear_cross_entropy.reference(hidden_ND, encoder.head_VD, batch.label_N)


def jepa_sum(
    encoder: PatientEncoder, target: TargetEncoder, batch: PackedBatch, *, normalize: bool
) -> Tensor:
    """Second and third forward: return the summed JEPA loss, 0 where nothing is masked."""
    if not batch.num_masked:
        return torch.zeros((), device=batch.ids_T.device)
    target_UD = target_hidden(target, batch)
    prediction_MD = predict(encoder, online_hidden(encoder, batch))
    loss = masked_jepa_mse.reference
    return loss(prediction_MD, target_UD, batch.target_M, normalize=normalize)


def measure(
    encoder: PatientEncoder, target: TargetEncoder | None, batch: PackedBatch
) -> tuple[Tensor, JepaStates | None]:
    """Return the summed SFT loss, and the states that JEPA compares if there is a target."""
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
    """Apply the predictor g, [M, D] to [M, D]: Linear and GELU, repeated, then Linear.

    The predictor of a bf16 encoder is fp32, so that predictions are compared in full precision; on
    CUDA its products round their operands to TF32 then (`smbfast.model.tf32`).
    """
    linears = [module for module in encoder.predictor if isinstance(module, torch.nn.Linear)]
    product = predictor_linear(online_MD, linears[0].weight.dtype)
    value_MD = online_MD.to(linears[0].weight.dtype)
    for linear in linears[:-1]:
        value_MD = F.gelu(product(value_MD, linear.weight, linear.bias))
    return product(value_MD, linears[-1].weight, linears[-1].bias)


def online_hidden(encoder: PatientEncoder, batch: PackedBatch) -> Tensor:
    """Return the online states of [context | masked future] at the masked tokens, [M, D]."""
    replaced_T = torch.zeros_like(batch.ids_T, dtype=torch.bool)
    replaced_T = replaced_T.index_fill(0, batch.replaced_R, True)
    branches = branch_rows(batch)
    sequences = [torch.cat([batch.ids_T[prefix], batch.ids_T[own]]) for own, prefix in branches]
    replaced = [torch.cat([replaced_T[prefix], replaced_T[own]]) for own, prefix in branches]
    hidden_BTD = encoder.hidden(padded(sequences, 0), padded(replaced, False))
    lengths = [(own.stop - own.start, prefix.stop - prefix.start) for own, prefix in branches]
    states = [h[p : p + n] for h, (n, p) in zip(hidden_BTD, lengths, strict=True)]
    return torch.cat(states)[batch.masked_M - branches[0][0].start]


@torch.no_grad()
def target_hidden(target: TargetEncoder, batch: PackedBatch) -> Tensor:
    """Return the target encoder's states of the unmasked trunks in pack order, [U, D]."""
    table = batch.target_segments.host_S6.tolist()
    trunks = [batch.target_ids_U[start : start + length] for start, length, *_ in table]
    hidden_BTD = target.hidden(padded(trunks, 0))
    return torch.cat([h[: len(t)] for h, t in zip(hidden_BTD, trunks, strict=True)])


def trunk_rows(batch: PackedBatch) -> list[slice]:
    """Return the rows of T of each trunk."""
    return [slice(s, s + n) for s, n, _, prefix in batch.segment_tuples if prefix == 0]


def branch_rows(batch: PackedBatch) -> list[tuple[slice, slice]]:
    """Return the rows of T of each branch, and of the trunk's prefix that it sees."""
    return [(slice(s, s + n), slice(t, t + p)) for s, n, t, p in batch.segment_tuples if p > 0]


def last_visible(batch: PackedBatch) -> list[int]:
    """Return, for each masked token, the row of U of the last token before it that is read."""
    replaced, rows = set(batch.replaced_R.tolist()), []
    start_of = {
        row: own.start for own, _ in branch_rows(batch) for row in range(own.start, own.stop)
    }
    for row, target_row in zip(batch.masked_M.tolist(), batch.target_M.tolist(), strict=True):
        back = 1
        # what precedes the first token of a branch is the last token of its context
        while row - back >= start_of[row] and row - back in replaced:
            back += 1
        rows.append(target_row - back)
    return rows
