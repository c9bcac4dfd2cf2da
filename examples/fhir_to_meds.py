"""Convert a FHIR bulk export (R4 or R5, newline-delimited JSON) to MEDS.

    python examples/fhir_to_meds.py EXPORT_FOLDER MEDS_FOLDER

EXPORT_FOLDER holds files such as Patient.ndjson or Observation.000.ndjson.gz, one resource a line.
MEDS_FOLDER gets data/N.parquet, metadata/codes.parquet and, for you alone, subject_ids.parquet,
which leads from `subject_id` back to the patient's id. Change CODED and `moments` to the profiles
of your export: they decide which resources become events, and when each was known. All events are
in memory at once, about 1.7 GB a million; a larger export is converted in parts by patients.

- A time is the clock time where the patient was: the offset from UTC is dropped, as MEDS has none.
  What has a day, month or year alone stands at its last second, a birth at its first: an event may
  come late, never before it was known.
- A result stands when it was issued, a diagnosis when it was recorded: not when it began, which
  nobody could know by then. What has no such time is left out and counted, and so is what was
  entered in error, what is not as FHIR has it, and of a resource with an id all but its newest
  version.
- A code is SYSTEM//code, such as LOINC//4548-4; its display text becomes its description.
"""

import gzip
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta
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
STATIC = "static"  # the time of what has none, such as a sex
SHARDS = 16
Event = tuple[str | None, dict | str, float | None, str | None]  # time, coding or code, values
# what Python says of a resource that has a list in place of a text, and the like
NOT_FHIR = (AttributeError, KeyError, OverflowError, TypeError, ValueError)
_TIME = re.compile(
    r"(\d{4})(?:-(\d\d)(?:-(\d\d)(?:T(\d\d):(\d\d)(?::(\d\d)(?:\.(\d+))?)?"
    r"(?:[Zz]|[+-]\d\d:\d\d)?)?)?)?",
    re.ASCII,
)


def moments(resource: dict, medicines: dict[str, dict]) -> Iterator[Event]:
    """Yield the events of a resource, each with the time at which it was known."""
    kind = resource["resourceType"]
    if kind == "Patient":
        yield resource.get("birthDate"), "MEDS_BIRTH", None, None
        if resource.get("gender"):
            yield STATIC, f"GENDER//{resource['gender']}", None, None
        if resource.get("deceasedDateTime") or resource.get("deceasedBoolean") is True:
            yield resource.get("deceasedDateTime"), "MEDS_DEATH", None, None
    elif kind == "Encounter":
        period = first(resource, "period", "actualPeriod") or {}
        stay = resource.get("class") or {}
        if arrival := coding(stay[0] if isinstance(stay, list) else {"coding": [stay]}):
            yield period.get("start"), arrival, None, None
        if period.get("end"):
            yield period["end"], "ENCOUNTER_END", None, None
    elif kind == "Observation":
        known = ("issued", "effectiveDateTime", "effectiveInstant", "effectivePeriod.end")
        for part in [resource, *(resource.get("component") or [])]:
            (number, text), concept = value(part), coding(part.get("code"))
            if concept and (number is not None or text is not None):
                yield first(resource, *known), concept, number, text
    elif kind in CODED:
        concepts, times = CODED[kind]
        if concept := coding(first(resource, *concepts)) or medicine(resource, medicines):
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
    return next((c for c in (concept or {}).get("coding") or [] if c.get("code")), None)


def medicine(resource: dict, medicines: dict[str, dict]) -> dict | None:
    """Return the coding of the Medication that a resource refers to, within it or elsewhere."""
    paths = ("medicationReference.reference", "medication.reference.reference")
    name = first(resource, *paths) or ""
    if name.startswith("#"):
        inner = [m for m in resource.get("contained") or [] if m.get("id") == name[1:]]
        return coding(inner[0].get("code")) if inner else None
    return coding(medicines.get(local_id(name, "Medication")))


def value(part: dict) -> tuple[float | None, str | None]:
    """Return the number and the text of an observation or of one of its components."""
    number = first(part, "valueQuantity.value", "valueInteger")
    if number is not None:
        number = float(number)
        if not abs(number) < 3.4e38:  # infinite as float32, or not a number
            raise ValueError("no number of MEDS")
        return number, first(part, "valueQuantity.unit")
    concept = part.get("valueCodeableConcept")
    text = (coding(concept) or {}).get("display") or (concept or {}).get("text")
    return None, part.get("valueString") or text


def code_of(coded: dict | str) -> str:
    """Return SYSTEM//code; a system that SYSTEMS does not have stands as it is."""
    if isinstance(coded, str):
        return coded
    system = str(coded.get("system") or "UNKNOWN")
    return f"{SYSTEMS.get(system.lower(), system)}//{coded['code']}"


