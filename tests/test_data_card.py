"""The data card: each dataset with something wrong gets its line from `check` and from `train`."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import Qwen2Config

import smbfast.check
import smbfast.train
from smbfast.base.counts import of_whole, recorded, share
from smbfast.data.horizons import Horizons, PairCounts
from smbfast.data.loader import make_step
from smbfast.data.meds import EventBatch, MedsDataset
from smbfast.data.preparing import prepare
from smbfast.data.quality import count_quality
from smbfast.data.windows import WindowSet
from smbfast.run import data_card, data_losses
from smbfast.settings import load
from tests.data.event_tables import batch_of
from tests.factory import (
    CODES,
    SPLITS,
    Row,
    at,
    subject_rows,
    tiny_run,
    write_labels,
    write_meds,
    write_table,
)

NEXT = "the model comes next"
Plant = Callable[[Path], list[str]]


def rows_of(make: Callable[[int], list[Row]], splits: tuple[str, ...] = tuple(SPLITS)) -> dict:
    """Rows of `make` for the subjects of some splits, in order of time."""

    def key(row: Row) -> np.datetime64:
        return np.datetime64("1000-01-01", "us") if row[1] is None else row[1]

    return {s: [row for i in SPLITS[s] for row in sorted(make(i), key=key)] for s in splits}


def lab(subject: int, time: np.datetime64, value: float = 1.0) -> Row:
    return subject, time, "LAB//glucose", value, None


def labels(folder: Path, rows: Callable[[int], tuple], task: str = "task") -> list[str]:
    given = {split: [rows(s) for s in ids] for split, ids in SPLITS.items()}
    write_labels(folder, task, given)
    return [f"--probe.labels={task}"]


def long_moments(folder: Path) -> list[str]:
    write_meds(folder, rows_of(lambda s: subject_rows(s) + [lab(s, at(9), i) for i in range(600)]))
    return []


def values_left_out(folder: Path) -> list[str]:
    write_meds(folder, rows_of(lambda s: [lab(s, at(d, h), h) for d in range(3) for h in range(9)]))
    return ["--data.format=text", "--data.bucket=day", "--data.values_per_line=1"]


def not_finite(folder: Path) -> list[str]:
    values = np.inf, np.nan
    write_meds(folder, rows_of(lambda s: subject_rows(s) + [lab(s, at(9), v) for v in values * 30]))
    return []


def few_codes(folder: Path) -> list[str]:
    write_meds(folder)
    return ["--data.max_codes=1"]


def long_demographics(folder: Path) -> list[str]:
    more = [f"DEMOGRAPHIC//{i}" for i in range(60)]
    write_meds(
        folder, rows_of(lambda s: [(s, None, c, None, None) for c in more] + subject_rows(s))
    )
    return []


def one_moment(folder: Path) -> list[str]:
    write_meds(folder, rows_of(lambda s: [lab(s, at(0), i) for i in range(20)]))
    return []


def one_moment_of_futures(folder: Path) -> list[str]:
    one_moment(folder)
    return ["--objective.sft_labels=future"]


def tuning_of_one_moment(folder: Path) -> list[str]:
    rows = rows_of(lambda s: [lab(s, at(0), i) for i in range(20)], ("tuning",))
    write_meds(folder, rows)
    return []


def few_masks(folder: Path) -> list[str]:
    write_meds(folder)
    return ["--optim.batch=1", "--objective.mask_ratio=0.1"]


def foreign_labels(folder: Path) -> list[str]:
    write_meds(folder)
    return labels(folder, lambda s: (s + 1000, at(3), s % 2 == 0))


def half_foreign_labels(folder: Path) -> list[str]:
    write_meds(folder)
    return labels(folder, lambda s: (s + 1000 * (s % 4 > 1), at(3), s % 2 == 0))


def single_class(folder: Path) -> list[str]:
    write_meds(folder)
    return labels(folder, lambda s: (s, at(3), s > 12))


def no_event(folder: Path) -> list[str]:
    write_meds(folder)
    for split, ids in SPLITS.items():
        table = pa.table(
            {
                "subject_id": pa.array(list(ids), pa.int64()),
                "prediction_time": pa.array([at(3)] * len(ids), pa.timestamp("us")),
                "duration_days": pa.array([9.0] * len(ids)),
                "event": pa.array([False] * len(ids)),
            }
        )
        write_table(folder / "labels" / "task" / f"{split}.parquet", table)
    return ["--probe.labels=task"]


def labels_before_records(folder: Path) -> list[str]:
    write_meds(folder)
    return labels(folder, lambda s: (s, at(-30), s % 2 == 0))


def half_before_records(folder: Path) -> list[str]:
    write_meds(folder)
    return labels(folder, lambda s: (s, at(-30 if s % 4 > 1 else 3), s % 2 == 0))


def few_descriptions(folder: Path) -> list[str]:
    write_meds(folder, codes=dict.fromkeys(CODES))
    return ["--data.format=text", "--data.bucket=day"]


def every_event_twice(folder: Path) -> list[str]:
    write_meds(folder, rows_of(lambda s: subject_rows(s) * 2))
    return []


def empty_codes(folder: Path) -> list[str]:
    empty: Callable[[int, int], Row] = lambda s, d: (s, at(d, 9), " ", None, None)  # noqa: E731
    write_meds(folder, rows_of(lambda s: subject_rows(s) + [empty(s, d) for d in range(8)]))
    return []


def impossible_years(folder: Path) -> list[str]:
    odd = np.datetime64("2901-01-01", "us")
    write_meds(folder, rows_of(lambda s: [*subject_rows(s), lab(s, odd)]))
    return []


def late_births(folder: Path) -> list[str]:
    write_meds(folder, rows_of(lambda s: [*subject_rows(s), (s, at(1), "MEDS_BIRTH", None, None)]))
    return []


def empty_tokenizer(folder: Path) -> list[str]:
    """A backbone without tokenizer files, for which transformers makes an empty tokenizer."""
    write_meds(folder)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    backbone = folder.parent / "backbone"
    Qwen2Config(vocab_size=600, **sizes).save_pretrained(backbone)
    (backbone / "model.safetensors").touch()  # weights are not read before the tokenizer
    return [f"--model.path={backbone}", "--data.window=1024"]


def contradicting_splits(folder: Path) -> list[str]:
    write_meds(folder)
    ids = [s for own in SPLITS.values() for s in own]
    table = pa.table({"subject_id": ids, "split": ["train"] * len(ids)})
    pq.write_table(table, folder / "metadata" / "subject_splits.parquet")
    return []


def two_descriptions(folder: Path) -> list[str]:
    write_meds(folder)
    file = folder / "metadata" / "codes.parquet"
    names = pq.read_table(file)
    others = pa.array(["another"] * len(names), names["description"].type)
    other = names.set_column(names.schema.names.index("description"), "description", others)
    pq.write_table(pa.concat_tables([names, other]), file)
    return []


REFUSED: dict[Plant, str] = {
    contradicting_splits: "subject_splits.parquet must say the splits that the folders",
    two_descriptions: "must give a code one description",
    long_moments: "--data.window=1024 would lose less than 5%",
    values_left_out: "--data.values_per_line=none",
    not_finite: "mend numeric_value",
    few_codes: "only the token of their family or section",
    one_moment: "phase jepa: JEPA needs training windows with a cut",
    one_moment_of_futures: "phase sft: SFT on the future alone needs training windows with a cut",
    foreign_labels: "match no subject of the data",
    single_class: "are all false in train",
    no_event: "have no observed event in train",
    labels_before_records: "all lie before the first event",
    empty_tokenizer: "tokenizer.json",
}
WARNED: dict[Plant, str] = {
    long_demographics: "longer than a quarter of data.window=128: --data.window=256",
    tuning_of_one_moment: "JEPA is not measured on tuning",
    few_masks: "which is very few",
    half_foreign_labels: "of the rows match a subject of the data",
    half_before_records: "lie before the first event",
    few_descriptions: "complete metadata/codes.parquet",
    every_event_twice: "as if every event were there twice",
    empty_codes: "have an empty code",
    impossible_years: "before 1900 or after 2300",
    late_births: "a birth after their first event",
}


@pytest.fixture
def without_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is made: what comes later than the data card is an error of its own."""

    def stop(*args: object, **words: object) -> None:
        raise ValueError(NEXT)

    monkeypatch.setattr("smbfast.run.open_run.make_encoder", stop)


