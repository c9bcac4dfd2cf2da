"""What a text tokenizer holds is of ten subjects, and a tokenizer gives back what it encodes."""

import json
import string
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from smbfast.data import bucket, tokens
from smbfast.data.bucket import files_to_fit
from smbfast.data.fitting import training_texts
from smbfast.data.meds import MedsDataset
from smbfast.data.preparing import prepare
from smbfast.data.tokens import (
    CLOSE,
    OPEN,
    TextEncoder,
    first_texts,
    load_tokenizer,
    train_tokenizer,
)
from smbfast.settings import DataSettings
from tests.data.event_tables import LINES, family_tokenizer, our_bpe, serializer_of
from tests.factory import subject_rows, write_meds, write_table

ALPHABET = set(pre_tokenizers.ByteLevel.alphabet())


def content(tokenizer: PreTrainedTokenizerFast) -> dict:
    return json.loads(tokenizer.backend_tokenizer.to_str())


def trained_on_lines(lines: list[str], vocab_size: int) -> dict:
    """The library's own way, of whole lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|pad|>", "<|begin|>", *OPEN, *CLOSE],
        initial_alphabet=sorted(ALPHABET),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return json.loads(tokenizer.to_str())["model"]


def test_with_ten_subjects_behind_all_words_it_is_training_on_lines() -> None:
    texts = ["".join(LINES)] * 10
    lines = list(dict.fromkeys("".join(LINES).splitlines(keepends=True))) * 10
    assert content(train_tokenizer(texts, 600))["model"] == trained_on_lines(lines, 600)


WORDS = st.lists(st.text("qxzj 7", min_size=1, max_size=9), max_size=4).map(" ".join)


@given(st.lists(WORDS, min_size=9, max_size=14), st.integers(1, 40))
@example([*[""] * 9, "qxz"], 12)
@settings(max_examples=60, deadline=None)
def test_every_token_lies_in_a_word_that_ten_texts_have(texts: list[str], times: int) -> None:
    """However many lines of the others have theirs."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    own_lines = ("".join(f"{t} {i}\n" for i in range(times)) for t in texts[1:])
    texts = [*texts[:1], *own_lines]
    words = [{w for line in t.splitlines(True) for w, _ in split(line)} for t in texts]
    model = content(train_tokenizer(texts, 500))["model"]
    special = {"<|pad|>", "<|begin|>", *OPEN, *CLOSE}
    for token in set(model["vocab"]) - special - ALPHABET:
        assert any(sum(w in own for own in words) >= 10 for w in set().union(*words) if token in w)
    assert all("".join(pair) in model["vocab"] for pair in model["merges"])


def test_the_order_of_texts_makes_no_difference() -> None:
    texts = [f"{line}glucose {i % 3}\n" for i, line in enumerate(LINES * 4)]
    assert content(train_tokenizer(texts, 600)) == content(train_tokenizer(texts[::-1], 600))


def test_texts_are_read_until_their_lines_have_so_many_characters() -> None:
    texts = ["ab\n" * 100, "cd\n", "ef\n"]
    assert list(first_texts(iter(texts), 5)) == texts[:2]  # what repeats is read once
    assert list(first_texts(iter(texts), 100)) == texts


def test_at_most_so_many_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_meds(tmp_path / "meds", {"train": subject_rows(1)})
    for i in range(1, 9):
        write_table(data / "data" / "train" / f"{i}.parquet", subject_rows(100 + i))
    dataset = MedsDataset.open(data)
    assert len(files_to_fit(dataset)) == 9
    monkeypatch.setattr(bucket, "FILES", 4)
    files = files_to_fit(dataset)
    assert [f.name for f in files] == [f"{i}.parquet" for i in (0, 2, 4, 6)]
    assert bucket.sampled_subjects(dataset).tolist() == [1, 102, 104, 106]
    dataset.splits["train"].reverse()  # the names decide
    opened = []
    honest = MedsDataset.file_batches

    def spy(self: MedsDataset, file: Path, *args: object, **options: object) -> object:
        opened.append(file)
        return honest(self, file, *args, **options)

    monkeypatch.setattr(MedsDataset, "file_batches", spy)
    assert len(list(training_texts(dataset, serializer_of(our_bpe())))) == 4
    assert opened == files


def whole_words(*, lower: bool = False, spaces: bool = True) -> PreTrainedTokenizerFast:
    """A SentencePiece-like model of single letters, which a normalizer may change."""
    letters = list(string.ascii_letters + string.digits + string.punctuation + "\n")
    pieces = [("<unk>", 0.0), ("\u2581", -2.0), *((c, -5.0) for c in letters)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    steps = [normalizers.NFKC(), *([normalizers.Lowercase()] if lower else [])]
    steps += [] if spaces else [normalizers.Replace("\n", " ")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_a_tokenizer_without_some_letters_or_newlines_is_taken() -> None:
    TextEncoder(whole_words())
    TextEncoder(whole_words(spaces=False))


def test_a_tokenizer_that_does_not_give_back_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gave back other words\. Its tokenizer\.json must be"):
        TextEncoder(whole_words(lower=True))
    empty = Tokenizer(models.BPE())
    empty.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=empty).save_pretrained(tmp_path / "model")
    data = write_meds(tmp_path / "meds")
    for form in ("text", "codes"):
        settings = DataSettings(path=str(data), format=form, bucket="day", workers=1)
        with pytest.raises(ValueError, match=r"model\.path.*gave back nothing.*tokenizer\.json"):
            prepare(settings, tmp_path / form, str(tmp_path / "model"), ("train",))
        assert not (tmp_path / form).exists()


def test_the_lines_that_must_come_back_are_those_of_the_probes(tmp_path: Path) -> None:
    for name in ("gpt2", "qwen", "llama3", "sentencepiece", "sentencepiece-prefixed"):
        tokenizer, _ = family_tokenizer(name, tmp_path / name, "text")
        tokens.refuse_lossy(load_tokenizer(str(tmp_path / name), "text")[0])
        tokens.refuse_lossy(tokenizer)


OURS = TextEncoder(our_bpe(), "text")
NOTES = st.lists(st.text("ab1,.<|['\u00fc", min_size=1, max_size=9), min_size=8, max_size=14)


@given(st.lists(NOTES.map(" ".join), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_a_note_has_the_ids_of_its_whole_text(notes: list[str]) -> None:
    encoder = OURS
    assert encoder._wordwise
    plain = encoder._plain
    for note in (f" {n},\n" for n in notes):
        expected = plain.encode(note, add_special_tokens=False).ids
        assert encoder.encode([note])[0].tolist() == expected
