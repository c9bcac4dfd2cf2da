"""The preflight: what it finds before a run, and that it leaves a run alone."""

import pytest
import torch

import smbfast.check as entry
from smbfast import train
from smbfast.run import checkpoint, preflight
from smbfast.simulation.dataset import simulate

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_report")]

SHORT = ["--probe.labels=[]", "--data.window=128", "--run.threads=1"]
STAGES = ["data", "model", "kernels", "memory", "plan", "worst pack", "self-check", "time"]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "cohort"
    simulate(folder, 60, 0)
    return folder


@pytest.fixture(scope="module")
def run(cohort, tmp_path_factory):
    """A finished run of a few steps."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    train.main(["tiny", f"--data.path={cohort}", f"--run.dir={folder}", *SHORT])
    return folder


def content(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def check(cohort, folder, *more):
    entry.main(["tiny", f"--data.path={cohort}", f"--run.dir={folder}", *SHORT, *more])


def test_every_stage_of_a_run_that_may_start(cohort, tmp_path, capsys):
    check(cohort, tmp_path / "run")
    lines = capsys.readouterr().out.splitlines()
    told = [line[:11].strip() for line in lines[1:-1] if "  ok  " in line]
    assert told == [*STAGES, "checkpoint"]
    assert "an event" in lines[1] and "have a cut" in lines[1]
    card = [line[:13].strip() for line in lines[2:-1] if line.startswith("  ")]
    assert card[:3] == ["data", "windows", "lost"] and "JEPA" in card
    lines = [line for line in lines if not line.startswith("  ")]
    assert "jepa masks" in lines[5] and "positions a step" in lines[5]
    assert "predicted" in lines[6] and "measured" in lines[6]
    assert "sft" in lines[8] and "jepa" in lines[8] and "without evaluations" in lines[8]
    assert "the same bit for bit" in lines[9]
    assert lines[-1].startswith(f"ready: python -m smbfast.train tiny --data.path={cohort} ")
    assert f" --run.dir={tmp_path / 'run'} " in lines[-1]
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["prepared"]


def test_what_jepa_cannot_see_is_warned_of(cohort, tmp_path, capsys):
    check(cohort, tmp_path / "a")
    assert "warning" not in capsys.readouterr().err
    check(cohort, tmp_path / "b", "--objective.min_future=90")
    told = capsys.readouterr()
    assert "of the tokens lie in windows with a cut" in told.err and "data.window" in told.err
    assert "warning" in told.out.splitlines()[-1] and "ready" not in told.out


def test_a_vocabulary_that_knows_few_codes_is_warned_of(cohort, tmp_path, capsys):
    check(cohort, tmp_path / "run", "--data.max_codes=16")
    err = capsys.readouterr().err
    assert "only the token of their family or section" in err and "ten training subjects" in err


def test_a_run_is_left_as_it_is(cohort, run, capsys):
    before = content(run)
    check(cohort, run)
    assert content(run) == before
    assert "is done" in capsys.readouterr().out


def test_a_resumed_run_is_predicted_with_its_own_micro_batches(cohort, tmp_path, capsys):
    """`auto` is what the run began with, not what would fit today."""
    folder = tmp_path / "run"
    words = ["tiny", f"--data.path={cohort}", f"--run.dir={folder}", *SHORT]
    train.main([*words, "--optim.micro_tokens=256"])
    capsys.readouterr()
    check(cohort, folder)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("memory") and "up to 256 tokens" in line for line in lines)
    assert any("as checkpoint 12 has them" in line for line in lines)


@pytest.mark.parametrize(
    "more", [[], ["--objective.target_form=merged"], ["--model.recompute=full"]], ids=str
)
def test_lora_in_both_forms_of_the_target(cohort, run, tmp_path, capsys, more):
    lora = [f"--model.path={run / 'final'}", "--model.train=lora", "--lora.r=2"]
    check(cohort, tmp_path / "lora", *lora, *more)
    assert "the same bit for bit" in capsys.readouterr().out


def test_the_reference_path(cohort, tmp_path, capsys):
    check(cohort, tmp_path / "run", "--objective.path=reference")
    told = capsys.readouterr().out
    assert "self-check" not in told and "ready" in told


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data.windw=96"], "data.window"),
        (["--data.path=nowhere"], "nowhere"),
        (["--model.path=./nowhere"], "model.path"),
        (["--model.path=x", "--model.train=lora", "--model.fsdp=true"], "--gpus=N"),
        (["--probe.labels=nothing"], "nothing"),
        (["--data.window=96"], "at least 128"),
        (["--data.stride=129"], "data.stride must be at most data.window, 128"),
        (["--objective.min_future=120", "--phases.1.w_sft=0"], "data.bucket"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(cohort, tmp_path, more, message):
    with pytest.raises(SystemExit) as stop:
        check(cohort, tmp_path / "run", *more)
    assert str(stop.value).startswith("smbfast.check: ") and message in str(stop.value)
    assert "\n" not in str(stop.value)


def test_another_run_in_the_folder_is_told(cohort, run):
    with pytest.raises(SystemExit, match="other settings"):
        check(cohort, run, "--optim.batch=3")


def test_a_checkpoint_that_gives_back_something_else_is_told(cohort, tmp_path, monkeypatch):
    real = checkpoint.load

    def off_by_a_bit(found, encoder, optimizer):
        target = real(found, encoder, optimizer)
        with torch.no_grad():
            encoder.mask_vector[3] = torch.nextafter(encoder.mask_vector[3], torch.tensor(9.0))
        return target

    monkeypatch.setattr(checkpoint, "load", off_by_a_bit)
    with pytest.raises(SystemExit, match=r"1 of \d+ tensors differ, such as mask_vector"):
        check(cohort, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["prepared"]


def test_the_verdict_on_memory():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    gib = 1 << 30
    assert preflight._verdict(gib, gib, cpu).startswith("+0%: within 20%")
    assert preflight._verdict(int(1.15 * gib), gib, cpu).startswith("+15%: within")
    assert preflight._verdict(int(1.15 * gib), gib, gpu).startswith("+15%: NOT within 10%")
    assert preflight._verdict(int(0.75 * gib), gib, cpu).startswith("-25%: NOT within")
    assert "too small" in preflight._verdict(1 << 20, 9 << 20, cpu)


def test_help_names_every_stage(capsys):
    entry.main(["--help"])
    told = capsys.readouterr().out
    assert all(stage in told for stage in [*STAGES, "checkpoint"] if stage != "plan")
    assert "--data.path" in told or "data.path" in told
