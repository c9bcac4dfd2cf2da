"""Rows of what nobody else may see: patients, files, held-out records, the network."""

import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tests.mutants import mutant
from tests.reliability.proof import PATIENT, Proof, Row, Work

if TYPE_CHECKING:
    from tests.canary import Planted

FORMS = ("text", "codes", "text-paper")
# patients that are simulated, the format, and the split of the planted one
COHORTS = (
    (120, "text", "tuning"),
    (120, "codes", "tuning"),
    *((400, form, "train") for form in FORMS),
    (1500, "text", "held_out"),
)


def patients_are_nowhere(work: Work) -> Proof:
    """Plant a patient, run every command and what fails, and seek the patient in all of it."""
    from tests import canary

    bad: list[str] = []
    commands = 0
    if work.size == "mutant":
        planted = canary.plant(work.folder / "data")
        bad += _prepared(planted, work.folder / "out", "text", "--vocab_size=4000")
    for patients, form, split in work.pick(push=(), recorded=COHORTS):
        root = work.folder / f"{patients}-{form}"
        planted = canary.plant(root / "data", patients, split)
        has_page, folds = split != "held_out", (patients, form) == COHORTS[0][:2]
        out = root / "out"
        count, own = canary.run_all(planted, out, form, has_page=has_page, folds=folds)
        commands += count
        bad += [f"{patients} patients, {form}: {line}" for line in own]
        shutil.rmtree(root)
        work.say(f"{patients} patients, {form}: {count} commands, {len(own)} bad")
    shared = work.folder / "shared"
    planted = canary.plant(shared / "meds")
    if work.size != "mutant":
        count, own = canary.run_all(planted, shared / "out", "text")
        commands += count + 2
        bad += own
        for form in FORMS[1:]:
            bad += _prepared(planted, shared / "out" / form, form)
        os.rename(shared / "out" / "run", shared / "run")
        shutil.rmtree(shared / "out")
    count, own = _failures(work, planted, shared)
    sizes = len(canary.planted_strings())
    figure = f"{commands} commands, {count} failures, {sizes} strings and 8 numbers, ids and times"
    return Proof(commands + count, "commands and failures", bad + own, figure)


def _prepared(planted: "Planted", out: Path, form: str, *more: str) -> list[str]:
    """What is shown of the patient where shards are prepared alone."""
    from tests import canary

    command, words = next(canary.commands(planted, out, form))
    bad = [f"prepare prints {hit}" for hit in planted.shown(canary.said(command, [*words, *more]))]
    return bad + [f"{name} holds {hits[0]}" for name, hits in canary.leaks(out, planted)]


def _failures(work: Work, planted: "Planted", shared: Path) -> tuple[int, list[str]]:
    """Run what must fail in copies of the dataset and the run; how many did, and what was shown."""
    from tests import canary
    from tests.reliability.canary_failures import cases

    every = list(cases(every=work.pick(push=False, recorded=True)))
    every = [case for case in every if (shared / "run").is_dir() or case[0].startswith("prepare")]
    if work.size == "recorded":
        every += _mistakes()
    count, bad = 0, []
    for number, (words, make) in enumerate(every):
        with _copied(shared, work.folder / f"case-{number}", words) as here:
            if make is not None:
                make(here)
            given = canary.state(here)
            command, *argv = shlex.split(words)
            status, text = canary.ended(command, argv)
            count += bool(status)
            hits = planted.shown(text)
            bad += [f"`{words}`, case {number}, prints {hit}" for hit in hits]
            if "Traceback" in text:
                bad.append(f"`{words}`, case {number}, ends with a traceback")
            for name, found in canary.leaks(here, planted, given):
                bad.append(f"`{words}`, case {number}, leaves {name} with {found[0]}")
    return count, bad


def _mistakes() -> list:
    """The mistakes of `tests.mistakes`, made beside the planted patient."""
    from tests.mistakes.test_mistakes import ALL

    return [(mistake.words, mistake.make) for mistake in ALL]


@contextmanager
def _copied(shared: Path, here: Path, words: str) -> Iterator[Path]:
    """Stand in a folder of its own with a copy of what a case reads."""
    here.mkdir()
    for name in ("meds", "run"):
        if (shared / name).is_dir() and name in words:
            shutil.copytree(shared / name, here / name)
    before = Path.cwd()
    os.chdir(here)
    try:
        yield here
    finally:
        os.chdir(before)
        shutil.rmtree(here)


