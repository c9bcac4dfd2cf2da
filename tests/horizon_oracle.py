"""Horizon JEPA and codes to come once more, from transformers and PEFT alone, one pair at a time.

Shares no line with what it judges: who is followed until when, which buckets lie in a horizon and
which codes come are read off the record itself, event by event; states are those of the language
model called as anyone would call it; averages, standardisation and cross-entropy are written out.
What is given is what was drawn: the windows of a record and the positions in them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tests.second_oracle import Oracle, hidden_states

DECAY, SOFT, FLOOR = 0.99, 0.01, 1e-3


@dataclass(frozen=True)
class Bucket:
    """A moment of a record in codes, or a span of time in text."""

    time: int  # when it begins, microseconds
    ids: tuple[int, ...]  # all its tokens: gaps, dates and tags as well
    classes: tuple[int, ...]  # the class of each of its events; -1 of one without


@dataclass(frozen=True)
class Record:
    """All that is known of a patient."""

    buckets: tuple[Bucket, ...]
    last: int  # time of the last event
    terminal: int | None = None  # time of the first event after which nothing is to come
    length: int = 0  # of a bucket, microseconds; 0: a bucket is a moment
    header: tuple[int, ...] = (1, 3, 4)

    def known_at(self, number: int) -> int:
        """The last microsecond of a bucket: what it holds may be as late as that."""
        return self.buckets[number].time + max(self.length - 1, 0)

    def coming(self, number: int, horizon: int) -> list[int]:
        """The buckets that lie whole in (t, t + horizon], t the end of a bucket."""
        t = self.known_at(number)
        later = range(number + 1, len(self.buckets))
        return [q for q in later if self.buckets[q].time > t and self.known_at(q) <= t + horizon]

    def is_usable(self, number: int, horizon: int, censored: str) -> bool:
        """Whether what comes within a horizon of the end of a bucket is known."""
        t = self.known_at(number)
        if self.terminal is not None:
            return t < self.terminal  # followed for good
        return censored == "none" or t + horizon <= self.last


@dataclass(frozen=True)
class View:
    """What one window shows of a record: its tokens, and where each bucket's lie."""

    record: Record
    ids: tuple[int, ...]
    rows: dict[int, range]  # of a bucket, as far as the window shows it
    ends: tuple[int, ...]  # the buckets whose last token is in the window
    first: int  # its first token that no earlier window has: header and date are repeated
    positions: tuple[int, ...] = ()  # those of them that were drawn

    @classmethod
    def of(cls, record: Record, start: int, stop: int, lead: Sequence[int]) -> "View":
        """The tokens `[start, stop)` of the record, counted from its header's first."""
        ids, rows, ends, place = list(lead), {}, [], len(record.header)
        for number, bucket in enumerate(record.buckets):
            inside = range(max(place, start), min(place + len(bucket.ids), stop))
            if inside:
                rows[number] = range(len(ids), len(ids) + len(inside))
                ids += [bucket.ids[t - place] for t in inside]
                ends += [number] * (inside.stop == place + len(bucket.ids))
            place += len(bucket.ids)
        first = 1 if start == len(record.header) else len(lead)
        return cls(record, tuple(ids), rows, tuple(ends), first)

    def at(self, positions: Iterable[int]) -> "View":
        """The same, with the buckets that were drawn."""
        return replace(self, positions=tuple(positions))

    def usable(self, spans: Sequence[int], censored: str) -> list[tuple[int, int]]:
        """The pairs of a drawn bucket and the number of a horizon that are known."""
        known = self.record.is_usable
        each = [(p, h) for p in self.positions for h in range(len(spans))]
        return [(p, h) for p, h in each if known(p, spans[h], censored)]

    def tokens_within(self, number: int, horizon: int) -> list[int]:
        """The tokens of the window that come within a horizon of the end of a bucket."""
        near = self.record.coming(number, horizon)
        return [row for q in near for row in self.rows.get(q, ())]

    def classes_within(self, number: int, horizon: int) -> set[int]:
        """The classes of all that comes, in the window or after it."""
        near = self.record.coming(number, horizon)
        return {c for q in near for c in self.record.buckets[q].classes if c >= 0}


