"""All operations by name, and the choice of their backends for a stretch of code.

with use("torch"): ...               every operation on its reference
with use(timeline_attention="sdpa"): ...
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from smbkernels.attention import timeline_attention
from smbkernels.catalog import AUTO, BACKENDS, REFERENCE, check_choice
from smbkernels.cross_entropy import linear_cross_entropy
from smbkernels.ema import ema_update_
from smbkernels.gated import swiglu
from smbkernels.jepa_mse import masked_jepa_mse
from smbkernels.lora import lora_linear
from smbkernels.matmul import linear
from smbkernels.norm import add_rms_norm
from smbkernels.operation import FORCED, Op, report
from smbkernels.rope import qk_norm_rope

OPERATIONS: tuple[Op[..., Any], ...] = (
    add_rms_norm,
    ema_update_,
    linear,
    linear_cross_entropy,
    lora_linear,
    masked_jepa_mse,
    qk_norm_rope,
    swiglu,
    timeline_attention,
)
OPS = {operation.name: operation for operation in OPERATIONS}
# the catalog says the same to callers that must not import torch
assert {name: tuple(b.name for b in o.backends) for name, o in OPS.items()} == BACKENDS


@contextmanager
def use(backend: str | None = None, /, **by_op: str) -> Iterator[None]:
    """Force a backend for all operations, or by name for some; never falls back.

    `auto` gives the choice back to the registry.

    Raises:
        ValueError: no such operation, or one that is meant has no such backend.
    """
    check_choice(backend, by_op)
    # implementations are imported here, because a compiled call cannot import
    for name in OPS if backend else by_op:
        choice = by_op.get(name, backend)
        if choice is not None and choice != AUTO:
            OPS[name].on(choice)
    before = dict(FORCED)
    if backend is not None:
        FORCED.clear()
    FORCED.update({**({"*": backend} if backend else {}), **by_op})
    try:
        yield
    finally:
        FORCED.clear()
        FORCED.update(before)


def everywhere() -> str:
    """The backend that is forced for all operations but those named, or "auto"."""
    return FORCED.get("*", AUTO)


def load(device: str | None = None) -> list[str]:
    """Import every implementation that a kind of device chooses from, before compilation.

    Args:
        device: cpu or cuda; default: cuda where there is one.

    Returns:
        Lines "operation: backend, then torch", for a log. What cannot run is logged once.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    lines = []
    for name, entry in OPS.items():
        report(entry.load(device))
        status = entry.status(device)
        ready = [b.name for b in entry.backends if device in b.devices and status[b.name] == "ok"]
        forced = FORCED.get(name, FORCED.get("*", AUTO))
        order = ", then ".join([*ready, REFERENCE]) if forced == AUTO else forced
        lines.append(f"{name}: {order}")
    return lines


def table(device: str) -> list[list[str]]:
    """Operations × backends, a header first: "ok", the reason why not, or "-" for none."""
    names = list(dict.fromkeys(b.name for o in OPS.values() for b in o.backends))
    rows = [["operation", *names, REFERENCE]]
    for name, entry in sorted(OPS.items()):
        status = entry.status(device)
        rows.append([name, *(status.get(n, "-") for n in names), status[REFERENCE]])
    return rows
