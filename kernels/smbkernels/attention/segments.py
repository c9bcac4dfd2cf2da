"""Who sees whom in one row of packed tokens: trunks, and the branches that hang on them.

    query j of a trunk sees keys [start, start + j] of that trunk
    query j of a branch sees keys [trunk_start, trunk_start + prefix) and [start, start + j]

T tokens, S segments.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# columns of the table of segments
START, LENGTH, TRUNK_START, PREFIX, FIRST_BRANCH, BRANCHES = range(6)


@dataclass(frozen=True)
class Segments:
    """Which tokens see which: made once per batch on the CPU, then used by every layer.

    `table_S6` is int32: start, length, start of the trunk, tokens of the trunk that are seen (0
    for a trunk), and for a trunk the index of its first branch and the number of its branches.
    Branches of one trunk are consecutive rows.
    """

    table_S6: Tensor
    tokens: int
    pairs: int  # visible (query, key) pairs: what attention costs
    longest: int  # longest segment
    host_S6: Tensor  # the table on the CPU, wherever `table_S6` is: read without a wait

    @classmethod
    def of(
        cls, start_S: Tensor, length_S: Tensor, trunk_start_S: Tensor, prefix_S: Tensor
    ) -> "Segments":
        """From the columns of a packed batch, integers on the CPU.

        Raises:
            ValueError: columns of other kinds or lengths, segments that overlap or leave a gap, a
                branch that names no trunk or sees more than its trunk has, branches of one trunk
                that are not consecutive.
        """
        columns = (start_S, length_S, trunk_start_S, prefix_S)
        for name, column in zip(("start", "length", "trunk_start", "prefix"), columns, strict=True):
            integer = not (column.is_floating_point() or column.is_complex())
            if column.shape != (len(start_S),) or column.device.type != "cpu" or not integer:
                raise ValueError(
                    f"{name}_S must be {len(start_S)} integers on the CPU, got {column.dtype} of "
                    f"{list(column.shape)} on {column.device}"
                )
        rows = torch.stack(columns, 1).tolist()
        trunk_of = {start: i for i, (start, _, _, prefix) in enumerate(rows) if prefix == 0}
        first, count = [0] * len(rows), [0] * len(rows)
        end = pairs = 0
        for i, (start, length, trunk_start, prefix) in enumerate(rows):
            if start != end or length < 1:
                raise ValueError(
                    f"segment {i} must begin at row {end} with at least one token, got "
                    f"start {start}, length {length}"
                )
            end = start + length
            pairs += length * prefix + length * (length + 1) // 2
            if prefix == 0:
                if trunk_start != start:
                    raise ValueError(
                        f"trunk_start of trunk {i} must be its start {start}, got {trunk_start}"
                    )
                continue
            trunk = trunk_of.get(trunk_start)
            if trunk is None or not 0 < prefix <= rows[trunk][LENGTH]:
                raise ValueError(
                    f"branch {i} must see 1 or more tokens of a trunk that has them, got prefix "
                    f"{prefix} of the trunk at row {trunk_start}"
                )
            if count[trunk] and first[trunk] + count[trunk] != i:
                raise ValueError(f"branches of the trunk at {trunk_start} must be consecutive")
            first[trunk] = first[trunk] if count[trunk] else i
            count[trunk] += 1
        table = [[*row, f, c] for row, f, c in zip(rows, first, count, strict=True)]
        table_S6 = torch.tensor(table, dtype=torch.int32).reshape(-1, 6)
        return cls(
            table_S6=table_S6,
            tokens=end,
            pairs=pairs,
            longest=max((row[LENGTH] for row in rows), default=0),
            host_S6=table_S6,
        )

    def to(self, device: torch.device | str) -> "Segments":
        """The same with its table on a device."""
        return replace(self, table_S6=self.table_S6.to(device, non_blocking=True))


def visible(segments: Segments) -> Tensor:
    """The dense mask [T, T], queries by keys: for the reference and for tests."""
    mask_TT = torch.zeros(segments.tokens, segments.tokens, dtype=torch.bool)
    for start, length, trunk_start, prefix, _, _ in segments.host_S6.tolist():
        end = start + length
        mask_TT[start:end, start:end] = torch.ones(length, length, dtype=torch.bool).tril()
        mask_TT[start:end, trunk_start : trunk_start + prefix] = True
    return mask_TT
