"""The operations smbfast rests on. The body of each public function is its reference.

Floor 1: nothing here knows patients; only torch is imported.
"""

from smbkernels.ema_update import ema_update_
from smbkernels.linear_cross_entropy import linear_cross_entropy
from smbkernels.masked_jepa_mse import masked_jepa_mse

__all__ = ["ema_update_", "linear_cross_entropy", "masked_jepa_mse"]
