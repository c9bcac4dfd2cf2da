"""Rows of what is written: commits at every fault, damaged checkpoints, and full disks."""

from pathlib import Path
from typing import TYPE_CHECKING

from tests.mutants import mutant
from tests.reliability.proof import Proof, Row, Work

if TYPE_CHECKING:
    from tests.reliability.commit_cases import Commit
    from tests.reliability.faults import Faults

REPLACE, FILES, CHECKPOINT = (
    "smbfast/base/replace.py",
    "smbfast/base/files.py",
    "smbfast/run/checkpoint.py",
)
_AT_PUSH = {"final": 2, "best": 3, "checkpoint": 8}  # of the others: as many as of checkpoints


def quiet_libraries() -> None:
    """Hear nothing of what libraries say about tiny models, and use one thread."""
    import warnings

    import torch
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)


def _scratch(work: Work) -> Path:
    """A folder in memory where there is one: a disk that really syncs would only be slow."""
    import tempfile

    memory = Path("/dev/shm")
    if memory.is_dir():
        return Path(tempfile.mkdtemp(dir=memory))
    return work.folder


def prove_commits(work: Work) -> Proof:
    """R1: every call of every commit, with every way to fail there."""
    import shutil

    quiet_libraries()
    from tests.reliability.commit_cases import Model, commits
    from tests.reliability.faults import Faults

    folder, proofs, bad = _scratch(work), [], []
    try:
        faults = Faults(folder)
        for commit in commits(Model()):
            proofs.append(_of_commit(work, folder, commit, faults))
            bad += proofs[-1][2]
            if work.has_enough(bad):
                break
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    figure = ", ".join(f"{name} {count}" for name, count, _ in proofs)
    return Proof(sum(count for _, count, _ in proofs), "fault points", bad, figure)


def _of_commit(
    work: Work, folder: Path, commit: "Commit", faults: "Faults"
) -> tuple[str, int, list[str]]:
    from tests.reliability.points import Trials, drawn

    trials = Trials(faults, commit, folder / commit.name)
    few = _AT_PUSH.get(commit.name, _AT_PUSH["checkpoint"])
    points, telling = list(trials.points()), trials.telling()
    num = work.pick(push=few, nightly=4 * few, recorded=len(points))
    others = [p for p in points if p not in telling]
    trials.run([*telling, *drawn(others, num, work.seed)])
    count = sum(trials.count.values())
    work.say(f"{commit.name}: {trials.calls} calls, {count} points, {dict(trials.count)}")
    return commit.name, count, trials.bad


def prove_outages(work: Work) -> Proof:
    """R5: disks that are full, small, read-only, failing or gone for a while."""
    import shutil

    quiet_libraries()
    from tests.reliability.commit_cases import Model, commits
    from tests.reliability.faults import Faults
    from tests.reliability.outages import Outages
    from tests.reliability.points import drawn

    folder, count, bad, mounted = _scratch(work), 0, [], True
    try:
        faults = Faults(folder)
        for commit in commits(Model()):
            trials = Outages(faults, commit, folder / commit.name)
            points = list(trials.points())
            few = _AT_PUSH.get(commit.name, _AT_PUSH["checkpoint"])
            num = work.pick(push=few, nightly=4 * few, recorded=len(points))
            trials.run(drawn(points, num, work.seed))
            mounted &= trials.real(work.pick(push=2, nightly=3, recorded=6))
            count += sum(trials.count.values())
            bad += trials.bad
            work.say(f"{commit.name}: {dict(trials.count)}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    figure = "" if mounted else "small file systems could not be mounted here"
    return Proof(count, "outages", bad, figure)


def prove_damage(work: Work) -> Proof:
    """R4: checkpoints with every kind of damage."""
    import shutil

    quiet_libraries()
    from tests.reliability.damage import Checkpoints, trial

    folder = _scratch(work)
    try:
        checkpoints, bad = Checkpoints(folder), []
        count = work.pick(push=140, nightly=400, recorded=1000)
        for number in range(count):
            what, why = trial(checkpoints, number, work.seed)
            if why:
                bad.append(f"{what}: {why}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    figure = ", ".join(f"{num} {name}" for name, num in sorted(checkpoints.outcomes.items()))
    return Proof(count, "damaged checkpoints", bad, figure)


ROWS = (
    Row(
        id="R1",
        property="A kill, a power cut or an error at any call of a commit leaves the old or the "
        "new version, whole; an error has words, and the next write heals what was left.",
        bar={"push": 80, "nightly": 200, "recorded": 1000},
        prove=prove_commits,
        mutants=(
            mutant(
                "no-fsync-of-files",
                "the content of a file is not on the disk when its name is",
                FILES,
                "        file.chmod(mode)\n        fsync(file)\n",
                "        file.chmod(mode)\n",
            ),
            mutant(
                "no-fsync-of-the-folder",
                "a file that was written is not there after a power cut",
                FILES,
                "            os.rename(content, path)\n            fsync(path.parent)\n",
                "            os.rename(content, path)\n",
            ),
            mutant(
                "deleted-then-renamed",
                "a folder is removed before the new one is in its place",
                REPLACE,
                "    if exchange(content, path):\n        return content\n",
                "    shutil.rmtree(path)\n    os.rename(content, path)\n    return content\n",
            ),
            mutant(
                "put-before-it-is-sealed",
                "a folder is in its place before its manifest, and before its data are on the disk",
                FILES,
                "            _seal(content, private)\n            put(content, path)\n",
                "            put(content, path)\n            _seal(path, private)\n",
            ),
            mutant(
                "no-rollback",
                "a folder that was moved out of the way is removed with what was to replace it",
                "smbfast/base/staging.py",
                "    if retired.is_dir() and not os.path.lexists(path):",
                "    if False:",
            ),
        ),
        limit={"recorded": 3600},
    ),
    Row(
        id="R4",
        property="A checkpoint that is damaged, edited or of another run is refused by name, or "
        "named and the older one is used; nothing else than what was saved is gone on with.",
        bar={"push": 100, "nightly": 400, "recorded": 1000},
        prove=prove_damage,
        mutants=(
            mutant(
                "hash-of-one-file-skipped",
                "the weights of a checkpoint are not hashed when it is read",
                FILES,
                "        if sha256(file) != digest:\n",
                '        if file.suffix != ".safetensors" and sha256(file) != digest:\n',
            ),
            mutant(
                "format-not-looked-at",
                "a manifest of another format is read as one of this",
                FILES,
                "    if version != FORMAT:\n",
                "    if version is None:\n",
            ),
            mutant(
                "any-run-s-checkpoint",
                "a run goes on from a checkpoint of another run",
                "smbfast/run/identity.py",
                '        if then.get("run") != self.run:\n',
                "        if False:\n",
            ),
            mutant(
                "moments-not-required",
                "a checkpoint is loaded whose record tells of other moments than it holds",
                CHECKPOINT,
                "    _require_state(checkpoint, tensors, averages)\n",
                "",
            ),
        ),
    ),
    Row(
        id="R5",
        property="A disk that is full, small, read-only, failing or gone while something is "
        "written damages nothing; a line says so, and afterwards the same write succeeds.",
        bar={"push": 50, "nightly": 150, "recorded": 1000},
        prove=prove_outages,
        mutants=(
            mutant(
                "errors-of-the-system-alone",
                "a full disk in the words of a library ends with its traceback",
                "smbfast/base/disk.py",
                "    text = str(error)\n",
                "    if not isinstance(error, OSError):\n        return None\n"
                "    text = str(error)\n",
            ),
        ),
        limit={"recorded": 3600},
    ),
)
