"""Rows of what others made: nothing is unpickled, hostile files are refused, MEDS that breaks."""

from pathlib import Path

from tests.mutants import mutant
from tests.reliability.proof import Proof, Row, Work


def prove_hostile(work: Work) -> Proof:
    """Read every hostile file by the command that a user would read it by, in a watched child."""
    import warnings

    from smbfast import (  # noqa: F401  imported before children are made
        embed,
        probe,
        report,
        serving,
    )
    from smbfast.run import checkpoint  # noqa: F401
    from tests.reliability import hostile_cases, jailed, sealed

    warnings.simplefilter("ignore")
    made = sealed.make(work.folder / "made")
    fired, folder, out = (work.folder / name for name in ("fired", "copy", "out.parquet"))
    trials = hostile_cases.trials(fired)
    if work.size == "mutant":
        trials = [t for t in trials if t.command == "embed" and t.of == "whole"][:60]
    elif work.size == "push":  # every other one; a seed takes the others
        trials = trials[work.seed % 2 :: 2]
    run = hostile_cases.commands(made, folder, out)
    bad, slowest = [], 0.0
    for trial in trials:
        hostile_cases.copied(made, trial.of, folder)
        trial.change(folder)
        if trial.seal and trial.of in ("whole", "lora"):
            sealed.reseal(folder)
        ended = jailed.jailed(run[trial.command], work.folder / "answer.json")
        slowest = max(slowest, ended.seconds)
        problem = _problem(trial.name, trial.command, ended, fired)
        work.say(f"{ended.seconds:5.2f} s  {ended.how:9} {trial.name}: {ended.words[:200]!r}")
        if problem:
            bad.append(f"{trial.name}: {problem}")
        for left in (out, fired):
            _remove(left)
    return Proof(len(trials), "hostile files", bad, f"the slowest took {slowest:.1f} s")


def _problem(name: str, command: str, ended: object, fired: Path) -> str:
    from tests.reliability.hostile_cases import HARMLESS
    from tests.reliability.jailed import Ended

    assert isinstance(ended, Ended)
    if fired.exists():
        return "its code was run"
    if ended.events:
        return f"it reached {ended.events[0]}"
    if ended.how in ("hangs", "killed", "traceback"):
        return f"{ended.how} {ended.words[-200:]}"
    if ended.how == "done":
        may = name in HARMLESS or command == "run"
        return "" if may else "it was read"
    if len(ended.words) < 20 or "Traceback" in ended.words or ended.words.strip().count("\n") > 4:
        return f"refused without words: {ended.words[:200]!r}"
    return ""


def _remove(path: Path) -> None:
    import shutil

    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


HOSTILE = Row(
    "S2",
    "Models, adapters, data, labels, embeddings and runs that somebody has made to harm, sealed "
    "by right checksums, end in words within 20 s and 4 GB, no socket and none of their code.",
    {"push": 70, "nightly": 140},
    prove_hostile,
    (
        mutant(
            "window-unchecked",
            "the window of a model's record may be anything",
            "smbfast/run/model_record.py",
            "    window: int = Field(ge=1, lt=1 << 31)\n",
            "    window: Any = None\n",
        ),
        mutant(
            "layers-believed",
            "as many layers of a predictor are made as a record claims",
            "smbfast/run/checkpoint.py",
            'for key, size in (("predictor_layers", layers), ("vocabulary", ids)):',
            'for key, size in (("vocabulary", ids),):',
        ),
    ),
    {"push": 300, "mutant": 300},
)


