"""python -m bench.plan_memory: the memory that a plan predicts, against steps on a CPU.

Each case is a run of a few layers more than the plan traces, so that its line in the number of
layers is compared as well. A process that has trained a tiny model takes two steps, the second of
two micro-batches; the peak of its resident memory above what it held before is compared with the
plan. Blocks have mappings of their own (MALLOC_MMAP_THRESHOLD_), and with --heap they lie in
glibc's heap, whose holes the prediction then includes.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from bench import records
from smbfast.base.config import Settings, build, command_line
from smbfast.model.backbone import PatientEncoder
from smbfast.model.memory import full_batch
from smbfast.model.target import TargetEncoder, TargetForm
from smbfast.run.planner import Planned, peaks_of, planned
from smbfast.run.startup import Kind, heaviest, losses_of
from smbfast.run.step import backward
from smbfast.settings import PlanSettings, load

PROG = "python -m bench.plan_memory"
ALLOWED = 0.1
OWN = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
PLAIN = ["data.format=text", "data.window=512", "phases.0.w_sft=1", "phases.1.w_sft=1"]
MASK = [*PLAIN, "objective.jepa=mask"]
LORA = [*MASK, "model.path=BACKBONE", "model.train=lora"]
SCRATCH = [*MASK, "model.hidden=256", "model.layers=7", "model.heads=4", "model.ffn=768"]
AHEAD = ["objective.jepa=horizon", "objective.horizons=[1d,30d]", "phases.1.w_codes=1"]
# the settings of a run, tokens of a micro-batch
CASES: dict[str, tuple[list[str], int]] = {
    "LoRA, both losses": (LORA, 1024),
    "LoRA, both losses, 2,048 tokens": (LORA, 2048),
    "LoRA, tracked target": ([*LORA, "objective.target_form=tracked"], 1024),
    "LoRA, recompute mlp": ([*LORA, "model.recompute=mlp"], 2048),
    "LoRA, recompute full": ([*LORA, "model.recompute=full"], 2048),
    "LoRA, SFT alone": ([*LORA, "phases.1.w_jepa=0"], 2048),
    "all trained, both losses": (SCRATCH, 2048),
    "all trained, recompute full": ([*SCRATCH, "model.recompute=full"], 2048),
    "all trained, horizons and codes to come": ([*SCRATCH, *AHEAD], 2048),
}
BACKBONE = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 8192,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1536,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


class PlanMemoryBench(Settings):
    """Compare the memory that a plan predicts with the peak of resident memory on a CPU.

    A case whose error is above 10 % ends with status 1.
    """

    epilog: ClassVar[str] = """Examples

  All cases, with a record of each:
    python -m bench.plan_memory --save"""

    heap: bool = Field(False, description="Whether blocks lie in glibc's heap, as by default.")
    save: bool = Field(False, description="Append the results to bench/results/plan_memory.jsonl.")


def run_of(words: list[str], folder: Path) -> Planned:
    """Return the plan of a case."""
    (folder / "backbone").mkdir(exist_ok=True)
    (folder / "backbone" / "config.json").write_text(json.dumps(BACKBONE))
    paths = [word.replace("BACKBONE", str(folder / "backbone")) for word in words]
    settings = load("tiny", [*paths, f"data.path={folder}"])
    return planned(settings, build(PlanSettings, {}, ["--events=1e6"]))


def trained(encoder: PatientEncoder, run: Planned, tokens: int) -> None:
    """Take a step of one micro-batch, then one of two."""
    settings, [kind] = run.settings, heaviest([Kind.of(p) for p in run.settings.phases])
    ahead = kind.codes or settings.objective.jepa == "horizon"
    batch = full_batch(
        tokens,
        settings.data.window,
        settings.objective,
        sft=kind.sft,
        jepa=kind.jepa,
        num_horizons=run.facts.num_horizons if ahead else 0,
    )
    scales = {"sft_scale": 1.0, "jepa_scale": float(kind.jepa), "codes_scale": float(kind.codes)}
    losses = partial(losses_of(settings), **scales)
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    target = TargetEncoder(encoder, TargetForm.of(settings.objective)) if kind.jepa else None
    for micro in (1, 2):
        for _ in range(micro):
            backward(losses(encoder, target, batch))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if target is not None:
            target.update(0.99)


def real(encoder: PatientEncoder) -> PatientEncoder:
    """Return an encoder on meta with storage and small values."""
    encoder = encoder.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*encoder.parameters(), *encoder.buffers()):
            tensor.normal_(std=0.02) if tensor.is_floating_point() else tensor.zero_()
    return encoder


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Return the bytes that a case takes and those that its plan predicts."""
    torch.set_num_threads(1)
    words, tokens = CASES[name]
    run, device = run_of(words, folder), torch.device("cpu")
    predicted = vars(peaks_of(run, device)(tokens))
    trained(real(run.encoder_of(1, device)), run, 600)
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    trained(real(run.encoder_of(None, device)), run, tokens)
    return {"predicted": predicted, "measured": resident("VmHWM") - before}


def resident(name: str) -> int:
    """Return a number of bytes of /proc/self/status."""
    status = dict(x.split(":", 1) for x in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) << 10


def child(folder: str) -> None:
    """Measure all cases, each in a fork, so that the imports are made once."""
    for name in CASES:
        pid = os.fork()
        if not pid:
            print(json.dumps({"case": name} | measure(name, Path(folder))), flush=True)
            os._exit(0)
        if os.waitpid(pid, 0)[1]:
            sys.exit(f"{name} failed")


def main(argv: list[str] | None = None) -> None:
    """The command: measure, judge and save."""
    settings = command_line(PlanMemoryBench, argv, prog=PROG)
    stamp, rows, worst = records.stamp("plan_memory", "cpu"), [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        code = f"from bench.plan_memory import child; child({folder!r})"
        env = os.environ | ({} if settings.heap else OWN)
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{PROG}: {done.stderr[-2000:]}")
    for line in done.stdout.splitlines():
        row = json.loads(line)
        parts = row["predicted"] if settings.heap else row["predicted"] | {"holes": 0}
        row |= {"predicted": parts, "total": sum(parts.values()), "heap": settings.heap}
        row["error"] = round(row["total"] / row["measured"] - 1, 4)
        worst = max(worst, abs(row["error"]))
        sizes = (
            f"{row['total'] / 2**20:,.0f} MiB predicted, {row['measured'] / 2**20:,.0f} measured"
        )
        print(f"{row['case']}: {sizes}, {row['error']:+.1%}")
        rows.append(stamp | row)
    if settings.save:
        records.append("plan_memory", rows)
    if worst > ALLOWED:
        raise SystemExit(f"{PROG}: the largest error is {worst:.1%}, above {ALLOWED:.0%}")


if __name__ == "__main__":
    main()
