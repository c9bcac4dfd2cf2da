"""The fast path: both losses from one online forward over packed trunks and branches.

SFT on trunks and JEPA on branches share the hidden states of the context (shared-prefix, or tree,
attention), and the sums are the same as those of `smbfast.reference`, which specifies them. Work
is done only where it counts: the target encoder (EMA teacher) reads each trunk up to its last
masked token, its final norm runs only at the rows that are compared, and logits exist only for a
chunk of rows at a time.

Legend: T tokens of the pack, U tokens of the target encoder, D width, N labelled tokens, M masked
tokens, V vocabulary.
"""

from collections.abc import Callable

import torch
from smbkernels import linear, linear_cross_entropy, masked_jepa_mse
from torch import Tensor

from smbfast.base.parts import is_part, part
from smbfast.batch import PackedBatch
from smbfast.model.backbone import PatientEncoder
from smbfast.model.decoder import Recompute
from smbfast.model.target import JepaStates, TargetEncoder
from smbfast.model.tf32 import predictor_linear

Losses = Callable[
    ..., tuple[Tensor | None, Tensor | None]
]  # `losses` of this module or of `reference`


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
    """Return the summed SFT loss times `sft_scale` and the summed JEPA loss times `jepa_scale`.

    1. The target encoder reads the unmasked trunks, without gradients. It goes first, so that its
       temporary memory is free again before the online activations are stored.
    2. The online encoder reads all trunks and branches in one forward.
    3. SFT: the cross-entropy of the next token, from the states at labelled rows of trunks.
    4. JEPA: the predictor maps the states at masked rows of branches, and the squared error
       compares them with the target's states of the same tokens.

    With scales of weight / (count in the whole step), gradients of micro-batches simply add up to
    the gradient of the step (gradient accumulation). Both losses are scalars on the device, fp32
    (fp64 for fp64 models); a loss is None where its scale is 0 or the batch has nothing to predict.

    Args:
        target: may be None where `jepa_scale` is 0.
        normalize: whether the target's states are layer-normed.
        recompute: activation checkpointing; see `smbfast.model.decoder.PackedDecoder`.

    Raises:
        ValueError: if the packed decoder does not support the backbone's layers.
    """
    has_sft = sft_scale > 0 and batch.num_labels > 0
    has_jepa = jepa_scale > 0 and batch.num_masked > 0
    if not (has_sft or has_jepa):
        return None, None
    sft = jepa = None
    if has_jepa:
        assert target is not None
        target_UD = _target(target, batch, norm=False)
    hidden_TD = _online(encoder, batch, recompute)
    if has_sft:
        sft = _sft(encoder, hidden_TD, batch, sft_scale)
    if has_jepa:
        assert target is not None
        norm_weight_D, norm_eps = target.final_norm()
        with part("head"):
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
    """Return the summed SFT loss, and the states that JEPA compares if there is a target."""
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
    """Apply the predictor g, [M, D] to [M, D].

    The predictor of a bf16 encoder is fp32, so that predictions are compared in full precision; on
    CUDA its products round their operands to TF32 then (`smbfast.model.tf32`).
    """
    predictor = encoder.predictor
    product = predictor_linear(online_MD, predictor.dtype, linear)
    value_MD = online_MD.to(predictor.dtype)
    for module in predictor:
        if isinstance(module, torch.nn.Linear):
            value_MD = product(value_MD, module.weight, module.bias)
        else:
            value_MD = module(value_MD)
    return value_MD


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
def _target(target: TargetEncoder, batch: PackedBatch, *, norm: bool = True) -> Tensor:
    pack = (batch.target_ids_U, batch.target_position_U, batch.target_segments)
    return target.packed(*pack, norm=norm)


@is_part("head")
def _sft(encoder: PatientEncoder, hidden_TD: Tensor, batch: PackedBatch, scale: float) -> Tensor:
    hidden_ND = hidden_TD.index_select(0, batch.labelled_N)
    weight_VD, *trained_rows = encoder.head
    return linear_cross_entropy(hidden_ND, weight_VD, batch.label_N, *trained_rows, scale=scale)
