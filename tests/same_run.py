"""python tests/same_run.py A B: do two commits train the same models, byte for byte?

Each commit runs a small model trained whole (7 steps, evaluated, saved, embedded and probed) and a
LoRA adapter on the model that A made (8 steps), both through an SFT and a JEPA phase. Compared are
all tensors, embeddings and predictions, and all records without what a clock, a memory meter or a
path says. A commit is anything git names, or `.` for the working tree. Exit code 1 if they differ.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
COMMON = ["--data.window=128", "--eval.every=3", "--run.save_every=2", "--run.log_every=1"]
WHOLE = ["--phases.0.steps=3", "--phases.1.steps=4", "--cohort.patients=100", "--run.keep=9"]
LORA = ["--phases.0.steps=4", "--phases.1.steps=4", "--model.train=lora", "--probe.labels=[]"]
# what a clock, a memory meter, a machine or a path decides
UNLIKE = {"tokens_per_s", "masked_per_s", "matmul", "wait", "eta", "memory_gib", "seconds"}
UNLIKE |= {"metrics_offset", "micro_tokens", "backbone", "config", "versions", "git", "device"}
UNLIKE |= {"before", "time", "command", "path", "files", "embeddings", "created"}
# who it is: random, or a digest of the bytes that are compared anyway
UNLIKE |= {"identity", "settings", "run", "data_digest", "weights_digest", "format_version"}


@contextmanager
def checkout(commit: str, folder: Path) -> Iterator[Path]:
    """The files of a commit; the working tree for `.`."""
    if commit == ".":
        yield ROOT
        return
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "-q", "--detach", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def train(tree: Path, run: Path, *arguments: str) -> None:
    """One run by the code of `tree`."""
    path = os.pathsep.join([str(tree), str(tree / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "smbfast.train", "tiny", f"--run.dir={run}", *arguments]
    done = subprocess.run(
        [*command, "--run.threads=1"], cwd=tree, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{tree}: the run failed\n{done.stdout}{done.stderr}")


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """All tensors and columns of numbers that a run left, by file and name."""
    named = {}
    for file in sorted(run.rglob("*.safetensors")):
        named |= {f"{file.relative_to(run)}:{n}": t for n, t in load_file(file).items()}
    for folder in ("embeddings", "predictions"):
        for file in sorted((run / folder).rglob("*.parquet")):
            table = pq.read_table(file)
            for name in table.column_names:
                values = table.column(name).to_pylist()
                if values and isinstance(values[0], float | list):
                    named[f"{file.relative_to(run)}:{name}"] = torch.tensor(
                        values, dtype=torch.float64
                    )
    for file in sorted([*run.rglob("*.shard"), *run.rglob("*.windows")]):
        whole = torch.frombuffer(bytearray(file.read_bytes() or b"\0"), dtype=torch.uint8)
        named[str(file.relative_to(run))] = whole
    return named


def comparable(value: object) -> object:
    """A record without what differs between two runs of one program."""
    if isinstance(value, dict):
        return {k: comparable(v) for k, v in value.items() if k not in UNLIKE}
    return [comparable(v) for v in value] if isinstance(value, list) else value


def records(run: Path, without: frozenset[str] = frozenset()) -> dict[str, object]:
    """Lines of the log but those of kinds `without`, and what stands beside the tensors."""
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] not in without]
    named: dict[str, object] = {f"metrics.jsonl:{i}": line for i, line in enumerate(lines)}
    for name in ("record.json", "smbfast.json", "probe.json", "sample.json"):
        for file in sorted(run.rglob(name)):
            named[str(file.relative_to(run))] = json.loads(file.read_text())
    return {name: comparable(value) for name, value in named.items()}


def differences(one: Path, other: Path, moments: float) -> list[str]:
    """What differs between two run folders, a line each."""
    lines = []
    ours, theirs = tensors(one), tensors(other)
    lines += [f"only one run has {name}" for name in sorted(ours.keys() ^ theirs.keys())]
    for name in sorted(ours.keys() & theirs.keys()):
        a, b = ours[name], theirs[name]
        same = a.dtype == b.dtype and a.shape == b.shape
        if same and a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8)):
            continue
        gap = float((a.double() - b.double()).norm() / a.double().norm()) if same else float("inf")
        if ":exp_avg" in name and gap <= moments:
            continue
        lines.append(f"{name}: {gap:.1e} apart, relative")
    # the self-check measures rounding, which is what `moments` lets differ
    without = frozenset({"self_check"} if moments else ())
    logged, logged_too = records(one, without), records(other, without)
    lines += [f"only one run has {name}" for name in sorted(logged.keys() ^ logged_too.keys())]
    for name in sorted(logged.keys() & logged_too.keys()):
        if logged[name] != logged_too[name]:
            lines.append(f"{name}: {logged[name]} and {logged_too[name]}")
    return lines


def main() -> None:
    """Run both commits, compare, say what differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commits", nargs=2, metavar="COMMIT")
    parser.add_argument(
        "--moments",
        type=float,
        default=0.0,
        help="relative difference that AdamW's moments in checkpoints may have (0: none); the "
        "self-check's measures of rounding are then left out",
    )
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for name, commit in zip("ab", words.commits, strict=True):
            with checkout(commit, root / f"tree-{name}") as tree:
                train(tree, root / name / "whole", *COMMON, *WHOLE)
                cohort = root / "a" / "whole" / "cohort-100-0"
                backbone = root / "a" / "whole" / "final"
                more = [f"--data.path={cohort}", f"--model.path={backbone}"]
                train(tree, root / name / "lora", *COMMON, *LORA, *more)
        lines, compared = [], 0
        for run in ("whole", "lora"):
            compared += len(tensors(root / "a" / run)) + len(records(root / "a" / run))
            gaps = differences(root / "a" / run, root / "b" / run, words.moments)
            lines += [f"{run}: {line}" for line in gaps]
    for line in lines:
        print(line)
    print(f"{compared} tensors and records, {len(lines)} differ")
    raise SystemExit(1 if lines else 0)


if __name__ == "__main__":
    main()
