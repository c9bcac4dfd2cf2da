"""The operations smbfast rests on, and the registry that finds their implementations.

Floor 1: nothing here knows patients; only the standard library, torch and triton are imported.

The names below are imported when one of them is first used, so that `smbkernels.catalog` can be
read without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smbkernels.attention import Segments, timeline_attention
    from smbkernels.cross_entropy import linear_cross_entropy
    from smbkernels.ema import ema_update_
    from smbkernels.gated import swiglu
    from smbkernels.jepa_mse import masked_jepa_mse
    from smbkernels.lora import lora_linear
    from smbkernels.matmul import linear
    from smbkernels.norm import add_rms_norm
    from smbkernels.registry import load, use
    from smbkernels.rope import qk_norm_rope

__all__ = [
    "Segments",
    "add_rms_norm",
    "ema_update_",
    "linear",
    "linear_cross_entropy",
    "load",
    "lora_linear",
    "masked_jepa_mse",
    "qk_norm_rope",
    "swiglu",
    "timeline_attention",
    "use",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    registry = import_module("smbkernels.registry")
    attention = import_module("smbkernels.attention")
    # all at once: a compiled function that reads another name finds it here and imports nothing
    names = {**registry.OPS, "load": registry.load, "use": registry.use}
    globals().update(names, Segments=attention.Segments)
    return globals()[name]
