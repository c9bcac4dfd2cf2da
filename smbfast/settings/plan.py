"""Settings of a plan: which GPUs, how much data, figures that take the place of assumed ones."""

import math
from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field, field_validator

from smbfast.base.config import Settings, joined


@dataclass(frozen=True)
class Gpu:
    """Nominal figures of a GPU."""

    name: str
    flops: float  # bf16 FLOP/s of dense products on tensor cores
    bandwidth: float  # bytes/s of its memory
    memory: float  # bytes


def _gpu(name: str, teraflops: float, gigabytes: float, gibibytes: float) -> Gpu:
    return Gpu(name, teraflops * 1e12, gigabytes * 1e9, gibibytes * 2**30)


# of the vendor's data sheets; memory as nvidia-smi reports it
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("b200", 2250, 8000, 179),
        _gpu("h200", 989, 4800, 140.4),
        _gpu("h100", 989, 3350, 79.6),
        _gpu("a100", 312, 2039, 80),
        _gpu("a100-40", 312, 1555, 40),
        _gpu("l40s", 362, 864, 45),
        _gpu("rtx4090", 165, 1008, 24),
        _gpu("l4", 121, 300, 22.5),
    )
}


class PlanSettings(Settings):
    """A plan before the bill: time, memory and disk of a run on GPUs that need not be here.

    If one of these keys is given, `check` neither prepares data nor loads a model. It reads the
    settings of the run, config.json of the backbone and, if the data are prepared, their shards.
    FLOPs and bytes are counted; the rates at which GPUs work are assumed, and each assumption is
    listed with its source and the key that changes it.
    """

    epilog: ClassVar[str] = """Examples

  What 20e9 events cost on 64 H200, and ten and a hundred times as many:
    python -m smbfast.check lora --model.path=Qwen3-8B --data.path=MEDS_FOLDER \\
        --data.prepared=shards --gpus=64 --gpu=h200 --events=20e9

  The same on GPUs that have no name here, at 40 % of their nominal products:
    python -m smbfast.check lora --model.path=Qwen3-8B --data.path=MEDS_FOLDER \\
        --gpus=16 --gpu=500,3000,96 --events=1e9 --products=0.4"""

    gpus: int = Field(1, ge=1, description="Number of GPUs that train together, one process each.")
    gpu: str = Field(
        "h200",
        description=f"GPU by its name ({', '.join(GPUS)}), or three nominal numbers with commas "
        "between them: TFLOP/s of dense bf16 products, GB/s of its memory, GiB of memory.",
    )
    events: float | None = Field(
        None,
        gt=0,
        description="Number of events of the training split that the plan is for. `none` means "
        "those of the prepared data.",
    )
    subjects: float | None = Field(
        None,
        gt=0,
        description="Number of patients that have these events; it gives the length of a record, "
        "where no data are prepared. `none` means as many events a patient as the prepared data "
        "have, and without those 4,000 events each.",
    )
    times: list[float] = Field(
        [1.0, 10.0, 100.0],
        description="Multiples of the events, one column of the table each.",
    )
    epochs: float = Field(1.0, gt=0, description="Number of times that training reads each window.")
    tokens_an_event: float | None = Field(
        None,
        gt=0,
        description="Tokens of training windows over events. `none` means what the prepared shards "
        "have, and without them what the demo datasets have in the format of the run.",
    )
    batch: int | None = Field(
        None,
        ge=1,
        description="Windows of an optimizer step, all GPUs together. `none` means optim.batch, or "
        "8 for each GPU if optim.batch has fewer windows than there are GPUs.",
    )
    products: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of the nominal FLOP/s that matrix products of the backbone reach. "
        "`none` means the assumed 0.73.",
    )
    attention: tuple[float, float] | None = Field(
        None,
        description="Shares of the nominal FLOP/s that attention reaches, forward and backward. "
        "`none` means the assumed 0.42,0.22 of the project's own kernel.",
    )
    bandwidth: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of the nominal memory bandwidth that norms, activations and products "
        "of rank r reach. `none` means the assumed 0.75, and 0.54 for the products.",
    )
    network: float = Field(
        50.0,
        gt=0,
        description="GB/s of one GPU in a ring of all of them, for the all-reduce of gradients "
        "and, with model.fsdp, for the weights of layers: 50 is one 400 Gbit/s card for each GPU.",
    )
    storage: float = Field(
        1.0,
        gt=0,
        description="GB/s at which one process reads weights and writes checkpoints.",
    )
    cores: int = Field(64, ge=1, description="CPU cores that prepare the data, all nodes together.")
    prepared_events: float | None = Field(
        None,
        gt=0,
        description="Events that one core prepares in a second. `none` means what was measured on "
        "the eICU demo in the format of the run.",
    )

    @field_validator("gpu")
    @classmethod
    def _known_gpu(cls, value: str) -> str:
        gpu_of(value)
        return value

    @field_validator("times")
    @classmethod
    def _positive(cls, value: list[float]) -> list[float]:
        if not value or not all(times > 0 for times in value):
            raise ValueError("must be at least one number above 0")
        return value

    @field_validator("attention")
    @classmethod
    def _shares(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not all(0 < share <= 1 for share in value):
            raise ValueError("must be two shares above 0 and at most 1")
        return value


def gpu_of(text: str) -> Gpu:
    """Return a GPU by name, or by three numbers.

    Raises:
        ValueError: it is neither.
    """
    if text.lower() in GPUS:
        return GPUS[text.lower()]
    try:
        teraflops, gigabytes, gibibytes = (float(word) for word in text.split(","))
    except ValueError:
        raise ValueError(
            f"must be one of {', '.join(GPUS)}, or TFLOP/s,GB/s,GiB, got {text!r}"
        ) from None
    if not all(0 < number < math.inf for number in (teraflops, gigabytes, gibibytes)):
        raise ValueError(f"must be three finite numbers above 0, got {text!r}")
    return _gpu(text, teraflops, gigabytes, gibibytes)


def plan_arguments(argv: list[str]) -> tuple[list[str], list[str]]:
    """Divide a command line into the words of a plan and the others, those of the run."""
    names = set(PlanSettings.model_fields)
    argv = joined(PlanSettings, argv)
    own = [a for a in argv if a.removeprefix("--").partition("=")[0].replace("-", "_") in names]
    return own, [a for a in argv if a not in own]
