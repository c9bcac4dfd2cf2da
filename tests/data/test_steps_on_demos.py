"""Steps on real records: each has masked tokens in similar numbers; a token is a label once."""

from pathlib import Path

import numpy as np
import pytest

from smbfast.data.loader import make_step
from smbfast.data.preparing import prepare
from smbfast.settings import DataSettings, ObjectiveSettings
from tests.data.event_tables import DATA

pytestmark = pytest.mark.slow

# in text by what data.bucket=auto chooses; eICU's would take a minute
FORMATS = [("mimic-iv-demo", "codes"), ("eicu-demo", "codes"), ("mimic-iv-demo", "text")]
STEPS = 150


@pytest.mark.parametrize(("name", "form"), FORMATS)
def test_every_step_has_masked_tokens_in_similar_numbers(
    name: str, form: str, tmp_path: Path
) -> None:
    """The coefficient of variation is below 0.3, where random windows of a batch have 0.4 and more.

    98 % of the windows of codes that are long enough for a context and a future of 16 tokens have a
    cut, and 90 % of the tokens of text lie in windows with one.

    Labels of an epoch are the tokens of all timelines, without the first of each that no begin
    token precedes.
    """
    if not (DATA / name / "data").is_dir():
        pytest.skip(f"{name} is not here")
    about = {"format": form, "bucket": "hour", "window": 1024, "vocab_size": 2048, "workers": 1}
    data = DataSettings(path=str(DATA / name), **about)
    prepared, objective = prepare(data, tmp_path, None, ("train",)), ObjectiveSettings()
    shards = prepared.shards("train")
    windows = prepared.windows("train", data.window, objective)
    num_tokens = sum(len(timeline) for shard in shards for timeline in shard)
    num_timelines = sum(len(shard) for shard in shards)
    first = num_timelines if prepared.preamble.begin is None else 0
    assert windows.num_lost == 0 and windows.num_labels == num_tokens - first
    if form == "codes":
        assert windows.has_cut_W[windows.length_W >= 22].mean() > 0.98
    else:
        assert windows.num_tokens_with_cut > 0.9 * windows.num_tokens
    for batch in (4, 8):
        steps = [
            make_step(windows, objective, s, batch=batch, tokens=100_000, seed=0, jepa=True)
            for s in range(STEPS)
        ]
        masked = np.array([step.num_masked for step in steps])
        assert masked.min() > 0
        assert masked.std() / masked.mean() < 0.3