@pytest.mark.parametrize("plant", [*REFUSED, *WARNED], ids=lambda plant: plant.__name__)
def test_what_is_wrong_with_the_data_is_said_before_the_model_is_made(
    plant: Plant, without_model: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    words = ["tiny", f"--data.path={data}", f"--run.dir={tmp_path / 'run'}", *plant(data)]
    for entry in (smbfast.check, smbfast.train):
        with pytest.raises(SystemExit) as stop:
            entry.main(words)
        told = capsys.readouterr()
        assert "ready" not in told.out
        if plant in REFUSED:
            assert REFUSED[plant] in str(stop.value) and NEXT not in str(stop.value)
            assert "\n" not in str(stop.value) and "warning" not in told.err
        else:
            assert NEXT in str(stop.value)
            warned = [line for line in told.err.splitlines() if line.startswith("warning: ")]
            assert len(warned) == 1 and WARNED[plant] in warned[0] and warned[0].endswith(".")


def test_sound_data_are_not_warned_of(
    without_model: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_meds(tmp_path / "data")
    write_labels(tmp_path / "data")
    words = [f"--data.path={tmp_path / 'data'}", f"--run.dir={tmp_path}/run"]
    with pytest.raises(SystemExit, match=NEXT):
        smbfast.check.main(["tiny", *words, "--probe.labels=task"])
    told = capsys.readouterr()
    assert "warning" not in told.err
    for words in (
        "6 of 6 steps have a mask",
        "train 12 of 24",
        "0.00% of tokens",
        "12 train / <=10",
    ):
        assert words in told.out


def test_a_seen_share_and_the_window_that_would_show_half() -> None:
    length = np.array([100, 300, 600])
    assert data_losses._seen(length, 128) == pytest.approx((100 + 128 + 128) / 1000, abs=1e-15)
    assert next(data_losses._longer(128)) == 256 and next(data_losses._longer(100)) == 128


def test_every_step_with_jepa_has_masked_tokens(tmp_path: Path) -> None:
    """What the card says of all steps from the table of windows holds for each step when drawn."""
    write_meds(tmp_path / "data")
    settings = load("tiny", [f"--data.path={tmp_path / 'data'}", "--phases.1.steps=60"])
    prepared = prepare(settings.data, tmp_path / "out", None, ("train", "tuning"))
    windows = WindowSet.of(prepared.shards("train"), 128, prepared.preamble, settings.objective)
    masks = data_card._masks(settings, windows)
    assert masks is not None and (masks.num_steps, masks.drawn) == (60, 8)
    drawn = []
    for index in range(6, 66):
        words = dict(batch=settings.optim.batch, tokens=4096, seed=settings.run.seed, jepa=True)
        drawn.append(make_step(windows, settings.objective, index, **words).num_masked)
    assert min(drawn) > 0
    # places 0, 8, 16, 25, ... of the 60: as drawn by the loader
    sampled = [drawn[int(place)] for place in np.linspace(0, 59, 8)]
    assert masks.mean == sum(sampled) / 8


def test_a_phase_without_a_token_to_predict_is_refused() -> None:
    windows = SimpleNamespace(num_with_cut=0, num_labels=0, horizons=None)
    settings = load("sft", [])
    (text,) = data_card._nothing_to_predict(settings, windows)
    assert text.startswith("phase sft: SFT has no token to predict")
    assert not data_card._nothing_to_predict(
        settings, SimpleNamespace(num_with_cut=0, num_labels=1, horizons=None)
    )
    # codes to come beside mask JEPA, whose windows have cuts and no pair
    masked = load("jepa", ["--phases.0.w_codes=1"])
    windows = WindowSet.of([], 128, None, masked.objective, horizons=Horizons(("1d",)))
    (text,) = data_card._nothing_to_predict(masked, replace(windows, with_cut_C=np.arange(3)))
    assert text.startswith("phase jepa: what is to come needs training windows in which")


def test_shares_of_horizons_tell_no_small_count_and_few_windows_with_a_pair_are_said() -> None:
    counts = PairCounts(100, (60, 95, 100), (40, 40, 0), (40, 35, 0))
    horizons = Horizons(("1d", "3d", "7d"), shares=counts)
    windows = WindowSet.of([], 128, None, load("tiny", []).objective, horizons=horizons)
    facts = data_card._horizon_facts(windows)
    assert facts is not None and [own["known"] for own in facts.values()] == [0.6, None, 1.0]
    assert [own["deaths"] for own in facts.values()] == [1.0, None, 0.0]
    few, most = (
        replace(windows, place_W5=np.zeros((50, 5)), with_pair_C=np.arange(num)) for num in (20, 30)
    )
    texts = data_card._ahead_warnings(few, most)
    assert texts[0].startswith("40.0% of windows have a pair, and steps read no others")
    assert not texts[1:] and not data_card._ahead_warnings(most, most)


def brute_force(batch: EventBatch, described: dict[str, str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    seen = set()
    for n in range(len(batch.time_N)):
        code, time, text = batch.codes[batch.code_N[n]], int(batch.time_N[n]), int(batch.text_N[n])
        value = float(batch.value_N[n])
        shown = None if np.isnan(value) else value
        counts["events_read"] += 1
        counts["numbers"] += shown is not None
        counts["valued"] += shown is not None or text >= 0
        key = (int(batch.subject_N[n]), time, code, shown, text)
        counts["duplicates"] += key in seen
        seen.add(key)
        counts["described"] += code in described or code == "MEDS_BIRTH"
        counts["empty_codes"] += not code.strip()
        if time != np.iinfo(np.int64).min:
            year = int(str(np.datetime64(time, "us").astype("datetime64[Y]")))
            counts["odd_years"] += year < 1900 or year > 2300
    counts["subjects_read"] = len(batch.offset_S1) - 1
    return counts


def test_quality_is_counted_exactly_and_adds_up_over_whole_subjects() -> None:
    random = np.random.default_rng(0)
    times = [None, "1899-12-31 23:59", "1900-01-01 00:00", "2300-12-31 23:59", "2301-01-01 00:00"]
    codes, values = ["A", "B", "", " ", "MEDS_BIRTH"], [None, 0.0, -0.0, 1.5]
    subjects = [
        [
            (
                times[random.integers(5)],
                codes[random.integers(5)],
                values[random.integers(4)],
                [None, "x", "y"][random.integers(3)],
            )
            for _ in range(random.integers(1, 90))
        ]
        for _ in range(8)
    ]
    dataset = MedsDataset.__new__(MedsDataset)
    object.__setattr__(dataset, "descriptions", {"A": "a letter"})
    whole = count_quality(batch_of(*subjects), dataset)
    assert whole == brute_force(batch_of(*subjects), dataset.descriptions)
    assert all(whole.values())
    parts = [batch_of(*subjects[:3]), batch_of(*subjects[3:], first=4)]
    assert sum((count_quality(part, dataset) for part in parts), Counter()) == whole


@pytest.mark.parametrize("count", [0, 1, 10, 11, 50, 89, 90, 99, 100])
def test_no_small_count_and_no_small_rest_is_shown(count: int) -> None:
    few, rest = 0 < count <= 10, 0 < 100 - count <= 10
    word = "<=10" if few else "all but <=10" if rest else None
    assert of_whole(count, 100) == (word or str(count))
    assert recorded(count, 100) == (word or count)
    assert share(count, 100) == (word or f"{count}.0%")
    assert recorded(count) == ("<=10" if few else count)


def test_no_step_is_the_best_of_a_loss_that_was_not_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a finished run that is asked for labels says that it has not probed them."""
    data, run = tmp_path / "data", tmp_path / "run"
    tuning_of_one_moment(data)
    write_labels(data)
    words = tiny_run(data, run, "--run.threads=1")
    smbfast.train.main(words)
    told = capsys.readouterr()
    assert "best sft   step" in told.out and "best jepa  none" in told.out
    assert [folder.name for folder in (run / "best").iterdir()] == ["sft"]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(r["loss"] is None for r in records if r["kind"] == "eval" and r["phase"] == "jepa")
    header = next(r for r in records if r["kind"] == "header")
    assert header["data"]["subjects"] == {"train": 12, "tuning": "<=10"}
    page = (run / "report.html").read_text()
    assert "JEPA is not measured on tuning" in page and "on 12 subjects" in page
    smbfast.train.main([*words, "--probe.labels=task"])
    told = capsys.readouterr().out
    assert "labels task were not probed by this run" in told and "--labels=task" in told
    smbfast.train.main(words)
    assert "probed" not in capsys.readouterr().out
