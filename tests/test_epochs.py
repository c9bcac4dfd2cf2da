"""Phases in epochs: how many steps they are, and that a run by epochs is the run by those steps."""

import json
from collections import Counter

import pytest
from safetensors.torch import load_file

import smbfast.train as entry
from smbfast.base.config import build, read_toml
from smbfast.base.files import read_json
from smbfast.data.loader import num_windows_read, step_windows
from smbfast.data.masking import needs_cuts
from smbfast.run import loop
from smbfast.run.epochs import as_asked, by_steps, in_words, resolved, with_steps
from smbfast.run.optim import total_steps
from smbfast.settings import ObjectiveSettings, TrainSettings, load
from smbfast.simulation.dataset import simulate
from tests.tiny import random_window, window_set


def given(*words: str) -> TrainSettings:
    return load("tiny", list(words))


@pytest.mark.parametrize(
    ("epochs", "num", "batch", "steps"),
    [
        (1, 10, 4, 3),  # 2.5 steps: the last one begins the next epoch
        (2, 10, 4, 5),
        (0.1, 1000, 1, 100),  # 0.1 in binary is a little more
        (0.3, 10, 1, 3),
        (1e-9, 10, 4, 1),
        (3, 2, 4, 3),  # a step has all windows there are
        (2, 0, 4, 2),  # the loader says that there are none
    ],
)
def test_epochs_are_so_many_steps(epochs, num, batch, steps):
    settings = with_steps(given(f"--phases.jepa.epochs={epochs}"), lambda _phase: num, batch)
    assert [p.steps for p in settings.phases] == [6, steps] and total_steps(settings) == 6 + steps
    assert [in_words(p) for p in by_steps(settings).phases] == ["6", f"{steps:,}"]


def test_words_of_a_phase():
    settings = with_steps(given("--phases.sft.epochs=2"), lambda _phase: 1360, 8)
    assert [in_words(p) for p in settings.phases] == ["2 epochs = 340", "6"]
    one = with_steps(given("--phases.sft.epochs=1"), lambda _phase: 1360, 1)
    assert in_words(one.phases[0]) == "1 epoch = 1,360"
    assert as_asked(settings) == given("--phases.sft.epochs=2")


@pytest.mark.parametrize("jepa", [False, True])
def test_an_epoch_reads_every_window_of_the_phase_once(jepa):
    """And a phase with cuts has epochs of the windows with a cut alone, in strata of one size."""
    objective = ObjectiveSettings(jepa="mask", min_future=8)
    long, short = ([random_window(s, buckets=b) for s in range(n)] for n, b in ((8, 6), (4, 1)))
    windows = window_set([*long, *short], objective)
    assert needs_cuts(objective, jepa=jepa) == jepa
    settings = given(f"--phases={'jepa' if jepa else 'sft'}", "--phases.0.epochs=2")
    settings = settings.model_copy(update={"objective": objective})
    num = num_windows_read(windows, objective, jepa=jepa)
    steps, batch = resolved(settings, windows).phases[0].steps, settings.optim.batch
    assert num == (8 if jepa else 12) and steps == 2 * num / batch
    drawn = [step_windows(windows, objective, batch, 0, step, jepa=jepa) for step in range(steps)]
    counts = Counter(int(i) for step in drawn for i in step)
    assert len(counts) == num and set(counts.values()) == {2}


def test_steps_and_epochs_take_the_place_of_each_other_on_a_command_line(tmp_path):
    phase = given("--phases.sft.epochs=2").phases[0]
    assert (phase.epochs, phase.steps) == (2, 0)
    file = tmp_path / "mine.toml"
    file.write_text('base = "tiny"\n[[phases]]\nname = "a"\nepochs = 0.5\nw_sft = 1\nw_jepa = 0\n')
    assert load(str(file), []).phases[0].epochs == 0.5
    assert load(str(file), ["--phases.a.steps=7"]).phases[0].steps == 7
    assert load(str(file), ["--phases.a.steps=7"]).phases[0].epochs is None
    for words in (["--phases.0.steps=3", "--phases.sft.epochs=2"], ["--phases.0.epochs=0"]):
        with pytest.raises(ValueError, match=r"phases\.0.*(one of steps and epochs|above 0)"):
            given(*words)
    file.write_text(file.read_text() + "steps = 3\n")
    with pytest.raises(
        ValueError, match=r"`phases\.0`: one of steps and epochs must be given, got"
    ):
        load(str(file), [])


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_a_run_by_epochs_is_the_run_by_its_steps_also_when_it_goes_on(
    tmp_path, capsys, monkeypatch
):
    simulate(tmp_path / "cohort", 60, 0)
    capsys.readouterr()

    def train(folder: str, *phases: str) -> str:
        words = ["--probe.labels=[]", "--run.threads=1", "--run.log_every=1", "--optim.batch=16"]
        words += ["--eval.windows=1", "--objective.self_check=false"]
        where = [f"--data.path={tmp_path / 'cohort'}", f"--run.dir={tmp_path / folder}"]
        entry.main(["tiny", *where, *words, *phases])
        return capsys.readouterr().out

    epochs = ["--phases.sft.epochs=1", "--phases.jepa.epochs=0.75"]
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(SystemExit):
            train("epochs", *epochs)
    out = capsys.readouterr().out
    went_on = train("epochs", *epochs)
    header = records(tmp_path / "epochs")[0]["config"]["phases"]
    steps = [phase["steps"] for phase in header]
    assert min(steps) > 1 and sum(steps) == read_json(tmp_path / "epochs" / "status.json")["step"]
    for text in (out, went_on):
        assert (
            f"{sum(steps)} steps: sft 1 epoch = {steps[0]}, jepa 0.75 epochs = {steps[1]}" in text
        )
    train("steps", *(f"--phases.{i}.steps={n}" for i, n in enumerate(steps)))
    one, other = (
        load_file(tmp_path / f / "final" / "model.safetensors") for f in ("epochs", "steps")
    )
    assert one.keys() == other.keys() and all(one[k].equal(other[k]) for k in one)

    asked = build(TrainSettings, read_toml(tmp_path / "epochs" / "config.toml"), [])
    assert [(p.epochs, p.steps) for p in asked.phases] == [(1, 0), (0.75, 0)]
    monkeypatch.setattr(loop, "train", None)  # a finished run trains no more
    train("epochs", *epochs)
    with pytest.raises(SystemExit, match=r"phases\.1\.epochs: 0\.75 -> 2"):
        train("epochs", epochs[0], "--phases.jepa.epochs=2")


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def stop_after(steps, patch):
    """Ask the loop to stop after so many steps, as a signal does."""
    left, real = [steps], loop.learning_rate

    def counted(*args):
        left[0] -= 1
        return real(*args)

    class Asked:
        name = "SIGTERM"
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *_exc: None  # noqa: E731
        __bool__ = lambda self: left[0] <= 0  # noqa: E731

    patch.setattr(loop, "learning_rate", counted)
    patch.setattr(loop, "stop_on_signals", Asked)
