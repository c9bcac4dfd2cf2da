"""The classes of codes to come: what ten training subjects have, and nothing else."""

import json
from pathlib import Path

import numpy as np
import pytest

from smbfast.batch import UNKNOWN
from smbfast.data.code_classes import CodeClasses, SubjectCounts
from smbfast.data.prepared import CLASSES, Prepared
from smbfast.data.preparing import prepare
from smbfast.data.shards import Shard, ShardWriter
from smbfast.settings import DataSettings, ObjectiveSettings
from tests.factory import SPLITS, Row, at, split_rows, write_meds

NINE, TEN = "LAB//of nine", "LAB//of ten"
OBJECTIVE = ObjectiveSettings()


def rows_of(split: str) -> list[Row]:
    """Two days of the usual rows; in train a code of nine and one of ten subjects, and deaths."""
    rows = split_rows(split, 2)
    for subject in SPLITS[split]:
        own = [(subject, at(2), TEN, None, None)] if split != "train" or subject <= 10 else []
        own += [(subject, at(2), NINE, None, None)] * 3 if split != "train" or subject <= 9 else []
        own += [(subject, at(40), "MEDS_DEATH", None, None)] if subject % 2 else []
        last = max(i for i, row in enumerate(rows) if row[0] == subject)
        rows[last + 1 : last + 1] = own
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_meds(tmp_path_factory.mktemp("meds"), {split: rows_of(split) for split in SPLITS})


def prepared(data: Path, out: Path, form: str, **options: object) -> Prepared:
    made = DataSettings(path=str(data), format=form, vocab_size=400, workers=1, **options)
    return prepare(made, out, None, ("train", "tuning"))


