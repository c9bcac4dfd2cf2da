"""Which library multiplies fp32 matrices on a CPU: measured when a run begins, and kept by it.

Results of the libraries differ by rounding, so a run that resumes goes on with the one it had, also
on a machine where another is faster.
"""

import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from smbkernels import load as load_kernels
from smbkernels import use
from smbkernels.catalog import AUTO, REFERENCE
from smbkernels.matmul.measure import Measured, measured
from smbkernels.matmul.products import NAMES, missing
from smbkernels.operation import FORCED

from smbfast.base.runtime import library
from smbfast.model.backbone import PatientEncoder
from smbfast.model.flops import ModelShape
from smbfast.run.ranks import Ranks
from smbfast.run.startup import layer_dtype
from smbfast.settings import TrainSettings


@dataclass(frozen=True)
class Matmul:
    """The backend of `smbkernels.linear` that a run uses, and what its header says of it."""

    backend: str
    text: str
    saved: str | None  # what checkpoints record: a run on a GPU has no other than it had before

    def kernels(self, device: str) -> str:
        """Which implementation each operation runs on, with this one, in a line."""
        with self.used():
            return "; ".join([*load_kernels(device), f"matrix products: {self.text}"])

    def used(self) -> AbstractContextManager:
        """A context in which products are computed by it."""
        return use(linear=self.backend)


def agreed_matmul(
    settings: TrainSettings, encoder: PatientEncoder, earlier: str | None, step: int, ranks: Ranks
) -> Matmul:
    """Return `choose_matmul` of the main rank on all ranks, each of which might measure another."""
    chosen = choose_matmul(settings, encoder, earlier, step) if ranks.is_main else None
    saved = ranks.tell(chosen.saved if chosen else None)
    return chosen or choose_matmul(settings, encoder, saved, step)


def choose_matmul(
    settings: TrainSettings, encoder: PatientEncoder, earlier: str | None, step: int
) -> Matmul:
    """Return what the settings force, else what the run had, else the fastest here.

    Args:
        earlier: the backend that the checkpoint of this run records.
        step: the number of steps done. A run that is older than the choice had torch's own.

    Raises:
        ValueError: if what is forced or recorded cannot run here.
    """
    device, dtype = encoder.mask_vector.device.type, layer_dtype(encoder)
    forced = FORCED.get("linear", FORCED.get("*", AUTO))
    if forced != AUTO:
        _refuse(forced, device, dtype, "kernels asks for it; kernels=auto takes what can run")
        return Matmul(forced, f"{title(forced)}, as `kernels` says", forced)
    if device != "cpu" or dtype != torch.float32:
        name = str(dtype).removeprefix("torch.")
        return Matmul(AUTO, f"of torch, in {name} on {device}", earlier)
    if earlier or step:
        backend = earlier or REFERENCE
        way_out = f"--kernels=linear:{REFERENCE} goes on without it, and differs by rounding"
        _refuse(backend, device, dtype, f"the checkpoint of this run was made with it; {way_out}")
        return Matmul(backend, f"{title(backend)}, as in its checkpoint", backend)
    if settings.objective.path == "reference":
        text = f"{title(REFERENCE)}, as the reference path has it"
        return Matmul(REFERENCE, text, REFERENCE)
    result = measured_for(ModelShape.of(encoder))
    best = result.fastest
    gains = [f"{title(n)} {result.gain(n):.2f} x" for n in result.seconds if n != REFERENCE]
    why = result.reason or f"beside {title(REFERENCE)}, at this model's shapes: {', '.join(gains)}"
    return Matmul(best, f"{title(best)} ({why})", best)


def measured_for(shape: ModelShape) -> Measured:
    """Measure the products of a model's linears, trained whole or by their adapters."""
    rank = max((linear.rank for linear in shape.linears), default=0)
    return measured({(linear.n, linear.k) for linear in shape.linears}, rank=rank)


def recorded(backend: str | None, device: torch.device) -> AbstractContextManager:
    """A context in which a saved model computes by what it was trained with, if that can run.

    What cannot run is said on stderr: embeddings then differ by rounding.
    """
    if backend not in NAMES or device.type != "cpu":
        return use(linear=AUTO)
    if reason := missing("cpu"):
        print(
            f"smbfast: the model was trained on products by {title(backend)}, which cannot run "
            f"here: {reason}; {title(REFERENCE)} takes its place, and results differ by rounding",
            file=sys.stderr,
        )
        return use(linear=AUTO)
    return use(linear=backend)


def title(backend: str) -> str:
    """What people call a backend of `smbkernels.linear`."""
    own = library(torch.device("cpu"), torch.float32)
    names = {"onednn": "oneDNN", "onednn_rows": f"oneDNN, gradients of weights {own}"}
    return names.get(backend, own)


def _refuse(backend: str, device: str, dtype: torch.dtype, why: str) -> None:
    """Raise a ValueError if oneDNN is meant and cannot run."""
    if backend not in NAMES:
        return
    reason = missing(device)
    if dtype != torch.float32:
        reason = f"the layers must be in float32, got {str(dtype).removeprefix('torch.')}"
    if reason:
        raise ValueError(f"oneDNN cannot multiply the matrices of this run: {reason}. {why}")
