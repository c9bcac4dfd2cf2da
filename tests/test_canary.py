"""Strings of letters planted in one patient are in no file but the private shards."""

from pathlib import Path

import pytest

from smbfast.data import tokens
from tests import canary


@pytest.mark.parametrize("form", ["codes", "text"])
def test_prepare_shows_nothing_of_one_patient(tmp_path: Path, form: str) -> None:
    data = canary.plant(tmp_path / "data")
    assert len(canary.leaks(tmp_path)) >= 2  # they are seen where they are: events and codes
    command, words = next(canary.commands(data, tmp_path / "out", form))
    assert not canary.shown(canary.said(command, [*words, "--bucket=day"]))
    assert not canary.leaks(tmp_path / "out")


def test_a_tokenizer_that_counts_words_instead_of_people_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = canary.plant(tmp_path / "data")
    monkeypatch.setattr(tokens, "MIN_SUBJECTS", 1)
    command, words = next(canary.commands(data, tmp_path / "out", "text"))
    canary.said(command, [*words, "--bucket=day", "--vocab_size=4000"])
    assert "prepared/tokenizer/tokenizer.json" in dict(canary.leaks(tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.usefixtures("few_trees")
@pytest.mark.parametrize("form", ["codes", "text"])
def test_no_command_shows_anything_of_one_patient(tmp_path: Path, form: str) -> None:
    data = canary.plant(tmp_path / "data", 400)  # labels of both classes
    for command, words in canary.commands(data, tmp_path / "out", form):
        assert not canary.shown(canary.said(command, words)), command
    assert not canary.leaks(tmp_path / "out")
