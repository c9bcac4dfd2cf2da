"""The one comparison of a fast path with its reference."""

import torch
from torch import Tensor


def assert_no_worse(fast: Tensor, same_dtype: Tensor, exact: Tensor, tol: float) -> None:
    """Elementwise, `fast` may be no further from `exact` than eager in the same dtype, plus `tol`.

    Args:
        fast: what is tested.
        same_dtype: the ordinary eager computation in the same dtype.
        exact: the truth, in fp64 (or fp32 for bf16).
        tol: relative to the larger of |exact| and its root mean square, element by element.
    """
    assert fast.shape == same_dtype.shape == exact.shape, (fast.shape, exact.shape)
    assert fast.dtype == same_dtype.dtype, (fast.dtype, same_dtype.dtype)
    if not exact.numel():
        return
    exact = exact.detach().double().cpu()
    error = (fast.detach().double().cpu() - exact).abs()
    allowed = (same_dtype.detach().double().cpu() - exact).abs()
    size = exact.abs().clamp_min(float(exact.square().mean().sqrt()))
    excess = error - allowed - tol * size
    # written so that a NaN fails
    if not bool((excess <= 0).all()):
        worst = int(torch.nan_to_num(excess, nan=torch.inf).argmax())
        raise AssertionError(
            f"element {worst} of {tuple(exact.shape)}: fast is off by {error.flatten()[worst]:.3e},"
            f" eager by {allowed.flatten()[worst]:.3e}, exact is {exact.flatten()[worst]:.3e}"
        )
