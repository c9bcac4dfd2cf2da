"""The operations smbfast rests on, and the registry that finds their implementations.

Floor 1: nothing here knows patients; only the standard library, torch and triton are imported.
"""

from smbkernels.ema_update import ema_update_
from smbkernels.linear_cross_entropy import linear_cross_entropy
from smbkernels.lora_linear import lora_linear
from smbkernels.masked_jepa_mse import masked_jepa_mse
from smbkernels.registry import load, use
from smbkernels.timeline_attention import Segments, timeline_attention

__all__ = [
    "Segments",
    "ema_update_",
    "linear_cross_entropy",
    "load",
    "lora_linear",
    "masked_jepa_mse",
    "timeline_attention",
    "use",
]