def prove_pickles(work: Work) -> Proof:
    """Read all that a run, an embedding and a loaded model read, and note what is unpickled.

    Libraries have started before: what they unpickle for themselves then is none of ours.
    """
    import sys

    from smbfast import embed, probe, report, serving  # noqa: F401
    from smbfast.run import checkpoint
    from tests.reliability import sealed

    seen: list[str] = []
    loads: list[str] = []

    def note(event: str, given: tuple) -> None:
        if event == "pickle.find_class":
            seen.append(f"{given[0]}.{given[1]}")
        elif event == "open" and isinstance(given[0], str) and str(work.folder) in given[0]:
            loads.append(given[0])

    sys.addaudithook(note)
    made = sealed.make(work.folder / "made")
    _train(made, work.folder / "trained")
    out = work.folder / "out.parquet"
    for model in (made.whole, made.lora):
        words = [f"--model={model}", f"--data={made.data}", "--labels=task", f"--out={out}"]
        embed.main(words)
        out.unlink()
        serving.load(model).embed(made.data, at="last")
    for run in (made.run, work.folder / "trained"):
        newest, damaged = checkpoint.latest(run)
        if newest is None or damaged:
            seen.append("a checkpoint that cannot be read")
    allowed = ("google.protobuf", "tensorboardX", "copyreg")
    bad = [f"{name} was unpickled" for name in seen if not name.startswith(allowed)]
    bad += [f"{line}" for line in _unpicklers()]
    return Proof(len(loads), "files opened", bad, f"{len(seen)} classes of libraries looked up")


def _train(made: object, run: Path) -> None:
    from smbfast import train
    from tests.factory import tiny_run
    from tests.reliability.sealed import WORDS, Sealed

    assert isinstance(made, Sealed)
    import smbfast.run.loop

    smbfast.run.loop.write_report = lambda *_run, **_more: None
    own = ("--probe.labels=[]", "--run.threads=1", f"--data.prepared={made.prepared}", *WORDS)
    train.main(tiny_run(made.data, run, "--data.format=codes", *own))


def _unpicklers() -> list[str]:
    """Lines of the source that could unpickle; `tests/test_floors.py` reads its syntax as well."""
    import smbfast

    words = ("torch.load(", "pickle.load", "pickle.Unpickler", "joblib.load", "allow_pickle=True")
    words += ("weights_only=False", "yaml.load(", "marshal.loads(", "trust_remote_code=True")
    root = Path(smbfast.__file__).parent
    return [
        f"{file.relative_to(root)} has {word}"
        for file in sorted(root.rglob("*.py"))
        for word in words
        if word in file.read_text(encoding="utf-8")
    ]


PICKLES = Row(
    "S1",
    "Nothing is unpickled in a run, an embedding and a loaded model: an audit hook watches each.",
    {"push": 100},
    prove_pickles,
    (
        mutant(
            "checkpoint-unpickled",
            "tensors that are not safetensors are read by torch.load",
            "smbfast/run/checkpoint.py",
            "        return load_file(file)\n",
            "        return load_file(file) if file else torch.load(file, weights_only=False)\n",
        ),
    ),
    {"push": 300, "mutant": 300},
)


def prove_meds(work: Work) -> Proof:
    """Tests of folders that break a rule, each of which is refused, or read and counted."""
    from tests.reliability.proof import from_tests

    tests = ["tests/bad_input/test_bad_meds.py", "tests/data/test_wild_meds.py"]
    if work.size == "mutant":
        tests = ["tests/bad_input/test_bad_meds.py", "-k", "mistyped or null or odd or twice"]
    elif work.size != "push":
        tests.append("tests/bad_input/test_bad_files.py")
    return from_tests(*tests, unit="folders that break a rule", work=work)


MEDS = Row(
    "M1",
    "A MEDS folder that breaks a rule is refused by file, column and row without a cell, or is "
    "mended and counted, or read as it is meant.",
    {"push": 60, "recorded": 100},
    prove_meds,
    (
        mutant(
            "null-code-swallowed",
            "a row without a code is read as one",
            "smbfast/data/meds.py",
            'if table["code"].null_count:',
            'if table["code"].null_count > len(table):',
        ),
    ),
    {"push": 300, "mutant": 300},
)
ROWS = (PICKLES, HOSTILE, MEDS)
