"""The training step as others would write it: the same losses, gradients and averages.

    B0    Hugging Face + PEFT, SDPA, padded batches of 8 sequences, three forwards, a merged deep
          copy as target; B0c with gradient checkpointing
    B1    packed without padding: varlen attention by transformers' attention interface, Liger on a
          GPU, two online passes and the target, the average by `_foreach_lerp_`; B1c as B0c
    B2    B1 with torch.compile of every layer
    B3    B2 with the prefix shared, by FlexAttention
    B3'   the prefix shared by the two-call decomposition, otherwise Hugging Face's code and PEFT's
          linears; with torch.compile of every layer it is B3' compiled

All compute logits at labelled rows alone, and use the fused AdamW that ours does. On a GPU they run
under autocast with adapters in fp32, as Hugging Face's trainer does. E1 is in `bench.step.plain`.

Legend: B sequences of a padded batch, T tokens, U tokens of the target, D width, V vocabulary, N
labelled rows, M masked rows. A row is the place of one token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from smbkernels.attention import Segments
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AttentionInterface

from bench.rivals import mask_of
from bench.step.attention import by_calls, by_segment, calls_of
from bench.step.teacher import Teacher
from bench.step.variants import BACKWARD, LOSSES, ONLINE, TARGET, Part, Variant, halved
from bench.step.workloads import PADDED_SEQUENCES, Workload
from smbfast.batch import PackedBatch, pack_segments
from smbfast.model.backbone import PatientEncoder
from smbfast.reference import padded

VARLEN, FLEX = "bench_varlen", "bench_flex"


class HuggingFace(Variant):
    """What rivals share.

    Args:
        foreach: the averages of a layer move in one call.
        checkpoint: transformers' gradient checkpointing.
        bf16: on a CPU, frozen weights in bf16 and autocast, which a GPU has anyway.
        precision: see `Variant`.
    """

    def __init__(
        self,
        encoder: PatientEncoder,
        *,
        foreach: bool,
        checkpoint: bool = False,
        bf16: bool = False,
        precision: str | None = None,
    ) -> None:
        super().__init__(halved(encoder) if bf16 else encoder, precision=precision)
        self.teacher = Teacher(self.encoder)
        self.target = self.teacher.lm
        self.foreach = foreach
        self.gpu = self.parameters[0].is_cuda
        self.layers = list(encoder.lora_layers().values())
        self.autocast = self.dtype == torch.bfloat16  # of frozen weights
        if checkpoint:
            encoder.base.gradient_checkpointing_enable({"use_reentrant": False})
            encoder.train()

    def update(self, tau: float) -> None:
        self.teacher.update(tau, foreach=self.foreach)

    def averages(self) -> list[Tensor]:
        return self.teacher.averages()

    @contextmanager
    def forward(self, part: Part, name: str) -> Iterator[None]:
        """A timed part that computes forward."""
        with part(name):
            if not self.autocast:
                yield
                return
            with torch.autocast("cuda" if self.gpu else "cpu", torch.bfloat16):
                with _without_casts(self.layers):
                    yield

    def sft(self, hidden_ND: Tensor, label_N: Tensor) -> Tensor:
        """The summed next-token loss, from all logits of its rows."""
        logits_NV = F.linear(hidden_ND, self.encoder.head_VD).float()
        return F.cross_entropy(logits_NV, label_N, reduction="sum")

    def jepa(self, online_MD: Tensor, target_MD: Tensor) -> Tensor:
        """The summed squared error of predictions."""
        prediction_MD = self.encoder.predictor(online_MD).float()
        target_MD = F.layer_norm(target_MD.float(), target_MD.shape[-1:])
        return F.mse_loss(prediction_MD, target_MD, reduction="sum") / target_MD.shape[-1]


@dataclass(frozen=True)
class PaddedBatch:
    """Sequences of one length, and what is read of their flattened hidden states."""

    ids_BT: Tensor
    masked_BT: Tensor
    row_N: Tensor  # which of the hidden states
    read_N: Tensor  # the label of each, or the row of the target that it is compared with


class Padded(HuggingFace):
    """B0: what one writes first."""

    def __init__(self, encoder: PatientEncoder, *, checkpoint: bool = False) -> None:
        super().__init__(encoder, foreach=False, checkpoint=checkpoint)

    def take(self, workload: Workload) -> None:
        super().take(workload)
        trunks, branches, targets, seen = [], [], [], 0
        for batch in self.batches:
            masked_T, read_T = replaced_of(batch), torch.full_like(batch.ids_T, -1)
            read_T[batch.labelled_N] = batch.label_N
            read_T[batch.masked_M] = batch.target_M + seen
            for start, length, trunk, prefix in batch.segment_tuples:
                own, before = slice(start, start + length), slice(trunk, trunk + prefix)
                if not prefix:
                    trunks.append((batch.ids_T[own], masked_T[own], read_T[own]))
                    continue
                unread_T = torch.full_like(batch.ids_T[before], -1)
                ids = torch.cat([batch.ids_T[before], batch.ids_T[own]])
                masked = torch.cat([masked_T[before], masked_T[own]])
                branches.append((ids, masked, torch.cat([unread_T, read_T[own]])))
            lengths = batch.target_segments.host_S6[:, 1].tolist()
            for ids in batch.target_ids_U.split(lengths):
                targets.append((ids, torch.zeros_like(ids, dtype=torch.bool), ids))
            seen += batch.target_segments.tokens
        self.trunks, self.branches, self.targets = (
            [
                padded_batch(items[i : i + PADDED_SEQUENCES])
                for i in range(0, len(items), PADDED_SEQUENCES)
            ]
            for items in (trunks, branches, targets)
        )

    def accumulate(self, part: Part) -> tuple[Tensor, Tensor]:
        sft = jepa = 0.0
        for one in self.trunks:
            with self.forward(part, ONLINE):
                hidden_BTD = self.encoder.hidden(one.ids_BT)
            with self.forward(part, LOSSES):
                hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, one.row_N)
                loss = self.sft(hidden_ND, one.read_N) * self.scales.sft_scale
            with part(BACKWARD):
                loss.backward()
            sft = sft + loss.detach()
        with self.forward(part, TARGET), torch.no_grad():
            embed = self.target.get_input_embeddings()
            states = [
                self.target.base_model(inputs_embeds=embed(one.ids_BT), use_cache=False)
                .last_hidden_state.flatten(0, 1)
                .index_select(0, one.row_N)
                for one in self.targets
            ]
            target_UD = torch.cat(states)
        for one in self.branches:
            with self.forward(part, ONLINE):
                hidden_BTD = self.encoder.hidden(one.ids_BT, one.masked_BT)
            with self.forward(part, LOSSES):
                online_MD = hidden_BTD.flatten(0, 1).index_select(0, one.row_N)
                loss = self.jepa(online_MD, target_UD[one.read_N]) * self.scales.jepa_scale
            with part(BACKWARD):
                loss.backward()
            jepa = jepa + loss.detach()
        return sft, jepa


@contextmanager
def _without_casts(layers: list[LoraLayer]) -> Iterator[None]:
    """Adapters take their input as it is: autocast casts it.

    It is `peft.helpers.disable_input_dtype_casting`, which fails where token rows are trained.
    """
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.cast_input_dtype_enabled = True


def _varlen(module, query, key, value, attention_mask, *, parts, scaling, **_):
    heads = (x[0].transpose(0, 1) for x in (query, key, value))
    attend = by_segment if isinstance(parts, Segments) else by_calls
    return attend(*heads, parts, scaling)[None], None


def _flex(module, query, key, value, attention_mask, *, parts, scaling, **_):
    out = flex_attention(query, key, value, block_mask=parts, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


AttentionInterface.register(VARLEN, _varlen)
AttentionInterface.register(FLEX, _flex)


@dataclass(frozen=True)
class Pass:
    """One online forward on packed tokens, and what is read of it."""

    ids_T: Tensor
    position_T: Tensor
    segments: Segments
    masked_T: (
        Tensor | None
    )  # None: nothing is, and the first linears need no gradient of their input
    labelled_N: Tensor
    label_N: Tensor
    masked_M: Tensor
    target_M: Tensor


class Packed(HuggingFace):
    """B1, B2, B3 and B3': no padding.

    Args:
        shared: one online forward on trunks and branches, instead of one for each loss.
        compiled: every layer, by `torch.compile`, once it is `ready`.
        flex: attention by FlexAttention, once it is `ready`.
    """

    backend = "inductor"

    def __init__(
        self,
        encoder: PatientEncoder,
        *,
        shared: bool = False,
        compiled: bool = False,
        flex: bool = False,
        checkpoint: bool = False,
        precision: str | None = None,
    ) -> None:
        super().__init__(encoder, foreach=True, checkpoint=checkpoint, precision=precision)
        self.shared, self.compiled, self.flex = shared, compiled, flex
        self.models = (encoder.base, self.target)
        self.parts: dict[int, Any] = {}  # of each batch, by the id of its segments: for attention
        self._attend_by(VARLEN)
        if self.gpu:  # its RoPE takes the place of that of every Qwen3 in the process
            from liger_kernel import transformers as liger

            for lm in self.models:
                liger._apply_liger_kernel_to_instance(lm, fused_linear_cross_entropy=False)
            self.liger_loss = liger.LigerFusedLinearCrossEntropyLoss(reduction="sum")

    def ready(self) -> None:
        if self.flex:
            self._attend_by(FLEX)
        if self.compiled:
            # a graph with gradients and one without, and again where there is but one segment or
            # the first layer's input needs no gradient: beyond torch's limit of 8 for all variants
            # of a process, a layer would run as it is written
            torch._dynamo.config.recompile_limit = 64
            for lm in self.models:
                for layer in lm.base_model.layers:
                    # the number of tokens is no part of a graph: batches differ in it
                    layer.compile(dynamic=True, backend=self.backend)

    def _attend_by(self, name: str) -> None:
        self.parts = {}
        for lm in self.models:
            lm.base_model.config._attn_implementation = name

    def take(self, workload: Workload) -> None:
        super().take(workload)
        self.passes = [_shared(b) if self.shared else _two(b) for b in self.batches]
        self.parts = {}  # those of other segments, which may have had the same id

    def accumulate(self, part: Part) -> tuple[Tensor, Tensor]:
        sft = jepa = 0.0
        for batch, passes in zip(self.batches, self.passes, strict=True):
            with self.forward(part, TARGET), torch.no_grad():
                embedded_1UD = self.target.get_input_embeddings()(batch.target_ids_U[None])
                target_UD = self.hidden(
                    self.target.base_model,
                    embedded_1UD,
                    batch.target_position_U,
                    batch.target_segments,
                )
            for one in passes:
                with self.forward(part, ONLINE):
                    masked_1T = None if one.masked_T is None else one.masked_T[None]
                    embedded_1TD = self.encoder.embed(one.ids_T[None], masked_1T)
                    hidden_TD = self.hidden(
                        self.encoder.decoder, embedded_1TD, one.position_T, one.segments
                    )
                loss = 0.0
                with self.forward(part, LOSSES):
                    if len(one.labelled_N):
                        own = (
                            self.sft(hidden_TD.index_select(0, one.labelled_N), one.label_N)
                            * self.scales.sft_scale
                        )
                        loss, sft = loss + own, sft + own.detach()
                    if len(one.masked_M):
                        own = self.jepa(
                            hidden_TD.index_select(0, one.masked_M), target_UD[one.target_M]
                        )
                        own = own * self.scales.jepa_scale
                        loss, jepa = loss + own, jepa + own.detach()
                with part(BACKWARD):
                    loss.backward()
        return sft, jepa

    def sft(self, hidden_ND: Tensor, label_N: Tensor) -> Tensor:
        """By Liger on a GPU."""
        if not self.gpu:
            return super().sft(hidden_ND, label_N)
        return self.liger_loss(self.encoder.head_VD, hidden_ND, label_N)

    def hidden(
        self, decoder: nn.Module, embedded_1TD: Tensor, position_T: Tensor, segments: Segments
    ) -> Tensor:
        """Hidden states [T, D] of packed tokens, after the final norm, in Hugging Face's code.

        Args:
            embedded_1TD: no view of another tensor, which would be compiled once more.
        """
        if id(segments) not in self.parts:
            self.parts[id(segments)] = self._parts(segments, embedded_1TD.device)
        out = decoder(
            inputs_embeds=embedded_1TD,
            position_ids=position_T[None],
            use_cache=False,
            parts=self.parts[id(segments)],
        )
        return out.last_hidden_state[0]

    def _parts(self, segments: Segments, device: torch.device) -> Any:
        """What attention reads of a batch, once for all layers and steps."""
        if self.encoder.base.config._attn_implementation == FLEX:
            visible, size = mask_of(segments, str(device)), (segments.tokens, segments.tokens)
            return create_block_mask(visible, None, None, *size, device=device, _compile=self.gpu)
        return calls_of(segments, device) if self.gpu else segments


def _shared(batch: PackedBatch) -> list[Pass]:
    """Trunks and branches in one forward."""
    tokens = (batch.ids_T, batch.position_T, batch.segments, replaced_of(batch))
    return [Pass(*tokens, batch.labelled_N, batch.label_N, batch.masked_M, batch.target_M)]


def _two(batch: PackedBatch) -> list[Pass]:
    """The trunks, then each branch behind a copy of its prefix."""
    replaced_T, is_read_T = replaced_of(batch), torch.zeros_like(batch.ids_T, dtype=torch.bool)
    is_read_T[batch.masked_M] = True
    sequences, masks, is_read = [], [], []
    for start, length, trunk, prefix in batch.segment_tuples:
        if prefix:
            parts = (slice(trunk, trunk + prefix), slice(start, start + length))
            sequences.append(torch.cat([batch.ids_T[p] for p in parts]))
            masks.append(torch.cat([replaced_T[p] for p in parts]))
            is_read.append(torch.cat([is_read_T[p] for p in parts]))
    trunks = [batch.ids_T[s : s + n] for s, n, _, prefix in batch.segment_tuples if not prefix]
    none = batch.label_N[:0]
    masked_M = torch.cat(is_read).nonzero()[:, 0]
    return [
        Pass(*_packed(trunks), None, batch.labelled_N, batch.label_N, none, none),
        Pass(*_packed(sequences), torch.cat(masks), none, none, masked_M, batch.target_M),
    ]


def _packed(sequences: list[Tensor]) -> tuple[Tensor, Tensor, Segments]:
    packed = pack_segments([ids.cpu().numpy() for ids in sequences], [[] for _ in sequences])
    packed = packed.to(sequences[0].device)
    return packed.ids_T, packed.position_T, packed.segments


def replaced_of(batch: PackedBatch) -> Tensor:
    """Whether each row reads the mask vector."""
    replaced_T = torch.zeros_like(batch.ids_T, dtype=torch.bool)
    replaced_T[batch.replaced_R] = True
    return replaced_T


def padded_batch(items: list[tuple[Tensor, Tensor, Tensor]]) -> PaddedBatch:
    """Of sequences of ids, which are masked, and what is read of each (-1: nothing)."""
    ids_BT, masked_BT, read_BT = (
        padded(list(sequences), fill)
        for sequences, fill in zip(zip(*items, strict=True), (0, False, -1), strict=True)
    )
    row_N = (read_BT >= 0).flatten().nonzero()[:, 0]
    return PaddedBatch(ids_BT, masked_BT, row_N, read_BT.flatten()[row_N])
