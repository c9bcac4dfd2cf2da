"""One simulated patient from events to losses: prints what docs/how-it-works.md shows.

python docs/one_patient.py

Legend: T tokens of the packed row.
"""

import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from smbfast import objective, reference
from smbfast.batch import PackedBatch, Timeline
from smbfast.data.loader import make_batch
from smbfast.data.masking import cut_points, masked_tokens
from smbfast.data.meds import STATIC, EventBatch, MedsDataset
from smbfast.data.prepared import Prepared
from smbfast.data.preparing import prepare
from smbfast.data.sections import SECTIONS
from smbfast.data.windows import WindowSet
from smbfast.model.backbone import PatientEncoder, make_encoder
from smbfast.model.target import TargetEncoder
from smbfast.run.step import LossScales
from smbfast.settings import load
from smbfast.simulation.dataset import simulate

SUBJECTS = 41, 8  # the patient that is shown, and one that shares the row
SETTINGS = [
    "data.format=text",
    "data.window=96",
    "data.vocab_size=2048",
    "objective.cuts=2",
    "run.device=cpu",
]
SEED = STEP = 0


def events(batch: EventBatch, last: int) -> list[str]:
    """A line for each event up to the time `last`: time, code and value, as MEDS has them."""
    lines = ["time        code                       numeric_value"]
    for time, code, value in zip(batch.time_N, batch.code_N, batch.value_N, strict=True):
        if time > last:
            break
        day = "" if time == STATIC else str(np.datetime64(int(time), "us").astype("M8[D]"))
        number = "" if np.isnan(value) else f"{value:g}"
        lines.append(f"{day:<10}  {batch.codes[code]:<25}  {number}".rstrip())
    return lines


def text(prepared: Prepared, record: str, window: Timeline) -> list[str]:
    """The text of the window, which is the beginning of that of the record."""
    shown = prepared.tokenizer.decode(window.ids_T[1:])  # without the begin token
    if not record.startswith(shown):
        raise ValueError("the tokens of a first window must be the beginning of the record's text")
    return shown.splitlines()


def tokens(prepared: Prepared, window: Timeline, masked_T: np.ndarray) -> list[str]:
    """A line for each stretch of a window: where it begins, what it is, and its tokens."""
    edges = {0, len(window), window.header, *window.bucket_end_B.tolist()}
    edges |= {*window.line_start_L.tolist(), *window.line_end_L.tolist()}
    section_of = dict(zip(window.line_start_L.tolist(), window.line_section_L, strict=True))
    ends = sorted(edges)
    lines = []
    for start, end in pairwise(ends):
        kind = f"line, {SECTIONS[section_of[start]]}" if start in section_of else "header and tags"
        kind = "before the buckets" if start < window.header else kind
        words = [repr(prepared.tokenizer.decode([int(i)]))[1:-1] for i in window.ids_T[start:end]]
        marks = ["*" if masked else "" for masked in masked_T[start:end]]
        shown = "|".join(f"{word}{mark}" for word, mark in zip(words, marks, strict=True))
        lines.append(f"{start:3d}  {kind:<20}  {shown}")
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
    settings = load("tiny", [*SETTINGS, f"data.path={folder / 'cohort'}"])
    objective_settings = settings.objective
    simulate(folder / "cohort", 60, SEED)
    prepared = prepare(settings.data, folder / "shards", None, ("train",))
    dataset = MedsDataset.open(folder / "cohort")
    [record] = dataset.batches("train", np.array(SUBJECTS[:1]))
    windows = WindowSet.of(
        prepared.shards("train"), settings.data.window, prepared.preamble, objective_settings
    )
    whole = [w for w in windows if w.labels_from <= 1]
    pair = [next(w for w in whole if w.subject == subject) for subject in SUBJECTS]
    window = pair[0]
    cuts = cut_points(window, objective_settings, SEED, STEP)
    masked_T = np.zeros(len(window), bool)
    masked_T[masked_tokens(window, cuts[0], objective_settings, SEED, STEP, 0)] = True
    batch = make_batch(pair, objective_settings, SEED, STEP, jepa=True)
    shown = {
        "events": events(record, int(window.line_time_L.max())),
        "text": text(prepared, prepared.serializer(dataset).texts(record)[0], window),
        "tokens": tokens(prepared, window, masked_T),
        "cuts": [f"cuts at {cuts}, of {len(window)} tokens; vocabulary {len(prepared.tokenizer)}"],
        "segments": segments(batch),
        "counts": counts(batch),
    }
    encoder = make_encoder(settings, prepared.tokenizer, torch.device("cpu"))
    return shown | {"losses": losses(encoder, batch)}


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
        sft, jepa = path.losses(encoder, target, batch, **scales, normalize=True)
        lines.append(f"{name:<9}  0.1 SFT = {sft.item():.3f}   1.0 JEPA = {jepa.item():.3f}")
    return lines


def main() -> None:
    """Print all blocks."""
    with tempfile.TemporaryDirectory() as folder:
        for heading, lines in blocks(Path(folder)).items():
            print(f"[{heading}]", *lines, "", sep="\n")


if __name__ == "__main__":
    main()
