"""The training windows of all timelines, as a table from which a step makes those that it takes.

Legend: W windows, C windows with a cut.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from smbfast.base.runtime import few
from smbfast.batch import Timeline
from smbfast.data.masking import have_cut
from smbfast.data.shards import Shard
from smbfast.data.timelines import Preamble, training_spans, window_of
from smbfast.settings import ObjectiveSettings

_BLOCK = 256  # timelines whose cuts are looked for together: our choice


@dataclass(frozen=True)
class WindowSet:
    """All windows of all timelines in some shards, each once."""

    shards: Sequence[Shard | list[Timeline]]
    preamble: Preamble
    window: int  # context length in tokens
    place_W5: np.ndarray  # int32: shard, timeline in it, and its tokens: start, end, first new one
    length_W: np.ndarray  # int32: tokens, with those before the first bucket
    has_cut_W: np.ndarray  # bool: whether the objective permits a cut
    with_cut_C: np.ndarray  # int32: the windows with a cut, by length
    num_labels: int  # tokens that SFT predicts in an epoch, if it predicts all
    num_lost: int  # tokens cut from headers that are longer than a quarter of a window

    @classmethod
    def of(
        cls,
        shards: Sequence[Shard | list[Timeline]],
        window: int,
        preamble: Preamble,
        objective: ObjectiveSettings,
        stride: int | None = None,
    ) -> "WindowSet":
        """Cut every timeline into its windows, whose distance is `stride` tokens or a window."""
        blocks = [
            _block(s, shard, window, preamble, objective, stride or window, first)
            for s, shard in enumerate(shards)
            for first in range(0, len(shard), _BLOCK)
        ]
        place_W5, lead_W, has_cut_W = (
            np.concatenate([empty, *(block[i] for block in blocks)])
            for i, empty in enumerate(
                (np.empty((0, 5), np.int32), np.empty(0, np.int32), np.empty(0, bool))
            )
        )
        length_W = lead_W + place_W5[:, 3] - place_W5[:, 2]
        with_cut_C = np.flatnonzero(has_cut_W).astype(np.int32)
        return cls(
            shards,
            preamble,
            window,
            place_W5,
            length_W,
            has_cut_W,
            with_cut_C[np.argsort(length_W[with_cut_C], kind="stable")],
            num_labels=sum(block[3] for block in blocks),
            num_lost=sum(block[4] for block in blocks),
        )

    def __len__(self) -> int:
        return len(self.place_W5)

    def __getitem__(self, index: int) -> Timeline:
        shard, timeline, start, end, new = self.place_W5[index].tolist()
        whole = self.shards[shard][timeline]
        return window_of(whole, start, end, new, self.window, self.preamble)[0]

    @property
    def num_tokens(self) -> int:
        """The number of tokens of all windows."""
        return int(self.length_W.sum())

    @property
    def num_with_cut(self) -> int:
        """The number of windows with a cut, which take part in JEPA."""
        return len(self.with_cut_C)

    @property
    def num_tokens_with_cut(self) -> int:
        """The number of tokens of windows with a cut."""
        return int(self.length_W[self.with_cut_C].sum())

    def require_cuts(self) -> None:
        """Raise a ValueError unless at least one window has a cut."""
        if not self.num_with_cut:
            raise ValueError(
                "JEPA, and SFT on the future alone, need training windows with a cut; none of "
                f"{few(len(self))} has one. Lower objective.min_future or train with SFT alone "
                "(`python -m smbfast.train sft`); if records are longer than windows, raise "
                "data.window or, in a text format, choose a finer data.bucket"
            )


def _block(
    number: int,
    shard: Shard | list[Timeline],
    window: int,
    preamble: Preamble,
    objective: ObjectiveSettings,
    stride: int,
    first: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, int]:
    """Return places, leads and cut flags of a block of timelines, and numbers of labels and lost.

    Args:
        number: of the shard.
        first: the timeline with which the block begins.
    """
    timelines = [shard[t] for t in range(first, min(first + _BLOCK, len(shard)))]
    places, leads = array("i"), array("i")
    num_labels = num_lost = 0
    num_begin = int(preamble.begin is not None)
    for t, timeline in enumerate(timelines, start=first):
        for start, end, new in training_spans(timeline, window, stride, preamble):
            lead = preamble.lead_length(timeline, start, window)
            places.extend((number, t, start, end, new))
            leads.append(lead)
            if new == timeline.header:  # the first window, whose demographics are labels
                num_labels += lead + end - start - 1
                num_lost += max(timeline.header + num_begin - lead, 0)
            else:
                num_labels += lead + end - start - max(lead + new - start, 1)
    place_W5 = np.frombuffer(places, np.int32).reshape(-1, 5)
    lead_W = np.frombuffer(leads, np.int32)
    _, owner_W, start_W, end_W, _ = place_W5.astype(np.int64).T
    has_cut_W = have_cut(timelines, owner_W - first, start_W, end_W, lead_W, objective)
    return place_W5, lead_W, has_cut_W, num_labels, num_lost
