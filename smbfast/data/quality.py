"""Counts what may be odd about events, a batch of whole subjects at a time.

The formats count what they leave out (births after a first event, values that are not finite). This
file counts what they keep and a user should know of. All counts add up over batches, since a
duplicate is one within its subject, and a batch holds whole subjects.

Legend: N events, C codes of a batch, K events that share their moment and code.
"""

from collections import Counter

import numpy as np

from smbfast.data.meds import BIRTH, STATIC, EventBatch, MedsDataset

FIRST_YEAR, LAST_YEAR = 1900, 2300  # of dates: de-identified ones reach 2200; our choice
EVENTS_READ = "events_read"
_FIRST, _END = (
    int(np.datetime64(f"{year}-01-01", "us").astype(np.int64))
    for year in (FIRST_YEAR, LAST_YEAR + 1)
)


def count_quality(batch: EventBatch, dataset: MedsDataset) -> Counter[str]:
    """Count events of a batch; every key is always there.

    - `events_read`: all events, births included.
    - `numbers`: events with a finite number. `valued`: those, and events with a text value.
    - `duplicates`: events that repeat an earlier one of their subject in time, code, number and
      text, of which as much is compared as was read.
    - `described`: events whose code has a description, and births, which need none.
    - `empty_codes`: events whose code is empty or nothing but spaces.
    - `odd_years`: events with a date before `FIRST_YEAR` or after `LAST_YEAR`.
    - `subjects_read`: subjects.
    """
    described_C = np.array([c == BIRTH or c in dataset.descriptions for c in batch.codes], bool)
    empty_C = np.array([not c.strip() for c in batch.codes], bool)
    num_C = np.bincount(batch.code_N, minlength=len(batch.codes))
    time_N, number_N = batch.time_N, ~np.isnan(batch.value_N)
    odd_N = ((time_N < _FIRST) & (time_N != STATIC)) | (time_N >= _END)
    return Counter(
        {
            EVENTS_READ: len(time_N),
            "subjects_read": len(batch.offset_S1) - 1,
            "numbers": int(np.count_nonzero(number_N)),
            "valued": int(np.count_nonzero(number_N | (batch.text_N >= 0))),
            "duplicates": _num_duplicates(batch),
            "described": int(num_C[described_C].sum()),
            "empty_codes": int(num_C[empty_C].sum()),
            "odd_years": int(np.count_nonzero(odd_N)),
        }
    )


def _num_duplicates(batch: EventBatch) -> int:
    """Return how many events repeat an earlier one of their subject.

    Events of a subject are sorted by time, so equal ones lie in one moment. Moment and code are one
    exact integer, and so are the bits of the number and the text: two are compared, not hashes.
    """
    num_events = len(batch.time_N)
    if num_events < 2:
        return 0
    new_N = np.ones(num_events, bool)
    np.not_equal(batch.time_N[1:], batch.time_N[:-1], out=new_N[1:])
    begin_S = batch.offset_S1[:-1]
    new_N[begin_S[begin_S < num_events]] = True
    key_N = np.cumsum(new_N) * len(batch.codes) + batch.code_N
    order_N = np.argsort(key_N, kind="stable")  # nearly in order already, which this sort uses
    key_N = key_N[order_N]
    same_N = np.zeros(num_events + 1, bool)  # whether an event has the key of the one before it
    np.equal(key_N[1:], key_N[:-1], out=same_N[1:-1])
    tied_K = np.flatnonzero(same_N[1:] | same_N[:-1])
    if not len(tied_K):
        return 0
    row_K, key_K = order_N[tied_K], key_N[tied_K]
    # 0 and -0 are the same number, and so are all values that are none
    value_K = np.where(np.isnan(batch.value_N[row_K]), np.nan, batch.value_N[row_K] + 0)
    bits_K = value_K.astype(np.float32).view(np.uint32).astype(np.uint64)
    rest_K = (bits_K << np.uint64(32)) | (batch.text_N[row_K] + 1).astype(np.uint64)
    order_K = np.lexsort((rest_K, key_K))
    key_K, rest_K = key_K[order_K], rest_K[order_K]
    return int(np.count_nonzero((key_K[1:] == key_K[:-1]) & (rest_K[1:] == rest_K[:-1])))
