"""All rows of the scorecard, in the order in which they are printed."""

import importlib
import importlib.util

from tests.reliability.proof import Row

FILES = (
    "commits",
    "kills",
    "background",
    "liveness",
    "ranks",
    "alarm",
    "mathematics",
    "privacy",
    "small_cells",
    "hostile",
    "fuzz",
)
# the longest proofs of a push, which begin before the others so that none is waited for at the end
LONGEST = ("M2", "P1", "R6", "R2", "R7")


def rows() -> list[Row]:
    """The rows by their ids; a ValueError if two have one id or a mutant has no name of its own."""
    every: list[Row] = []
    for name in FILES:
        module = f"tests.reliability.rows.{name}"
        if importlib.util.find_spec(module) is not None:
            every += importlib.import_module(module).ROWS
    ids = [row.id for row in every]
    mutants = [mutant.name for row in every for mutant in row.mutants]
    for what, names in (("rows", ids), ("mutants", mutants)):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{what} must have names of their own, got {twice} twice")
    return every
