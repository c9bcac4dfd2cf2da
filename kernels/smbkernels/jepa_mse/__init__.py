"""`masked_jepa_mse`: its reference is in `op`, its backends in `triton` and `cpp`."""

from smbkernels.jepa_mse.op import masked_jepa_mse, normalized_target

__all__ = ["masked_jepa_mse", "normalized_target"]
