"""The fast path: all losses from one online forward over packed trunks and branches.

SFT on trunks and masked JEPA on branches share the hidden states of the context (shared-prefix, or
tree, attention), horizon JEPA and codes to come read the trunks' own, and the sums are the same as
those of `smbfast.reference`, which specifies them. Work is done only where it counts: the target
encoder (EMA teacher) reads each trunk up to the last token that is compared, its final norm runs
only where it is needed, and logits exist only for a chunk of rows at a time.

    SFT           the cross-entropy of the next token, from the states at labelled rows of trunks
    JEPA          the predictor maps the states at masked rows of branches, and the squared error
                  compares them with the target's states of the same tokens
    horizon JEPA  it maps the states at positions of trunks, with the embedding of a horizon, and
                  the squared error compares them with the mean of the target's states within the
                  horizon, standardised
    codes         the cross-entropy of which codes occur within a horizon behind a position

Legend: T tokens of the pack, U tokens of the target encoder, D width, M masked tokens, N positions,
Q pairs of a position and a horizon that horizon JEPA predicts, R pairs and S tokens of one trunk.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from smbkernels import linear, linear_cross_entropy, masked_jepa_mse
from torch import Tensor

from smbfast.base.parts import is_part, part
from smbfast.batch import PackedBatch, idle_batch
from smbfast.model.backbone import PatientEncoder
from smbfast.model.codes_head import codes_sum
from smbfast.model.decoder import Recompute
from smbfast.model.horizon_scale import ScaleSums
from smbfast.model.target import HorizonStates, JepaStates, TargetEncoder
from smbfast.model.terms import Measured, Terms
from smbfast.model.tf32 import predictor_linear
from smbfast.settings.training import Freeze

Losses = Callable[..., Terms]  # `losses` of this module or of `reference`


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
    recompute: Recompute = "none",
) -> Terms:
    """Return the summed losses, each times its scale; fp32, of fp64 models fp64.

    The target encoder goes first, so that its temporary memory is free again before the online
    activations are stored. Then one online forward reads all trunks and branches. With scales of
    weight / (count in the whole step), gradients of micro-batches add up (gradient accumulation).

    Args:
        target: may be None where `jepa_scale` is 0.
        normalize: whether the target's states are layer-normed at masked tokens.
        freeze: what gets no gradient: the decoder with all that it embeds, or the predictor with
            the head of codes to come.
        sums: receives the averaged target states of horizon JEPA.
        recompute: activation checkpointing; see `smbfast.model.decoder.PackedDecoder`.

    Raises:
        ValueError: if the packed decoder does not support the backbone's layers.
    """
    has_sft = sft_scale > 0 and batch.num_labels > 0
    has_masked = jepa_scale > 0 and batch.num_masked > 0
    has_latent = jepa_scale > 0 and batch.num_latent > 0
    has_codes = codes_scale > 0 and batch.num_pairs > 0
    predicts = has_sft or has_masked or has_latent or has_codes
    if not (predicts or encoder.is_shared_out):  # ranks that share run alike, by scales alone
        return Terms()
    sft, jepa, codes, frozen = None, None, None, freeze == "predictor"
    if has_masked:
        compared = _target(target, batch, norm=False)
    elif jepa_scale > 0:
        compared = latent_target(target, batch, sums)
    with torch.no_grad() if freeze == "decoder" else nullcontext():
        hidden_TD = _online(encoder, batch, recompute)
    if not predicts and hidden_TD.requires_grad:
        return Terms(hidden_TD.sum() * 0.0)  # in its backward this rank gathers layers too
    if has_sft:
        sft = _sft(encoder, hidden_TD, batch, sft_scale)
    if has_masked:
        states = encoder, target, batch, hidden_TD, compared
        jepa = _masked(*states, jepa_scale, normalize=normalize, frozen=frozen)
    if batch.pairs is not None and (has_latent or has_codes):
        state_ND = hidden_TD.index_select(0, batch.pairs.row_N)
        with part("head"):
            if has_latent:
                ahead_QD = predict_ahead(encoder, state_ND, batch, frozen=frozen)
                jepa = _square_sum(ahead_QD, compared) * (jepa_scale / encoder.width)
            if has_codes and encoder.codes is not None:
                codes = codes_sum(encoder.codes, state_ND, batch.pairs, frozen=frozen) * codes_scale
    return Terms(sft, jepa, codes)


def _square_sum(prediction_QD: Tensor, target_QD: Tensor) -> Tensor:
    return (prediction_QD - target_QD.to(prediction_QD.dtype)).square().sum()


def measure(encoder: PatientEncoder, target: TargetEncoder | None, batch: PackedBatch) -> Measured:
    """Return the summed losses of SFT and codes to come, and the states that JEPA compares."""
    hidden_TD, pairs = _online(encoder, batch), batch.pairs
    sft, codes, latent = _sft(encoder, hidden_TD, batch, 1.0), None, None
    if pairs is not None:
        state_ND = hidden_TD.index_select(0, pairs.row_N)
        if encoder.codes is not None and batch.num_pairs:
            codes = codes_sum(encoder.codes, state_ND, pairs)
        if target is not None and batch.num_latent:
            target_UD = _target(target, batch)
            latent = HorizonStates(
                prediction_QD=predict_ahead(encoder, state_ND, batch),
                target_QD=_standardised(target, averaged(target_UD, batch), batch),
                at_QD=target_UD[pairs.first_Q - 1],
                horizon_Q=pairs.horizon_Q,
            )
    if target is None or not batch.num_masked:
        return Measured(sft, codes, None, latent)
    online_MD, target_UD = hidden_TD.index_select(0, batch.masked_M), _target(target, batch)
    masked = JepaStates(
        prediction_MD=predict(encoder, online_MD),
        online_MD=online_MD,
        target_MD=target_UD[batch.target_M],
        previous_MD=target_UD[_last_visible(batch)],
    )
    return Measured(sft, codes, masked, latent)


def predict(encoder: PatientEncoder, online_MD: Tensor, *, frozen: bool = False) -> Tensor:
    """Apply the predictor g, [M, D] to [M, D].

    The predictor of a bf16 encoder is fp32, so that predictions are compared in full precision; on
    CUDA its products round their operands to TF32 then (`smbfast.model.tf32`).

    Args:
        frozen: whether its weights get no gradient.
    """
    predictor = encoder.predictor
    product = predictor_linear(online_MD, predictor.dtype, linear)
    value_MD = online_MD.to(predictor.dtype)
    for module in predictor:
        if isinstance(module, torch.nn.Linear):
            weights: tuple[Tensor, Tensor] = module.weight, module.bias
            if frozen:
                weights = module.weight.detach(), module.bias.detach()
            value_MD = product(value_MD, *weights)
        else:
            value_MD = module(value_MD)
    return value_MD


def predict_ahead(
    encoder: PatientEncoder, state_ND: Tensor, batch: PackedBatch, *, frozen: bool = False
) -> Tensor:
    """Return the predicted mean state within the horizon of each pair, [Q, D].

    The embedding of the horizon is added to the state that the predictor reads.

    Args:
        state_ND: the online states at the positions.
        frozen: whether the predictor's weights get no gradient.
    """
    pairs, own_HD = batch.pairs, encoder.predictor.horizon_HD
    assert pairs is not None and own_HD is not None
    table_HD: Tensor = own_HD.detach() if frozen else own_HD
    # gathers by embedding, whose backward is in a fixed order on a GPU
    state_QD = F.embedding(pairs.position_P[pairs.latent_Q], state_ND.to(table_HD.dtype))
    return predict(encoder, state_QD + F.embedding(pairs.horizon_Q, table_HD), frozen=frozen)


def latent_target(
    target: TargetEncoder | None, batch: PackedBatch, sums: ScaleSums | None = None
) -> Tensor:
    """Return what horizon JEPA predicts for each pair, [Q, D], without gradients.

    It is the mean of the target's states within the horizon, on the running scale of the target. Of
    a batch without pairs it is empty; where ranks share the base, the target runs on one token for
    it, as others run it on their rows.

    Args:
        sums: receives the means before they are standardised.
    """
    assert target is not None
    if batch.pairs is None or not batch.num_latent:
        device = target.encoder.mask_vector.device
        if target.encoder.is_shared_out:
            _target(target, idle_batch().to(device))
        return torch.empty(0, target.encoder.width, device=device)
    mean_QD = averaged(_target(target, batch), batch)
    if sums is not None:
        sums.add(mean_QD, batch.pairs.horizon_Q)
    return _standardised(target, mean_QD, batch)


def averaged(target_UD: Tensor, batch: PackedBatch) -> Tensor:
    """Return the mean of the target's states over each pair's tokens, [Q, D], in fp32 at least.

    A matrix of 0 and 1 for each trunk times its states: every mean is a sum of its own, and never a
    difference of running sums.
    """
    pairs = batch.pairs
    assert pairs is not None
    exact = torch.promote_types(target_UD.dtype, torch.float32)
    spans = batch.target_segments.host_S6.tolist()
    sums, first = [], 0
    for (start, length, *_), number in zip(spans, pairs.num_by_trunk, strict=True):
        own = slice(first, first + number)
        row_S = torch.arange(start, start + length, device=target_UD.device)
        inside_RS = row_S >= pairs.first_Q[own, None]
        inside_RS &= row_S < pairs.end_Q[own, None]
        sums.append(inside_RS.to(exact) @ target_UD[start : start + length].to(exact))
        first += number
    return torch.cat(sums) / (pairs.end_Q - pairs.first_Q)[:, None]


def _standardised(target: TargetEncoder, mean_QD: Tensor, batch: PackedBatch) -> Tensor:
    assert target.scale is not None and batch.pairs is not None
    return target.scale.standardised(mean_QD, batch.pairs.horizon_Q)


def _last_visible(batch: PackedBatch) -> Tensor:
    """Return, for each masked token, the row of U of the last token before it that is read: [M]."""
    spans = batch.segment_tuples
    # where no token of the branch is read yet, this is the last token of its context
    context_T = torch.cat([torch.full_like(batch.ids_T[:n], p - 1) for _, n, _, p in spans])
    seen_T = batch.position_T.index_copy(0, batch.replaced_R, context_T[batch.replaced_R])
    last_T = torch.cat([torch.cummax(seen_T[s : s + n], 0).values for s, n, _, _ in spans])
    return batch.target_M - (batch.position_T - last_T)[batch.masked_M]


def _online(encoder: PatientEncoder, batch: PackedBatch, recompute: Recompute = "none") -> Tensor:
    pack = (batch.ids_T, batch.position_T, batch.segments, batch.replaced_R)
    return encoder.packed(*pack, recompute=recompute)


@is_part("target")
def _target(target: TargetEncoder | None, batch: PackedBatch, *, norm: bool = True) -> Tensor:
    assert target is not None
    pack = (batch.target_ids_U, batch.target_position_U, batch.target_segments)
    return target.packed(*pack, norm=norm)


@is_part("head")
def _masked(
    encoder: PatientEncoder,
    target: TargetEncoder | None,
    batch: PackedBatch,
    hidden_TD: Tensor,
    target_UD: Tensor,
    scale: float,
    *,
    normalize: bool,
    frozen: bool,
) -> Tensor:
    assert target is not None
    norm_weight_D, norm_eps = target.final_norm()
    return masked_jepa_mse(
        predict(encoder, hidden_TD.index_select(0, batch.masked_M), frozen=frozen),
        target_UD,
        batch.target_M,
        norm_weight_D,
        normalize=normalize,
        norm_eps=norm_eps,
        scale=scale,
    )


@is_part("head")
def _sft(encoder: PatientEncoder, hidden_TD: Tensor, batch: PackedBatch, scale: float) -> Tensor:
    hidden_ND = hidden_TD.index_select(0, batch.labelled_N)
    weight_VD, *trained_rows = encoder.head
    return linear_cross_entropy(hidden_ND, weight_VD, batch.label_N, *trained_rows, scale=scale)
