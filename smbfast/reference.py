"""The specification: all losses from separate forwards, in plain PyTorch.

Per optimizer step, over all its micro-batches:
    SFT     sum of next-token cross-entropies on trunks / labelled tokens of the step
    JEPA    sum over masked positions of mean_d (g(z_i) - T(z̄_i))² / masked positions of the step
      or, horizon JEPA, with x̄ the mean of z̄ over the tokens in (t_p, t_p + H]:
            sum over pairs (p, H) of mean_d (g(z_p, e_H) - (x̄ - mean_H) / (sd_H + 0.01))² / pairs
    codes   sum over pairs (p, H) and codes of the cross-entropy of whether it occurs / 10 / pairs
    total   w_sft SFT + w_jepa JEPA + w_codes codes
z is the online encoder's state on [context | masked future] or on the trunk, g the predictor, z̄ the
state of the target encoder (EMA teacher) on the unmasked trunk, T a layer norm without weights or
the identity, e_H an embedding of the horizon, mean_H and sd_H running ones of the steps before.

Each segment of a PackedBatch becomes one padded sequence (padding on the right), without packing.

Legend: B padded sequences, T positions (of a padded sequence, or tokens of the pack), U tokens of
the target encoder, D width, H horizons, K classes of codes, N labelled tokens, M masked tokens, P
pairs of a position and a horizon, Q those that horizon JEPA predicts.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from smbkernels import linear_cross_entropy, masked_jepa_mse
from torch import Tensor

from smbfast.batch import FuturePairs, PackedBatch
from smbfast.model.backbone import PatientEncoder
from smbfast.model.codes_head import SHARE
from smbfast.model.horizon_scale import ScaleSums
from smbfast.model.target import HorizonStates, JepaStates, TargetEncoder
from smbfast.model.terms import Measured, Terms
from smbfast.model.tf32 import predictor_linear
from smbfast.settings.training import Freeze


def losses(
    encoder: PatientEncoder,
    target: TargetEncoder | None,
    batch: PackedBatch,
    *,
    sft_scale: float,
    jepa_scale: float,
    codes_scale: float = 0.0,
    normalize: bool,
    freeze: Freeze = "none",
    sums: ScaleSums | None = None,
) -> Terms:
    """Return the summed losses, each times its scale; see `smbfast.objective.losses`."""
    sft = jepa = codes = None
    frozen = freeze == "predictor"
    if sft_scale > 0 and batch.num_labels:
        sft = sft_sum(encoder, batch) * sft_scale
    if jepa_scale > 0 and batch.num_masked:
        assert target is not None
        loss = jepa_sum(encoder, target, batch, normalize=normalize, freeze=freeze)
        jepa = loss * jepa_scale
    has_latent = jepa_scale > 0 and batch.num_latent > 0
    has_codes = codes_scale > 0 and batch.num_pairs > 0
    if has_latent or has_codes:
        with torch.no_grad() if freeze == "decoder" else nullcontext():
            state_PD = position_states(encoder, batch)
    if has_latent:
        assert target is not None
        target_QD = latent_target(target, batch, sums)
        error_QD = predict_ahead(encoder, state_PD, batch, frozen=frozen) - target_QD
        jepa = error_QD.square().mean(1).sum() * jepa_scale
    if has_codes:
        codes = codes_loss(encoder, state_PD, batch, frozen=frozen) * codes_scale
    return Terms(sft, jepa, codes)


def sft_sum(encoder: PatientEncoder, batch: PackedBatch) -> Tensor:
    """First forward: return the summed next-token cross-entropy of the trunks, a scalar."""
    trunks = [batch.ids_T[r] for r in trunk_rows(batch)]
    hidden_BTD = encoder.hidden(padded(trunks, 0))
    hidden_TD = torch.cat([h[: len(t)] for h, t in zip(hidden_BTD, trunks, strict=True)])
    hidden_ND = hidden_TD[batch.labelled_N]
    return linear_cross_entropy.reference(hidden_ND, encoder.head_VD, batch.label_N)


def jepa_sum(
    encoder: PatientEncoder,
    target: TargetEncoder,
    batch: PackedBatch,
    *,
    normalize: bool,
    freeze: Freeze = "none",
) -> Tensor:
    """Second and third forward: return the summed JEPA loss, 0 where nothing is masked."""
    if not batch.num_masked:
        return torch.zeros((), device=batch.ids_T.device)
    target_UD = target_hidden(target, batch)
    with torch.no_grad() if freeze == "decoder" else nullcontext():
        online_MD = online_hidden(encoder, batch)
    prediction_MD = predict(encoder, online_MD, frozen=freeze == "predictor")
    loss = masked_jepa_mse.reference
    return loss(prediction_MD, target_UD, batch.target_M, normalize=normalize)


def position_states(encoder: PatientEncoder, batch: PackedBatch) -> Tensor:
    """Return the online state at the position of each pair, [P, D], by a forward of the trunks."""
    pairs = _pairs(batch)
    trunks = [batch.ids_T[r] for r in trunk_rows(batch)]
    hidden_BTD = encoder.hidden(padded(trunks, 0))
    hidden_TD = torch.cat([h[: len(t)] for h, t in zip(hidden_BTD, trunks, strict=True)])
    return hidden_TD[pairs.row_N[pairs.position_P]]


def predict_ahead(
    encoder: PatientEncoder, state_PD: Tensor, batch: PackedBatch, *, frozen: bool = False
) -> Tensor:
    """Return g(z_p, e_H) for each pair of horizon JEPA, [Q, D]."""
    pairs, own_HD = _pairs(batch), encoder.predictor.horizon_HD
    assert own_HD is not None
    table_HD: Tensor = own_HD.detach() if frozen else own_HD
    state_QD = state_PD[pairs.latent_Q].to(table_HD.dtype) + table_HD[pairs.horizon_Q]
    return predict(encoder, state_QD, frozen=frozen)


@torch.no_grad()
def latent_target(
    target: TargetEncoder, batch: PackedBatch, sums: ScaleSums | None = None
) -> Tensor:
    """Return the standardised mean of the target's states within each horizon, [Q, D]."""
    assert target.scale is not None
    mean_QD, horizon_Q = averaged(target_hidden(target, batch), batch), _pairs(batch).horizon_Q
    if sums is not None:
        sums.add(mean_QD, horizon_Q)
    return target.scale.standardised(mean_QD, horizon_Q)


