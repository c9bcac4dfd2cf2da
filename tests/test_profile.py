"""The profile of a run: which part each operation counts for, and what is written."""

import gzip
import json
import time
from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

import smbfast.train as entry
from smbfast.base import parts
from smbfast.base.parts import naming, part
from smbfast.run import loop, profile
from smbfast.run.profile import Span, part_seconds
from smbfast.simulation.dataset import simulate
from tests.test_shared_step import batch_of
from tests.test_train import SHORT, StopAfter, told
from tests.two_paths import Case, make_encoder, moved_target, run

LAYERS = 2  # of the tiny encoder


def events_of(encoder, target=None, **more) -> list:
    batch = batch_of()
    run("shared", encoder, target, [batch], **more)  # loads and chooses what a first call does
    with torch_profile(activities=[ProfilerActivity.CPU]) as taken, naming():
        run("shared", encoder, target, [batch], **more)
    return sorted(taken.events(), key=lambda e: (e.time_range.start, -e.time_range.end))


def nodes_by_part(events: list, name: str) -> Counter:
    """How many nodes of the backward of a kind each part has."""
    part_of = profile._part_of_operations(events)
    nodes = [e for e in events if e.name == profile._NODE + name]
    return Counter(part_of.get(e.sequence_nr) for e in nodes)


@pytest.mark.parametrize("recompute", ["none", "mlp", "full"])
def test_every_product_of_the_backward_belongs_to_the_part_of_its_forward(recompute):
    events = events_of(make_encoder(lora=False), jepa=0.0, recompute=recompute)
    products = nodes_by_part(events, "MmBackward0")
    assert products == {"qkv": 3 * LAYERS, "attention": LAYERS, "mlp": 3 * LAYERS}
    # two norms of a layer and the last one, RoPE with the norms of heads, and SwiGLU
    others = {"norm": 2 * LAYERS + 1, "attention": LAYERS, "mlp": LAYERS}
    assert nodes_by_part(events, "EagerBackward") == others


def test_the_backward_of_fused_operations_has_a_part():
    case = Case(lora=True, form="tracked")
    encoder = make_encoder(lora=case.lora)
    events = events_of(encoder, moved_target(encoder, case.form))
    # groups of LoRA linears: one of projections, one of the output, and two of the MLP; and between
    # them RoPE, SwiGLU, two norms of a layer and the last one
    nodes = {"qkv": LAYERS, "attention": 2 * LAYERS, "mlp": 3 * LAYERS, "norm": 2 * LAYERS + 1}
    assert nodes_by_part(events, "EagerBackward") == nodes
    names = {e.name.removeprefix(profile._NODE) for e in events if e.name.startswith(profile._NODE)}
    fused = [n for n in names if "smb" in n]
    assert len(fused) == 3
    for name in fused:
        part = "attention" if "attention" in name else "head"
        assert set(nodes_by_part(events, name)) == {part}, name


def test_the_target_s_layers_are_the_target_s():
    encoder = make_encoder(lora=False)
    events = events_of(encoder, moved_target(encoder))
    [target] = [e for e in events if e.name == parts.PREFIX + "target"]
    assert any(e.cpu_parent is target and "norm" in e.name for e in events)
    [spans] = profile._spans(events).values()
    within = [s for s in spans if target.time_range.start < s.end <= target.time_range.end]
    assert {s.part for s in within} == {"target"}
    seconds = sum(s.end - s.start for s in within)
    assert seconds == pytest.approx(target.time_range.end - target.time_range.start)


def test_time_counts_once_for_the_innermost_part():
    nested = [
        Span("attention", 0, 10),
        Span("qkv", 1, 4),
        Span("norm", 4, 5),
        Span("target", 12, 20),
        Span("norm", 13, 14),
        Span("mlp", 20, 21),
    ]
    cut = [(s.part, s.start, s.end) for s in profile._innermost(nested)]
    assert cut == [
        ("attention", 0, 1),
        ("qkv", 1, 4),
        ("norm", 4, 5),
        ("attention", 5, 10),
        ("target", 12, 13),
        ("target", 13, 14),
        ("target", 14, 20),
        ("mlp", 20, 21),
    ]


