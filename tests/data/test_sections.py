"""Which section a code goes to: demo datasets, other vocabularies, and a user's own rules."""

from pathlib import Path

import numpy as np
import pytest

from smbfast.data.meds import MedsDataset
from smbfast.data.sections import SECTIONS, SectionMap, family
from tests.data.event_tables import DATA, DATASETS, batch_of, event, our_bpe, serializer_of

KNOWN = {
    # OMOP: vocabulary/concept, and table//field names of other extractions
    "SNOMED/44054006": "conditions",
    "SNOMED/419620001": "death",
    "ICD10CM/E11.9": "conditions",
    "ICD9CM/250.00": "conditions",
    "LOINC/4548-4": "measurements",
    "RxNorm/1049640": "drugs",
    "RxNorm Extension/OMOP1": "drugs",
    "CVX/140": "drugs",
    "NDC/0002-8215": "drugs",
    "CPT4/99213": "procedures",
    "HCPCS/J1815": "procedures",
    "ICD10PCS/0DB64Z3": "procedures",
    "ICD9Proc/45.13": "procedures",
    "Visit/IP": "observations",
    "CMS Place of Service/21": "observations",
    "Gender/F": "demographics",
    "Race/5": "demographics",
    "Ethnicity/Not Hispanic": "demographics",
    "Cancer Modifier/AJCC": "conditions",
    "drug_exposure//19019073": "drugs",
    "condition_occurrence//201826": "conditions",
    "procedure_occurrence//4": "procedures",
    "measurement//3004410": "measurements",
    "visit_occurrence//9201": "observations",
    "note//discharge": "notes",
    # FHIR: resource names and the systems of codings
    "Condition/44054006": "conditions",
    "Observation/8867-4": "observations",
    "MedicationRequest//860975": "drugs",
    "Immunization|08": "drugs",
    "DiagnosticReport/58410-2": "measurements",
    "Encounter/AMB": "observations",
    "DocumentReference/1": "notes",
    "http://loinc.org|8867-4": "measurements",
    "http://loinc.org/8867-4": "measurements",
    "http://snomed.info/sct|44054006": "conditions",
    "http://www.nlm.nih.gov/research/umls/rxnorm|860975": "drugs",
    "http://hl7.org/fhir/sid/icd-10-cm|E11.9": "conditions",
    "http://hl7.org/fhir/sid/cvx|140": "drugs",
    "urn:oid:2.16.840.1.113883.6.12|99213": "procedures",
    "urn:oid:2.16.840.1.113883.6.1|4548-4": "measurements",
    # MEDS itself and its extractions of MIMIC-IV and eICU
    "MEDS_BIRTH": "demographics",
    "MEDS_DEATH": "death",
    "LAB//50931//mg/dL": "measurements",
    "DIAGNOSIS//ICD//10//E119": "conditions",
    "MEDICATION//Heparin//Administered": "drugs",
}


def rules(tmp_path: Path, text: str) -> SectionMap:
    file = tmp_path / "rules.toml"
    file.write_text(text)
    return SectionMap.read(file)


@pytest.mark.parametrize("name", DATASETS)
def test_at_most_two_percent_of_events_fall_back(name: str) -> None:
    if not (DATA / name).is_dir():
        pytest.skip(f"{name} is not here")
    dataset, sections = MedsDataset.open(DATA / name), SectionMap.read()
    events = fallen = 0
    for split in dataset.splits:
        for batch in dataset.batches(split):
            ruled_C = np.array([sections(c, dataset.parents.get(c))[1] for c in batch.codes])
            events += len(batch.code_N)
            fallen += int((~ruled_C[batch.code_N]).sum())
    assert fallen <= 0.02 * events and events > 100_000


@pytest.mark.parametrize(("code", "section"), KNOWN.items())
def test_codes_of_many_vocabularies(code: str, section: str) -> None:
    found, ruled = SectionMap.read()(code)
    assert (SECTIONS[found], ruled) == (section, True)


def test_the_longest_match_up_to_a_boundary_wins(tmp_path: Path) -> None:
    own = rules(
        tmp_path,
        'fallback = "notes"\n[sections]\ndrugs = ["LAB", "a b"]\nmeasurements = ["lab//x", "A"]\n'
        'conditions = ["LAB//X//Y"]',
    )

    def section(code: str) -> str:
        found, ruled = own(code)
        assert ruled == (SECTIONS[found] != "notes")
        return SECTIONS[found]

    assert section("LAB//x//y//z") == "conditions"
    assert section("lab//X//yz") == "measurements"
    assert section("Lab//xy") == section("LAB") == section("LAB_1") == "drugs"
    assert section("A B/1") == "drugs" and section("A/B") == "measurements"
    assert section("LABOR//1") == section("") == section("B//LAB") == section("//LAB") == "notes"


def test_parent_codes_decide_where_no_rule_does() -> None:
    own = SectionMap.read()
    drugs = (SECTIONS.index("drugs"), True)
    assert own("zz//1", ["yy//2", "RxNorm/860975"]) == drugs
    assert own("LOINC/1", ["RxNorm/860975"]) == (SECTIONS.index("measurements"), True)
    assert own("zz//1", ["yy//2"]) == (own.fallback, False)


def test_what_no_rule_matched_is_counted_by_family_alone() -> None:
    serializer = serializer_of(our_bpe())
    events = [event("2150-01-31", c) for c in ("zz//secret//1", "zz//secret//2", "yy|3", "LAB//1")]
    (text,) = serializer.texts(batch_of(events))
    assert serializer.unmapped.events == {"zz": 2, "yy": 1}
    assert "<observations>zz//secret//1\n" in text
    assert [family(c) for c in ("a//b", "a/b", "a|b", "a:b", "a b")] == [*"aaaa", "(no prefix)"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("not toml [", "rules.toml"),
        ('other = "x"', r"expected `sections` and `fallback`, got \['other'\]"),
        ('fallback = "labs"', "must be one of demographics"),
        ('[sections]\nlabs = ["LAB"]', "must be one of demographics"),
        ('[sections]\ndrugs = "LAB"', "`sections.drugs` must be a list"),
        ("[sections]\ndrugs = [1]", "must hold text only"),
        ('[sections]\ndrugs = [""]', "must hold text only"),
        ('[sections]\ndrugs = ["LAB"]\nnotes = ["lab"]', "the rule `lab` stands in two sections"),
        ('sections = "drugs"', "`sections` must be"),
    ],
)
def test_bad_rules_are_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        rules(tmp_path, text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.toml"):
        SectionMap.read(tmp_path / "absent.toml")
