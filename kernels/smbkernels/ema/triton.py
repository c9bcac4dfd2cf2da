"""The plan: a program owns a tile of one average; a launch serves all matrices of one kind.

Per element it reads W and the average and writes the average: 10 bytes for a bf16 W and the bf16
and int16 halves. B A exists in registers alone, one fused multiply-add per rank, in order of k; the
rows of A and columns of B it takes come from L1 and L2. A tile's loads wait while its neighbours on
the multiprocessor multiply: 3 to 6 fit, each with 24 KiB on the way.

Matrices are of one kind when dtypes, rank and alignment agree. Their addresses and sizes stand in a
table on the device, beside a list of the matrix that each program serves. Both are kept until an
address changes, so that a step copies nothing to the device. 16-byte accesses need addresses and
rows that divide by 16; matrices without make a kind of their own, and so do those that leave no
tile in part, which need no masks.

N out, K in features, R rank, M matrices of a kind, P programs.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from smbkernels.ema.op import Lists, in_place
from smbkernels.triton_platform import Build, missing

__all__ = ["builds", "ema_update_", "missing"]

# no step but B A may be contracted; see also `minus_zero` in the kernel
OPTIONS = {"enable_fp_fusion": False}
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}

# columns of the table: five addresses, the shape, the first program that serves the matrix
AVERAGE, REMAINDER, WEIGHT, B, A, HEIGHT, WIDTH, FIRST, COLUMNS = map(tl.constexpr, range(9))


@dataclass(frozen=True)
class Settings:
    """Of a launch: the tile, the ranks of B A that are unrolled, the warps that share a tile."""

    block_n: int
    block_k: int
    unroll: int
    num_warps: int

    @classmethod
    def of(cls, rank: int, aligned: bool) -> "Settings":
        """32 elements per thread, in 4 rows or more that share each 16-byte load of A.

        Unaligned, 8 that are loaded one by one; more would spill, as would more ranks at once.
        """
        if not rank:
            return cls(1, 4096 if aligned else 1024, 0, 4)
        return cls(64 if aligned else 16, 64, rank if rank <= 16 else math.gcd(rank, 4), 4)


class Kind(NamedTuple):
    """What the matrices of a launch have in common."""

    device: torch.device
    weight: torch.dtype
    b: torch.dtype
    a: torch.dtype
    rank: int
    split: bool
    aligned: bool  # every address, in bytes, and the width divide by 16
    even: bool  # no tile is in part


class Matrix(NamedTuple):
    """A row of the table, less the last column."""

    kind: Kind
    addresses: tuple[int, ...]
    height: int
    width: int
    scale: float


@triton.jit
def _pointer(address, TYPE: tl.constexpr, MULTIPLE: tl.constexpr):
    # the compiler must hear it of the pointer: it forgets what divides the integer
    return tl.multiple_of(address.to(tl.pointer_type(TYPE)), MULTIPLE)


@triton.jit
def _tile_start(tile, width, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """First row and column of a tile, in 64 bits: a matrix may have more than 2^31 elements."""
    tiles_k = tl.cdiv(width, BLOCK_K).to(tl.int32)
    start_n = (tile // tiles_k).to(tl.int64) * BLOCK_N
    return start_n, (tile % tiles_k).to(tl.int64) * BLOCK_K


@triton.jit
def _ema_update_kernel(
    table_ptr,
    matrix_ptr,
    scale_ptr,
    one_minus_tau,
    minus_zero,
    W_TYPE: tl.constexpr,
    B_TYPE: tl.constexpr,
    A_TYPE: tl.constexpr,
    R: tl.constexpr,
    SPLIT: tl.constexpr,
    MULTIPLE: tl.constexpr,
    EVEN: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    matrix = tl.load(matrix_ptr + program)
    row_ptr = table_ptr + matrix * COLUMNS
    N = tl.load(row_ptr + HEIGHT)
    K = tl.multiple_of(tl.load(row_ptr + WIDTH), MULTIPLE)
    tile = program - tl.load(row_ptr + FIRST).to(tl.int32)
    start_n, start_k = _tile_start(tile, K, BLOCK_N, BLOCK_K)

    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    offs_NK = start_n * K + start_k + (offs_n.to(tl.int64) * K)[:, None] + offs_k[None, :]
    # what lies outside of a matrix is neither read nor written, so that its value is free
    if EVEN:
        mask_n = None
        mask_k = None
        mask_NK = None
    else:
        mask_n = offs_n < N - start_n
        mask_k = offs_k < K - start_k
        mask_NK = mask_n[:, None] & mask_k[None, :]

    weight_ptr = _pointer(tl.load(row_ptr + WEIGHT), W_TYPE, MULTIPLE)
    target_NK = tl.load(weight_ptr + offs_NK, mask=mask_NK).to(tl.float32)
    average = tl.load(row_ptr + AVERAGE)
    if SPLIT:
        high_ptr = _pointer(average, tl.int16, MULTIPLE)
        low_ptr = _pointer(tl.load(row_ptr + REMAINDER), tl.int16, MULTIPLE)
        high_NK = tl.load(high_ptr + offs_NK, mask=mask_NK).to(tl.int32)
        low_NK = tl.load(low_ptr + offs_NK, mask=mask_NK).to(tl.int32)
        full_NK = ((high_NK << 16) + low_NK).to(tl.float32, bitcast=True)
    else:
        full_ptr = _pointer(average, tl.float32, MULTIPLE)
        full_NK = tl.load(full_ptr + offs_NK, mask=mask_NK)

    # products are fused multiply-adds of a -0 that the compiler cannot see, which rounds alike:
    # ptxas of Triton 3.6 fuses packed products of sm_100 with the next sum, asked not to
    if R > 0:
        b_ptr = _pointer(tl.load(row_ptr + B), B_TYPE, MULTIPLE) + start_n * R
        a_ptr = _pointer(tl.load(row_ptr + A), A_TYPE, MULTIPLE) + start_k
        if R == UNROLL:
            delta_NK = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        else:
            # zeros made of a loaded tile give the loop the layout of that tile
            delta_NK = tl.minimum(tl.abs(full_NK), 0.0)
        for first in range(0, R, UNROLL):
            for k in tl.static_range(UNROLL):
                b_N = tl.load(b_ptr + offs_n * R + (first + k), mask=mask_n).to(tl.float32)
                a_K = tl.load(a_ptr + (first + k) * K + offs_k, mask=mask_k).to(tl.float32)
                delta_NK = tl.fma(b_N[:, None], a_K[None, :], delta_NK)
        target_NK = target_NK + tl.fma(tl.load(scale_ptr + matrix), delta_NK, minus_zero)
    full_NK = full_NK + tl.fma(one_minus_tau, target_NK - full_NK, minus_zero)

    if SPLIT:
        # a NaN of a GPU is 0x7FFFFFFF, which rounding up would carry over into -0
        bits_NK = tl.minimum(full_NK.to(tl.int32, bitcast=True), 0x7FFF7FFF)
        high_NK = (bits_NK + 0x8000) >> 16
        tl.store(high_ptr + offs_NK, high_NK.to(tl.int16), mask=mask_NK)
        tl.store(low_ptr + offs_NK, bits_NK.to(tl.int16), mask=mask_NK)
    else:
        tl.store(full_ptr + offs_NK, full_NK, mask=mask_NK)


class Plan(NamedTuple):
    """A launch."""

    kind: Kind
    table_MC: Tensor
    scale_M: Tensor
    matrix_P: Tensor


@lru_cache(maxsize=64)
def _plans(matrices: tuple[Matrix, ...]) -> tuple[Plan, ...]:
    """The launches that serve these matrices, with their tables on the device."""
    members: dict[Kind, list[Matrix]] = {}
    for matrix in matrices:
        members.setdefault(matrix.kind, []).append(matrix)
    return tuple(_plan(kind, of_kind) for kind, of_kind in members.items())


def _plan(kind: Kind, members: list[Matrix]) -> Plan:
    settings = Settings.of(kind.rank, kind.aligned)
    rows, tiles, first = [], [], 0
    for m in members:
        rows.append([*m.addresses, m.height, m.width, first])
        tiles.append(
            triton.cdiv(m.height, settings.block_n) * triton.cdiv(m.width, settings.block_k)
        )
        first += tiles[-1]
    table_MC = torch.tensor(rows, dtype=torch.int64)
    scale_M = torch.tensor([m.scale for m in members], dtype=torch.float32)
    if kind.device.type == "cuda":
        # from pinned memory a copy does not wait for the device
        table_MC = table_MC.pin_memory().to(kind.device, non_blocking=True)
        scale_M = scale_M.pin_memory().to(kind.device, non_blocking=True)
    return Plan(kind, table_MC, scale_M, _owners(kind.device, tuple(tiles)))


@lru_cache(maxsize=64)
def _owners(device: torch.device, tiles: tuple[int, ...]) -> Tensor:
    """For each program the index of its matrix, int32 [P]; for other addresses the same."""
    count_M = torch.tensor(tiles)
    count_M = count_M.pin_memory() if device.type == "cuda" else count_M
    index_M = torch.arange(len(tiles), dtype=torch.int32, device=device)
    count_M = count_M.to(device, non_blocking=True)
    return torch.repeat_interleave(index_M, count_M, output_size=sum(tiles))


def _matrices(lists: Lists) -> Iterator[Matrix]:
    """What the tables are made of, for each average that has elements."""
    average, remainder, weight, b, a, scale = lists
    for i, (high, w) in enumerate(zip(average, weight, strict=True)):
        rank = b[i].shape[1] if b else 0
        # without an adapter a matrix is one row, whatever its shape
        height, width = high.shape if rank else (1, high.numel())
        if not high.numel():
            continue
        w_b = b[i] if rank else w
        w_a = a[i] if rank else w
        low = remainder[i] if remainder else high
        addresses = tuple(x.data_ptr() for x in (high, low, w, w_b, w_a))
        aligned = width % 16 == 0 and all(address % 16 == 0 for address in addresses)
        settings = Settings.of(rank, aligned)
        even = aligned and height % settings.block_n == 0 and width % settings.block_k == 0
        types = w.dtype, w_b.dtype, w_a.dtype
        kind = Kind(high.device, *types, rank, bool(remainder), aligned, even)
        yield Matrix(kind, addresses, height, width, scale[i])


def _constexprs(kind: Kind) -> dict[str, Any]:
    settings = Settings.of(kind.rank, kind.aligned)
    return {
        "W_TYPE": TYPES[kind.weight],
        "B_TYPE": TYPES[kind.b],
        "A_TYPE": TYPES[kind.a],
        "R": kind.rank,
        "SPLIT": kind.split,
        "MULTIPLE": 16 if kind.aligned else 1,
        "EVEN": kind.even,
        "UNROLL": settings.unroll,
        "BLOCK_N": settings.block_n,
        "BLOCK_K": settings.block_k,
    }


def _launch(lists: Lists, tau: float) -> None:
    # named, because the table holds their addresses alone
    b, a = [x.contiguous() for x in lists.b], [x.contiguous() for x in lists.a]
    for plan in _plans(tuple(_matrices(lists._replace(b=b, a=a)))):
        kind = plan.kind
        with torch.cuda.device_of(plan.table_MC):
            _ema_update_kernel[(len(plan.matrix_P),)](
                table_ptr=plan.table_MC,
                matrix_ptr=plan.matrix_P,
                scale_ptr=plan.scale_M,
                one_minus_tau=1 - tau,
                minus_zero=-0.0,
                **_constexprs(kind),
                num_warps=Settings.of(kind.rank, kind.aligned).num_warps,
                **OPTIONS,
            )


ema_update_ = in_place("triton", _launch)


def builds() -> list[Build]:
    """Kinds of an 8B model with an adapter and without, then ragged and unaligned ones."""
    bf16, fp32 = torch.bfloat16, torch.float32
    # weight, adapter, rank, split, aligned, even
    cases = {
        "": [
            (bf16, bf16, 16, True, True, True),
            (bf16, fp32, 16, True, True, True),
            (bf16, bf16, 64, True, True, True),
            (bf16, fp32, 64, True, True, True),
            (bf16, bf16, 0, True, True, True),
            (bf16, fp32, 16, False, True, True),
            (fp32, fp32, 16, False, True, True),
            (fp32, fp32, 0, False, True, True),
        ],
        " ragged": [(bf16, fp32, 16, True, True, False), (fp32, fp32, 0, False, True, False)],
        " unaligned": [(bf16, fp32, 16, True, False, False), (bf16, bf16, 0, True, False, False)],
    }
    configurations = []
    for name, kinds in cases.items():
        for weight, adapter, rank, split, aligned, even in kinds:
            kind = Kind(torch.device("cuda"), weight, adapter, adapter, rank, split, aligned, even)
            constexprs = _constexprs(kind)
            label = f"{TYPES[weight]} rank {rank} {TYPES[adapter]} {'split' if split else 'fp32'}"
            configurations.append(
                Build(
                    name=f"ema_update/{label}{name}",
                    kernel=_ema_update_kernel,
                    signature={
                        "table_ptr": "*i64",
                        "matrix_ptr": "*i32",
                        "scale_ptr": "*fp32",
                        "one_minus_tau": "fp32",
                        "minus_zero": "fp32",
                        **dict.fromkeys(constexprs, "constexpr"),
                    },
                    constexprs=constexprs,
                    num_warps=Settings.of(rank, aligned).num_warps,
                    options=OPTIONS,
                    wide_loads=aligned,
                )
            )
    return configurations
