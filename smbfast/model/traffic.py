"""Bytes that a step reads and writes beside its large products, in closed form from integers.

Counted are the passes of our operations on a GPU over tensors in the dtype of the layers. Of a
token in a layer of width D, with Q numbers of queries and keys and an MLP of width F:

    two norms with their additions   8 D forward, 8 D backward
    norm and RoPE of the heads       2 Q forward, 3 Q backward
    SwiGLU                           3 F forward, 5 F backward
    LoRA of inputs K, outputs N      K + N forward, 2 (K + N) backward

where linears that read the same input count it once, and the product with the frozen weight adds to
what LoRA has written. A tracked target reads K + N. Logits are read and written once. The update
has 44 bytes for each trained number (clipping, AdamW), and the target's average.

At the shape of Qwen3-8B these are within 3 % of what a pretended GPU counts (`bench.fakegpu`).
Embeddings, the predictor's activations, gradients of token rows and losses are left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from smbfast.batch import PackedBatch
from smbfast.model.backbone import HfModule, PatientEncoder

UPDATE = 44  # bytes for each trained number: clipping reads and scales, AdamW reads 4, writes 3
MERGED = 12  # bytes for each averaged number: the average is read and written, the weight read
TRACKED = 155  # bytes for each number of an adapter: its average, and a truncation now and then
SHARING = (
    ("q_proj", "k_proj", "v_proj"),
    ("o_proj",),
    ("gate_proj", "up_proj"),
    ("down_proj",),
)  # linears that read the same input


@dataclass(frozen=True)
class Traffic:
    """The sizes from which the bytes follow."""

    elements_forward: int  # bytes of memory-bound operations for each token, all layers
    elements_backward: int
    narrow: int  # bytes of one pass over inputs and outputs of adapted linears, for each token
    logit: int  # bytes of a row of logits, read and written
    casts: int  # bytes of the casts of weights in one forward of a model trained whole
    update: int  # bytes of an optimizer step and of the target's average
    tracked: bool  # whether the target has columns beside the frozen weights

    @classmethod
    def of(cls, encoder: PatientEncoder, *, tracked: bool, averages: bool) -> "Traffic":
        """Read the sizes of an encoder on any device.

        Args:
            tracked: whether its target is tracked.
            averages: whether there is a target.
        """
        config, size = encoder.base.config, encoder.dtype.itemsize
        heads = config.num_attention_heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or encoder.width // heads
        layers, rotated = config.num_hidden_layers, (heads + groups) * head_dim
        inner = getattr(config, "intermediate_size", 0)
        forward = 8 * encoder.width + 2 * rotated + 3 * inner
        backward = 8 * encoder.width + 3 * rotated + 5 * inner
        trained = [p for p in encoder.parameters() if p.requires_grad]
        numbers = sum(p.numel() for p in trained)
        averaged = sum(p.numel() for p in encoder.decoder.parameters() if p.requires_grad)
        cast = 0 if encoder.compute is None else sum(p.numel() for p in _weights(encoder))
        return cls(
            elements_forward=size * layers * forward,
            elements_backward=size * layers * backward,
            narrow=size * sum(_passes(encoder)),
            logit=2 * size * encoder.head_VD.shape[0],
            casts=(4 + size) * cast,
            update=UPDATE * numbers + averages * averaged * (TRACKED if tracked else MERGED),
            tracked=tracked,
        )

    def elements(self, batch: PackedBatch, *, backward: bool = True, again: int = 0) -> int:
        """Return the bytes of memory-bound operations of a batch.

        Args:
            backward: whether the layers are trained.
            again: forwards that the backward repeats (activation checkpointing).
        """
        forwards = (1 + again) * self.elements_forward + backward * self.elements_backward
        target = batch.target_segments.tokens
        passes = 1 + again + 2 * backward + bool(target)
        return (
            batch.segments.tokens * forwards
            + target * self.elements_forward
            + batch.num_labels * self.logit
            + passes * self.casts
        )

    def low_rank(self, batch: PackedBatch, *, backward: bool = True, again: int = 0) -> int:
        """Return the bytes of the products of rank r of a batch."""
        target = self.tracked * batch.target_segments.tokens
        return self.narrow * (batch.segments.tokens * (1 + again + 2 * backward) + target)


def _passes(encoder: PatientEncoder) -> Iterator[int]:
    """Yield K + N of each set of adapted linears that read the same input."""
    sizes = {name: _size(layer.get_base_layer()) for name, layer in encoder.lora_layers().items()}
    for names in SHARING:
        by_input: dict[str, list[tuple[int, int]]] = {}
        for name, size in sizes.items():
            parent, _, own = name.rpartition(".")
            if own in names:
                by_input.setdefault(parent, []).append(size)
        for own_sizes in by_input.values():
            yield own_sizes[0][0] + sum(n for _, n in own_sizes)


def _size(linear: HfModule) -> tuple[int, int]:
    return linear.in_features, linear.out_features


def _weights(encoder: PatientEncoder) -> list[torch.Tensor]:
    return [p for p in encoder.decoder.layers.parameters() if p.dim() > 1]
