"""A training step in parts, the specification it has to equal, and ours.

Legend: see `bench.step.rivals`.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from smbkernels.registry import use
from torch import Tensor, nn

from bench.step.workloads import Workload
from smbfast import objective, reference
from smbfast.model.backbone import PatientEncoder
from smbfast.model.flops import ModelShape
from smbfast.model.target import TargetEncoder, TargetForm
from smbfast.run.matmul import measured_for
from smbfast.run.step import LossScales, Updater, forward_backward

PARTS = ONLINE, TARGET, LOSSES, BACKWARD, OPTIMIZER, EMA = (
    "online forward",
    "target forward",
    "losses",
    "backward",
    "optimizer",
    "EMA",
)
TAU = 0.996
Part = Callable[[str], AbstractContextManager]
Losses = tuple[Tensor | None, Tensor | None]  # of SFT and of JEPA
Model = TypeVar("Model", bound=nn.Module)


def untimed(_name: str) -> AbstractContextManager:
    """A step of which no part is timed."""
    return nullcontext()


def twin(module: Model, *, share: Callable[[str], bool] = lambda name: True) -> Model:
    """A deep copy that shares the frozen parameters whose names `share` accepts."""
    frozen = {id(p): p for n, p in module.named_parameters() if not p.requires_grad and share(n)}
    return copy.deepcopy(module, frozen)


def halved(encoder: PatientEncoder) -> PatientEncoder:
    """The encoder, its frozen weights now in bf16 as on a GPU; what is trained stays as it is."""
    done: dict[int, nn.Parameter] = {}  # a head may be the embeddings
    for module in encoder.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if not p.requires_grad:
                half = done.setdefault(id(p), nn.Parameter(p.detach().bfloat16(), False))
                setattr(module, name, half)
    return encoder


class Variant:
    """A training step, on an encoder of its own.

    Args:
        precision: of fp32 products, as `torch.set_float32_matmul_precision` takes it; None leaves
            it as it is. On a CPU without AMX "medium" sends them to oneDNN, still in fp32.
    """

    def __init__(self, encoder: PatientEncoder, *, precision: str | None = None) -> None:
        self.encoder = encoder
        self.precision = precision
        self.parameters = [p for p in encoder.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.updater = Updater(self.optimizer, clip=1.0)

    def take(self, workload: Workload) -> None:
        """Have a step's micro-batches in the form in which a loader would hand them over."""
        batches = workload.batches()
        device = self.parameters[0].device
        labels, masked = sum(b.num_labels for b in batches), sum(b.num_masked for b in batches)
        self.scales = LossScales.of(1.0, 1.0, labels, masked)
        self.batches = [b.to(device) for b in batches]

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights: its products are computed in it."""
        return self.encoder.head_VD.dtype

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """All that the variant computes, it computes in this context."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.precision or before)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def ready(self) -> None:
        """Compile what is to be compiled."""

    def accumulate(self, part: Part) -> tuple[Tensor, Tensor]:
        """Forward and backward of all micro-batches: the SFT and the JEPA loss of the step."""
        raise NotImplementedError

    def update(self, tau: float) -> None:
        """Move the target towards the online encoder."""
        raise NotImplementedError

    def averages(self) -> list[Tensor]:
        """What the target holds."""
        raise NotImplementedError

    def outcome(self) -> dict[str, Tensor]:
        """What every variant has to agree on: losses, gradients, and the target once it moved."""
        outcome = dict(zip(("SFT loss", "JEPA loss"), self.accumulate(untimed), strict=True))
        by_kind: dict[str, list[Tensor]] = {}
        for name, p in self.encoder.named_parameters():
            if p.requires_grad:
                grad = torch.zeros_like(p) if p.grad is None else p.grad
                by_kind.setdefault(_kind(name), []).append(grad.flatten())
        outcome |= {f"{kind} gradients": torch.cat(grads) for kind, grads in by_kind.items()}
        self.optimizer.zero_grad(set_to_none=True)
        self.update(0.5)
        outcome["JEPA loss of a moved target"] = self.accumulate(untimed)[1]
        self.optimizer.zero_grad(set_to_none=True)
        return outcome

    def step(self, part: Part = untimed) -> None:
        """A whole step."""
        self.accumulate(part)
        with part(OPTIMIZER):
            self.updater.step()
        with part(EMA):
            self.update(TAU)

    def held(self) -> int:
        """Bytes between steps: weights, averages and the optimizer's moments."""
        moments = [t for state in self.optimizer.state.values() for t in state.values()]
        tensors = [*self.encoder.parameters(), *self.averages(), *moments]
        return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def _kind(name: str) -> str:
    """Whose parameter it is; the gradients of a kind are compared together."""
    for part, kind in (("lora_", "LoRA"), ("trainable_tokens", "token row"), ("lm.", "backbone")):
        if part in name:
            return kind
    return "other"


