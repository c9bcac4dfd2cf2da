"""The training step as a user of transformers and PEFT writes it in an evening: nothing of ours.

    E1        windows of one length as a batch, causal SDPA without a mask, three forwards
    E1 bf16   the same under bf16 autocast, its frozen weights in bf16

What is predicted is the same as in `bench.step.rivals`, and so are losses and averages.

Legend: B sequences of a batch, T tokens, D width, N labelled tokens, M masked tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.step.rivals import HuggingFace, PaddedBatch, padded_batch, replaced_of
from bench.step.variants import BACKWARD, LOSSES, ONLINE, TARGET, Part
from bench.step.workloads import Workload
from smbfast.batch import PackedBatch
from smbfast.model.backbone import PatientEncoder


def fits(workload: Workload) -> bool:
    """Whether all sequences of a step have one length, so that nobody would pad or pack them."""
    return len(set(workload.lengths)) == 1 and workload.cuts == 1


class Plain(HuggingFace):
    """E1."""

    def __init__(
        self, encoder: PatientEncoder, *, bf16: bool = False, precision: str | None = None
    ) -> None:
        super().__init__(encoder, foreach=True, bf16=bf16, precision=precision)

    def take(self, workload: Workload) -> None:
        super().take(workload)
        self.windows = [_windows(b) for b in self.batches]

    def accumulate(self, part: Part) -> tuple[Tensor, Tensor]:
        lm, teacher = self.encoder.base, self.target
        embed, mask_vector_D = lm.get_input_embeddings(), self.encoder.mask_vector
        sft_sum = jepa_sum = 0.0
        for whole, masked in self.windows:
            with self.forward(part, TARGET), torch.no_grad():
                target_BTD = teacher.model(input_ids=whole.ids_BT, use_cache=False)[0]
            with self.forward(part, ONLINE):
                hidden_BTD = lm.model(input_ids=whole.ids_BT, use_cache=False)[0]
            with self.forward(part, LOSSES):
                hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, whole.row_N)
                logits_NV = lm.lm_head(hidden_ND).float()
                sft = F.cross_entropy(logits_NV, whole.read_N, reduction="sum")
                sft = sft * self.scales.sft_scale
            with part(BACKWARD):
                sft.backward()
            with self.forward(part, ONLINE):
                embedded_BTD = embed(masked.ids_BT)
                vector_D = mask_vector_D.to(embedded_BTD.dtype)
                embedded_BTD = torch.where(masked.masked_BT[..., None], vector_D, embedded_BTD)
                hidden_BTD = lm.model(inputs_embeds=embedded_BTD, use_cache=False)[0]
            with self.forward(part, LOSSES):
                online_MD = hidden_BTD.flatten(0, 1).index_select(0, masked.row_N)
                target_MD = target_BTD.flatten(0, 1).index_select(0, masked.read_N)
                jepa = self.jepa(online_MD, target_MD) * self.scales.jepa_scale
            with part(BACKWARD):
                jepa.backward()
            sft_sum, jepa_sum = sft_sum + sft.detach(), jepa_sum + jepa.detach()
        return sft_sum, jepa_sum


def _windows(batch: PackedBatch) -> tuple[PaddedBatch, PaddedBatch]:
    """The windows with their labels, and with what is masked; the latter reads rows of the former.

    Each branch begins with its context, so that a token has the same place in both.
    """
    replaced_T, label_T = replaced_of(batch), torch.full_like(batch.ids_T, -1)
    label_T[batch.labelled_N] = batch.label_N
    is_masked_T = torch.zeros_like(replaced_T).index_fill(0, batch.masked_M, True)
    length_of = {s: n for s, n, _, prefix in batch.segment_tuples if not prefix}
    row_of = {s: i * max(length_of.values()) for i, s in enumerate(length_of)}  # once padded
    whole, masked = [], []
    for start, length, trunk, prefix in batch.segment_tuples:
        own = slice(start, start + length)
        if not prefix:
            whole.append((batch.ids_T[own], replaced_T[own], label_T[own]))
            continue
        seen = slice(trunk, trunk + prefix)
        ids, replaced, is_masked = (
            torch.cat([x[seen], x[own]]) for x in (batch.ids_T, replaced_T, is_masked_T)
        )
        place = torch.arange(len(ids), device=ids.device) + row_of[trunk]
        masked.append((ids, replaced, place.masked_fill(~is_masked, -1)))
    return padded_batch(whole), padded_batch(masked)
