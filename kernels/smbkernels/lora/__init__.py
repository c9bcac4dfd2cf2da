"""`lora_linear`: its reference is in `op`, its backends in `fused` and `triton`.

Both backends take the products that are cuBLAS's from `products`.
"""

from smbkernels.lora.op import lora_flops, lora_linear

__all__ = ["lora_flops", "lora_linear"]
