"""docs/your-data.md and its FHIR example: what they write is read as it was meant."""

import gzip
import json
import re
from datetime import datetime
from pathlib import Path
from runpy import run_path

import pyarrow.parquet as pq
import pytest

from smbfast.data.meds import MedsDataset

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = run_path(str(ROOT / "examples" / "fhir_to_meds.py"))
LOINC = {"coding": [{"system": "http://loinc.org", "code": "2160-0", "display": "Creatinine"}]}
ANN = {"reference": "https://host/fhir/Patient/ann"}
PATIENTS = [
    {"resourceType": "Patient", "id": "ann", "gender": "female", "birthDate": "1950-06"},
    {"resourceType": "Patient", "id": "bob", "birthDate": "1950", "deceasedDateTime": "2020-01-02"},
]
REST = [
    {
        "resourceType": "Observation",
        "subject": ANN,
        "code": LOINC,
        "issued": "2019-03-04T10:00:00.5-05:00",  # not when the blood was drawn
        "effectiveDateTime": "2019-03-04T08:00:00-05:00",
        "valueQuantity": {"value": 1.5, "unit": "mg/dL"},
    },
    {
        "resourceType": "Encounter",
        "subject": ANN,
        "class": {"system": "http://terminology.hl7.org/CodeSystem/v3-ActCode", "code": "IMP"},
        "period": {"start": "2019-03-04T07:00:00Z", "end": "2019-03-05T07:00:00Z"},
    },
    {
        "resourceType": "MedicationRequest",
        "subject": ANN,
        "medication": {"concept": {"coding": [{"system": "urn:ours", "code": "7"}]}},
        "authoredOn": "2019-03-04",
    },
    {"resourceType": "Condition", "subject": ANN, "code": LOINC},  # nobody says when it was known
    {"resourceType": "Organization", "id": "x"},
]


@pytest.fixture
def export(tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "Patient.ndjson").write_text("\n".join(map(json.dumps, PATIENTS)))
    with gzip.open(folder / "rest.000.ndjson.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, REST)))
    return folder


def test_events_stand_when_they_were_known(export, tmp_path):
    counts = EXAMPLE["convert"](export, tmp_path / "meds")
    assert counts == {"events": 8, "Condition without a time": 1, "resources of no patient": 1}
    dataset = MedsDataset.open(tmp_path / "meds", need_train=False)
    assert dataset.path == tmp_path / "meds"
    ids = pq.read_table(tmp_path / "meds" / "subject_ids.parquet").to_pydict()
    subject = dict(zip(ids["patient"], ids["subject_id"], strict=True))
    rows = [
        row
        for file in (tmp_path / "meds" / "data").glob("*.parquet")
        for row in pq.read_table(file).to_pylist()
    ]
    of = {name: [r for r in rows if r["subject_id"] == subject[name]] for name in subject}
    assert [(r["time"], r["code"], r["numeric_value"], r["text_value"]) for r in of["ann"]] == [
        (None, "GENDER//female", None, None),
        (datetime(1950, 6, 1), "MEDS_BIRTH", None, None),
        (datetime(2019, 3, 4, 7), "ENCOUNTER//IMP", None, None),
        (datetime(2019, 3, 4, 10, 0, 0, 500_000), "LOINC//2160-0", 1.5, "mg/dL"),
        (datetime(2019, 3, 4, 23, 59, 59), "urn:ours//7", None, None),  # a day alone
        (datetime(2019, 3, 5, 7), "ENCOUNTER_END", None, None),
    ]
    assert [r["code"] for r in of["bob"]] == ["MEDS_BIRTH", "MEDS_DEATH"]
    codes = pq.read_table(tmp_path / "meds" / "metadata" / "codes.parquet").to_pylist()
    assert codes == [{"code": "LOINC//2160-0", "description": "Creatinine"}]
    assert (tmp_path / "meds" / "subject_ids.parquet").stat().st_mode & 0o777 == 0o600


def observed(**more):
    """An observation of Ann's on 2 January 2020 at noon, but for `more`."""
    noon = "2020-01-02T12:00:00Z"
    return {
        "resourceType": "Observation",
        **{"subject": {"reference": "Patient/ann"}, "code": LOINC, "issued": noon},
        **{"valueQuantity": {"value": 1.5}, **more},
    }


def events_of(tmp_path, *resources):
    """What an export of these resources becomes: its counts and its rows."""
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "x.ndjson").write_text("\n".join(map(json.dumps, resources)))
    counts = EXAMPLE["convert"](tmp_path / "export", tmp_path / "meds")
    files = (tmp_path / "meds" / "data").glob("*.parquet")
    return counts, [row for file in files for row in pq.read_table(file).to_pylist()]