def averaged(target_UD: Tensor, batch: PackedBatch) -> Tensor:
    """Return the mean of the target's states over the tokens of each pair, [Q, D]."""
    exact = torch.promote_types(target_UD.dtype, torch.float32)
    pairs = _pairs(batch)
    spans = zip(pairs.first_Q.tolist(), pairs.end_Q.tolist(), strict=True)
    return torch.stack([target_UD[first:end].to(exact).mean(0) for first, end in spans])


def codes_loss(
    encoder: PatientEncoder, state_PD: Tensor, batch: PackedBatch, *, frozen: bool = False
) -> Tensor:
    """Return the summed loss of codes to come: a dense cross-entropy, pair by pair."""
    head, pairs = encoder.codes, _pairs(batch)
    assert head is not None
    inner_HED, class_KE, bias_HK = head.parts(frozen)
    occurs_PK = torch.zeros(len(state_PD), len(class_KE), device=state_PD.device)
    occurs_PK[pairs.pair_Z, pairs.class_Z] = 1.0
    total = torch.zeros((), device=state_PD.device, dtype=class_KE.dtype)
    for state_D, occurs_K, h in zip(state_PD, occurs_PK, pairs.horizon_P.tolist(), strict=True):
        logit_K = class_KE @ (inner_HED[h] @ state_D.to(class_KE.dtype)) + bias_HK[h]
        weight_K = None if head.weight_HK is None else head.weight_HK[h]
        total = total + F.binary_cross_entropy_with_logits(
            logit_K, occurs_K.to(logit_K.dtype), weight_K, reduction="sum"
        )
    return total * SHARE


def measure(encoder: PatientEncoder, target: TargetEncoder | None, batch: PackedBatch) -> Measured:
    """Return the summed losses of SFT and codes to come, and the states that JEPA compares."""
    sft, codes, latent = sft_sum(encoder, batch), None, None
    if batch.pairs is not None and batch.num_pairs:
        state_PD = position_states(encoder, batch)
        if encoder.codes is not None:
            codes = codes_loss(encoder, state_PD, batch)
        if target is not None and batch.num_latent:
            latent = HorizonStates(
                prediction_QD=predict_ahead(encoder, state_PD, batch),
                target_QD=latent_target(target, batch),
                at_QD=target_hidden(target, batch)[batch.pairs.first_Q - 1],
                horizon_Q=batch.pairs.horizon_Q,
            )
    if target is None or not batch.num_masked:
        return Measured(sft, codes, None, latent)
    online_MD, target_UD = online_hidden(encoder, batch), target_hidden(target, batch)
    masked = JepaStates(
        prediction_MD=predict(encoder, online_MD),
        online_MD=online_MD,
        target_MD=target_UD[batch.target_M],
        previous_MD=target_UD[last_visible(batch)],
    )
    return Measured(sft, codes, masked, latent)


def predict(encoder: PatientEncoder, online_MD: Tensor, *, frozen: bool = False) -> Tensor:
    """Apply the predictor g, [M, D] to [M, D]: Linear and GELU, repeated, then Linear.

    The predictor of a bf16 encoder is fp32, so that predictions are compared in full precision; on
    CUDA its products round their operands to TF32 then (`smbfast.model.tf32`).
    """
    linears = [module for module in encoder.predictor if isinstance(module, torch.nn.Linear)]
    weights: list[tuple[Tensor, Tensor]] = [(linear.weight, linear.bias) for linear in linears]
    if frozen:
        weights = [(weight.detach(), bias.detach()) for weight, bias in weights]
    product = predictor_linear(online_MD, weights[0][0].dtype)
    value_MD = online_MD.to(weights[0][0].dtype)
    for weight, bias in weights[:-1]:
        value_MD = F.gelu(product(value_MD, weight, bias))
    return product(value_MD, *weights[-1])


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


def padded(sequences: list[Tensor], fill: int | bool) -> Tensor:
    """Stack sequences of different lengths, padded on the right with `fill`: [B, T]."""
    longest = max(len(s) for s in sequences)
    return torch.stack([F.pad(s, (0, longest - len(s)), value=fill) for s in sequences])


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


def _pairs(batch: PackedBatch) -> FuturePairs:
    assert batch.pairs is not None
    return batch.pairs
