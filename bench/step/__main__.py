"""python -m bench.step: a whole training step, ours against what others would write.

See bench/README.md for the workloads, the variants, and what is compared before it is timed.
"""

import warnings
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field, field_validator

from bench import records
from bench.step.catalog import BF16, NOT_ASKED_FOR, OURS, RIVALS, Make, variants
from bench.step.measure import Result, measure, memory, num_steps
from bench.step.report import Ceilings, fastest, judged, plot, record, table, too_fast
from bench.step.workloads import Workload, workloads
from bench.timing import Clock, Device, ceiling
from smbfast.base.config import Settings, command_line
from smbfast.base.progress import Progress
from smbfast.base.runtime import choose_device

PROG = "python -m bench.step"
Makes = dict[str, Make | str]  # by variant: what builds it, or why it is not run


class StepBench(Settings):
    """Measure a whole training step on thirteen workloads, ours against its rivals.

    A step is the online forwards, the target forward, losses, backward, clipping, AdamW and the
    average of the target. The workloads are W1 to W6, K8 (eight cuts a window), E8 (the
    embeddings of eight decision nodes a window), and C1, C1-8 and C2 in the format `codes`;
    bench/README.md describes them. Models have random weights: at full size on a GPU, at reduced
    width on a CPU.

    Each variant first has to reproduce the losses, the gradients and the moved target of the
    reference. One that does not is not timed, and the command then exits with status 1. So it does
    where a variant fails, which ends no other variant, and where a step is above the ceiling of the
    machine, which means that operations are counted wrongly.
    """

    epilog: ClassVar[str] = """Variants

  B0        Hugging Face and PEFT: SDPA, padded batches of 8, three forwards, a merged deep copy as
            target
  B1        packed: varlen attention, Liger on a GPU, three forwards, the average by _foreach_lerp_
  B0c, B1c  B0 and B1 with activation checkpointing
  B2        B1 with torch.compile
  B3        B2 with the prefix shared by FlexAttention; on a GPU only
  B3'       the prefix shared by two calls of attention, otherwise Hugging Face's code and PEFT's
            linears; "B3' compiled" is the same with torch.compile
  E1        nothing but transformers and PEFT: windows of one length as a batch, causal SDPA, three
            forwards; "E1 bf16" is the same under bf16 autocast, with frozen weights in bf16
  B4        smbfast; "B4 bf16" is the same with frozen weights in bf16

  "E1 + oneDNN", "B3' + oneDNN" and "B3' compiled + oneDNN" take their step under
  torch.set_float32_matmul_precision("medium"). On a CPU without AMX that line sends fp32 products
  to oneDNN and leaves them in fp32; on a CPU with AMX it would not, and they are not run.

Examples

  See in seconds that it runs; these figures mean nothing:
    python -m bench.step --quick

  Two workloads, ours against what a user of transformers writes:
    python -m bench.step --only=W1,W2 --rivals="E1,E1 + oneDNN,B4"

  In pairs, each of which is complete and saved before the next begins:
    python -m bench.step --only=W1,W2 --pairs --save

  Everything, appended to bench/results/step.jsonl and drawn in bench/results/step.svg:
    python -m bench.step --save"""

    only: list[str] = Field(
        [], description="Workloads to measure. If the list is empty, all are measured."
    )
    rivals: list[str] = Field(
        [],
        description="Variants to measure, by their full names; B4 brings the variants of `ablate` "
        "with it. If the list is empty, these are on a CPU B0, B1, B3', B3' compiled, E1, E1 bf16, "
        "B4 and B4 bf16, and on a GPU all.",
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
    pairs: bool = Field(
        False,
        description="Measure ours and one rival in turns, then ours and the next: at most two "
        "variants are in memory at a time, and a rival is compared with the rounds of ours beside "
        "it. Otherwise all variants take turns. On a GPU it is always pairs.",
    )
    threads: int = Field(
        0,
        ge=0,
        description="Threads of the CPU. 0 leaves the number to torch, and is one thread with "
        "`quick`.",
    )
    cpu_time: bool = Field(
        False,
        description="On a CPU, take the CPU seconds of the process instead of those of the clock, "
        "for a machine that does other work as well. Meant for one thread: waiting threads may "
        "count as busy.",
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
        description="Append each result to bench/results/step.jsonl as soon as it is there, and "
        "draw bench/results/step.svg at the end.",
    )
    plot: str | None = Field(
        None, description="File to draw the parts of the step in as well, as SVG or PNG."
    )

    @field_validator("rivals")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        known = (*RIVALS, OURS, BF16)
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
    results, best = _measured(settings, device, plan, stamp)
    if settings.quick:
        print("a quick run: its times mean nothing, and no target is judged")
    else:
        print("\n".join(["targets", *(f"  {line}" for line in judged(results))]))
        print("\n".join(fastest(results)))
    if settings.save:
        print(f"{len(results)} records appended to {records.RESULTS / 'step.jsonl'}")
    paths = [records.RESULTS / "step.svg"] if settings.save else []
    for path in [*paths, *([Path(settings.plot)] if settings.plot else [])]:
        title = f"A step on {_machine(stamp)}: its parts, and how much faster {OURS} is"
        plot(results, path, title)
        print(f"plot in {path}")
    bad = [f"{r.workload.name} {r.variant} {r.reason}" for r in results if r.bad]
    if bad := bad + too_fast(results, best):
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
            makes = {n: m for n, m in makes.items() if _asked_for(n, settings.rivals)}
        elif device == "cpu":
            makes |= {
                n: reason
                for n, reason in NOT_ASKED_FOR.items()
                if not isinstance(makes.get(n, ""), str)  # what cannot run has a better reason
            }
        plan.append((known[name], makes))
    return plan


def _asked_for(name: str, rivals: list[str]) -> bool:
    ablation = name not in (*RIVALS, OURS, BF16)
    return name in rivals or (ablation and OURS in rivals)


def _measured(
    settings: StepBench, device: str, plan: list[tuple[Workload, Makes]], stamp: dict
) -> tuple[list[Result], Ceilings]:
    """The results of all workloads, each printed once it is there, and what could be reached."""
    clock = Clock(device)
    kinds = [torch.bfloat16] if device == "cuda" else [torch.float32]
    if any(
        not isinstance(make, str) and n.endswith("bf16") for _, m in plan for n, make in m.items()
    ):
        kinds = [torch.float32, torch.bfloat16]
    cpu_time = settings.cpu_time and device == "cpu"
    measured_by = partial(ceiling, clock, cpu_time=cpu_time)
    best = {dtype: measured_by(dtype) for dtype in kinds}
    print(
        f"{device}: {_machine(stamp)}, load {stamp['load']}; torch {stamp['versions']['torch']}; "
        f"git {stamp['git']}; "
        + ", ".join(
            f"{b.matmul / 1e12:.3g} TFLOP/s ({dtype} {b.library} matmul)"
            for dtype, b in best.items()
        )
    )
    rounds = settings.rounds or (2 if settings.quick else 10 if device == "cuda" else 5)
    pairs = settings.pairs or device == "cuda"
    num_tokens = sum(w.num_tokens * num_steps(makes, rounds, pairs=pairs) for w, makes in plan)
    progress = Progress(PROG, num_tokens, "tokens")
    results: list[Result] = []

    def done(r: Result, ours: Result | None) -> None:
        if r.times and device == "cpu" and settings.memory and not settings.quick:
            r.step_mib = memory(r.workload.name, r.variant, quick=False)
        if settings.save:  # at once: what comes later may end the process
            kind = {"clock": "cpu" if cpu_time else "wall"}
            records.append("step", [stamp | kind | record(r, best, ours)])

    for workload, makes in plan:
        if not settings.quick:  # what else runs on the machine comes and goes
            best |= {dtype: b.raised(measured_by(dtype)) for dtype, b in best.items()}
        how = {"pairs": pairs, "cpu_time": cpu_time}
        measured = measure(workload, device, makes, rounds, progress.add, **how, done=done)
        print(f"\n{table(measured, best)}\n", flush=True)
        results += measured
    return results, best


def _machine(stamp: dict) -> str:
    return f"{stamp['device_name']}, {stamp['threads']} threads"


if __name__ == "__main__":
    main()