class Smbfast(Variant):
    """B4: the shared forward, fused operations, a target tracked at low rank.

    Args:
        form: of the target.
        recompute: see `smbfast.model.decoder.PackedDecoder`.
        plain: operations that run on their references.
        bf16: frozen weights in bf16 on a CPU too.
    """

    def __init__(
        self,
        encoder: PatientEncoder,
        *,
        form: Literal["auto", "merged", "tracked"] = "auto",
        recompute: Literal["none", "mlp", "full"] = "none",
        plain: tuple[str, ...] = (),
        bf16: bool = False,
    ) -> None:
        super().__init__(halved(encoder) if bf16 else encoder)
        self.target = TargetEncoder(encoder, TargetForm(form))
        self.losses: Callable[..., Losses] = partial(objective.losses, recompute=recompute)
        self.backends = {"linear": _fastest(encoder), **dict.fromkeys(plain, "torch")}
        self._part: Part = untimed
        encoder.packed = self._timed(ONLINE, encoder.packed)
        self.target.packed = self._timed(TARGET, self.target.packed)

    def _timed(self, name: str, function: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Tensor:
            with self._part(name):
                return function(*args, **kwargs)

        return timed

    def accumulate(self, part: Part) -> tuple[Tensor, Tensor]:
        self._part = part

        def losses(*args: Any, **scales: float) -> Losses:
            with part(LOSSES):  # what is left of it: the two forwards have parts of their own
                return self.losses(*args, normalize=True, **scales)

        # what is left of it, once the losses have their part
        with use(**self.backends), part(BACKWARD):
            step = (self.encoder, self.target, self.batches, self.scales)
            summed = forward_backward(losses, *step)
            return summed.sft, summed.jepa

    def update(self, tau: float) -> None:
        with use(**self.backends):
            self.target.update(tau)

    def averages(self) -> list[Tensor]:
        return [w for w in self.target.state().values() if w.dim()]


def _fastest(encoder: PatientEncoder) -> str:
    """The library that a run would multiply matrices with; the same for all variants of a model."""
    fp32 = encoder.head_VD.dtype == torch.float32
    if encoder.head_VD.device.type != "cpu" or not fp32:
        return "auto"
    return _measured(ModelShape.of(encoder))


@functools.cache
def _measured(shape: ModelShape) -> str:
    return measured_for(shape).fastest


class Reference(Smbfast):
    """The specification: what every variant has to compute. Never timed.

    One loss after the other: the forward of the second begins once what the first has stored is
    free again, because transformers and PEFT store about 11 MB a token of Qwen3-8B (calculated).
    """

    def __init__(self, encoder: PatientEncoder) -> None:
        super().__init__(encoder, form="merged", plain=("linear",))
        self.losses = reference.losses

    def accumulate(self, part: Part) -> tuple[Tensor, Tensor]:
        both, totals = self.scales, []
        for scales in (both._replace(jepa_scale=0.0), both._replace(sft_scale=0.0)):
            self.scales = scales
            totals.append(super().accumulate(part))
        self.scales = both
        return totals[0][0], totals[1][1]
