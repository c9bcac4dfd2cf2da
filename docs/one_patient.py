"""One simulated patient from events to losses: prints what docs/how-it-works.md shows.

python docs/one_patient.py

Legend: T tokens of a window or of the packed row.
"""

import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from smbfast import objective, reference
from smbfast.batch import PackedBatch, Timeline
from smbfast.data.codes import CodeVocabulary
from smbfast.data.loader import make_batch
from smbfast.data.masking import cut_points, masked_tokens
from smbfast.data.meds import STATIC, EventBatch, MedsDataset
from smbfast.data.pairs import window_pairs
from smbfast.data.prepared import Prepared
from smbfast.data.preparing import prepare
from smbfast.data.sections import SECTIONS
from smbfast.model.backbone import PatientEncoder, make_encoder
from smbfast.model.target import TargetEncoder
from smbfast.run.step import LossScales
from smbfast.settings import ObjectiveSettings, TrainSettings, load
from smbfast.simulation.dataset import simulate

SUBJECTS = 13, 45  # the patient that is shown, and one that shares the row
SETTINGS = [
    "data.window=128",
    "data.gap_floor=360",  # what `auto` is for a simulated cohort
    "data.vocab_size=2048",
    "objective.cuts=2",
    "run.device=cpu",
]
SEED = STEP = 0
AHEAD = {"jepa": "horizon", "horizons": ["30d", "180d", "365d"], "positions": 4}


@dataclass(frozen=True)
class Shown:
    """The two patients in one format."""

    settings: TrainSettings
    prepared: Prepared
    pair: list[Timeline]  # their windows, each a whole record

    @classmethod
    def of(cls, folder: Path, form: str) -> "Shown":
        """Prepare the cohort that lies in `folder` and cut it into windows."""
        settings = load(
            "tiny", [*SETTINGS, f"data.format={form}", f"data.path={folder / 'cohort'}"]
        )
        prepared = prepare(settings.data, folder / form, None, ("train",))
        windows = prepared.windows("train", settings.data.window, settings.objective)
        made = (windows[index] for index in range(len(windows)))
        of_subject = {w.subject: w for w in made if w.subject in SUBJECTS}
        return cls(settings, prepared, [of_subject[s] for s in SUBJECTS])

    @property
    def window(self) -> Timeline:
        """The window of the patient that is shown."""
        return self.pair[0]

    def cuts(self) -> list[int]:
        """Return the cuts of the window in the step that is shown."""
        return cut_points(self.window, self.settings.objective, SEED, STEP)

    def marked(self, names: list[str]) -> list[str]:
        """Return the names of the window's tokens, with a star where the first cut masks them."""
        masked = masked_tokens(self.window, self.cuts()[0], self.settings.objective, SEED, STEP, 0)
        return [f"{name}*" if i in masked else name for i, name in enumerate(names)]

    def told_cuts(self) -> list[str]:
        """A line about the cuts."""
        return [
            f"cuts at {self.cuts()}, of {len(self.window)} tokens; "
            f"vocabulary {len(self.prepared.tokenizer)}"
        ]


def minute(time: int) -> str:
    """A time in microseconds since 1970 as a date and a clock."""
    return str(np.datetime64(time, "us").astype("M8[m]")).replace("T", " ")


def events(batch: EventBatch) -> list[str]:
    """A line for each event: time, code and value, as MEDS has them."""
    lines = ["time              code                          numeric_value"]
    for time, code, value in zip(batch.time_N, batch.code_N, batch.value_N, strict=True):
        at = "" if time == STATIC else minute(int(time))
        number = "" if np.isnan(value) else f"{value:g}"
        lines.append(f"{at:<16}  {batch.codes[code]:<28}  {number}".rstrip())
    return lines


def code_tokens(shown: Shown) -> list[str]:
    """A line for each moment of a window: where it begins, its time, and its tokens."""
    vocabulary, window = shown.prepared.encoding, shown.window
    assert isinstance(vocabulary, CodeVocabulary)
    names = [vocabulary.tokens[i - vocabulary.first_id].name for i in window.ids_T.tolist()]
    marked = shown.marked(names)
    lines = [f"  0  {'header':<16}  {' | '.join(marked[: window.header])}"]
    for start, end, time in zip(
        [window.header, *window.bucket_end_B[:-1].tolist()],
        window.bucket_end_B.tolist(),
        window.bucket_time_B.tolist(),
        strict=True,
    ):
        lines.append(f"{start:3d}  {minute(time)}  {' | '.join(marked[start:end])}")
    return lines


def text(shown: Shown, dataset: MedsDataset, record: EventBatch) -> list[str]:
    """The text of the window, which is that of the record."""
    [written] = shown.prepared.serializer(dataset).texts(record)
    decoded = str(shown.prepared.tokenizer.decode(shown.window.ids_T[1:]))  # without <|begin|>
    if decoded != written:
        raise ValueError("the tokens of the window must be the text of the record")
    return decoded.splitlines()


