"""python -m tests.reliability.golden: checkpoints of today's format, which every later one reads.

Below `golden/` lie the data that they were trained on, the backbone of their adapters, and for each
run its checkpoint after eight of twelve steps and `golden.json`: the words of its command, digests
of what it held, and what its ninth step logged. Those of a released format are never written again;
this command writes those that are not there.

A tensor that is loaded is that which was saved, to the bit. The next losses are so where the
arithmetic is that of the machine which wrote them; elsewhere they agree within rounding.
"""

import hashlib
import json
import platform
import shutil
import tempfile
from contextlib import chdir
from pathlib import Path
from typing import Any

import torch

from smbfast.base.files import MANIFEST
from smbfast.run.open_run import OpenRun
from smbfast.run.optim import trained
from smbfast.settings import load, run_arguments
from tests.factory import write_meds
from tests.reliability import small_runs
from tests.reliability.small_runs import COMMON, OBJECTIVES, Shape, lean, run_here

HERE = Path(__file__).with_name("golden")
SHAPES = {
    "scratch": Shape("codes", "whole", "mask"),
    "horizons": Shape("codes", "whole", "horizon"),
    "lora": Shape("text", "merged", "hybrid"),
    "tracked": Shape("text", "tracked", "horizon"),
}
STEP = 8  # steps that were done
ALIKE = 1e-4  # relative difference of losses between machines: rounding, with room
MOST = 50_000  # bytes of a checkpoint
LOGGED = ("sft", "jepa", "codes", "grad_norm")


def open_golden(name: str, folder: Path) -> list[str]:
    """What differs in a golden checkpoint that is loaded, from what it held, in words.

    Args:
        folder: a copy of `golden/`, in which the run may write.
    """
    golden = json.loads((folder / name / "golden.json").read_text())
    try:
        with chdir(folder), lean():
            run = OpenRun.open(load(*run_arguments(golden["words"])))
    except Exception as error:  # what is wrong with it is what this looks for
        return [f"{name} does not load: {error!r}"]
    now, then = _digests(run), golden["tensors"]
    bad = [f"{name}: only one has {tensor}" for tensor in sorted(now.keys() ^ then.keys())]
    same = sorted(now.keys() & then.keys())
    bad += [f"{name}: {tensor} differs" for tensor in same if now[tensor] != then[tensor]]
    if run.progress.step != STEP:
        bad.append(f"{name}: it goes on after step {run.progress.step}")
    return bad


def next_step(name: str, folder: Path) -> tuple[list[str], bool]:
    """What differs in the next step of a golden checkpoint, in words; whether bits were compared.

    Args:
        folder: a copy of `golden/`, in which the run may write.
    """
    golden, run = json.loads((folder / name / "golden.json").read_text()), folder / name
    with chdir(folder):
        run_here(golden["words"], run, stop_after=1)
    now, then = _logged(run), golden["next"]
    exact = golden["arithmetic"] == arithmetic()
    if exact:
        return [
            f"{name}: {n} {now[n]} and not {then[n]}" for n in LOGGED if now[n] != then[n]
        ], True
    return [
        f"{name}: {n} {now[n]}, {then[n]}" for n in LOGGED if not _alike(now[n], then[n])
    ], False


def refusals(name: str, scratch: Path) -> list[str]:
    """Of checkpoints of an older and a newer format, those not refused by name, in words."""
    golden, bad = json.loads((HERE / name / "golden.json").read_text()), []
    for version in (0, 2):
        for file in (MANIFEST, "record.json"):
            folder, said = scratch / f"{version}-{file}", ""
            shutil.copytree(HERE, folder)
            _of_format(folder / name / "checkpoints" / f"step-{STEP:06d}", file, version)
            try:
                with chdir(folder):
                    run_here(golden["words"], folder / name, stop_after=1)
            except SystemExit as stop:
                said = str(stop.code)
            if f"format {version}" not in said or "the version that wrote it" not in said:
                bad.append(f"{name}: format {version} of {file}: {said or 'accepted'}")
    return bad


