"""Checkpoints in the background: the file, what is not finite, and a writer that fails or hangs.

What a run of training does with them is row B1 of `tests.reliability`.
"""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from smbfast.run import background
from smbfast.run.background import Buffer, Writer

CPU = torch.device("cpu")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def test_a_file_is_the_one_that_safetensors_writes(tmp_path: Path):
    tensors = {
        **{f"of.{dtype}".replace(".", "_"): torch.randn(3, 5).to(dtype) for dtype in FLOATS},
        "counters": torch.arange(3),
        "remainder": torch.ones(5, dtype=torch.int16),
        "b": torch.randn(4, 6).T[:, 1:],
        "a": torch.randn(2, 3),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.0),
    }
    own, theirs, buffer = tmp_path / "own", tmp_path / "theirs", Buffer(0, CPU)
    for names in (list(tensors)[:4], list(tensors), list(tensors)[3:]):  # another layout each time
        part = {name: tensors[name] for name in names}
        buffer.copy(part)
        buffer.write(own)
        save_file({name: tensor.contiguous() for name, tensor in part.items()}, theirs)
        assert own.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_not_finite_is_seen_wherever_it_is(dtype: torch.dtype):
    buffer = Buffer(0, CPU)
    for size in (1, 7, background._SERIAL, background._SERIAL + 3):
        tensors = {"counters": torch.arange(2), "one": torch.randn(9).to(dtype)}
        tensors["model.two"] = torch.randn(size).to(dtype)
        buffer.copy(tensors)
        buffer.require_finite()
        for place in {0, size // 2, size - 1}:
            for value in (float("nan"), float("inf"), -float("inf")):
                other = tensors["model.two"].clone()
                other[place] = value
                buffer.copy({**tensors, "model.two": other})
                with pytest.raises(ValueError, match=r"model\.two must be finite to be saved"):
                    buffer.require_finite()


def fails() -> None:
    raise OSError(28, "No space left on device", "checkpoints")


def test_a_write_that_fails_is_raised_once_and_the_next_one_goes_on():
    done = []
    with Writer(Buffer(0, CPU)) as writer:
        writer.begin(fails)
        with pytest.raises(OSError, match="No space left"):
            writer.begin(lambda: done.append("never"))
        assert not writer.has_failed
        writer.begin(lambda: done.append("next"))
        writer.wait()
    assert done == ["next"]
    with pytest.raises(OSError, match="No space left"), Writer(Buffer(0, CPU)) as writer:
        writer.begin(fails)  # nobody asks before the end


def test_a_loop_that_fails_waits_for_the_write_and_says_what_became_of_it(capsys):
    goes_on, done = threading.Event(), []

    def written() -> None:
        goes_on.wait(60)
        done.append("written")

    threading.Timer(0.05, goes_on.set).start()
    with pytest.raises(KeyError), Writer(Buffer(0, CPU)) as writer:
        writer.begin(written)
        raise KeyError
    assert done == ["written"]
    with pytest.raises(KeyError), Writer(Buffer(0, CPU)) as writer:
        writer.begin(fails)
        raise KeyError
    assert "the checkpoint failed (No space left on device" in capsys.readouterr().err


def test_an_interrupt_does_not_wait_for_a_write_that_hangs(monkeypatch):
    monkeypatch.setattr(background, "PATIENCE", 0.01)
    never = threading.Event()
    with pytest.raises(KeyboardInterrupt), Writer(Buffer(0, CPU)) as writer:
        writer.begin(lambda: never.wait(60))
        raise KeyboardInterrupt
    never.set()


def test_a_rank_is_heard_while_safetensors_writes(tmp_path: Path):
    pipe = tmp_path / "state.safetensors"
    os.mkfifo(pipe)  # who opens it to write waits for a reader
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)  # in the system: Python answers nothing while its lock is held
        tensors = {"a": torch.zeros(1 << 18)}
        threading.Thread(target=save_file, args=(tensors, pipe), daemon=True).start()
        time.sleep(0.2)  # comes back once the lock is free
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
