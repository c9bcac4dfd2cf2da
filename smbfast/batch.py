"""The types that modules exchange: a patient's tokens, a batch of packed sequences, new tokens.

A pack concatenates sequences without padding (sequence packing). Branches share the prefix of their
trunk instead of repeating it (shared-prefix, or tree, attention).

Legend: T tokens of the online encoder, U tokens of the target encoder, L lines (one code in one
bucket, or one event), B buckets, S segments, N labelled tokens, M masked tokens, R tokens that the
mask vector replaces. A "row of T" is a token's index in the pack.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from smbkernels.attention import Segments
from torch import Tensor

SegmentTuple = tuple[int, int, int, int]  # start, length, start of its trunk, prefix length
UNKNOWN = int(np.iinfo(np.int64).min)  # the birth of a patient whose record does not tell it


@dataclass(frozen=True)
class Ahead:
    """What a record says behind the positions of a window, past the window's end.

    The lines are those of the record from the window's first bucket on, as far as its last bucket
    and the longest horizon behind it.
    """

    time_L: np.ndarray  # int64, ascending: when the bucket of each line begins
    class_L: np.ndarray  # int32: the class of its code; lines without a class are left out
    last: int  # the time of the record's last event, microseconds since 1970
    terminal: int  # the time of its first terminal event, UNKNOWN if there is none


@dataclass(frozen=True)
class Timeline:
    """The tokens of one patient, bucket after bucket, with the time of every line.

    In the text formats a bucket is a span of time with a line of text for each code. In the format
    `codes` a bucket is a moment, and each event is a line of one token. Offsets count tokens from
    the start of the timeline, so a cut or a decision node is an exact position. A window of a
    timeline is itself a `Timeline` (`smbfast.data.timelines`).
    """

    subject: int
    ids_T: np.ndarray  # int32
    header: int  # number of tokens before the first bucket: demographics, and the age at it
    bucket_end_B: np.ndarray  # int32: the token after the last one of each bucket
    bucket_time_B: np.ndarray  # int64: when each bucket begins, microseconds since 1970
    bucket_head_B: np.ndarray  # uint16: tokens of its date, repeated where a window goes on in it
    line_start_L: np.ndarray  # int32: first token of each line; dates, tags and gaps are no lines
    line_end_L: np.ndarray  # int32: the token after the last one of each line
    line_time_L: np.ndarray  # int64: the last event of each line, microseconds since 1970
    line_section_L: np.ndarray  # uint8: index into SECTIONS
    birth: int = UNKNOWN  # microseconds since 1970
    start: int = 0  # of a window: the token of the whole timeline with which its buckets begin
    labels_from: int = 0  # of a window: its first token that no earlier window predicts
    last: int = UNKNOWN  # of a whole record: the time of its last event
    terminal: int = UNKNOWN  # of a whole record: the time of its first terminal event
    # of a whole record, int32: the token of each line's code, or the code's place among those of
    # its shard
    line_code_L: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    ahead: Ahead | None = None  # of a window, where an objective reads past its end
    goes_on: bool = False  # of a window: whether its last bucket goes on in the next one

    def __len__(self) -> int:
        return len(self.ids_T)

    def bucket_start(self, bucket: int) -> int:
        """The token at which a bucket begins."""
        return int(self.bucket_end_B[bucket - 1]) if bucket else self.header


@dataclass(frozen=True)
class NewToken:
    """A token that a pretrained tokenizer did not have, and what its embedding starts from.

    The row starts as the mean of the embeddings of `text`, plus a small vector of the bin
    (`smbfast.model.vocabulary`). An opening and a closing delimiter are two bins of one word.
    """

    id: int
    text: str  # words; empty for a row that starts as the mean of the table
    bin: int | None = None  # its place, from 0, among the `num_bins` tokens of one code
    num_bins: int | None = None

    def __post_init__(self) -> None:
        numbers = [n for n in (self.id, self.bin, self.num_bins) if n is not None]
        valid = isinstance(self.text, str) and all(type(n) is int and n >= 0 for n in numbers)
        if self.bin is None or self.num_bins is None:
            valid = valid and self.bin is self.num_bins
        elif valid:
            valid = self.bin < self.num_bins
        if not valid or self.id is None:
            raise ValueError(
                "a new token must have an id from 0, a text, and both of bin < num_bins or none of "
                f"them; got id {self.id}, bin {self.bin} of {self.num_bins}"
            )

    @classmethod
    def of_record(cls, record: Any) -> "NewToken":
        """Read the result of `to_record`, as JSON gives it back.

        Raises:
            ValueError: if it is not that; bare ids are what earlier versions wrote.
        """
        names = {f.name for f in fields(cls)}
        if not isinstance(record, dict) or record.keys() != names:
            raise ValueError(
                f"the record of a new token must hold {', '.join(sorted(names))}, got a "
                f"{type(record).__name__} without them; prepare the data again"
            )
        return cls(**record)

    def to_record(self) -> dict[str, int | str | None]:
        """Return its fields, for JSON."""
        return vars(self).copy()


@dataclass(frozen=True)
class WindowPairs:
    """Positions of one window, each with the horizons that are known there (`smbfast.data.pairs`).

    Legend: N positions, P pairs, Z codes that come.
    """

    token_N: np.ndarray  # int64: the last token of a bucket, ascending
    position_P: np.ndarray  # int64: index into N, ascending
    horizon_P: np.ndarray  # int64
    end_P: np.ndarray  # int64: the token after the last one of the window in the horizon
    pair_Z: np.ndarray  # int64: index into P
    class_Z: np.ndarray  # int64

    @property
    def latent_P(self) -> np.ndarray:
        """Whether the window has a token in the horizon, bool [P]."""
        return self.end_P > self.token_N[self.position_P] + 1


@dataclass(frozen=True)
class FuturePairs:
    """Pairs of a position and a horizon, and what their records hold within it.

    Pair p is the position at row `row_N[position_P[p]]` of T with the horizon `horizon_P[p]`. For
    horizon JEPA, pair `latent_Q[q]` has tokens in its trunk: rows `first_Q[q]` to `end_Q[q]`
    (exclusive) of U, behind the row of the position itself, `first_Q[q] - 1`. For codes to come,
    class `class_Z[z]` occurs in pair `pair_Z[z]`, and classes that are not listed do not.

    Legend, beside that of PackedBatch: N positions, P pairs, Q pairs of horizon JEPA, Z codes that
    come.
    """

    row_N: Tensor  # int64: rows of T, in trunks
    position_P: Tensor  # int64
    horizon_P: Tensor  # int64: number of the horizon
    latent_Q: Tensor  # int64: ascending, so the pairs of a trunk lie together
    first_Q: Tensor  # int64
    end_Q: Tensor  # int64
    pair_Z: Tensor  # int64
    class_Z: Tensor  # int64
    num_by_trunk: tuple[int, ...]  # of Q, for each trunk that the target encoder reads
    num_by_horizon: tuple[int, ...]  # of Q

    @property
    def horizon_Q(self) -> Tensor:
        """The number of the horizon of each pair of horizon JEPA, int64 [Q]."""
        return self.horizon_P[self.latent_Q]


@dataclass(frozen=True)
class PackedBatch:
    """Trunks and branches in one sequence of tokens without padding (sequence packing).

    All trunks come first, then the branches in the order of their trunks. A branch continues a
    prefix of its trunk: its position ids go on from the cut, and each of its tokens attends to
    `trunk[:prefix]` and to the branch up to itself (shared-prefix attention).

    The online encoder at row `masked_M[m]` of T predicts the target encoder's hidden state at row
    `target_M[m]` of U, which is the same token unmasked. The mask vector replaces it, and with
    `objective.skeleton=hidden` other tokens of the branch as well. The id of a replaced token is 0
    in `ids_T`, so the online encoder cannot read it.

    The CPU makes every index that a step needs, so that nothing waits for a GPU to count.
    """

    ids_T: Tensor  # int64
    position_T: Tensor  # int64
    segments: Segments
    labelled_N: Tensor  # int64: rows of T, in trunks, whose next token is predicted
    label_N: Tensor  # int64: that next token
    masked_M: Tensor  # int64: rows of T, in branches, that are predicted
    replaced_R: Tensor  # int64: rows of T, in branches, that read the mask vector: M and others
    target_ids_U: Tensor  # int64: trunks with masked tokens, up to the last masked one
    target_position_U: Tensor  # int64
    target_segments: Segments  # of U: trunks only
    target_M: Tensor  # int64: rows of U
    num_trunk_tokens: int  # tokens of the unshortened trunks, which throughput counts
    pairs: FuturePairs | None = None  # in runs that predict within horizons of time

    def to(self, device: torch.device | str) -> "PackedBatch":
        """Return the batch on `device`; from pinned memory, the copy does not block the CPU."""
        return self._each(lambda x: x.to(device, non_blocking=True))

    def pinned(self) -> "PackedBatch":
        """Return the batch in page-locked memory, from which a GPU copies while it computes."""
        return self._each(Tensor.pin_memory)

    @property
    def num_labels(self) -> int:
        """The number of tokens that SFT predicts."""
        return len(self.label_N)

    @property
    def num_masked(self) -> int:
        """The number of masked tokens, which JEPA predicts."""
        return len(self.masked_M)

    @property
    def num_latent(self) -> int:
        """The number of pairs of a position and a horizon that horizon JEPA predicts."""
        return len(self.pairs.latent_Q) if self.pairs else 0

    @property
    def num_pairs(self) -> int:
        """The number of pairs of a position and a horizon for which codes to come are predicted."""
        return len(self.pairs.position_P) if self.pairs else 0

    @property
    def segment_tuples(self) -> list[SegmentTuple]:
        """Start, length, start of its trunk, and prefix length (0 for a trunk) of each segment."""
        return [(s, n, trunk, p) for s, n, trunk, p, *_ in self.segments.host_S6.tolist()]

    def check(self) -> None:
        """Assert what every consumer relies on. Tests call this; a failure is a bug of ours."""
        start_S, length_S, trunk_S, prefix_S = self.segments.host_S6[:, :4].long().unbind(1)
        assert self.segments.tokens == len(self.ids_T) == len(self.position_T)
        segment_T = torch.repeat_interleave(torch.arange(len(start_S)), length_S)
        base_T = self.position_T - (torch.arange(len(self.ids_T)) - start_S[segment_T])
        assert bool((base_T == prefix_S[segment_T]).all())
        assert bool((prefix_S[segment_T[self.labelled_N]] == 0).all())
        assert bool((prefix_S[segment_T[self.masked_M]] > 0).all())
        assert bool((prefix_S[segment_T[self.replaced_R]] > 0).all())
        assert bool((self.replaced_R[1:] > self.replaced_R[:-1]).all())
        assert bool(torch.isin(self.masked_M, self.replaced_R).all())
        assert not bool(self.ids_T[self.replaced_R].any())
        assert bool((self.target_segments.host_S6[:, 3] == 0).all())
        assert self.target_segments.tokens == len(self.target_ids_U) == len(self.target_position_U)
        assert len(self.target_M) == len(self.masked_M)
        assert bool((self.target_M < len(self.target_ids_U)).all())
        at_M = self.target_position_U[self.target_M]
        assert bool((self.position_T[self.masked_M] == at_M).all())
        order = torch.argsort(trunk_S[prefix_S > 0], stable=True)
        assert bool((order == torch.arange(len(order))).all())
        if self.pairs:
            self._check_pairs(self.pairs, prefix_S[segment_T])

    def _check_pairs(self, pairs: FuturePairs, prefix_T: Tensor) -> None:
        first_Q, end_Q, position_Q = (x for x in (pairs.first_Q, pairs.end_Q, pairs.position_P))
        row_Q = pairs.row_N[position_Q[pairs.latent_Q]]
        assert not bool(prefix_T[pairs.row_N].any())
        assert bool((first_Q < end_Q).all()) and bool((end_Q <= len(self.target_ids_U)).all())
        assert bool((self.target_position_U[first_Q - 1] == self.position_T[row_Q]).all())
        steps = self.target_position_U[end_Q - 1] - self.target_position_U[first_Q - 1]
        assert bool((steps == end_Q - first_Q).all())  # within one trunk
        assert sum(pairs.num_by_trunk) == sum(pairs.num_by_horizon) == len(first_Q)
        assert len(pairs.num_by_trunk) == len(self.target_segments.host_S6)

    def _each(self, move: Callable[[Tensor], Tensor]) -> "PackedBatch":
        return _moved(self, move)


def pack_segments(
    trunks: list[np.ndarray],
    branches: list[list[tuple[int, np.ndarray]]],
    *,
    next_tokens: list[np.ndarray] | None = None,
    masked: list[list[np.ndarray]] | None = None,
    replaced: list[list[np.ndarray]] | None = None,
    windows: list[np.ndarray] | None = None,
    pairs: list[WindowPairs] | None = None,
    num_horizons: int = 0,
) -> PackedBatch:
    """Pack trunks and their branches, with the indices of what is predicted on them.

    Args:
        trunks: the token ids of each trunk.
        branches: for each trunk, its branches as (prefix length from 1, token ids).
        next_tokens: for each trunk, the token that each of its tokens predicts, or -100 where
            nothing is predicted. With None, nothing is predicted on trunks.
        masked: for each branch of each trunk, the positions of its masked tokens, counted from the
            start of the branch, ascending, at least one. With None, nothing is masked.
        replaced: likewise, all positions that read the mask vector. With None, the masked ones.
        windows: for each trunk, the unmasked token ids whose beginning it is, which the target
            encoder reads. With None, these are the trunks.
        pairs: for each trunk, its positions and horizons; with None there are none. A batch has
            masked tokens or pairs that horizon JEPA predicts, not both.
        num_horizons: that `pairs` speak of; 0 if only codes to come are predicted from them.

    Raises:
        ValueError: if a branch sees more tokens than its trunk has, or a segment has no tokens.
    """
    ids_T, position_T, segments = _concatenated(trunks, branches)
    windows = trunks if windows is None else windows
    next_T = np.concatenate([*(next_tokens or []), np.empty(0, np.int64)])
    labelled_N = np.flatnonzero(next_T >= 0)
    rows, targets = _branch_rows(trunks, branches, windows, masked, replaced)
    future = None
    if pairs is not None:
        future, ends = _future_pairs(pairs, [len(t) for t in trunks], num_horizons)
        assert not targets or not any(ends)
        targets += [window[:end] for window, end in zip(windows, ends, strict=True) if end]
    target_ids_U, target_position_U, target_segments = _concatenated(targets, [[] for _ in targets])
    return PackedBatch(
        ids_T=ids_T,
        position_T=position_T,
        segments=segments,
        labelled_N=_long(labelled_N),
        label_N=_long(next_T[labelled_N]),
        masked_M=_long(rows[0]),
        replaced_R=_long(rows[1]),
        target_ids_U=target_ids_U,
        target_position_U=target_position_U,
        target_segments=target_segments,
        target_M=_long(rows[2]),
        num_trunk_tokens=sum(len(window) for window in windows),
        pairs=future,
    )


def idle_batch() -> PackedBatch:
    """Return a batch of one token of which nothing is predicted, for a rank without a row."""
    batch = pack_segments([np.zeros(1, np.int64)], [[]])
    return replace(
        batch,
        target_ids_U=batch.ids_T,
        target_position_U=batch.position_T,
        target_segments=batch.segments,
        num_trunk_tokens=0,
    )


def _branch_rows(
    trunks: list[np.ndarray],
    branches: list[list[tuple[int, np.ndarray]]],
    windows: list[np.ndarray],
    masked: list[list[np.ndarray]] | None,
    replaced: list[list[np.ndarray]] | None,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return masked rows of T, replaced rows of T and the masked tokens' rows of U; also what the
    target reads of each trunk with masked tokens."""
    rows: list[list[np.ndarray]] = [[np.empty(0, np.int64)] for _ in range(3)]
    targets = []
    own_start, target_start = sum(len(t) for t in trunks), 0  # branches lie behind all trunks
    is_masked, masked = bool(masked), masked or [[] for _ in trunks]
    per_trunk = zip(windows, branches, masked, replaced or masked, strict=True)
    for window, own_branches, *positions in per_trunk:
        last = 0
        for (prefix, ids), mask, other in zip(own_branches, *positions, strict=is_masked):
            rows[0].append(own_start + mask)
            rows[1].append(own_start + other)
            rows[2].append(target_start + prefix + mask)
            own_start += len(ids)
            last = max(last, prefix + int(mask[-1]) + 1)
        if last:
            targets.append(window[:last])
            target_start += last
    return [np.concatenate(own) for own in rows], targets


