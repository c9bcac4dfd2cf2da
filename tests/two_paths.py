"""Tiny encoders and targets to compare the shared forward with the reference on."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from peft import get_peft_model
from torch import Tensor, nn

from smbfast import objective, reference
from smbfast.batch import PackedBatch
from smbfast.model.backbone import PatientEncoder, lora_config
from smbfast.model.target import Form, TargetEncoder, TargetForm
from smbfast.settings import LoraSettings
from tests.tiny import DELIMITERS, tiny_lm

PATHS = {"shared": objective.losses, "reference": reference.losses}
FP32, FP64 = torch.float32, torch.float64


@dataclass(frozen=True)
class Case:
    """What is trained, and in which form it is averaged."""

    lora: bool
    form: Form
    tie: bool = True

    def __str__(self) -> str:
        return f"{'lora' if self.lora else 'whole'}-{self.form}-{'tied' if self.tie else 'untied'}"


CASES = [
    Case(lora, form, tie)
    for lora, form in ((False, "merged"), (True, "merged"), (True, "tracked"))
    for tie in (True, False)
]


def make_encoder(
    kind: str = "qwen3",
    *,
    lora: bool = True,
    tie: bool = True,
    dtype: torch.dtype = FP32,
    targets: list[str] | None = None,
    rows: Sequence[int] = DELIMITERS,
    **config: object,
) -> PatientEncoder:
    """A tiny encoder none of whose trained weights is zero.

    Args:
        targets: linears with an adapter; None: all seven.
        rows: tokens whose embeddings are trained beside LoRA.
        config: goes to transformers.
    """
    lm = tiny_lm(kind, tie=tie, **config)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "norm" in name or name.endswith("bias"):  # made as ones and zeros
                parameter.add_(0.3 * torch.randn_like(parameter))
    if lora:
        settings = LoraSettings(r=4, alpha=8, **({"targets": targets} if targets else {}))
        lm = get_peft_model(lm, lora_config(lm, settings, list(rows)))
    encoder = PatientEncoder(lm, 2)
    move(encoder, 0, 0.2, only=("lora_B", "trainable_tokens"))
    if dtype == FP64:
        encoder.double()
        exact_norms(encoder)
    return encoder


def move(encoder: PatientEncoder, seed: int, size: float = 0.05, only=("",)) -> None:
    """As an optimizer step would, all trained weights whose names hold one of `only`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if parameter.requires_grad and any(word in name for word in only):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(size * noise.to(parameter.dtype))


def moved_target(encoder: PatientEncoder, form: Form = "auto", updates: int = 5) -> TargetEncoder:
    """One that stays behind an encoder that moves; a tracked one discards at the 2nd and 4th."""
    target = TargetEncoder(encoder, TargetForm(form, rank=1, every=2))
    for step in range(updates):
        move(encoder, step + 1)
        target.update(0.7)
    return target


def exact_norms(encoder: PatientEncoder) -> None:
    """RMSNorms in the dtype of the model: transformers computes them in fp32."""

    def forward(norm: nn.Module, x: Tensor) -> Tensor:
        square = x.square().mean(-1, keepdim=True)
        return norm.weight * (x * torch.rsqrt(square + norm.variance_epsilon))

    for module in encoder.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(forward, module)


def run(
    path: str,
    encoder: PatientEncoder,
    target: TargetEncoder | None,
    batches: list[PackedBatch],
    *,
    sft: float = 1.0,
    jepa: float = 1.0,
    codes: float = 1.0,
    normalize: bool = True,
    **more: object,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Both losses of a step, means over all its batches, and the gradients that they leave."""
    labels = sum(b.num_labels for b in batches)
    masked = sum(b.num_masked + b.num_latent for b in batches)
    scales = {"sft_scale": sft / max(labels, 1), "jepa_scale": jepa / max(masked, 1)}
    scales["codes_scale"] = codes / max(sum(b.num_pairs for b in batches), 1)
    total: dict[str, float] = {}
    encoder.zero_grad(set_to_none=True)
    for batch in batches:
        parts = PATHS[path](encoder, target, batch, normalize=normalize, **scales, **more)
        if any(part is not None for part in parts):
            torch.autograd.backward([part for part in parts if part is not None])
        for name, part in parts._asdict().items():
            if part is not None:
                total[name] = total.get(name, 0.0) + float(part.detach())
    gradients = {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}
    encoder.zero_grad(set_to_none=True)
    return total, gradients


def apart(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """‖found - expected‖ / ‖expected‖, or over `floor` where that is larger."""
    size = max(float(expected.norm()), floor, 1e-300)
    return float((found - expected).norm()) / size


def assert_same(
    found: tuple, expected: tuple, tol: float, *, share: float = 1e-3, truth: tuple | None = None
) -> None:
    """Losses and gradients by the same names, each within `tol`, relative.

    Args:
        share: a gradient smaller than this share of all gradients together is held to `tol` of
            that share: it is what is left of terms that cancel, in either path.
        truth: what is expected, in fp64; twice what `expected` is off from it is allowed as well.
    """
    (losses, gradients), (true_losses, true) = found, expected
    assert losses.keys() == true_losses.keys()
    for name, value in true_losses.items():
        assert abs(losses[name] - value) <= tol * abs(value), (name, losses[name], value)
    assert gradients.keys() == true.keys(), gradients.keys() ^ true.keys()
    floor = share * sum(float(g.square().sum()) for g in true.values()) ** 0.5
    far = {}
    for name, gradient in true.items():
        rounding = 2 * apart(gradient, truth[1][name], floor) if truth else 0.0
        far[name] = apart(gradients[name], gradient, floor) - rounding
    assert all(a <= tol for a in far.values()), {n: a for n, a in far.items() if not a <= tol}


def twin(encoder: PatientEncoder) -> PatientEncoder:
    """Another encoder with the same weights; of one that has not been run packed."""
    assert encoder._packed_decoder is None
    return copy.deepcopy(encoder)
