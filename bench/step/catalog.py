"""The variants of each workload by name: what builds each, or why it is not run."""

from collections.abc import Callable
from functools import partial

import torch

from bench.step.nodes import Nodes, PlainNodes
from bench.step.plain import Plain, fits
from bench.step.rivals import Packed, Padded
from bench.step.variants import Smbfast, Variant
from bench.step.workloads import Workload

OURS = "B4"
BF16 = "B4 bf16"
RIVALS = (
    *("B0", "B0c", "B1", "B1c", "B2", "B3", "B3'", "B3' compiled"),
    *("B3' + oneDNN", "B3' compiled + oneDNN", "E1", "E1 + oneDNN", "E1 bf16"),
)
PLAIN_OPS = ("linear", "lora_linear", "linear_cross_entropy", "masked_jepa_mse")
_MEMORY = "saves memory, not time: ask for it by --rivals"
_ONEDNN = "needs a line that few users know: ask for it by --rivals"
NOT_ASKED_FOR = {  # of a CPU
    "B0c": _MEMORY,
    "B1c": _MEMORY,
    "B2": "B3' compiled shares the prefix besides: ask for it by --rivals",
    **{name: _ONEDNN for name in RIVALS if name.endswith("oneDNN")},
}
Make = Callable[..., Variant]


def variants(workload: Workload, device: str, *, ablate: bool) -> dict[str, Make | str]:
    """Everything that can compute a workload, or why it cannot here."""
    if workload.nodes:
        return {
            "B1": partial(Nodes, shared=False),
            "E1": PlainNodes,
            OURS: partial(Nodes, shared=True),
        }
    makes: dict[str, Make | str] = {
        "B0": Padded,
        "B0c": partial(Padded, checkpoint=True),
        "B1": Packed,
        "B1c": partial(Packed, checkpoint=True),
        "B2": partial(Packed, compiled=True),
        "B3": partial(Packed, shared=True, compiled=True, flex=True),
        "B3'": partial(Packed, shared=True),
        "B3' compiled": partial(Packed, shared=True, compiled=True),
        "B3' + oneDNN": partial(Packed, shared=True, precision="medium"),
        "B3' compiled + oneDNN": partial(Packed, shared=True, compiled=True, precision="medium"),
        "E1": Plain,
        "E1 + oneDNN": partial(Plain, precision="medium"),
        "E1 bf16": partial(Plain, bf16=True),
        OURS: Smbfast,
        BF16: partial(Smbfast, bf16=True),
    }
    for name in makes:
        if reason := _reason(name, workload, device):
            makes[name] = reason
    return makes | (_ablations() if ablate else {})


def _ablations() -> dict[str, Make | str]:
    """Ours with a part of it changed."""
    makes: dict[str, Make | str] = {f"{OURS} merged target": partial(Smbfast, form="merged")}
    for what in ("mlp", "full"):
        makes[f"{OURS} recompute {what}"] = partial(Smbfast, recompute=what)
    for op in PLAIN_OPS:
        makes[f"{OURS} torch {op}"] = partial(Smbfast, plain=(op,))
    merged = partial(Smbfast, form="merged", plain=("ema_update_",))
    makes[f"{OURS} merged target, torch ema_update_"] = merged
    makes[f"{OURS} torch timeline_attention"] = "its reference holds the scores of all pairs"
    return makes


def _reason(name: str, workload: Workload, device: str) -> str:
    """Why a variant is not run on a workload; empty: it is."""
    if name.startswith("E1") and not fits(workload):
        return "its sequences have several lengths, which B0 pads"
    if workload.size.whole and name.endswith("bf16"):
        return "no weight is frozen, and what is trained is fp32"
    if device == "cuda":
        only_on_cpu = name.endswith(("bf16", "oneDNN"))
        return "on a GPU every variant computes in bf16" if only_on_cpu else ""
    if name == "B3":
        return "FlexAttention has no backward on a CPU"
    if name.endswith("oneDNN") and _computes_in_bf16():
        return "on a CPU with AMX the line computes in bf16"
    return ""


def _computes_in_bf16() -> bool:
    """Whether oneDNN takes fp32 products at precision "medium" as bf16: on a CPU with AMX it does.

    Without AMX they stay in fp32, and "medium" is only the way to oneDNN's kernels.
    """
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())
