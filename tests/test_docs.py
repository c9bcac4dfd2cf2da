"""The documents say what the tree has: tests, files, links, commands, and the one patient."""

import ast
import re
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / folder / "README.md" for folder in ("kernels", "bench", "csrc")),
]
EACH = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
# what a reader of CONTRIBUTING makes
MADE = ("kernels/smbkernels/residual/", "tests/ops/test_scaled_residual.py")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_every_test_that_a_claim_names_exists():
    pages = (ROOT / "docs" / name for name in ("claims.md", "reliability.md"))
    named = re.findall(r"(tests/[\w/]+\.py)::(\w+)", "".join(page.read_text() for page in pages))
    assert len(named) >= 60
    for file in {file for file, _ in named}:
        tree = ast.parse((ROOT / file).read_text())
        there = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
        assert not {name for of, name in named if of == file} - there, file


def test_every_claim_has_a_test_and_a_command():
    for line in (ROOT / "docs" / "claims.md").read_text().splitlines():
        if line.startswith("| ") and not line.startswith(("| claim", "| ---")):
            claim, test, command = (cell.strip() for cell in line.strip("|").split(" | "))
            assert claim and ("::" in test or "by reading" in test), line
            assert re.search(r"pytest|python -m", command), line


@EACH
def test_links_resolve(document):
    for target in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), target
        headings = re.findall(r"^#+ (.*)$", without_code(file.read_text()), re.M)
        anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
        assert not anchor or anchor in anchors, target


@EACH
def test_commands_exist(document):
    for module in re.findall(r"python -m ([\w.]+[\w])", document.read_text()):
        assert find_spec(module) is not None, module
        if find_spec(module).submodule_search_locations:
            assert find_spec(f"{module}.__main__") is not None, module


@EACH
def test_paths_exist(document):
    """Of files and folders of the tree that stand in backticks."""
    text = without_code(document.read_text())
    for path in re.findall(r"`((?:smbfast|kernels|csrc|bench|tests|docs|\.ci)/[\w./-]*)`", text):
        assert path.startswith(MADE) or (ROOT / path).exists(), path


def test_names_in_the_table_of_places_exist():
    """`name` in `file`: a function or class of that file, or a name that it assigns."""
    text = "".join(without_code(d.read_text()) for d in DOCUMENTS)
    pairs = re.findall(r"`(\w+)`(?: in|, in) `([\w/]+\.py)`", text)
    assert len(pairs) >= 8
    for name, file in pairs:
        assert re.search(
            rf"^(def|class|    def) {name}\b|^{name}\b", (ROOT / file).read_text(), re.M
        )


@pytest.mark.parametrize(
    "term",
    [
        "gradient accumulation",
        "micro-batch",
        "activation checkpointing",
        "sequence packing",
        "shared-prefix",
        "EMA teacher",
        "context length",
        "LoRA",
        "MEDS",
        "EHR",
        "not measured: anything on a GPU",
    ],
)
def test_readme_has_the_terms_that_people_search_for(term):
    assert term.lower() in " ".join((ROOT / "README.md").read_text().split()).lower()


@pytest.mark.slow
def test_the_one_patient_is_the_one_that_is_shown(capsys):
    run_path(str(ROOT / "docs" / "one_patient.py"), run_name="__main__")
    said = capsys.readouterr().out
    shown = re.findall(r"^```\n(\[\w+\]\n.*?)\n```", page(), re.S | re.M)
    printed = [block.strip("\n") for block in re.split(r"\n\n(?=\[\w+\]\n)", said)]
    assert [block.splitlines()[0] for block in shown] == [b.splitlines()[0] for b in printed]
    for one, other in zip(shown, printed, strict=True):
        assert one == other


def page() -> str:
    return (ROOT / "docs" / "how-it-works.md").read_text()
