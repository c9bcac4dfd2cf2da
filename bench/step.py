"""python -m bench.step: a whole training step, ours against what others would write.

Online forwards, target forward, losses, backward, clip, AdamW and the average of the target, on the
workloads W1-W6, K8 (eight cuts a window) and E8 (embedding eight decision nodes a window); see
bench/README.md. A variant must reproduce the reference's losses, gradients and target before it is
timed. On a GPU at full size, from random weights; on a CPU at reduced width.
"""

import time
import warnings
from pathlib import Path

import torch
from pydantic import Field, field_validator

from bench import records
from bench.step_measure import OURS, RIVALS, Result, measure, memory, variants
from bench.step_report import judged, plot, record, table
from bench.step_workloads import Workload, workloads
from bench.timing import Clock, ceiling
from smbfast.base.config import Settings, command_line
from smbfast.base.progress import duration

EPILOG = """variants
  B0   Hugging Face + PEFT, SDPA, padded batches of 8, three forwards, a merged deep copy as target
  B1   packed: varlen attention, Liger on a GPU, three forwards, the average by _foreach_lerp_
  B0c, B1c  with gradient checkpointing
  B2   B1 with torch.compile (on a CPU it compiles for minutes: only when asked for)
  B3   B2 with the prefix shared by FlexAttention (GPU)
  B3'  the prefix shared by two calls of attention, otherwise Hugging Face's code and PEFT's linears
  B4   smbfast

examples
  python -m bench.step --quick                        seconds: that it runs, no figure to keep
  python -m bench.step --only=W1,W2 --rivals=B1,B4
  python -m bench.step --rivals="B0,B1,B2,B3',B4"     with torch.compile
  python -m bench.step --save                         results/step.jsonl and results/step.svg"""


class StepBench(Settings):
    """Measure the whole training step on the workloads of the notes, against its rivals."""

    only: list[str] = Field([], description="workloads; none: all")
    rivals: list[str] = Field(
        [], description="variants; none: B0 B1 B3' B4 on a CPU, all of them on a GPU"
    )
    ablate: list[str] = Field(
        ["W2"],
        description="workloads on which B4 is also run with a merged target, with recomputation, "
        "and with an operation on its reference",
    )
    device: str = Field("auto", description="cpu or cuda; auto is the GPU if there is one")
    rounds: int = Field(
        0, ge=0, description="each variant once a round; 0: 5 on a CPU, 10 on a GPU"
    )
    threads: int = Field(0, ge=0, description="CPU threads; 0: torch's choice, one with --quick")
    quick: bool = Field(False, description="tiny widths, two rounds, on a CPU; no verdicts")
    memory: bool = Field(True, description="on a CPU: peak memory, each in a process of its own")
    save: bool = Field(False, description="append to results/step.jsonl, draw results/step.svg")
    plot: str | None = Field(None, description="also draw the split of the step into this file")

    @field_validator("device")
    @classmethod
    def _there(cls, value: str) -> str:
        if value not in ("auto", "cpu", "cuda"):
            raise ValueError("must be auto, cpu or cuda")
        if value == "cuda" and not torch.cuda.is_available():
            raise ValueError("needs a CUDA GPU; torch sees none")
        return value

    @field_validator("rivals")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        known = (*RIVALS, OURS)
        if unknown := [name for name in value if name not in known]:
            raise ValueError(f"must be among {', '.join(known)}; {', '.join(unknown)} is not")
        return value


class Progress:
    """Lines that say where a run is and when it may end."""

    def __init__(self, wanted: list[Workload]) -> None:
        self.wanted, self.began = wanted, time.monotonic()
        self.at, self.told, self.expected = -1, 0, 1

    def begin(self, expected: int) -> None:
        """The next workload, of which so many things will be told."""
        self.at, self.told, self.expected = self.at + 1, 0, expected

    def __call__(self, text: str) -> None:
        self.told += 1
        costs = [w.tokens * (1 + w.cuts / 4) * w.size.width**2 for w in self.wanted]
        done = sum(costs[: self.at]) + costs[self.at] * min(self.told / self.expected, 1)
        spent = time.monotonic() - self.began
        left = duration(spent * (sum(costs) / done - 1))
        name = f"{self.wanted[self.at].name} ({self.at + 1} of {len(self.wanted)})"
        print(f"[{duration(spent)}, about {left} left] {name} {text}", flush=True)


