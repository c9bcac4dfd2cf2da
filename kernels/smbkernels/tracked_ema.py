"""The moving average of low-rank products, kept low-rank: P <- tau P + (1 - tau) B A, P = U V.

    append     U <- [tau U | (1 - tau) B]      V <- [V ; A]          exact but for rounding
    truncate   U V <- nearly the nearest product of rank R, once the columns are used up

for M modules of one shape in one call. U and V have Q columns and rows: R of the core, then one
block of r for each step since the last truncation, then zeros, so that shapes never change.

Truncation needs no factor of width N or K but the Gram matrices, in fp64:

    D  equal lengths of a column of U and its row of V: U D, D^-1 V
    U'U = L L'                              so U L'^-1 is orthonormal
    L' (V V') L = A                         its eigenvalues: squared singular values of U V
    U <- U L'^-1 E      V <- E' L' V        E orthonormal, of R columns

With the R leading eigenvectors of A for E this is the nearest product of rank R (Eckart-Young), and
whatever E is, it is the projection of U V on U L'^-1 E: nothing else is lost. `truncate_` finds E
by block power iteration, E <- orth(A E), from the columns that the last truncation left: they span
nearly the same space still. It needs products and Cholesky factors alone, which a GPU computes for
all modules at once and without an answer to the host; eigenvectors, as `truncate_by_eigenvectors_`
takes them, are a wait, and on CUDA before torch 2.12 one call of a solver for each matrix. Two
steps were enough: along real LoRA runs the average was at most 1.22 times as far from the exact one
as with eigenvectors after any step, and 1.002 times where it was farthest
(`tests/ops/test_ema_trajectory.py`).

Whatever L is, the product is exact where E E' = 1; only which directions come first depends on it.
A shift of 2e-12 of the trace keeps L regular where columns are dependent: the A of an adapter
hardly moves in k steps, so they nearly are. In fp32 the shift would have to be so large that it
decides the order.

The decay is folded into U, not kept beside it: a forward then reads U and V as they are, and no
factor that changes from step to step enters a compiled graph; it costs 8 bytes an element of U.

Bytes and flops of a step, Qwen3-8B (252 matrices, r = 16, R = 64, k = 4), counted by `cost`:
5.5 GB and 35 GFLOP (fp64 but for 0.2); averaging the merged weights, 69.5 GB and 257 GFLOP.

M modules, N out, K in features, Q columns held, R of the core, r of one step.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 25  # elements of a factor that are held in fp64 at a time (256 MiB)
SHIFT = 1 << 13  # of the Cholesky factor, in units of the trace times the machine's epsilon
STEPS = 2  # of the block power iteration
PASSES = 3  # of Cholesky-QR: the first two make columns independent, the third orthonormal
NOISE = 1e-3  # beside the unit vectors that the iteration starts from
ORTH_SHIFT = 1 << 8  # of Cholesky-QR, where columns have length 1, in units of the epsilon
PRIME = (1 << 31) - 1
Choose = Callable[[Tensor, Tensor, int], Tensor]  # A, columns that are not zero, rank -> E


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
    """Keep nearly the nearest product of that rank in the first columns; the others become zero.

    Nothing waits for the device. NaN in a module makes that module NaN, and no other.

    Args:
        u_MNQ, v_MQK: fp32 or fp64, contiguous, any rank, zero too.
        dtype: of the Gram matrices and of what follows from them.

    Returns:
        ‖discarded‖ and ‖U V‖ of each module (Frobenius), `dtype` [M].
    """
    return _truncate_(u_MNQ, v_MQK, rank, dtype, _by_power)


@torch.no_grad()
def truncate_by_eigenvectors_(
    u_MNQ: Tensor, v_MQK: Tensor, rank: int, *, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """As `truncate_`, with the nearest product there is: what that is held to."""
    return _truncate_(u_MNQ, v_MQK, rank, dtype, _by_eigenvectors)


def _truncate_(
    u_MNQ: Tensor, v_MQK: Tensor, rank: int, dtype: torch.dtype, choose: Choose
) -> tuple[Tensor, Tensor]:
    size = max(1, CHUNK // (u_MNQ.shape[2] * max(u_MNQ.shape[1], v_MQK.shape[2])))
    parts = zip(u_MNQ.split(size), v_MQK.split(size), strict=True)
    cuts = (_cut(u, v, rank, dtype, choose) for u, v in parts)
    discarded, whole = zip(*cuts, strict=True)
    return torch.cat(discarded), torch.cat(whole)


def _cut(
    u_MNQ: Tensor, v_MQK: Tensor, rank: int, dtype: torch.dtype, choose: Choose
) -> tuple[Tensor, Tensor]:
    wide_MNQ, wide_MQK = u_MNQ.to(dtype), v_MQK.to(dtype)
    gram_u_MQQ, gram_v_MQQ = wide_MNQ.mT @ wide_MNQ, wide_MQK @ wide_MQK.mT
    length_u_MQ = gram_u_MQQ.diagonal(dim1=1, dim2=2)
    length_v_MQ = gram_v_MQQ.diagonal(dim1=1, dim2=2)
    # a column that is zero on either side adds nothing: it gets no weight
    live_MQ = (length_u_MQ != 0) & (length_v_MQ != 0)
    even_MQ = torch.where(live_MQ, (length_v_MQ / length_u_MQ).pow(0.25), 0)
    back_MQ = torch.where(live_MQ, 1 / even_MQ, 0)
    gram_u_MQQ = gram_u_MQQ * even_MQ[:, :, None] * even_MQ[:, None]
    gram_v_MQQ = gram_v_MQQ * back_MQ[:, :, None] * back_MQ[:, None]
    trace_M1 = _trace(gram_u_MQQ)[:, None]
    shift_M1 = trace_M1 * (SHIFT * torch.finfo(dtype).eps)
    # where a column has no weight, or all are zero, any positive number makes L regular
    filled_MQ = torch.where(live_MQ, shift_M1, torch.where(trace_M1 > 0, trace_M1, 1))
    lower_MQQ = _cholesky(gram_u_MQQ, filled_MQ)
    square_MQQ = lower_MQQ.mT @ gram_v_MQQ @ lower_MQQ
    core_MQR = choose(square_MQQ, live_MQ, rank)
    left_MQR = torch.linalg.solve_triangular(lower_MQQ.mT, core_MQR, upper=True)
    right_MRQ = (lower_MQQ @ core_MQR).mT
    u_MNQ[:, :, :rank] = wide_MNQ @ (even_MQ[:, :, None] * left_MQR)
    v_MQK[:, :rank] = (right_MRQ * back_MQ[:, None]) @ wide_MQK
    u_MNQ[:, :, rank:].zero_()
    v_MQK[:, rank:].zero_()
    return _discarded(square_MQQ, core_MQR), _trace(square_MQQ).clamp_min(0).sqrt()


def _by_eigenvectors(square_MQQ: Tensor, _live_MQ: Tensor, rank: int) -> Tensor:
    return torch.linalg.eigh(square_MQQ)[1][:, :, -rank:]


def _by_power(square_MQQ: Tensor, live_MQ: Tensor, rank: int) -> Tensor:
    """Columns [M, Q, R] that nearly span the R leading eigenvectors.

    The start is the unit vectors of the first R columns that are not zero: those of the core, and
    where it has fewer, as before the first truncation, the oldest of those added since. Noise lets
    in what stands at a right angle to all of them.
    """
    order_MR = (~live_MQ).to(torch.uint8).argsort(dim=1, stable=True)[:, :rank]
    start_QR = NOISE * _noise(square_MQQ.shape[1], rank, square_MQQ)
    start_MQR = start_QR.repeat(len(square_MQQ), 1, 1)
    start_MQR.scatter_(1, order_MR[:, None], 1.0)
    columns_MQR = square_MQQ @ start_MQR
    for _ in range(STEPS - 1):
        # between two steps columns need only be independent
        columns_MQR = square_MQQ @ _orthonormal(columns_MQR, PASSES - 1)
    return _orthonormal(columns_MQR, PASSES)


def _orthonormal(x_MQR: Tensor, passes: int) -> Tensor:
    """Orthonormal columns of the same span, by Cholesky-QR; of a column that is zero, zero.

    Columns of length 1 make the Cholesky factor as good for small columns as for large ones. The
    shift keeps it regular where columns are nearly dependent; what it spoils, the next pass mends.
    """
    shift = ORTH_SHIFT * torch.finfo(x_MQR.dtype).eps
    for _ in range(passes):
        length_M1R = torch.linalg.vector_norm(x_MQR, dim=1, keepdim=True)
        x_MQR = torch.where(length_M1R == 0, 0, x_MQR / length_M1R)
        added_MR = torch.full_like(length_M1R[:, 0], shift).masked_fill_(length_M1R[:, 0] == 0, 1)
        lower_MRR = _cholesky(x_MQR.mT @ x_MQR, added_MR)
        x_MQR = torch.linalg.solve_triangular(lower_MRR.mT, x_MQR, upper=True, left=False)
    return x_MQR


def _cholesky(matrix_MQQ: Tensor, added_MQ: Tensor) -> Tensor:
    """The factor of a matrix with this added to its diagonal; not checked, which would wait."""
    return torch.linalg.cholesky_ex(matrix_MQQ + torch.diag_embed(added_MQ))[0]


def _noise(rows: int, columns: int, like: Tensor) -> Tensor:
    """Numbers in [-1, 1) that scatter as random ones do, the same on every device: [Q, R].

    Squares of integers, multiplied and reduced by a prime, as a generator of random numbers does;
    made on the device, so that nothing is copied there.
    """
    count = torch.arange(1, rows * columns + 1, device=like.device).view(rows, columns)
    return ((count * count * 1103515245) % PRIME).to(like.dtype) * (2 / PRIME) - 1


def _discarded(square_MQQ: Tensor, core_MQR: Tensor) -> Tensor:
    """‖(1 - E E') L' V‖, from its square: the trace of (1 - E E') A (1 - E E')."""
    mixed_MQR = square_MQQ @ core_MQR
    inside_MRR = core_MQR.mT @ mixed_MQR
    overlap_MRR = core_MQR.mT @ core_MQR
    rest_M = _trace(square_MQQ) - 2 * _trace(inside_MRR) + (inside_MRR * overlap_MRR).sum((1, 2))
    return rest_M.clamp_min(0).sqrt()


def _trace(matrix_MQQ: Tensor) -> Tensor:
    return matrix_MQQ.diagonal(dim1=1, dim2=2).sum(1)


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
        # Cholesky and two products; a product a step; Gram, Cholesky and solve a pass; the result
        passes = STEPS * (PASSES - 1) + 1
        small = (4 + 1 / 3) * q**3 + STEPS * 2 * q * q * core
        small += passes * (3 * q * core**2 + core**3 / 3) + 3 * q * q * core
        moved += truncated / every
        work += (gram + 2 * (n + k) * q * core + small) / every
    return Cost(moved, work)
