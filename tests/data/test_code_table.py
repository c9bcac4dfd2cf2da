"""The table of codes against plain dictionaries: lookups, repeated rows, and what is refused."""

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smbfast.data.code_table import CodeTable, read_codes
from smbfast.data.parquet import parquet_buffer
from tests.factory import write_table
from tests.refusal import CANARY, refused

NAME = Path("codes.parquet")
TEXTS = st.text(st.characters(codec="utf-8"), max_size=4)


def table(codes: list, descriptions: list, parents: list | None = None) -> pa.Table:
    columns = {
        "code": pa.array(codes, pa.string()),
        "description": pa.array(descriptions, pa.string()),
    }
    if parents is not None:
        columns["parent_codes"] = pa.array(parents, pa.list_(pa.string()))
    return pa.table(columns)


@settings(max_examples=25)
@given(
    st.dictionaries(
        TEXTS, st.tuples(st.none() | TEXTS, st.none() | st.lists(st.none() | TEXTS, max_size=3))
    ),
    st.lists(TEXTS, max_size=5),
)
def test_it_says_what_dictionaries_say(rows: dict, others: list[str]) -> None:
    descriptions = {code: text for code, (text, _) in rows.items() if text}
    names = {
        code: list(dict.fromkeys(n for n in own or () if n is not None))
        for code, (_, own) in rows.items()
    }
    parents = {code: own for code, own in names.items() if own}
    made = table(list(rows), [r[0] for r in rows.values()], [r[1] for r in rows.values()])
    codes = CodeTable.of_table(made, NAME)
    assert dict(codes.descriptions) == descriptions and dict(codes.parents) == parents
    assert len(codes.descriptions) == len(descriptions) and len(codes.parents) == len(parents)
    for code in (*rows, *others):
        assert codes.descriptions.get(code) == descriptions.get(code)
        assert codes.parents.get(code, ()) == parents.get(code, ())
        assert (code in codes.parents) == (code in parents)


def test_rows_of_one_code_are_joined() -> None:
    made = table(
        ["b", "a", "b", "a", "b"],
        [None, "A", "B", "A", "B"],
        [["x"], None, ["y", "x"], [], None],
    )
    codes = CodeTable.of_table(made, NAME)
    assert dict(codes.descriptions) == {"a": "A", "b": "B"}
    assert dict(codes.parents) == {"b": ["x", "y"]}


def test_two_descriptions_of_one_code(tmp_path: Path) -> None:
    made = table(["b", "c", "b", "a", "b", "a"], ["B", CANARY, None, "A", f"not {CANARY}", "A."])
    file = write_table(tmp_path / "metadata" / "codes.parquet", made)
    message = refused(lambda: CodeTable.open(file), file, "one description", "2 such codes")
    assert "rows 3 and 5" in message
    refused(lambda: CodeTable.open(file, tmp_path / "index"), file, "rows 3 and 5")
    assert not list((tmp_path).glob("index/*"))


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.large_string()),
        pa.large_list(pa.string()),
        pa.list_(pa.string(), 2),
        pa.list_(pa.dictionary(pa.int32(), pa.string())),
    ],
)
def test_types_of_parents(kind: pa.DataType) -> None:
    plain = table(["a", "b"], ["A", "B"])
    parents = pa.array([["x", "y"], ["y", "z"]], kind)
    made = plain.append_column("parent_codes", parents)
    assert dict(CodeTable.of_table(made, NAME).parents) == {"a": ["x", "y"], "b": ["y", "z"]}


def test_categories_are_text() -> None:
    made = table(["b", "a", "b"], ["B", None, "B"])
    coded = pa.table({n: made[n].dictionary_encode() for n in made.column_names})
    assert dict(CodeTable.of_table(coded, NAME).descriptions) == {"b": "B"}


def test_codes_are_sorted_and_each_once() -> None:
    names = ["b", "ä", "a", "", "\U0001f600", "\uffff", "b"]
    read = read_codes(NAME, parquet_buffer(table(names, [None] * 7)))
    assert read["code"].to_pylist() == sorted(set(names), key=str.encode)