def _tiny(folder: Path, *more: str) -> list[str]:
    """Arguments of a run of two steps on the dataset `meds` of the folder."""
    words = ["tiny", f"--data.path={folder / 'meds'}", f"--run.dir={folder / 'run'}"]
    words += ["--phases.0.steps=1", "--phases.1.steps=1", "--run.threads=1", "--data.window=256"]
    return [*words, *more]


def _probed(labels: bool) -> list[str]:
    own = ["--probe.labels=task", "--probe.bootstraps=100", "--probe.untrained=1"]
    return own if labels else ["--probe.labels="]


def only_the_user_reads(work: Work) -> Proof:
    """Run commands under open umasks, in folders that were there, and look at every mode."""
    from tests import canary
    from tests.factory import write_labels, write_meds

    count, bad = 0, []
    for umask, form in work.pick(push=[(0o000, "text")], recorded=[(0, "text"), (0o022, "codes")]):
        root = work.folder / f"{umask:03o}-{form}"
        write_labels(write_meds(root / "meds"))
        before = os.umask(umask)
        try:
            for name in work.pick(push=("run", "shards", "labels"), mutant=("shards",)):
                (root / name).mkdir(mode=0o755)
            for command, words in _writing(root, form, work):
                canary.said(command, words)
            own, num = _open_to_others(root)
        finally:
            os.umask(before)
        count, bad = count + num, bad + own
    for own, num in (_shared(work), _followed(work)):
        count, bad = count + num, bad + own
    return Proof(count, "files, folders and links", bad)


def _writing(root: Path, form: str, work: Work) -> Iterator[tuple[str, list[str]]]:
    """Commands that write, in the order of a user."""
    from tests.canary import TASKS

    data, run, final = f"--data={root / 'meds'}", root / "run", f"--model={root / 'run' / 'final'}"
    (root / "tasks.toml").write_text(TASKS)
    yield "tasks", [str(root / "tasks.toml"), data, f"--out={root / 'labels'}"]
    words = [f"--path={root / 'meds'}", f"--out={root / 'shards'}", "--window=256", "--workers=1"]
    yield "prepare", [*words, f"--format={form}", "--vocab_size=700"]
    if work.size == "mutant":
        return
    yield "train", _tiny(root, f"--data.format={form}", *_probed(work.size == "recorded"))
    embeddings = f"{root / 'embeddings.parquet'}"
    yield "embed", [final, data, "--labels=task", f"--out={embeddings}"]
    yield "probe", [f"--embeddings={embeddings}", data, "--bootstraps=100", f"--out={root / 'p'}"]
    predicted = root / "p" / "predictions" / "task"
    methods = [f"a={predicted / 'smbfast.parquet'}", f"b={predicted / 'counts.parquet'}"]
    yield "compare", [*methods, f"--out={root / 'compared'}", "--bootstraps=100"]
    if work.size == "recorded":
        yield "report", [f"--run={run}", "--patient=1", f"--out={root / 'patient.html'}"]
        yield "check", _tiny(root, f"--run.dir={root / 'checked'}", f"--data.format={form}")
        shutil.copytree(run, root / "run-2")
        runs = [str(run), str(root / "run-2")]
        yield "report", [*runs, f"--out={root / 'runs.html'}"]


def _open_to_others(root: Path) -> tuple[list[str], int]:
    """What others may read of all that was written, and how many files and folders that are."""
    bad, num = [], 0
    beside = ("labels", "meds", "tasks.toml", "run-2")  # that a user has made and others may need
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if name in beside or name.split("/")[0] in beside[1:]:
            continue
        num += 1
        mode, least = path.stat().st_mode & 0o777, 0o700 if path.is_dir() else 0o600
        if mode & ~least:
            bad.append(f"{name} is {mode:03o}")
    return bad, num


