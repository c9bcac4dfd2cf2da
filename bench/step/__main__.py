"""python -m bench.step: a whole training step, ours against what others would write.

See bench/README.md for the workloads, the variants, and what is compared before it is timed.
"""

import warnings
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field, field_validator

from bench import records
from bench.step.measure import OURS, RIVALS, Make, Result, measure, memory, num_runnable, variants
from bench.step.report import judged, plot, record, table
from bench.step.workloads import Workload, workloads
from bench.timing import Clock, Device, ceiling
from smbfast.base.config import Settings, command_line
from smbfast.base.progress import Progress
from smbfast.base.runtime import choose_device

PROG = "python -m bench.step"
Makes = dict[str, Make | str]  # by variant: what builds it, or why it is not run
NOT_ASKED_FOR = {  # of a CPU
    "B0c": "saves memory, not time: ask for it by --rivals",
    "B1c": "saves memory, not time: ask for it by --rivals",
    "B2": "compiles for minutes on a CPU: ask for it by --rivals",
}


class StepBench(Settings):
    """Measure a whole training step on ten workloads, ours against its rivals.

    A step is the online forwards, the target forward, losses, backward, clipping, AdamW and the
    average of the target. The workloads are W1 to W6, K8 (eight cuts a window) and E8 (the
    embeddings of eight decision nodes a window); bench/README.md describes them. Models have random
    weights: at full size on a GPU, at reduced width on a CPU.

    Each variant first has to reproduce the losses, the gradients and the moved target of the
    reference. One that does not is not timed, and the command then exits with status 1.
    """

    epilog: ClassVar[str] = """Variants

  B0        Hugging Face and PEFT: SDPA, padded batches of 8, three forwards, a merged deep copy as
            target
  B1        packed: varlen attention, Liger on a GPU, three forwards, the average by _foreach_lerp_
  B0c, B1c  B0 and B1 with activation checkpointing
  B2        B1 with torch.compile
  B3        B2 with the prefix shared by FlexAttention; on a GPU only
  B3'       the prefix shared by two calls of attention, otherwise Hugging Face's code and PEFT's
            linears
  B4        smbfast

Examples

  See in seconds that it runs; these figures mean nothing:
    python -m bench.step --quick

  Two workloads, ours against the packed rival:
    python -m bench.step --only=W1,W2 --rivals=B1,B4

  With torch.compile, which takes minutes on a CPU:
    python -m bench.step --rivals="B0,B1,B2,B3',B4"

  Everything, appended to bench/results/step.jsonl and drawn in bench/results/step.svg:
    python -m bench.step --save"""

    only: list[str] = Field(
        [], description="Workloads to measure. If the list is empty, all are measured."
    )
    rivals: list[str] = Field(
        [],
        description="Variants to measure. If the list is empty, these are B0, B1, B3' and B4 on a "
        "CPU and all of them on a GPU.",
    )
    ablate: list[str] = Field(
        ["W2"],
        description="Workloads on which B4 is also measured with a part of it changed: with a "
        "merged target, with activation checkpointing, and with one operation on its reference.",
    )
    device: Device = Field(
        "auto",
        description="Device to measure on. `auto` is the GPU, or the CPU if there is none or "
        "with `quick`.",
    )
    rounds: int = Field(
        0,
        ge=0,
        description="Rounds of measuring; in each, every variant takes one step. 0 is 5 rounds on "
        "a CPU, 10 on a GPU, and 2 with `quick`.",
    )
    threads: int = Field(
        0,
        ge=0,
        description="Threads of the CPU. 0 leaves the number to torch, and is one thread with "
        "`quick`.",
    )
    quick: bool = Field(
        False,
        description="Take tiny widths and two rounds on a CPU, to see that the bench runs. No "
        "target is judged.",
    )
    memory: bool = Field(
        True,
        description="On a CPU, also measure the peak memory of a step, each variant in a process "
        "of its own.",
    )
    save: bool = Field(
        False,
        description="Append the results to bench/results/step.jsonl and draw "
        "bench/results/step.svg.",
    )
    plot: str | None = Field(
        None, description="File to draw the parts of the step in as well, as SVG or PNG."
    )

    @field_validator("rivals")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        known = (*RIVALS, OURS)
        if unknown := [name for name in value if name not in known]:
            raise ValueError(f"must be among {', '.join(known)}; {', '.join(unknown)} is not")
        return value


