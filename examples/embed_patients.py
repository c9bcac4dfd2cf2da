"""Embed patients from Python: one at a time as a service would, and a whole MEDS folder at once.

    python examples/embed_patients.py runs/default/final MEDS_FOLDER now.parquet

It prints what one patient costs, and writes an embedding of every patient at their last event.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

import smbfast


def one_patient(model: smbfast.Embedder, meds: Path) -> None:
    """Embed the first patient of the folder from a table in memory."""
    file = sorted(meds.glob("data/**/*.parquet"))[0]
    first = pq.read_table(file, columns=["subject_id"])["subject_id"][0].as_py()
    events = pq.read_table(file, filters=[("subject_id", "==", first)])
    model.embed(events)  # the first call lays out the vocabulary
    began = time.perf_counter()
    result = model.embed(events)  # at="last": all that is known of the patient
    took = time.perf_counter() - began
    [vector_D] = result.vector_KD  # float32
    print(f"one patient: {events.num_rows} events, {len(vector_D)} numbers in {1e3 * took:.0f} ms")
    # the same patient two years before, from what was known by then
    [now] = result.time_K
    try:
        before = model.embed(events, at=now - np.timedelta64(2 * 365, "D"))
        print(f"two years before: {before.counts['embedded']} embedding")
    except ValueError as error:
        print(f"two years before: {error}")


def main(folder: str, meds: str, out: str) -> None:
    """Load a model once, and use it twice."""
    os.umask(0o077)  # embeddings are of patients: what is written is for you alone
    model = smbfast.load(folder, codes=meds)  # what codes mean, for tables of events
    one_patient(model, Path(meds))
    everyone = model.embed(meds)
    pq.write_table(everyone.table, out)
    print(f"{out}: {len(everyone.subject_K)} patients x {everyone.vector_KD.shape[1]} numbers")


if __name__ == "__main__":
    main(*sys.argv[1:4])
