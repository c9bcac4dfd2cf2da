"""The rules of the house that a reader relies on: imports go down, names do not collide."""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from smbkernels.catalog import BACKENDS

ROOT = Path(__file__).resolve().parents[1]
FLOORS = [
    {"smbkernels"},
    {"base", "configs"},
    {"settings", "batch", "statistics"},
    {"data", "model"},
    {"judging", "labelling"},
    {"objective", "reference", "simulation", "probing", "reporting"},
    {"run"},
    {"serving", "experiments"},
    {"estimator"},
    {"train", "check", "prepare", "simulate", "embed", "probe", "report"}
    | {"tasks", "compare", "experiment", "commands", "push"},
]  # units of a floor do not import each other


def floor_of(name: str) -> int:
    return next(i for i, names in enumerate(FLOORS) if name in names)


@cache
def text_of(file: Path) -> str:
    return file.read_text()


@cache
def nodes_of(file: Path) -> list[ast.AST]:
    """Of the whole syntax tree, parsed once for all tests."""
    return list(ast.walk(ast.parse(text_of(file))))


@pytest.fixture(scope="module", autouse=True)
def _forgotten() -> Iterator[None]:
    """Other files have no use for the trees."""
    yield
    nodes_of.cache_clear()


def named(called: ast.AST) -> str:
    """`name`, or `name.attribute`; of any other expression nothing."""
    if isinstance(called, ast.Name):
        return called.id
    plain = isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name)
    return f"{called.value.id}.{called.attr}" if plain else ""


@cache
def imported(file: Path) -> frozenset[str]:
    found = set()
    for node in nodes_of(file):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{a.name}" for a in node.names}
    return frozenset(found)


def unit(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] == "smbkernels":
        return "smbkernels"
    known = set().union(*FLOORS)
    return parts[1] if parts[0] == "smbfast" and len(parts) > 1 and parts[1] in known else None


@pytest.mark.parametrize(
    "file", sorted((ROOT / "smbfast").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_imports_go_down(file):
    parts = file.relative_to(ROOT / "smbfast").with_suffix("").parts
    if parts in (("__init__",), ("__main__",)):
        return
    own = parts[0]
    for module in imported(file):
        other = unit(module)
        if other is None or other == own:
            continue
        assert floor_of(other) < floor_of(own), f"{file.name} imports {module}"


def test_commands_are_thin():
    """Arguments, errors, one call; what they do lies in the rooms."""
    for name in FLOORS[-1]:
        assert len((ROOT / "smbfast" / f"{name}.py").read_text().splitlines()) < 120, name


def test_every_module_has_a_floor():
    names = {
        p.stem for p in (ROOT / "smbfast").iterdir() if p.name[0] != "_" and p.name != "py.typed"
    }
    assert names == set().union(*FLOORS) - {"smbkernels"}


def test_kernels_know_torch_alone():
    """And references never import an implementation: those are reached through the registry."""
    allowed = {"torch", "triton", "smbkernels", "flash_attn"}
    allowed |= set(sys.stdlib_module_names)
    implementations = {name for names in BACKENDS.values() for name in names}
    implementations |= {"kernels", "engines", "products", "triton_platform", "cpp_build"}
    for file in (ROOT / "kernels" / "smbkernels").rglob("*.py"):
        modules = imported(file)
        assert {m.split(".")[0] for m in modules} <= allowed, file.name
        if file.name == "op.py":
            for module in modules:
                parts = module.split(".")
                assert parts[0] != "triton" and not implementations & set(parts[1:3]), file


def test_only_one_file_knows_transformers_models():
    for file in (ROOT / "smbfast").rglob("*.py"):
        names = imported(file)
        if any(n.startswith("transformers.AutoModel") for n in names):
            assert file.name == "backbone.py", file


def test_the_folder_kernels_is_no_package():
    """It would shadow the Hugging Face package `kernels`, which transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    spec = find_spec("kernels")
    assert spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(ROOT)


def test_nothing_is_unpickled():
    banned = {"pickle", "torch.load", "joblib", "dill"}
    for folder in ("smbfast", "kernels", "bench"):
        for file in (ROOT / folder).rglob("*.py"):
            called = {named(n.func) for n in nodes_of(file) if isinstance(n, ast.Call)}
            assert not banned & (called | imported(file)), file
            assert "allow_pickle=True" not in text_of(file)


def test_no_module_s_namespace_is_written():
    """Parts that are swapped inside `__dict__` while they run are invisible to torch.compile."""
    for file in (ROOT / "smbfast").rglob("*.py"):
        for node in nodes_of(file):
            assert not (isinstance(node, ast.Attribute) and node.attr == "__dict__"), file
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
                assert "vars(" not in ast.unparse(node.value), file


def test_the_specification_stands_alone():
    """A mistake in the fast path must not be in what judges it, and the other way round."""
    for name, other in (("objective", "reference"), ("reference", "objective")):
        modules = imported(ROOT / "smbfast" / f"{name}.py")
        assert not any(module.startswith(f"smbfast.{other}") for module in modules)
    for module in imported(ROOT / "tests" / "second_oracle.py"):
        assert not module.startswith(("smbfast", "smbkernels", "tests"))


def test_the_training_loop_can_be_read_at_once():
    """At most 120 lines and 30 names; ruff holds its branches."""
    tree = ast.parse((ROOT / "smbfast" / "run" / "loop.py").read_text())
    [loop] = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "_train"]
    assert loop.end_lineno - loop.lineno + 1 <= 120
    stored = [n for n in ast.walk(loop) if isinstance(n, ast.Name)]
    assert len({n.id for n in stored if isinstance(n.ctx, ast.Store)}) <= 30


def test_a_step_is_written_once():
    """Training, its preflight, the self-check and the benchmarks call `smbfast.run.step`."""
    texts = [f.read_text() for d in ("smbfast", "bench") for f in (ROOT / d).rglob("*.py")]
    assert sum(text.count("clip_grad_norm_") for text in texts) == 1
    assert sum(text.count("autograd.backward(") for text in texts) <= 2  # and traced memory


def test_names_say_a_type_or_a_unit():
    """What was told, found or kept says neither what it is nor where it comes from."""
    banned = {"told", "found", "some", "kept", "apart"}
    for folder in ("smbfast", "kernels", "bench"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in nodes_of(file):
                if isinstance(node, ast.arg):
                    assert node.arg.strip("_") not in banned, f"{file}:{node.lineno}"
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    assert node.id.strip("_") not in banned, f"{file}:{node.lineno}"


# closed forms of a backward, which are read beside their formula, and the loop of the training
LONG_FUNCTIONS = {"by_hand", "one_pass", "_train"}


def test_no_file_or_function_is_too_long_to_read():
    """Triton kernels have no calls to cut them by: they are only held by the length of a file."""
    too_long = []
    for folder in ("smbfast", "kernels", "bench"):
        for file in (ROOT / folder).rglob("*.py"):
            total = len(text_of(file).splitlines())
            if total > 600:
                too_long.append(f"{file.relative_to(ROOT)}: {total} lines")
            for node in nodes_of(file):
                if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    continue
                is_kernel = any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
                num_lines = node.end_lineno - node.lineno + 1
                if num_lines > 60 and not is_kernel and node.name not in LONG_FUNCTIONS:
                    too_long.append(f"{file.relative_to(ROOT)}: {node.name}, {num_lines} lines")
    assert not too_long, "\n".join(["", *too_long])
