"""Runs a module of the project as it would run on a GPU, without one.

    python -m bench.fakegpu --run bench.step --only=W1 --rivals=B4 --rounds=1
    python -m bench.fakegpu --layers=1 --run MODULE ARGUMENTS

The module is run as `__main__` while "cuda" is a device of which only shapes exist. That finds
typing errors, wrong arguments, tensors on the wrong device, kernels that cannot be launched, and
more memory than the GPU has. Times are meaningless (an event is a millisecond from any other), and
so are values: what is read back is True, 1 or 1e-6, and `torch.compile` returns what it is given. A
process that the module starts sees no GPU, unless it is started by `command` of this module.
`is_rehearsed` tells a script that it is one.
"""

import runpy
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from unittest import mock

from bench.fakegpu import shim
from bench.fakegpu.device import MEMORY, Memory, pretended_gpu, untraced
from bench.fakegpu.launches import recorded
from bench.fakegpu.ledger import Ledger
from bench.step import workloads

SIZES = ("QWEN3_8B", "QWEN3_1B7", "QWEN3_0B6", "QWEN3_8B_ROWS")


def is_rehearsed() -> bool:
    """Whether this process has a pretended GPU."""
    return shim.is_started()


def command(module: str, arguments: Sequence[str], *, layers: int = 0) -> list[str]:
    """What rehearses a module in a process of its own, after `sys.executable`."""
    few = [f"--layers={layers}"] if layers else []
    return ["-m", "bench.fakegpu", *few, "--run", module, *arguments]


def rehearse(module: str, arguments: Sequence[str], *, layers: int = 0) -> Ledger:
    """Run a module in this process, which `bench.fakegpu.shim` has started.

    Args:
        layers: of the models of `bench.step.workloads`; 0 leaves them as they are.

    Returns:
        What it gave the GPU to do.

    Raises:
        MemoryError: it held more than the GPU has.
        Exception: whatever the module raises; SystemExit with 0 is none.
    """
    ledger = Ledger()
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.object(sys, "argv", [module, *arguments]))
        enter(warnings.catch_warnings())
        for name in SIZES if layers else ():
            size = replace(getattr(workloads, name), layers=layers)
            enter(mock.patch.object(workloads, name, size))
        enter(pretended_gpu())
        enter(recorded(ledger))
        enter(untraced())
        enter(ledger)
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as done:
            if done.code:
                raise
    if Memory.highest > MEMORY:
        raise MemoryError(
            f"{module} must hold at most {MEMORY / 2**30:.0f} GiB, "
            f"got {Memory.highest / 2**30:.1f} GiB"
        )
    return ledger
