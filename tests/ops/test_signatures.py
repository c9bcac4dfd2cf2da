"""Each operation writes its list of arguments at most four times, its reference among them."""

import ast
import inspect
from pathlib import Path

import pytest
import smbkernels
from smbkernels.registry import OPS

SOURCES = Path(smbkernels.__file__).parent
# a launch takes the table in place of the segments it was made from
SAME = {"table_S6": "segments", "host_S6": "segments"}


def writings(names: set[str]) -> list[str]:
    """Functions with 5 arguments of these names, or all but one where there are 5 or fewer."""
    least = min(5, len(names) - 1)
    functions = []
    for file in sorted(SOURCES.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                if len(names & {SAME.get(a.arg, a.arg) for a in arguments}) >= least:
                    functions.append(f"{file.relative_to(SOURCES)}:{node.lineno} {node.name}")
    return functions


@pytest.mark.parametrize("name", sorted(OPS))
def test_a_signature_is_written_at_most_four_times(name):
    functions = writings(set(inspect.signature(OPS[name]).parameters))
    assert 2 <= len(functions) <= 4, functions
