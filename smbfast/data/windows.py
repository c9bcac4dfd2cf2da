"""The training windows of all timelines, as a table from which a step makes those that it takes.

Legend: W windows, C windows with a cut or with a pair, S timelines, B buckets, H horizons, L lines.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from smbfast.base.runtime import few
from smbfast.batch import Ahead, Timeline
from smbfast.data.code_classes import CodeClasses
from smbfast.data.horizons import Horizons, usable
from smbfast.data.masking import have_cut
from smbfast.data.shards import BLOCK, Block, Shard
from smbfast.data.timelines import Preamble, lines_ahead, training_spans, window_of
from smbfast.settings import ObjectiveSettings

COLUMNS: dict[str, type] = {
    "place_W5": np.int32,  # shard, timeline in it, and its tokens: start, end, first new one
    "length_W": np.int32,  # tokens, with those before the first bucket
    "has_cut_W": np.bool_,  # whether the objective permits a cut
    "labels_W": np.int32,  # tokens that SFT predicts, if it predicts all
    "has_pair_W": np.bool_,  # whether a bucket has another within a horizon that is known
}
ORDERS = {"with_cut_C": "has_cut_W", "with_pair_C": "has_pair_W"}  # int32: windows, by length
_BUCKETS = 1 << 16  # whose pairs are made together: our choice


@dataclass
class Sums:
    """What is summed over windows."""

    num_labels: int = 0  # tokens that SFT predicts in an epoch, if it predicts all
    num_lost: int = 0  # tokens cut from headers that are longer than a quarter of a window
    num_tokens: int = 0  # with what stands before the first bucket of each window
    num_tokens_with_cut: int = 0  # of windows with a cut


@dataclass(frozen=True)
class WindowSet:
    """All windows of all timelines in some shards, each once."""

    shards: Sequence[Shard | list[Timeline]]
    preamble: Preamble
    window: int  # context length in tokens
    place_W5: np.ndarray  # these five: as in COLUMNS
    length_W: np.ndarray
    has_cut_W: np.ndarray
    labels_W: np.ndarray
    has_pair_W: np.ndarray
    with_cut_C: np.ndarray  # int32: the windows with a cut, by length
    with_pair_C: np.ndarray  # int32: the windows with a pair, by length
    sums: Sums = field(default_factory=Sums)
    horizons: Horizons | None = None  # with them, windows have what their records say behind them
    classes: CodeClasses | None = None  # of the lines behind

    @classmethod
    def of(
        cls,
        shards: Sequence[Shard | list[Timeline]],
        window: int,
        preamble: Preamble,
        objective: ObjectiveSettings,
        stride: int | None = None,
        *,
        horizons: Horizons | None = None,
        classes: CodeClasses | None = None,
    ) -> "WindowSet":
        """Cut every timeline into its windows, whose distance is `stride` tokens or a window.

        The table is in memory; `Prepared.windows` has one on disk.

        Args:
            horizons: of an objective that reads ahead. Without them no window has a pair.
            classes: of the lines that it reads; None where it reads none.
        """
        sums = Sums()
        parts = list(window_columns(shards, window, preamble, objective, stride, sums, horizons))
        arrays = {
            n: np.concatenate(
                [np.empty((0, 5) if n == "place_W5" else 0, d), *(p[n] for p in parts)]
            )
            for n, d in COLUMNS.items()
        }
        for name, flag in ORDERS.items():
            own_C = np.flatnonzero(arrays[flag]).astype(np.int32)
            arrays[name] = own_C[np.argsort(arrays["length_W"][own_C], kind="stable")]
        return cls(
            shards,
            preamble,
            window,
            **arrays,
            sums=sums,
            horizons=horizons,
            classes=classes,
        )

    def __len__(self) -> int:
        return len(self.place_W5)

    def __getitem__(self, index: int) -> Timeline:
        shard, timeline, start, end, new = self.place_W5[index].tolist()
        try:
            of_shard = self.shards[shard]
            whole = of_shard[timeline]
            fits = 0 <= start < end <= len(whole)
        except IndexError:
            fits = False
        if not fits:
            raise ValueError(
                f"window {index} must be of a timeline of these shards; the table of windows is of "
                "others. Remove the folder `windows` of the prepared data, and it is made again"
            )
        window = window_of(whole, start, end, new, self.window, self.preamble)[0]
        if self.horizons is None:
            return window
        time_L, class_L = np.empty(0, np.int64), np.empty(0, np.int32)
        if self.classes is not None:
            own, time_L = lines_ahead(whole, start, end, self.horizons.longest)
            class_L = self.classes.of_lines(of_shard, whole.line_code_L[own])
            time_L, class_L = time_L[class_L >= 0], class_L[class_L >= 0]
        return replace(window, ahead=Ahead(time_L, class_L, whole.last, whole.terminal))

    @property
    def num_labels(self) -> int:
        """The number of tokens that SFT predicts in an epoch, if it predicts all."""
        return self.sums.num_labels

    @property
    def num_lost(self) -> int:
        """The number of tokens cut from headers that are longer than a quarter of a window."""
        return self.sums.num_lost

    @property
    def num_tokens(self) -> int:
        """The number of tokens of all windows."""
        return self.sums.num_tokens

    @property
    def num_with_cut(self) -> int:
        """The number of windows with a cut, which take part in JEPA."""
        return len(self.with_cut_C)

    @property
    def num_tokens_with_cut(self) -> int:
        """The number of tokens of windows with a cut."""
        return self.sums.num_tokens_with_cut

    @property
    def num_with_pair(self) -> int:
        """The number of windows with a pair, which take part in a latent loss of horizons."""
        return len(self.with_pair_C)

    def without_pairs(self) -> str:
        """Return what to say where no window has a pair."""
        names = ", ".join(self.horizons.names) if self.horizons else "none"
        return (
            "what is to come needs training windows in which a bucket has another within a "
            f"horizon that the record covers; with the horizons {names} none of "
            f"{few(len(self))} has one. Name longer ones (objective.horizons), raise data.window "
            "or take objective.censored=none"
        )

    def require_pairs(self) -> None:
        """Raise a ValueError unless at least one window has a pair."""
        if not self.num_with_pair:
            raise ValueError(self.without_pairs())

    def require_cuts(self) -> None:
        """Raise a ValueError unless at least one window has a cut."""
        if not self.num_with_cut:
            raise ValueError(
                "JEPA, and SFT on the future alone, need training windows with a cut; none of "
                f"{few(len(self))} has one. Lower objective.min_future or train with SFT alone "
                "(`python -m smbfast.train sft`); if records are longer than windows, raise "
                "data.window or, in a text format, choose a finer data.bucket"
            )


def window_columns(
    shards: Iterable[Shard | list[Timeline]],
    window: int,
    preamble: Preamble,
    objective: ObjectiveSettings,
    stride: int | None,
    sums: Sums,
    horizons: Horizons | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the columns of the table of windows, a block of timelines at a time, and add to `sums`.

    The windows are in the order of shards and of their timelines. The arguments are those of
    `WindowSet.of`.
    """
    for number, shard in enumerate(shards):
        for block in _blocks(shard):
            place_W5, lead_W = _places(number, block, window, preamble, stride or window)
            _, owner_W, start_W, end_W, new_W = place_W5.T
            owner_W = owner_W - block.first
            length_W = lead_W + end_W - start_W
            has_cut_W = have_cut(block, owner_W, start_W, end_W, lead_W, objective)
            header_W = block.header_S[owner_W]
            is_first_W = new_W == header_W  # the first window, whose demographics are labels
            before_W = np.where(is_first_W, 1, np.maximum(lead_W + new_W - start_W, 1))
            num_begin = int(preamble.begin is not None)
            lost_W = np.where(is_first_W, np.maximum(header_W + num_begin - lead_W, 0), 0)
            labels_W = length_W - before_W
            sums.num_labels += int(labels_W.sum())
            sums.num_lost += int(lost_W.sum())
            sums.num_tokens += int(length_W.sum())
            sums.num_tokens_with_cut += int(length_W[has_cut_W].sum())
            has_pair_W = np.zeros(len(length_W), bool)
            if horizons is not None:
                has_pair_W = have_pair(block, owner_W, start_W, end_W, horizons)
            columns = (place_W5, length_W, has_cut_W, labels_W, has_pair_W)
            named = zip(COLUMNS.items(), columns, strict=True)
            yield {n: a.astype(d) for (n, d), a in named}