class FakeEvent:
    """As much of an event as is read."""

    device_type, thread, sequence_nr = torch.autograd.DeviceType.CPU, 1, -1

    def __init__(self, name: str, start: float, end: float, kernels=(), parent=None) -> None:
        self.name, self.cpu_parent, self.kernels = name, parent, kernels
        self.time_range = type("Range", (), {"start": start, "end": end})


def test_on_a_gpu_kernels_count_for_the_part_that_launched_them():
    kernel = type("Kernel", (), {"duration": 3e6})
    events = [
        FakeEvent("part: mlp", 0, 2),
        FakeEvent("aten::mm", 1, 2, [kernel, kernel]),
        FakeEvent("aten::add", 3, 4, [kernel]),
    ]
    assert part_seconds(events, 12.0, on_gpu=True) == {"mlp": 6.0, "other": 6.0}
    assert part_seconds(events, 12.0, on_gpu=False) == pytest.approx({"mlp": 2e-6, "other": 12})


def test_without_a_profile_a_part_is_no_event():
    with torch_profile(activities=[ProfilerActivity.CPU]) as taken, part("mlp"):
        torch.ones(3).sum()
    assert not [e for e in taken.events() if e.name.startswith(parts.PREFIX)]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "cohort"
    simulate(folder, 60, 0)
    return folder


def train(cohort, folder, *more):
    quiet = [a for a in SHORT if not a.startswith(("--eval", "--run.save"))]
    quiet += ["--eval.every=50", "--run.save_every=50"]
    entry.main(["tiny", f"--data.path={cohort}", f"--run.dir={folder}", *quiet, *more])


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_a_profiled_run_leaves_tables_and_traces_and_is_the_same_run(
    cohort, tmp_path, capsys, monkeypatch
):
    train(cohort, tmp_path / "plain")
    assert not (tmp_path / "plain" / "profile").exists()
    clock = {}
    real = loop.profiled

    def clocked(steps, run):
        for step in real(steps, run):
            began = time.perf_counter()
            yield step
            clock[step.index] = time.perf_counter() - began

    monkeypatch.setattr(loop, "profiled", clocked)
    capsys.readouterr()
    with monkeypatch.context() as patch:  # stopped after the profile of the first phase
        StopAfter(patch, 4)
        with pytest.raises(SystemExit):
            train(cohort, tmp_path / "traced", "--profile=2")
    assert [p.name for p in (tmp_path / "traced" / "profile").iterdir()] == ["sft"]
    train(cohort, tmp_path / "traced", "--profile=2")
    shown = capsys.readouterr().out
    for name in ("sft", "jepa"):
        folder = tmp_path / "traced" / "profile" / name
        record = json.loads((folder / "profile.json").read_text())
        seconds, wall = record["parts_s"], record["wall_s"]
        assert record["steps"] == 2 and (folder / "profile.txt").read_text() in shown
        wanted = {"norm", "qkv", "attention", "mlp", "head", "optimizer", "data", "other"}
        wanted |= {"target", "ema"} if name == "jepa" else set()
        assert wanted <= seconds.keys() and all(seconds[part] > 0 for part in wanted)
        assert sum(seconds.values()) == pytest.approx(wall, rel=1e-6)
        # a clock beside it; in the second process the first step is left out as well
        steps = (1, 2) if name == "sft" else (5, 6)
        # (no less than they took; how much more is the machine's other work)
        assert wall >= 0.9 * (sum(clock[s] for s in steps) + seconds["data"])
        with gzip.open(folder / "trace.json.gz", "rt") as file:
            events = Counter(e.get("name") for e in json.load(file)["traceEvents"])
        assert events["part: optimizer"] == 2 and events["part: mlp"] > 0
    for file in sorted((tmp_path / "plain" / "final").glob("*.safetensors")):
        other = tmp_path / "traced" / "final" / file.name
        assert file.read_bytes() == other.read_bytes(), file.name
    assert told(tmp_path / "plain") == told(tmp_path / "traced")
