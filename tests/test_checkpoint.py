"""What a checkpoint gives back: the next step, bit for bit, and never from a damaged file."""

from pathlib import Path

import pytest
import torch

from smbfast.model.backbone import PatientEncoder
from smbfast.model.target import TargetEncoder, TargetForm
from smbfast.run import checkpoint
from smbfast.run.optim import make_optimizer
from smbfast.run.step import Updater
from smbfast.settings import OptimSettings
from tests.tiny import tiny_encoder


def take_step(encoder: PatientEncoder, updater: Updater, target: TargetEncoder, seed: int) -> None:
    """A step of random gradients, of sizes that differ from step to step."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in encoder.parameters():
        if parameter.requires_grad:
            parameter.grad = (1 + seed) * torch.randn(parameter.shape, generator=generator)
    updater.step(1e-2, target, 0.9)


@pytest.mark.parametrize("form", ["merged", "tracked"])
def test_a_loaded_checkpoint_takes_the_next_step_that_was_saved(form, tmp_path):
    encoder, other = tiny_encoder(lora=True), tiny_encoder(lora=True)
    target = TargetEncoder(encoder, TargetForm(form, rank=1))
    updater = Updater(make_optimizer(encoder, OptimSettings()), clip=1e9)
    for seed in range(3):
        take_step(encoder, updater, target, seed)
    checkpoint.save(tmp_path, 3, encoder, target, updater.optimizer, {"seconds": 1.5}, keep=2)
    newest, _ = checkpoint.latest(tmp_path)
    assert newest is not None and (newest.record["step"], newest.record["seconds"]) == (3, 1.5)
    optimizer = make_optimizer(other, OptimSettings())
    resumed = checkpoint.load(newest, other, optimizer)
    assert resumed is not None
    for seed in range(3, 6):
        take_step(encoder, updater, target, seed)
        take_step(other, Updater(optimizer, clip=1e9), resumed, seed)
    assert all(map(torch.equal, other.parameters(), encoder.parameters()))
    assert resumed.updates == target.updates == 6
    expected = target.state()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state().items())


@pytest.mark.parametrize("name", ["state.safetensors", "record.json"])
def test_one_damaged_bit_is_passed_over(name: str, tmp_path: Path, capsys):
    encoder = tiny_encoder()
    optimizer = make_optimizer(encoder, OptimSettings())
    for step in (1, 2):
        folder = checkpoint.save(tmp_path, step, encoder, None, optimizer, {}, keep=2)
    content = bytearray((folder / name).read_bytes())
    content[-2] ^= 1
    (folder / name).write_bytes(content)
    newest, _ = checkpoint.latest(tmp_path)
    assert newest is not None and newest.record["step"] == 1
    assert "SHA-256" in capsys.readouterr().err