def have_pair(
    block: Block, owner_W: np.ndarray, start_W: np.ndarray, end_W: np.ndarray, horizons: Horizons
) -> np.ndarray:
    """Return whether each window has a pair: bool [W].

    A pair is a bucket of the window and a horizon that is usable there, within which a later bucket
    of the same window begins; the next one does if any does.

    Args:
        owner_W: which of the timelines of the block a window is of.
        start_W, end_W: its tokens in the timeline.
    """
    offset_S, (_, num_buckets_S, _) = block.start_S3[:, 0], block.num_S3.T
    end_B = block.columns["bucket_end_B"] + np.repeat(offset_S, num_buckets_S)
    time_B, about_S5 = block.columns["bucket_time_B"], block.about_S5
    last_B, terminal_B = (np.repeat(about_S5[:, i], num_buckets_S) for i in (3, 4))
    near_B = np.zeros(len(time_B), bool)
    for first in range(0, len(time_B) - 1, _BUCKETS):
        own = slice(first, min(first + _BUCKETS, len(time_B) - 1))
        near_BH = usable(time_B[own], last_B[own], terminal_B[own], horizons)
        near_BH &= np.diff(time_B[own.start : own.stop + 1])[:, None] <= horizons.spans_H
        near_B[own] = near_BH.any(1)
    before_B = near_B.cumsum() - near_B  # pairs of the buckets before each
    first_W = end_B.searchsorted(start_W + offset_S[owner_W], side="right")
    last_W = end_B.searchsorted(end_W + offset_S[owner_W])
    return before_B[last_W] > before_B[first_W]


