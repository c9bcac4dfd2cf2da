"""The registry: what it chooses, what it refuses, and that compilation goes through it."""

import inspect
import logging
import runpy
import subprocess
import sys
from importlib import import_module

import pytest
import smbkernels
import torch
from smbkernels import catalog, operation, registry
from smbkernels.operation import Backend, op
from smbkernels.registry import OPS, use
from torch.utils.flop_counter import FlopCounterMode, flop_registry

PUBLIC = sorted(OPS)


def make_op(monkeypatch, *backends: Backend):
    """An operation of this test's own, in a registry of its own."""

    @op(*backends, flops=lambda x: x.numel())
    def doubled(x: torch.Tensor) -> torch.Tensor:
        """2 x."""
        return 2 * x

    names = {"doubled": tuple(b.name for b in backends)}
    monkeypatch.setattr(catalog, "BACKENDS", names)
    monkeypatch.setattr(registry, "OPS", {"doubled": doubled})
    return doubled


class Module:
    """Stands for a module of implementations."""

    def __init__(self, reason: str | None, factor: float = 2.0) -> None:
        self.reason, self.factor, self.calls = reason, factor, 0

    def missing(self, device: str) -> str | None:
        return self.reason

    def doubled(self, x):
        self.calls += 1
        return self.factor * x


@pytest.fixture
def modules(monkeypatch):
    """Modules that the registry finds by name."""
    found: dict[str, Module] = {}
    real = operation.import_module

    def find(name: str):
        module = found.get(name.removeprefix("smbkernels."))
        return real(name) if module is None else module

    monkeypatch.setattr(operation, "import_module", find)
    return found


@pytest.mark.parametrize("name", PUBLIC)
def test_every_operation_is_documented_and_counted(name):
    function = getattr(smbkernels, name)
    assert function.__doc__ and function.reference.__doc__ == function.__doc__
    assert callable(OPS[name].flops)
    for entry in OPS[name].backends:
        module = import_module(f"smbkernels.{entry.module}")
        own, wanted = inspect.signature(getattr(module, name)), inspect.signature(function)
        assert list(own.parameters) == list(wanted.parameters), entry
        kinds = [(p.kind, p.default) for p in own.parameters.values()]
        assert kinds == [(p.kind, p.default) for p in wanted.parameters.values()], entry


def test_every_custom_op_has_a_flop_formula():
    """Without one, it would count as zero where the reference's products are counted."""
    for entry in OPS.values():
        for backend in entry.backends:
            import_module(f"smbkernels.{backend.module}")
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("smb::")]
    assert len(names) >= 8
    counted = {str(packet) for packet in flop_registry}
    for name in names:
        assert name.split("::")[1] in {n.split(".")[-1] for n in counted}, name


def test_the_first_that_can_run_and_fits_is_chosen(monkeypatch, modules):
    first, second = Module("broken here"), Module(None, factor=20.0)
    modules.update(first=first, second=second)
    small = lambda x: None if x.numel() < 3 else "too many elements"  # noqa: E731
    doubled = make_op(
        monkeypatch,
        Backend("first", "first", ("cpu",)),
        Backend("second", "second", ("cpu",), small),
    )
    assert doubled(torch.ones(2)).tolist() == [20, 20]
    assert doubled(torch.ones(3)).tolist() == [2, 2, 2]  # does not fit: the reference
    assert (first.calls, second.calls) == (0, 1)


def test_a_backend_of_another_device_is_not_chosen(monkeypatch, modules):
    modules.update(gpu=Module(None, factor=20.0))
    doubled = make_op(monkeypatch, Backend("gpu", "gpu", ("cuda",)))
    assert doubled(torch.ones(1)).tolist() == [2]
    assert doubled.on("gpu")(torch.ones(1)).tolist() == [20]


def test_what_cannot_run_is_said_once(monkeypatch, modules, caplog):
    monkeypatch.setattr(operation, "_reported", set())
    modules.update(first=Module("no compiler"))
    doubled = make_op(monkeypatch, Backend("first", "first", ("cpu",)))
    with caplog.at_level(logging.WARNING, logger="smbkernels"):
        for _ in range(3):
            doubled(torch.ones(1))
            registry.load("cpu")
    assert caplog.messages == ["doubled: first is not used on cpu: no compiler"]


def test_an_explicit_choice_never_falls_back(monkeypatch, modules):
    fits = lambda x: None if x.numel() < 3 else f"3 elements at most, got {x.numel()}"  # noqa: E731
    modules.update(a=Module("no CUDA device"), b=Module(None))
    doubled = make_op(monkeypatch, Backend("a", "a", ("cpu",)), Backend("b", "b", ("cpu",), fits))
    with pytest.raises(ValueError, match="doubled cannot run on a: no CUDA device"):
        doubled.on("a")(torch.ones(1))
    with pytest.raises(ValueError, match="cannot run on b: 3 elements at most, got 4"):
        doubled.on("b")(torch.ones(4))
    with pytest.raises(ValueError, match="must be one of a, b, torch, got 'c'"):
        doubled.on("c")
    with use("a"), pytest.raises(ValueError, match="no CUDA device"):
        doubled(torch.ones(1))
    with pytest.raises(ValueError, match="backend of doubled must be one of a, b, torch"):
        with use("metal"):
            pass
    with pytest.raises(ValueError, match="operation must be one of doubled, got 'tripled'"):
        with use(tripled="a"):
            pass