def _future_pairs(
    pairs: list[WindowPairs], lengths: list[int], num_horizons: int
) -> tuple[FuturePairs, list[int]]:
    """Put the pairs of trunks behind each other; also how far the target reads each trunk."""
    none = np.empty(0, np.int64)
    columns: dict[str, list[np.ndarray]] = {f.name: [none] for f in fields(FuturePairs)}
    start = target_start = num_positions = num_pairs = 0
    ends, num_by_trunk = [], []
    for own, length in zip(pairs, lengths, strict=True):
        latent_Q = np.flatnonzero(own.latent_P) if num_horizons else none
        first_Q = own.token_N[own.position_P[latent_Q]] + 1
        end_Q = own.end_P[latent_Q]
        columns["row_N"].append(start + own.token_N)
        columns["position_P"].append(num_positions + own.position_P)
        columns["horizon_P"].append(own.horizon_P)
        columns["latent_Q"].append(num_pairs + latent_Q)
        columns["first_Q"].append(target_start + first_Q)
        columns["end_Q"].append(target_start + end_Q)
        columns["pair_Z"].append(num_pairs + own.pair_Z)
        columns["class_Z"].append(own.class_Z)
        ends.append(int(end_Q.max(initial=0)))
        if len(latent_Q):
            num_by_trunk.append(len(latent_Q))
        start, target_start = start + length, target_start + ends[-1]
        num_positions += len(own.token_N)
        num_pairs += len(own.position_P)
    arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
    horizon_Q = arrays["horizon_P"][arrays["latent_Q"]]
    tensors = {name: _long(array) for name, array in arrays.items() if name[-2] == "_"}
    by_horizon = np.bincount(horizon_Q, minlength=num_horizons).tolist()
    future = FuturePairs(
        **tensors, num_by_trunk=tuple(num_by_trunk), num_by_horizon=tuple(by_horizon)
    )
    return future, ends