def _blocks(shard: Shard | list[Timeline]) -> Iterator[Block]:
    if isinstance(shard, Shard):
        yield from shard.blocks()
        return
    for first in range(0, len(shard), BLOCK):
        yield Block.of(shard[first : first + BLOCK], first)


def _places(
    number: int, block: Block, window: int, preamble: Preamble, stride: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return places of the windows of a block, int64 [W, 5], and tokens before them, int64 [W].

    Most timelines are one window (`training_spans`), and these are found together.

    Args:
        number: of the shard.
    """
    length_S, num_buckets_S, _ = block.num_S3.T
    filled_S = np.flatnonzero((num_buckets_S > 0) & (block.header_S < length_S))
    first_S = block.start_S3[filled_S, 1]  # the first bucket of each
    header_S, length_S = block.header_S[filled_S], length_S[filled_S]
    lead_S = preamble.first_header_lengths(
        header_S, block.birth_S[filled_S], block.columns["bucket_time_B"][first_S], window
    )
    is_one_S = length_S <= header_S + window - lead_S
    is_one_S &= block.columns["bucket_end_B"][first_S] > header_S  # else it is not the first
    one_S = filled_S[is_one_S]
    header_S, length_S, lead_S = header_S[is_one_S], length_S[is_one_S], lead_S[is_one_S]
    places, leads = array("q"), array("q")
    for s in filled_S[~is_one_S].tolist():
        timeline = block[s]
        for start, end, new in training_spans(timeline, window, stride, preamble):
            places.extend((number, block.first + s, start, end, new))
            leads.append(preamble.lead_length(timeline, start, window))
    numbers_S = np.full(len(one_S), number)
    place_W5 = np.concatenate(
        [
            np.stack([numbers_S, block.first + one_S, header_S, length_S, header_S], 1),
            np.frombuffer(places, np.int64).reshape(-1, 5),
        ]
    )
    lead_W = np.concatenate([lead_S, np.frombuffer(leads, np.int64)])
    order_W = np.argsort(place_W5[:, 1], kind="stable")
    return place_W5[order_W], lead_W[order_W]
