"""The plan: FlashAttention 2 over tiles of segments, found in the table by the programs themselves.

Forward and the gradient of the queries: a program owns BLOCK_M queries of a segment for one head,
and visits the keys of the prefix that it sees in its trunk, then those of its own segment up to the
diagonal. The gradients of keys and values: a program owns BLOCK_N keys of a segment for one key
head; it visits, for each query head that shares it, the queries of its own segment from the
diagonal on, and the branches whose prefix reaches it. So gradients of shared keys add up in
registers, nothing is added by atomics, and the same inputs give the same bits. Only blocks that are
seen in part pay for a mask. The grid follows from shapes alone: T // BLOCK + S tiles bound what is
needed, empty ones exit; heavy tiles start first. Nothing is read back to the host.

Counted in bf16, for P visible pairs of each of H heads:
- forward: 4 P H C flops and (4 H + 4 G) T C + 4 H T bytes, as q, k, v, out and the log-sum-exp
  pass once. A tile reads keys and values from L2, where those of a segment fit: BLOCK_M flops for
  each byte.
- backward: the method's work is 10 P H C flops, the scores again and four products, and that is
  what the formula says. 14 are computed, 1.4 times the work: scores and the gradient of the
  probabilities are made both for queries and for keys, in exchange for no sums in memory. A first
  kernel makes rowsum(out * grad_out). As each of the three reads its operands once:
  (14 H + 12 G) T C + 20 H T bytes.
- the queries of branches are visited from the first that reaches a tile of keys to the last,
  whether those between reach it or not: branches in the order of their prefixes, rising or falling,
  cost nothing more.

Products are bf16 with fp32 sums, or fp32 throughout ("ieee", no TF32). Exponentials are of base 2.

T tokens, H query heads, G key/value heads, C head dim, S segments.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from smbkernels.attention.kernels import (
    _timeline_attention_bwd_key_kernel,
    _timeline_attention_bwd_query_kernel,
    _timeline_attention_bwd_rows_kernel,
    _timeline_attention_fwd_kernel,
)
from smbkernels.attention.op import Inputs, forward_backward
from smbkernels.attention.op import timeline_attention as attention
from smbkernels.triton_platform import INTERPRET, Build, missing, on_device_of_first

__all__ = ["builds", "missing", "timeline_attention"]

# set explicitly, because its default differs between versions of Triton
OPTIONS = {"enable_fp_fusion": True}
SCAN = 128  # rows of the table that a program looks at together
ROWS = 32  # that a program of the first backward kernel owns


@dataclass(frozen=True)
class Launch:
    """Of one kernel: queries and keys of a block, and how it is compiled."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Settings:
    """Of the three kernels: outputs, gradient of queries, gradients of keys and values."""

    forward: Launch
    query: Launch
    key: Launch

    @classmethod
    def of(cls, head_dim: int, dtype: torch.dtype, arch: int) -> "Settings":
        """The largest tiles that do not spill on sm_<arch> under Triton 3.6 and 3.9."""
        family = "fp32" if dtype == torch.float32 else f"sm_{arch // 10}x"
        launches = TILES.get(family, TILES["sm_8x"])[64 if head_dim <= 64 else 128]
        return cls(*(Launch(*sizes) for sizes in launches))


# by head dim; without a row of its own a chip is served as sm_8x, within 99 KiB of shared memory
TILES = {
    # without tensor cores a thread holds rows of whole heads
    "fp32": {
        64: ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
        128: ((32, 32, 8, 1), (16, 16, 8, 1), (16, 32, 8, 1)),
    },
    "sm_8x": {
        64: ((128, 64, 8, 3), (128, 64, 8, 3), (32, 128, 8, 2)),
        128: ((64, 64, 4, 2), (64, 64, 4, 2), (32, 64, 8, 3)),
    },
    # a warpgroup multiplies 64 rows and sums in registers
    "sm_9x": {
        64: ((128, 128, 8, 3), (128, 128, 8, 2), (64, 128, 8, 2)),
        128: ((128, 128, 8, 2), (128, 64, 8, 3), (32, 128, 8, 2)),
    },
    # sums are in tensor memory
    "sm_10x": {
        64: ((128, 128, 8, 3), (128, 128, 8, 2), (64, 128, 8, 2)),
        128: ((128, 64, 8, 3), (128, 64, 8, 3), (64, 128, 8, 2)),
    },
}


