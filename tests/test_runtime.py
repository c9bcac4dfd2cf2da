"""What is set before CUDA starts: in processes of their own, with a GPU that is only said to be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import json, os, sys
import torch
from smbfast.base import runtime

seen = {}

def start(device):
    matmul = torch.backends.cuda.matmul
    seen["environment"] = {k: v for k, v in os.environ.items() if k.endswith("ALLOC_CONF")}
    seen["reduced"] = matmul.allow_bf16_reduced_precision_reduction

now = []
torch._C._accelerator_setAllocatorSettings = now.append
torch.cuda.is_available, torch.cuda.device_count = (lambda: True), (lambda: 1)
torch.cuda.set_device = start  # the first thing that starts CUDA
device = runtime.choose_device(sys.argv[1])
initialized = torch.cuda.is_initialized()
print(json.dumps(seen | {"device": device.type, "initialized": initialized, "now": now}))
"""


def chosen(name: str, **variables: str) -> dict:
    own = {k: v for k, v in os.environ.items() if not k.endswith("ALLOC_CONF")}
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, name],
        env={**own, "PYTHONPATH": path, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_segments_expand_and_sums_are_fp32_before_cuda_starts(name):
    found = chosen(name)
    assert found == {
        "environment": {"PYTORCH_ALLOC_CONF": "expandable_segments:True"},
        "reduced": False,
        "device": "cuda",
        "initialized": False,
        "now": ["expandable_segments:True"],
    }


@pytest.mark.parametrize("variable", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
@pytest.mark.parametrize("value", ["max_split_size_mb:128", "expandable_segments:False", ""])
def test_a_setting_in_the_environment_is_left_as_it_is(variable, value):
    found = chosen("cuda", **{variable: value})
    assert found["environment"] == {variable: value} and found["now"] == []
    assert found["reduced"] is False


def test_on_a_cpu_nothing_is_set():
    found = chosen("cpu")
    assert found == {"device": "cpu", "initialized": False, "now": []}
