"""Settings that hold for every test."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test never waits for a network

import pytest
import torch

if not torch.cuda.is_available():
    # before any kernel is decorated: Triton's interpreter proves their logic on a CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
