"""What is set before CUDA starts: in processes of their own, with a GPU that is only said to be."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from smbfast.base.runtime import choose_device, stop_on_signals

ROOT = Path(__file__).resolve().parents[1]
# a fork for each case: what one sets is not there in the next. What `runtime` imports is
# imported once, before them; itself in each, as it might read the environment then
PROGRAM = """
import json, os, sys
import smbkernels.matmul.products, torch
from smbfast.base import entry, helpers

def case(name, variables):
    os.environ.update(variables)
    from smbfast.base import runtime

    seen, now = {}, []

    def start(device):
        matmul = torch.backends.cuda.matmul
        seen["environment"] = {k: v for k, v in os.environ.items() if k.endswith("ALLOC_CONF")}
        seen["reduced"] = matmul.allow_bf16_reduced_precision_reduction

    torch._C._accelerator_setAllocatorSettings = now.append
    torch.cuda.is_available, torch.cuda.device_count = (lambda: True), (lambda: 1)
    torch.cuda.set_device = start  # the first thing that starts CUDA
    device = runtime.choose_device(name)
    initialized = torch.cuda.is_initialized()
    return seen | {"device": device.type, "initialized": initialized, "now": now}

for name, variables in json.load(sys.stdin):
    child = os.fork()
    if not child:
        print(json.dumps(case(name, variables)), flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{name}, {variables}: failed")
"""
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
VALUES = ("max_split_size_mb:128", "expandable_segments:False", "")
CASES: list[tuple[str, dict[str, str]]] = [
    *((name, {}) for name in ("auto", "cuda", "cuda:0", "cpu")),
    *(("cuda", {variable: value}) for variable in VARIABLES for value in VALUES),
]


@pytest.fixture(scope="module")
def chosen() -> dict[str, dict]:
    """What each case saw, by the case."""
    own = {k: v for k, v in os.environ.items() if not k.endswith("ALLOC_CONF")}
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**own, "PYTHONPATH": path},
        input=json.dumps(CASES),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = map(json.loads, done.stdout.splitlines())
    return {str(case): one for case, one in zip(CASES, seen, strict=True)}


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_segments_expand_and_sums_are_fp32_before_cuda_starts(chosen, name):
    assert chosen[str((name, {}))] == {
        "environment": {"PYTORCH_ALLOC_CONF": "expandable_segments:True"},
        "reduced": False,
        "device": "cuda",
        "initialized": False,
        "now": ["expandable_segments:True"],
    }


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("value", VALUES)
def test_a_setting_in_the_environment_is_left_as_it_is(chosen, variable, value):
    found = chosen[str(("cuda", {variable: value}))]
    assert found["environment"] == {variable: value} and found["now"] == []
    assert found["reduced"] is False


def test_on_a_cpu_nothing_is_set(chosen):
    assert chosen[str(("cpu", {}))] == {"device": "cpu", "initialized": False, "now": []}


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