@cache
def _settings(head_dim: int, dtype: torch.dtype, device: torch.device) -> Settings:
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return Settings.of(head_dim, dtype, 10 * major + minor)


def _strided(x_THC: Tensor) -> Tensor:
    """The same, copied where a row of a head is scattered, or offsets in a tile pass 2^31."""
    fits = x_THC.stride(2) == 1 and x_THC.stride(0) < 2**23
    return x_THC if fits else x_THC.contiguous()


def _slots(tokens: int, segments: int, block: int) -> int:
    """A bound of the tiles of all segments; see `_find_tile`."""
    return tokens // block + segments


def _sizes(query_THC: Tensor, key_TGC: Tensor, scale: float) -> dict[str, Any]:
    """What the kernels that multiply have in common."""
    return {
        "scale_log2": scale * math.log2(math.e),
        "GROUP": query_THC.shape[1] // key_TGC.shape[1],
        "HEAD_DIM": query_THC.shape[2],
        # of products; the interpreter computes in fp32 alone
        "DOT": tl.float32 if INTERPRET else getattr(tl, str(query_THC.dtype).split(".")[1]),
        "SCAN": SCAN,
    }


def _strides(**tensors: Tensor) -> dict[str, int]:
    """stride_<name>t of tokens and stride_<name>h of heads."""
    axes = ((0, "t"), (1, "h"))
    return {f"stride_{n}{axis}": x.stride(i) for n, x in tensors.items() for i, axis in axes}


def _launch(launch: Launch) -> dict[str, Any]:
    return {
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        **OPTIONS,
    }


@on_device_of_first
def _launch_fwd(inputs: Inputs) -> tuple[Tensor, Tensor]:
    query_THC, key_TGC, value_TGC, table_S6, scale = inputs
    if scale <= 0:
        raise ValueError(f"scale must be positive, got {scale}")
    T, H, C = query_THC.shape
    S = len(table_S6)
    query_THC, key_TGC, value_TGC = map(_strided, (query_THC, key_TGC, value_TGC))
    out_THC = query_THC.new_empty(T, H, C)
    lse_HT = query_THC.new_empty(H, T, dtype=torch.float32)
    if not T:
        return out_THC, lse_HT
    launch = _settings(C, query_THC.dtype, query_THC.device).forward
    slots = _slots(T, S, launch.block_m)
    _timeline_attention_fwd_kernel[(slots * H,)](
        out_ptr=out_THC,
        lse_ptr=lse_HT,
        q_ptr=query_THC,
        k_ptr=key_TGC,
        v_ptr=value_TGC,
        table_ptr=table_S6.contiguous(),
        tokens=T,
        heads=H,
        segments=S,
        slots=slots,
        **_strides(q=query_THC, k=key_TGC, v=value_TGC),
        **_sizes(query_THC, key_TGC, scale),
        **_launch(launch),
    )
    return out_THC, lse_HT


