"""`ema_update_`: its reference is in `op`, its backends in `triton` and `cpp`."""

from smbkernels.ema.op import ema_update_, join, split

__all__ = ["ema_update_", "join", "split"]
