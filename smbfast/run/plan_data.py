"""What a plan knows of the data: of prepared shards measured, without them assumed."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smbfast.batch import PackedBatch, pack_segments
from smbfast.data.codes.alphabet import NUM_FIXED
from smbfast.data.loader import make_step, step_windows
from smbfast.data.prepared import Prepared
from smbfast.data.windows import WindowSet
from smbfast.model.memory import full_pairs
from smbfast.settings import PhaseSettings, PlanSettings, TrainSettings, decided_data

SAMPLE = 256  # windows that stand for all: our choice
CUTS = 8  # contexts of the windows that stand for all where no data are prepared
EVENTS = 4000  # of a patient: assumed, as in 20e9 events of 5e6 patients
NEW_ROWS = 32  # of section tags, where no data are prepared: assumed
HORIZONS, CLASSES = 4, 2000  # where no data are prepared: assumed
DEMOS = "assumed: the MIMIC-IV and eICU demos, docs/results.md (text by day; by hour 7)"
# of training windows over events; a shard's bytes over events
TOKENS = {"codes": 1.15, "text": 3.9, "text-paper": 6.3}
BYTES = {"codes": 28.5, "text": 24.0, "text-paper": 35.0}
# events a core prepares in a second: the eICU demo in bench/results/prepare.jsonl
PREPARED = {"codes": 1.0e6, "text": 250e3, "text-paper": 250e3}


@dataclass(frozen=True)
class DataFacts:
    """Figures of the data, each with where it comes from."""

    format: str
    events: float  # of the training split
    subjects: float
    tokens_an_event: float  # of training windows
    tokens_source: str
    bytes_an_event: float  # of shards
    bytes_source: str
    with_cut: float  # share of tokens in windows with a cut
    window: float  # mean tokens of a window
    vocabulary: int
    new_rows: int
    num_horizons: int
    num_classes: int
    prepared: str | None  # the folder
    windows: WindowSet | None

    @classmethod
    def of(cls, settings: TrainSettings, plan: PlanSettings) -> "DataFacts":
        """Read the prepared data of a run, or assume what they would be.

        Raises:
            ValueError: the settings contradict each other, or nothing says how many events there
                are.
        """
        folder = Path(settings.data.prepared or settings.folder / "prepared")
        if (folder / "prepare.json").is_file():
            return cls._measured(Prepared.open(folder), settings, plan)
        return cls._assumed(settings, plan)

    @classmethod
    def _measured(
        cls, prepared: Prepared, settings: TrainSettings, plan: PlanSettings
    ) -> "DataFacts":
        horizons = prepared.horizons(settings.objective) if settings.reads_ahead else None
        codes = any(phase.w_codes > 0 for phase in settings.phases)
        classes = prepared.classes() if codes else None
        data = settings.data
        windows = prepared.windows(
            "train", data.window, settings.objective, data.stride, horizons, classes
        )
        events = prepared.record["counts"]["train"]["events"]
        shards = prepared.record["shards"]["train"]
        subjects = sum(shard["timelines"] for shard in shards)
        size = sum((prepared.folder / shard["file"]).stat().st_size for shard in shards)
        source = f"measured: {events:,} events of {prepared.folder}"
        share = windows.num_tokens_with_cut / max(windows.num_tokens, 1)
        own = windows.num_tokens / events
        return cls(
            format=prepared.record["data_format"],
            events=plan.events or events,
            subjects=plan.subjects or (plan.events or events) * subjects / events,
            tokens_an_event=plan.tokens_an_event or own,
            tokens_source="given" if plan.tokens_an_event else source,
            bytes_an_event=size / events,
            bytes_source=source,
            with_cut=share,
            window=windows.num_tokens / max(len(windows), 1),
            vocabulary=len(prepared.tokenizer),
            new_rows=len(prepared.new_tokens),
            num_horizons=len(horizons) if horizons else 0,
            num_classes=classes.num_classes if classes else 0,
            prepared=str(prepared.folder),
            windows=windows,
        )

    @classmethod
    def _assumed(cls, settings: TrainSettings, plan: PlanSettings) -> "DataFacts":
        if plan.events is None:
            raise ValueError(
                "events must be given, as --events=20e9, where no prepared data say how many there "
                f"are; {settings.data.prepared or settings.folder / 'prepared'} has none"
            )
        data = decided_data(settings)
        assert data.format is not None
        subjects = plan.subjects or plan.events / EVENTS
        own = plan.tokens_an_event or TOKENS[data.format]
        # windows follow each other; with a stride they overlap
        record = plan.events * own / subjects
        num = max(1.0, record / data.window)
        repeats = data.window / (data.stride or data.window) if num > 1 else 1.0
        codes, ahead = data.format == "codes", settings.reads_ahead
        return cls(
            format=data.format,
            events=plan.events,
            subjects=subjects,
            tokens_an_event=own * (1.0 if plan.tokens_an_event else repeats),
            tokens_source="given" if plan.tokens_an_event else DEMOS,
            bytes_an_event=BYTES[data.format],
            bytes_source=DEMOS,
            with_cut=1.0,
            window=record / np.ceil(num),
            vocabulary=NUM_FIXED + data.max_codes if codes else data.vocab_size,
            new_rows=NUM_FIXED + data.max_codes if codes else NEW_ROWS,
            num_horizons=_horizons(settings) if ahead else 0,
            num_classes=CLASSES if any(p.w_codes > 0 for p in settings.phases) else 0,
            prepared=None,
            windows=None,
        )


def _horizons(settings: TrainSettings) -> int:
    wanted = settings.objective.horizons
    return HORIZONS if wanted == "auto" else len(wanted)


@dataclass(frozen=True)
class Sample:
    """Windows of a step of a phase, each a micro-batch of its own."""

    batches: list[PackedBatch]
    read: int  # tokens of these windows


def sampled(settings: TrainSettings, phase: PhaseSettings, facts: DataFacts) -> Sample:
    """Return windows of the prepared data as a step draws and packs them, or typical ones."""
    if facts.windows is None:
        return _typical(settings, phase, facts)
    objective, seed, jepa = settings.objective, settings.run.seed, phase.w_jepa > 0
    batch = min(SAMPLE, len(facts.windows))
    order = step_windows(facts.windows, objective, batch, seed, 0, jepa=jepa)
    step = make_step(
        facts.windows,
        objective,
        0,
        batch=batch,
        tokens=1,  # so that each window is alone
        seed=seed,
        sft=phase.w_sft > 0,
        jepa=jepa,
        codes=phase.w_codes > 0,
    )
    return Sample(step.micro_batches, int(facts.windows.length_W[order].sum()))


def _typical(settings: TrainSettings, phase: PhaseSettings, facts: DataFacts) -> Sample:
    """Return windows of mean length, whose contexts are spread over those that are drawn."""
    length, (low, high) = max(2, round(facts.window)), settings.objective.context
    shares = low + (high - low) * (np.arange(CUTS) + 0.5) / CUTS
    batches = [_window(settings, phase, length, share, facts.num_horizons) for share in shares]
    return Sample(batches, length * CUTS)


def _window(
    settings: TrainSettings, phase: PhaseSettings, length: int, share: float, num_horizons: int
) -> PackedBatch:
    """Pack one window of `length` tokens, cut at a share of it."""
    form, jepa, sft = settings.objective, phase.w_jepa > 0, phase.w_sft > 0
    branches, latent = jepa and form.jepa == "mask", jepa and form.jepa == "horizon"
    cut = min(max(1, round(share * length)), length - 1)
    future = min(length - cut, form.horizon or length)
    num_cuts = form.cuts if branches else 0
    trunk = length if sft or not branches else cut
    masked = np.arange(future - max(1, round(form.mask_ratio * future)), future)
    next_tokens = np.full(trunk, 0 if sft else -100)
    next_tokens[-1:] = -100
    if form.sft_labels == "future":
        next_tokens[: cut - 1] = -100
    pairs = None
    if num_horizons and (latent or phase.w_codes > 0):
        pairs = [full_pairs(length, min(form.positions, length), num_horizons)]
    visible = form.skeleton == "visible"
    return pack_segments(
        [np.zeros(trunk, np.int64)],
        [[(cut, np.zeros(future, np.int64))] * num_cuts],
        next_tokens=[next_tokens],
        masked=[[masked] * num_cuts],
        replaced=[[masked if visible else np.arange(future)] * num_cuts],
        windows=[np.zeros(length, np.int64)],
        pairs=pairs,
        num_horizons=num_horizons if latent else 0,
    )