def clock(text: str | None, end: bool) -> datetime:
    """Return a FHIR date or time as a clock time; of a day, month or year its `end` or start."""
    if not (match := _TIME.fullmatch(text or "")):
        raise ValueError("no time of FHIR")
    day, month = match[3], match[2]
    start = datetime(int(match[1]), int(month or 1), int(day or 1))
    if match[4]:  # 24:00 and leap seconds are of the next minute
        hour, minute, second = (int(part or 0) for part in match.groups()[3:6])
        if hour > 24 or minute > 59 or second > 60:
            raise ValueError("no time of a day")
        micros = int(f"{match[7] or 0:0<6}"[:6])
        return start + timedelta(hours=hour, minutes=minute, seconds=second, microseconds=micros)
    if not end:
        return start
    after = start + timedelta(days=1 if day else 31 if month else 366)
    after = after if day else after.replace(day=1) if month else after.replace(month=1, day=1)
    return after - timedelta(seconds=1)


def subject_of(patient: str) -> int:
    """Return a stable `subject_id` for a patient's id."""
    return int.from_bytes(hashlib.blake2b(patient.encode(), digest_size=8).digest()) >> 1


def local_id(reference: str, kind: str) -> str:
    """Return the id in a reference to a `kind`, without server and version, or an empty text."""
    match = re.search(rf"(?:^|/){kind}/([^/]+)(?:/_history/[^/]+)?$", reference)
    return match[1] if match else ""


def patient_of(resource: dict) -> str | None:
    """Return the id of the patient that a resource is about."""
    if resource["resourceType"] == "Patient":
        return resource["id"]
    return local_id(first(resource, "subject.reference", "patient.reference") or "", "Patient")


def resources(folder: Path) -> Iterator[dict]:
    """Yield the resources of all files of an export."""
    for file in sorted([*folder.rglob("*.ndjson"), *folder.rglob("*.ndjson.gz")]):
        opened = gzip.open if file.suffix == ".gz" else open
        with opened(file, "rt", encoding="utf-8-sig") as lines:
            number = 0
            try:
                for line in lines:
                    number += 1
                    if line.strip():
                        resource = json.loads(line)
                        if not isinstance(resource, dict) or "resourceType" not in resource:
                            raise ValueError("no resource")
                        yield resource
            except (ValueError, RecursionError, EOFError, gzip.BadGzipFile):
                raise SystemExit(
                    f"{file}, line {number}: must be one FHIR resource in JSON; nothing is written"
                ) from None


def rows_of(resource: dict, medicines: dict[str, dict], counts: Counter[str]) -> list[tuple]:
    """Return the rows of a resource, each with its display text, but for the subject."""
    kind, rows = resource["resourceType"], []
    events = list(moments(resource, medicines))
    for time, coded, number, text in events:
        code = code_of(coded)
        try:
            when = None if time == STATIC else clock(time, end=code != "MEDS_BIRTH")
        except (OverflowError, TypeError, ValueError):
            counts[f"{kind} without a time"] += 1
            continue
        display = coded.get("display") if isinstance(coded, dict) else None
        for words in (code, text or "", display or ""):
            words.encode()  # Parquet takes UTF-8 alone
        rows.append((when, code, number, text, display))
    if not events and kind in (*CODED, "Encounter", "Observation"):
        counts[f"{kind} without a code or value"] += 1
    return rows


def read(export: Path) -> tuple[dict[tuple, tuple[str, str, list[tuple]]], Counter[str]]:
    """Return the patient and rows of each resource, and counts of what was left out."""
    medicines: dict[str, dict] = {}
    for resource in resources(export):
        if resource["resourceType"] == "Medication" and isinstance(resource.get("id"), str):
            medicines[resource["id"]] = resource.get("code") or {}
    held: dict[tuple, tuple[str, str, list[tuple]]] = {}
    counts: Counter[str] = Counter()
    for number, resource in enumerate(resources(export)):
        kind = resource["resourceType"]
        try:
            if not (patient := patient_of(resource)):
                counts["resources of no patient"] += 1
                continue
            patient.encode()
            key = (kind, resource.get("id") or number)
            changed = str(first(resource, "meta.lastUpdated") or "")
            status = first(resource, "status", "verificationStatus")
            if "entered-in-error" in json.dumps(status):  # a text, or a concept with that code
                rows = []
                counts[f"{kind} entered in error"] += 1
            else:
                rows = rows_of(resource, medicines, counts)
            if key in held:
                counts[f"{kind} in several versions"] += 1
            if key not in held or held[key][0] <= changed:
                held[key] = changed, patient, rows
        except NOT_FHIR:
            counts[f"{kind} not as FHIR has it"] += 1
    return held, counts


def convert(export: Path, out: Path) -> Counter[str]:
    """Write the MEDS folder and return how many events there are, and what was left out."""
    rows: list[list[tuple]] = [[] for _ in range(SHARDS)]
    described: dict[str, str] = {}
    patients: dict[str, int] = {}
    held, counts = read(export)
    for _, patient, events in held.values():
        subject = patients.setdefault(patient, subject_of(patient))
        for when, code, number, text, display in events:
            if display:
                described.setdefault(code, display)
            rows[subject % SHARDS].append((subject, when, code, number, text))
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
