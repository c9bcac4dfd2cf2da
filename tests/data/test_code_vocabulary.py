"""The vocabulary of the format `codes`: ten subjects behind every token, and the same events always
become the same tokens. The plain reference reads the saved JSON and takes one event at a time.
"""

import json
import re
from collections import Counter, defaultdict
from decimal import ROUND_FLOOR, Context, Decimal
from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smbfast.data.clean import clean
from smbfast.data.codes import GAP_EDGES, CodeStatistics, CodeVocabulary, summary
from smbfast.data.meds import BIRTH, EventBatch, MedsDataset
from smbfast.data.sections import SECTIONS, SectionMap, family
from tests.data.event_tables import DATA, Event, batch_of, event

MAP = SectionMap.read()
RUNGS = ("own", "ancestor", "prefix", "family", "section")
ALPHABET = 2 + 19 + 121 + len(SECTIONS)
CODES = (
    "LAB//GLU", "LAB//NA//mmol/L", "LAB//K", "LAB", "VITAL//HR", "DIAGNOSIS//ICD9CM//42821",
    "DIAGNOSIS//ICD9CM//4280", "DIAGNOSIS//ICD9CM//428", "DIAGNOSIS//ICD10CM//I50.1",
    "TREATMENT//renal|dialysis|x", "TREATMENT//renal|dialysis|y", "TREATMENT//renal", "GENDER//F",
    "WEIGHT", "MEDS_DEATH", "NOTE//a\nb", "NOTE//a b", "MEDICATION//x", BIRTH,
)  # fmt: skip
PARENTS = {
    "DIAGNOSIS//ICD9CM//42821": ["ICD9CM/42821", "DIAGNOSIS//ICD9CM//428"],
    "ICD9CM/42821": ["ICD9CM/HF"],
    "DIAGNOSIS//ICD10CM//I50.1": ["ICD9CM/HF"],
    "ICD9CM/HF": ["ICD9CM/42821"],  # a cycle
    "MEDICATION//x": ["LAB//GLU"],
}
DESCRIPTIONS = {"LAB//GLU": "Glucose\n[Blood]", "ICD9CM/HF": "Heart failure", "WEIGHT": "Weight"}
TEXTS = ("POS", "neg", " neg", "n/a", "", "x" * 90)


