"""What the stages are run at: full size on a GPU, and tiny on a CPU, to see that they run."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from bench.cases import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, LINEARS, RANK, VOCABULARY


@dataclass(frozen=True)
class Sizes:
    """Of everything that differs between a GPU and a rehearsal; what is run does not.

    Attributes:
        products: T tokens, N out and K in features, and seconds for which each is repeated.
        factors: number of matrices, N and K of those whose averages are truncated.
        held: columns of their factors, and how many are left.
        predicted: rows of the predictor.
        layers: how many the shared step is compared at.
        checked: tokens of each of two windows of that comparison.
        rounds: of our step alone, and of a pair.
        steps: of the convergence.
        poison: bytes of memory filled with NaN before an operation is called.
    """

    products: dict[str, tuple[int, int, int, float]]
    heads: tuple[int, int, int]
    factors: tuple[tuple[int, int, int], ...]
    held: tuple[int, int]
    predicted: int
    layers: tuple[int, ...]
    checked: int
    rounds: tuple[int, int]
    steps: int
    seconds: float
    poison: int
    dtype: torch.dtype
    tests: tuple[str, ...]

    @staticmethod
    @cache
    def of(device: str) -> "Sizes":
        """Of a kind of device."""
        return _full() if device == "cuda" else _tiny()


def _full() -> Sizes:
    wide = {"q and o": "q", "k and v": "k", "gate and up": "gate", "down": "down"}
    T = 12288  # of a micro-batch of W1
    products = {name: (T, *LINEARS[key], 4.0) for name, key in wide.items()}
    products["gate and up"] = (T, *LINEARS["gate"], 10.0)  # half of all operations
    products["head"] = (2048, VOCABULARY, HIDDEN, 4.0)  # of a chunk of the loss
    products["rank r"] = (T, RANK, HIDDEN, 4.0)
    shapes = list(LINEARS.values())
    return Sizes(
        products=products,
        heads=(HEADS, KV_HEADS, HEAD_DIM),
        factors=tuple((LAYERS * shapes.count(s), *s) for s in dict.fromkeys(shapes)),
        held=(8 * RANK, 4 * RANK),
        predicted=8192,
        layers=(4, LAYERS),
        checked=512,
        rounds=(3, 5),
        steps=200,
        seconds=2.0,
        poison=4 << 30,
        dtype=torch.bfloat16,
        tests=("tests",),
    )


def _tiny() -> Sizes:
    shapes = {"q and o": (32, 32), "k and v": (16, 32), "gate and up": (64, 32), "down": (32, 64)}
    shapes |= {"head": (64, 32), "rank r": (4, 32)}
    return Sizes(
        products={name: (64, *shape, 0.02) for name, shape in shapes.items()},
        heads=(2, 1, 16),
        factors=((4, 32, 32), (2, 64, 32)),
        held=(8, 4),
        predicted=16,
        layers=(1, 2),
        checked=64,
        rounds=(1, 1),
        steps=12,
        seconds=0.05,
        poison=1 << 20,
        dtype=torch.float32,
        tests=("tests/ops/test_masked_jepa_mse.py", "-k", "normed_to_zero"),
    )


def workload(name: str, device: str) -> Any:
    """A workload of `bench.step`. Its import, of transformers and peft, takes seconds."""
    from bench.step.workloads import workloads

    return workloads(device, quick=True)[name]


def with_layers(size: Any, layers: int) -> Any:
    """A model of the same widths."""
    return replace(size, name=f"{size.name}, {layers} layers", layers=layers)
