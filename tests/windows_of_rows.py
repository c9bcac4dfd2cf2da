"""Windows whose tokens are mostly new ones, of a vocabulary that has grown by two thousand."""

from dataclasses import replace

import numpy as np

from smbfast.batch import PackedBatch, Timeline
from smbfast.data.loader import make_batch
from smbfast.settings import ObjectiveSettings
from tests.tiny import VOCABULARY, random_window

NUM_ROWS = 2000
NEW_ROWS = range(VOCABULARY, VOCABULARY + NUM_ROWS)


def window_of_rows(seed: int, **more: int) -> Timeline:
    """A random window in whose lines each token is a new one; headers and tags are as they were."""
    window = random_window(seed, **more)
    random, ids_T = np.random.default_rng(seed), window.ids_T.copy()
    for start, end in zip(window.line_start_L, window.line_end_L, strict=True):
        ids_T[start:end] = random.integers(NEW_ROWS.start, NEW_ROWS.stop, end - start)
    return replace(window, ids_T=ids_T)


def batch_of_rows(seed: int) -> PackedBatch:
    """Two such windows with their branches."""
    windows = [window_of_rows(2 * seed + i, buckets=5) for i in (0, 1)]
    return make_batch(windows, ObjectiveSettings(min_future=4, cuts=2), 0, 0, jepa=True)
