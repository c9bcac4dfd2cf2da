"""The ladder of codes that few people have."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smbfast.data.codes.ladder import ANCESTOR, FAMILY, PREFIX, shared_names, steps


def names(code: str, parents: dict[str, list[str]] | None = None) -> list[str]:
    return [name for _, name in steps(code, parents or {})][1:]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (
            "DIAGNOSIS//ICD9CM//42821",
            ["DIAGNOSIS//ICD9CM//4282", "DIAGNOSIS//ICD9CM//428", "DIAGNOSIS//ICD9CM", "DIAGNOSIS"],
        ),
        ("ICD10CM/J96.01", ["ICD10CM/J96.0", "ICD10CM/J96", "ICD10CM"]),
        ("DX//ICD//10//E119", ["DX//ICD//10//E11", "DX//ICD//10", "DX//ICD", "DX"]),
        ("ALLERGY//a|b/x", ["ALLERGY//a|b", "ALLERGY//a", "ALLERGY"]),
        ("SUICIDE//12345", ["SUICIDE"]),
        ("SNOMED:12345", ["SNOMED"]),
        ("HTTP://LOINC.ORG/1-2", ["HTTP://LOINC.ORG", "HTTP"]),
        ("WEIGHT", ["(no prefix)"]),
    ],
)
def test_names_from_fine_to_coarse(code, expected):
    assert names(code) == expected


def test_ancestors_come_first_and_cycles_end():
    parents = {"A//1": ["p", "q"], "p": ["top"], "q": ["p", "A//1"], "top": ["p"]}
    rungs = steps("A//1", parents)
    assert rungs == [
        (PREFIX, "A//1"), (ANCESTOR, "p"), (ANCESTOR, "q"), (ANCESTOR, "top"), (FAMILY, "A"),
    ]  # fmt: skip


def ids(*ranges: range) -> list[int]:
    return [i for r in ranges for i in r]


def test_the_finest_name_with_ten_subjects_is_taken():
    rare = {"A//b//1": ids(range(5)), "A//b//2": ids(range(5, 10)), "A//c//1": ids(range(9))}
    assert shared_names(rare, (), {}) == {"A//b": ["A//b//1", "A//b//2"]}


def test_subjects_are_counted_once():
    rare = {"A//b//1": ids(range(9)), "A//b//2": ids(range(9))}
    assert shared_names(rare, (), {}) == {}


def test_a_name_waits_for_codes_from_finer_names():
    """4280x falls to 428 only after 4280 has failed, and 428 needs it for its ten."""
    rare = {"ICD9CM//42801": ids(range(4)), "ICD9CM//4281": ids(range(4, 10))}
    assert shared_names(rare, (), {}) == {"ICD9CM//428": sorted(rare)}


def test_a_frequent_code_takes_rare_ones_without_ten():
    rare = {"A//b//1": [1], "A//b//2": [2]}
    assert shared_names(rare, {"A//b"}, {}) == {}
    assert shared_names({**rare, "A//d": ids(range(3, 11))}, {"A//b"}, {}) == {}


def test_a_barred_name_gets_no_token():
    rare = {"A//b": None, "A//b//1": ids(range(9)), "A//b//2": [10, 11]}
    assert shared_names(rare, (), {}, barred={"A//b"}) == {"A": sorted(rare)}


parts = st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map("//".join)
groups = st.lists(st.integers(0, 30), min_size=1, max_size=9, unique=True)
hierarchies = st.dictionaries(
    parts, st.lists(st.one_of(parts, st.sampled_from("pqr")), max_size=2), max_size=6
)


@given(st.dictionaries(parts, groups, max_size=25), st.sets(parts, max_size=2), hierarchies)
def test_who_walks_to_a_name_has_ten(rare, frequent, parents):
    rare = {c: s for c, s in rare.items() if c not in frequent}
    shared = shared_names(rare, frequent, parents)
    assert not set(shared) & frequent
    reached = {}
    for code in rare:
        known = [n for _, n in steps(code, parents) if n in frequent or n in shared]
        if known and known[0] not in frequent:
            reached.setdefault(known[0], set()).add(code)
    assert {n: sorted(codes) for n, codes in reached.items()} == shared
    for codes in shared.values():
        assert len({s for c in codes for s in rare[c]}) >= 10
    # nobody is left who could have shared the coarsest name of all
    left = [c for c in rare if not any(c in codes for codes in shared.values())]
    left = [c for c in left if not any(n in frequent for _, n in steps(c, parents))]
    for name in {n for c in left for _, n in steps(c, parents)[-1:]}:
        together = {s for c in left if steps(c, parents)[-1][1] == name for s in rare[c]}
        assert len(together) < 10 or name in shared
