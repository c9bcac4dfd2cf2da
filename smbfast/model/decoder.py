"""The decoder of a causal LM on packed sequences, written out: norm, attention, norm, MLP.

Llama, Mistral, Qwen2 and Qwen3 share this layer. The modules and parameters are those that
transformers and PEFT made. They are read at each call, so that a target encoder can put its own
weights in their place. Only the sequence of calls is ours: all between the products is operations
of `smbkernels`, and LoRA linears that read the same input are one call. The reference path runs
transformers' own forward of the same modules.

A weight is read in the dtype of the stream: a model that is trained whole may compute in bf16 on
weights in fp32, whose gradients are then fp32 as well. (Adapters stay as they are beside a base in
bf16; `lora_linear` sees to them.)

The residual stream is carried as two tensors, what was summed and the output that is still to be
added, so that each addition is one pass with the norm after it.

Legend: T tokens, R tokens whose states are wanted, H heads, G key and value heads, C head dim,
O = H C, D width, F width of the MLP, K input width of a linear.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NoReturn

import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from smbkernels import (
    add_rms_norm,
    linear,
    lora_linear,
    qk_norm_rope,
    swiglu,
    timeline_attention,
)
from smbkernels.attention import Segments
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smbfast.base.parts import is_part, part
from smbfast.settings.backbones import FAMILIES as FAMILIES

Recompute = Literal["none", "mlp", "full"]
KERNEL_WIDTHS = (64, 128)  # head dims that the attention kernel for GPUs supports
SILU = ("silu", "swish")  # the names that transformers gives it
# the residual stream: what was summed, and what is still to be added to it, [T, D] each
Stream = tuple[Tensor, Tensor | None]
Each = Callable[[Tensor], None]  # takes the states of all tokens after a layer
HfModule = Any  # a module of transformers or PEFT, which declares no types for its attributes


class PackedDecoder:
    """Runs the decoder of a causal LM on a pack of trunks and branches.

    It holds no parameters: it reads those of the modules when it runs, so that the target encoder
    can put its own weights in their place.
    """

    def __init__(self, decoder: HfModule) -> None:
        """Take a decoder of one of `FAMILIES`; the layers of others do more than this file does.

        Raises:
            ValueError: if the decoder is of another family, or has sliding windows or dropout.
        """
        config = decoder.config
        if config.model_type not in FAMILIES:
            _refuse(f"a backbone of type {', '.join(FAMILIES)}", config.model_type)
        layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
        if layer_types != {"full_attention"} or getattr(config, "sliding_window", None):
            _refuse("full attention in every layer", "sliding windows")
        rope_type = config.rope_parameters["rope_type"]
        if rope_type in ("dynamic", "longrope"):  # they ask the CPU for the longest position
            _refuse("RoPE that does not depend on lengths", rope_type)
        if getattr(config, "attention_dropout", 0):  # SFT and JEPA share one forward, so one draw
            _refuse("attention_dropout 0", config.attention_dropout)
        self.decoder = decoder

    def __call__(
        self,
        embedded_TD: Tensor,
        position_T: Tensor,
        segments: Segments,
        *,
        norm: bool = True,
        recompute: Recompute = "none",
        rows_R: Tensor | None = None,
        each: Each | None = None,
    ) -> Tensor:
        """Return hidden states [T, D] after the last layer, or those of `rows_R`, [R, D].

        Args:
            embedded_TD: input embeddings.
            position_T: position ids; those of a branch go on from its cut.
            segments: the trunks and branches of the pack.
            norm: whether to apply the final norm.
            recompute: activation checkpointing. "none" stores all activations; "mlp" computes the
                inner activations of the MLPs again in the backward; "full" stores only the input
                of each layer.
            rows_R: tokens whose states are wanted. The last layer computes nothing for the others
                after its attention.
            each: called with the states of all tokens, [T, D], of every layer: the input
                embeddings, what each layer but the last returns, and the last one's after the final
                norm, as `hidden_states` of transformers. What is returned has the same bits
                without it.
        """
        run = run_of(self.decoder, run_layers)
        return run(embedded_TD, position_T, segments, norm, recompute, rows_R, each)


def run_layers(
    decoder: HfModule,
    embedded_TD: Tensor,
    position_T: Tensor,
    segments: Segments,
    norm: bool,
    recompute: Recompute,
    rows_R: Tensor | None,
    each: Each | None,
) -> Tensor:
    """Run all layers; see `PackedDecoder`."""
    stream: Stream = (embedded_TD, None)
    # transformers' own forward checks position ids to build a mask, and waits for the GPU there
    cos_1TC, sin_1TC = decoder.rotary_emb(embedded_TD[None], position_T[None])
    rotary = cos_1TC[0], sin_1TC[0]
    for layer in decoder.layers:
        wanted_R = rows_R if layer is decoder.layers[-1] else None
        if each is not None:
            each(_sum(stream))
        run = run_of(layer, run_layer)
        if each is not None and wanted_R is not None:  # one attention for all and for some
            whole = partial(_read, decoder.norm, each)
            stream = run(stream, rotary, segments, "none", wanted_R, whole)
        elif recompute == "full":
            # added before, because the input of a layer is to be stored as one tensor
            stream = _recomputed(run, (_sum(stream), None), rotary, segments, "none", wanted_R)
        else:
            stream = run(stream, rotary, segments, recompute, wanted_R)
    out_TD = _norm(decoder.norm, stream)[1] if norm else _sum(stream)
    if each is not None and rows_R is None:
        each(out_TD)
    return out_TD


def run_layer(
    layer: HfModule,
    stream: Stream,
    rotary: tuple[Tensor, Tensor],
    segments: Segments,
    recompute: Recompute = "none",
    rows_R: Tensor | None = None,
    whole: Callable[[Stream], None] | None = None,
) -> Stream:
    """Run one decoder layer of any of `FAMILIES`; its output is the sum of what it returns.

    Args:
        rotary: cosines and sines of the positions for RoPE, [T, C] each.
        recompute: "mlp" computes the MLP's inner activations again in the backward.
        rows_R: tokens whose states are wanted; what is returned is [R, D] of these.
        whole: called with what would be returned for all tokens.
    """
    inner = _attended(layer, stream, rotary, segments)
    if whole is not None:
        whole(_finished(layer, *inner))
    return _finished(layer, *inner, recompute=recompute, rows_R=rows_R)


def run_of(module: HfModule, run: Callable[..., Any]) -> Callable[..., Any]:
    """Return `run` with its first argument bound to `module`.

    A sharded module has it as a method around which its weights are gathered
    (`smbfast.model.sharding`): they are there for as long as it runs.
    """
    return getattr(module, run.__name__, None) or partial(run, module)


def _attended(
    layer: HfModule, stream: Stream, rotary: tuple[Tensor, Tensor], segments: Segments
) -> tuple[Tensor, Tensor]:
    """Return the sum of a layer's input, [T, D], and what its heads read, [T, H C]."""
    hidden_TD, normed_TD = _norm(layer.input_layernorm, stream)
    return hidden_TD, _attention(layer.self_attn, normed_TD, rotary, segments)