def _shared(work: Work) -> tuple[list[str], int]:
    """A run that is shared: by the umask, but for what has rows of patients."""
    from tests import canary
    from tests.factory import write_labels, write_meds

    if work.size != "recorded":
        return [], 0
    root, bad, num = work.folder / "shared-run", [], 0
    write_labels(write_meds(root / "meds"))
    before = os.umask(0o022)
    try:
        canary.said("train", _tiny(root, "--run.share=true", *_probed(True)))
    finally:
        os.umask(before)
    hidden = ("prepared", "embeddings", "predictions", "probe.json", ".smbfast.lock")
    hidden += ("risk_functions.safetensors", "held_out.json", "digests.json", "source")
    for path in sorted((root / "run").rglob("*")):
        mode, name = path.stat().st_mode & 0o777, str(path.relative_to(root / "run"))
        num += 1
        if name.split("/")[0] in hidden:
            top = root / "run" / name.split("/")[0]  # a folder of 0700 hides what is in it
            if path.is_file() and mode & 0o077 and top.stat().st_mode & 0o077:
                bad.append(f"{name} of a shared run is {mode:03o}")
        elif mode != (0o755 if path.is_dir() else 0o644):
            bad.append(f"{name} of a shared run is {mode:03o}")
    if (root / "run").stat().st_mode & 0o777 != 0o755:
        bad.append("the folder of a shared run cannot be entered")
    return bad, num


def _followed(work: Work) -> tuple[list[str], int]:
    """Links at names that can be foreseen lead no write to a file of somebody else."""
    import sys

    from smbfast.base.files import committed_file, committed_folder
    from smbfast.base.locks import LOCK, locked

    root = work.folder / "links"
    root.mkdir()
    victim, bad, made = root / "victim", [], []
    victim.write_text("mine")
    sys.addaudithook(lambda name, words: made.append(str(words[0])) if name == "os.mkdir" else None)
    ends = (".tmp", ".old", ".new", ".part", ".trash", ".lock", "~")
    for name in ("out.parquet", "final", "tasks.json"):
        for end in ends:
            (root / f"{name}{end}").symlink_to(victim)
        made.clear()
        for _ in range(2):
            with committed_file(root / "file" / name, private=True) as staging:
                staging.write_text("secret")
            with committed_folder(root / "folder" / name, replace=True, private=True) as staging:
                (staging / "a").write_text("secret")
        names = [one for one in made if ".tmp" in Path(one).name]
        if len(set(names)) < 4:
            bad.append(f"temporary folders of {name} can be foreseen")
    (root / "held").mkdir()
    (root / "held" / LOCK).symlink_to(victim)
    try:
        with locked(root / "held", "test"):
            pass
    except (OSError, ValueError):
        pass
    if victim.read_text() != "mine":
        bad.append("a link at a name that can be foreseen was followed")
    return bad, 3 * (len(ends) + 1) + 1


def no_socket_is_opened(work: Work) -> Proof:
    """Run commands and ask for models that are not there, and see who asks the network."""
    import socket
    import sys

    from huggingface_hub import constants

    from tests import canary
    from tests.factory import write_labels, write_meds

    constants.HF_HUB_OFFLINE = False  # which would hide that the Hub is asked
    events: list[str] = []
    asked = ("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg")
    asked += ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
    sys.addaudithook(lambda name, words: events.append(name) if name in asked else None)
    with socket.socket() as own:  # the hook hears what is asked
        own.bind(("127.0.0.1", 0))
    if events != ["socket.bind"]:
        return Proof(0, "commands", ["the hook does not hear of a socket"])
    bad, count = [], 0
    write_labels(write_meds(work.folder / "meds"))
    for form in work.pick(push=["codes"], recorded=["codes", "text"]):
        root = work.folder / form
        root.mkdir()
        shutil.copytree(work.folder / "meds", root / "meds")
        for command, words in _writing(root, form, work):
            events.clear()
            canary.said(command, words)
            count += 1
            bad += [f"{command} ({form}): {name}" for name in sorted(set(events))]
    os.chdir(work.folder)
    for words in _absent_models():
        command, *argv = words.split()
        events.clear()
        status, text = canary.ended(command, argv)
        count += 1
        bad += [f"`{words}`: {name}" for name in sorted(set(events))]
        if not status:
            bad.append(f"`{words}` ends as if there were a model")
        if "Traceback" in text:
            bad.append(f"`{words}` ends with a traceback")
    if work.size == "recorded":
        own_bad, own_count = _without_network(work)
        bad, count = bad + own_bad, count + own_count
    return Proof(count, "commands", bad)


