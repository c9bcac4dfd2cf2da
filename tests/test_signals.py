"""A phase that trains nothing is warned of, by its cause; one that does is not."""

import pytest

from smbfast.reporting.signals import Alarm, Watch

BOTH = {"sft": 1.0, "jepa": 1.0}


def heard(steps: int, *, masked: int = 3, norm: float = 1.0, sft: float = 6.0) -> list[Alarm]:
    """What is said of a phase whose loss begins at 6 and then is `sft`, with a line for a step."""
    watch, said = Watch(), []
    for step in range(1, steps + 1):
        watch.count("hybrid", labels=9, masked=masked, pairs=0)
        watch.count_gradients(zero=int(norm == 0), skipped=0)
        loss = 6.0 if step <= 2 else sft
        record = {"phase": "hybrid", "step": step, "counts": dict(watch.counts), "sft": loss}
        said += watch.line(record, BOTH)
    return said


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"masked": 0}, "8 of its 8 steps so far had no masked token"),
        ({"norm": 0.0}, "the gradient of 8 of its 8 steps so far was exactly 0"),
        ({"sft": 2_000_000.0}, "sft is 2e+06, 333333.3 times of what it was"),
    ],
    ids=["no mask", "gradient 0", "loss far above its start"],
)
def test_a_phase_that_trains_nothing_is_warned_of(how: dict, words: str) -> None:
    alarms = heard(8, **how)
    assert len({alarm.cause for alarm in alarms}) == len(alarms) == 1
    assert alarms[0].level == "bad" and alarms[0].step < 50
    first, last = words.replace("8", "1"), words
    assert first in alarms[0].text or last in alarms[0].text
    assert not heard(8)


def test_a_phase_without_any_signal_says_why() -> None:
    watch = Watch()
    assert watch.without_signal() is None
    for _ in range(3):
        watch.count("jepa", labels=0, masked=0, pairs=0)
    assert "3 had no label, no mask and no pair" in str(watch.without_signal())
    watch.count("jepa", labels=0, masked=1, pairs=0)
    assert watch.without_signal() is None
    watch.count("sft", labels=9, masked=0, pairs=0)
    watch.count_gradients(zero=1, skipped=0)
    assert "the gradient of 1 was exactly 0" in str(watch.without_signal())