def text_tokens(shown: Shown) -> list[str]:
    """A line for each stretch of a window: where it begins, what it is, and its tokens."""
    window, tokenizer = shown.window, shown.prepared.tokenizer
    edges = {0, len(window), window.header, *window.bucket_end_B.tolist()}
    edges |= {*window.line_start_L.tolist(), *window.line_end_L.tolist()}
    section_of = dict(zip(window.line_start_L.tolist(), window.line_section_L, strict=True))
    marked = shown.marked([repr(tokenizer.decode([i]))[1:-1] for i in window.ids_T.tolist()])
    lines = []
    for start, end in pairwise(sorted(edges)):
        kind = f"line, {SECTIONS[section_of[start]]}" if start in section_of else "header and tags"
        kind = "before the buckets" if start < window.header else kind
        lines.append(f"{start:3d}  {kind:<20}  {'|'.join(marked[start:end])}")
    return lines


def segments(batch: PackedBatch) -> list[str]:
    """The table that attention reads, and the positions of each segment."""
    lines = ["segment    start  length  trunk_start  prefix  positions"]
    for start, length, trunk_start, prefix in batch.segment_tuples:
        kind = "branch" if prefix else "trunk"
        first, last = (int(batch.position_T[row]) for row in (start, start + length - 1))
        lines.append(
            f"{kind:<9}  {start:5d}  {length:6d}  {trunk_start:11d}  {prefix:6d}  {first}..{last}"
        )
    return lines


def blocks(folder: Path) -> dict[str, list[str]]:
    """What is printed, by heading; the cohort and its shards are written to `folder`."""
    simulate(folder / "cohort", 60, SEED)
    dataset = MedsDataset.open(folder / "cohort")
    [record] = dataset.batches("train", np.array(SUBJECTS[:1]))
    codes, lines = Shown.of(folder, "codes"), Shown.of(folder, "text")
    batch = make_batch(codes.pair, codes.settings.objective, SEED, STEP, jepa=True)
    encoder = make_encoder(codes.settings, codes.prepared.tokenizer, torch.device("cpu"))
    return {
        "events": events(record),
        "tokens": code_tokens(codes),
        "cuts": codes.told_cuts(),
        "segments": segments(batch),
        "counts": counts(batch),
        "losses": losses(encoder, batch),
        "text": text(lines, dataset, record),
        "text_tokens": text_tokens(lines),
        "text_cuts": lines.told_cuts(),
        "ahead": ahead(codes),
    }


def ahead(shown: Shown) -> list[str]:
    """A line for each pair of a drawn position and a horizon, and what is predicted of it."""
    form, prepared = ObjectiveSettings(**AHEAD), shown.prepared
    horizons, classes = prepared.horizons(form), prepared.classes()
    windows = prepared.windows("train", len(shown.window), form, None, horizons, classes)
    made = (windows[index] for index in range(len(windows)))
    window = next(w for w in made if w.subject == shown.window.subject)
    options = {"positions": form.positions, "seed": SEED, "step": STEP}
    pairs = window_pairs(window, horizons, latent=True, codes=True, **options)
    lines = ["position  at                horizon  mean of the tokens  codes that come"]
    for p, (n, h) in enumerate(zip(pairs.position_P, pairs.horizon_P, strict=True)):
        token, end = int(pairs.token_N[n]), int(pairs.end_P[p])
        at = minute(int(window.bucket_time_B[window.bucket_end_B.searchsorted(token, "right")]))
        span = f"{token + 1}..{end - 1}" if end > token + 1 else "none"
        num_codes = int((pairs.pair_Z == p).sum())
        lines.append(f"{token:8d}  {at}  {horizons.names[h]:>7}  {span:>18}  {num_codes:15d}")
    return lines


def counts(batch: PackedBatch) -> list[str]:
    """What the means of a step divide by, and what its forwards read."""
    return [
        f"tokens of the packed row       {batch.segments.tokens}",
        f"visible (query, key) pairs     {batch.segments.pairs}",
        f"labelled tokens (SFT)          {batch.num_labels}",
        f"masked positions (JEPA)        {batch.num_masked}",
        f"tokens of the target encoder   {len(batch.target_ids_U)}",
    ]


def losses(encoder: PatientEncoder, batch: PackedBatch) -> list[str]:
    """Both losses of a model that has not been trained, by both paths."""
    target = TargetEncoder(encoder)
    scales = LossScales.of(0.1, 1.0, batch.num_labels, batch.num_masked)._asdict()
    lines = []
    for name, path in (("shared", objective), ("reference", reference)):
        sft, jepa, _ = path.losses(encoder, target, batch, **scales, normalize=True)
        lines.append(f"{name:<9}  0.1 SFT = {sft.item():.3f}   1.0 JEPA = {jepa.item():.3f}")
    return lines


def main() -> None:
    """Print all blocks."""
    with tempfile.TemporaryDirectory() as folder:
        for heading, lines in blocks(Path(folder)).items():
            print(f"[{heading}]", *lines, "", sep="\n")


if __name__ == "__main__":
    main()