class Running:
    """Mean and variance of a target by horizon and width, as of the steps before."""

    def __init__(self, num_horizons: int, width: int) -> None:
        zeros = torch.zeros(num_horizons, width, dtype=torch.float64)
        self.mean, self.square = zeros.clone(), zeros.clone()
        self.steps = [0] * num_horizons

    def add(self, h: int, targets: list[dict[tuple[int, int], Tensor]]) -> None:
        """Take in the targets of a whole step at one horizon."""
        own = [target for view in targets for (_, other), target in view.items() if other == h]
        if own:
            values = torch.stack(own).double()
            self.mean[h] = DECAY * self.mean[h] + (1 - DECAY) * values.mean(0)
            self.square[h] = DECAY * self.square[h] + (1 - DECAY) * values.square().mean(0)
            self.steps[h] += 1

    def standardised(self, value: Tensor, h: int) -> Tensor:
        """(x - mean) / (sd + 0.01), bias-corrected."""
        share = 1 - DECAY ** self.steps[h]
        mean, square = self.mean[h] / share, self.square[h] / share
        return (value - mean) / ((square - mean**2).clamp_min(0).sqrt() + SOFT)


class HorizonOracle(Oracle):
    """Adds the embeddings of horizons and the head of codes to the language model and predictor."""

    def __init__(
        self,
        lm: nn.Module,
        layers: list[nn.Linear],
        mask_vector: nn.Parameter,
        horizon_HD: Tensor,
        codes: tuple[Tensor, Tensor, Tensor],
        prevalence_HC: Tensor | None = None,
    ) -> None:
        """Take what is trained.

        Args:
            codes: A [H, R, D], C [C, R] and b [H, C].
            prevalence_HC: by which codes are weighted; None: they weigh the same.
        """
        super().__init__(lm, layers, mask_vector)
        self.horizon_HD, self.codes, self.prevalence_HC = horizon_HD, codes, prevalence_HC

    def predicted(self, state_D: Tensor, h: int) -> Tensor:
        """What goes through the first layer is of the state and the horizon."""
        value = state_D + self.horizon_HD[h]
        for number, layer in enumerate(self.layers):
            if number:
                value = 0.5 * value * (1 + torch.erf(value / 2**0.5))
            value = layer.weight @ value + layer.bias
        return value

    @torch.no_grad()
    def targets(self, view: View, spans: Sequence[int], censored: str) -> dict:
        """The teacher's mean state over what comes, of each pair that has a token of it."""
        state_TD = hidden_states(self.teacher, input_ids=torch.tensor([view.ids]))
        means = {}
        for p, h in view.usable(spans, censored):
            rows = view.tokens_within(p, spans[h])
            if rows:
                means[p, h] = sum(state_TD[row] for row in rows) / len(rows)
        return means

    def losses(
        self,
        views: list[View],
        spans: Sequence[int],
        censored: str,
        running: Running,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The means over a whole step: of SFT over tokens, of the other two over pairs.

        `running` takes in this step's targets afterwards; those of a horizon that it has not seen,
        before.
        """
        sft, jepa, codes = [], [], []
        targets = [self.targets(view, spans, censored) for view in views]
        before = list(running.steps)
        for h, steps in enumerate(before):
            if not steps:
                running.add(h, targets)
        for view, own in zip(views, targets, strict=True):
            ids = torch.tensor([view.ids])
            read = self.lm(input_ids=ids, output_hidden_states=True, use_cache=False)
            state_TD, log_TV = read.hidden_states[-1][0], read.logits[0].log_softmax(-1)
            sft += [-log_TV[t - 1, view.ids[t]] for t in range(view.first, len(ids[0]))]
            for (p, h), target_D in own.items():
                error_D = self.predicted(state_TD[view.rows[p][-1]], h)
                error_D = error_D - running.standardised(target_D, h)
                jepa.append(error_D.square().mean())
            for p, h in view.usable(spans, censored):
                come = view.classes_within(p, spans[h])
                codes.append(self.codes_loss(state_TD[view.rows[p][-1]], h, come))
        for h, steps in enumerate(before):
            if steps:
                running.add(h, targets)
        return tuple(sum(each) / len(each) for each in (sft, jepa, codes))

    def codes_loss(self, state_D: Tensor, h: int, come: set[int]) -> Tensor:
        """The cross-entropy of each code, whether it comes, summed, a tenth of it."""
        a_HRD, c_CR, b_HC = self.codes
        logit_C = c_CR @ (a_HRD[h] @ state_D) + b_HC[h]
        truth_C = torch.tensor([c in come for c in range(len(logit_C))])
        loss_C = -torch.log(torch.sigmoid(torch.where(truth_C, logit_C, -logit_C)))
        if self.prevalence_HC is not None:
            loss_C = loss_C * self.prevalence_HC[h].clamp_min(FLOOR) ** -0.5
        return loss_C.sum() / 10