def main(argv: list[str] | None = None) -> None:
    settings = command_line(StepBench, argv, prog="python -m bench.step", epilog=EPILOG)
    # said by transformers to itself
    warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and not settings.quick else "cpu"
    known = workloads(device, quick=settings.quick)
    try:
        wanted = _chosen("only", settings.only, known) or list(known.values())
        ablated = {w.name for w in _chosen("ablate", settings.ablate, known)}
    except ValueError as error:
        raise SystemExit(f"python -m bench.step: {error}") from None
    if settings.threads or settings.quick:
        torch.set_num_threads(settings.threads or 1)
    rounds = settings.rounds or (2 if settings.quick else 10 if device == "cuda" else 5)
    stamp = records.stamp("step", device)
    clock = Clock(device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    best = ceiling(clock, dtype)
    machine = f"{stamp['device_name']}, {stamp['threads']} threads"
    print(
        f"{device}: {machine}, load {stamp['load']}; torch {stamp['versions']['torch']}; "
        f"git {stamp['git']}; {best.matmul / 1e12:.3g} TFLOP/s (matmul)"
    )
    say = Progress(wanted)
    results: list[Result] = []
    lines = []
    for workload in wanted:
        if not settings.quick:  # what else runs on the machine comes and goes
            best = best.raised(ceiling(clock, dtype))
        makes = variants(workload, device, ablate=workload.name in ablated)
        makes = _asked(makes, settings.rivals, device)
        say.begin(sum(not isinstance(make, str) for make in makes.values()) + rounds)
        found = measure(workload, device, makes, rounds, say)
        if device == "cpu" and settings.memory and not settings.quick:
            for r in found:
                if r.times:
                    r.step_mib = memory(workload.name, r.variant, quick=False)
            say("memory is measured")
        print(f"\n{table(found, best)}\n", flush=True)
        ours = next((r for r in found if r.variant == OURS), None)
        lines += [stamp | record(r, best, ours) for r in found]
        results += found
    if settings.quick:
        print("a quick run: its times mean nothing, and no target is judged")
    else:
        print("\n".join(["targets", *(f"  {line}" for line in judged(results))]))
    if settings.save:
        print(f"{len(lines)} records appended to {records.append('step', lines)}")
    paths = [records.RESULTS / "step.svg"] if settings.save else []
    for path in [*paths, *([Path(settings.plot)] if settings.plot else [])]:
        plot(results, path, f"A step on {machine}: its parts, and how much faster {OURS} is")
        print(f"plot in {path}")
    told = (f"{r.workload.name} {r.variant} {r.reason}" for r in results)
    if bad := [line for line, r in zip(told, results, strict=True) if r.bad]:
        raise SystemExit("\n".join(bad))


def _chosen(key: str, names: list[str], known: dict[str, Workload]) -> list[Workload]:
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"`{key}` must be among {', '.join(known)}; {', '.join(unknown)} is not")
    return [known[name] for name in names]


def _asked(makes: dict, rivals: list[str], device: str) -> dict:
    """The variants that were asked for; of the others on a CPU, why they are not run."""
    reasons = {
        "B0c": "saves memory, not time: ask for it by --rivals",
        "B1c": "saves memory, not time: ask for it by --rivals",
        "B2": "compiles for minutes on a CPU: ask for it by --rivals",
    }
    if rivals:
        return {n: make for n, make in makes.items() if n.partition(" ")[0] in rivals}
    return makes if device == "cuda" else makes | {n: r for n, r in reasons.items() if n in makes}


if __name__ == "__main__":
    main()
