"""Steps on real records: each has masked tokens in similar numbers; a token is a label once."""

from pathlib import Path

import numpy as np
import pytest

from smbfast.data.loader import make_step
from smbfast.data.preparing import prepare
from smbfast.data.windows import WindowSet
from smbfast.settings import DataSettings, ObjectiveSettings
from tests.data.event_tables import DATA

pytestmark = pytest.mark.slow

# format and bucket; a format that has no buckets of its own is here once
FORMATS = [("text-paper", "day"), ("text-paper", "hour"), ("codes", "day")]
STEPS = 150


@pytest.fixture(scope="module", params=["mimic-iv-demo", "eicu-demo"])
def dataset(request: pytest.FixtureRequest) -> Path:
    if not (DATA / request.param / "data").is_dir():
        pytest.skip(f"{request.param} is not here")
    return DATA / request.param


@pytest.mark.parametrize(("form", "bucket"), FORMATS)
def test_every_step_has_masked_tokens_in_similar_numbers(
    dataset: Path, form: str, bucket: str, tmp_path: Path
) -> None:
    """The coefficient of variation is below 0.3, where random windows of a batch have 0.4 and more.

    Labels of an epoch are the tokens of all timelines, without the first of each that no begin
    token precedes.
    """
    data = DataSettings(
        path=str(dataset), format=form, bucket=bucket, window=1024, vocab_size=2048, workers=1
    )
    prepared, objective = prepare(data, tmp_path, None, ("train",)), ObjectiveSettings()
    shards = prepared.shards("train")
    windows = WindowSet.of(shards, data.window, prepared.preamble, objective)
    num_tokens = sum(len(timeline) for shard in shards for timeline in shard)
    num_timelines = sum(len(shard) for shard in shards)
    first = num_timelines if prepared.preamble.begin is None else 0
    assert windows.num_lost == 0 and windows.num_labels == num_tokens - first
    for batch in (4, 8):
        steps = [
            make_step(windows, objective, s, batch=batch, tokens=100_000, seed=0, jepa=True)
            for s in range(STEPS)
        ]
        masked = np.array([step.num_masked for step in steps])
        assert masked.min() > 0
        assert masked.std() / masked.mean() < 0.3
