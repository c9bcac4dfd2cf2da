"""The page that compares runs: what it says differs, what it must not show, what it refuses."""

import hashlib
import json
import re
import stat
from pathlib import Path

import pytest

from smbfast.report import main
from smbfast.reporting import comparisons, overlays
from smbfast.reporting.differences import first_unlike
from smbfast.reporting.runlog import read_run
from smbfast.reporting.runs_page import names_of
from tests.judging.test_compare import write
from tests.test_report import HOSTILE, Page, header, metrics, run_folder

CONFIG = {"run": {"dir": "x", "seed": 0}, "optim": {"batch": 4}, "objective": {"jepa": "mask"}}


def head_of(**settings: object) -> dict:
    phases = [{"name": "sft", "lr": settings.pop("lr", 1e-3)}, {"name": "jepa", "lr": None}]
    config = {**CONFIG, "phases": phases, **settings}
    return {**header(), "config": config, "git": "abc", "device": "cpu"}


def make(
    path: Path,
    records: list[dict] | None = None,
    data: str = "d1",
    tokens: str = "t1",
    signal: float | None = None,
    judged_on: str = "held_out",
    **settings: object,
) -> Path:
    """A run with a model of these digests, and predictions if a signal is given."""
    probe = {"judged_on": judged_on, "headline": [], "tasks": []}
    run = run_folder(path, records, head=head_of(**settings), probe=probe)
    (run / "run.json").write_text("{}")
    (run / "final").mkdir()
    digests = {"data_digest": data, "encoder": tokens, "weights_digest": None}
    (run / "final" / "smbfast.json").write_text(json.dumps(digests))
    manifest = {"format": 1, "files": {"model.safetensors": [10_500, f"{data}0123456789"]}}
    (run / "final" / "manifest.json").write_text(json.dumps(manifest))
    if signal is not None:
        write(run, signal)
    return run


def moved(step: int, factor: float) -> list[dict]:
    """The records of a run whose SFT loss is another one from a step on."""
    return [
        {**r, "sft": r["sft"] * factor} if r["step"] >= step and r["kind"] == "step" else r
        for r in metrics()
    ]


