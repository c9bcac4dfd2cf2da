"""What is set before CUDA starts: in processes of their own, with a GPU that is only said to be."""

import importlib
import os
import signal
import sys

import pytest
import torch

from smbfast.base.runtime import choose_device, stop_on_signals
from tests.rank_server import ranks_give


def case(name: str, variables: dict[str, str]) -> dict:
    """What a process sees that has these variables alone before it imports `runtime`."""
    for variable in [v for v in os.environ if v.endswith("ALLOC_CONF")]:
        del os.environ[variable]
    os.environ.update(variables)
    sys.modules.pop("smbfast.base.runtime")  # it might read the environment then
    runtime = importlib.import_module("smbfast.base.runtime")
    seen: dict[str, object] = {}
    now: list[str] = []

    def start(device: object) -> None:
        matmul = torch.backends.cuda.matmul
        seen["environment"] = {k: v for k, v in os.environ.items() if k.endswith("ALLOC_CONF")}
        seen["reduced"] = matmul.allow_bf16_reduced_precision_reduction

    torch._C._accelerator_setAllocatorSettings = now.append
    torch.cuda.is_available, torch.cuda.device_count = (lambda: True), (lambda: 1)
    torch.cuda.set_device = start  # the first thing that starts CUDA
    device = runtime.choose_device(name)
    initialized = torch.cuda.is_initialized()
    return seen | {"device": device.type, "initialized": initialized, "now": now}


VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
VALUES = ("max_split_size_mb:128", "expandable_segments:False", "")


def chosen(name: str, variables: dict[str, str]) -> dict:
    """The same, in a process of its own."""
    return ranks_give(0, "tests.test_runtime:case", name=name, variables=variables)[0]


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_segments_expand_and_sums_are_fp32_before_cuda_starts(name):
    assert chosen(name, {}) == {
        "environment": {"PYTORCH_ALLOC_CONF": "expandable_segments:True"},
        "reduced": False,
        "device": "cuda",
        "initialized": False,
        "now": ["expandable_segments:True"],
    }


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("value", VALUES)
def test_a_setting_in_the_environment_is_left_as_it_is(variable, value):
    found = chosen("cuda", {variable: value})
    assert found["environment"] == {variable: value} and found["now"] == []
    assert found["reduced"] is False


def test_on_a_cpu_nothing_is_set():
    assert chosen("cpu", {}) == {"device": "cpu", "initialized": False, "now": []}


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_within_a_moment_are_one(first: signal.Signals, monkeypatch: pytest.MonkeyPatch):
    clock = [100.0]
    monkeypatch.setattr("smbfast.base.entry.monotonic", lambda: clock[0])
    with stop_on_signals() as stop:
        assert not stop
        os.kill(os.getpid(), first)
        for clock[0] in (100.0, 103.0, 104.99):  # of the first, not of one another
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.name == first.name
        clock[0] = 105.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
    with stop_on_signals() as stop:
        assert not stop  # a later block begins anew


def test_one_gpu_for_all_processes_of_torchrun_is_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="auto, cuda or cpu under torchrun"):
        choose_device("cuda:1")
    assert choose_device("cpu").type == "cpu"
