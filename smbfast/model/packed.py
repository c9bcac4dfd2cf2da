"""Trunks and branches in one row of tokens, through transformers' own decoder layers.

A layer runs as it is written, but for three things that are put in its place while it runs, and
taken away after: attention is `smbkernels.timeline_attention`, by transformers' attention
interface; LoRA linears that read one input are one `smbkernels.lora_linear`; on a GPU the norms,
RoPE and SwiGLU are Liger's. Outside, the model is what transformers and PEFT made: the reference
path runs in the same process. The mask interface is left out: it inspects position ids, and waits
for a GPU to do so.

Legend: T tokens, H heads, G key and value heads, C head dim, D width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NoReturn

import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from smbkernels import lora_linear, timeline_attention
from smbkernels.attention import Segments
from smbkernels.registry import REFERENCE, everywhere
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from smbfast.model.liger import Patch, liger_patches

Recompute = Literal["none", "mlp", "full"]
ATTENTION = "smbfast_timeline"
KERNEL_WIDTHS = (64, 128)  # head dims that the kernel for GPUs is made for
KINDS = ("llama", "mistral", "qwen2", "qwen3")
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    segments: Segments,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """[1, H, T, C] as the interface has it, to [1, T, H, C]."""
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]
    C = query.shape[-1]
    width = next((w for w in KERNEL_WIDTHS if w >= C), C) if query.is_cuda else C
    if width > C:  # zeros change no score, and columns of zeros no output
        rows = [F.pad(x, (0, width - C)) for x in rows]
    out_THC, _ = timeline_attention(*rows, segments, scale=scaling)
    return out_THC[None, ..., :C], None


AttentionInterface.register(ATTENTION, _attend)


class PackedDecoder:
    """The decoder of a causal LM on packed rows.

    Holds no parameters: it reads those that the modules have when it runs, so that the target
    encoder can lend its own.
    """

    def __init__(self, trunk: nn.Module) -> None:
        """For a decoder of one of `KINDS`; others add to what its layers do.

        Raises:
            ValueError: another kind of decoder, sliding windows, or dropout.
        """
        config = trunk.config
        if config.model_type not in KINDS:
            _refuse(f"a backbone of kind {', '.join(KINDS)}", config.model_type)
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"} or getattr(config, "sliding_window", None):
            _refuse("full attention in every layer", "sliding windows")
        rope = config.rope_parameters["rope_type"]
        if rope in ("dynamic", "longrope"):  # they ask the host for the longest position so far
            _refuse("RoPE that does not depend on lengths", rope)
        if getattr(config, "attention_dropout", 0):  # SFT and JEPA would have drawn apart
            _refuse("attention_dropout 0", config.attention_dropout)
        self.trunk = trunk
        self._layers = [_Layer(layer, config) for layer in trunk.layers]
        self._norm = _liger(trunk.norm)

    def __call__(
        self,
        embedded_TD: Tensor,
        position_T: Tensor,
        segments: Segments,
        *,
        norm: bool = True,
        recompute: Recompute = "none",
    ) -> Tensor:
        """Hidden states [T, D] after the last layer, and after the final norm with `norm`.

        Args:
            recompute: what is computed again in the backward instead of kept: nothing, the MLPs'
                inner activations, or all of a layer but its input.
        """
        hidden_1TD = embedded_TD[None]
        rotary = self.trunk.rotary_emb(hidden_1TD, position_T[None])
        for layer in self._layers:
            if recompute == "full":
                hidden_1TD = _again(layer.run, hidden_1TD, rotary, segments)
            else:
                hidden_1TD = layer.run(hidden_1TD, rotary, segments, recompute == "mlp")
        if not norm:
            return hidden_1TD[0]
        with _in_place(self._norm):
            return self.trunk.norm(hidden_1TD)[0]


class _Layer:
    """A decoder layer, and what takes the place of its parts while it runs."""

    def __init__(self, layer: nn.Module, config: Any) -> None:
        self.layer, self.config = layer, config
        self.patches = [*_liger(layer), *_lora_patches(layer)]
        placed = {id(d): value for d, _, value in self.patches}
        mlp = layer.mlp
        self._mlp = placed.get(id(mlp.__dict__), partial(type(mlp).forward, mlp))

    def run(
        self,
        hidden_1TD: Tensor,
        rotary: tuple[Tensor, Tensor],
        segments: Segments,
        recompute_mlp: bool = False,
    ) -> Tensor:
        patches = self.patches
        if recompute_mlp:
            again = partial(_again, self._run_mlp)
            patches = [*patches, (self.layer.mlp.__dict__, "forward", again)]
        with _in_place(patches), _attention(self.config):
            return self.layer(
                hidden_1TD, attention_mask=None, position_embeddings=rotary, segments=segments
            )

    def _run_mlp(self, hidden_1TD: Tensor) -> Tensor:
        with _in_place(self.patches):  # in the backward nothing is in its place any more
            return self._mlp(hidden_1TD)


class _Group:
    """LoRA linears that read one input: the first to be called computes all of them."""

    def __init__(self, layers: list[LoraLayer]) -> None:
        self.layers = layers
        self._x: Tensor | None = None
        self._outputs: list[Tensor | None] = []

    def patches(self) -> list[Patch]:
        return [(m.__dict__, "forward", partial(self._call, i)) for i, m in enumerate(self.layers)]

    def _call(self, index: int, x: Tensor) -> Tensor:
        if self._x is not x or self._outputs[index] is None:
            self._outputs, self._x = self._all(x), x
        output, self._outputs[index] = self._outputs[index], None
        if not any(o is not None for o in self._outputs):
            self._x = None  # nothing of a step outlives it here
        return output

    def _all(self, x: Tensor) -> list[Tensor | None]:
        bases = [layer.get_base_layer() for layer in self.layers]
        weight = [base.weight for base in bases]
        bias = [base.bias for base in bases]
        if self.layers[0].disable_adapters:  # a merged target: its weights hold them
            return [F.linear(x, w, b) for w, b in zip(weight, bias, strict=True)]
        return lora_linear(
            x,
            weight,
            [layer.lora_B["default"].weight for layer in self.layers],
            [layer.lora_A["default"].weight for layer in self.layers],
            scale=[layer.scaling["default"] for layer in self.layers],
            bias=None if bias[0] is None else bias,
        )


def _liger(module: nn.Module) -> list[Patch]:
    return [] if everywhere() == REFERENCE else liger_patches(module)


def _lora_patches(layer: nn.Module) -> list[Patch]:
    """Adapted linears in groups, those of one input and with bias or without."""
    adapted = {n.rsplit(".", 1)[-1]: m for n, m in layer.named_modules() if _is_lora(m)}
    patches: list[Patch] = []
    for names in (*GROUPS, *((n,) for n in adapted if n not in sum(GROUPS, ()))):
        found = [adapted[n] for n in names if n in adapted]
        for biased in (False, True):
            alike = [m for m in found if (m.get_base_layer().bias is not None) == biased]
            patches += _Group(alike).patches() if alike else []
    return patches


def _is_lora(module: nn.Module) -> bool:
    return isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), nn.Linear)


def _again(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """Computed again in the backward; nothing is drawn that would have to be drawn again."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def _in_place(patches: list[Patch]) -> Iterator[None]:
    before = [(space, name, space.get(name)) for space, name, _ in patches]
    for space, name, value in patches:
        space[name] = value
    try:
        yield
    finally:
        for space, name, value in before:
            if value is None:
                space.pop(name, None)  # a name may stand there twice
            else:
                space[name] = value


@contextmanager
def _attention(config: Any) -> Iterator[None]:
    before = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def _refuse(expected: str, found: object) -> NoReturn:
    raise ValueError(
        f"the shared path needs {expected}, got {found}; objective.path=reference (of embed: "
        "path=reference) takes it"
    )
