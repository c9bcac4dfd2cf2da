"""`timeline_attention`: `segments` defines who sees whom, `op` holds the reference.

| file | what is in it |
| --- | --- |
| `segments` | the table of segments, and the rule of the packed attention as a dense mask |
| `op` | the reference, and the custom operation that a backend becomes |
| `triton`, `kernels` | the backend on a GPU: what it launches, and its Triton kernels |
| `varlen`, `engines` | the backend over flash-attn, or over the varlen attention of torch |
| `two_calls`, `flash` | two varlen calls without copies of own keys, over torch's flash attention |
| `cudnn` | dense calls of cuDNN, merged in the same way |
| `cpp` | the backend on a CPU, in C++ |
| `sdpa` | on a CPU by torch alone: fp64, fp16, and where there is no compiler |
"""

from smbkernels.attention.op import attention_flops, timeline_attention
from smbkernels.attention.segments import Segments, visible

__all__ = ["Segments", "attention_flops", "timeline_attention", "visible"]
