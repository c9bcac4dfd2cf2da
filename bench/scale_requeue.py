"""python -m bench.scale_requeue: a run that a queue ends again and again, against one alone.

`examples/slurm/train.sbatch` runs under the fake Slurm of `tests/slurm`. Turns end when the log
reaches random steps, or at random seconds: every second one as a time limit ends it (USR1 to the
batch shell), the others as the death of a node does (KILL to every process). Both runs have the
same ranks, so every logged loss and every byte of the final model must be the same. A difference
ends with status 1, and so does a run that no signal reached during training: then ask for more
steps.
"""

import hashlib
import json
import os
import random
import re
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from bench import records
from smbfast.base.config import Settings, command_line

PROG = "python -m bench.scale_requeue"
ROOT = Path(__file__).parents[1]
RUN = [
    "tiny",
    "--cohort.patients=60",
    "--model.hidden=16",
    "--model.layers=1",
    "--model.ffn=32",
    "--run.threads=1",
    "--run.log_every=1",
    "--run.save_every=20",
    "--eval.every=50",
    "--probe.labels=[]",
]
MEASURES = ("sft", "jepa", "codes", "grad_norm", "lr", "loss", "online_rank")


class RequeueBench(Settings):
    """End a run under a fake Slurm many times, and compare it with one that nothing ended.

    Ranks are processes of torchrun on this machine; several nodes are several torchruns that meet.
    """

    epilog: ClassVar[str] = """Examples

  Ten ends of a run of two ranks, with a record:
    python -m bench.scale_requeue --save

  Two nodes of one rank each:
    python -m bench.scale_requeue --nodes=2 --ranks=1"""

    turns: int = Field(10, ge=1, description="Number of turns that are ended.")
    ranks: int = Field(2, ge=1, description="Number of ranks on each node.")
    nodes: int = Field(1, ge=1, description="Number of nodes, all on this machine.")
    steps: int = Field(200, ge=1, description="Number of steps of each of the two phases.")
    longest: float = Field(
        0.0,
        ge=0,
        description="Longest turn, in seconds, to end turns at random ones. 0 ends them at steps.",
    )
    seed: int = Field(0, ge=0, description="Seed of the moments at which turns end.")
    save: bool = Field(False, description="Append the result to bench/results/scale_requeue.jsonl.")


def measured(run: Path) -> list[dict[str, Any]]:
    """Return what the log of a run holds of its steps and evaluations, without speeds."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    names = ("kind", "step", *MEASURES)
    return [{k: row.get(k) for k in names} for row in rows if row["kind"] in ("step", "eval")]


def digests(run: Path) -> dict[str, str]:
    """Return the SHA-256 of every tensor file of the final model and of the last checkpoint."""
    last = sorted(run.glob("checkpoints/step-*"))[-1]
    files = [*sorted(run.glob("final/*.safetensors")), last / "state.safetensors"]
    return {str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def touch_at_steps(run: Path, steps: list[int], over: threading.Event) -> None:
    """Make the file `step-N` beside a run for each of `steps` that its log has reached."""
    log = run / "metrics.jsonl"
    while not over.wait(0.05):
        lines = log.read_text().splitlines() if log.is_file() else []
        last = max((int(n) for x in lines[-3:] for n in re.findall(r'"step": (\d+)', x)), default=0)
        for step in steps:
            if step <= last:
                (run.parent / f"step-{step}").touch()


def queued(settings: RequeueBench, folder: Path, turns: list[str]) -> tuple[Path, str, float]:
    """Run the batch script in a fake queue that ends turns; return the run, the log, seconds."""
    folder.mkdir()
    (folder / "turns").write_text("".join(line + "\n" for line in turns))
    run = folder / "run"
    steps = [f"--phases.{i}.steps={settings.steps}" for i in range(2)]
    environment = os.environ | {
        "FAKE_SLURM": str(folder),
        "FAKE_NODES": str(settings.nodes),
        "RANKS": str(settings.ranks),
        "TURNS": "1000",  # moments before the first step are wanted here
        "OMP_NUM_THREADS": "1",
        "PATH": f"{ROOT / 'tests' / 'slurm'}:{os.environ['PATH']}",
    }
    script = ROOT / "examples" / "slurm" / "train.sbatch"
    start, over = time.monotonic(), threading.Event()
    at_steps = [int(n) for line in turns for n in re.findall(r"step-(\d+)", line)]
    watch = threading.Thread(target=touch_at_steps, args=(run, at_steps, over), daemon=True)
    watch.start()
    done = subprocess.run(
        ["sbatch", str(script), *RUN, *steps, f"--run.dir={run}"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    over.set()
    watch.join()
    (folder / "log").write_text(done.stdout)
    if done.returncode:
        raise SystemExit(f"{PROG}: the job ended with {done.returncode}: {done.stdout[-2000:]}")
    return run, done.stdout, time.monotonic() - start


def main(argv: list[str] | None = None) -> None:
    settings = command_line(RequeueBench, argv, prog=PROG)
    stamp, draw = records.stamp("scale_requeue", "cpu"), random.Random(settings.seed)
    with tempfile.TemporaryDirectory() as name:
        alone, _, seconds = queued(settings, Path(name) / "alone", [])
        print(f"alone: {seconds:.0f} s", flush=True)
        if settings.longest:
            ends = [f"{draw.uniform(1, settings.longest):.2f}" for _ in range(settings.turns)]
        else:
            steps = sorted(draw.sample(range(1, 2 * settings.steps), settings.turns))
            ends = [f"step-{step}" for step in steps]
        turns = [f"{('USR1', 'KILL')[i % 2]} {end}" for i, end in enumerate(ends)]
        ended, log, whole = queued(settings, Path(name) / "ended", turns)
        one, other = measured(alone), measured(ended)
        differing = sum(a != b for a, b in zip(one, other, strict=False))
        differing += abs(len(one) - len(other))
        saved = len(re.findall(r"stopped, step \d+ is saved", log))
        bytes_differ = digests(alone) != digests(ended)
        left, ended_turns = (len(re.findall(p, log)) for p in ("processes left", "turn .* ended"))
        row = {
            "ranks": settings.ranks,
            "nodes": settings.nodes,
            "steps": 2 * settings.steps,
            "turns": turns,
            "turns_run": ended_turns,
            "saved_on_request": saved,
            "lines_compared": len(one),
            "lines_differing": differing,
            "files_differ": bytes_differ,
            "turns_that_left_processes": left,
            "alone_s": round(seconds, 1),
            "ended_s": round(whole, 1),
        }
    print(json.dumps(row, indent=1))
    if settings.save:
        records.append("scale_requeue", [stamp | row])
    if differing or bytes_differ or left or not saved or ended_turns <= settings.turns:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