def _moved(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """Return a record whose tensors, also those of records inside it, are moved."""
    moved: dict[str, Any] = {}
    for own in fields(value):
        inner = getattr(value, own.name)
        if isinstance(inner, Tensor):
            moved[own.name] = move(inner)
        elif isinstance(inner, Segments):
            moved[own.name] = replace(inner, table_S6=move(inner.table_S6))
        elif isinstance(inner, FuturePairs):
            moved[own.name] = _moved(inner, move)
    return replace(value, **moved)


def _concatenated(
    trunks: list[np.ndarray], branches: list[list[tuple[int, np.ndarray]]]
) -> tuple[Tensor, Tensor, Segments]:
    """Return token ids, position ids and the segments of the pack."""
    start_of = np.cumsum([0, *(len(t) for t in trunks)])
    flat = [(p, s, i) for s, own in zip(start_of, branches, strict=False) for p, i in own]
    ids_of = [*trunks, *(ids for _, _, ids in flat)]
    length_S = np.array([len(ids) for ids in ids_of], np.int64)
    prefix_S = np.array([0] * len(trunks) + [p for p, _, _ in flat], np.int64)
    trunk_S = np.array([*start_of[:-1], *(s for _, s, _ in flat)], np.int64)
    start_S = np.cumsum(length_S) - length_S
    position_T = np.arange(length_S.sum()) - np.repeat(start_S - prefix_S, length_S)
    ids_T = np.concatenate([*ids_of, np.empty(0, np.int64)])
    segments = Segments.of(*(_long(a) for a in (start_S, length_S, trunk_S, prefix_S)))
    return _long(ids_T), _long(position_T), segments


def _long(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.int64))