def main(argv: list[str] | None = None) -> None:
    settings = command_line(StepBench, argv, prog=PROG)
    # said by transformers to itself
    warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
    on_cpu = settings.quick and settings.device == "auto"
    device = "cpu" if on_cpu else choose_device(settings.device).type
    try:
        plan = _planned(settings, device)
    except ValueError as error:
        raise SystemExit(f"{PROG}: {error}") from None
    if settings.threads or settings.quick:
        torch.set_num_threads(settings.threads or 1)
    stamp = records.stamp("step", device)
    results, lines = _measured(settings, device, plan, stamp)
    if settings.quick:
        print("a quick run: its times mean nothing, and no target is judged")
    else:
        print("\n".join(["targets", *(f"  {line}" for line in judged(results))]))
    if settings.save:
        print(f"{len(lines)} records appended to {records.append('step', lines)}")
    paths = [records.RESULTS / "step.svg"] if settings.save else []
    for path in [*paths, *([Path(settings.plot)] if settings.plot else [])]:
        title = f"A step on {_machine(stamp)}: its parts, and how much faster {OURS} is"
        plot(results, path, title)
        print(f"plot in {path}")
    if bad := [f"{r.workload.name} {r.variant} {r.reason}" for r in results if r.bad]:
        raise SystemExit("\n".join(bad))


def _planned(settings: StepBench, device: str) -> list[tuple[Workload, Makes]]:
    """The workloads that were asked for, each with its variants.

    Raises:
        ValueError: a setting names a workload that there is not.
    """
    known = workloads(device, quick=settings.quick)
    for key, names in (("only", settings.only), ("ablate", settings.ablate)):
        if unknown := [name for name in names if name not in known]:
            raise ValueError(
                f"`{key}` must be among {', '.join(known)}; {', '.join(unknown)} is not"
            )
    plan = []
    for name in settings.only or known:
        makes = variants(known[name], device, ablate=name in settings.ablate)
        if settings.rivals:
            makes = {n: m for n, m in makes.items() if n.partition(" ")[0] in settings.rivals}
        elif device == "cpu":
            makes |= {n: reason for n, reason in NOT_ASKED_FOR.items() if n in makes}
        plan.append((known[name], makes))
    return plan


def _measured(
    settings: StepBench, device: str, plan: list[tuple[Workload, Makes]], stamp: dict
) -> tuple[list[Result], list[dict]]:
    """The results of all workloads, each printed once it is there, and their records."""
    clock = Clock(device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    best = ceiling(clock, dtype)
    print(
        f"{device}: {_machine(stamp)}, load {stamp['load']}; torch {stamp['versions']['torch']}; "
        f"git {stamp['git']}; {best.matmul / 1e12:.3g} TFLOP/s (matmul)"
    )
    rounds = settings.rounds or (2 if settings.quick else 10 if device == "cuda" else 5)
    # each variant is compared once, and then takes a step in each round
    num_tokens = sum(w.num_tokens * num_runnable(makes) * (1 + rounds) for w, makes in plan)
    progress = Progress(PROG, num_tokens, "tokens")
    results: list[Result] = []
    lines: list[dict] = []
    for workload, makes in plan:
        if not settings.quick:  # what else runs on the machine comes and goes
            best = best.raised(ceiling(clock, dtype))
        measured = measure(workload, device, makes, rounds, progress.add)
        if device == "cpu" and settings.memory and not settings.quick:
            for r in measured:
                if r.times:
                    r.step_mib = memory(workload.name, r.variant, quick=False)
        print(f"\n{table(measured, best)}\n", flush=True)
        ours = next((r for r in measured if r.variant == OURS), None)
        lines += [stamp | record(r, best, ours) for r in measured]
        results += measured
    return results, lines


def _machine(stamp: dict) -> str:
    return f"{stamp['device_name']}, {stamp['threads']} threads"


if __name__ == "__main__":
    main()
