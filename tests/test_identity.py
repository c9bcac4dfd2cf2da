"""A run goes on from what it was made with, or says in one line what differs: none is silent."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from smbfast import check, embed, train
from smbfast.base.digests import CACHE, check_weights, hub_commit, local_model, weights_digest
from smbfast.base.files import MANIFEST, digest_of, legal, verify_folder
from smbfast.data.preparing import prepare
from smbfast.model.backbone import lora_config
from smbfast.run import checkpoint
from smbfast.run.checkpoint import restore_final
from smbfast.run.folder import earlier, run_id, status_of
from smbfast.run.open_run import OpenRun
from smbfast.settings import LoraSettings, load, run_arguments
from tests.factory import tiny_run, write_labels, write_meds
from tests.kills import killed_in_a_write
from tests.refusal import no_canary, refused

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_report")]

CPU = torch.device("cpu")
NEWEST = "step-000004"
QUICK = ("--probe.labels=[]", "--run.threads=1", "--objective.self_check=false")


@dataclass(frozen=True)
class Runs:
    """What is trained once: a run, and LoRA on its model; and a twin, which differs in its id."""

    root: Path

    def argv(self, name: str, folder: Path, *more: str) -> list[str]:
        """The arguments of a run, in another folder."""
        if name == "lora":
            own = (f"--model.path={self.root}/base", f"--model.adapter={self.root}/adapter")
            more = (*own, "--model.train=lora", f"--data.prepared={self.root}/lora_p", *more)
        return tiny_run(self.root / "data", folder, *QUICK, f"--data.prepared={self.root}/p", *more)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("identity"))
    write_labels(write_meds(runs.root / "data"))
    train.main(runs.argv("whole", runs.root / "whole"))
    twin = shutil.copytree(runs.root / "whole", runs.root / "twin")
    edit(twin / "run.json", lambda c: c.update(run="0123456789abcdef"))
    for folder in (twin / "checkpoints").iterdir():
        edit_record(folder, lambda c: c["identity"].update(run="0123456789abcdef"))
    edit(twin / "final" / "smbfast.json", lambda c: c.update(run="0123456789abcdef"))
    reseal(twin / "final")
    base = shutil.copytree(runs.root / "whole" / "final", runs.root / "base")
    lm = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(lm, lora_config(lm, LoraSettings(r=2), [])).save_pretrained(
        runs.root / "adapter"
    )
    train.main(runs.argv("lora", runs.root / "lora"))
    return runs


@dataclass
class Box:
    """A copy of a run, its data and its shards, in which something is swapped."""

    runs: Runs
    root: Path
    name: str = "whole"
    more: list[str] = field(default_factory=list)
    saved: dict[Path, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shutil.copytree(self.runs.root / self.name, self.run)
        self.set_status("preempted")

    @property
    def run(self) -> Path:
        return self.root / "run"

    def set_status(self, state: str) -> None:
        status = json.loads((self.run / "status.json").read_text())
        (self.run / "status.json").write_text(json.dumps({**status, "state": state}))

    @property
    def checkpoint(self) -> Path:
        return self.run / "checkpoints" / NEWEST

    def copy(self, name: str, key: str) -> Path:
        """A copy of a folder that every run shares, named by an argument in its place."""
        folder = shutil.copytree(self.runs.root / name, self.root / name)
        self.more.append(f"--{key}={folder}")
        return folder

    def in_place(self, name: str) -> Path:
        """A folder that every run shares, which `restore` makes what it was."""
        folder = self.runs.root / name
        self.saved[folder] = shutil.copytree(folder, self.root / f"saved-{name}")
        return folder

    def restore(self) -> None:
        for folder, saved in self.saved.items():
            replaced(folder, saved)

    def argv(self) -> list[str]:
        return self.runs.argv(self.name, self.run, *self.more)


def reseal(folder: Path) -> None:
    """Give a folder the manifest of the files that it holds now."""
    content = json.loads((folder / MANIFEST).read_text())
    for name in list(content["files"]):
        file = folder / name
        digest = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
        content["files"][name] = (file.stat().st_size, digest) if digest else None
    content["files"] = {n: entry for n, entry in content["files"].items() if entry}
    (folder / MANIFEST).write_text(json.dumps(content))


def edit(file: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def flip(file: Path, at: float = 0.5) -> None:
    content = bytearray(file.read_bytes())
    content[int(at * len(content))] ^= 1
    file.write_bytes(content)


def replaced(folder: Path, by: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(by, folder)


def doubled(file: Path) -> None:
    """Other values of the same size."""
    save_file({n: t * 1.5 for n, t in load_file(file).items()}, file, {"format": "pt"})


def all_checkpoints(box: Box, change: Callable[[Path], object]) -> None:
    for folder in sorted((box.run / "checkpoints").iterdir()):
        change(folder)


def edit_record(folder: Path, change: Callable[[dict], object]) -> None:
    edit(folder / "record.json", change)
    reseal(folder)


def another_export(box: Box) -> None:
    """One value differs; the file keeps its size, and its rows."""
    file = box.copy("data", "data.path") / "data" / "train" / "0.parquet"
    size, table = file.stat().st_size, pq.read_table(file)
    values = pc.if_else(pc.is_null(table["numeric_value"]), None, pc.negate(table["numeric_value"]))
    place = table.schema.get_field_index("numeric_value")
    pq.write_table(table.set_column(place, "numeric_value", values.cast(pa.float32())), file)
    assert file.stat().st_size == size


def other_data_and_shards(box: Box) -> None:
    """The dataset and the prepared folder of another, which fit each other."""
    another_export(box)
    settings = load("tiny", [f"--data.path={box.root / 'data'}"]).data
    prepare(settings, box.root / "other", None, ("train", "tuning"))
    box.more.append(f"--data.prepared={box.root / 'other'}")


def edited_codes(box: Box) -> None:
    """An edge between two bins is moved, and all that vouches for it is made anew."""
    folder = box.copy("p", "data.prepared")
    file = folder / "tokenizer" / "codes.json"
    content = json.loads(file.read_text())["vocabulary"]
    next(c for c in content["codes"] if "edges" in c)["edges"][0] -= 1
    file.write_text(json.dumps({"digest": digest_of(content), "vocabulary": content}))
    reseal(folder / "tokenizer")
    edit(folder / "prepare.json", lambda c: c.update(encoder=digest_of(content)))


def swapped_shard(box: Box) -> None:
    """A byte of a shard differs; a manifest beside it, where there is one, vouches for it."""
    files = (box.copy("p", "data.prepared") / "train").rglob("*")
    file = max((f for f in files if f.is_file()), key=lambda f: f.stat().st_size)
    flip(file, 0.9)
    if (file.parent / MANIFEST).is_file():
        reseal(file.parent)


def edited_config(folder: Path) -> None:
    edit(folder / "config.json", lambda c: c.update(rms_norm_eps=1e-3))


SWAPS: dict[str, tuple[str, Callable[[Box], object], tuple[str, ...]]] = {
    "checkpoint of a twin": (
        "whole",
        lambda b: replaced(b.checkpoint, b.runs.root / "twin" / "checkpoints" / NEWEST),
        ("is of run",),
    ),
    "all checkpoints of a twin": (
        "whole",
        lambda b: replaced(b.run / "checkpoints", b.runs.root / "twin" / "checkpoints"),
        ("is of run",),
    ),
    "checkpoint of another model": (
        "whole",
        lambda b: replaced(b.checkpoint, b.runs.root / "lora" / "checkpoints" / NEWEST),
        ("is of run", "model.train"),
    ),
    "run.json of a twin": (
        "whole",
        lambda b: shutil.copy(b.runs.root / "twin" / "run.json", b.run),
        ("is of run",),
    ),
    "run.json gone": ("whole", lambda b: (b.run / "run.json").unlink(), ("run.json",)),
    "run.json cut": ("whole", lambda b: (b.run / "run.json").write_text("{"), ("run.json",)),
    "run.json of format 2": (
        "whole",
        lambda b: edit(b.run / "run.json", lambda c: c.update(format=2)),
        ("run.json", "format 2"),
    ),
    "config.toml gone": (
        "whole",
        lambda b: ((b.run / "config.toml").unlink(), b.more.append("--optim.batch=2")),
        ("no config.toml",),
    ),
    "config.toml and command changed": (
        "whole",
        lambda b: (
            (b.run / "config.toml").write_text(
                (b.run / "config.toml").read_text().replace("seed = 0", "seed = 1", 1)
            ),
            b.more.append("--run.seed=1"),
        ),
        ("run.seed: 0 -> 1",),
    ),
    "manifests emptied": (
        "whole",
        lambda b: all_checkpoints(
            b, lambda f: edit(f / MANIFEST, lambda c: c.update(files={}, format=1))
        ),
        ("all are damaged",),
    ),
    "manifests without the state": (
        "whole",
        lambda b: all_checkpoints(
            b, lambda f: edit(f / MANIFEST, lambda c: c["files"].pop("state.safetensors"))
        ),
        ("all are damaged",),
    ),
    "manifests without the record": (
        "whole",
        lambda b: all_checkpoints(
            b, lambda f: edit(f / MANIFEST, lambda c: c["files"].pop("record.json"))
        ),
        ("all are damaged",),
    ),
    "manifest of format 2": (
        "whole",
        lambda b: edit(b.checkpoint / MANIFEST, lambda c: c.update(format=2)),
        (MANIFEST, "format 2"),
    ),
    "checkpoint of format 2": (
        "whole",
        lambda b: edit_record(b.checkpoint, lambda c: c["identity"].update(format_version=2)),
        (NEWEST, "format 2"),
    ),
    "checkpoint of an earlier version": (
        "whole",
        lambda b: edit_record(b.checkpoint, lambda c: (c.pop("identity"), c.pop("settings"))),
        (NEWEST, "earlier version"),
    ),
    "checkpoint without its target": (
        "whole",
        lambda b: edit_record(b.checkpoint, lambda c: c.update(target_updates=None)),
        (NEWEST, "record.json"),
    ),
    "checkpoints renamed to later steps": (
        "whole",
        lambda b: all_checkpoints(b, lambda f: f.rename(f.with_name(f"step-10000{f.name[-1]}"))),
        ("all are damaged",),
    ),
    "all checkpoints damaged": (
        "whole",
        lambda b: all_checkpoints(b, lambda f: flip(f / "state.safetensors")),
        ("all are damaged",),
    ),
    "all checkpoints gone": (
        "whole",
        lambda b: shutil.rmtree(b.run / "checkpoints"),
        ("status.json", "step 4"),
    ),
    "data of equal sizes": ("whole", another_export, ("data differ",)),
    "data and shards of another": (
        "whole",
        other_data_and_shards,
        ("the MEDS data", "token shards", "vocabulary"),
    ),
    "a shard of equal size": ("whole", swapped_shard, ("shard",)),
    "codes.json edited": (
        "whole",
        lambda b: flip(b.copy("p", "data.prepared") / "tokenizer" / "codes.json"),
        ("codes.json",),
    ),
    "codes.json edited, and all that vouches for it": ("whole", edited_codes, ("vocabulary",)),
    "tokenizer edited": (
        "whole",
        lambda b: flip(b.copy("p", "data.prepared") / "tokenizer" / "tokenizer.json"),
        ("tokenizer.json",),
    ),
    "final of a twin": (
        "whole",
        lambda b: (
            b.set_status("done"),
            replaced(b.run / "final", b.runs.root / "twin" / "final"),
        ),
        ("final is of run",),
    ),
    "base weights": (
        "lora",
        lambda b: doubled(b.in_place("base") / "model.safetensors"),
        ("the weights of model.path",),
    ),
    "base configuration": (
        "lora",
        lambda b: edited_config(b.in_place("base")),
        ("the weights of model.path",),
    ),
    "adapter weights": (
        "lora",
        lambda b: doubled(b.in_place("adapter") / "adapter_model.safetensors"),
        ("the weights of model.adapter",),
    ),
    "finished on other data": (
        "whole",
        lambda b: (b.set_status("done"), another_export(b)),
        ("data.path",),
    ),
}


@pytest.fixture
def box(runs: Runs, tmp_path: Path) -> Iterator[Callable[..., Box]]:
    """Makes the copy of a run, and ends with what all runs share as it was."""
    made: list[Box] = []

    def make(name: str = "whole") -> Box:
        made.append(Box(runs, tmp_path, name))
        return made[-1]

    yield make
    for each in made:
        each.restore()


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file but the cache of digests."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != CACHE]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.mark.parametrize("name", SWAPS)
def test_a_swap_is_refused_by_name_and_nothing_is_written(
    box: Callable[..., Box], name: str
) -> None:
    of, swap, words = SWAPS[name]
    mine = box(of)
    swap(mine)
    before = snapshot(mine.run)
    refused(lambda: train.main(mine.argv()), *words)
    assert snapshot(mine.run) == before


def test_the_preflight_refuses_what_training_refuses(box: Callable[..., Box]) -> None:
    mine = box()
    SWAPS["all checkpoints damaged"][1](mine)
    before = snapshot(mine.run)
    refused(lambda: check.main(mine.argv()), "all are damaged", "--resume=restart")
    assert snapshot(mine.run) == before


def test_data_that_moved_and_are_equal_are_the_same(
    box: Callable[..., Box], capsys: pytest.CaptureFixture[str]
) -> None:
    """And what is gone without harm is said: the log, and the newest checkpoint."""
    mine = box()
    mine.copy("data", "data.path")
    mine.copy("p", "data.prepared")
    (mine.run / "metrics.jsonl").unlink()
    shutil.rmtree(mine.checkpoint)
    settings = load(*run_arguments(mine.argv()))
    assert earlier(mine.run, settings) == "resumed"
    assert OpenRun.open(settings).progress.step == 3
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 2 and "newest checkpoint is of step 3" in shown[0]
    assert "metrics.jsonl must have" in shown[1]


def test_finished_is_what_has_a_whole_final_folder(
    box: Callable[..., Box], capsys: pytest.CaptureFixture[str]
) -> None:
    mine = box()
    mine.set_status("done")
    written = verify_folder(mine.run / "final")["files"]  # without its card, which names the run
    train.main(mine.argv())
    assert "is finished" in capsys.readouterr().out
    flip(mine.run / "final" / "model.safetensors")
    assert earlier(mine.run, load(*run_arguments(mine.argv()))) == "resumed"
    assert "model.safetensors does not match" in capsys.readouterr().err
    shutil.rmtree(mine.run / "final")
    train.main(mine.argv())
    assert "says that it is done, but" in capsys.readouterr().err
    assert verify_folder(mine.run / "final")["files"] == written
    assert status_of(mine.run)["state"] == "done"


def test_what_kills_have_left_is_gone_once_a_run_goes_on(box: Callable[..., Box]) -> None:
    """Also beside what is not written again, as nothing is after the last checkpoint."""
    mine = box()
    source = mine.run / "prepared" / "source"
    source.mkdir(parents=True, exist_ok=True)
    for path in (mine.run / "best" / "jepa", mine.checkpoint, source / "any"):
        killed_in_a_write(path)
    assert len(list(mine.run.rglob("*.tmp"))) == 3
    train.main(mine.argv())
    assert status_of(mine.run)["state"] == "done"
    assert not list(mine.run.rglob("*.tmp"))


def test_checkpoints_that_a_kill_has_left_over_go_though_none_is_saved_again(
    box: Callable[..., Box],
) -> None:
    mine = box()
    train.main(mine.argv())
    newest = max((mine.run / "checkpoints").iterdir())
    for name in ("step-000000", "step-000001"):
        shutil.copytree(newest, newest.with_name(name))
    shutil.rmtree(mine.run / "final")
    train.main(mine.argv())
    assert not (newest.with_name("step-000000")).exists() and newest.is_dir()


def test_a_run_that_goes_on_is_shared_or_no_longer(box: Callable[..., Box]) -> None:
    mine = box()
    mine.run.chmod(0o755)  # as it was before, or by another program
    train.main(mine.argv())
    assert mine.run.stat().st_mode & 0o777 == 0o700
    shutil.rmtree(mine.run / "final")
    before = os.umask(0o022)
    try:
        train.main([*mine.argv(), "--run.share=true"])
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (mine.run, *mine.run.iterdir())}
    assert modes[mine.run.name] == modes["checkpoints"] == modes["final"] == 0o755
    assert modes["metrics.jsonl"] == modes["config.toml"] == 0o644


def test_an_emptied_manifest_is_damage_and_the_older_checkpoint_is_used(
    box: Callable[..., Box], capsys: pytest.CaptureFixture[str]
) -> None:
    mine = box()
    edit(mine.checkpoint / MANIFEST, lambda c: c.update(files={}))
    run = OpenRun.open(load(*run_arguments(mine.argv())))
    assert run.progress.step == 3 and "must name the files" in capsys.readouterr().err
    assert (mine.run / "checkpoints" / f"damaged-{NEWEST}").is_dir()


def test_restart_leaves_what_cannot_be_used_and_goes_on_from_what_can(
    box: Callable[..., Box], runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    """So a job that is queued again with the same words does not begin for ever."""
    mine = box()
    SWAPS["all checkpoints damaged"][1](mine)
    mine.more.append("--resume=restart")
    settings = load(*run_arguments(mine.argv()))
    before = snapshot(mine.run)
    assert OpenRun.open(settings, set_aside=False).progress.step == 0
    assert snapshot(mine.run) == before, "a preflight changes nothing"
    run = OpenRun.open(settings)
    assert run.progress.step == 0 and "begins again at step 0" in capsys.readouterr().err
    names = sorted(p.name for p in (mine.run / "checkpoints").iterdir())
    assert names == ["unused-step-000002", "unused-step-000003", "unused-step-000004"]
    assert run.identity.run != run_id(runs.root / "whole")
    run.begin()
    run.save(None, 1, 0, "the same command")
    assert earlier(mine.run, settings) == "resumed"
    again = OpenRun.open(settings)
    assert again.progress.step == 1 and again.identity == run.identity


def test_a_configuration_that_is_gone_needs_a_restart(box: Callable[..., Box]) -> None:
    mine = box()
    (mine.run / "config.toml").unlink()
    mine.more.append("--resume=restart")
    settings = load(*run_arguments(mine.argv()))
    assert earlier(mine.run, settings) == "new"
    assert OpenRun.open(settings).progress.step == 0


def test_steps_of_seven_digits_come_after_those_of_six(tmp_path: Path) -> None:
    names = ["step-000999", "step-999999", "step-1000000", "step-1000001"]
    for name in [
        *reversed(names),
        "step-0000001",
        "damaged-step-000001",
        "step-1",
        "step-000002.old",
    ]:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [f.name for f in checkpoint.folders(tmp_path)] == names


def test_what_is_logged_is_legal_json() -> None:
    values = legal({"loss": float("nan"), "best": {"sft": [float("inf"), 1.5, 2, None, "x"]}})
    assert json.loads(json.dumps(values, allow_nan=False)) == {
        "loss": None,
        "best": {"sft": [None, 1.5, 2, None, "x"]},
    }


def test_weights_are_read_again_when_they_change(tmp_path: Path, runs: Runs) -> None:
    """Also when size and date are set back; a card beside them is no part of them."""
    base, cache = shutil.copytree(runs.root / "base", tmp_path / "base"), tmp_path / "c.json"
    file = base / "model.safetensors"
    digest, before = weights_digest(base, cache), file.stat()
    assert weights_digest(base) == digest and len(json.loads(cache.read_text())["files"]) == 2
    (base / "README.md").write_text("a card")
    assert weights_digest(base, cache) == digest
    doubled(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    other = weights_digest(base, cache)
    assert other == weights_digest(base) != digest
    assert check_weights({"weights_digest": other}, base) is None
    assert "earlier version" in str(check_weights({}, base))
    refused(lambda: check_weights({"weights_digest": digest}, base), base, digest[:12])
    refused(lambda: weights_digest("someorg/not-there"), "someorg/not-there")
    refused(lambda: weights_digest(tmp_path / "no"), tmp_path / "no")


def test_a_model_of_the_hub_is_read_where_it_lies_on_disk(
    tmp_path: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0" * 40
    root = tmp_path / "models--org--name"
    shutil.copytree(runs.root / "base", root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert local_model("org/name") == root / "snapshots" / commit
    assert local_model("org/name", commit) == root / "snapshots" / commit
    assert local_model("org/name", "1" * 40) is None
    assert hub_commit("org/name") == commit and hub_commit(runs.root / "base") is None
    assert weights_digest("org/name") == weights_digest(runs.root / "base")


def test_a_model_says_what_it_comes_from(runs: Runs) -> None:
    record = json.loads((runs.root / "lora" / "final" / "smbfast.json").read_text())
    name = json.loads((runs.root / "lora" / "run.json").read_text())["run"]
    assert record["run"] == name and record["format_version"] == 1
    assert record["weights_digest"] == weights_digest(runs.root / "base")
    prepared = json.loads((runs.root / "lora_p" / "prepare.json").read_text())
    assert record["data_digest"] == prepared["data"]


def test_an_adapter_as_the_backbone_goes_on_with_its_own(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    final = runs.root / "lora" / "final"
    settings = load("tiny", [f"--model.path={final}"])
    assert settings.model.adapter == str(final)
    assert settings.model.path == str((runs.root / "base").resolve())
    assert f"--model.adapter={final}" in capsys.readouterr().err
    both = [f"--model.path={settings.model.path}", f"--model.adapter={final}"]
    assert load("tiny", both) == settings
    refused(lambda: load("tiny", [f"--model.path={final}", "--model.adapter=x"]), "another, x")
    refused(lambda: load("tiny", [f"--model.path={final}", "--model.train=all"]), "model.train")
    moved = shutil.copytree(final, tmp_path / "moved")
    edit(moved / "smbfast.json", lambda c: c.update(backbone=str(tmp_path / "gone")))
    words = ("gone is not there", "--model.path=BACKBONE", f"--model.adapter={moved}")
    refused(lambda: load("tiny", [f"--model.path={moved}"]), *words)
    (moved / "smbfast.json").unlink()  # an adapter of PEFT alone
    assert load("tiny", [f"--model.path={moved}"]).model.path == settings.model.path
    edit(moved / "adapter_config.json", lambda c: c.pop("base_model_name_or_path"))
    refused(lambda: load("tiny", [f"--model.path={moved}"]), "does not say of which backbone")


def test_an_adapter_goes_on_with_the_weights_that_it_was_trained_on_alone(
    runs: Runs, tmp_path: Path
) -> None:
    final = shutil.copytree(runs.root / "lora" / "final", tmp_path / "final")
    edit(final / "smbfast.json", lambda c: c.update(weights_digest="0" * 64))
    argv = tiny_run(runs.root / "data", tmp_path / "run", f"--model.path={final}", *QUICK)
    words = (runs.root / "base", "must be the backbone that the model was trained on", "0" * 12)
    refused(lambda: train.main(argv), *words)


ODD: dict[str, tuple[object, str]] = {
    "trains": ("everything", "trains"),
    "dtype": ("float8", "dtype"),
    "compute": ("load", "compute"),
    "vocabulary": (10**9, "vocabulary must be"),
    "predictor_layers": (10**9, "predictor_layers must be 2"),
    "window": ("128", "window"),
    "pool": ("nope", "pool"),
    "data_format": ("pickle", "data_format"),
    "delimiters": (None, "delimiters"),
    "format": (99, "format"),
    "format_version": (2, "format_version"),
    "encoder": (1, "encoder"),
    "section_rules": ({"rules": {"LAB": 999}, "fallback": 0}, "section_rules"),
    "options": ({"gap_floor": "x"}, "options"),
}


@pytest.mark.parametrize("how", ["odd", "missing"])
@pytest.mark.parametrize("key", ODD)
def test_a_record_is_checked_before_anything_is_made_of_it(
    runs: Runs, tmp_path: Path, key: str, how: str
) -> None:
    final = shutil.copytree(runs.root / "whole" / "final", tmp_path / "final")
    value, words = ODD[key]
    edit(final / "smbfast.json", lambda c: c.update({key: value}) if how == "odd" else c.pop(key))
    reseal(final)
    if how == "missing" and key == "data_format":  # text-paper, which has other options
        words = key = "options"
    if how == "missing" and key in ("compute", "format_version"):  # as in older records
        restore_final(final, CPU)
        return
    with pytest.raises(ValueError, match=words if how == "odd" else key) as error:
        restore_final(final, CPU)
    no_canary(str(error.value))


BROKEN: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a file that nothing vouches for": (
        "whole",
        lambda f: (f / "adapter_config.json").write_text("{}"),
        "adapter_config.json",
    ),
    "another base": (
        "lora",
        lambda f: edit(f / "smbfast.json", lambda c: c.update(weights_digest="0" * 64)),
        "000000000000",
    ),
    "a backbone of the network": (
        "lora",
        lambda f: edit(f / "smbfast.json", lambda c: c.update(backbone="someorg/not-there")),
        "someorg/not-there",
    ),
    "no backbone": (
        "lora",
        lambda f: edit(f / "smbfast.json", lambda c: c.update(backbone=None)),
        "backbone",
    ),
    "a deep record": (
        "whole",
        lambda f: (f / "smbfast.json").write_text("[" * 100_000),
        "smbfast.json",
    ),
    "a predictor that is cut": (
        "whole",
        lambda f: save_file({"mask_vector": torch.zeros(1)}, f / "predictor.safetensors"),
        "predictor_layers",
    ),
    "a predictor that is none": (
        "whole",
        lambda f: (f / "predictor.safetensors").write_bytes(b"x" * 100),
        "predictor.safetensors",
    ),
    "a mask vector of another width": (
        "whole",
        lambda f: save_file(
            {**load_file(f / "predictor.safetensors"), "mask_vector": torch.zeros(3)},
            f / "predictor.safetensors",
        ),
        "mask vector",
    ),
    "an empty target": (
        "whole",
        lambda f: save_file({}, f / "target.safetensors"),
        "target",
    ),
    "layers without weights": (
        "whole",
        lambda f: edit(f / "config.json", lambda c: c.update(num_hidden_layers=10**7)),
        "num_hidden_layers",
    ),
    "a rank that the adapter does not have": (
        "lora",
        lambda f: edit(f / "adapter_config.json", lambda c: c.update(r=10**9)),
        "adapter",
    ),
    "a scale that is not finite": (
        "lora",
        lambda f: edit(f / "adapter_config.json", lambda c: c.update(lora_alpha=1e308)),
        "adapter",
    ),
    "a scale that is a text": (
        "lora",
        lambda f: edit(f / "adapter_config.json", lambda c: c.update(lora_alpha="2")),
        "adapter",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_final_folder_of_anyone_is_refused_in_one_line(
    runs: Runs, tmp_path: Path, name: str
) -> None:
    of, change, words = BROKEN[name]
    final = shutil.copytree(runs.root / of / "final", tmp_path / "final")
    change(final)
    reseal(final)
    out = tmp_path / "out.parquet"
    argv = [f"--model={final}", f"--data={runs.root}/data", "--labels=task", f"--out={out}"]
    refused(lambda: embed.main(argv), words)
    assert not out.exists()
