"""The counting baseline: what a node may see, and that nothing later reaches it."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from smbfast.data.labels import read_labels
from smbfast.data.meds import STATIC, EventBatch, MedsDataset
from smbfast.probing import counts

DAY = 86_400_000_000
YEAR = 365.25 * DAY
SHARED = Path(__file__).parents[3] / "shared" / "data" / "mimic-iv-demo"


@dataclass(frozen=True)
class Events:
    """A dataset held in memory; each split is a list of batches of (subject, time, code), and of a
    value where there is one."""

    splits: dict[str, list[list[tuple]]]
    path: Path = Path("memory")

    def batches(self, split: str, subjects: np.ndarray | None = None, text_chars: int = 0):
        for rows in self.splits.get(split, []):
            rows = [row for row in rows if row[0] in subjects]
            if rows:
                yield batch(rows)


def batch(rows: list[tuple]) -> EventBatch:
    rows = sorted(rows, key=lambda row: row[:2])
    subject_N = np.array([row[0] for row in rows])
    codes = sorted({row[2] for row in rows})
    none_N = np.full(len(rows), -1, np.int32)
    return EventBatch(
        subject_N,
        np.array([row[1] for row in rows]),
        np.array([codes.index(row[2]) for row in rows], np.int32),
        np.array([row[3] if len(row) > 3 else np.nan for row in rows], np.float32),
        none_N,
        codes,
        [],
        np.concatenate([[0], np.flatnonzero(np.diff(subject_N)) + 1, [len(rows)]]),
    )


TRAIN = [
    (1, STATIC, "GENDER//F"),
    (1, -30 * 365 * DAY, "MEDS_BIRTH"),
    (1, 1 * DAY, "A"),
    (1, 1 * DAY, "A"),
    (1, 2 * DAY, "B"),
    (1, 3 * DAY, "A"),
    (2, STATIC, "GENDER//M"),
    (2, 1 * DAY, "B"),
]
HELD_OUT = [(8, 1 * DAY, "A"), (8, 1 * DAY, "ONLY_HERE"), (8, 5 * DAY, "B")]
NODES = (np.array([1, 1, 2, 8, 1]), np.array([2 * DAY, 3 * DAY - 1, 0, 2 * DAY, 2 * DAY]))
TRAIN_N = np.array([True, True, True, False, True])


def dataset(train: list = TRAIN, held_out: list = HELD_OUT) -> Events:
    first = [row for row in train if row[0] == 1]
    rest = [row for row in train if row[0] != 1]
    return Events({"train": [first, rest], "held_out": [held_out]})


def features(data: Events) -> np.ndarray:
    return counts.count_codes(data, *NODES).features(*NODES, TRAIN_N).toarray()


@pytest.mark.parametrize("rows", [1, 4_000_000])
def test_counts_by_hand(rows: int, monkeypatch) -> None:
    monkeypatch.setattr(counts, "_ROWS", rows)  # one event a piece, and all at once
    feature_NF = features(dataset())
    np.testing.assert_allclose(feature_NF[0, 0], (2 * DAY + 30 * 365 * DAY) / YEAR)
    assert feature_NF[:, 1].tolist() == [1, 1, 0, 0, 1]
    assert feature_NF[2, 0] == 0
    # the codes that train nodes see: GENDER//F, MEDS_BIRTH, A, B, GENDER//M
    count_NC = np.expm1(feature_NF[:, 2:])
    assert sorted(map(tuple, np.round(count_NC.T).astype(int).tolist())) == sorted(
        [(1, 1, 0, 0, 1), (1, 1, 0, 0, 1), (2, 2, 0, 1, 2), (1, 1, 0, 0, 1), (0, 0, 1, 0, 0)]
    )


def test_no_event_after_the_prediction_time_is_seen() -> None:
    before = features(dataset())
    later = [*TRAIN, (1, 3 * DAY, "NEW"), (2, 1, "MEDS_BIRTH"), (2, 1, "A")]
    later = [row for row in later if row[:2] != (2, 1 * DAY)]
    held_out = [HELD_OUT[0], HELD_OUT[1], (8, 2 * DAY + 1, "MEDS_BIRTH")]
    np.testing.assert_array_equal(before, features(dataset(later, held_out)))


def test_an_event_at_the_prediction_time_is_seen() -> None:
    before = features(dataset())
    after = features(dataset(held_out=[*HELD_OUT, (8, 2 * DAY, "B")]))
    assert not np.array_equal(before[3], after[3])
    np.testing.assert_array_equal(np.delete(before, 3, 0), np.delete(after, 3, 0))


def test_columns_are_chosen_on_train_alone() -> None:
    counted = counts.count_codes(dataset(), *NODES)
    assert counted.features(*NODES, TRAIN_N).shape == (5, 2 + 5)
    assert counted.features(*NODES, ~TRAIN_N).shape == (5, 2 + 2)


def test_an_unknown_subject_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"memory.*<=10 are not in it"):
        counts.count_codes(dataset(), np.array([1, 555]), np.array([DAY, DAY]))
    unknown_K = np.arange(555, 567)
    with pytest.raises(ValueError, match=r"; all but <=10 are not in it"):
        counts.count_codes(dataset(), np.append(unknown_K, 1), np.full(13, DAY))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real records lie outside the repository")
def test_real_nodes_are_counted_as_a_plain_loop_counts_them() -> None:
    data = MedsDataset.open(SHARED)
    labels = read_labels(SHARED / "labels" / "in_hospital_mortality")
    labels = labels.take(labels.split_N == "held_out")
    counted = counts.count_codes(data, labels.subject_N, labels.time_N)
    total_K = np.zeros(len(counted.subject_K))
    for part in data.batches("held_out"):
        for at, (subject, time) in enumerate(zip(counted.subject_K, counted.time_K, strict=True)):
            total_K[at] += np.sum((part.subject_N == subject) & (part.time_N <= time))
    np.testing.assert_array_equal(np.asarray(counted.count_KC.sum(1)).ravel(), total_K)
    assert np.isfinite(counted.age_K).all() and (counted.age_K > 17).all()


def test_row_order_of_labels_does_not_matter() -> None:
    counted = counts.count_codes(dataset(), NODES[0][::-1], NODES[1][::-1])
    assert counted.subject_K.tolist() == [1, 1, 2, 8]
    other = replace(counted, age_K=counted.age_K.copy())
    np.testing.assert_array_equal(other.features(*NODES, TRAIN_N).toarray(), features(dataset()))
