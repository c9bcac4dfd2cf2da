"""The ways in which the hidden states of a decision node become one embedding."""

from typing import Literal, get_args

Pool = Literal["last", "mean", "layers", "spread"]
RunPool = Literal["auto", "last", "mean", "layers", "spread"]
POOLS: tuple[Pool, ...] = get_args(Pool)
"""Those that a run may choose from."""
