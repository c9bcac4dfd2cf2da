"""What a refusal must look like: one clear error, no cell of the data in it, nothing half-written.

Datasets of these tests carry canaries in their cells; no message may hold one.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

CANARY = "Zebrafinch"  # in codes, texts and descriptions
CANARY_SUBJECT = 987_654_321
CANARY_VALUE = 31337.125
_SHOWN = re.compile(rf"{CANARY}|{CANARY_SUBJECT}|31337|Traceback|Error\(", re.IGNORECASE)


def no_canary(text: str) -> None:
    """Fails if `text` shows a cell."""
    found = _SHOWN.search(text)
    assert found is None, f"a cell or a traceback is shown: {text}"


def refused(call: Callable[[], object], *words: object) -> str:
    """Call, expect a plain ValueError or SystemExit whose message holds all `words`."""
    with pytest.raises((ValueError, SystemExit)) as caught:
        call()
    error = caught.value
    # a subclass is some library's own error (JSONDecodeError, UnicodeDecodeError, pyarrow's)
    assert type(error) in (ValueError, SystemExit), repr(error)
    assert error.__cause__ is None, "the error of a library is shown as the cause"
    assert error.__suppress_context__ or error.__context__ is None, "re-raise it `from None`"
    message = str(error)
    for word in words:
        assert str(word) in message, message
    no_canary(message)
    return message


def nothing_half_written(folder: Path) -> None:
    """No temporary file or folder, and no folder that looks like finished work."""
    left = [p.name for p in folder.rglob("*")] if folder.is_dir() else []
    assert not [n for n in left if n.endswith((".tmp", ".old", ".trash"))], left
    assert "prepare.json" not in left