def _finished(
    layer: HfModule,
    hidden_TD: Tensor,
    heads_TO: Tensor,
    *,
    recompute: Recompute = "none",
    rows_R: Tensor | None = None,
) -> Stream:
    """Do what a layer does behind its heads, for all tokens or for `rows_R` alone."""
    if rows_R is not None:
        hidden_TD, heads_TO = hidden_TD[rows_R], heads_TO[rows_R]
    with part("attention"):
        attended_TD = _linears(heads_TO, layer.self_attn.o_proj)[0]
    hidden_TD, normed_TD = _norm(layer.post_attention_layernorm, (hidden_TD, attended_TD))
    if recompute == "mlp":
        return hidden_TD, _recomputed(_mlp, layer.mlp, normed_TD)
    return hidden_TD, _mlp(layer.mlp, normed_TD)


def _read(norm: HfModule, each: Each, stream: Stream) -> None:
    each(_norm(norm, stream)[1])


def _sum(stream: Stream) -> Tensor:
    hidden_TD, pending_TD = stream
    return hidden_TD if pending_TD is None else hidden_TD + pending_TD


@is_part("norm")
def _norm(norm: HfModule, stream: Stream) -> tuple[Tensor, Tensor]:
    """The sum of a stream, and its RMSNorm."""
    weight_D = norm.weight.to(stream[0].dtype)
    return add_rms_norm(*stream, weight_D, eps=norm.variance_epsilon)


