"""Floating-point operations of a step's matrix products, in closed form from integers on the CPU.

The count holds the products that a step must compute (2 FLOPs per multiply-add): linears, LoRA,
attention over visible pairs, the LM head at labelled rows, the predictor at masked rows or at pairs
of a position and a horizon, the head of codes to come, the means of horizon JEPA, and the target
encoder. It leaves out element-wise work, the optimizer, the update of the averages and of the scale
of horizon JEPA, and activation checkpointing, except for the scores that every attention kernel
recomputes in its backward.

Per token, a linear [N, K] costs 2 N K forward, 2 N K for the gradient of its input, and 2 N K for
that of its weight where the weight is trained. Attention costs 4 C per head and visible pair
forward and 10 C backward. The head costs what a linear costs, and so do rows of it that are trained
separately. The head of codes to come costs two linears: D to E for each position and horizon, E to
K for each pair. The mean states of a trunk of S tokens within its Q pairs cost 2 Q S D.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial

from smbkernels.attention import attention_flops
from smbkernels.lora import lora_flops
from torch import nn

from smbfast.batch import PackedBatch
from smbfast.model.backbone import PatientEncoder
from smbfast.model.target import TargetForm
from smbfast.settings import PhaseSettings
from smbfast.settings.training import Freeze

READS_EMBEDDING = ("q_proj", "k_proj", "v_proj")  # of the first layer


@dataclass(frozen=True)
class Flops:
    """FLOPs by what they are for; the online and the target encoder together."""

    base: int = 0  # linears of the layers, without adapters
    lora: int = 0
    attention: int = 0
    head: int = 0
    predictor: int = 0
    codes: int = 0  # the head of codes to come
    means: int = 0  # of the target's states within horizons

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class Linear:
    """A linear of a layer, its LoRA adapter, and the tracked target's average of that adapter."""

    n: int  # output features
    k: int  # input features
    rank: int  # of its adapter; 0 without one
    columns: int  # of the tracked average; 0 without one
    reads_embedding: bool  # whether its input comes straight from the embeddings


@dataclass(frozen=True)
class ModelShape:
    """The sizes from which the FLOPs of an encoder and its target follow."""

    linears: tuple[Linear, ...]  # of all layers
    layers: int
    heads: int
    head_dim: int
    width: int
    vocabulary: int
    predictor_layers: int
    whole: bool  # whether all weights are trained; else LoRA on a frozen base
    head_trained: bool
    head_rows: int  # number of rows of a frozen head that are trained
    rows_trained: bool  # whether every input embedding needs a gradient, masked or not
    horizons: int = 0  # of codes to come
    inner: int = 0  # inner width of its head
    classes: int = 0  # that it predicts

    @classmethod
    def of(cls, encoder: PatientEncoder, *, tracked: TargetForm | None = None) -> "ModelShape":
        """Read the sizes of an encoder on any device.

        Args:
            tracked: the form of a tracked target; None for a merged one, whose linears include
                their adapters.
        """
        config, adapted = encoder.base.config, encoder.lora_layers()
        inside = tuple(f"{name}." for name in adapted)  # LoRA's factors are linears as well
        linears = []
        for name, module in encoder.decoder.named_modules():
            if name.startswith(inside) or not (name in adapted or isinstance(module, nn.Linear)):
                continue
            n, k = module.out_features, module.in_features
            rank = adapted[name].r["default"] if name in adapted else 0
            columns = tracked.columns(n, k, rank) if rank and tracked else 0
            first = name.startswith("layers.0.") and name.endswith(READS_EMBEDDING)
            linears.append(Linear(n, k, rank, columns, first))
        head_VD, token_R, _ = encoder.head
        horizons, inner, _ = encoder.codes.inner_HED.shape if encoder.codes else (0, 0, 0)
        return cls(
            linears=tuple(linears),
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None)
            or encoder.width // config.num_attention_heads,
            width=encoder.width,
            vocabulary=head_VD.shape[0],
            predictor_layers=sum(isinstance(m, nn.Linear) for m in encoder.predictor),
            whole=not encoder.is_lora,
            head_trained=head_VD.requires_grad,
            head_rows=0 if token_R is None else len(token_R),
            rows_trained=not encoder.is_lora or encoder.trained_rows() is not None,
            horizons=horizons,
            inner=inner,
            classes=len(encoder.codes.class_KE) if encoder.codes else 0,
        )

    @property
    def attention_ratio(self) -> float:
        """FLOPs of a visible pair over those of a token in the linears, to plan micro-batches.

        For Qwen3-8B with LoRA it is 7.4e-5.
        """
        one = online_flops(self, 1, 1, masked=True)
        return one.attention / max(one.base, 1)  # GPT-2's linears are of another class


