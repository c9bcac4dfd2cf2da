"""A training step in parts, the specification it has to equal, and ours.

Legend: see `bench.step.rivals`.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from smbkernels.registry import use
from torch import Tensor, nn

from bench.step.workloads import Workload
from smbfast import objective, reference
from smbfast.model.backbone import PatientEncoder
from smbfast.model.target import TargetEncoder, TargetForm
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


class Variant:
    """A training step, on an encoder of its own."""

    def __init__(self, encoder: PatientEncoder) -> None:
        self.encoder = encoder
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
        for kind, lora in (("LoRA gradients", True), ("other gradients", False)):
            named = self.encoder.named_parameters()
            mine = [p for n, p in named if p.requires_grad and ("lora_" in n) == lora]
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in mine]
            outcome[kind] = torch.cat([g.flatten() for g in grads])
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


class Smbfast(Variant):
    """B4: the shared forward, fused operations, a target tracked at low rank.

    Args:
        form: of the target.
        recompute: see `smbfast.model.decoder.PackedDecoder`.
        plain: operations that run on their references.
    """

    def __init__(
        self,
        encoder: PatientEncoder,
        *,
        form: Literal["auto", "merged", "tracked"] = "auto",
        recompute: Literal["none", "mlp", "full"] = "none",
        plain: tuple[str, ...] = (),
    ) -> None:
        super().__init__(encoder)
        self.target = TargetEncoder(encoder, TargetForm(form))
        self.losses: Callable[..., Losses] = partial(objective.losses, recompute=recompute)
        self.plain = plain
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
        with use(**dict.fromkeys(self.plain, "torch")), part(BACKWARD):
            return forward_backward(losses, self.encoder, self.target, self.batches, self.scales)

    def update(self, tau: float) -> None:
        with use(**dict.fromkeys(self.plain, "torch")):
            self.target.update(tau)

    def averages(self) -> list[Tensor]:
        return [w for w in self.target.state().values() if w.dim()]


class Reference(Smbfast):
    """The specification: what every variant has to compute. Never timed."""

    def __init__(self, encoder: PatientEncoder) -> None:
        super().__init__(encoder, form="merged")
        self.losses = reference.losses
