"""The data card: what a run is about to learn from, before its first step.

One function makes it, for the header of `train`, the stage `data` of `check` and the report. What
would make training pointless is a refusal, and what makes it worth less than it seems a warning;
each is a whole sentence with the way out. No count of 1 to 10 people, of their events or of their
windows is on it, nor one that could be found by subtraction.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from smbfast.base import terminal
from smbfast.base.counts import FEW_TEXT, of_whole, recorded, share
from smbfast.base.runtime import few
from smbfast.data.codes.vocabulary import (
    NUMBERS_WITHOUT_BIN,
    TEXTS_DROPPED,
    TEXTS_WITHOUT_TOKEN,
)
from smbfast.data.loader import step_windows
from smbfast.data.masking import cut_points, masked_tokens, needs_cuts
from smbfast.data.prepared import SHARED, Prepared
from smbfast.data.quality import EVENTS_READ, FIRST_YEAR, LAST_YEAR
from smbfast.data.splits import SPLITS
from smbfast.data.windows import WindowSet
from smbfast.reporting.signals import ALIKE
from smbfast.run.data_losses import (
    LOST,
    MOST_LOST,
    Losses,
    bucket_name,
    losses_of,
    sentences,
)
from smbfast.run.label_card import MATCHED, TaskFacts, before_records, require_none
from smbfast.settings import TrainSettings

# shares from which a run warns or is refused: our choice
DESCRIBED = 0.9
TWICE = 0.4
ODD = 0.01  # of events with an odd date or an empty code, and of subjects with a late birth
SEEN = 0.1  # of the tokens of records, by embeddings at their ends
FEW_CUT = 0.5  # of tokens in windows with a cut, and of windows with a pair
FEW_MASKED = 16  # masked tokens a step
ALIKE_EVENTS = 0.98  # of the events of windows, the tokens of one and the same
ENOUGH_DEATHS = 0.9  # of the pairs with a death inside, used
_STEPS = 8  # with JEPA, whose masks are drawn
_LINES = 64  # windows whose events are compared, and of them together at least as many events
_WINDOWS = 512  # of these steps together, at most, beside those of the first one

Level = Literal["good", "warn", "bad", "plain"]


class Row(NamedTuple):
    """A line of the card."""

    name: str
    text: str
    level: Level = "plain"


@dataclass(frozen=True)
class DataCard:
    """What is known of the data of a run before it begins."""

    summary: str
    facts: dict[str, Any]  # JSON values: the key `data` of the header
    rows: list[Row]
    refusals: list[str]
    warnings: list[str]

    @property
    def record(self) -> dict[str, Any]:
        """Rows and warnings as JSON values: the key `card` of the header."""
        return {"rows": [row._asdict() for row in self.rows], "warnings": self.warnings}

    def require(self) -> None:
        """Raise a ValueError if there is a refusal."""
        require_none(self.refusals)

    def warn(self) -> None:
        """Print the warnings."""
        for text in self.warnings:
            terminal.warn(text)


@dataclass(frozen=True)
class Masks:
    """What steps with JEPA predict."""

    num_steps: int  # in all phases
    mean: float  # masked tokens of a step, over those that were drawn
    drawn: int


def data_card(
    settings: TrainSettings,
    prepared: Prepared,
    windows: WindowSet,
    tuning: WindowSet,
    tasks: list[TaskFacts],
) -> DataCard:
    """Return the card of a run whose data are prepared; no model is needed.

    It reads counts that preparing made, the table of windows, the masks of up to eight steps and up
    to `SAMPLE` records, so its cost does not grow with the data but for the labels'.
    """
    losses = losses_of(prepared, windows)
    masks = _masks(settings, windows)
    early = [_early(facts, windows, tuning) for facts in tasks]
    refusals = [text for facts in tasks for text in facts.refusals()]
    lost = sentences(prepared, windows, losses)
    refusals += _nothing_to_predict(settings, windows)
    refusals += [f"{text}." for part, text in lost if part > MOST_LOST]
    warnings = [f"{text}." for part, text in lost if LOST < part <= MOST_LOST]
    if losses.seen < SEEN:
        longer = f"--data.window={losses.half} would show half" if losses.half else "raise it"
        warnings.append(
            f"an embedding at a record's end sees at most {losses.seen:.1%} of the tokens of all "
            f"records with data.window={windows.window}: {longer}."
        )
    alike = _are_alike(windows)
    warnings += [f"{ALIKE}."] if alike else []
    warnings += _odd_warnings(settings, prepared)
    warnings += _cut_warnings(settings, windows, tuning, masks)
    for facts, (num_early, num_read) in zip(tasks, early, strict=True):
        warnings += facts.warnings()
        if num_read and num_early == num_read:
            refusals.append(
                f"labels of {facts.task} all lie before the first event of their subject, so that "
                "no embedding can be made; check the prediction times."
            )
        elif num_early > (1 - MATCHED) * num_read:
            warnings.append(
                f"labels of {facts.task}: {share(num_early, num_read)} of the rows lie before the "
                "first event of their subject and are left out; check the prediction times."
            )
    rows = [
        *_rows(settings, prepared, windows, losses),
        *_quality_rows(settings, prepared),
        *_predicted_rows(windows, masks),
        *_ahead_rows(windows),
        *(_label_row(f, n) for f, n in zip(tasks, early, strict=True)),
    ]
    num_tasks = f"{len(tasks)} task{'' if len(tasks) == 1 else 's'} to probe"
    size = f"{few(len(windows))} windows, {windows.num_tokens:,} tokens ({prepared.size_text})"
    summary = f"{size}; {_cuts(windows)}; {num_tasks}"
    record = _facts(settings, prepared, windows, losses, masks, tasks, early) | {"alike": alike}
    return DataCard(summary, record, rows, refusals, warnings)


def _are_alike(windows: WindowSet) -> bool:
    """Whether nearly all events of some windows have the same tokens, beside what tells time."""
    places = np.linspace(0, len(windows) - 1, min(len(windows), _LINES))
    counts: Counter[bytes] = Counter()
    for window in (windows[int(i)] for i in places):
        for start, end in zip(window.line_start_L, window.line_end_L, strict=True):
            counts[window.ids_T[start:end].tobytes()] += 1
    total = counts.total()
    return total >= _LINES and counts.most_common(1)[0][1] >= ALIKE_EVENTS * total


def _masks(settings: TrainSettings, windows: WindowSet) -> Masks | None:
    """Draw the masks of a few steps with mask JEPA; None if there is no such step or no cut.

    Each step of such a phase takes windows with a cut alone, whose future has a line that can be
    masked, and of it at least one token is: so the table of windows says it for all steps.
    """
    steps, first = [], 0
    for phase in settings.phases:
        is_mask = phase.w_jepa > 0 and settings.objective.jepa == "mask"
        steps += [range(first, first + phase.steps)] if is_mask else []
        first += phase.steps
    num_steps = sum(len(r) for r in steps)
    if not num_steps or not windows.num_with_cut:
        return None
    batch = min(settings.optim.batch, windows.num_with_cut)
    places = np.linspace(0, num_steps - 1, min(_STEPS, num_steps, max(1, _WINDOWS // batch)))
    numbers = np.concatenate([np.arange(r.start, r.stop) for r in steps])
    chosen = numbers[places.astype(np.int64)].tolist()
    num_masked = [_num_masked(settings, windows, step) for step in chosen]
    assert min(num_masked) > 0
    return Masks(num_steps, sum(num_masked) / len(chosen), len(chosen))


def _num_masked(settings: TrainSettings, windows: WindowSet, step: int) -> int:
    form, seed = settings.objective, settings.run.seed
    order = step_windows(windows, form, settings.optim.batch, seed, step, jepa=True)
    return sum(
        len(masked_tokens(window, cut, form, seed, step, k))
        for window in (windows[i] for i in order.tolist())
        for k, cut in enumerate(cut_points(window, form, seed, step))
    )


def _early(facts: TaskFacts, windows: WindowSet, tuning: WindowSet) -> tuple[int, int]:
    """Return label rows before their subject's events, of those in train and tuning, and these."""
    pairs = [
        before_records(facts.labels, split, of.shards)
        for split, of in (("train", windows), ("tuning", tuning))
    ]
    return sum(early for early, _ in pairs), sum(read for _, read in pairs)