@pytest.mark.parametrize(
    ("text", "when"),
    [
        ("2019-12-31T24:00:00", datetime(2020, 1, 1)),
        ("2016-12-31T23:59:60Z", datetime(2017, 1, 1)),
        ("2020-01-02T10:00:00.123456789+14:00", datetime(2020, 1, 2, 10, 0, 0, 123_456)),
        ("2020-02", datetime(2020, 2, 29, 23, 59, 59)),
        ("2020", datetime(2020, 12, 31, 23, 59, 59)),
        ("2020-12-31", datetime(2020, 12, 31, 23, 59, 59)),
    ],
)
def test_no_event_stands_before_it_was_known(text, when):
    assert EXAMPLE["clock"](text, end=True) == when


def test_a_time_that_is_none_makes_no_event_that_was_always_known(tmp_path):
    odd = ["", "2020-01-02 10:00:00", "2020-02-30", "9999-99", "01/02/2020", 2020, ["2020"]]
    counts, rows = events_of(tmp_path, observed(), *(observed(issued=time) for time in odd))
    assert counts == {"events": 1, "Observation without a time": len(odd)}
    assert [row["time"] for row in rows] == [datetime(2020, 1, 2, 12)]


def test_what_is_not_as_fhir_has_it_is_counted_and_the_rest_is_read(tmp_path):
    odd = [
        *(observed(valueQuantity={"value": number}) for number in (10**400, 1e300, "<5", [1])),
        *(observed(code=code) for code in ("x", [LOINC], {"coding": ["x"]})),
        *(observed(component=parts) for parts in ([None], ["x"], {"code": LOINC})),
        observed(subject={"reference": 5}),
        observed(code={"coding": [{"code": "\ud800"}]}),
    ]
    counts, rows = events_of(tmp_path, observed(component=None), *odd)
    assert counts == {"events": 1, "Observation not as FHIR has it": len(odd)}
    assert len(rows) == 1


def test_versions_errors_and_references(tmp_path):
    request = {"resourceType": "MedicationRequest", "subject": ANN, "authoredOn": "2020-01-03"}
    medicine = {"resourceType": "Medication", "id": "m", "code": LOINC}
    counts, rows = events_of(
        tmp_path,
        observed(id="1", valueQuantity={"value": 9}, meta={"lastUpdated": "2020-02-01"}),
        observed(id="1", meta={"lastUpdated": "2020-01-01"}),
        observed(id="2", status="entered-in-error"),
        observed(id="3", subject={"reference": "Patient/ann/_history/2"}),
        {**request, "medicationReference": {"reference": "Medication/m"}},
        {**request, "medication": {"reference": {"reference": "#m"}}, "contained": [medicine]},
        {**request, "medicationReference": {"reference": "Medication/other"}},
        medicine,
    )
    assert counts == {
        "events": 4,
        "Observation in several versions": 1,
        "Observation entered in error": 1,
        "MedicationRequest without a code or value": 1,
        "resources of no patient": 1,
    }
    assert len({row["subject_id"] for row in rows}) == 1, "a version is no patient"
    assert [row["numeric_value"] for row in rows] == [9, 1.5, None, None]


def test_a_line_that_is_no_resource_is_named_and_nothing_is_written(tmp_path):
    (tmp_path / "export").mkdir()
    file = tmp_path / "export" / "x.ndjson"
    for line in ('{"resourceType": "Pat', "[1]", "null", "{}", "[" * 100_000):
        file.write_text(json.dumps(PATIENTS[0]) + "\n" + line)
        with pytest.raises(SystemExit, match=r"x.ndjson, line 2: must be one FHIR resource"):
            EXAMPLE["convert"](tmp_path / "export", tmp_path / "meds")
    assert not (tmp_path / "meds").exists()


def test_an_export_without_patients_leaves_nothing(tmp_path):
    (tmp_path / "export").mkdir()
    with pytest.raises(SystemExit, match=r"must hold .ndjson files"):
        EXAMPLE["convert"](tmp_path / "export", tmp_path / "meds")
    assert not (tmp_path / "meds").exists()


def test_the_lines_for_any_table(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "your-data.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", text, re.S)
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    rows = pq.read_table("events.parquet")
    assert rows["code"].to_pylist()[:2] == ["GENDER//F", "MEDS_BIRTH"], "static events come first"
    assert len(rows) == 4 and rows.column_names[-1] == "numeric_value"
    MedsDataset.open(tmp_path, need_train=False)