def test_the_device_is_that_of_the_first_tensor_wherever_it_stands():
    x = torch.ones(1, device="meta")
    for args, kwargs in (((x,), {}), (([x],), {}), ((), {"tau": 0.5, "x": x}), ((True, [x]), {})):
        assert operation.device_of(args, kwargs) == "meta"
    assert operation.device_of((), {}) == "cpu"
    data = {"prediction_MD": torch.ones(1, 2), "target_TD": torch.ones(1, 2)}
    row_M = torch.zeros(1, dtype=torch.long)
    assert smbkernels.masked_jepa_mse(scale=0.5, row_M=row_M, **data) > 0


def test_use_is_undone_and_nests(monkeypatch, modules):
    modules.update(a=Module(None, factor=20.0), b=Module(None, factor=200.0))
    doubled = make_op(monkeypatch, Backend("a", "a", ("cpu",)), Backend("b", "b", ("cpu",)))
    one = torch.ones(1)
    assert float(doubled(one)) == 20
    with use("torch"):
        assert float(doubled(one)) == 2
        with use(doubled="b"):
            assert float(doubled(one)) == 200
            with use("auto", doubled="auto"):
                assert float(doubled(one)) == 20
        with use(doubled="auto"):
            assert float(doubled(one)) == 20
        with use("torch", doubled="auto"):
            assert float(doubled(one)) == 20
        assert float(doubled(one)) == 2
    with pytest.raises(RuntimeError), use("torch"):
        raise RuntimeError
    assert float(doubled(one)) == 20
    assert float(doubled.reference(one)) == float(doubled.on("torch")(one)) == 2


def test_a_compiled_function_follows_the_choice():
    smbkernels.load("cpu")

    @torch.compile(fullgraph=True, backend="eager")
    def loss(prediction_MD, target_TD, row_M):
        return smbkernels.masked_jepa_mse(prediction_MD, target_TD, row_M)

    data = torch.randn(4, 8), torch.randn(6, 8), torch.tensor([0, 5, 2, 2])
    expected = smbkernels.masked_jepa_mse.reference(*data)
    torch.testing.assert_close(loss(*data), expected)
    with use("torch"):
        assert torch.equal(loss(*data), expected)
    with use(masked_jepa_mse="triton"):
        if registry.OPS["masked_jepa_mse"].status("cpu")["triton"] == "ok":
            torch.testing.assert_close(loss(*data), expected)


def test_flops_of_an_operation_are_seen_by_the_counter():
    hidden, weight = torch.randn(4, 8), torch.randn(10, 8)
    with FlopCounterMode(display=False) as counter:
        smbkernels.linear_cross_entropy(hidden, weight, torch.zeros(4, dtype=torch.long))
    flops = smbkernels.linear_cross_entropy.flops(hidden, weight, torch.zeros(4))
    assert counter.get_total_flops() == flops == 2 * 4 * 8 * 10


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_table_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["smbkernels", "--device", "cpu"])
    runpy.run_module("smbkernels", run_name="__main__")
    shown = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if line}
    for name in PUBLIC:
        assert rows[name][-1] == "ok", shown
    header = rows["operation"]
    assert {"triton", "cpp", "varlen", "sdpa", "fused", "torch"} <= set(header)
    assert len(header) == len({*header})


def test_the_catalog_refuses_what_use_refuses_and_imports_no_torch():
    """A reader of settings checks names before it pays for the import of torch."""
    code = """
import sys
from smbkernels.catalog import BACKENDS, check_choice
check_choice("torch", {"timeline_attention": "sdpa", "lora_linear": "auto"})
check_choice(None, {})
for choice in ("metal", {}), (None, {"tripled": "cpp"}), ("auto", {"lora_linear": "sdpa"}):
    try:
        check_choice(*choice)
    except ValueError as error:
        print(error)
assert "torch" not in sys.modules, "torch was imported"
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    expected = []
    for everywhere, by_op in (
        ("metal", {}),
        (None, {"tripled": "cpp"}),
        ("auto", {"lora_linear": "sdpa"}),
    ):
        with pytest.raises(ValueError) as refused, use(everywhere, **by_op):
            pass
        expected.append(str(refused.value))
    assert shown.stdout.splitlines() == expected
    assert expected[2] == "backend of lora_linear must be one of fused, triton, torch, got 'sdpa'"


def test_a_name_of_the_package_is_the_operation_whatever_was_imported_first():
    code = """
import smbkernels.lora.op, smbkernels.attention
from smbkernels import Segments, lora_linear, timeline_attention
assert lora_linear is smbkernels.lora.op.lora_linear
assert timeline_attention is smbkernels.attention.timeline_attention
assert Segments is smbkernels.attention.Segments
assert all(hasattr(smbkernels, name) for name in smbkernels.__all__)
assert not hasattr(smbkernels, "tripled")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