def _of_format(checkpoint: Path, file: str, version: int) -> None:
    """Let a checkpoint say that it is of another format, and be whole."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    if file == MANIFEST:
        manifest["format"] = version
    else:
        record = json.loads((checkpoint / file).read_text())
        record["identity"]["format_version"] = version
        (checkpoint / file).write_text(json.dumps(record))
        content = (checkpoint / file).read_bytes()
        manifest["files"][file] = (len(content), hashlib.sha256(content).hexdigest())
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


def arithmetic() -> str:
    """A digest of what decides the last bits of a sum: PyTorch, processor, instruction set."""
    processor = Path("/proc/cpuinfo")
    lines = processor.read_text().splitlines() if processor.is_file() else []
    own = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    what = (torch.__version__, torch.backends.cpu.get_cpu_capability(), platform.machine(), own)
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def _digests(run: OpenRun) -> dict[str, str]:
    """A digest of every tensor of a run, and of its counts, by their names in a checkpoint."""
    digests: dict[str, str] = {}
    for name, parameter in trained(run.encoder).items():
        digests[f"model.{name}"] = _digest(parameter)
        for kind, value in sorted(run.optimizer.state.get(parameter, {}).items()):
            digests[f"{kind}.{name}"] = _digest(value)
    target = run.take_target()
    if target is not None:
        digests |= {f"target.{name}": _digest(tensor) for name, tensor in target.state().items()}
        digests["target_updates"] = str(target.updates)
    return digests


def _digest(tensor: torch.Tensor) -> str:
    whole = tensor.detach().cpu().contiguous()
    what = (
        str(whole.dtype),
        tuple(whole.shape),
        whole.flatten().view(torch.uint8).numpy().tobytes(),
    )
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def _logged(run: Path) -> dict[str, Any]:
    step = next(
        x for x in small_runs.lines_of(run) if x["kind"] == "step" and x["step"] == STEP + 1
    )
    return {name: step[name] for name in LOGGED}


def _alike(now: float | None, then: float | None) -> bool:
    if now is None or then is None:
        return now is then
    return abs(now - then) <= ALIKE * abs(then)


def _words(name: str) -> list[str]:
    """The command of a golden run, whose paths hold in a copy of `golden/`."""
    shape = SHAPES[name]
    words = [
        f"{shape.objective}.toml",
        "--data.path=data",
        *COMMON,
        f"--data.format={shape.format}",
    ]
    words += [f"--run.dir={name}", "--run.device=cpu", "--run.keep=1", "--run.save_every=1000"]
    if shape.kind == "whole":
        return words
    words.remove("--data.vocab_size=400")
    words += ["--model.path=backbone", "--model.train=lora"]
    return [*words, f"--objective.target_form={shape.kind}"]


def main() -> None:
    """Write the golden checkpoints that are not there."""
    HERE.mkdir(exist_ok=True)
    if not (HERE / "data").is_dir():
        write_meds(HERE / "data")
        for name in sorted({shape.objective for shape in SHAPES.values()}):
            (HERE / f"{name}.toml").write_text(OBJECTIVES[name])
    if not (HERE / "backbone").is_dir():
        _write_backbone()
    for name in SHAPES:
        if not (HERE / name).is_dir():
            _write(name)
            print(f"{HERE / name} is written")


def _write_backbone() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        shutil.copytree(HERE, root / "golden")
        words = ["hybrid.toml", "--data.path=data", *COMMON, "--data.format=text", "--run.dir=run"]
        with chdir(root / "golden"):
            run_here([*words, "--run.device=cpu"], root / "golden" / "run")
        final = root / "golden" / "run" / "final"
        for name in ("README.md", "predictor.safetensors", "target.safetensors", "smbfast.json"):
            (final / name).unlink()
        (final / MANIFEST).unlink()
        shutil.copytree(final, HERE / "backbone")


def _write(name: str) -> None:
    words = _words(name)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "golden"
        shutil.copytree(HERE, root)
        with chdir(root):
            run_here(words, root / name, stop_after=STEP)
            with lean():
                tensors = _digests(OpenRun.open(load(*run_arguments(words))))
        own = ("checkpoints", "run.json", "config.toml")
        for part in own:
            source, target = root / name / part, HERE / name / part
            target.parent.mkdir(exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
        with chdir(root):
            run_here(words, root / name, stop_after=1)
        size = sum(
            f.stat().st_size for f in (HERE / name / "checkpoints").rglob("*.*") if f.is_file()
        )
        assert size <= MOST, f"{name} must be at most {MOST} bytes, got {size}"
        golden = {"words": words, "arithmetic": arithmetic(), "next": _logged(root / name)}
        text = json.dumps({**golden, "tensors": tensors}, indent=1)
        (HERE / name / "golden.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