def page_of(*runs: Path, out: Path, final: bool = False) -> tuple[str, Page]:
    more = ["--final"] if final else []
    main([*map(str, runs), f"--out={out}", *more])
    source = out.read_text()
    return source, Page(source)


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Plots are not drawn, only named."""
    drawn: list[str] = []

    def noted(name: str, *_args: object, **_options: object) -> str:
        drawn.append(name)
        return "<svg/>"

    monkeypatch.setattr(comparisons, "panel", noted)
    monkeypatch.setattr(overlays, "panel", noted)
    return drawn


def tree(folder: Path) -> dict[str, str]:
    files = (f for f in folder.rglob("*") if f.is_file())
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_what_differs_is_said_first_and_no_run_is_changed(
    tmp_path: Path, undrawn: list[str]
) -> None:
    one = make(tmp_path / "one", signal=2.0, judged_on="tuning")
    two = make(tmp_path / "two", moved(200, 1.1), optim={"batch": 8}, lr=2e-3)
    before = tree(tmp_path)
    source, page = page_of(one, two, out=tmp_path / "out" / "page.html")
    again = (tmp_path / "out" / "page.html").read_bytes()
    page_of(one, two, out=tmp_path / "out" / "page.html")
    assert (tmp_path / "out" / "page.html").read_bytes() == again
    assert before == {k: v for k, v in tree(tmp_path).items() if "/out/" not in k}
    assert stat.S_IMODE((tmp_path / "out" / "page.html").stat().st_mode) == 0o600
    assert "2 settings differ: optim.batch, phases.sft.lr." in page.text
    assert "differ first at step 200 (jepa), in training: sft" in page.text
    assert "A loss differs by more than 1 % from step 200 on." in page.text
    assert "The same data, fingerprint d1, in the same tokens." in page.text
    rows = [re.sub(r"<[^>]*>", "|", row) for row in re.findall(r"<tr>(.*?)</tr>", source)]
    assert any(re.search(r"optim.batch\|+4\|+8\|", row) for row in rows)
    assert any(re.search(r"metrics.jsonl \|differ\|", row) for row in rows)
    assert any(re.search(r"final/model.safetensors \|same\|+10.5 kB · d1012345\|", r) for r in rows)
    assert [n for n in undrawn if n.startswith("loss")] == ["loss-sft", "loss-jepa"] * 2
    assert {"health-online_rank", "health-ratio", "machine-tokens_per_s"} <= set(undrawn)


def test_runs_of_one_command_are_the_same_to_the_bit(tmp_path: Path) -> None:
    """What a clock says is no difference."""
    clock = {"tokens_per_s": 1.0, "wait": 0.9, "memory_gib": 9.0}
    slow = [{**r, **clock, "tokens": 8 * r["step"], "epochs": r["step"] / 4} for r in metrics()]
    logs = first_unlike(read_run(make(tmp_path / "one")), read_run(make(tmp_path / "two", slow)))
    assert (logs.num_shared, logs.step, logs.large) == (300, None, None)
    _, page = page_of(tmp_path / "one", tmp_path / "two", out=tmp_path / "page.html")
    assert "No setting differs." in page.text
    assert "tokens seen–2,400" in page.text and "epochs–75.000" in page.text
    assert "every measure of the 300 steps that both logged is the same to the bit" in page.text


def test_the_first_unlike_record_may_be_an_evaluation_and_rounding_is_not_large(
    tmp_path: Path,
) -> None:
    records = [{**r, "online_rank": 9.0} if r["kind"] == "eval" else r for r in moved(50, 1 + 1e-7)]
    log = first_unlike(read_run(make(tmp_path / "one")), read_run(make(tmp_path / "b", records)))
    assert (log.step, log.large) == (1, None) and log.text.startswith("in the evaluation: online")
    short = [r for r in metrics() if r["step"] > 300]
    none = first_unlike(read_run(tmp_path / "one"), read_run(make(tmp_path / "c", short)))
    assert none.num_shared == 0


@pytest.mark.parametrize(
    "digests, level, words",
    [
        ({"data": "d2"}, "bad", "not trained on the same data (fingerprints: one d1; two d2)"),
        ({"tokens": "t2"}, "warn", "The same data (fingerprint d1) in unlike tokens"),
        ({"data": ""}, "warn", "two has neither `final` nor a checkpoint that says so"),
    ],
)
def test_unlike_data_are_a_warning(tmp_path: Path, digests: dict, level: str, words: str) -> None:
    one, two = make(tmp_path / "one"), make(tmp_path / "two", **digests)
    source, _ = page_of(one, two, out=tmp_path / "page.html")
    body = source[source.index("<main>") :]
    assert body.index(f'<p class="finding {level}">') < body.index(words) < body.index("<table")


def test_settings_that_make_a_loss_another_measure_are_named(tmp_path: Path) -> None:
    two = make(tmp_path / "two", objective={"jepa": "horizon"})
    _, page = page_of(make(tmp_path / "one"), two, out=tmp_path / "page.html")
    assert "objective.jepa differ, so that JEPA losses measure different things" in page.text


def test_probes_are_paired_and_held_out_figures_shown_with_final_alone_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = make(tmp_path / "one", signal=3.0), make(tmp_path / "two", signal=0.1)
    _, page = page_of(*runs, out=tmp_path / "page.html")
    assert "judged on held-out patients" in page.text and "AUROC" not in page.text
    assert not (runs[0] / "held_out.json").exists()
    _, page = page_of(*runs, out=tmp_path / "page.html", final=True)
    assert "death: one is better than two (AUROC 0." in page.text
    assert "These are held-out patients." in page.text
    looks = [json.loads((run / "held_out.json").read_text())["looks"] for run in runs]
    assert [len(own) for own in looks] == [1, 1] and "--final" in looks[0][0]["command"]
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {tmp_path / 'page.html'}"


def test_without_predictions_the_page_says_why(tmp_path: Path) -> None:
    runs = [make(tmp_path / name) for name in ("one", "two")]
    _, page = page_of(*runs, out=tmp_path / "page.html", final=True)
    assert not any((run / "held_out.json").exists() for run in runs)  # nothing was shown
    assert "Probes are not compared: " in page.text and "it has none" in page.text


def test_hostile_text_is_inert_and_nothing_is_fetched(tmp_path: Path) -> None:
    records = [{**record, "phase": HOSTILE} for record in moved(100, 2.0)]
    two = make(tmp_path / "two", records, preset=HOSTILE, data=HOSTILE)
    source, page = page_of(make(tmp_path / "one"), two, out=tmp_path / "page.html")
    assert "<script" not in source and not {"script", "img", "link"} & set(page.tags)
    assert "alert(1)" in page.text
    assert all(not key.startswith("on") for key, _ in page.attributes)
    assert all(v.startswith("#") for key, v in page.attributes if key in ("src", "href"))


def test_names_are_the_shortest_ends_that_differ() -> None:
    assert names_of([Path("/x/a/run"), Path("/x/b/run")]) == ["a-run", "b-run"]
    assert names_of([Path("/x/a=1"), Path("/x/b")]) == ["a-1", "b"]


@pytest.mark.parametrize(
    "words, status, text",
    [
        (["{one}", "{one}"], 1, "runs to compare must be two folders or more, each once"),
        (["{one}", "{dir}/nothing"], 1, "no such folder"),
        (["{one}", "{two}", "--out={dir}/mine.html"], 1, "was not written by smbfast"),
        (["{one}", "{two}", "--out={dir}/folder.html"], 1, "is a folder"),
        (["{one}", "{two}", "--out={dir}/page.pdf"], 2, "ends in .html"),
        (["{one}", "--out={dir}/page.html"], 2, "out names the page of a comparison"),
        (["{one}", "--run={two}"], 2, "runs must be named as words or by `run`, not by both"),
        (["{one}", "{two}", "--patient=3"], 2, "patient shows one patient of one run"),
        (["{one}", "--data={two}"], 2, "needs patient"),
        (["{one}", "--patient=x"], 2, "`patient`"),
    ],
)
def test_refusals_change_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], status: int, text: str
) -> None:
    one, two = make(tmp_path / "one", []), make(tmp_path / "two", [])
    (tmp_path / "mine.html").write_text("<title>mine</title>")
    (tmp_path / "folder.html").mkdir()
    before = tree(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([word.format(one=one, two=two, dir=tmp_path) for word in words])
    said = capsys.readouterr().err if status == 2 else str(stop.value.code)
    assert text in said and "\n" not in said.strip()
    assert status == (2 if stop.value.code == 2 else 1)
    assert tree(tmp_path) == before
