"""Rows of what is computed: texts, the future, accumulation, packs, growth, export."""

from tests.reliability.proof import Row

ROWS: tuple[Row, ...] = ()
