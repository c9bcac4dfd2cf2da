"""What once broke a reader: cases that fuzzing has found are refused in words, or read."""

import pytest

from tests.reliability import fuzzing
from tests.reliability.rows.fuzz import SHARES, reader_of


@pytest.mark.parametrize("name", SHARES)
def test_what_once_broke_a_reader_is_refused(name: str, tmp_path) -> None:
    stored = {pair: case for pair, case in fuzzing.corpus(name).items() if pair.startswith("was ")}
    reader = reader_of(name, tmp_path) if stored else None
    for pair, case in stored.items():
        _, problem, _ = fuzzing.tried(reader, case)
        assert not problem, (pair, problem)
