"""The plan of a run: counts against counters, memory against traces, and every figure's source."""

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import smbfast.check as entry
from smbfast import objective
from smbfast.base.config import build
from smbfast.data.preparing import prepare
from smbfast.model.memory import Memory
from smbfast.model.traffic import Traffic
from smbfast.run import plan_data, plan_table, planner
from smbfast.run.plan_data import sampled
from smbfast.run.planner import Planned, peaks_of, planned
from smbfast.run.startup import Kind, peak_memory
from smbfast.settings import DataSettings, PlanSettings, load, plan_arguments
from smbfast.settings.plan import GPUS, gpu_of
from tests.factory import write_meds
from tests.test_flops import counted, encoder_of

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "max_position_embeddings": 4096,
}
TOKENS = 1 << 10
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def run_of(folder: Path, *words: str, plan: tuple[str, ...] = (), layers: int = 6) -> Planned:
    """A LoRA run of which there is only a config.json."""
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    lora = [f"data.path={folder}", f"model.path={folder}", "data.window=256", "objective.jepa=mask"]
    settings = load("lora", [*lora, "optim.micro_tokens=1024", f"run.dir={folder}", *words])
    return planned(settings, build(PlanSettings, {}, ["--events=1e6", "--gpus=2", *plan]))


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Planned:
    return run_of(tmp_path_factory.mktemp("lora"))


def like(run: Planned, **plan: object) -> Planned:
    """The same run under another plan; what does not depend on it is not made again."""
    other = replace(run, plan=PlanSettings(**run.plan.model_dump(exclude_unset=True) | plan))
    for name in ("encoder", "memory", "shape", "form"):
        vars(other)[name] = getattr(run, name)
    return other


def test_flops_of_a_step_are_those_of_the_counter(tmp_path, monkeypatch):
    """Of every phase, with two windows in the sample and in the step."""
    monkeypatch.setattr(plan_data, "CUTS", 2)
    (tmp_path / "one").mkdir()
    run = run_of(tmp_path / "one", layers=1, plan=("--gpus=1", "--batch=2"))
    for phase in run.settings.phases:
        sample = sampled(run.settings, phase, run.facts)
        jepa, sft = float(phase.w_jepa > 0), float(phase.w_sft > 0)
        total = 0
        for batch in sample.batches:
            by_op = counted(objective, run.encoder, batch, run.form.name, sft=sft, jepa=jepa)
            total += sum(by_op.values())
        assert planner.phase_plan(run, phase).flops.total == total > 0


def test_memory_is_a_line_in_the_number_of_layers(lora):
    """Six layers as two and four of them say; blocks are rounded to 512 bytes."""
    kind = Kind.of(lora.settings.phases[1])  # both losses
    expected = peak_memory(lora.settings, lora.encoder, kind, TOKENS, 0, torch.device("cpu"))
    extended = peaks_of(lora)(TOKENS)
    for name, value in vars(extended).items():
        if name != "holes":
            assert value == pytest.approx(vars(expected)[name], abs=512 * 200), name
    assert sum(lora.memory.parts.values()) == lora.memory.total


def test_the_gradients_that_ranks_exchange(lora):
    """Each is one fp32 number; a phase without JEPA has none of predictor and mask vector."""
    sft, jepa = lora.phases
    own = [p.numel() for p in lora.encoder.parameters() if p.requires_grad]
    assert sum(jepa.exchanged.values()) == 4 * sum(own)
    assert set(jepa.exchanged) - set(sft.exchanged) == {"predictor", "mask vector"}
    assert jepa.exchanged["mask vector"] == 4 * 64
    ring = 2 * (1 / 2) * sum(jepa.exchanged.values()) / 50e9
    assert jepa.seconds["all-reduce"] == pytest.approx(ring + planner.MESSAGE)


