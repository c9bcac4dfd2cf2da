"""python -m bench.checkpoint: how long the loop stops for a checkpoint, against one plain copy.

The state of a model that is trained whole, with both moments and a merged target: what a run copies
and then writes in the background. The plain copy is `copy_` of each of the same tensors into
memory that is there. The two take turns, and of each the least time counts: other work on the
machine only adds. The stop is all that the loop waits for when no other write is under way. Beside
them stand the write, and a whole save that is waited for.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

from bench import records
from bench.timing import Device
from smbfast.base.config import Settings, command_line
from smbfast.base.runtime import choose_device
from smbfast.model.backbone import PatientEncoder
from smbfast.model.memory import checkpoint_bytes
from smbfast.model.target import TargetEncoder, TargetForm
from smbfast.run import checkpoint
from smbfast.run.background import Buffer, Writer
from smbfast.run.optim import make_optimizer, trained
from smbfast.settings import OptimSettings

PROG = "python -m bench.checkpoint"
BAR = 2.0  # plain copies that the loop may stop for
# width, layers and vocabulary: the preset `tiny`, and a state of about 500 MB
SIZES = {"tiny": (64, 2, 2048), "large": (512, 8, 8192)}
Times = dict[str, list[float]]


class CheckpointBench(Settings):
    """Measure how long a training loop stops for a checkpoint that is written in the background.

    A stop of more than two plain copies of the state ends the command with status 1.
    """

    epilog: ClassVar[str] = """Examples

  Both sizes, appended to bench/results/checkpoint.jsonl:
    python -m bench.checkpoint --save"""

    only: list[str] = Field(
        [], description="Sizes to measure, of tiny and large. If empty, both are measured."
    )
    device: Device = Field(
        "auto", description="Device to measure on. `auto` is the GPU, or the CPU if there is none."
    )
    times: int = Field(15, ge=1, description="Times that each is measured; the least counts.")
    threads: int = Field(1, ge=1, description="Threads of the CPU.")
    folder: str | None = Field(
        None, description="Folder in which a temporary one is made; `none` is the system's."
    )
    save: bool = Field(False, description="Append the results to bench/results/checkpoint.jsonl.")


class State:
    """What a run holds after its first step."""

    def __init__(self, size: str, device: torch.device) -> None:
        width, layers, vocabulary = SIZES[size]
        config = Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=max(1, width // 64),
            num_key_value_heads=max(1, width // 128),
            head_dim=64,
            intermediate_size=3 * width,
            tie_word_embeddings=True,
        )
        lm = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        self.encoder = PatientEncoder(lm, 2).to(device)
        self.target = TargetEncoder(self.encoder, TargetForm("merged"))
        self.optimizer = make_optimizer(self.encoder, OptimSettings())
        for parameter in trained(self.encoder).values():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.bytes = checkpoint_bytes(self.encoder, TargetForm("merged"))

    def tensors(self) -> list[Tensor]:
        """All that a checkpoint copies."""
        own = list(trained(self.encoder).values())
        moments = [self.optimizer.state[p][key] for p in own for key in ("exp_avg", "exp_avg_sq")]
        return [*(p.detach() for p in own), *moments, *self.target.state().values()]

    def taken(self, buffer: Buffer) -> checkpoint.Snapshot:
        """Copy it as a run does."""
        return checkpoint.taken(1, self.encoder, self.target, self.optimizer, {}, buffer)


def measured(state: State, device: torch.device, folder: Path, times: int) -> Times:
    """Return the seconds of each: the plain copy, the stop, the write, and a save all in all."""
    pinned = device.type == "cuda"
    plain = [torch.empty_like(t, device="cpu", pin_memory=pinned).zero_() for t in state.tensors()]
    seconds: Times = {"plain copy": [], "stop": [], "write": [], "whole save": []}

    def timed(name: str, run: Callable[[], Any]) -> None:
        if pinned:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        seconds[name].append(time.perf_counter() - start)

    def copied() -> None:
        for to, tensor in zip(plain, state.tensors(), strict=True):
            to.copy_(tensor, non_blocking=True)
        if pinned:
            torch.cuda.synchronize(device)

    with Writer(Buffer(state.bytes, device)) as writer:

        def stopped() -> None:
            writer.wait()
            snapshot = state.taken(writer.buffer)
            writer.begin(lambda: checkpoint.write(folder, snapshot, 1))

        for number in range(times + 1):
            timed("plain copy", copied)
            timed("stop", stopped)
            timed("write", writer.wait)
            if number % 5 == 0:
                parts = (1, state.encoder, state.target, state.optimizer, {}, 1)
                timed("whole save", lambda parts=parts: checkpoint.save(folder, *parts))
    return {name: values[1:] or values for name, values in seconds.items()}  # the first warms up


def main(argv: list[str] | None = None) -> None:
    """The command: measure each size, print, judge, save."""
    settings = command_line(CheckpointBench, argv, prog=PROG)
    device = choose_device(settings.device)
    torch.set_num_threads(settings.threads)
    rows, table = [], [["state", "MB", "plain copy", "stop", "copies", "write", "whole save"]]
    for size in settings.only or SIZES:
        stamp = records.stamp("checkpoint", device.type)
        state = State(size, device)
        with tempfile.TemporaryDirectory(dir=settings.folder) as name:
            seconds = measured(state, device, Path(name), settings.times)
        least = {name: min(values) for name, values in seconds.items()}
        copies = least["stop"] / least["plain copy"]
        rows.append(stamp | {"size": size, "bytes": state.bytes, "copies": round(copies, 2)})
        rows[-1] |= {
            "times": settings.times,
            "ms": {n: round(1e3 * s, 3) for n, s in least.items()},
        }
        cells = [f"{1e3 * least[name]:,.2f} ms" for name in ("plain copy", "stop")]
        more = [f"{1e3 * least[name]:,.1f} ms" for name in ("write", "whole save")]
        table.append([size, f"{state.bytes / 1e6:,.1f}", *cells, f"{copies:.2f}", *more])
    print(records.columns(table))
    if settings.save:
        records.append("checkpoint", rows)
    slow = [row["size"] for row in rows if row["copies"] > BAR]
    if slow:
        raise SystemExit(f"{PROG}: the loop stops for more than {BAR:g} copies: {', '.join(slow)}")


if __name__ == "__main__":
    main()
