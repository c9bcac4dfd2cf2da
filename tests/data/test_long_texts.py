"""Of long texts only the beginning is read, and nothing that is written or counted differs."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smbfast.data import long_texts
from smbfast.data.clean import _HIDDEN, clean, shortened
from smbfast.data.codes.statistics import CodeStatistics, cut_text
from smbfast.data.long_texts import beginnings, gathered, rows_at_once
from smbfast.data.meds import MedsDataset
from smbfast.data.preparing import prepare
from smbfast.settings import DataSettings
from tests.data.event_tables import our_bpe, serializer_of
from tests.factory import CODES, at, split_rows, subject_rows, write_meds
from tests.refusal import refused

# spaces and signs that are not seen are most of it, so that a beginning may be of them alone
LETTERS = st.sampled_from(list("ab<\u00fc\uff1c") + [" ", "\n", "\x00", "\u200b", "\U000e0041"] * 2)
TEXTS = st.lists(st.tuples(LETTERS, st.integers(1, 40)), max_size=12).map(
    lambda runs: "".join(sign * times for sign, times in runs)
)


def cleaned_whole(text: str) -> str:
    """What cleaning is: of all of the text."""
    return re.sub(r" +", " ", _HIDDEN.sub(" ", text)).strip(" ")


@given(TEXTS, st.integers(0, 40))
@settings(max_examples=400, deadline=None)
def test_reading_a_beginning_is_cleaning_the_whole_and_cutting(text: str, limit: int) -> None:
    whole = cleaned_whole(text)
    assert clean(text) == whole
    assert clean(text, limit) == whole[:limit].rstrip()
    assert shortened(text, limit) == (whole[:limit].rstrip(), len(whole) > limit)


class Watched(str):
    """A text that notes how much of it was asked for."""

    read = 0

    def __getitem__(self, part: slice) -> str:  # type: ignore[override]
        assert part.start is None
        Watched.read = max(Watched.read, part.stop)
        return str.__getitem__(self, part)


def test_a_note_is_not_read_to_its_end() -> None:
    text = Watched("word " * 1_000_000)
    assert shortened(text, 64) == (clean("word " * 13)[:64], True) and clean(text, 64)
    assert 64 < Watched.read < 300


@given(st.lists(st.none() | TEXTS, max_size=8), st.integers(0, 8), st.sampled_from("sld"))
@settings(max_examples=200, deadline=None)
def test_a_beginning_tells_as_much_as_all_of_a_text(
    texts: list[str | None], limit: int, kind: str
) -> None:
    column = pa.array(texts, pa.large_string() if kind == "l" else pa.string())
    column = column.dictionary_encode() if kind == "d" else column
    got = beginnings(column, limit)
    assert got.type == column.type and len(got) == len(texts)
    for head, text in zip(got.to_pylist(), texts, strict=True):
        assert (head is None) == (text is None)
        if text is not None and head is not None:
            assert text.startswith(head) and len(head) <= max(4 * limit + 64, 2 * len(text))
            assert shortened(head, limit) == shortened(text, limit)
            assert cut_text(head, limit) == cut_text(text, limit)


def test_a_visible_note_is_cut_in_arrow() -> None:
    (head,) = beginnings(pa.array(["\u00fc" * 5000]), 10).to_pylist()
    assert head == "\u00fc" * 104
    (head,) = beginnings(pa.array([" " * 5000 + "x" * 5000]), 10).to_pylist()
    assert head.startswith(" " * 5000 + "x" * 11) and len(head) < 10_000


def notes(folder: Path, num: int = 40) -> Path:
    """Texts of 5,000 characters that agree in the first 100, and differ behind them."""
    rows = split_rows("train")
    rows += [(60, at(i), "LAB//note", None, "n" * 100 + " word" * 980 + str(i)) for i in range(num)]
    rows += [(60, at(num), "LAB//note", None, "n" * 64), (60, at(num), "LAB//note", None, "n" * 65)]
    return write_meds(folder, {"train": rows}, CODES)


@pytest.mark.parametrize("form", ["codes", "text"])
def test_shards_do_not_depend_on_how_much_is_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    data = DataSettings(
        path=str(notes(tmp_path / "meds")), format=form, bucket="day", vocab_size=500, workers=1
    )
    made = prepare(data, tmp_path / "whole", None, ("train",))
    for name, value in (("TEXT_ROWS", 7), ("TEXT_BYTES", 1000), ("LEAST_ROWS", 1)):
        monkeypatch.setattr(long_texts, name, value)
    parts = prepare(data, tmp_path / "parts", None, ("train",))
    assert made.counts == parts.counts
    if form == "text":  # of each event, not of each text or batch; 64 characters are not cut
        assert made.counts["texts_cut"] == 41
    for split in ("train",):
        pairs = zip(made.shards(split)[0], parts.shards(split)[0], strict=True)
        assert all(np.array_equal(a.ids_T, b.ids_T) for a, b in pairs)


def test_texts_that_differ_behind_their_beginning_are_one(tmp_path: Path) -> None:
    dataset = MedsDataset.open(notes(tmp_path / "meds"))
    *_, whole = dataset.batches("train")  # the last subject, in a batch that ends with its file
    *_, part = dataset.batches("train", text_chars=64)
    assert sum(len(t) > 1000 for t in whole.texts) == 40
    assert sum(t.startswith("n" * 66) for t in part.texts) == 1
    assert max(map(len, part.texts)) <= 4 * 64 + 64
    counted = [CodeStatistics(), CodeStatistics()]
    texts = []
    for statistics, batch in zip(counted, (whole, part), strict=True):
        statistics.add(batch)
        statistics.settle()
        serializer = serializer_of(our_bpe())
        texts.append((serializer.texts(batch), serializer.counts))
    assert texts[0] == texts[1]
    assert counted[0].text_ids == counted[1].text_ids
    assert np.array_equal(counted[0].texts.sum_KM, counted[1].texts.sum_KM)


def test_rows_at_once_are_bounded_by_bytes(tmp_path: Path) -> None:
    column = pa.array([f"{i} " + "w" * 100_000 for i in range(100)])
    pq.write_table(pa.table({"text_value": column}), tmp_path / "long.parquet")
    pq.write_table(pa.table({"text_value": ["short"] * 100}), tmp_path / "short.parquet")
    long, short = (pq.ParquetFile(tmp_path / f"{n}.parquet") for n in ("long", "short"))
    assert 300 < rows_at_once(long, ["text_value"]) < 340  # 32 MiB of 100,000 bytes
    assert rows_at_once(short, ["text_value"]) == long_texts.TEXT_ROWS
    assert rows_at_once(long, ["subject_id"]) == long_texts.ROWS


def test_texts_that_are_decoded_together_are_bounded_by_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(long_texts, "TEXT_BYTES", 10_000)
    text = pa.RecordBatch.from_pydict({"text_value": ["w" * 3_000]})
    tables = [table for _, table in gathered(((i, text) for i in range(9)), None)]
    assert [len(table) for table in tables] == [3, 3, 3]
    assert max(table.nbytes for table in tables) <= 10_000


def test_what_is_cut_off_must_be_text_as_well(tmp_path: Path) -> None:
    data = write_meds(tmp_path / "meds", {"train": subject_rows(1)})
    file = data / "data" / "train" / "0.parquet"
    table = pq.read_table(file)
    bad = pa.array([b"x" * 900 + b"\xff"] * len(table), pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(table), bad.buffers())
    place = table.schema.get_field_index("text_value")
    pq.write_table(table.set_column(place, "text_value", text), file)
    refused(lambda: list(MedsDataset.open(data).batches("train", text_chars=64)), file, "UTF-8")
