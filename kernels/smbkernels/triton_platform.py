"""Where Triton kernels can run, and what is compiled ahead of time for the budget table."""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# under the interpreter kernels run on the CPU, for tests; it computes bf16 wrongly, so that
# kernels upcast on load and tests use fp32 inputs
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"


def missing(device: str) -> str | None:
    """Why Triton cannot run on this kind of device here, or None."""
    if device == "cuda":
        if not torch.cuda.is_available():
            return "no CUDA device"
        major, minor = torch.cuda.get_device_capability()
        old = f"compute capability must be 8.0 or higher, got {major}.{minor}"
        return old if major < 8 else None
    if device == "cpu" and INTERPRET:
        return None
    return "no CUDA device" if not torch.cuda.is_available() else f"tensors are on {device}"


def on_device_of_first(function: Callable) -> Callable:
    """Launch on the device of the first argument, a tensor or a list of them."""

    @functools.wraps(function)
    def call(first: Tensor | list[Tensor], *args: Any) -> Any:
        with torch.cuda.device_of(first if isinstance(first, Tensor) else first[0]):
            return function(first, *args)

    return call


@dataclass(frozen=True)
class Build:
    """One shipped configuration of a kernel, as it is compiled for the budget table.

    `signature` maps every argument in order to its Triton type ("*bf16", "i32", "fp32") or to
    "constexpr"; pointers, and integers named in `aligned`, divide by 16.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)  # such as enable_fp_fusion
    wide_loads: bool = True  # 16-byte global loads are expected
    tensor_cores: bool = False  # HGMMA is expected on sm_90
    archs: tuple[int, ...] = (80, 90, 100)  # it is launched on
