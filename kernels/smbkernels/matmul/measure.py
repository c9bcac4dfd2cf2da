"""Which library multiplies fp32 matrices fastest here: a measurement of milliseconds.

It runs linears, forward and backward, of a few of the shapes that a model multiplies, each backend
in turn, and compares the sums of the best times. What a backend does besides the product, such as
padding rows, is in them; the compilation of a new shape is not. Times are those that one thread was
on a processor, so that other work on the machine changes them little.

T rows, K in and N out features, R rank.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from smbkernels.catalog import REFERENCE
from smbkernels.lora import lora_linear
from smbkernels.matmul.op import linear
from smbkernels.matmul.products import LEAST_SIZE, NAMES, missing
from smbkernels.registry import use

# a backend is taken if it is faster by this much. Measurements on a machine differ by 4 %, and the
# gain on common processors is about 1.1 or about 2: with a limit between them, the same settings
# choose the same library again, and so give the same bits
LEAST_GAIN = 1.2
ROUNDS, SECONDS = 4, 0.05  # of a shape at least; the first round only warms up
ROWS = 2000  # of a usual micro-batch; not a count that needs no padding
MOST_WIDTH = 512  # wider products run at the same rate
MOST_SHAPES = 3


@dataclass(frozen=True)
class Measured:
    """Seconds of each backend of `linear` that was measured, and of the reference."""

    seconds: dict[str, float]
    reason: str | None = None  # why oneDNN was not measured

    @property
    def fastest(self) -> str:
        """The reference, which is torch's own choice, unless another is faster by `LEAST_GAIN`."""
        best = min(self.seconds, key=self.seconds.__getitem__)
        return best if self.gain(best) >= LEAST_GAIN else REFERENCE

    def gain(self, name: str) -> float:
        """How many times as fast as the reference a backend is."""
        return self.seconds[REFERENCE] / self.seconds[name]


def measured(shapes: Iterable[tuple[int, int]], *, rank: int = 0) -> Measured:
    """Measure linears of these shapes on a CPU.

    Args:
        shapes: [N, K] of weights; the largest few are measured, and at most `MOST_WIDTH` of each.
        rank: of the LoRA adapters that are trained in the place of the weights; 0: the weights.
    """
    if reason := missing("cpu"):
        return Measured({REFERENCE: 1.0}, reason)
    capped = {(min(n, MOST_WIDTH), min(k, MOST_WIDTH)) for n, k in shapes}
    capped = {(n, k) for n, k in capped if n * k >= LEAST_SIZE}
    if not capped:
        return Measured({REFERENCE: 1.0}, "products are too small for another library to pay")
    # without a gradient of a weight both backends are the same
    names = (REFERENCE, "onednn_rows") if rank else (REFERENCE, *NAMES)
    seconds = dict.fromkeys(names, 0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for N, K in sorted(capped, key=lambda s: (s[0] * s[1], s))[-MOST_SHAPES:]:
            best = _best(_step(N, K, rank), names)
            seconds = {name: seconds[name] + best[name] for name in names}
    finally:
        torch.set_num_threads(threads)
    return Measured(seconds)


def _best(call: Callable[[], object], names: tuple[str, ...]) -> dict[str, float]:
    """Seconds of the quickest call on each backend."""
    times: dict[str, list[float]] = {name: [] for name in names}
    began = time.thread_time()
    while len(times[names[0]]) < ROUNDS or time.thread_time() - began < SECONDS:
        for name in names:
            with use(linear=name):
                start = time.thread_time()
                call()
                times[name].append(time.thread_time() - start)
    return {name: min(taken[1:]) for name, taken in times.items()}


def _step(N: int, K: int, R: int) -> Callable[[], object]:
    """A linear, forward and backward, on random numbers."""
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, columns: int, *, trained: bool = False) -> Tensor:
        return torch.randn(rows, columns, generator=generator).requires_grad_(trained)

    x_TK, w_NK, dy_TN = normal(ROWS, K, trained=True), normal(N, K), normal(ROWS, N)
    if not R:
        w_NK.requires_grad_()
        return lambda: torch.autograd.grad(linear(x_TK, w_NK), (x_TK, w_NK), dy_TN)
    b_NR, a_RK = normal(N, R, trained=True), normal(R, K, trained=True)

    def adapted() -> object:
        (y_TN,) = lora_linear(x_TK, [w_NK], [b_NR], [a_RK], scale=[1.0])
        return torch.autograd.grad(y_TN, (x_TK, b_NR, a_RK), dy_TN)

    return adapted
