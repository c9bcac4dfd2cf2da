"""The two types that cross module borders: one patient's tokens, a batch of trunks and branches.

Legend: T tokens of the online encoder, U tokens of the target encoder, L lines (one code in one
bucket), B buckets, S segments, N labelled rows, M masked positions.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from smbkernels.attention import Segments
from torch import Tensor

Row = tuple[int, int, int, int]  # start, length, start of the trunk, prefix


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

    Trunks come first, then the branches in the order of their trunks. A branch hangs on a prefix
    of a trunk: it continues the position ids from the cut and sees `trunk[:prefix]` and itself,
    causally. Row `masked_M[m]` of a branch predicts the target encoder's hidden state of row
    `target_M[m]` of its own tokens: the same token, unmasked. The ids of masked rows are 0: the
    identity of a masked token is not even in the batch's online side.

    Every index that a step needs is here, made on the CPU: nothing asks a GPU for a count.
    """

    ids_T: Tensor  # int64
    position_T: Tensor  # int64
    segments: Segments
    labelled_N: Tensor  # int64 rows of T, in trunks, whose next token is predicted
    label_N: Tensor  # int64: that token
    masked_M: Tensor  # int64 rows of T, in branches
    target_ids_U: Tensor  # int64: each trunk with masked positions, through the last of them
    target_position_U: Tensor  # int64
    target_segments: Segments  # over U, trunks alone
    target_M: Tensor  # int64 rows of U
    num_trunk_tokens: int  # of whole trunks: what throughput counts

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The batch with its tensors on a device; without waiting, if they are in pinned memory."""
        return self._each(lambda x: x.to(device, non_blocking=True))

    def pinned(self) -> "PackedBatch":
        """The batch in page-locked memory, from where a GPU copies beside its work."""
        return self._each(Tensor.pin_memory)

    @property
    def num_labels(self) -> int:
        """Predicted tokens."""
        return len(self.label_N)

    @property
    def num_masked(self) -> int:
        """Masked positions."""
        return len(self.masked_M)

    @property
    def rows(self) -> list[Row]:
        """Start, length, start of its trunk and prefix (0: a trunk) of each segment."""
        return [tuple(row[:4]) for row in self.segments.host_S6.tolist()]

    def check(self) -> None:
        """Assert what every consumer relies on; for tests: it is our mistake where it fails."""
        start_S, length_S, trunk_S, prefix_S = self.segments.host_S6[:, :4].long().unbind(1)
        assert self.segments.tokens == len(self.ids_T) == len(self.position_T)
        segment_T = torch.repeat_interleave(torch.arange(len(start_S)), length_S)
        base_T = self.position_T - (torch.arange(len(self.ids_T)) - start_S[segment_T])
        assert bool((base_T == prefix_S[segment_T]).all())
        assert bool((prefix_S[segment_T[self.labelled_N]] == 0).all())
        assert bool((prefix_S[segment_T[self.masked_M]] > 0).all())
        assert not bool(self.ids_T[self.masked_M].any())
        assert bool((self.target_segments.host_S6[:, 3] == 0).all())
        assert self.target_segments.tokens == len(self.target_ids_U) == len(self.target_position_U)
        assert len(self.target_M) == len(self.masked_M)
        assert bool((self.target_M < len(self.target_ids_U)).all())
        at_M = self.target_position_U[self.target_M]
        assert bool((self.position_T[self.masked_M] == at_M).all())
        order = torch.argsort(trunk_S[prefix_S > 0], stable=True)
        assert bool((order == torch.arange(len(order))).all())

    def _each(self, move: Callable[[Tensor], Tensor]) -> "PackedBatch":
        moved = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                moved[field.name] = move(value)
            elif isinstance(value, Segments):
                moved[field.name] = replace(value, table_S6=move(value.table_S6))
        return replace(self, **moved)


def pack_segments(
    trunks: list[np.ndarray],
    branches: list[list[tuple[int, np.ndarray]]],
    *,
    next_tokens: list[np.ndarray] | None = None,
    masked: list[list[np.ndarray]] | None = None,
    windows: list[np.ndarray] | None = None,
) -> PackedBatch:
    """Trunks, what hangs on each, and what is predicted of them.

    Args:
        trunks: token ids of each.
        branches: of each trunk, (prefix, token ids) of its branches; prefix from 1 to its length.
        next_tokens: of each trunk, the token that each of its tokens predicts, -100 where none is;
            None: nothing is predicted on trunks.
        masked: of each branch of each trunk, its masked tokens, counted from its start, ascending,
            at least one; None: nothing is masked.
        windows: of each trunk, the unmasked token ids that it is the beginning of, which the target
            encoder reads; None: the trunks.

    Raises:
        ValueError: a branch that sees more tokens than its trunk has, or a segment without tokens.
    """
    ids_T, position_T, segments = _concatenated(trunks, branches)
    windows = trunks if windows is None else windows
    next_T = np.concatenate([*(next_tokens or []), np.empty(0, np.int64)])
    labelled_N = np.flatnonzero(next_T >= 0)
    masked_rows, target_rows, targets = [], [], []
    own_start, target_start = sum(len(t) for t in trunks), 0  # branches lie behind all trunks
    for window, hung, masks in zip(windows, branches, masked or [[] for _ in trunks], strict=True):
        last = 0
        for (prefix, ids), mask in zip(hung, masks, strict=bool(masked)):
            masked_rows.append(own_start + mask)
            target_rows.append(target_start + prefix + mask)
            own_start += len(ids)
            last = max(last, prefix + int(mask[-1]) + 1)
        if last:
            targets.append(window[:last])
            target_start += last
    target_ids_U, target_position_U, target_segments = _concatenated(targets, [[] for _ in targets])
    none = np.empty(0, np.int64)
    return PackedBatch(
        ids_T=ids_T,
        position_T=position_T,
        segments=segments,
        labelled_N=_long(labelled_N),
        label_N=_long(next_T[labelled_N]),
        masked_M=_long(np.concatenate([*masked_rows, none])),
        target_ids_U=target_ids_U,
        target_position_U=target_position_U,
        target_segments=target_segments,
        target_M=_long(np.concatenate([*target_rows, none])),
        num_trunk_tokens=sum(len(window) for window in windows),
    )


def _concatenated(
    trunks: list[np.ndarray], branches: list[list[tuple[int, np.ndarray]]]
) -> tuple[Tensor, Tensor, Segments]:
    """Ids, positions and the table of segments."""
    start_of = np.cumsum([0, *(len(t) for t in trunks)])
    hung = [(p, s, i) for s, own in zip(start_of, branches, strict=False) for p, i in own]
    rows = [*trunks, *(ids for _, _, ids in hung)]
    length_S = np.array([len(r) for r in rows], np.int64)
    prefix_S = np.array([0] * len(trunks) + [p for p, _, _ in hung], np.int64)
    trunk_S = np.array([*start_of[:-1], *(s for _, s, _ in hung)], np.int64)
    start_S = np.cumsum(length_S) - length_S
    position_T = np.arange(length_S.sum()) - np.repeat(start_S - prefix_S, length_S)
    ids_T = np.concatenate([*rows, np.empty(0, np.int64)])
    segments = Segments.of(*(_long(a) for a in (start_S, length_S, trunk_S, prefix_S)))
    return _long(ids_T), _long(position_T), segments


def _long(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.int64))