def _nothing_to_predict(settings: TrainSettings, windows: WindowSet) -> list[str]:
    objective = settings.objective
    refusals = []
    for phase in settings.phases:
        cuts = needs_cuts(objective, jepa=phase.w_jepa > 0)
        ahead = windows.horizons is not None and not cuts  # then in all phases
        if (ahead or phase.w_codes > 0) and not windows.num_with_pair:
            refusals.append(f"phase {phase.name}: {windows.without_pairs()}.")
        elif cuts and not windows.num_with_cut:
            what = "JEPA" if phase.w_jepa > 0 else "SFT on the future alone"
            refusals.append(
                f"phase {phase.name}: {what} needs training windows with a cut; none of "
                f"{few(len(windows))} has one. Lower objective.min_future or train with SFT alone "
                "(`python -m smbfast.train sft`); if records are longer than windows, raise "
                "data.window or, in a text format, choose a finer data.bucket."
            )
        elif not (cuts or ahead) and not windows.num_labels:
            refusals.append(
                f"phase {phase.name}: SFT has no token to predict, since no training window has "
                "more than one token; check that subjects have events with a time."
            )
    return refusals[:1]  # of further phases it says the same


def _odd_warnings(settings: TrainSettings, prepared: Prepared) -> list[str]:
    counts, warnings = prepared.counts, []
    events, subjects = counts[EVENTS_READ], counts["subjects_read"]
    if events and _reads_descriptions(settings, prepared) and _share_described(counts) < DESCRIBED:
        warnings.append(
            f"{share(counts['described'], events)} of the events have a code with a description; "
            "the others are read as the bare code: complete metadata/codes.parquet."
        )
    for count, whole, least, text in (
        (
            counts["duplicates"],
            events,
            TWICE,
            "of the events repeat an earlier one in subject, time, code and value, as if every "
            "event were there twice: remove the duplicates from the export",
        ),
        (
            counts["empty_codes"],
            events,
            ODD,
            "of the events have an empty code, which says nothing: give them a code or leave "
            "them out",
        ),
        (
            counts["odd_years"],
            events,
            ODD,
            f"of the events have a date before {FIRST_YEAR} or after {LAST_YEAR}: check how dates "
            "were shifted",
        ),
        (
            counts["late_births"],
            subjects,
            ODD,
            "of the subjects have a birth after their first event, which is left out, so that "
            "they have no age: check MEDS_BIRTH",
        ),
    ):
        if whole and count > least * whole:
            warnings.append(f"{share(min(count, whole), whole)} {text}.")
    return warnings


