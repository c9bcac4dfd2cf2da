"""The moving average of low-rank products, kept low-rank: P <- tau P + (1 - tau) B A, P = U V.

    append     U <- [tau U | (1 - tau) B]      V <- [V ; A]          exact but for rounding
    truncate   U V <- the nearest product of rank R (Eckart-Young), once the columns are used up

for M modules of one shape in one call. U and V have Q columns and rows: R of the core, then one
block of r for each step since the last truncation, then zeros, so that shapes never change.

Truncation needs no factor of width N or K but the Gram matrices, in fp64:

    D  equal lengths of a column of U and its row of V: U D, D^-1 V
    U'U = L L'                              so U L'^-1 is orthonormal
    L' (V V') L = E S^2 E'                  the squared singular values of U V
    U <- U L'^-1 E_R      V <- E_R' L' V    the R largest

Whatever L is, E E' = 1 makes the product exact; only which directions come first depends on it. A
shift of 2e-12 of the trace keeps L regular where columns are dependent: A hardly moves in k steps,
so they nearly are. In fp32 the shift would have to be so large that it decides the order.

The decay is folded into U, not kept beside it: a forward then reads U and V as they are, and no
factor that changes from step to step enters a compiled graph; it costs 8 bytes an element of U.

Bytes and flops of a step, Qwen3-8B (252 matrices, r = 16, R = 64, k = 4), counted by `cost`:
5.5 GB and 36 GFLOP (fp64 but for 0.2); averaging the merged weights, 69.5 GB and 257 GFLOP. On CUDA
`eigh` takes all matrices at once from torch 2.12; before, one after another.

M modules, N out, K in features, Q columns held, R of the core, r of one step.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 25  # elements of a factor that are held in fp64 at a time (256 MiB)
SHIFT = 1 << 13  # of the Cholesky factor, in units of the trace times the machine's epsilon


class Cost(NamedTuple):
    """Bytes moved and floating-point operations of one step, on average over k steps."""

    bytes: float
    flops: float


@torch.no_grad()
def append_(
    u_MNQ: Tensor, v_MQK: Tensor, b: list[Tensor], a: list[Tensor], *, start: int, tau: float
) -> None:
    """Fold B A of every module in, at columns `start` and on.

    Args:
        u_MNQ, v_MQK: fp32 or fp64, contiguous; columns from `start` on are zero.
        b: M tensors [N, r]. a: M tensors [r, K].
        tau: decay, in [0, 1].
    """
    end = start + b[0].shape[1]
    u_MNQ.mul_(tau)
    torch._foreach_copy_(list(u_MNQ[:, :, start:end]), b)
    u_MNQ[:, :, start:end].mul_(1 - tau)
    torch._foreach_copy_(list(v_MQK[:, start:end]), a)


@torch.no_grad()
def truncate_(
    u_MNQ: Tensor, v_MQK: Tensor, rank: int, *, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Keep the nearest product of that rank in the first columns; the others become zero.

    Args:
        u_MNQ, v_MQK: fp32 or fp64, contiguous, any rank, zero too.
        dtype: of the Gram matrices and of what follows from them.

    Returns:
        ‖discarded‖ and ‖U V‖ of each module (Frobenius), `dtype` [M].
    """
    size = max(1, CHUNK // (u_MNQ.shape[2] * max(u_MNQ.shape[1], v_MQK.shape[2])))
    parts = zip(u_MNQ.split(size), v_MQK.split(size), strict=True)
    discarded, whole = zip(*(_truncate(u, v, rank, dtype) for u, v in parts), strict=True)
    return torch.cat(discarded), torch.cat(whole)


def _truncate(u_MNQ: Tensor, v_MQK: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    wide_MNQ, wide_MQK = u_MNQ.to(dtype), v_MQK.to(dtype)
    gram_u_MQQ, gram_v_MQQ = wide_MNQ.mT @ wide_MNQ, wide_MQK @ wide_MQK.mT
    length_u_MQ = gram_u_MQQ.diagonal(dim1=1, dim2=2)
    length_v_MQ = gram_v_MQQ.diagonal(dim1=1, dim2=2)
    live_MQ = (length_u_MQ > 0) & (length_v_MQ > 0)
    # a column that is zero on either side adds nothing: it gets no weight
    even_MQ = torch.where(live_MQ, (length_v_MQ / length_u_MQ).pow(0.25), 0)
    back_MQ = torch.where(live_MQ, 1 / even_MQ, 0)
    gram_u_MQQ = gram_u_MQQ * even_MQ[:, :, None] * even_MQ[:, None]
    gram_v_MQQ = gram_v_MQQ * back_MQ[:, :, None] * back_MQ[:, None]
    trace_M1 = gram_u_MQQ.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
    shift_M1 = trace_M1 * (SHIFT * torch.finfo(dtype).eps)
    # where a column has no weight, or all are zero, any positive number makes L regular
    filled_MQ = torch.where(live_MQ, shift_M1, torch.where(trace_M1 > 0, trace_M1, 1))
    lower_MQQ = torch.linalg.cholesky(gram_u_MQQ + torch.diag_embed(filled_MQ))
    square_MQ, vector_MQQ = torch.linalg.eigh(lower_MQQ.mT @ gram_v_MQQ @ lower_MQQ)
    square_MQ = square_MQ.clamp_min(0)
    core_MQR = vector_MQQ[:, :, -rank:]
    left_MQR = torch.linalg.solve_triangular(lower_MQQ.mT, core_MQR, upper=True)
    right_MRQ = (lower_MQQ @ core_MQR).mT
    u_MNQ[:, :, :rank] = wide_MNQ @ (even_MQ[:, :, None] * left_MQR)
    v_MQK[:, :rank] = (right_MRQ * back_MQ[:, None]) @ wide_MQK
    u_MNQ[:, :, rank:] = 0
    v_MQK[:, rank:] = 0
    return square_MQ[:, :-rank].sum(1).sqrt(), square_MQ.sum(1).sqrt()


def cost(shapes: Iterable[tuple[int, int]], r: int, rank: int, every: int) -> Cost:
    """What one step costs on average, for matrices [N, K] of these shapes; fp32 factors.

    Bytes are those of the calls above, fp64 copies and the zeros of unused columns included.
    """
    moved = work = 0.0
    for n, k in shapes:
        core = max(r, min(rank, n, k))
        q = core + every * r
        moved += 2 * 4 * (n + k) * r + 2 * 4 * n * (q + r)  # append: copy B and A; scale U
        work += n * (q + r)
        # read in fp32, write in fp64, read for the Gram matrix and for the product; write all
        truncated = (n + k) * (q * (4 + 8 + 8 + 8 + 4) + core * (8 + 8))
        gram = 2 * (n + k) * q * q
        small = 16 * q**3  # Cholesky, three products, eigenvectors by tridiagonal form
        moved += truncated / every
        work += (gram + 2 * (n + k) * q * core + small) / every
    return Cost(moved, work)
