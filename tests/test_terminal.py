"""What a command says on a terminal: lines that fit, the time of all that is left, colours."""

import io
import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from smbfast import train
from smbfast.base import terminal
from smbfast.base.entry import entry
from smbfast.base.progress import AHEAD, Progress, time_left
from smbfast.run import metrics, open_run
from smbfast.run.metrics import Meter, evaluation_line, step_line
from smbfast.run.outlook import A_FIGURE, A_REPORT, Outlook
from tests.factory import tiny_run, write_labels, write_meds
from tests.tiny import tiny_lm

RECORD = {
    "step": 5,
    "phase": "jepa",
    "sft": 1.23456,
    "jepa": 0.12345,
    "codes": None,
    "grad_norm": 2.1,
    "lr": 6.7e-5,
    "tokens_per_s": 22_200.0,
    "wait": 0.0,
    "memory_gib": 0.7,
    "eta": 725.0,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _nothing_ahead() -> Iterator[None]:
    yield
    AHEAD.expect({})


def test_a_step_line_says_what_it_says() -> None:
    assert step_line(RECORD, 500) == (
        "step   5/500 jepa  sft 1.235  jepa 0.1235  grad 2.1  22.2k tok/s  lr 6.7e-05  0.7 GiB"
        "  12m05 left"
    )
    assert "grad skipped" in step_line(RECORD | {"grad_norm": None}, 500)
    assert "waits 40%" in step_line(RECORD | {"wait": 0.4}, 500)
    assert "jepa  sft" in step_line(RECORD | {"jepa": None}, 500)


def test_no_line_is_wider_than_a_hundred_columns() -> None:
    """The largest numbers that a run shows, and the longest names."""
    wide = {
        **RECORD,
        **{"step": 1_234_567, "phase": "a" * 40, "sft": 123.456, "codes": 12.3456},
        **{"grad_norm": 1234.5, "tokens_per_s": 1e6, "wait": 0.99, "memory_gib": 80.0},
        "eta": 360_000.0,
    }
    random = np.random.default_rng(0)
    for keys in random.integers(0, 2, (64, len(wide))):
        record = RECORD | {k: wide[k] for k, wanted in zip(wide, keys, strict=True) if wanted}
        assert len(step_line(record, 1_234_567)) <= metrics.COLUMNS
    health = {
        **{"loss": 1.5, "sft": 1.2, "jepa": 0.3, "codes": 1.5, "codes_gain": 0.1},
        **{"online_rank": 17.5, "embedding_rank": 12.0, "target_rank": 25.8, "ratio": 1.1},
        **{"r2": 0.5, "r2_copy": 0.1, "probe_auroc": 0.7, "probe_task": "a_task_of_a_long_name"},
        **{"grad_sft": 0.3, "grad_jepa": 0.4, "grad_codes": 0.2, "cos_sft_jepa": 0.01},
    }
    text = evaluation_line(wide | health, 1_234_567, {"loss": 1.4, "step": 900_000})
    assert max(map(len, text.splitlines())) <= metrics.COLUMNS
    words = ("online 17.5", "nodes 12.0", "r2 0.500", "auroc 0.700", "cos sft/jepa 0.01")
    assert all(word in text for word in words)


def test_an_evaluation_says_whether_it_is_the_best() -> None:
    record = {"step": 8, "phase": "sft", "loss": 2.0, "sft": 2.0}
    assert evaluation_line(record, 9) == "eval 8/9 sft   loss 2  sft 2"
    assert "loss 2, the best so far" in evaluation_line(record, 9, {"loss": 2.5, "step": 4})
    assert "loss 2, best 1.5 at step 4" in evaluation_line(record, 9, {"loss": 1.5, "step": 4})
    assert "loss -" in evaluation_line(record | {"loss": None}, 9)


def test_time_left_counts_what_follows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    AHEAD.expect({"embedding": 60.0, "probes": 30.0, "report": 5.0})
    AHEAD.begin("embedding")
    assert time_left(10.0) == "about 45 s left in all"
    times = iter([0.0, 5.0])
    clock = SimpleNamespace(monotonic=lambda: next(times))
    monkeypatch.setattr("smbfast.base.progress.time", clock)
    Progress("smbfast.embed", 1000, "embeddings").add(500)
    assert capsys.readouterr().err.endswith("a second, about 40 s left in all\n")
    AHEAD.begin("report")
    assert time_left(10.0) == "10 s left"
    AHEAD.expect({}, before="the first step")  # whose pace is not known yet
    assert time_left(10.0) == "10 s left of this, before the first step"
    AHEAD.expect({"report": 5.0})
    with entry("smbfast.name"):  # of an earlier command in the same process nothing stays
        assert time_left(10.0) == "10 s left"


LATER = {"pools": 1.0, "probes": 7.0, "report": 4.0}


def test_an_outlook_adds_up_phases_and_what_follows() -> None:
    steps = ((10, 100), (20, 300))
    outlook = Outlook(steps=steps, num_nodes=50, num_models=2, embedding=4000, seconds=LATER)
    later = 4000 * 0.5 + 12.0
    assert outlook.seconds_after(4, 0.5) == (6 * 100 + 20 * 300) * 0.5 + later
    assert outlook.seconds_after(15, 0.5) == 15 * 300 * 0.5 + later
    assert outlook.seconds_after(30, 0.5) == later  # not 0 s while minutes are left


def test_what_follows_the_steps_is_counted_in(capsys: pytest.CaptureFixture[str]) -> None:
    outlook = Outlook(steps=(), num_nodes=50, num_models=2, embedding=4000, seconds=LATER)
    outlook.begin(0.01)
    assert "50 nodes by 2 models" in (said := capsys.readouterr().out)
    assert said.endswith("then probes and report, about 52 s in all\n")
    assert AHEAD.seconds == 12.0  # the embedding itself is under way
    Outlook(steps=(), num_nodes=0, num_models=2, embedding=0, seconds={"report": 4.0}).begin(None)
    assert not capsys.readouterr().out and AHEAD.seconds == 4.0


def test_a_meter_takes_its_pace_from_the_flops_behind_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now[0]))
    outlook = Outlook(((4, 10), (4, 30)), num_nodes=0, num_models=0, embedding=0, seconds=LATER)
    meter = Meter(8, open_run.Progress(), SimpleNamespace(flops=1.0), outlook)
    step = SimpleNamespace(num_tokens=1, num_masked=0)
    meter.add(step, 10)
    now[0] = 1000.0  # the first step compiles
    assert meter.read(1)["eta"] == 100.0 * (3 * 10 + 4 * 30) + 12.0
    meter.add(step, 10)
    now[0] = 1020.0  # 2 s a FLOP
    assert meter.read(2)["eta"] == 2.0 * (2 * 10 + 4 * 30) + 12.0