@st.composite
def cohorts(draw) -> list[list[Event]]:
    """Events of 10 to 40 subjects; codes from common to rare, values of few or many digits."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    digits = draw(st.integers(0, 4))
    spread = draw(st.sampled_from([0.0, 1.0, 1e4]))
    has_number, has_text = draw(st.sampled_from([0.2, 0.7])), draw(st.sampled_from([0.1, 0.5]))
    common = rng.dirichlet(np.full(len(CODES), 0.4))
    people = []
    for _ in range(draw(st.integers(10, 40))):
        events = []
        for _ in range(int(rng.integers(1, 12))):
            value = round(float(rng.normal(3, 1 + spread)), digits)
            text = TEXTS[min(int(rng.geometric(0.5)) - 1, len(TEXTS) - 1)]
            events.append(
                event(
                    int(rng.integers(0, 50)),
                    CODES[rng.choice(len(CODES), p=common)],
                    value if rng.random() < has_number else None,
                    text if rng.random() < has_text else None,
                )
            )
        people.append(events)
    return people


def counted(*batches: EventBatch, **limits: int) -> CodeStatistics:
    statistics = CodeStatistics(**limits)
    for batch in batches:
        statistics.add(batch)
    return statistics


def fitted(people: list[list[Event]], **options: int) -> CodeVocabulary:
    statistics = counted(batch_of(*people))
    return CodeVocabulary.fit(statistics, MAP, DESCRIPTIONS, PARENTS, **options)


def rows_of(people: list[list[Event]]) -> list[tuple[int, str, float | None, str | None]]:
    return [(s, c, v, t) for s, events in enumerate(people) for _, c, v, t in events if c != BIRTH]


def floored(value: float) -> Decimal:
    exact = Context(prec=6).plus(Decimal(float(np.float32(value))))
    return Context(prec=3, rounding=ROUND_FLOOR).plus(exact)


def plain_ladder(code: str, parents: dict[str, list[str]]) -> list[tuple[str, str]]:
    walk = [("prefix", code)]
    level = [code]
    while level:
        level = [p for c in level for p in parents.get(c, ())]
        level = [p for p in dict.fromkeys(level) if p not in [n for _, n in walk]]
        walk += [("ancestor", p) for p in level]
    icd = re.fullmatch(r"(DIAGNOSIS//ICD\d+CM//)(.{4,})", code)
    if icd:
        cuts = [icd[2][:n] for n in range(len(icd[2]) - 1, 2, -1)]
        walk += [("prefix", icd[1] + cut) for cut in cuts if not cut.endswith(".")]
    rest = code
    while (at := max(rest.rfind("/"), rest.rfind("|"))) >= 0:
        rest = rest[:at].rstrip("/|")
        walk += [("prefix", rest)] if len(rest) > len(family(code)) else []
    return [*walk, ("family", family(code))]


class PlainEncoder:
    """One event at a time, from the tables of the JSON alone; ids are found by name."""

    def __init__(self, vocabulary: CodeVocabulary) -> None:
        self.content = vocabulary.content
        self.own = {e["code"]: e for e in self.content["codes"]}
        self.shared = {e["name"] for e in self.content["shared"]}
        self.limit = self.content["text_chars"]

    def token(self, code: str, value: float | None, text: str | None) -> tuple:
        """Return what the token stands for: (code, None | bin | text), and the rung."""
        if code in self.own:
            entry = self.own[code]
            if value is not None and "edges" in entry:
                edges = [Decimal(repr(e)) for e in entry["edges"]]
                return (code, sum(e <= floored(value) for e in edges)), "own"
            if text is not None and clean(text, self.limit) in entry.get("values", ()):
                return (code, clean(text, self.limit)), "own"
            return (code, None), "own"
        for rung, name in plain_ladder(code, PARENTS):
            if name in self.own:
                return (name, None), rung
            if name in self.shared:
                return (name, "*"), rung
        return ("section", SECTIONS[MAP(code, PARENTS.get(code))[0]]), "section"


def meanings(vocabulary: CodeVocabulary) -> dict[tuple, int]:
    """The id of each token, by what `PlainEncoder` says of it: order is part of the contract."""
    order: list[tuple] = [("section", s) for s in SECTIONS]
    for entry in vocabulary.content["codes"]:
        order.append((entry["code"], None))
        if "edges" in entry:
            order += [(entry["code"], b) for b in range(len(entry["edges"]) + 1)]
        order += [(entry["code"], value) for value in entry.get("values", ())]
    order += [(entry["name"], "*") for entry in vocabulary.content["shared"]]
    first = vocabulary.first_id + ALPHABET - len(SECTIONS)
    return {meaning: first + i for i, meaning in enumerate(order)}


@settings(max_examples=60, deadline=None)
@given(cohorts(), st.sampled_from([0, 3, 100]), st.sampled_from([0, 1000]))
def test_encode_agrees_with_the_plain_reference(people, max_codes, first_id):
    vocabulary = fitted(people, max_codes=max_codes, first_id=first_id)
    ids, plain = meanings(vocabulary), PlainEncoder(vocabulary)
    assert len(vocabulary) == ALPHABET - len(SECTIONS) + len(ids)
    seen = {(c, v, t) for _, c, v, t in rows_of(people)} | {
        ("LAB//NEVER", 3.0, "POS"), ("NEW", None, None), ("DIAGNOSIS//ICD9CM//42899", None, None),
        ("LAB//GLU", -1e30, None), ("LAB//GLU", 1e30, "neg"), ("VITAL//HR", 0.0, None),
    }  # fmt: skip
    rows = sorted(seen, key=repr)
    batch = batch_of([event(i, *row) for i, row in enumerate(rows)])
    encoded = vocabulary.encode(batch)
    expected, counts = [], Counter()
    for code, value, text in rows:
        meaning, rung = plain.token(code, value, text)
        expected.append(ids[meaning])
        counts[rung] += 1
        number_kept = value is not None and isinstance(meaning[1], int)
        text_kept = rung == "own" and isinstance(meaning[1], str)
        counts["numbers_without_bin"] += value is not None and not number_kept
        counts["texts_dropped_for_number"] += number_kept and text is not None
        counts["texts_without_token"] += text is not None and not (number_kept or text_kept)
    assert encoded.token_N.tolist() == expected
    assert encoded.token_N.dtype == np.int32 and encoded.section_N.dtype == np.uint8
    assert {k: n for k, n in encoded.counts.items() if n} == {k: n for k, n in counts.items() if n}
    assert encoded.section_N.tolist() == [MAP(c, PARENTS.get(c))[0] for c, _, _ in rows]


@settings(max_examples=60, deadline=None)
@given(cohorts(), st.sampled_from([2, 100]))
def test_ten_subjects_are_behind_every_fitted_token(people, max_codes):
    vocabulary = fitted(people, max_codes=max_codes)
    plain = PlainEncoder(vocabulary)
    have, subjects = defaultdict(set), defaultdict(set)
    for subject, code, value, text in rows_of(people):
        subjects[code].add(subject)
        have[plain.token(code, value, text)[0]].add(subject)
    for entry in vocabulary.content["codes"]:
        assert len(subjects[entry["code"]]) >= 10
        assert len(entry.get("edges", ())) < 10
        assert all(float(f"{e:.3g}") == e for e in entry.get("edges", ()))
        assert entry.get("edges", []) == sorted(set(entry.get("edges", [])))
    for meaning in meanings(vocabulary):
        if meaning[0] != "section" and meaning[1] is not None:
            assert len(have[meaning]) >= 10, meaning


@settings(max_examples=60, deadline=None)
@given(cohorts(), st.sampled_from([2, 100]))
def test_what_ten_subjects_have_gets_its_token(people, max_codes):
    """The other direction: nothing is left out that has ten."""
    vocabulary = fitted(people, max_codes=max_codes)
    entries = {e["code"]: e for e in vocabulary.content["codes"]}
    who, numbers, texts = defaultdict(set), defaultdict(set), defaultdict(set)
    for subject, code, value, _ in rows_of(people):
        who[code].add(subject)
        if value is not None:
            numbers[code].add(subject)
    most = sorted((c for c in who if len(who[c]) >= 10), key=lambda c: (-len(who[c]), c))
    assert sorted(entries) == sorted(most[:max_codes])
    for subject, code, value, text in rows_of(people):
        kept = value is not None and len(numbers[code]) >= 10
        if text is not None and clean(text, 64) and not kept:
            texts[code, clean(text, 64)].add(subject)
    for code, entry in entries.items():
        assert ("edges" in entry) == (len(numbers[code]) >= 10)
        expected = [t for c, t in sorted(texts) if c == code and len(texts[c, t]) >= 10]
        assert entry.get("values", []) == expected


@settings(max_examples=40, deadline=None)
@given(cohorts(), st.randoms(use_true_random=False), st.sampled_from([3, 1000]))
def test_any_split_into_files_gives_the_same_vocabulary(people, random, max_texts):
    expected = counted(batch_of(*people), max_texts=max_texts)
    order = list(range(len(people)))
    random.shuffle(order)
    cuts = sorted(random.sample(order, 3))
    files = [
        [batch_of(people[s], first=s + 1) for s in order[a:b]]
        for a, b in zip([0, *cuts], [*cuts, len(order)], strict=True)
    ]
    merged = CodeStatistics(max_texts=max_texts)
    for batches in files:
        merged.merge(counted(*batches, max_texts=max_texts))
    of_one, of_many = (
        CodeVocabulary.fit(s, MAP, DESCRIPTIONS, PARENTS) for s in (expected, merged)
    )
    assert of_many.content == of_one.content
    assert summary(of_many, merged) == summary(of_one, expected)
    assert (merged.num_subjects, merged.num_events) == (expected.num_subjects, expected.num_events)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 12))
def test_of_too_many_texts_the_first_in_order_are_counted(seed, max_texts):
    rng = np.random.default_rng(seed)
    words = [w * n for w in "abc" for n in (1, 2, 3)]
    people = [
        [event(0, f"L//{rng.integers(3)}", None, str(rng.choice(words))) for _ in range(8)]
        for _ in range(30)
    ]
    pairs = sorted({(len(t), t, c) for events in people for _, c, _, t in events if t})
    parts = [
        counted(*(batch_of(p, first=s + 1) for s, p in part), max_texts=max_texts)
        for part in np.array_split(np.array(list(enumerate(people)), dtype=object), 4)
    ]
    merged = reduce(lambda a, b: a.merge(b) or a, parts)
    merged.settle()
    codes, texts = list(merged.code_ids), list(merged.text_ids)
    table = merged.texts
    got = {
        (codes[c], texts[t]): n
        for c, t, n in zip(
            (table.key_K >> table.low_bits).tolist(),
            table.low().tolist(),
            table.sum_KM[:, 0].tolist(),
            strict=True,
        )
    }
    who = Counter((c, t) for events in people for c, t in {(c, t) for _, c, _, t in events})
    assert got == {(c, t): who[c, t] for _, t, c in pairs[:max_texts]}


def test_free_text_does_not_grow_the_statistics():
    statistics = CodeStatistics(max_texts=50)
    for s in range(20):
        notes = [event(0, "NOTE//x", None, f"note {s} {i}") for i in range(30)]
        statistics.add(batch_of(notes, first=s))
        assert statistics.texts.num_rows <= 100  # twice the limit: a cut costs a sort
    statistics.settle()
    assert statistics.texts.num_rows == len(statistics.text_ids) == 50


def test_subjects_weigh_the_same():
    """One subject with 200 values at 5 moves no edge of 200 others, who have 1 to 50 evenly."""
    people = [[event(0, "LAB//GLU", float(v))] for v in range(1, 51)] * 4
    plain = fitted(people).content["codes"][0]["edges"]
    many = fitted([*people, [event(0, "LAB//GLU", 5.0)] * 200]).content["codes"][0]["edges"]
    assert plain == many == [6.0, 11.0, 16.0, 21.0, 26.0, 31.0, 36.0, 41.0, 46.0]


def crowd(*events: Event, size: int = 12) -> list[list[Event]]:
    return [list(events) for _ in range(size)]


def test_one_patient_s_strings_are_in_no_field():
    rng = np.random.default_rng(5)
    strings = ["".join(rng.choice(list("qwxzjkvy"), 12)) for _ in range(40)]
    own = [
        event(i, rng.choice([s, f"{s}//a", f"LAB//{s}", f"LAB//a|{s}", f"ICD9CM//{s}9"]), 3.0, s)
        for i, s in enumerate(strings)
    ]
    own += [event(50 + i, "LAB//GLU", None, s) for i, s in enumerate(strings)]
    common = (event(0, "LAB//GLU", 5.0), event(1, "LAB//GLU", None, "high"), event(2, "GENDER//F"))
    people = [*crowd(*common), own * 3]
    codes = {e[1] for e in own} - {"LAB//GLU"}
    descriptions = {c: f"about {c}" for c in codes}
    parents = {c: [f"up/{c}"] for c in codes} | {f"up/{c}": [f"top/{c}"] for c in codes}
    statistics = counted(batch_of(*people))
    vocabulary = CodeVocabulary.fit(statistics, MAP, descriptions, parents)
    shown = json.dumps(vocabulary.content) + repr(vocabulary.tokens)
    shown += repr(summary(vocabulary, statistics))
    assert "high" in shown and not [s for s in strings if s in shown]


def test_the_file_is_read_back_and_refused_when_damaged(tmp_path):
    people = crowd(event(0, "LAB//GLU", 5.5), event(1, "LAB//K", None, "low"))
    vocabulary = fitted(people, first_id=7)
    file = tmp_path / "vocabulary.json"
    vocabulary.save(file)
    again = CodeVocabulary.read(file, PARENTS)
    assert again.tokens == vocabulary.tokens and again.fingerprint() == vocabulary.fingerprint()
    batch = batch_of(*people)
    assert np.array_equal(again.encode(batch).token_N, vocabulary.encode(batch).token_N)
    whole = file.read_text()
    for damaged in (whole[:-20], whole.replace("GLU", "GLX"), "[]", "{}", ""):
        file.write_text(damaged)
        with pytest.raises(ValueError, match=re.escape(str(file))):
            CodeVocabulary.read(file)
    with pytest.raises(ValueError, match=r"missing\.json"):
        CodeVocabulary.read(tmp_path / "missing.json")


def test_a_vocabulary_of_another_version_is_refused(tmp_path):
    vocabulary = fitted(crowd(event(0, "LAB//GLU", 5.5)))
    vocabulary.content["version"] = 99
    vocabulary.save(tmp_path / "v.json")
    with pytest.raises(ValueError, match=r"version 1; got 99"):
        CodeVocabulary.read(tmp_path / "v.json")


def test_the_fingerprint_changes_with_what_changes_tokens():
    people = crowd(event(0, "LAB//GLU", 5.5), event(1, "LAB//K", 1.0))
    prints = {
        fitted(people).fingerprint(),
        fitted(people, first_id=1).fingerprint(),
        fitted(people, max_codes=1).fingerprint(),
        fitted(crowd(event(0, "LAB//GLU", 5.5))).fingerprint(),
    }
    assert len(prints) == 4 and fitted(people[::-1]).fingerprint() in prints


def test_names_are_unique_and_words_readable():
    people = crowd(
        event(0, "LAB//GLU", 1.0), event(1, "LAB//GLU", None, "POS"), event(2, "LAB//GLU = POS"),
        event(3, "NOTE//a\nb"), event(4, "NOTE//a b"), event(5, "<begin>"), event(6, "K//*"),
    )  # fmt: skip
    people += [[event(0, "LAB//GLU", 9.0), event(1, f"K//{i}")] for i in range(12)]
    vocabulary = fitted(people)
    names = [t.name for t in vocabulary.tokens]
    assert len(set(names)) == len(names)
    by_name = {t.name: t for t in vocabulary.tokens}
    token = by_name["LAB//GLU >= 9"]
    assert (token.text, token.kind) == ("Glucose [Blood] 9 or more", "bin")
    assert (token.bin, token.num_bins, SECTIONS[token.section]) == (1, 2, "measurements")
    assert by_name["LAB//GLU < 9"].bin == 0
    assert by_name["LAB//GLU = POS"].text == "Glucose [Blood]: POS"
    assert by_name["K//**"].text == "K"  # K//* is a code here
    assert all(t.text and "\n" not in t.name + t.text for t in vocabulary.tokens)


def test_words_of_a_rare_code_do_not_describe_a_shared_token():
    people = [[event(0, "DIAGNOSIS//ICD9CM//428")]] * 3
    people += [[event(0, f"DIAGNOSIS//ICD9CM//428{i}")] for i in range(9)]
    statistics = counted(batch_of(*people))
    name = "DIAGNOSIS//ICD9CM//428"
    vocabulary = CodeVocabulary.fit(statistics, MAP, {name: "three people"}, {})
    assert [t.text for t in vocabulary.tokens[ALPHABET:]] == ["DIAGNOSIS ICD9CM 428"]
    parents = {e[1]: ["up"] for events in people for e in events}
    vocabulary = CodeVocabulary.fit(statistics, MAP, {"up": "Heart failure"}, parents)
    assert [t.text for t in vocabulary.tokens[ALPHABET:]] == ["Heart failure"]


def test_births_get_no_token():
    people = crowd(event(0, BIRTH), event(1, "LAB//GLU"))
    vocabulary = fitted(people, first_id=10)
    encoded = vocabulary.encode(batch_of(*people))
    assert encoded.token_N[::2].tolist() == [-1] * 12
    assert encoded.counts["own"] == 12 == sum(encoded.counts.values())
    assert all(e["code"] != BIRTH for e in vocabulary.content["codes"])


def test_the_alphabet():
    vocabulary = fitted([[event(0, "A//b")]], first_id=500)
    tokens = vocabulary.tokens
    assert len(tokens) == ALPHABET  # nothing is fitted on one subject
    assert (vocabulary.pad, vocabulary.begin) == (500, 501)
    assert [tokens[i - 500].text for i in vocabulary.gap_ids[[0, 7, 18]]] == [
        "5 minutes later", "1 day later", "5 years later",
    ]  # fmt: skip
    assert [tokens[i - 500].name for i in vocabulary.age_ids[[0, 63, 120]]] == [
        "<age 0>", "<age 63>", "<age 120>",
    ]  # fmt: skip
    assert [tokens[i - 500].text for i in vocabulary.section_ids] == list(SECTIONS)
    assert len(GAP_EDGES) == len(vocabulary.gap_ids) and (np.diff(GAP_EDGES) > 0).all()
    assert (GAP_EDGES[0], GAP_EDGES[7]) == (300_000_000, 86_400_000_000)
    assert vocabulary.encode(batch_of([event(0, "A//b")])).token_N.tolist() == [
        vocabulary.section_ids[SECTIONS.index("observations")]
    ]


def test_nothing_to_count():
    statistics = CodeStatistics()
    statistics.merge(CodeStatistics())
    vocabulary = CodeVocabulary.fit(statistics, MAP, {}, {})
    assert len(vocabulary) == ALPHABET and summary(vocabulary, statistics) == []


def test_limits_of_texts_must_agree():
    with pytest.raises(ValueError, match="limits of texts"):
        CodeStatistics(text_chars=10).merge(CodeStatistics(text_chars=20))
    with pytest.raises(ValueError, match="`text_chars` must be 10"):
        CodeVocabulary.fit(CodeStatistics(text_chars=10), MAP, {}, {}, text_chars=64)


def test_a_summary_names_no_family_of_few():
    people = [*crowd(event(0, "LAB//GLU", 1.0), event(1, "LAB//GLU", 1.0)), [event(0, "ONE//x")]]
    people += [[event(0, f"TWO//{i}")] for i in range(10)]
    statistics = counted(batch_of(*people))
    rows = summary(CodeVocabulary.fit(statistics, MAP, {}, {}), statistics)
    assert [(r.family, r.codes, r.tokens, r.bins, r.events) for r in rows] == [
        ("LAB", 1, 2, 1, 24), ("TWO", 10, 1, 0, 10), ("(rare)", 1, 1, 0, 1),
    ]  # fmt: skip
    assert [r.section for r in rows] == ["measurements", "observations", ""]
    assert [{k: n for k, n in r.rungs.items() if n} for r in rows] == [
        {"own": 24}, {"family": 10}, {"section": 1},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "coarse", "tokens"), [("eicu-demo", 1.0, 3366), ("mimic-iv-demo", 7.0, 2536)]
)
def test_on_demo_data_few_events_go_to_families_and_sections(name, coarse, tokens):
    if not (DATA / name).is_dir():
        pytest.skip(f"no demo dataset {DATA / name}")
    dataset = MedsDataset.open(DATA / name)
    statistics = counted(*dataset.batches("train"))
    vocabulary = CodeVocabulary.fit(statistics, MAP, dataset.descriptions, dataset.parents)
    counts = Counter()
    for batch in dataset.batches("train"):
        counts += vocabulary.encode(batch).counts
    events = sum(counts[rung] for rung in RUNGS)
    assert events == statistics.num_events
    assert 100 * (counts["family"] + counts["section"]) <= coarse * events
    assert len(vocabulary) == tokens
