"""The training entry: resuming, signals, what a run leaves behind."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

import smbfast.train as entry
from smbfast.base.files import verify_folder
from smbfast.reporting.page import write_report
from smbfast.run import loop
from smbfast.simulation.dataset import simulate

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_report")]

SHORT = [
    "--probe.labels=[]",
    "--phases.0.steps=3",
    "--phases.1.steps=4",
    "--data.window=128",
    "--eval.every=3",
    "--run.save_every=2",
    "--run.log_every=1",
    "--run.threads=1",
]
CLOCK = ("tokens_per_s", "masked_per_s", "matmul", "wait", "eta", "memory_gib", "seconds")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "cohort"
    simulate(folder, 60, 0)
    return folder


def run_tiny(cohort, folder, *more):
    entry.main(["tiny", f"--data.path={cohort}", f"--run.dir={folder}", *SHORT, *more])


def told(folder):
    """metrics.jsonl without what a clock or a memory meter says."""
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    # a resumed run checks itself again
    lines = [x for x in lines if x["kind"] not in ("header", "self_check")]
    return [{k: v for k, v in x.items() if k not in CLOCK} for x in lines]


class StopAfter:
    """A flag like that of a signal, up after `steps` further optimizer steps."""

    name = "SIGTERM"

    def __init__(self, monkeypatch, steps):
        self.left = steps
        real = loop.learning_rate

        def counted(*args):
            self.left -= 1
            return real(*args)

        monkeypatch.setattr(loop, "learning_rate", counted)
        monkeypatch.setattr(loop, "stop_on_signals", lambda: self)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return None

    def __bool__(self):
        return self.left <= 0


@pytest.fixture(scope="module")
def whole(cohort, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "write_report", write_report)  # the one report of this file
        run_tiny(cohort, folder)
    return folder


def test_stopped_at_every_step_and_resumed_equals_never_stopped(
    cohort, whole, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "stopped"
    for done in range(1, 8):
        with monkeypatch.context() as patch:
            StopAfter(patch, 1)
            with pytest.raises(SystemExit) as stop:
                run_tiny(cohort, folder)
        assert stop.value.code == 75
        status = json.loads((folder / "status.json").read_text())
        assert (status["state"], status["step"]) == ("preempted", done)
        assert f"--run.dir={folder}" in status["command"]
    run_tiny(cohort, folder)
    assert capsys.readouterr().out.count("the same command goes on") == 7
    for name in ("final", "checkpoints/step-000007"):
        files = sorted(p.name for p in (whole / name).glob("*.safetensors"))
        assert files == sorted(p.name for p in (folder / name).glob("*.safetensors"))
        for file in files:
            assert (whole / name / file).read_bytes() == (folder / name / file).read_bytes(), file
    assert told(whole) == told(folder)


def test_records_say_what_a_run_read_and_took(whole):
    records = [json.loads(x) for x in (whole / "metrics.jsonl").read_text().splitlines()]
    header, steps = records[0], [r for r in records if r["kind"] == "step"]
    model = json.loads((whole / "final/smbfast.json").read_text())
    assert header["digests"]["data"] == model["data_digest"]
    assert header["run"] == {"id": model["run"], "ranks": 1}
    assert header["memory"]["predicted"] > 0 and header["memory"]["before"] > 0
    for before, after in itertools.pairwise([{"tokens": 0, "flops": 0}, *steps]):
        # each window has at least one token that is no label
        assert after["tokens"] - before["tokens"] > after["labels"]
        assert after["flops"] > before["flops"]
        assert after["epochs"] == after["tokens"] / header["data"]["window_tokens"]
    end = records[-1]
    assert [end[k] for k in ("tokens", "flops")] == [steps[-1][k] for k in ("tokens", "flops")]
    assert end["memory_gib"] >= steps[-1]["memory_gib"]


def test_damaged_checkpoints_never_push_out_the_good_one(cohort, tmp_path, monkeypatch):
    folder = tmp_path / "damaged"
    with monkeypatch.context() as patch:
        StopAfter(patch, 4)
        with pytest.raises(SystemExit):
            run_tiny(cohort, folder, "--run.save_every=1", "--run.keep=3")
    for step in (3, 4):
        file = folder / f"checkpoints/step-{step:06d}/state.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    with monkeypatch.context() as patch:
        StopAfter(patch, 1)
        with pytest.raises(SystemExit):
            run_tiny(cohort, folder, "--run.save_every=1", "--run.keep=1")
    kept = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert kept == ["damaged-step-000003", "damaged-step-000004", "step-000003"]
    verify_folder(folder / "checkpoints/step-000003")


def test_a_finished_run_can_still_be_exported(cohort, whole, capsys):
    run_tiny(cohort, whole, "--export=merged")
    assert "exported" in capsys.readouterr().out and (whole / "merged/config.json").is_file()


def test_a_task_that_is_not_there_costs_no_training(cohort, tmp_path):
    with pytest.raises(SystemExit, match="death_9y"):
        run_tiny(cohort, tmp_path / "typo", "--probe.labels=death_9y")
    assert not (tmp_path / "typo" / "metrics.jsonl").exists()


def test_the_log_says_what_was_promised(whole):
    records = told(whole)
    steps = [r for r in records if r["kind"] == "step"]
    assert [r["step"] for r in steps] == list(range(1, 8))
    assert {r["phase"] for r in steps} == {"sft", "jepa"}
    assert all((r["jepa"] is None) == (r["phase"] == "sft") for r in steps)
    evals = [r for r in records if r["kind"] == "eval" and r["phase"] == "jepa"]
    assert evals[0]["step"] == 3 and evals[0]["distance"] == 0.0  # measured at phase entry
    assert evals[-1]["distance"] > 0
    keys = {"target_std", "target_rank", "trivial_mean", "trivial_copy", "ratio"}
    assert all(keys <= set(r) for r in evals)
    assert json.loads((whole / "status.json").read_text())["state"] == "done"
    assert list((whole / "tensorboard").iterdir())
    assert (whole / "report.html").stat().st_size > 10_000


def test_the_target_moves_once_per_optimizer_step(whole):
    record = json.loads((whole / "checkpoints/step-000007/record.json").read_text())
    assert record["target_updates"] == 4  # steps of the JEPA phase, two micro-batches each
    assert set(record["optimizer_steps"].values()) == {4, 7}  # predictor and mask vector: 4


def test_only_the_newest_checkpoints_are_kept_and_the_best_of_each_phase(whole):
    kept = sorted(p.name for p in (whole / "checkpoints").iterdir())
    assert kept == ["step-000006", "step-000007"]
    for folder in (whole / "best" / "sft", whole / "best" / "jepa", whole / "final"):
        verify_folder(folder)


def test_a_finished_run_says_so_and_changes_nothing(cohort, whole, capsys):
    before = (whole / "metrics.jsonl").read_bytes()
    run_tiny(cohort, whole)
    assert "is finished" in capsys.readouterr().out
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_other_settings_or_resume_never_do_not_touch_a_run(cohort, whole):
    with pytest.raises(SystemExit, match=r"optim\.batch: 4 -> 3"):
        run_tiny(cohort, whole, "--optim.batch=3", "--optim.micro_tokens=128")
    with pytest.raises(SystemExit, match=r"phases\.0\.lr: none -> 0\.001"):
        run_tiny(cohort, whole, "--phases.0.lr=1e-3")
    with pytest.raises(SystemExit, match=r"run\.resume is never"):
        run_tiny(cohort, whole, "--resume=never")


def test_a_setting_that_is_younger_than_a_run_does_not_change_it(cohort, whole, capsys):
    config = whole / "config.toml"
    text = config.read_text()
    younger = ("target_form", "tracked_rank", "tracked_every")
    lines = [line for line in text.splitlines() if not line.startswith(younger)]
    assert len(lines) == len(text.splitlines()) - 3
    config.write_text("\n".join(lines) + "\n")
    run_tiny(cohort, whole)
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"objective\.tracked_rank: 4 -> 2"):
        run_tiny(cohort, whole, "--objective.tracked_rank=2")
    config.write_text(text)


def test_micro_batches_do_not_change_the_run(cohort, whole, tmp_path):
    run_tiny(cohort, tmp_path / "micro", "--optim.micro_tokens=128")
    one, two = load_file(whole / "final/model.safetensors"), None
    two = load_file(tmp_path / "micro/final/model.safetensors")
    for name, weight in one.items():
        assert (weight - two[name]).abs().max() < 1e-4, name


def poison(monkeypatch, steps):
    """Make the SFT loss of these optimizer steps (of one micro-batch each) not a number."""
    real = loop.losses_of
    calls = {"n": 0}

    def losses_of(settings):
        def poisoned(*args, **scales):
            calls["n"] += 1
            terms = real(settings)(*args, **scales)
            return terms._replace(sft=terms.sft * (float("nan") if calls["n"] in steps else 1.0))

        return poisoned

    monkeypatch.setattr(loop, "losses_of", losses_of)


def test_a_step_that_is_not_finite_moves_no_weight(cohort, tmp_path, monkeypatch):
    """Skipping step 7 equals stopping at step 6: no weight and no moment moves. The average is
    updated, from weights that did not: nothing waits for the flag on the device."""
    folder = tmp_path / "skipped"
    poison(monkeypatch, [7])
    run_tiny(cohort, folder, "--run.keep=9")
    record = json.loads((folder / "checkpoints/step-000006/record.json").read_text())
    state = load_file(folder / "checkpoints/step-000006/state.safetensors")
    final = load_file(folder / "final/target.safetensors")
    assert record["target_updates"] == 3
    model = load_file(folder / "final/model.safetensors")
    for name, weight in model.items():
        if f"model.lm.{name}" in state:
            assert bool((state[f"model.lm.{name}"] == weight).all()), name
    for name, weight in final.items():
        expected = state[f"target.{name}"].lerp(model[f"model.{name}"], 1 - 0.996)
        torch.testing.assert_close(weight, expected)
    last = [r for r in told(folder) if r["kind"] == "step"][-1]
    assert last["step"] == 7 and last["grad_norm"] is None


def test_a_gradient_that_is_not_finite_leaves_no_trace_and_three_stop_the_run(
    cohort, tmp_path, monkeypatch
):
    poison(monkeypatch, range(3, 6))
    folder = tmp_path / "bad"
    with pytest.raises(SystemExit, match="not finite in 3 steps in a row, up to step 5"):
        run_tiny(cohort, folder)
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"
    kept = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert kept == ["step-000002"]
    state = load_file(folder / "checkpoints/step-000002/state.safetensors")
    assert all(bool(w.isfinite().all()) for w in state.values())


def test_print_shows_a_run_that_reads_back(capsys, tmp_path):
    entry.main(["tiny", "--print", "--optim.batch=6"])
    text = capsys.readouterr().out
    (tmp_path / "mine.toml").write_text(text)
    entry.main([str(tmp_path / "mine.toml"), "--print"])
    assert capsys.readouterr().out == text and "batch = 6" in text


@pytest.mark.parametrize("name", ["jepa", "sft", "hybrid", "curriculum"])
def test_the_four_regimes_are_presets(name, capsys):
    entry.main([name, "--print"])
    text = capsys.readouterr().out
    weights = [line for line in text.splitlines() if line.startswith(("w_sft", "w_jepa"))]
    expected = {
        "sft": ["w_sft = 1.0", "w_jepa = 0.0"],
        "jepa": ["w_sft = 0.0", "w_jepa = 1.0"],
        "hybrid": ["w_sft = 1.0", "w_jepa = 1.0"],
        "curriculum": ["w_sft = 1.0", "w_jepa = 0.0", "w_sft = 0.0", "w_jepa = 1.0"],
    }
    assert weights == expected[name]
