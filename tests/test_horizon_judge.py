"""Horizon JEPA and codes to come, against the judge of `tests.horizon_oracle`."""

import numpy as np
import pytest

from smbfast.batch import UNKNOWN
from smbfast.data.horizons import Horizons, usable
from tests.horizon_records import RECORDS, SPANS, TEXT

NAMES = ("3d", "30d", "180d", "365d")


@pytest.mark.parametrize("censored", ["drop", "none"])
@pytest.mark.parametrize("name", [*RECORDS, *TEXT])
def test_pairs_are_usable_where_what_comes_is_known(name, censored):
    record = {**RECORDS, **TEXT}[name]
    horizons = Horizons(NAMES, record.length, censored)
    assert horizons.spans_H.tolist() == list(SPANS)
    time_B = np.array([bucket.time for bucket in record.buckets])
    terminal = UNKNOWN if record.terminal is None else record.terminal
    expected = [
        [record.is_usable(number, span, censored) for span in SPANS]
        for number in range(len(record.buckets))
    ]
    assert usable(time_B, record.last, terminal, horizons).tolist() == expected