@is_part("attention")
def _attention(
    attention: HfModule,
    x_TD: Tensor,
    rotary: tuple[Tensor, Tensor],
    segments: Segments,
) -> Tensor:
    """Return what the heads read, side by side: [T, H C]."""
    C = attention.head_dim
    with part("qkv"):
        projected = _linears(x_TD, attention.q_proj, attention.k_proj, attention.v_proj)
    q_THC, k_TGC, v_TGC = (y.unflatten(-1, (-1, C)) for y in projected)
    if hasattr(attention, "q_norm"):  # Qwen3
        q_norm_C, k_norm_C = (
            norm.weight.to(x_TD.dtype) for norm in (attention.q_norm, attention.k_norm)
        )
        eps = attention.q_norm.variance_epsilon
        q_THC, k_TGC = qk_norm_rope(q_THC, k_TGC, q_norm_C, k_norm_C, *rotary, eps=eps)
    else:
        q_THC, k_TGC = qk_norm_rope(q_THC, k_TGC, None, None, *rotary)
    # under autocast linears return its dtype, RoPE the wider one of its cosines
    q_THC, k_TGC = q_THC.to(v_TGC.dtype), k_TGC.to(v_TGC.dtype)
    width = next((w for w in KERNEL_WIDTHS if w >= C), C) if q_THC.is_cuda else C
    if width > C:  # padded with zeros, which change neither scores nor output
        q_THC, k_TGC, v_TGC = (F.pad(x, (0, width - C)) for x in (q_THC, k_TGC, v_TGC))
    out_THC, _ = timeline_attention(q_THC, k_TGC, v_TGC, segments, scale=attention.scaling)
    return out_THC[..., :C].flatten(1)


@is_part("mlp")
def _mlp(mlp: HfModule, x_TD: Tensor) -> Tensor:
    gate_TF, up_TF = _linears(x_TD, mlp.gate_proj, mlp.up_proj)
    if mlp.config.hidden_act in SILU:
        activated_TF = swiglu(gate_TF, up_TF)
    else:
        activated_TF = mlp.act_fn(gate_TF) * up_TF
    return _linears(activated_TF, mlp.down_proj)[0]


def _linears(x_TK: Tensor, *modules: HfModule) -> list[Tensor]:
    """Return the outputs of linears that read the same input.

    Linears with a LoRA adapter are one call, or two where only some of them have a bias.
    """
    output_of: dict[HfModule, Tensor] = {}
    for biased in (False, True):
        adapted = [m for m in modules if _is_adapted(m) and (_base(m).bias is not None) == biased]
        if adapted:
            outputs = lora_linear(
                x_TK,
                [_base(m).weight for m in adapted],
                [m.lora_B["default"].weight for m in adapted],
                [m.lora_A["default"].weight for m in adapted],
                scale=[m.scaling["default"] for m in adapted],
                bias=[_base(m).bias for m in adapted] if biased else None,
            )
            output_of |= dict(zip(adapted, outputs, strict=True))
    for module in modules:
        if module not in output_of:
            base = _base(module)
            bias_N = None if base.bias is None else base.bias.to(x_TK.dtype)
            output_of[module] = linear(x_TK, base.weight.to(x_TK.dtype), bias_N)
    return [output_of[m] for m in modules]


def _is_adapted(module: HfModule) -> bool:
    # a merged target encoder disables adapters, because its averaged weights include them
    return isinstance(module, LoraLayer) and not module.disable_adapters


def _base(module: HfModule) -> nn.Linear:
    base: HfModule = module.get_base_layer() if isinstance(module, LoraLayer) else module
    return base


def _recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """Checkpoint activations of `function`; it draws nothing, so no random state is preserved."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def _refuse(expected: str, received: object) -> NoReturn:
    raise ValueError(
        f"the shared path needs {expected}, got {received}; objective.path=reference (of embed: "
        "path=reference) takes it"
    )