@on_device_of_first
def _launch_bwd(
    grad_out_THC: Tensor, out_THC: Tensor, lse_HT: Tensor, inputs: Inputs
) -> tuple[Tensor, ...]:
    query_THC, key_TGC, value_TGC, table_S6, scale = inputs
    T, H, C = query_THC.shape
    G, S = key_TGC.shape[1], len(table_S6)
    given = map(_strided, (grad_out_THC, query_THC, key_TGC, value_TGC))
    grad_out_THC, query_THC, key_TGC, value_TGC = given
    grads = tuple(query_THC.new_empty(T, n, C) for n in (H, G, G))
    if not T:
        return grads
    settings = _settings(C, query_THC.dtype, query_THC.device)
    delta_HT = query_THC.new_empty(H, T, dtype=torch.float32)
    # the row of keys at which a query stops seeing, in its own segment and in its trunk
    end_2T = query_THC.new_empty(2, T, dtype=torch.int32)
    out_THC, lse_HT, table_S6 = (x.contiguous() for x in (out_THC, lse_HT, table_S6))
    arguments = {
        "q_ptr": query_THC,
        "k_ptr": key_TGC,
        "v_ptr": value_TGC,
        "grad_ptr": grad_out_THC,
        "lse_ptr": lse_HT,
        "delta_ptr": delta_HT,
        "table_ptr": table_S6,
        "tokens": T,
        "segments": S,
        "scale": scale,
        **_strides(q=query_THC, k=key_TGC, v=value_TGC, g=grad_out_THC),
        **_sizes(query_THC, key_TGC, scale),
    }
    _timeline_attention_bwd_rows_kernel[(_slots(T, S, ROWS) * H,)](
        delta_ptr=delta_HT,
        end_ptr=end_2T,
        out_ptr=out_THC,
        grad_ptr=grad_out_THC,
        table_ptr=table_S6,
        tokens=T,
        heads=H,
        segments=S,
        **_strides(g=grad_out_THC),
        HEAD_DIM=C,
        BLOCK_M=ROWS,
        SCAN=SCAN,
        num_warps=4,
        **OPTIONS,
    )
    slots = _slots(T, S, settings.query.block_m)
    _timeline_attention_bwd_query_kernel[(slots * H,)](
        q_grad_ptr=grads[0], heads=H, slots=slots, **arguments, **_launch(settings.query)
    )
    slots = _slots(T, S, settings.key.block_n)
    _timeline_attention_bwd_key_kernel[(slots * G,)](
        k_grad_ptr=grads[1],
        v_grad_ptr=grads[2],
        end_ptr=end_2T,
        kv_heads=G,
        **arguments,
        **_launch(settings.key),
    )
    return grads


timeline_attention = forward_backward("triton", _launch_fwd, _launch_bwd, on_device=True)
timeline_attention.__doc__ = attention.__doc__


_KERNELS = {
    "forward": _timeline_attention_fwd_kernel,
    "rows": _timeline_attention_bwd_rows_kernel,
    "query": _timeline_attention_bwd_query_kernel,
    "key": _timeline_attention_bwd_key_kernel,
}


def builds() -> list[Build]:
    """Both head dims in both dtypes, four query heads to a key head as in 8B models."""
    archs: dict[tuple[torch.dtype, int, str, Launch], list[int]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        for head_dim in (128, 64):
            for arch in (80, 90, 100):
                settings = Settings.of(head_dim, dtype, arch)
                kinds = {"rows": Launch(ROWS, 0, 4, 3), **vars(settings)}
                for kind, launch in kinds.items():
                    archs.setdefault((dtype, head_dim, kind, launch), []).append(arch)
    return [_build(*key, tuple(chips)) for key, chips in archs.items()]


def _build(
    dtype: torch.dtype, head_dim: int, kind: str, launch: Launch, archs: tuple[int, ...]
) -> Build:
    name = "bf16" if dtype == torch.bfloat16 else "fp32"
    sizes = {"GROUP": 4, "HEAD_DIM": head_dim, "DOT": getattr(tl, str(dtype).split(".")[1])}
    sizes |= {"BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n, "SCAN": SCAN}
    types = dict.fromkeys(("lse_ptr", "delta_ptr", "scale", "scale_log2"), "fp32")
    types |= dict.fromkeys(("table_ptr", "end_ptr"), "i32") | dict.fromkeys(sizes, "constexpr")
    signature = {}
    for argument in _KERNELS[kind].arg_names:
        pointer = argument.endswith("_ptr")
        element = types.get(argument, name if pointer else "i32")
        signature[argument] = f"*{element}" if pointer else element
    return Build(
        name=f"timeline_attention/{name} {head_dim} {kind} {launch.block_m} {launch.block_n}",
        kernel=_KERNELS[kind],
        signature=signature,
        constexprs={k: v for k, v in sizes.items() if k in signature},
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        aligned=tuple(a for a in signature if a.startswith("stride")),
        options=OPTIONS,
        tensor_cores=name == "bf16" and kind != "rows",
        archs=archs,
    )