def _reads_descriptions(settings: TrainSettings, prepared: Prepared) -> bool:
    """Whether a description reaches the model: as text, or as the first row of a new token."""
    return prepared.record["data_format"] != "codes" or settings.model.path is not None


def _share_described(counts: Counter[str]) -> float:
    return counts["described"] / max(counts[EVENTS_READ], 1)


def _cut_warnings(
    settings: TrainSettings, windows: WindowSet, tuning: WindowSet, masks: Masks | None
) -> list[str]:
    objective, phases = settings.objective, settings.phases
    warnings = []
    part = windows.num_tokens_with_cut / max(windows.num_tokens, 1)
    on_cuts = any(needs_cuts(objective, jepa=phase.w_jepa > 0) for phase in phases)
    if on_cuts and windows.num_with_cut and part < FEW_CUT:
        warnings.append(
            f"{part:.1%} of the tokens lie in windows with a cut, and steps with JEPA or on the "
            "future alone read no others: raise data.window, lower objective.min_future or, in a "
            "text format, choose a finer data.bucket."
        )
    if masks and masks.mean < FEW_MASKED:
        warnings.append(
            f"a step with JEPA predicts {masks.mean:.0f} masked tokens, which is very few: raise "
            "optim.batch, data.window or objective.mask_ratio."
        )
    is_mask = objective.jepa == "mask" and any(p.w_jepa > 0 for p in phases)
    if is_mask and not tuning.num_with_cut:
        warnings.append(
            f"no tuning window of {few(len(tuning))} has a cut, so JEPA is not measured on tuning "
            "subjects, and its phases have no best step: raise data.window or lower "
            "objective.min_future."
        )
    return warnings + _ahead_warnings(windows, tuning)


