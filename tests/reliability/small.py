"""Tasks with a known small number of patients, and whether what is printed or written tells it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

DAY = 86_400_000_000
ROWS = 40  # judged, one of each patient
SIZES = {"train": 120, "tuning": ROWS, "held_out": 12}
_WORDS = r"(positive|patients|subjects|people|rows|true|events|with the event|have|are|in all)"
_COUNTS = (
    "rows",
    "positives",
    "patients",
    "first",
    "left_out",
    "unmatched",
    "subjects",
    "positive",
)


def write_task(folder: Path, few: int, rest: bool, seed: int) -> Path:
    """A dataset and embeddings; `few` of the tuning patients have the outcome, or have it not."""
    rng, start = np.random.default_rng(seed), 1
    rows: dict[str, list] = {"subject_id": [], "prediction_time": [], "split": [], "embedding": []}
    for split, size in SIZES.items():
        subjects = np.arange(start, start + size)
        start += size
        true = rng.permutation(size) < (few if split == "tuning" else size // 2)
        true = ~true if rest and split == "tuning" else true
        events = [
            (s, day * DAY, code)
            for s, has in zip(subjects.tolist(), true.tolist(), strict=True)
            for day, code in ((1, "LAB//A"), (3, "DIAGNOSIS//B"), (9, "LAB//A"))
            if code == "LAB//A" or has
        ]
        table = pa.table(
            {
                "subject_id": [e[0] for e in events],
                "time": pa.array([e[1] for e in events], pa.timestamp("us")),
                "code": [e[2] for e in events],
                "numeric_value": pa.nulls(len(events), pa.float32()),
            }
        )
        _write(folder / "data" / split / "0.parquet", table)
        keys = {
            "subject_id": subjects,
            "prediction_time": pa.array([5 * DAY] * size, pa.timestamp("us")),
        }
        _write(
            folder / "labels" / "rare" / f"{split}.parquet",
            pa.table({**keys, "boolean_value": true}),
        )
        rows["subject_id"] += subjects.tolist()
        rows["prediction_time"] += [5 * DAY] * size
        rows["split"] += [split] * size
        rows["embedding"] += (rng.normal(size=(size, 4)) + true[:, None]).tolist()
    kind = {"prediction_time": pa.timestamp("us"), "embedding": pa.list_(pa.float32(), 4)}
    table = pa.table({name: pa.array(own, kind.get(name)) for name, own in rows.items()})
    _write(folder / "online.parquet", table)
    return folder


def broken_labels(labels: Path, few: int) -> Iterator[str]:
    """Break `few` rows of the tuning labels of a task, in one way after the other; yield which."""
    files = [labels / f"{split}.parquet" for split in SIZES]
    train, tuning, _ = tables = [pq.read_table(file) for file in files]
    first, ids = tuning.slice(0, few), tuning["subject_id"].to_numpy()
    true = tuning["boolean_value"].to_pylist()
    broken = {
        "null": tuning.set_column(2, "boolean_value", pa.array([None] * few + true[few:])),
        "twice": pa.concat_tables([tuning, first]),
        "unknown": tuning.set_column(0, "subject_id", pa.array(ids + 10**6 * (ids < ids[few]))),
        "of another split": tuning.slice(few),
    }
    for name, table in broken.items():
        _write(files[1], table)
        if name == "of another split":
            _write(files[0], pa.concat_tables([train, first]))
        yield name
    for file, table in zip(files, tables, strict=True):
        _write(file, table)


def write_predictions(folder: Path, few: int, rest: bool, seed: int) -> None:
    """Two methods that judge as many patients; `few` have the outcome, or have it not."""
    rng = np.random.default_rng(seed)
    true = (rng.permutation(ROWS) < few) != rest
    for name in ("a", "b"):
        chance = 1 / (1 + np.exp(-rng.normal(size=ROWS) - true))
        table = pa.table(
            {
                "subject_id": np.arange(ROWS),
                "prediction_time": pa.array([0] * ROWS, pa.timestamp("us")),
                "boolean_value": true,
                "predicted_boolean_probability": chance,
            }
        )
        _write(folder / f"{name}.parquet", table)


def told(text: str) -> Iterator[str]:
    """Counts of 1 to 10 people in a text, and what is left of the judged rows by as many."""
    plain = re.sub(r"<[^>]*>", " ", text)
    shown = "|".join(map(str, (*range(1, 11), *range(ROWS - 10, ROWS))))
    after = rf"({_WORDS}\b|of {ROWS}\b)"
    for match in re.finditer(rf"(?<![\d.,=≤<-])(?<!than )\b({shown})\s+{after}", plain):
        yield match[0]


def recorded(value: Any, key: str = "") -> Iterator[str]:
    """Small counts of a JSON value, and shares of bins and rows that tell one."""
    if isinstance(value, dict):
        if "observed" in value and "num" in value and value["observed"] is not None:
            part = value["observed"] * value["num"]
            if any(0.5 < n < 10.5 for n in (part, value["num"] - part)):
                yield f"a share of {value['observed']:.3f} of {value['num']} people"
        if value.get("prevalence") is not None and not 10 < value["prevalence"] * ROWS < ROWS - 10:
            yield f"a prevalence of {value['prevalence']}"
        for name, inner in value.items():
            yield from recorded(inner, name if name in _COUNTS else key if key else "")
    elif isinstance(value, list):
        for inner in value:
            yield from recorded(inner)
    elif key and isinstance(value, int) and (1 <= value <= 10 or ROWS - 10 <= value < ROWS):
        yield f"{key} {value}"


def told_by(text: str, folder: Path) -> list[str]:
    """What a command's text and the JSON and pages in a folder tell of few people."""
    bad = [f"prints `{hit}`" for hit in told(text)]
    for file in sorted(folder.rglob("*.json")):
        bad += [f"{file.name} holds {hit}" for hit in recorded(json.loads(file.read_text()))]
    for file in sorted(folder.rglob("*.html")):
        bad += [f"{file.name} shows `{hit}`" for hit in told(file.read_text())]
    return bad


def _write(file: Path, table: pa.Table) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file)
