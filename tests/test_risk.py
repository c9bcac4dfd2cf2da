"""One patient's risks over time: they are the probe's, and of real patients only when asked for."""

import contextlib
import io
import json
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import smbfast.train as train
from smbfast.data.labels import Labels
from smbfast.data.meds import MedsDataset
from smbfast.judging.judge import Protocol
from smbfast.judging.risk_function import FILE, read_risk_functions, write_risk_functions
from smbfast.judging.scored import Scored
from smbfast.probing.contestants import Contestants
from smbfast.probing.horizons import with_chances
from smbfast.probing.logistic import fit_logistic
from smbfast.probing.models import Model
from smbfast.probing.survival import fit_cox
from smbfast.report import main
from smbfast.reporting import figures, risk
from smbfast.reporting.runlog import Run, read_run
from smbfast.run.risk import _moments, chosen_subject, final_scorer
from smbfast.settings import load
from tests.test_report import Page

ROWS, WIDTH = 240, 6
TASKS = ("death_3y", "tte_death")


def labels_of(kind: str, rng: np.random.Generator, competing: bool = False) -> tuple[Any, Labels]:
    """Features of which the first decides, and labels of all splits."""
    feature_NF = rng.normal(size=(ROWS, WIDTH)) * 3 + 1
    split_N = np.array(["train", "tuning", "held_out"])[np.arange(ROWS) % 3]
    key = "task", kind, np.arange(ROWS), np.arange(ROWS), split_N
    drawn_N = feature_NF[:, 0] + rng.normal(size=ROWS)
    if kind == "binary":
        return feature_NF, Labels(*key, value_N=drawn_N > 1)
    duration_N = 100 * np.exp(-drawn_N / 3)
    event_N = np.arange(ROWS) % 4 > 0
    competing_N = ~event_N & (np.arange(ROWS) % 8 == 0) if competing else None
    return feature_NF, Labels(*key, duration_N=duration_N, event_N=event_N, competing_N=competing_N)


def fitted(kind: str, competing: bool = False) -> tuple[Any, np.ndarray, Any]:
    """Features, the probabilities that a probe gives them, and its risk function."""
    feature_NF, labels = labels_of(kind, np.random.default_rng(3), competing)
    if kind == "binary":
        probe = fit_logistic(feature_NF, labels.binary_N, labels.split_N)
        return feature_NF, probe.probability_N[:, None], probe.risk
    cox = fit_cox(feature_NF, *labels.survival_N, labels.split_N)
    model = Scored("smbfast", "smbfast", "own", cox.risk_N[None], risk=cox.risk)
    model = with_chances(labels, model, (30.0, 90.0))
    assert model.chance_SNH is not None
    return feature_NF, model.chance_SNH[0], model.risk


@pytest.mark.parametrize("kind, competing", [("binary", 0), ("time_to_event", 0), ("tte", 1)])
def test_a_risk_function_gives_the_probability_of_the_probe_to_the_bit(
    kind: str, competing: bool, tmp_path: Path
) -> None:
    """Also after it was written and read; the same rows are multiplied in the same product."""
    kind = "time_to_event" if competing else kind
    feature_NF, chance_NH, function = fitted(kind, competing)
    assert np.array_equal(function.probability(feature_NF), chance_NH)
    assert chance_NH.std() > 0.02
    write_risk_functions(tmp_path, {"task": function, "other": function}, {"pool": "mean"})
    functions, origin = read_risk_functions(tmp_path)
    assert list(functions) == ["task", "other"] and origin == {"pool": "mean"}
    assert np.array_equal(functions["task"].probability(feature_NF), chance_NH)
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600
    with pytest.raises(ValueError, match=r"features must be 6 a node, .* got 5"):
        function.probability(feature_NF[:, :5])
    for content in (b"", b"mine", (tmp_path / FILE).read_bytes()[:200]):
        (tmp_path / FILE).write_bytes(content)
        with pytest.raises(ValueError, match=r"risk_functions.safetensors must be"):
            read_risk_functions(tmp_path)