def _ahead_warnings(windows: WindowSet, tuning: WindowSet) -> list[str]:
    """Warn of few windows with a pair, of deaths that are taken for the end of follow-up, and of
    tuning without a pair."""
    horizons = windows.horizons
    if horizons is None:
        return []
    warnings = []
    if 0 < windows.num_with_pair < FEW_CUT * len(windows):
        warnings.append(
            f"{share(windows.num_with_pair, len(windows))} of windows have a pair, and steps read "
            "no others, those of SFT neither, if a phase looks ahead: raise data.window, name "
            "longer horizons (objective.horizons) or, in a text format, choose a finer data.bucket."
        )
    deaths, usable = _deaths(windows)
    if usable < ENOUGH_DEATHS * deaths:
        warnings.append(
            f"of the positions with a death inside a horizon, {share(usable, deaths)} are used, "
            "since the others are taken for the end of follow-up: name the codes of deaths in "
            "data.terminal."
        )
    if not tuning.num_with_pair:
        warnings.append(
            f"no tuning window of {few(len(tuning))} has a bucket with another within a horizon, "
            "so what is to come is not measured on tuning subjects: raise data.window."
        )
    return warnings


def _deaths(windows: WindowSet) -> tuple[int, int]:
    """Return pairs with a death inside, all horizons together, and those of them that are used."""
    shares = windows.horizons and windows.horizons.shares
    return (sum(shares.num_deaths), sum(shares.num_deaths_usable)) if shares else (0, 0)


def _ahead_rows(windows: WindowSet) -> list[Row]:
    if windows.horizons is None:
        return []
    deaths, usable = _deaths(windows)
    part = share(windows.num_with_pair, len(windows))
    classes = f"; {windows.classes.num_classes:,} codes to come" if windows.classes else ""
    is_odd = usable < ENOUGH_DEATHS * deaths or windows.num_with_pair < FEW_CUT * len(windows)
    level: Level = "warn" if is_odd else "good"
    text = f"{windows.horizons.text}; {part} of windows have a pair{classes}"
    return [Row("horizons", text, level)]


def _rows(
    settings: TrainSettings, prepared: Prepared, windows: WindowSet, losses: Losses
) -> list[Row]:
    per_split = prepared.record["counts"]
    subjects = [f"{few(per_split[s]['subjects'])} {s}" for s in per_split]
    level: Level = "bad" if losses.most > MOST_LOST else "warn" if losses.most > LOST else "good"
    lost = [
        f"{losses.header:.2%} of tokens to long demographics",
        f"{losses.bucket:.2%} of tokens to a {bucket_name(prepared)} longer than a window",
        f"{_hidden(losses.num_values, losses.values)} of values",
    ]
    if prepared.record["data_format"] == "codes":
        coarse = prepared.counts["family"] + prepared.counts["section"]
        lost.append(f"{_hidden(coarse, losses.events)} of events to a family's or section's token")
    return [
        Row(
            "data",
            f"{' / '.join(subjects)} subjects, {few(prepared.counts['events'])} events, "
            f"{_si(per_split['train']['tokens'])} tokens to train on ({prepared.size_text}), "
            f"vocabulary {len(prepared.tokenizer):,}",
        ),
        Row(
            "windows",
            f"{few(len(windows))} of up to {settings.data.window} tokens; {_cuts(windows)}",
        ),
        Row("lost", "; ".join(lost), level),
        Row(
            "a node",
            f"an embedding at a record's end sees at most {losses.seen:.1%} of the tokens of all "
            f"records, and {share(losses.num_whole, losses.num_records)} of records whole",
            "warn" if losses.seen < SEEN else "plain",
        ),
        Row("left out", prepared.left_out()),
    ]


