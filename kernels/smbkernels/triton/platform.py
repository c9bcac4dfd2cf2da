"""Where Triton kernels can run, and what is compiled ahead of time for the budget table."""

import os
from dataclasses import dataclass, field
from typing import Any

import torch

# under the interpreter kernels run on the CPU, for tests; it computes bf16 wrongly, so that
# kernels upcast on load and tests use fp32 inputs
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"


def missing(device: str) -> str | None:
    """Why Triton cannot run on this kind of device here, or None."""
    if device == "cuda":
        return None if torch.cuda.is_available() else "no CUDA device"
    if device == "cpu" and INTERPRET:
        return None
    return "no CUDA device" if not torch.cuda.is_available() else f"tensors are on {device}"


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