@pytest.fixture(scope="module")
def codes(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepared(data, tmp_path_factory.mktemp("codes") / "p", "codes")


@pytest.fixture(scope="module")
def text(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepared(data, tmp_path_factory.mktemp("text") / "p", "text", bucket="day")


def test_classes_are_in_the_order_of_their_subjects_and_of_names() -> None:
    names, subjects_K = ["e", "d", "few", "b", "a"], np.array([10, 12, 9, 12, 30])
    ids = np.array([50, 40, 30, 20, 10])
    chosen = CodeClasses.of_counts(names, subjects_K, 9, ids)
    assert chosen.names == ("a", "b", "d", "e")
    of_lines = chosen.of_lines([], np.array([40, 10, 30, 51, 50, -1, 0], np.int32))
    assert of_lines.tolist() == [2, 0, -1, -1, 3, -1, -1] and of_lines.dtype == np.int32
    fewer = CodeClasses.of_counts(names, subjects_K, 2, ids)
    assert fewer.names == ("a", "b") and fewer.digest != chosen.digest
    assert CodeClasses.of_counts(names, subjects_K, 9, ids + 1).digest != chosen.digest
    none = CodeClasses.of_counts(["few"], np.array([9]), 9)
    assert none.num_classes == 0 and none.of_lines([], np.array([0])).tolist() == [-1]


def test_a_subject_counts_once_for_each_code() -> None:
    random = np.random.default_rng(0)
    codes = [random.integers(0, 9, n, np.int32) * 70_000 for n in (0, 5, 30, 1, 8)]
    counts = SubjectCounts()
    for part in (codes[:2], [], codes[2:]):
        counts.add(part)
    sets = [set(c.tolist()) for c in codes]
    expected = {c: sum(c in own for own in sets) for c in set().union(*sets)}
    assert dict(counts.result().tolist()) == expected
    assert SubjectCounts().result().shape == (0, 2)


def test_text_finds_a_class_by_the_list_of_each_shard(tmp_path: Path) -> None:
    lists = [["a", "b"], ["c", "b", "a"], []]
    for i, names in enumerate(lists):
        with ShardWriter(tmp_path / f"{i}") as writer:
            writer.add_codes(names)
            writer.add_subjects(np.array([[k, 6 + k] for k in range(len(names))]).reshape(-1, 2))
    shards = [Shard(tmp_path / f"{i}") for i in range(3)]
    classes = CodeClasses.of_shards(shards, None, 9)
    assert classes.names == ("a", "b")  # 14 subjects each; c has six
    got = [classes.of_lines(shard, np.arange(3)).tolist() for shard in shards]
    assert got == [[0, 1, -1], [-1, 1, 0], [-1, -1, -1]]


@pytest.mark.parametrize("form", ["codes", "text"])
def test_prepared_classes_are_of_ten_training_subjects(
    form: str, request: pytest.FixtureRequest
) -> None:
    made = request.getfixturevalue(form)
    classes = made.classes()
    kinds = {t.name: t.kind for t in made.encoding.tokens} if form == "codes" else {}
    assert TEN in classes.names and not any(NINE in name for name in classes.names)
    assert len(set(classes.names)) == classes.num_classes
    assert not {"gap", "age", "section", "structure"} & {kinds.get(n) for n in classes.names}
    # all twelve have these; a static code is no event to come
    assert "DIAGNOSIS//I10" in classes.names[:-1] and classes.names[-1] == TEN
    assert "GENDER//F" not in classes.names
    file = made.folder / CLASSES
    assert file.stat().st_mode & 0o777 == 0o600
    assert NINE not in file.read_text() and NINE not in (made.folder / "prepare.json").read_text()
    for split in SPLITS:
        for shard in made.shards(split):
            for t in shard:
                names = [classes.names[k] for k in classes.of_lines(shard, t.line_code_L) if k >= 0]
                assert names.count("DIAGNOSIS//I10") == 2
                dies = t.subject % 2
                # subject 12 has neither of the two codes of the third day
                end = at(40) if dies else at(1, 20) if t.subject == 12 else at(2)
                last = int(end.astype(np.int64))
                assert (t.last, t.terminal) == (last, last if dies else UNKNOWN)


def test_the_number_of_classes_is_limited_and_part_of_the_shards(
    data: Path, text: Prepared, tmp_path: Path
) -> None:
    fewer = prepared(data, tmp_path / "p", "text", bucket="day", max_codes=2)
    assert fewer.classes().names == text.classes().names[:2]
    with pytest.raises(ValueError, match=r"\(max_codes differ\)"):
        prepared(data, tmp_path / "p", "text", bucket="day", max_codes=3)
    with pytest.raises(ValueError, match=r"\(options differ\)"):
        prepared(data, tmp_path / "p", "text", bucket="day", max_codes=2, terminal=[])
    file = fewer.folder / CLASSES
    file.write_text(json.dumps({"names": ["DIAGNOSIS//I10", "LAB//secret"], "ids": None}))
    with pytest.raises(ValueError, match="must hold the classes that belong") as raised:
        fewer.classes()
    assert "secret" not in str(raised.value)


def test_horizons_of_auto_are_the_longest_that_records_cover(codes: Prepared) -> None:
    horizons = codes.horizons(OBJECTIVE)
    # the half that dies is followed up for ever; the other half at least for six hours at a time
    assert horizons.names == ("30d", "180d", "365d", "1095d") and horizons.bucket == 0
    none, *deaths = horizons.shares.num_deaths  # the deaths are 38 days after the event before
    assert none == 0 and min(deaths) > 10
    assert horizons.shares.num_deaths_usable == horizons.shares.num_deaths
    known, dying = horizons.text.split("; with a death inside ")
    assert dying == "-, 100.0%, 100.0%, 100.0%"
    assert ", 1095d " in known and known.endswith(" of positions known")
    windows = codes.windows("train", 128, OBJECTIVE, None, horizons, codes.classes())
    assert windows.num_with_pair and not windows.place_W5.flags.owndata  # a map
    assert codes.windows("train", 128, OBJECTIVE).num_with_pair == 0


def test_horizons_in_text_are_no_shorter_than_a_bucket(text: Prepared) -> None:
    assert text.horizons(OBJECTIVE).bucket == 86_400_000_000
    named = text.horizons(ObjectiveSettings(horizons=["1d", "2d"]))
    assert named.names == ("1d", "2d") and named.shares.num_positions > 0
    with pytest.raises(ValueError, match=r"not be shorter than data\.bucket, which is day"):
        text.horizons(ObjectiveSettings(horizons=["6h", "2d"]))


def test_records_that_cover_no_horizon_are_refused(tmp_path: Path) -> None:
    folder = write_meds(tmp_path / "meds", {"train": split_rows("train", 1)})
    made = prepared(folder, tmp_path / "p", "text", bucket="day")
    with pytest.raises(ValueError, match="needs a horizon of which at least 20%"):
        made.horizons(OBJECTIVE)