def _hidden(count: int, part: float) -> str:
    return FEW_TEXT if few(count) == FEW_TEXT else f"{part:.2%}"


def _cuts(windows: WindowSet) -> str:
    of_tokens = windows.num_tokens_with_cut / max(windows.num_tokens, 1)
    part = share(windows.num_with_cut, len(windows))
    return f"{part} of windows have a cut, with {of_tokens:.1%} of tokens"


def _quality_rows(settings: TrainSettings, prepared: Prepared) -> list[Row]:
    counts = prepared.counts
    events, subjects = counts[EVENTS_READ], counts["subjects_read"]
    if not events:
        return [Row("quality", "not counted: the shards are of an earlier version")]
    described = _share_described(counts)
    reads = _reads_descriptions(settings, prepared)
    bad = reads and described < DESCRIBED
    use = "" if reads else ", which a model of codes made from scratch does not read"
    odd = any(counts[n] > ODD * events for n in ("empty_codes", "odd_years"))
    late = counts["late_births"] > ODD * subjects
    return [
        Row(
            "described",
            f"{share(counts['described'], events)} of events have a description{use}",
            "plain" if not reads else "warn" if bad else "good",
        ),
        Row(
            "duplicates",
            f"{share(counts['duplicates'], events)} of events repeat an earlier one",
            "warn" if counts["duplicates"] > TWICE * events else "good",
        ),
        Row(
            "odd",
            f"empty codes {few(counts['empty_codes'])}; dates before {FIRST_YEAR} or after "
            f"{LAST_YEAR} {few(counts['odd_years'])}; births after a first event "
            f"{few(counts['late_births'])}; values not finite {few(counts['nonfinite_values'])}",
            "warn" if odd or late else "good",
        ),
    ]


def _predicted_rows(windows: WindowSet, masks: Masks | None) -> list[Row]:
    if masks is None:
        return []
    part = share(windows.num_with_cut, len(windows))
    return [
        Row(
            "JEPA",
            f"{part} of windows, {masks.num_steps:,} of {masks.num_steps:,} steps have a mask, "
            f"{masks.mean:,.0f} masked tokens a step",
            "warn" if masks.mean < FEW_MASKED else "good",
        )
    ]


def _label_row(facts: TaskFacts, early: tuple[int, int]) -> Row:
    """Say what labels match, and how many are positive in train and tuning."""
    positives = [
        f"{s} {of_whole(number, facts.matched[s])} of {few(facts.matched[s])}"
        for s, number in facts.positives.items()
    ]
    ratio = facts.num_matched / max(facts.num_rows, 1)
    level: Level = "bad" if facts.refusals() else "good" if ratio >= MATCHED else "warn"
    num_early, num_read = early
    if num_early > (1 - MATCHED) * num_read:
        level = "bad" if num_early == num_read else "warn"
    what = "events" if facts.kind == "time_to_event" else "positives"
    return Row(
        "labels",
        f"{facts.task}: {share(facts.num_matched, facts.num_rows)} of rows match a subject; {what} "
        f"{', '.join(positives)}; held_out has {few(facts.matched['held_out'])} rows, for --final; "
        f"before every event in train and tuning {of_whole(num_early, num_read)}",
        level,
    )