def _two(models: list[Model]) -> list[Model]:
    return [model for model in models if model.name in ("smbfast", "age_sex")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run of a simulated cohort, probed beside age and sex alone; not to be changed."""
    every = Contestants.models
    folder = tmp_path_factory.mktemp("risk") / "run"
    short = ["--phases.0.steps=1", "--phases.1.steps=1", "--objective.self_check=false"]
    more = [f"--probe.labels={','.join(TASKS)}", "--optim.micro_tokens=1024"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr("smbfast.probing.run_probe._protocol", lambda _config: Protocol(0, 0))
        patch.setattr(Contestants, "models", lambda own, labels: _two(every(own, labels)))
        patch.setattr("smbfast.run.probes._untrained", lambda _run: {})
        train.main(["tiny", f"--run.dir={folder}", "--run.threads=1", *short, *more])
    return folder


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots of training and of tasks are not of interest here."""
    for name in ("losses", "health", "optimizer", "machine"):
        monkeypatch.setattr(figures, name, lambda _phases: None)
    monkeypatch.setattr("smbfast.reporting.comparisons.panel", lambda *_a, **_k: "<svg/>")


def dataset_of(run: Path) -> MedsDataset:
    return MedsDataset.open(next(run.glob("cohort-*")))


def test_a_simulated_run_shows_one_tuning_patient(run: Path, undrawn: None) -> None:
    record = json.loads((run / "risk.json").read_text())
    assert stat.S_IMODE((run / "risk.json").stat().st_mode) == 0o600
    dataset = dataset_of(run)
    assert record["subject"] in dataset.subjects("tuning") and record["simulated"] is True
    table = pq.read_table(next(run.glob("cohort-*/labels/death_3y/tuning.parquet"))).to_pydict()
    had = {s for s, v in zip(table["subject_id"], table["boolean_value"], strict=True) if v}
    assert record["subject"] in had
    assert [task["task"] for task in record["tasks"]] == list(TASKS)
    assert all(len(task["risk"]) == len(record["moments"]) > 2 for task in record["tasks"])
    assert all(0 <= p <= 1 for task in record["tasks"] for p in task["risk"])
    main([str(run)])
    page = Page((run / "report.html").read_text())
    assert "A simulated patient, of the simulated tuning patients who had the outcome" in page.text
    assert "One patient's risk over time" in page.text and "death_3y" in page.text


def test_risks_at_the_moments_of_labels_are_the_predictions_that_were_judged(run: Path) -> None:
    """An embedding of one patient alone differs by 2e-6 of its size at most, as tests/test_embed.py
    has it, so a logit by that times the sum of |weight x feature|, and a probability by a quarter
    of it. Time to event: log hazards, whose probability moves by at most 1/e of what they do."""
    functions, origin = read_risk_functions(run)
    dataset, settings = dataset_of(run), load(str(run / "config.toml"), [])
    scorer = final_scorer(run, settings, dataset, origin)
    for task, column in zip(
        TASKS, ("predicted_boolean_probability", "event_probability_0"), strict=True
    ):
        rows = pq.read_table(run / "predictions" / task / "smbfast.parquet")
        subject = int(rows["subject_id"][0].as_py())
        time_K = rows["prediction_time"].to_numpy().astype(np.int64)[:1]
        _, vector_MD = scorer.embed(dataset, subject, time_K, "tuning")
        function = functions[task]
        moved = 2e-6 * np.abs(function.weight_F).sum() * np.abs(vector_MD).max()
        allowed = function.slope * moved / 2 + 1e-12
        assert abs(function.probability(vector_MD)[0, 0] - rows[column][0].as_py()) <= allowed


def test_the_patient_is_chosen_without_held_out_rows_and_without_predictions(run: Path) -> None:
    dataset = dataset_of(run)
    tuning, held_out = dataset.subjects("tuning"), dataset.subjects("held_out")
    subject_N = np.concatenate([tuning[:3], held_out[:3]])
    split_N = np.repeat(["tuning", "held_out"], 3)

    def chosen(*true: int) -> int | None:
        value_N = np.isin(np.arange(6), true)
        task = Labels("t", "binary", subject_N, np.zeros(6, np.int64), split_N, value_N=value_N)
        return chosen_subject(dataset, [task])

    assert chosen(1) == chosen(1, 3, 4, 5) == tuning[1]
    assert chosen() == chosen(3, 4) and chosen() in tuning[:3]
    none = Labels("t", "binary", held_out, held_out, np.full(len(held_out), "held_out"))
    assert chosen_subject(dataset, [Labels(**{**vars(none), "value_N": held_out > 0})]) is None


def as_real(run: Path, path: Path) -> Path:
    """A copy of the run as if its cohort were the user's own data."""
    shutil.copytree(run, path)
    cohort = next(path.glob("cohort-*")).rename(path.parent / "meds")
    config = (path / "config.toml").read_text().replace("[data]", f'[data]\npath = "{cohort}"')
    (path / "config.toml").write_text(config)
    lines = (path / "metrics.jsonl").read_text().replace('"simulated": true', '"simulated": false')
    (path / "metrics.jsonl").write_text(lines)
    return path


def test_a_real_patient_has_a_page_only_when_asked_for(
    run: Path, tmp_path: Path, undrawn: None
) -> None:
    real = as_real(run, tmp_path / "run")
    main([str(real)])
    report = (real / "report.html").read_text()
    assert "risk over time" not in report  # although risk.json lies there
    dataset = MedsDataset.open(tmp_path / "meds")
    subject = json.loads((real / "risk.json").read_text())["subject"]
    main([str(real), f"--patient={subject}"])
    page = Page((real / "patient.html").read_text())
    assert stat.S_IMODE((real / "patient.html").stat().st_mode) == 0o600
    assert "readable by you alone: handle it like the data themselves" in page.text
    assert (
        "A patient of tuning, asked for by id." in page.text and "filled, the outcome" in page.text
    )
    assert "script" not in page.tags
    main([str(real), f"--patient={dataset.subjects('train')[0]}"])
    page = Page((real / "patient.html").read_text())
    assert "was fitted on this patient" in page.text and "filled, the outcome" not in page.text
    main([str(real), f"--patient={subject}", f"--data={tmp_path / 'meds'}"])
    other = shutil.copytree(tmp_path / "meds", tmp_path / "other")
    splits = pq.read_table(other / "metadata" / "subject_splits.parquet")
    pq.write_table(splits.slice(0, len(splits) - 1), other / "metadata" / "subject_splits.parquet")
    with pytest.raises(SystemExit, match="must be the dataset of the run, with the fingerprint"):
        main([str(real), f"--patient={subject}", f"--data={other}"])
    (real / FILE).rename(real / "away")
    for patient, words in (
        (dataset.subjects("held_out")[0], "must hold risk_functions.safetensors"),
        (dataset.subjects("held_out")[0], "this one is of held_out"),
        (10**9, "no subject has this id"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([str(real), f"--patient={patient}"])
        assert words in str(stop.value.code) and str(10**9) not in str(stop.value.code)
        if (real / "away").exists():
            (real / "away").rename(real / FILE)
    (real / "patient.html").write_text("mine")
    with pytest.raises(SystemExit, match="was not written by smbfast"):
        main([str(real), f"--patient={subject}"])


@pytest.mark.parametrize("header, own", [(False, True), (True, False), (None, True)])
def test_both_locks_hold(run: Path, tmp_path: Path, header: bool | None, own: bool) -> None:
    """A patient is shown if the run and the file say that they are simulated."""
    record = json.loads((run / "risk.json").read_text()) | {"simulated": own}
    (tmp_path / "risk.json").write_text(json.dumps(record))
    log = read_run(run)
    about = Run(**{**vars(log), "path": tmp_path, "header": {"data": {"simulated": header}}})
    assert risk.view(about) is None


def test_a_long_record_has_sixty_moments_at_most_and_none_after_its_end(run: Path) -> None:
    dataset = dataset_of(run)
    [batch] = dataset.batches("tuning", dataset.subjects("tuning")[:1])
    days = np.arange(4000) * 86_400_000_000

    def moments(num: int, end: int | None = None) -> np.ndarray:
        long = {**vars(batch), "time_N": days[:num], "subject_N": np.zeros(num, np.int64)}
        long |= {"code_N": np.full(num, batch.code_N[-1]), "codes": ["A"] * len(batch.codes)}
        return _moments(type(batch)(**long), end)

    assert np.array_equal(moments(60), days[:60])
    assert len(moments(400)) == 14 and moments(400)[-1] == days[399]  # ends of months
    assert len(moments(4000)) == 60 and moments(4000)[-1] == days[3999]
    assert np.array_equal(moments(60, end=int(days[5])), days[:5])