def _absent_models() -> Iterator[str]:
    """Commands that name a model by a path, and there is none."""
    train = "tiny --data.path=meds --run.dir=new"
    for path in ("./nosuch", "a/b/nosuch", "../nosuch", "/nosuch/model", "meds/nosuch", "meds"):
        yield f"train {train} --model.path={path}"
        yield f"check {train} --model.path={path} --model.train=lora"
        yield f"embed --model={path} --data=meds --at=last --out=o.parquet"
        yield f"prepare --path=meds --out=shards --format=text --tokenizer={path}"
        yield f"probe --embeddings=o.parquet --data=meds --model={path}"


def _without_network(work: Work) -> tuple[list[str], int]:
    """A whole run in a name space without any network, as a process of its own."""
    import subprocess
    import sys

    try:
        subprocess.run(["unshare", "-rn", "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return [], 0
    words = _tiny(work.folder, f"--run.dir={work.folder / 'alone'}", *_probed(True))
    command = ["unshare", "-rn", sys.executable, "-m", "smbfast.train", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    return ([] if done.returncode == 0 else [f"without a network: {done.stderr[-300:]}"]), 1


def splits_do_not_leak(work: Work) -> Proof:
    """Make held-out records unreadable, tuning otherwise, and let a subject be in two splits."""
    import numpy as np

    from tests import canary
    from tests.factory import write_labels, write_meds
    from tests.reliability.unread import differences, otherwise, turned, unreadable

    rng = np.random.default_rng(work.seed)
    bad, files, noise = [], 0, 0
    for name in ("as-is", "unread", "tuning"):
        meds = work.folder / name / "meds"
        write_labels(write_meds(meds))
        for file in (meds / "data" / "held_out").glob("*.parquet"):
            noise += unreadable(file, rng) if name == "unread" else 0
        if name == "unread":
            turned(meds / "labels" / "task" / "held_out.parquet")
        if name == "tuning":
            otherwise(next((meds / "data" / "tuning").glob("*.parquet")))
    for form in work.pick(push=["codes", "text"], mutant=["codes"]):
        for command, words in _reading(form, work):
            for name in ("as-is", "unread", "tuning"):
                if name == "tuning" and command != "prepare":
                    continue
                os.chdir(work.folder / name)
                status, text = canary.ended(command, words)
                if status:
                    bad.append(f"{command} ({form}, {name}) ends with {text[-200:]}")
        made = [work.folder / name / form for name in ("as-is", "unread", "tuning")]
        if bad:
            continue
        num, others = differences(made[0], made[1])
        bad += [f"{form}: {other} is otherwise with other held-out records" for other in others]
        # what is fitted, and the records of train
        fitted = ("shards/tokenizer", "shards/train")
        num_fitted, others = differences(made[0], made[2], fitted)
        bad += [f"{form}: {other} is otherwise with other tuning records" for other in others]
        files += num + num_fitted
    count, own = _in_two_splits(work)
    figure = f"{noise} parts of columns of held-out records are noise"
    return Proof(files + count, "equal files and refusals", bad + own, figure)


def _reading(form: str, work: Work) -> Iterator[tuple[str, list[str]]]:
    """Commands that read a dataset `meds` and write below a folder `form`, before --final."""
    words = ["--path=meds", f"--out={form}/shards", "--splits=train,tuning", "--window=256"]
    yield "prepare", [*words, f"--format={form}", "--vocab_size=700", "--workers=1"]
    if work.size == "mutant" or (work.size == "push" and form != "codes"):
        return
    run = ["tiny", "--data.path=meds", f"--run.dir={form}/run", f"--data.format={form}"]
    run += ["--phases.0.steps=1", "--phases.1.steps=1", "--run.threads=1", "--data.window=256"]
    yield "train", [*run, *_probed(True)]


def _in_two_splits(work: Work) -> tuple[int, list[str]]:
    """A subject that is in two splits is refused by every command that reads events."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tests import canary
    from tests.factory import SPLITS, write_labels, write_meds

    bad, count = [], 0
    commands = ["prepare --path=meds --out=shards", "tasks --check=task --data=meds"]
    commands += ["train tiny --data.path=meds --run.dir=new", "check tiny --data.path=meds"]
    for one, other in (("train", "tuning"), ("train", "held_out"), ("tuning", "held_out")):
        root = work.folder / f"{one}-{other}"
        meds = write_meds(root / "meds")
        write_labels(meds)
        rows = pq.read_table(meds / "data" / one / "0.parquet")
        again = rows.filter(pa.compute.equal(rows["subject_id"], SPLITS[one][0]))
        pq.write_table(again, meds / "data" / other / "1.parquet")
        os.chdir(root)
        for words in commands[: work.pick(push=4, mutant=1)]:
            command, *argv = words.split()
            status, text = canary.ended(command, argv)
            count += 1
            if not status or "one file and one split only" not in text:
                bad.append(f"`{words}` takes a subject of {one} and {other}: {text[-200:]}")
    return count, bad


ROWS: tuple[Row, ...] = (
    Row(
        id="P1",
        property="Nothing of a patient is in a log, an error, a report or a model: codes, texts, "
        "values, ids, times, descriptions, labels.",
        bar={"push": 15 + 60, "recorded": 110 + 300},
        prove=patients_are_nowhere,
        mutants=(
            mutant(
                "tokens-by-occurrence",
                "a word that one patient has often becomes a token",
                "smbfast/data/tokens.py",
                "if num_texts[word] >= MIN_SUBJECTS",
                "if uses[word] >= MIN_SUBJECTS",
            ),
            mutant(
                "id-in-an-error",
                "an error names the patient whose rows are wrong",
                "smbfast/data/source_index.py",
                "{file}: the subject of row {row} must",
                "{file}: subject {subject}, row {row}, must",
            ),
        ),
        limit=PATIENT,
    ),
    Row(
        id="P3",
        property="what is written is readable by its user alone, in folders that were there too, "
        "and no link at a foreseen name is followed",
        bar={"push": 80, "recorded": 400},
        prove=only_the_user_reads,
        mutants=(
            mutant(
                "default-modes",
                "files have the modes that the umask of a user leaves them",
                "smbfast/base/entry.py",
                "before = os.umask(0o077)",
                "before = os.umask(0o022)",
            ),
            mutant(
                "folder-stays-open",
                "a folder that was there before shows what is in it",
                "smbfast/base/entry.py",
                "about.st_uid == os.geteuid()",
                "about.st_uid != os.geteuid()",
            ),
            mutant(
                "lock-follows-a-link",
                "a lock is written through a link that somebody has put at its name",
                "smbfast/base/locks.py",
                "_OPEN = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC",
                "_OPEN = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC",
                more=(  # without which a lock that is a link is taken again and again
                    (
                        "smbfast/base/locks.py",
                        "os.stat(file, follow_symlinks=False)",
                        "os.stat(file)",
                    ),
                ),
            ),
            mutant(
                "temporary-names-foreseen",
                "what is written lies in a folder whose name everybody can know before",
                "smbfast/base/staging.py",
                "secrets.token_hex(8)",
                "hash(path) % 2**64:016x",
            ),
        ),
        limit=PATIENT,
    ),
    Row(
        id="S3",
        property="a run, its embeddings, probes and report open no socket, nor does a path where "
        "no model is",
        bar={"push": 5 + 30, "recorded": 14 + 30},
        prove=no_socket_is_opened,
        limit=PATIENT,
        mutants=(
            mutant(
                "name-of-the-host-asked-for",
                "a lock asks a name server who this machine is",
                "smbfast/base/locks.py",
                'return {"host": socket.gethostname()',
                'return {"host": socket.getfqdn()',
            ),
            mutant(
                "path-is-a-name-of-the-hub",
                "a path where there is no folder is asked for on the Hub",
                "smbfast/base/hub_names.py",
                'return "/" in name and Path(name).parent.exists()',
                "return False",
            ),
        ),
    ),
    Row(
        id="M5",
        property="prepare and train read no record of a held-out patient, fit on train alone, and "
        "refuse a subject in two splits",
        bar={"push": 60, "recorded": 80},
        prove=splits_do_not_leak,
        limit=PATIENT,
        mutants=(
            mutant(
                "fitted-on-every-split",
                "the vocabulary counts the codes of all splits",
                "smbfast/data/fitting.py",
                '    files = dataset.splits["train"]\n    progress = ',
                "    files = [file for own in dataset.splits.values() for file in own]\n"
                "    progress = ",
            ),
            mutant(
                "one-subject-twice-is-fine",
                "a subject may be in two splits",
                "smbfast/data/source_index.py",
                "        if not len(both):",
                "        if len(both) <= 1:",
            ),
        ),
    ),
)
