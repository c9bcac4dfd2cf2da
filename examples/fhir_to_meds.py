"""Convert a FHIR bulk export (R4 or R5, newline-delimited JSON) to MEDS.

    python examples/fhir_to_meds.py EXPORT_FOLDER MEDS_FOLDER

EXPORT_FOLDER holds files such as Patient.ndjson or Observation.000.ndjson.gz, one resource a line.
MEDS_FOLDER gets data/N.parquet, metadata/codes.parquet and, for you alone, subject_ids.parquet,
which leads from `subject_id` back to the patient's id. Change CODED and `moments` to the profiles
of your export: they decide which resources become events, and when each was known. All events are
in memory at once, about 0.4 GB a million; a larger export is converted in parts by patients.

- A time is the clock time where the patient was: the offset from UTC is dropped, as MEDS has none.
- A result stands when it was issued, a diagnosis when it was recorded: not when it began, which
  nobody could know by then. What has no such time is left out and counted.
- A code is SYSTEM//code, such as LOINC//4548-4; its display text becomes its description.
"""

import gzip
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SYSTEMS = {
    "http://loinc.org": "LOINC",
    "http://snomed.info/sct": "SNOMED",
    "http://www.nlm.nih.gov/research/umls/rxnorm": "RXNORM",
    "http://hl7.org/fhir/sid/icd-9-cm": "ICD9CM",
    "http://hl7.org/fhir/sid/icd-10": "ICD10",
    "http://hl7.org/fhir/sid/icd-10-cm": "ICD10CM",
    "http://hl7.org/fhir/sid/icd-10-pcs": "ICD10PCS",
    "http://hl7.org/fhir/sid/ndc": "NDC",
    "http://hl7.org/fhir/sid/cvx": "CVX",
    "http://www.ama-assn.org/go/cpt": "CPT",
    "http://terminology.hl7.org/codesystem/v3-actcode": "ENCOUNTER",
}
SCHEMA = pa.schema(
    {
        "subject_id": pa.int64(),
        "time": pa.timestamp("us"),
        "code": pa.string(),
        "numeric_value": pa.float32(),
        "text_value": pa.large_string(),
    }
)
# resources that are one code at one time: where the code is (in R4 or R5), and when it was known
_MEDICINE = ("medicationCodeableConcept", "medication.concept")
CODED = {
    "Condition": (("code",), ("recordedDate", "assertedDate")),
    "AllergyIntolerance": (("code",), ("recordedDate",)),
    "Procedure": (
        ("code",),
        ("performedDateTime", "occurrenceDateTime", "performedPeriod.end", "occurrencePeriod.end"),
    ),
    "MedicationRequest": (_MEDICINE, ("authoredOn",)),
    "MedicationAdministration": (
        _MEDICINE,
        (
            "effectiveDateTime",
            "occurenceDateTime",
            "effectivePeriod.start",
            "occurencePeriod.start",
        ),
    ),
    "Immunization": (("vaccineCode",), ("occurrenceDateTime",)),
}
STATIC = ""  # the time of what has none, such as a sex
SHARDS = 16
Event = tuple[str | None, dict | str, float | None, str | None]  # time, coding or code, values


def moments(resource: dict) -> Iterator[Event]:
    """Yield the events of a resource, each with the time at which it was known."""
    kind = resource["resourceType"]
    if kind == "Patient":
        yield resource.get("birthDate"), "MEDS_BIRTH", None, None
        if resource.get("gender"):
            yield STATIC, f"GENDER//{resource['gender']}", None, None
        if resource.get("deceasedDateTime"):
            yield resource["deceasedDateTime"], "MEDS_DEATH", None, None
    elif kind == "Encounter":
        period = first(resource, "period", "actualPeriod") or {}
        stay = resource.get("class") or {}
        if arrival := coding(stay[0] if isinstance(stay, list) else {"coding": [stay]}):
            yield period.get("start"), arrival, None, None
        if period.get("end"):
            yield period["end"], "ENCOUNTER_END", None, None
    elif kind == "Observation":
        for part in [resource, *resource.get("component", [])]:
            (number, text), concept = value(part), coding(part.get("code"))
            if concept and (number is not None or text is not None):
                yield first(resource, "issued", "effectiveDateTime"), concept, number, text
    elif kind in CODED:
        concepts, times = CODED[kind]
        if concept := coding(first(resource, *concepts)):
            yield first(resource, *times), concept, None, None


