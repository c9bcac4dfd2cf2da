"""Says from the lines of a log whether a phase trains anything, and where it does not, why.

`Watch` hears of each step on the CPU, and of each line of the log and each evaluation what is in
its record: nothing more is computed or read from a device. The report hears the same records again,
so that it says the same. All limits are our choice.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from smbfast.reporting.cells import mapping, mappings
from smbfast.reporting.runlog import Finding, Record, Run, number

FAR = 2.0  # a loss is far above its start from this many times of it
LINES = 2  # of the log, one after another, that have to say so; an evaluation alone is enough
BEGINS = 2  # lines that say where a loss starts if no evaluation has; then so many more have to
STILL = 1e-4  # of the tuning loss: a smaller change says that weights stand still
PATIENCE = 20  # steps that weights are given to change it
LOSSES = {  # what a step must have for a loss to learn from it
    "sft": ("labels", "token that SFT predicts", "optim.batch or data.window"),
    "jepa": ("masked", "masked token or pair that JEPA predicts", "optim.batch or data.window"),
    "codes": (
        "pairs",
        "pair of a position and a horizon for codes to come",
        "optim.batch or data.window",
    ),
}
_LOWER = "lower the learning rate (phases.{phase}.lr) or lengthen the warm-up, and begin again"
ALIKE = (
    "nearly all events of the training windows read the same, so there is next to nothing to "
    "learn: see that the column `code` holds codes, and that they have tokens of their own"
)
STILL_TARGET = (
    "objective.tau is 1, so the EMA teacher never moves and JEPA predicts the states with which it "
    "began; 0.996 is the default"
)
Weights = Mapping[str, float]  # of the losses of a phase, by name
Level = Literal["warn", "bad"]
Said = tuple[str, Level, str]  # cause, level, text


class Alarm(NamedTuple):
    """What is wrong with a phase."""

    phase: str
    step: int  # the last of those that it speaks of
    cause: str
    level: Level
    text: str

    @property
    def finding(self) -> Finding:
        """It as a judgement of the run."""
        return Finding(self.level, f"phase {self.phase}, step {self.step}: {self.text}")


@dataclass
class Watch:
    """What is known of the phase that is trained; its fields are JSON, and checkpoints hold it."""

    phase: str = ""
    # of its steps so far: all, those that lacked something, whose gradient was 0 or not finite
    counts: dict[str, int] = field(default_factory=dict)
    start: dict[str, float] = field(default_factory=dict)  # losses as they were when it began
    begun: dict[str, int] = field(default_factory=dict)  # lines that these are of, if no evaluation
    far: dict[str, int] = field(default_factory=dict)  # lines in a row that are far above these
    span: list[float] = field(default_factory=list)  # first step, least and largest tuning loss
    known: list[str] = field(default_factory=list)  # causes that were named

    def begin(self, phase: str) -> None:
        """Forget the phase before, if this is another."""
        if phase != self.phase:
            vars(self).update(vars(Watch(phase)))

    def count(self, phase: str, *, labels: int, masked: int, pairs: int) -> None:
        """Take note of a step of `phase`, and of what it has for the losses to learn from."""
        self.begin(phase)
        present = {"labels": labels, "masked": masked, "pairs": pairs}
        self._add(steps=1, nothing=not any(present.values()))
        self._add(**{f"no_{name}": not amount for name, amount in present.items()})

    def count_gradients(self, *, zero: int, skipped: int) -> None:
        """Take note of how many gradients were exactly 0, and how many not finite."""
        self._add(zero=zero, skipped=skipped)

    def _add(self, **counts: int) -> None:
        for name, amount in counts.items():
            self.counts[name] = self.counts.get(name, 0) + int(amount)

    def line(self, record: Record, weights: Weights) -> list[Alarm]:
        """Judge a line of the log; return what it is the first to say.

        Args:
            record: of a step, with `counts` of the phase so far.
            weights: of the losses of the phase.
        """
        self.begin(str(record.get("phase")))
        counts = mapping(record.get("counts"))
        self.counts = {name: int(n) for name, n in counts.items() if math.isfinite(number(n))}
        said: list[Said] = [*self._lacking(weights), *self._gradients()]
        for name, weight in weights.items():
            value = number(record.get(name))
            if weight <= 0 or value != value:
                continue
            start = self._start_of_line(name, value)
            self.far[name] = self.far.get(name, 0) + 1 if value > FAR * start > 0 else 0
            if self.far[name] >= LINES + self.begun.get(name, 0):  # a step may be of a few pairs
                said.append(_far(name, value, start))
        return self._new(record, said)

    def evaluation(self, record: Record, weights: Weights) -> list[Alarm]:
        """Judge an evaluation; the first of a phase, at its beginning, says where losses start."""
        self.begin(str(record.get("phase")))
        said: list[Said] = []
        step = int(number(record.get("step")))
        for name, weight in weights.items():
            value = number(record.get(name))
            if weight <= 0 or value != value:
                continue
            if self.begun.pop(name, 0):  # of lines, so of a few windows that are not these
                self.start[name] = max(value, self.start[name])
            start = self.start.setdefault(name, value)
            if value > FAR * start > 0:
                said.append(_far(name, value, start))
        said += self._standing(step, number(record.get("loss")))
        return self._new(record, said)

    def _start_of_line(self, name: str, value: float) -> float:
        """Return where a loss started; the largest of the first lines says it, or an evaluation."""
        lines = self.begun.get(name, 0)
        if name not in self.start or 0 < lines < BEGINS:
            self.start[name] = max(value, self.start.get(name, value))
            self.begun[name] = lines + 1
        return self.start[name]

    def _standing(self, step: int, loss: float) -> Iterator[Said]:
        """Yield a warning if the tuning loss of the phase is what it was at its first evaluation.

        Its windows are the same each time, so only weights can change it.
        """
        if loss == loss:
            first, least, most = self.span or [step, loss, loss]
            self.span = [first, min(least, loss), max(most, loss)]
            stands = self.span[2] - self.span[1] <= STILL * abs(self.span[2])
            if step - first >= PATIENCE and stands:
                yield (
                    "stuck",
                    "bad",
                    f"the tuning loss has stood at {loss:.4g} for {step - first:.0f} steps, so the "
                    "weights hardly move: raise the learning rate (phases.{phase}.lr) or shorten "
                    "the warm-up, and see that not all that matters is frozen",
                )

    def without_signal(self) -> str | None:
        """Say why no step of the phase so far can have trained anything; None if one has."""
        counts, parts = self.counts, []
        steps = counts.get("steps", 0)
        zero, skipped = counts.get("zero", 0), counts.get("skipped", 0)
        nothing = counts.get("nothing", 0)
        if not steps or max(nothing, zero + skipped) < steps:
            return None
        if nothing:
            parts.append(f"{nothing} had no label, no mask and no pair to learn from")
        if zero:
            parts.append(f"the gradient of {zero} was exactly 0")
        if skipped:
            parts.append(f"that of {skipped} was not finite")
        return f"of its {steps} steps, {', and '.join(parts)}"

    def _lacking(self, weights: Weights) -> Iterator[Said]:
        """Yield a warning for each loss that steps could not learn from."""
        steps = self.counts.get("steps", 0)
        for name, weight in weights.items():
            key, what, more = LOSSES[name]
            without = self.counts.get(f"no_{key}", 0)
            if weight > 0 and without:
                yield (
                    key,
                    "bad" if without == steps else "warn",
                    f"{without} of its {steps} steps so far had no {what}, so {name} learned "
                    f"nothing from them; raise {more}",
                )

    def _gradients(self) -> Iterator[Said]:
        steps = self.counts.get("steps", 0)
        # where there is nothing to learn from, that is the cause
        zero = self.counts.get("zero", 0) - self.counts.get("nothing", 0)
        if zero > 0:
            yield (
                "zero",
                "bad" if zero == steps else "warn",
                f"the gradient of {zero} of its {steps} steps so far was exactly 0, so nothing was "
                f"learned in them: weights are frozen, or have died of too large steps; {_LOWER}",
            )
        if skipped := self.counts.get("skipped", 0):
            yield (
                "skipped",
                "warn",
                f"the gradient of {skipped} of its {steps} steps so far was not finite, and they "
                f"were skipped; if there are more, {_LOWER}",
            )

    def _new(self, record: Record, said: list[Said]) -> list[Alarm]:
        """Return what was not named in this phase before."""
        new, step = [], int(number(record.get("step")))
        for cause, level, text in said:
            if cause not in self.known:
                self.known.append(cause)
                text = text.replace("{phase}", self.phase)
                new.append(Alarm(self.phase, step, cause, level, text))
        return new


def _far(name: str, value: float, start: float) -> Said:
    return (
        f"far {name}",
        "bad",
        f"{name} is {value:.4g}, {value / start:.1f} times of what it was when the phase began, so "
        f"the run diverges: {_LOWER}",
    )


def signals(run: Run) -> list[Finding]:
    """Say what was wrong with the training of a run, worst first; nothing where nothing was."""
    config = mapping(run.header.get("config"))
    weights = {
        str(phase.get("name")): weights_of(phase) for phase in mappings(config.get("phases"))
    }
    every = before_training(run.header)
    for phase in run.phases:
        watch, of = Watch(phase.name), weights.get(phase.name, {})
        last: dict[str, Finding] = {}
        # an evaluation follows the line of its step, but for the one with which a phase begins
        records = sorted(
            [*phase.steps, *phase.evals], key=lambda r: (r["step"], r["kind"] == "eval")
        )
        for record in records:
            is_line = record["kind"] == "step"
            watch.known.clear()  # what is said again says how often it was by then
            said = watch.line(record, of) if is_line else watch.evaluation(record, of)
            if not is_line:
                last.pop("stuck", None)  # it has moved since
            last |= {alarm.cause: alarm.finding for alarm in said}
        every += last.values()
    return sorted(every, key=lambda finding: finding.level != "bad")


def before_training(header: Record) -> list[Finding]:
    """Say what of the settings and the data of a run lets it learn nothing, from its header."""
    config, data, every = mapping(header.get("config")), mapping(header.get("data")), []
    if data.get("alike") is True:
        every.append(Finding("bad", ALIKE))
    form = mapping(config.get("objective"))
    last = form.get("tau") if form.get("tau_end") is None else form.get("tau_end")
    moves = [p for p in mappings(config.get("phases")) if p.get("freeze") != "decoder"]
    if form.get("tau") == last == 1 and any(number(p.get("w_jepa")) > 0 for p in moves):
        every.append(Finding("warn", STILL_TARGET))
    return every


def weights_of(phase: Record) -> dict[str, float]:
    """Return the weights of the losses of a phase, from its settings."""
    values = {name: number(phase.get(f"w_{name}")) for name in LOSSES}
    return {name: value for name, value in values.items() if value > 0}
