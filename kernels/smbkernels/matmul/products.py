"""Products of fp32 matrices by oneDNN, through the one function of torch that asks for it by name.

`torch.set_float32_matmul_precision("medium")` would reach the same kernels, but as a switch for the
whole process, which on other processors means bf16. Operands and sums are fp32 here, and that is
checked: on a processor with AMX, where a product is further from fp64 than `MOST_ERROR`, or where
the bits of a row depend on how many there are, the reason why not is given.

oneDNN compiles a kernel for each shape, once, in about a millisecond: as long as a small product
takes. Narrow rows are therefore padded with zeros to one of a few counts, which costs a copy of the
left factor and 2 % more rows in the mean; wide ones, where that is more than what is compiled, are
not. A row of a product does not depend on how many others there are.

T rows, P rows after padding, K inner width, N columns, M columns of a left factor that is read
transposed.
"""

import functools

import torch
from torch import Tensor

from smbkernels.operation import FORCED

NAMES = ("onednn", "onednn_rows")  # of the backends of `linear` that multiply here
MOST_ERROR = 1e-6  # of a product, relative to fp64 in the Frobenius norm; fp32's eps is 1.2e-7
# elements of a right factor: with smaller ones MKL was measured to be as fast. The number of rows
# does not count, so that a row is computed alike whatever stands beside it
LEAST_SIZE = 1 << 12
LEAST_STEP = 32  # rows
NARROW = 256  # columns of a left factor; narrower ones are padded


@torch.compiler.assume_constant_result
def missing(device: str) -> str | None:
    """Why oneDNN cannot multiply fp32 matrices on this kind of device here, or None."""
    return reason_against(device)


@functools.cache
def reason_against(device: str) -> str | None:
    """`missing`, of which torch.compile takes the result and does not look inside."""
    if device not in ("cpu", "meta"):
        return f"tensors are on {device}"
    if not has_onednn():
        return f"torch {torch.__version__} was built without oneDNN"
    if torch.cpu._is_amx_tile_supported():
        return "this processor has AMX, where oneDNN may multiply fp32 matrices in bf16"
    error = _error()
    if not error <= MOST_ERROR:
        return f"its products must be within {MOST_ERROR:.0e} of fp64, got {error:.1e}"
    if not _rows_are_alike():
        return f"in torch {torch.__version__} the bits of a row depend on how many rows there are"
    return None


def has_onednn() -> bool:
    """Whether this torch has oneDNN, and the function that asks for it."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _rows_are_alike() -> bool:
    """Whether a row has the same bits beside others: what a node does not see must not change it.

    Older versions of oneDNN add up wide rows in an order that depends on their number.
    """
    generator = torch.Generator().manual_seed(0)
    left_TK, weight_NK = (torch.randn(s, generator=generator) for s in ((300, 512), (96, 512)))
    whole_TN = _product(left_TK, weight_NK.t())
    return all(torch.equal(_product(left_TK[:T], weight_NK.t()), whole_TN[:T]) for T in (2, 14, 65))


def _error() -> float:
    """Relative error of a product against fp64."""
    generator = torch.Generator().manual_seed(0)
    left_TK, right_KN = (torch.randn(s, generator=generator) for s in ((96, 512), (512, 80)))
    exact = left_TK.double() @ right_KN.double()
    return float((_product(left_TK, right_KN) - exact).norm() / exact.norm())


def _product(left_PK: Tensor, right_KN: Tensor, bias_N: Tensor | None = None) -> Tensor:
    # the right factor is read where it lies, whichever of its strides is 1
    onednn = torch.ops.mkldnn._linear_pointwise
    bias_N = None if bias_N is None else bias_N.contiguous()  # its stride is not read
    return onednn(left_PK, right_KN.t(), bias_N, "none", [], "")


def forced(x: Tensor) -> bool:
    """Whether products of this tensor go to oneDNN, because `linear` was told to.

    Raises:
        ValueError: if it was, and oneDNN cannot run.
    """
    name = FORCED.get("linear", FORCED.get("*"))
    if name not in NAMES or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    if reason := missing("cpu"):
        raise ValueError(f"linear cannot run on {name}: {reason}")
    return True


def padded_rows(T: int, K: int) -> int:
    """T, of narrow rows rounded up: to one of 16 counts between powers of two, from 512 on."""
    step = max(LEAST_STEP, 1 << max(T.bit_length() - 5, 0))
    return -(-T // step) * step if K < NARROW else T


def padded(x_TK: Tensor) -> Tensor:
    """x, [P, K], with the rows of zeros that `padded_rows` adds; x itself where it adds none."""
    return with_rows(x_TK, padded_rows(*x_TK.shape))


def with_rows(x_TK: Tensor, P: int) -> Tensor:
    """x, [P, K], with rows of zeros after its own; x itself where there are none to add."""
    T, K = x_TK.shape
    if P == T:
        return x_TK
    x_PK = x_TK.new_empty(P, K)
    x_PK[:T].copy_(x_TK)
    x_PK[T:].zero_()
    return x_PK


def cut(x_PN: Tensor, T: int) -> Tensor:
    """The first T rows; the tensor itself, and no view, so that a caller may write into it."""
    return x_PN if len(x_PN) == T else x_PN.resize_(T, x_PN.shape[1])


def times(left_TK: Tensor, right_KN: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """left right + bias, [T, N]: by oneDNN, unless it is small."""
    T = len(left_TK)
    if T == 0 or right_KN.numel() < LEAST_SIZE:
        return left_TK @ right_KN if bias_N is None else torch.addmm(bias_N, left_TK, right_KN)
    return cut(_product(padded(left_TK), right_KN, bias_N), T)


def added(total_TN: Tensor, left_TK: Tensor, right_KN: Tensor) -> Tensor:
    """total + left right: in place, or by oneDNN as a new tensor, which may be the faster."""
    T, K = left_TK.shape
    if T == 0 or padded_rows(T, K) != T or right_KN.numel() < LEAST_SIZE:
        return total_TN.addmm_(left_TK, right_KN)
    onednn = torch.ops.mkldnn._linear_pointwise.binary
    return onednn(left_TK, total_TN, right_KN.t(), None, "add")


def times_over_rows(left_TM: Tensor, right_TN: Tensor) -> Tensor:
    """left' right, [M, N], a sum over rows: by oneDNN, unless it is small."""
    (T, M), N = left_TM.shape, right_TN.shape[1]
    if T == 0 or M * N < LEAST_SIZE:
        return left_TM.t() @ right_TN
    P = padded_rows(T, min(M, N))
    left_PM, right_PN = with_rows(left_TM, P), with_rows(right_TN, P)
    if M > N:  # what is read transposed on the left is copied first: the narrower one
        return _product(right_PN.t(), left_PM).t().contiguous()
    return _product(left_PM.t(), right_PN)
