"""The objective from one forward: SFT on trunks and JEPA on their branches share the context.

The same sums as `smbfast.reference`, which says what they are. The online encoder runs once, on
trunks and branches in one row; the target encoder runs on trunks alone, no further than the last
masked token, and its final norm is computed only at the rows that are compared; logits exist only
a few rows at a time.

Legend: T tokens of the pack, U tokens of the target encoder, D width, N labelled rows, M masked
positions.
"""

from collections.abc import Callable

import torch
from smbkernels import linear_cross_entropy, masked_jepa_mse
from torch import Tensor

from smbfast.batch import PackedBatch
from smbfast.model.backbone import PatientEncoder
from smbfast.model.decoder import Recompute
from smbfast.model.target import JepaStates, TargetEncoder

Losses = Callable[..., tuple[Tensor | None, Tensor | None]]  # `losses`, here or of the reference


def losses(
    encoder: PatientEncoder,
    target: TargetEncoder | None,
    batch: PackedBatch,
    *,
    sft_scale: float,
    jepa_scale: float,
    normalize: bool,
    recompute: Recompute = "none",
) -> tuple[Tensor | None, Tensor | None]:
    """The summed SFT loss times `sft_scale` and the summed JEPA loss times `jepa_scale`.

    Scales such as weight / count of the whole step make the gradient complete in one pass. None
    where the scale is 0 or the batch has nothing to predict.

    Args:
        target: not needed where `jepa_scale` is 0.
        normalize: targets are layer-normed.
        recompute: see `smbfast.model.decoder.PackedDecoder`.

    Raises:
        ValueError: the backbone has layers that a packed row cannot go through.
    """
    wants_sft = sft_scale > 0 and batch.num_labels > 0
    wants_jepa = jepa_scale > 0 and batch.num_masked > 0
    if not (wants_sft or wants_jepa):
        return None, None
    sft = jepa = None
    if wants_jepa:  # first: what it needs on the way is gone before the online states are kept
        target_UD = _target(target, batch, norm=False)
    hidden_TD = _online(encoder, batch, recompute)
    if wants_sft:
        sft = _sft(encoder, hidden_TD, batch, sft_scale)
    if wants_jepa:
        norm_weight_D, norm_eps = target.final_norm()
        jepa = masked_jepa_mse(
            predict(encoder, hidden_TD.index_select(0, batch.masked_M)),
            target_UD,
            batch.target_M,
            norm_weight_D,
            normalize=normalize,
            norm_eps=norm_eps,
            scale=jepa_scale,
        )
    return sft, jepa


def measure(
    encoder: PatientEncoder, target: TargetEncoder | None, batch: PackedBatch
) -> tuple[Tensor, JepaStates | None]:
    """The summed SFT loss, and both encoders at the masked positions if there is a target."""
    hidden_TD = _online(encoder, batch)
    sft = _sft(encoder, hidden_TD, batch, 1.0)
    if target is None or not batch.num_masked:
        return sft, None
    online_MD, target_UD = hidden_TD.index_select(0, batch.masked_M), _target(target, batch)
    return sft, JepaStates(
        prediction_MD=predict(encoder, online_MD),
        online_MD=online_MD,
        target_MD=target_UD[batch.target_M],
        previous_MD=target_UD[_last_visible(batch)],
    )


def predict(encoder: PatientEncoder, online_MD: Tensor) -> Tensor:
    """g; the predictor of an encoder in bf16 is fp32: predictions are compared at full width."""
    return encoder.predictor(online_MD.to(encoder.predictor[-1].weight.dtype))


def _last_visible(batch: PackedBatch) -> Tensor:
    """For each masked position, the row of U of the last token before it that is not masked."""
    # the last token of the context, where nothing has been seen in the branch yet
    none_T = torch.cat([torch.full_like(batch.ids_T[:n], p - 1) for _, n, _, p in batch.rows])
    seen_T = batch.position_T.index_copy(0, batch.masked_M, none_T[batch.masked_M])
    last_T = torch.cat([torch.cummax(seen_T[s : s + n], 0).values for s, n, _, _ in batch.rows])
    return batch.target_M - (batch.position_T - last_T)[batch.masked_M]


def _online(encoder: PatientEncoder, batch: PackedBatch, recompute: Recompute = "none") -> Tensor:
    rows = (batch.ids_T, batch.position_T, batch.segments, batch.masked_M)
    return encoder.packed(*rows, recompute=recompute)


def _target(target: TargetEncoder, batch: PackedBatch, *, norm: bool = True) -> Tensor:
    rows = (batch.target_ids_U, batch.target_position_U, batch.target_segments)
    return target.packed(*rows, norm=norm)


def _sft(encoder: PatientEncoder, hidden_TD: Tensor, batch: PackedBatch, scale: float) -> Tensor:
    hidden_ND = hidden_TD.index_select(0, batch.labelled_N)
    weight_VD, *trained = encoder.head
    return linear_cross_entropy(hidden_ND, weight_VD, batch.label_N, *trained, scale=scale)
