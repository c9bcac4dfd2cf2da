"""The choice of the bucket: the longest with which enough tokens can be cut."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from smbfast.data import bucket as own
from smbfast.data.bucket import BUCKETS, choose_bucket, sampled_subjects, share_with_cut, why
from smbfast.data.meds import EventBatch, MedsDataset
from smbfast.data.preparing import prepare
from smbfast.data.serialize import Bucket, Serializer
from smbfast.settings import DataSettings, ObjectiveSettings
from smbfast.simulation.dataset import simulate
from tests.data.event_tables import Event, batch_of, event, one_subject, our_bpe, serializer_of

OURS = our_bpe()


class InMemory:
    """As much of a dataset as the choice reads."""

    def __init__(self, *subjects: list[Event]) -> None:
        self.batch = batch_of(*subjects)

    splits: ClassVar[dict[str, list[Path]]] = {"train": [Path("0.parquet")]}

    def subjects(self, split: str, files: list[Path]) -> np.ndarray:
        assert split == "train" and files == self.splits["train"]
        return np.unique(self.batch.subject_N)

    def batches(self, split: str, subjects: np.ndarray, *, text_chars: int) -> Iterator[EventBatch]:
        assert split == "train" and len(subjects) and text_chars == 64
        yield self.batch


def make(bucket: Bucket) -> Serializer:
    return serializer_of(OURS, bucket=bucket, format="text")


def visits(times: list[str]) -> list[Event]:
    """At each time a few values, each a line of its own."""
    return [event(t, f"LAB//{name}", v) for t in times for v, name in enumerate("abcdefgh")]


DAYS = [f"2150-01-0{d} 10:00" for d in range(1, 9)]
HOURS = [f"2150-01-01 {h:02}:00" for h in range(8, 16)]
MINUTES = [f"2150-01-01 10:{m:02}" for m in range(8, 16)]


@pytest.mark.parametrize(
    ("times", "expected"), [(DAYS, "day"), (HOURS, "hour"), (MINUTES, "moment")]
)
def test_the_coarsest_that_can_be_cut(times: list[str], expected: str) -> None:
    chosen, shares = choose_bucket(InMemory(visits(times)), make, 4096)
    tried = BUCKETS[: BUCKETS.index(expected) + 1]
    assert chosen == expected and tuple(shares) == tried
    assert [shares[b] for b in tried] == [*([0.0] * (len(tried) - 1)), 1.0]
    assert f"is `{expected}`, the longest" in why(chosen, shares)


def test_without_enough_it_is_the_finest_and_that_is_said() -> None:
    chosen, shares = choose_bucket(InMemory(visits(MINUTES[:1])), make, 4096)
    assert chosen == "moment" and shares == dict.fromkeys(BUCKETS, 0.0)
    assert "none reaches 90%" in why(chosen, shares)


def test_a_share_counts_tokens_of_windows() -> None:
    long, short = visits(DAYS), visits(DAYS[:1])
    serializer = make("day")
    batch = batch_of(long, short)
    lengths = [len(t) + 1 for t in serializer.timelines(batch)]  # and the begin token
    share = share_with_cut(serializer, iter([batch]), 4096)
    assert share == lengths[0] / sum(lengths)
    # the rule is that of the objective: no future is so long
    objective = ObjectiveSettings(min_future=lengths[0])
    assert share_with_cut(serializer, iter([batch]), 4096, objective=objective) == 0


def test_a_tokenizer_is_trained_for_each_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[list[str]] = []
    train = own.train_tokenizer

    def spy(lines: Iterator[str], vocab_size: int) -> PreTrainedTokenizerBase:
        texts.append(list(lines))
        return train(texts[-1], vocab_size)

    monkeypatch.setattr(own, "train_tokenizer", spy)
    subjects = [visits(HOURS) for _ in range(12)]
    chosen, shares = choose_bucket(InMemory(*subjects), make, 4096, vocab_size=700)
    assert chosen == "hour" and list(shares) == ["day", "hour"]
    by_day, by_hour = texts
    assert len(by_day) == len(by_hour) == 12  # a text of each subject
    assert all("+0\n" in text for text in by_day) and all("@09\n" in text for text in by_hour)


def test_the_sample_is_spread_over_all_subjects(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = InMemory(*(visits(DAYS[:1]) for _ in range(7)))
    assert sampled_subjects(dataset).tolist() == list(range(1, 8))
    monkeypatch.setattr(own, "SUBJECTS", 3)
    assert sampled_subjects(dataset).tolist() == [1, 3, 5]


def test_a_split_without_events_is_refused() -> None:
    with pytest.raises(ValueError, match="must have an event with a time"):
        choose_bucket(InMemory([event(None, "GENDER//F")]), make, 4096)


@pytest.mark.parametrize("form", ["text", "text-paper"])
def test_preparing_takes_what_was_chosen_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    simulate(tmp_path / "cohort", 60, 0)
    data = DataSettings(path=str(tmp_path / "cohort"), format=form, vocab_size=500, window=256)
    made = prepare(data, tmp_path / "out", None, ("train",))
    assert "data.bucket=auto is `day`, the longest" in capsys.readouterr().err
    assert (made.options["bucket"], made.options["format"]) == ("day", form)
    assert bool(made.preamble.age_ids) == (form == "text")
    # shards that are there keep their bucket: nothing is chosen again
    monkeypatch.setattr("smbfast.data.fitting.choose_bucket", None)
    assert prepare(data, tmp_path / "out", None, ("train",)).options == made.options
    dataset = MedsDataset.open(data.folder)
    batch = next(dataset.batches("train"))
    serializer = made.serializer(dataset)
    (first,) = serializer.timelines(one_subject(batch, 0))
    assert np.array_equal(first.ids_T, made.shards("train")[0][0].ids_T)
