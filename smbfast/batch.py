"""The two types that cross module borders: one patient's tokens, a batch of trunks and branches.

Legend: T tokens, L lines (one code in one bucket), B buckets, S segments, M masked positions.
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Timeline:
    """The tokens of one patient, bucket after bucket, with the time of every line.

    Offsets count tokens from the start of the timeline, so that a cut or a decision node is an
    exact position. A window of a timeline is itself a Timeline (`smbfast.data.timelines`).
    """

    subject: int
    ids_T: np.ndarray  # int32
    header: int  # tokens before the first bucket: begin token and demographics
    bucket_end_B: np.ndarray  # int32: where each bucket ends
    bucket_time_B: np.ndarray  # int64: the beginning of each bucket, microseconds since 1970
    line_start_L: np.ndarray  # int32: lines of buckets, without headers and tags
    line_end_L: np.ndarray  # int32
    line_time_L: np.ndarray  # int64: the last event of each line, microseconds since 1970
    line_section_L: np.ndarray  # uint8: index into SECTIONS
    first_bucket: int = 0  # in a window: the bucket of the whole timeline it begins with

    def __len__(self) -> int:
        return len(self.ids_T)

    def bucket_start(self, bucket: int) -> int:
        """The token at which a bucket begins."""
        return int(self.bucket_end_B[bucket - 1]) if bucket else self.header


@dataclass(frozen=True)
class PackedBatch:
    """Trunks and branches concatenated into one row of tokens, no padding.

    A branch hangs on a prefix of a trunk: it continues the position ids from the cut and sees
    `trunk[:prefix]` and itself, causally. `labels_T` is the next token where one is predicted
    (trunks only), -100 elsewhere. Row `masked_M[m]` of a branch predicts the target encoder's
    hidden state of row `target_M[m]`, the same token on its unmasked trunk. The ids of masked rows
    are 0: the identity of a masked token is not even in the batch's online side.
    """

    ids_T: Tensor  # int64
    position_T: Tensor  # int64
    labels_T: Tensor  # int64
    start_S: Tensor  # int64
    length_S: Tensor  # int64
    trunk_start_S: Tensor  # int64: of the trunk a branch hangs on; a trunk's own start
    prefix_S: Tensor  # int64: tokens of the trunk a branch sees; 0 for a trunk
    masked_M: Tensor  # int64 rows of T, in branches
    target_M: Tensor  # int64 rows of T, in trunks
    trunk_tokens: int  # tokens of trunks: what throughput counts

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The batch with its tensors on a device."""
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=True)
            for f in fields(self)
            if f.name != "trunk_tokens"
        }
        return replace(self, **moved)

    @property
    def labels(self) -> int:
        """Predicted tokens."""
        return int((self.labels_T >= 0).sum())

    @property
    def masked(self) -> int:
        """Masked positions."""
        return len(self.masked_M)

    def check(self) -> None:
        """Assert what every consumer relies on; for tests: it is our mistake where it fails."""
        trunk_S = self.prefix_S == 0
        end_S = self.start_S + self.length_S
        assert bool((end_S[:-1] == self.start_S[1:]).all()) and int(end_S[-1]) == len(self.ids_T)
        assert bool((self.start_S[trunk_S] == self.trunk_start_S[trunk_S]).all())
        assert int(self.length_S[trunk_S].sum()) == self.trunk_tokens
        segment_T = torch.repeat_interleave(torch.arange(len(self.start_S)), self.length_S)
        base_T = self.position_T - (torch.arange(len(self.ids_T)) - self.start_S[segment_T])
        assert bool((base_T == self.prefix_S[segment_T]).all())
        branch_M, source_M = segment_T[self.masked_M], segment_T[self.target_M]
        assert bool((self.prefix_S[branch_M] > 0).all()) and bool(trunk_S[source_M].all())
        assert bool((self.trunk_start_S[branch_M] == self.start_S[source_M]).all())
        assert bool((self.position_T[self.masked_M] == self.position_T[self.target_M]).all())
        assert not bool(self.ids_T[self.masked_M].any())
        assert bool((self.labels_T[self.prefix_S[segment_T] > 0] < 0).all())
