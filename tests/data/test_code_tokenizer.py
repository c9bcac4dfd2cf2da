"""Names of codes as a tokenizer of their own, and added to that of a backbone."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from smbfast.data.codes import CodeVocabulary
from smbfast.data.codes.tokenizer import code_tokenizer, with_codes
from smbfast.data.tokens import save_tokenizer
from tests.data.code_tables import fitted_on
from tests.data.event_tables import event, family_tokenizer

NAMES = (
    "LAB//a b",
    "DIAGNOSIS//x , y .",
    "Zoë 血糖",
    "café",
    "cafe\u0301",
    "K",
    " K",
    "a  b",
    "<K",
)


def vocabulary_of(*names: str, first_id: int = 0) -> CodeVocabulary:
    """Each name as a code, and a code with numbers and one with a text."""
    numbers = [event("2150-01-31", "LAB//n", n) for n in range(20)]
    text = event("2150-01-31", "LAB//t", None, "not done, n/a .")
    return fitted_on([*[event("2150-01-31", n) for n in names], *numbers, text], first_id)


def test_every_name_survives_a_folder(tmp_path: Path) -> None:
    vocabulary = vocabulary_of(*NAMES)
    names = [token.name for token in vocabulary.tokens]
    assert {"LAB//a b", "DIAGNOSIS//x , y .", "LAB//t = not done, n/a ."} <= set(names)
    save_tokenizer(code_tokenizer(vocabulary), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == len(names)
    assert [tokenizer.decode(i) for i in range(len(names))] == names
    assert tokenizer.convert_tokens_to_ids(names) == list(range(len(names)))
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id) == (vocabulary.pad, vocabulary.begin)


def test_a_text_that_is_no_name_is_not_encoded() -> None:
    tokenizer = code_tokenizer(vocabulary_of(*NAMES))
    assert tokenizer("LAB//a b")["input_ids"] == tokenizer.convert_tokens_to_ids(["LAB//a b"])
    with pytest.raises(Exception, match="Missing"):
        tokenizer("LAB//a")


def test_a_vocabulary_that_begins_later_has_no_tokenizer_of_its_own() -> None:
    with pytest.raises(ValueError, match="must begin at id 0, got 7"):
        code_tokenizer(vocabulary_of(first_id=7))


@pytest.mark.parametrize("family", ["qwen", "llama3", "gpt2", "sentencepiece"])
def test_tokens_are_added_to_a_backbone_s(family: str, tmp_path: Path) -> None:
    tokenizer, _ = family_tokenizer(family, tmp_path / "a", "text")
    size, text = len(tokenizer), "Glucose: 101, 5 mg"
    ids = tokenizer(text)["input_ids"]
    assert "K" in tokenizer.get_vocab() or family == "sentencepiece"
    vocabulary = vocabulary_of(*NAMES, "µg", "Glucose", first_id=size)
    added = with_codes(tokenizer, vocabulary)
    assert added == [f"⟦{token.name}⟧" for token in vocabulary.tokens]
    save_tokenizer(tokenizer, tmp_path / "b")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert len(loaded) == size + len(added)
    assert [loaded.decode(size + i) for i in range(len(added))] == added
    assert vocabulary.begin == loaded.convert_tokens_to_ids(added[1]) == size + 1
    assert loaded(text)["input_ids"] == ids


def test_a_backbone_may_know_names_of_the_alphabet(tmp_path: Path) -> None:
    tokenizer, _ = family_tokenizer("qwen", tmp_path, "text")
    known = ["<pad>", "<begin>", "<age 47>", "LAB//t"]
    tokenizer.add_tokens(known)
    ids = tokenizer.convert_tokens_to_ids(known)
    vocabulary = vocabulary_of(first_id=len(tokenizer))
    with_codes(tokenizer, vocabulary)
    assert len(tokenizer) == vocabulary.first_id + len(vocabulary)
    assert tokenizer.convert_tokens_to_ids(known) == ids
    assert tokenizer.decode(vocabulary.pad) == "⟦<pad>⟧"


def test_names_that_a_backbone_knows_are_refused(tmp_path: Path) -> None:
    tokenizer, _ = family_tokenizer("qwen", tmp_path, "text")
    tokenizer.add_tokens(["⟦K⟧"])
    vocabulary = vocabulary_of("K", first_id=len(tokenizer))
    with pytest.raises(ValueError, match=r"must know no name .* it knows 1,") as refusal:
        with_codes(tokenizer, vocabulary)
    assert "K" not in str(refusal.value).split()
    assert len(tokenizer) == vocabulary.first_id


def test_another_first_id_is_refused(tmp_path: Path) -> None:
    tokenizer, _ = family_tokenizer("qwen", tmp_path, "text")
    with pytest.raises(ValueError, match="`first_id` of the vocabulary must be"):
        with_codes(tokenizer, vocabulary_of())
