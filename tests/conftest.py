"""Settings that hold for every test."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test never waits for a network

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