def first(resource: dict, *paths: str) -> Any:
    """Return what stands at the first of these dotted paths that there is, or None."""
    for path in paths:
        inner: Any = resource
        for key in path.split("."):
            inner = inner.get(key) if isinstance(inner, dict) else None
        if inner is not None:
            return inner
    return None


def coding(concept: dict | None) -> dict | None:
    """Return the first coding of a CodeableConcept that has a code."""
    return next((c for c in (concept or {}).get("coding", []) if c.get("code")), None)


def value(part: dict) -> tuple[float | None, str | None]:
    """Return the number and the text of an observation or of one of its components."""
    if "valueQuantity" in part and part["valueQuantity"].get("value") is not None:
        return float(part["valueQuantity"]["value"]), part["valueQuantity"].get("unit")
    if "valueInteger" in part:
        return float(part["valueInteger"]), None
    concept = part.get("valueCodeableConcept")
    text = (coding(concept) or {}).get("display") or (concept or {}).get("text")
    return None, part.get("valueString") or text


def code_of(coded: dict | str) -> str:
    """Return SYSTEM//code; a system that SYSTEMS does not have stands as it is."""
    if isinstance(coded, str):
        return coded
    system = str(coded.get("system", "UNKNOWN"))
    return f"{SYSTEMS.get(system.lower(), system)}//{coded['code']}"


def clock(text: str) -> datetime:
    """Return a FHIR date or time as a clock time; a year or month alone is its first day."""
    day, _, time = text.partition("T")
    whole = datetime.fromisoformat(f"{(day + '-01-01')[:10]}T{time or '00:00'}")
    return whole.replace(tzinfo=None)


def subject_of(patient: str) -> int:
    """Return a stable `subject_id` for a patient's id."""
    return int.from_bytes(hashlib.blake2b(patient.encode(), digest_size=8).digest()) >> 1


def patient_of(resource: dict) -> str | None:
    """Return the id of the patient that a resource is about."""
    if resource["resourceType"] == "Patient":
        return resource["id"]
    about = resource.get("subject") or resource.get("patient") or {}
    _, patient, name = about.get("reference", "").rpartition("Patient/")
    return name or None if patient else None


def resources(folder: Path) -> Iterator[dict]:
    """Yield the resources of all files of an export."""
    for file in sorted([*folder.rglob("*.ndjson"), *folder.rglob("*.ndjson.gz")]):
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines if line.strip())


def convert(export: Path, out: Path) -> Counter[str]:
    """Write the MEDS folder and return how many events there are, and what was left out."""
    rows: list[list[tuple]] = [[] for _ in range(SHARDS)]
    described: dict[str, str] = {}
    patients: dict[str, int] = {}
    counts: Counter[str] = Counter()
    for resource in resources(export):
        patient = patient_of(resource)
        if patient is None:
            counts["resources of no patient"] += 1
            continue
        subject = patients.setdefault(patient, subject_of(patient))
        for time, coded, number, text in moments(resource):
            if time is None:
                counts[f"{resource['resourceType']} without a time"] += 1
                continue
            code = code_of(coded)
            if isinstance(coded, dict) and coded.get("display"):
                described.setdefault(code, coded["display"])
            row = (subject, clock(time) if time else None, code, number, text)
            rows[subject % SHARDS].append(row)
            counts["events"] += 1
    if not counts["events"]:
        raise SystemExit(f"{export} must hold .ndjson files with resources of patients")
    out.mkdir(parents=True, mode=0o700)
    for folder in ("data", "metadata"):
        (out / folder).mkdir(mode=0o700)
    for number, shard in enumerate(rows):
        if shard:
            shard.sort(key=lambda row: (row[0], row[1] or datetime.min))  # static rows first
            table = pa.Table.from_arrays(
                [pa.array(c) for c in zip(*shard, strict=True)], SCHEMA.names
            )
            pq.write_table(table.cast(SCHEMA), out / "data" / f"{number}.parquet")
    codes = {"code": list(described), "description": list(described.values())}
    pq.write_table(pa.table(codes), out / "metadata" / "codes.parquet")
    ids = {"subject_id": list(patients.values()), "patient": list(patients)}
    pq.write_table(pa.table(ids), out / "subject_ids.parquet")
    (out / "subject_ids.parquet").chmod(0o600)
    return counts


if __name__ == "__main__":
    if len(sys.argv) != 3 or Path(sys.argv[2]).exists():
        raise SystemExit("usage: fhir_to_meds.py EXPORT_FOLDER MEDS_FOLDER (a new one)")
    for name, number in sorted(convert(Path(sys.argv[1]), Path(sys.argv[2])).items()):
        print(f"{name}: {number}")