def step_flops(
    shape: ModelShape, batch: PackedBatch, *, codes: bool = False, freeze: Freeze = "none"
) -> Flops:
    """Return the FLOPs of a batch: one forward and backward, and the target encoder's forward.

    Args:
        codes: whether the step has the loss of codes to come.
        freeze: what gets no gradient; see `smbfast.objective.losses`.
    """
    num_positions = len(batch.pairs.row_N) if batch.pairs and codes else 0
    num_pairs = batch.num_pairs if codes else 0
    return (
        online_flops(
            shape,
            batch.segments.tokens,
            batch.segments.pairs,
            masked=batch.num_masked > 0,
            backward=freeze != "decoder",
        )
        + head_flops(shape, batch.num_labels)
        + predictor_flops(shape, batch.num_masked, freeze)
        + predictor_flops(shape, batch.num_latent, freeze, embedded=True)
        + codes_flops(shape, num_positions, num_pairs, freeze)
        + means_flops(shape, batch)
        + target_flops(shape, batch.target_segments.tokens, batch.target_segments.pairs)
    )


def flops_in_phase(
    shape: ModelShape, micro_batches: Sequence[PackedBatch], phase: PhaseSettings
) -> int:
    """Return the FLOPs of all micro-batches of a step of a phase."""
    own = partial(step_flops, shape, codes=phase.w_codes > 0, freeze=phase.freeze)
    return sum(own(batch).total for batch in micro_batches)


def online_flops(
    shape: ModelShape, tokens: int, pairs: int, *, masked: bool, backward: bool = True
) -> Flops:
    """Return the FLOPs of the online encoder's layers, forward and backward.

    Args:
        masked: whether the batch reads the mask vector, which is trained.
        backward: whether they are trained; if not, the forward alone.
    """
    embedding = (
        masked or shape.rows_trained
    )  # else the first linears need no gradient of their input
    base = lora = 0
    for linear in shape.linears:
        product = 2 * tokens * linear.n * linear.k
        needs_x = embedding or not linear.reads_embedding
        rank, size = [linear.rank], [(linear.n, linear.k)]
        base += product
        lora += lora_flops(tokens, size, rank, backward=False) - product
        if backward:
            base += product * (needs_x + shape.whole)
            back = lora_flops(tokens, size, rank, backward=True, needs_x=needs_x)
            lora += back - product * needs_x
    sizes = (pairs, shape.heads, shape.head_dim)
    attention = attention_flops(*sizes) + backward * attention_flops(*sizes, backward=True)
    return Flops(base=base, lora=lora, attention=shape.layers * attention)


def target_flops(shape: ModelShape, tokens: int, pairs: int) -> Flops:
    """Return the FLOPs of the target encoder's layers, forward only."""
    base = lora = 0
    for linear in shape.linears:
        base += 2 * tokens * linear.n * linear.k
        lora += 2 * tokens * linear.columns * (linear.n + linear.k)
    attention = attention_flops(pairs, shape.heads, shape.head_dim)
    return Flops(base=base, lora=lora, attention=shape.layers * attention)


def head_flops(shape: ModelShape, num_labels: int) -> Flops:
    """Return the FLOPs of the LM head and its loss at labelled rows, forward and backward."""
    product = 2 * num_labels * shape.width
    whole = shape.vocabulary * (2 + shape.head_trained)
    return Flops(head=product * (whole + 3 * shape.head_rows))


def predictor_flops(
    shape: ModelShape, num_rows: int, freeze: Freeze = "none", *, embedded: bool = False
) -> Flops:
    """Return the FLOPs of the predictor at masked rows or latent pairs, forward and backward.

    Args:
        embedded: whether a horizon is embedded in what it reads, which is trained with it.
    """
    layers = shape.predictor_layers
    inputs = layers - (freeze == "decoder" and not embedded)  # whose gradient is taken
    products = layers + inputs + layers * (freeze != "predictor")
    return Flops(predictor=2 * num_rows * products * shape.width**2)


def codes_flops(
    shape: ModelShape, num_positions: int, num_pairs: int, freeze: Freeze = "none"
) -> Flops:
    """Return the FLOPs of the head of codes to come, forward and backward."""
    inner = num_positions * shape.horizons * shape.width * shape.inner
    outer = num_pairs * shape.inner * shape.classes
    of_weights = freeze != "predictor"
    products = inner * (1 + (freeze != "decoder") + of_weights) + outer * (2 + of_weights)
    return Flops(codes=2 * products)


def means_flops(shape: ModelShape, batch: PackedBatch) -> Flops:
    """Return the FLOPs of the target's mean states within horizons."""
    if not batch.num_latent:
        return Flops()
    assert batch.pairs is not None
    length_S = batch.target_segments.host_S6[:, 1].tolist()
    cells = sum(q * n for q, n in zip(batch.pairs.num_by_trunk, length_S, strict=True))
    return Flops(means=2 * cells * shape.width)
