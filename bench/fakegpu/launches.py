"""Launches of Triton kernels, ours and Liger's: recorded and checked, compiled if asked for."""

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench.cubin import read_usage
from bench.fakegpu.device import CAPABILITY
from bench.fakegpu.ledger import Ledger

MOST_PROGRAMS = (2**31 - 1, 65535, 65535)  # of a grid, by axis


@dataclass
class Builds:
    """What was compiled: a specialisation by the hash of its source and options."""

    kernels: dict[str, dict[str, Any]] = field(default_factory=dict)


class Driver:
    """Of Triton: a chip to compile for, and nothing to launch on."""

    def get_current_target(self) -> GPUTarget:
        """sm_90."""
        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, _device: int) -> int:
        """The default stream."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """The only one."""
        return torch.device("cuda", 0)

    def map_python_to_cpp_type(self, kind: str) -> str:
        """Of a launcher that is never built."""
        return kind


@contextmanager
def recorded(ledger: Ledger, builds: Builds | None = None) -> Iterator[None]:
    """Within it, a launch is a row of the ledger.

    Args:
        builds: receives what each launched specialisation needs once it is compiled for the
            pretended GPU; None: nothing is compiled.

    Raises:
        ValueError: at a launch, if a tensor is not on the GPU or the grid is too large.
    """
    compiled = JITFunction.run
    before = getattr(driver, "_active", None)

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any):
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        tensors = [v for v in given.values() if isinstance(v, Tensor)]
        _check(kernel.__name__, given, grid)
        ledger.launch(kernel.__name__, tensors)
        if builds is not None:
            _note(builds, compiled(kernel, *args, grid=grid, warmup=True, **kwargs))

    with mock.patch.object(JITFunction, "run", run):
        if builds is not None:
            driver.set_active(Driver())
        try:
            yield
        finally:
            if builds is not None and before is not None:
                driver.set_active(before)


def _check(name: str, given: dict[str, Any], grid: Any) -> None:
    for argument, value in given.items():
        if isinstance(value, Tensor) and not value.is_cuda:
            raise ValueError(
                f"{name}: {argument} must be on cuda, got a tensor {list(value.shape)} on "
                f"{value.device}"
            )
    programs = tuple(grid(given) if callable(grid) else grid)
    if any(not 0 < n <= most for n, most in zip(programs, MOST_PROGRAMS, strict=False)):
        raise ValueError(f"{name}: a grid must be within {MOST_PROGRAMS}, got {programs}")


def _note(builds: Builds, kernel: Any) -> None:
    if kernel.hash in builds.kernels:
        return
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    builds.kernels[kernel.hash] = {
        "kernel": kernel.metadata.name,
        "warps": kernel.metadata.num_warps,
        "shared": kernel.metadata.shared,
        **read_usage(done.stdout),
    }