def test_bytes_are_those_that_a_pretended_gpu_counted():
    """W1 of `bench.predict` at the shape of Qwen3-8B, as recorded: 2.7 % and 1.7 % from it."""
    from bench.step.workloads import on_cuda

    lines = (ROOT / "bench" / "results" / "predict.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    w1 = next(r for r in records if r["workload"] == "W1" and r["variant"] == "B4")
    rates = {name: about["rate"] for name, about in w1["rates"].items() if "rate" in about}
    traffic = Traffic.of(encoder_of(2, LINEARS), tracked=True, averages=True)
    batches = next(w for w in on_cuda() if w.name == "W1").batches()
    elements = 18 * sum(traffic.elements(b) - b.num_labels * traffic.logit for b in batches)
    narrow = 18 * sum(traffic.low_rank(b) for b in batches)
    counted_elements = w1["seconds"]["element-wise"] * rates["elements"]
    counted_narrow = w1["seconds"]["rank-r products"] * rates["narrow_products"]
    assert elements == pytest.approx(counted_elements, rel=0.03)
    assert narrow == pytest.approx(counted_narrow, rel=0.03)


def test_assumed_shares_are_those_of_the_file_of_rates():
    rates = tomllib.loads((ROOT / "bench" / "rates.toml").read_text())
    h200, own = GPUS["h200"], rates["attention"]["triton"]
    assert planner.PRODUCTS * h200.flops == pytest.approx(rates["base_products"]["rate"], rel=0.01)
    assert planner.ELEMENTS * h200.bandwidth == pytest.approx(rates["elements"]["rate"], rel=0.01)
    narrow = rates["narrow_products"]["rate"]
    assert planner.NARROW * h200.bandwidth == pytest.approx(narrow, rel=0.01)
    for share, direction in zip(planner.ATTENTION, ("forward", "backward"), strict=True):
        assert share * h200.flops == pytest.approx(own[direction], rel=0.01)
    assert rates["gap"]["seconds"] == planner.GAP


@pytest.mark.parametrize(
    ("gpus", "gigabytes", "fits", "sharded", "note"),
    [
        (4, 80, True, False, None),
        (4, 20, True, True, "model.fsdp=true divides its layers among 4 GPUs"),
        (1, 20, False, False, "several GPUs with model.fsdp=true"),
        (4, 10, False, True, "does NOT fit even with model.fsdp=true"),
    ],
)
def test_a_backbone_that_one_gpu_does_not_hold(
    lora, monkeypatch, gpus, gigabytes, fits, sharded, note
):
    """Layers of 16 GB and 2 GB beside them, steps of 5 GB: a fourth of the layers and two of six
    layers that are whole while they compute are 9.3 GB."""
    run = like(lora, gpus=gpus, gpu=f"100,1000,{gigabytes}")
    size = sum(
        p.numel() * 2 for p in run.encoder.decoder.layers.parameters() if not p.requires_grad
    )
    unit = size / 16
    peak = Memory(round(18 * unit), 0, 0, 0, round(5 * unit), 0)
    monkeypatch.setattr(planner, "peaks_of", lambda run: lambda tokens: peak)
    monkeypatch.setattr(planner, "CONTEXT", 0.0)
    vars(run)["gpu"] = replace(run.gpu, memory=gigabytes * unit)
    memory = vars(run)["memory"] = planner.memory_of(run)
    assert (memory.fits, memory.sharded) == (fits, sharded)
    whole = 2 + 16 / 4 + 2 * 16 / 6 + 5 if sharded else 23
    assert memory.total / unit == pytest.approx(whole, rel=1e-4)
    notes = list(plan_table._memory_notes(run))
    assert (note is None) == (not notes) and (note is None or note in notes[0])


def test_a_plan_extends_to_multiples_of_the_events(lora):
    one, ten = (plan_table.Column.of(lora, times) for times in (1.0, 10.0))
    assert ten.total == pytest.approx(10 * one.total) and ten.shards == 10 * one.shards
    assert one.tokens == pytest.approx(1e6 * lora.facts.tokens_an_event)
    twice = like(lora, epochs=2.0)
    assert plan_table.Column.of(twice, 1.0).training == pytest.approx(2 * one.training)


def test_a_slower_gpu_takes_longer_and_what_is_given_is_said(lora):
    fast, slow = lora, like(lora, products=0.1, attention=(0.1, 0.1), network=0.01)
    assert slow.phases[1].seconds["products"] > 7 * fast.phases[1].seconds["products"]
    assert slow.phases[1].seconds["all-reduce"] > 10 * fast.phases[1].seconds["all-reduce"]
    for run, word in ((fast, "assumed"), (slow, "given")):
        by_name = {row[0]: row[2] for row in plan_table._known_rows(run)}
        assert all(by_name[name].startswith(word) for name in ("products", "attention"))
    sources = [row[2] for row in plan_table._known_rows(fast)[1:]]
    known = ("assumed", "measured", "given", "counted", "data sheet", "steps of")
    assert all(source.startswith(known) for source in sources)


def test_the_command_plans_and_writes_nothing(tmp_path, capsys):
    folder = tmp_path / "run"
    entry.main(["tiny", f"--run.dir={folder}", "--gpus=4", "--gpu=l4", "--events=2e9"])
    said = capsys.readouterr().out
    assert "nothing was measured on a GPU" in said and "4 x l4" in said
    assert re.search(r"^events +2e9 +20e9 +200e9$", said, re.M)
    assert "planned with optim.batch=32, not 4" not in said  # four windows for four GPUs
    assert not folder.exists()


def test_tokens_an_event_are_those_of_the_prepared_shards(tmp_path):
    data = DataSettings(path=str(write_meds(tmp_path / "meds")), window=128, workers=1)
    made = prepare(data, tmp_path / "prepared", None, ("train", "tuning"))
    words = [f"data.path={tmp_path / 'meds'}", f"data.prepared={made.folder}"]
    run = planned(load("tiny", words), PlanSettings())
    windows = made.windows("train", 128, run.settings.objective)
    events = made.record["counts"]["train"]["events"]
    assert run.facts.events == events and run.facts.tokens_source.startswith("measured")
    assert run.facts.tokens_an_event == windows.num_tokens / events
    sizes = [f.stat().st_size for f in (made.folder / "train").glob("*.shard")]
    assert run.facts.bytes_an_event == sum(sizes) / events
    sft = run.settings.phases[0]
    assert sampled(run.settings, sft, run.facts).read == windows.num_tokens


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"one of b200, .* or TFLOP/s,GB/s,GiB, got 'h300'"):
        gpu_of("h300")
    assert gpu_of("500,3000,96").flops == 5e14
    for numbers in ("nan,1,1", "500,inf,96", "0,1,1"):
        with pytest.raises(ValueError, match="three finite numbers above 0"):
            gpu_of(numbers)
    with pytest.raises(ValueError, match="events must be given"):
        planned(load("tiny", [f"run.dir={tmp_path}"]), PlanSettings())
    with pytest.raises(ValueError, match=r"must have a config\.json"):
        run = ["model.path=" + str(tmp_path), f"data.path={tmp_path}", f"run.dir={tmp_path}"]
        planned(load("lora", run), PlanSettings(events=1e6))


def test_words_of_a_plan_and_of_the_run():
    words = ["tiny", "--gpus=2", "--data.window=128", "--tokens-an-event=4", "events=3"]
    own, rest = plan_arguments(words)
    assert own == ["--gpus=2", "--tokens-an-event=4", "events=3"]
    assert rest == ["tiny", "--data.window=128"]
    assert build(PlanSettings, {}, own).tokens_an_event == 4