def test_only_a_terminal_gets_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    terminal.warn("text")
    assert shown.getvalue() == "\033[1;33mwarning:\033[0m text\n"
    with pytest.raises(SystemExit) as stop, entry("smbfast.name"):
        raise ValueError("wrong")
    assert stop.value.code == "\033[1;31msmbfast.name:\033[0m wrong"
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert terminal.coloured("word", terminal.RED) == "word"
    assert terminal.coloured("word", terminal.RED, io.StringIO()) == "word"


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str, list]:
    """A LoRA run of a tiny backbone: its folder, what it printed, and what libraries warned of."""
    root = tmp_path_factory.mktemp("run")
    data = write_meds(root / "data")
    write_labels(data)
    from smbfast.data.tokens import save_tokenizer, train_tokenizer

    words = " ".join(map(chr, range(33, 127)))
    tokenizer = train_tokenizer([words] * 10, 400)
    lm = tiny_lm("qwen3", vocab_size=len(tokenizer))
    lm.save_pretrained(root / "model")
    save_tokenizer(tokenizer, root / "model")
    more = [f"--model.path={root / 'model'}", "--probe.labels=task", "--run.log_every=1"]
    more += ["--eval.every=1", "--probe.bootstraps=100"]
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        patch.setattr("sys.stdout", out)
        patch.setattr("sys.stderr", err)
        patch.setattr("smbfast.run.loop.write_report", lambda *_run, **_more: None)
        train.main(tiny_run(data, root / "run", "--objective.self_check=false", *more))
    return root / "run", out.getvalue(), err.getvalue(), list(warned)


def test_a_run_says_at_once_that_it_has_begun(said: tuple[Path, str, str, list]) -> None:
    _, _, err, _ = said
    assert err.startswith("smbfast.train: the settings are fine; loading PyTorch takes")


def test_no_library_warns_of_anything(said: tuple[Path, str, str, list]) -> None:
    """Each line on stderr is of this package."""
    _, _, err, warned = said
    assert [str(w.message) for w in warned] == []
    assert all(line.startswith(("smbfast", "warning: ")) for line in err.splitlines()), err


def test_a_run_says_what_its_lines_mean_and_how_long_it_takes(
    said: tuple[Path, str, str, list],
) -> None:
    run, out, _, _ = said
    lines = out.splitlines()
    steps = [line for line in lines if line.startswith("step ") and "/4" in line]
    assert len(steps) == 4 and max(map(len, steps)) <= metrics.COLUMNS
    assert sum(line.startswith("a step ") for line in lines) == 1
    left = [re.search(r"(\S+ ?s?) left$", line) for line in steps]
    assert all(left) and left[-1][1] != "0 s"  # embeddings, probes and report are to come
    embedding = next(i for i, line in enumerate(lines) if line.startswith("embedding "))
    assert lines.index(steps[-1]) < embedding and "probes and report, about" in lines[embedding]
    assert any("the best so far" in line for line in lines if line.startswith("eval"))
    etas = [json.loads(line).get("eta") for line in (run / "metrics.jsonl").open()]
    assert min(eta for eta in etas if eta is not None) >= A_REPORT + A_FIGURE


def test_the_status_says_when_where_and_which_process(said: tuple[Path, str, str, list]) -> None:
    run, *_ = said
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "done" and status["pid"] == os.getpid() and status["host"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", status["time"])