def _facts(
    settings: TrainSettings,
    prepared: Prepared,
    windows: WindowSet,
    losses: Losses,
    masks: Masks | None,
    tasks: list[TaskFacts],
    early: list[tuple[int, int]],
) -> dict[str, Any]:
    counts, per_split = prepared.counts, prepared.record["counts"]
    events = counts["events"]
    unmapped = sum(prepared.record["unmapped"].values())
    left: tuple[str, ...] = ("values_left_out", "texts_cut")
    if prepared.record["data_format"] == "codes":
        left = (*SHARED, NUMBERS_WITHOUT_BIN, TEXTS_WITHOUT_TOKEN, TEXTS_DROPPED)
    odd = ("duplicates", "empty_codes", "odd_years", "described") if counts[EVENTS_READ] else ()
    return {
        "simulated": settings.data.path is None,
        "format": prepared.record["data_format"],
        "options": prepared.options,
        "tokens_an_event": round(prepared.tokens_an_event, 4),
        "subjects": {s: recorded(c.get("subjects", 0)) for s, c in per_split.items()},
        "events": recorded(events),
        "tokens": {s: c.get("tokens", 0) for s, c in per_split.items()},
        "windows": recorded(len(windows)),
        "window_tokens": windows.num_tokens,
        "windows_with_cut": recorded(windows.num_with_cut, len(windows)),
        "window_tokens_with_cut": windows.num_tokens_with_cut,
        "tokens_lost": windows.num_lost,
        "lost": {
            "header": round(losses.header, 6),
            "bucket": round(losses.bucket, 6),
            "values": _rounded(losses.num_values, losses.values),
            "events": _rounded(counts["family"] + counts["section"], losses.events),
        },
        "seen_at_the_end": round(losses.seen, 6),
        "masked_a_step": None if masks is None else round(masks.mean, 1),
        "steps_with_masks": None if masks is None else masks.num_steps,
        "horizons": _horizon_facts(windows),
        "unmapped_share": _rounded(unmapped, unmapped / max(events, 1)),
        **{name: recorded(counts[name], events) for name in left},
        "nonfinite_values": recorded(counts["nonfinite_values"]),
        "late_births": recorded(counts["late_births"]),
        **{name: recorded(counts[name], counts[EVENTS_READ]) for name in odd},
        "labels": {f.task: _label_facts(f, n) for f, n in zip(tasks, early, strict=True)},
    }


def _label_facts(facts: TaskFacts, early: tuple[int, int]) -> dict[str, Any]:
    return {
        # no total of the rows, from which a small count of one split would follow
        "matched": _rounded(
            min(facts.num_matched, facts.num_rows - facts.num_matched),
            facts.num_matched / max(facts.num_rows, 1),
        ),
        "positives": {s: recorded(n, facts.matched[s]) for s, n in facts.positives.items()},
        "rows_of": {s: recorded(facts.matched[s]) for s in SPLITS},
        "before_records": recorded(*early),
    }


def _horizon_facts(windows: WindowSet) -> dict[str, Any] | None:
    """Return for each horizon its share of known positions, and of those before a death."""
    horizons = windows.horizons
    if horizons is None or horizons.shares is None:
        return None
    counts = horizons.shares
    columns = zip(counts.num_usable, counts.num_deaths, counts.num_deaths_usable, strict=True)
    return {
        name: {
            "known": _share_of(usable, counts.num_positions),
            "deaths": _share_of(dying, deaths),
        }
        for name, (usable, deaths, dying) in zip(horizons.names, columns, strict=True)
    }


def _share_of(count: int, whole: int) -> float | None:
    """Return a count over its whole; None where it would tell a small count or leave one."""
    left = whole - count
    return _rounded(min(count, left) or max(count, left), count / max(whole, 1))


def _rounded(count: int, part: float) -> float | None:
    """Return a share; None where it would tell a small count."""
    return None if few(count) == FEW_TEXT else round(part, 6)


def _si(value: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return str(int(value))
