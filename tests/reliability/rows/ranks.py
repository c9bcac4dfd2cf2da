"""Rows of several ranks: deaths, the same batches for any number of them, state that is the same.

Ranks are forked on the CPU and exchange messages by gloo; see `tests.reliability.jobs`.
"""

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.mutants import mutant
from tests.reliability.cohort import Cohort, cohort, imported
from tests.reliability.flips import flips
from tests.reliability.proof import Proof, Row, Work

RANK_DEATHS = (
    (0, "start-up"),
    (1, "joining"),
    (0, "loading"),
    (1, "loading"),
    (1, "model"),
    (1, "step"),
    (0, "collective"),
    (1, "collective"),
    (0, "saving"),
    (0, "saving"),
    (0, "saved"),
    (0, "evaluation"),
    (1, "evaluation"),
    (0, "end"),
    (1, "end"),
)
BEFORE_MEETING = ("start-up", "joining")
REAL_STEPS = 150  # of each phase of a run by the real torchrun, which must not end too early


# R7: deaths


def deaths(work: Work) -> Proof:
    """Kill or stop ranks and launchers at moments of a run; then let the same command go on."""
    from tests.reliability import jobs

    imported()
    jobs.adopt()
    words = cohort(work, "codes").words()
    alone = work.folder / "alone"
    ended = jobs.run_job(2, [*words, f"--run.dir={alone}"], work.folder / "log-alone")
    bad = [f"undisturbed: {ended}"] if any(ended.codes.values()) else []
    trials, slowest = _trials(work), dict.fromkeys(("launcher", "kill", "stop", "pause"), 0.0)
    for number, death in enumerate(trials):
        run = work.folder / f"run-{number}"
        ticks = 1.0 if work.size == "recorded" and death.what == "launcher" else 0.2
        grace = 30.0 if ticks == 1.0 else 4.0
        log = work.folder / f"log-{number}"
        job = [*words, f"--run.dir={run}"]
        ended = jobs.run_job(2, job, log, death, grace=grace, before=_ticking(ticks))
        own = _wrong(death, ended, jobs.status_of(run))
        again = jobs.run_job(2, job, work.folder / f"log-{number}-again")
        if any(again.codes.values()):
            own.append(f"the same command ended with {again.codes}")
        elif jobs.digests(run) != jobs.digests(alone) or jobs.logged(run) != jobs.logged(alone):
            own.append("the same command gave another result")
        bad += [f"{death}: {text}" for text in own]
        slowest[death.what] = max(slowest[death.what], ended.seconds)
        work.say(f"{death}: gone in {ended.seconds:.1f} s {own or ''}")
    count = len(trials)
    if work.size == "recorded":
        more, real = _real(work)
        bad, count = bad + more, count + real
    took = ", ".join(
        f"{what} {spent:.1f} s" for what, spent in slowest.items() if spent and what != "pause"
    )
    return Proof(count, "deaths", bad, f"gone at most {took} later; 0 bits differ afterwards")


def _trials(work: Work) -> list[Any]:
    from tests.reliability.jobs import MOMENTS, ON_MAIN, Death

    draw = random.Random(work.seed)
    launchers = []
    for moment in [m for m in MOMENTS if m != "report"]:
        rank = 0 if moment in ON_MAIN else draw.randrange(2)
        slow = 2.5 if work.size == "recorded" else 1.0
        turn = draw.randint(2, 5) if moment in ("step", "collective") else 1
        launchers.append(Death(rank, moment, turn, "launcher", slow))
    turns = {"step": 5, "collective": 5, "saving": 3, "saved": 2}
    kills = [Death(r, m, draw.randint(1, turns.get(m, 1))) for r, m in RANK_DEATHS]
    stops = [
        Death(1, "step", 2, "stop"),
        Death(0, "saving", 1, "stop"),
        Death(0, "evaluation", 1, "stop"),
    ]
    # longer than others wait for a word: nobody hears the main rank at its report
    pauses = [Death(0, "report", 1, "pause", 30.0)]
    if work.size == "mutant":
        return [next(d for d in launchers if d.moment == "step"), Death(1, "collective", 3)]
    few = [launchers[draw.choice((4, 5, 6))], kills[draw.choice((5, 6, 7, 8))]]
    return work.pick(
        push=few,
        nightly=launchers + kills + stops[:1],
        recorded=launchers + kills + stops + pauses,
    )


def _ticking(seconds: float) -> Callable[[], None]:
    def before() -> None:
        from smbfast.run import watch

        vars(watch)["TICK"] = seconds

    return before


def _wrong(death: Any, ended: Any, status: dict[str, Any]) -> list[str]:
    """What a job that lost a process has done wrong, in words."""
    import re

    wrong = [f"ranks {ended.left} had to be killed"] if ended.left else []
    if ended.seconds <= (death.slow if death.what == "pause" else 0.0):
        wrong.append("the moment never came, or nothing was done then")
    others = {r: text for r, text in ended.said.items() if r != death.rank}
    if any("Traceback" in text for text in ended.said.values()):
        wrong.append("a traceback")
    over = ("done",) if death.moment == "end" else ()
    if death.what == "pause":
        if any(ended.codes.values()) or status.get("state") != "done":
            wrong.append(f"ended with {ended.codes} and {status} where it went on")
        return wrong
    if death.what == "launcher":
        if not all(ended.codes.values()) and death.moment != "end":
            wrong.append(f"trained on without torchrun: {ended.codes}")
        if status.get("state", "preempted") not in ("preempted", *over):
            wrong.append(f"the status is {status['state']}")
        return wrong
    if not any(ended.launcher.values()):
        wrong.append("torchrun has seen no failure")
    if death.moment == "end":  # there the others have left, or leave with all that was to be done
        return wrong
    pattern = r"rank (\d+) has (?:ended|not been heard)"
    named = [int(n) for text in others.values() for n in re.findall(pattern, text)]
    if set(named) - {death.rank}:
        wrong.append(f"rank {named} is named")
    if not named and death.moment not in BEFORE_MEETING:
        wrong.append("no rank says which has ended")
    if status.get("state", "failed") != "failed":
        wrong.append(f"the status is {status['state']}")
    return wrong


def _real(work: Work) -> tuple[list[str], int]:
    """Trials with the real torchrun: it is killed, a rank is, Ctrl-C, and two in one folder."""
    from tests.reliability import jobs

    words = Cohort(work.folder / "data").words(steps=REAL_STEPS, save=20)
    alone, bad = work.folder / "real", []
    jobs.run_job(2, [*words, f"--run.dir={alone}"], work.folder / "log-real")
    trials = {"launcher killed": 0, "rank killed": 1, "Ctrl-C": 2, "a second one": 3}
    for name, number in trials.items():
        run, log = work.folder / f"real-{number}", work.folder / f"log-real-{number}"
        job = [*words, f"--run.dir={run}"]
        launcher = jobs.torchrun(2, job, log)
        _until(lambda run=run: len(jobs.logged(run)) > 30)
        ranks = jobs.children(launcher.pid)
        if name == "a second one":
            second = jobs.torchrun(2, job, work.folder / "log-second")
            text = (work.folder / "log-second").read_text() if second.wait(900) else ""
            if "is in use by" not in text:
                bad.append(f"{name}: ended with {second.returncode}: {text[-300:]}")
        elif name == "rank killed":
            os.kill(ranks[-1], signal.SIGKILL)
        else:
            os.kill(launcher.pid, signal.SIGKILL if number == 0 else signal.SIGINT)
        _until(lambda ranks=ranks: not any(_lives(pid) for pid in ranks))
        launcher.wait(600)
        state = jobs.status_of(run).get("state")
        expected = {"rank killed": "failed", "a second one": "done"}.get(name, "preempted")
        if state != expected or any(_lives(pid) for pid in ranks):
            bad.append(f"{name}: {state}, ranks that live: {[p for p in ranks if _lives(p)]}")
            for pid in ranks:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if name == "rank killed" and "rank 1 has ended" not in log.read_text():
            bad.append(f"{name}: no rank says which has ended")
        jobs.run_job(2, job, work.folder / f"log-real-{number}-again")
        if jobs.digests(run) != jobs.digests(alone) or jobs.logged(run) != jobs.logged(alone):
            bad.append(f"{name}: the same command gave another result")
        work.say(f"real torchrun, {name}: {state}")
    return bad, len(trials)


def _until(true: Callable[[], bool], seconds: float = 1200.0) -> None:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.1)


def _lives(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


# D2: the same batches for any number of ranks


def batches(work: Work) -> Proof:
    """Hash what each step trains on, over all ranks of each world; and count windows of epochs."""
    import hashlib

    from smbfast.data.loader import make_step
    from tests.ranks_case import windows_of

    draw, bad, worlds = random.Random(work.seed), [], (1, 2, 4, 8, 16)
    # the third step is the first that has masks
    steps = work.pick(push=24, nightly=300, recorded=1000, mutant=3)
    kinds = _window_sets()
    for step in range(steps):
        windows, objective = kinds[step % 2]
        more = {"batch": draw.randint(16, 20), "tokens": draw.choice((64, 200, 4096))}
        more |= {"seed": work.seed, "jepa": step % 3 > 0}
        seen = {}
        for world in worlds:
            own = [
                make_step(windows, objective, step, rank=rank, ranks=world, **more)
                for rank in range(world)
            ]
            drawn = [w for part in own for micro in part.micro_batches for w in windows_of(micro)]
            counts = {(s.num_labels, s.num_masked, s.num_tokens, s.num_pairs) for s in own}
            if len(counts) > 1 or len({s.digest for s in own}) > 1:
                bad.append(f"step {step}: the {world} ranks have counted or planned otherwise")
            text = repr((sorted(drawn), sorted(counts)))
            seen[world] = hashlib.sha256(text.encode()).hexdigest()
        unlike = [world for world in worlds if seen[world] != seen[1]]
        if unlike:
            bad.append(f"step {step}: batches of {unlike} ranks are not those of one")
    epochs = work.pick(push=200, nightly=2000, recorded=5000, mutant=50)
    for _ in range(epochs):
        bad += _epoch(draw.randint(1, 300), draw.randint(1, 40), draw.getrandbits(32))
    figure = f"{len(worlds)} worlds up to 16; {epochs:,} epochs of other sizes, each window once"
    return Proof(steps, "steps", bad, figure)


def _window_sets() -> list[tuple[Any, Any]]:
    """Windows with masks, and windows with horizons, with their objectives."""
    from smbfast.data.horizons import Horizons
    from smbfast.data.timelines import Preamble
    from smbfast.data.windows import WindowSet
    from smbfast.settings import ObjectiveSettings
    from tests.tiny import random_window, window_set

    timelines = [random_window(s, buckets=3 + s % 4) for s in range(41)]
    masked = ObjectiveSettings(min_future=4, cuts=2)
    ahead = ObjectiveSettings(jepa="horizon", horizons=["1d", "3d"], positions=3, censored="none")
    horizons = Horizons(tuple(ahead.horizons), censored="none")
    with_pairs = WindowSet.of([timelines], 256, Preamble(), ahead, horizons=horizons)
    return [(window_set(timelines, masked), masked), (with_pairs, ahead)]


def _epoch(num: int, batch: int, seed: int) -> list[str]:
    """Whether an epoch of so many windows has each once, in turn and in strata."""
    from smbfast.data.loader import in_turn, stratified

    count = min(batch, num)
    turns = [int(i) for s in range(-(-num // count)) for i in in_turn(num, batch, seed, s)]
    wrong = []
    if sorted(turns[:num]) != list(range(num)):
        wrong.append(f"{num} windows, {batch} a step: an epoch has not each once")
    if num % count == 0:
        placed = [int(i) for s in range(num // count) for i in stratified(num, batch, seed, s)]
        if sorted(placed) != list(range(num)):
            wrong.append(f"{num} windows in {count} strata: an epoch has not each once")
    return wrong


# D3: another number of ranks in mid-run


def changes(work: Work) -> Proof:
    """Stop a run and go on with another number of ranks, against one process alone."""
    from tests import rank_server
    from tests.ranks_case import make_data, words_of
    from tests.test_ranks import assert_same_run, flat

    imported()
    bad: list[str] = []
    trained = "tests.ranks_case:trained"
    patience = 300.0 if work.size == "mutant" else 900.0  # a mistake makes ranks wait for ever

    def given(world: int, words: list[str], **more: Any) -> list[Any]:
        arguments = {"words": words, **more}
        outcomes = rank_server._run_case(world, trained, patience, arguments)
        if errors := [o.error for o in outcomes if o.error]:
            raise AssertionError(errors[0][-300:])
        return [o.value for o in outcomes]

    small, cases = cohort(work, "codes", "text"), []
    for form, worlds in work.pick(
        push=[("codes", (2, 1, 4)), ("text", (1, 2))],
        nightly=[(f, w) for f in ("codes", "text") for w in ((2, 1, 4), (1, 2, 1), (4, 2))],
        mutant=[("codes", (2, 1))],  # of two ranks one alone is asked to stop
    ):
        cases.append((form, worlds, small.words(form, steps=3, save=1000)))
    if work.size == "recorded":
        make_data(str(work.folder / "large"))
        for form in ("text", "codes"):
            for kind, objective, worlds in (
                ("whole", "mask", (2, 1, 4)),
                ("merged", "horizon", (1, 2, 1)),
                ("tracked", "horizon", (2, 1, 4)),
                ("tracked", "mask", (4, 2, 1)),
                ("whole", "curriculum", (1, 4, 2)),
                ("merged", "codes", (2, 4, 2)),
            ):
                cases.append((form, worlds, words_of(work.folder / "large", objective, form, kind)))
    for number, (form, worlds, words) in enumerate(cases):
        name = f"{form} {'-'.join(map(str, worlds))}"
        run, alone, seen = work.folder / f"run-{number}", work.folder / f"alone-{number}", []
        try:
            true = given(0, [*words, f"--run.dir={alone}", "--optim.micro_tokens=400"])[0]
            stop = max(1, len(true) // len(worlds))
            for turn, world in enumerate(worlds):
                last = turn == len(worlds) - 1
                asks = {} if last else {"on": world - 1, "stop_after": stop}
                more = [f"--run.dir={run}", "--optim.micro_tokens=400"]
                parts = given(world, [*words, *more], **asks)
                seen += [[m for own in step for m in own] for step in zip(*parts, strict=True)]
            if flat(seen) != flat(true):
                bad.append(f"{name}: other batches")
            assert_same_run(run, alone)
        except AssertionError as error:
            bad.append(f"{name}: {str(error)[:200]}")
        work.say(name)
    return Proof(
        len(cases), "changes of world", bad, "same batches, losses to 1e-6, weights to 1e-4"
    )


# N3: a step that is computed again


def recomputed(work: Work) -> Proof:
    """Log steps, lose them, compute them again: the same, rounded, or otherwise in one number."""
    from smbfast.run.metrics import MetricsLog

    draw, bad = random.Random(work.seed), []
    count = work.pick(push=60, nightly=300, recorded=1000, mutant=40)
    for number in range(count):
        run = work.folder / f"log-{number}"
        run.mkdir()
        first, steps = draw.randint(0, 5), draw.randint(1, 12)
        lines = [_logged_step(draw, n + 1) for n in range(first + steps)]
        log = MetricsLog(run)
        for line in lines[:first]:
            log.write("step", **line)
        offset = log.offset
        for line in lines[first:]:
            log.write("step", **line)
        log.close()
        case = draw.choice(("same", "rounded", "otherwise", "skipped"))
        victim, name = draw.randrange(first, first + steps), draw.choice(("sft", "grad_norm"))
        far = {"same": 0.0, "rounded": 10 ** draw.uniform(-15, -4)}.get(case, draw.uniform(0.01, 3))
        log = MetricsLog(run, offset, first)
        said = []
        for place, line in enumerate(lines[first:], first):
            new = dict(line)
            if place == victim:
                new[name] = line[name] * (1 + far)
                new |= {"grad_norm": None} if case == "skipped" else {}
            log.write("step", **new)
            said.append(log.again.add(new))
        log.close()
        wrong = f"step {victim + 1} gives"
        expected = {"same": "the same bits", "rounded": "within"}.get(case, wrong)
        if any(said[:-1]) or expected not in (said[-1] or ""):
            bad.append(f"{case}, {name} of step {victim + 1}: {said}")
    runs = work.pick(push=1, nightly=4, recorded=12, mutant=0)
    for number in range(runs):
        bad += _suspect(work, number, transient=number % 2 == 0)
    return Proof(count + runs, "steps", bad, f"{runs} in runs of two ranks")


def _logged_step(draw: random.Random, step: int) -> dict[str, Any]:
    values = {name: draw.uniform(0.1, 9) for name in ("sft", "jepa", "grad_norm")}
    return {"step": step, "codes": None, **values}


def faulty(words: list[str]) -> None:
    """Train, with a gradient of this rank that is wrong at the fourth step that it makes."""
    from smbfast.run import loop
    from tests.reliability.jobs import train

    real, seen = loop.forward_backward, [0]

    def computed(losses: Any, encoder: Any, *rest: Any, **more: Any) -> Any:
        summed = real(losses, encoder, *rest, **more)
        seen[0] += 1
        if seen[0] == 4 and os.environ["RANK"] == "1":
            encoder.mask_vector.grad = None
            last = next(p for p in encoder.parameters() if p.grad is not None)
            last.grad.view(-1)[0] += 1.0
        return summed

    vars(loop)["forward_backward"] = computed
    train(words)


def _suspect(work: Work, number: int, *, transient: bool) -> list[str]:
    """A run whose fourth step is wrong, killed behind it; then the same command."""
    from tests.reliability import jobs

    if not (work.folder / "data").is_dir():
        cohort(work, "codes")
        imported()
        jobs.adopt()
    words = Cohort(work.folder / "data").words(steps=6, save=3)
    run, log = work.folder / f"suspect-{number}", work.folder / f"log-suspect-{number}"
    job = [*words, f"--run.dir={run}"]
    death = jobs.Death(1, "step", 6)
    jobs.run_job(2, job, log, death, grace=4.0, work=faulty if transient else jobs.train)
    again = jobs.run_job(2, job, Path(f"{log}-again"))
    expected = "step 4 gives a gradient's norm" if transient else "after the restart: the same bits"
    if expected not in again.said[0] or any(again.codes.values()):
        return [f"{'a transient' if transient else 'no'} fault: {again.said[0][-600:]}"]
    return []


ROWS: tuple[Row, ...] = (
    Row(
        "R7",
        "A job whose torchrun or rank dies or stops is gone, names it, and goes on bit for bit.",
        {"push": 2, "nightly": 20, "recorded": 28},
        deaths,
        (
            mutant(
                "no-death-signal",
                "ranks whose torchrun was killed train on",
                "smbfast/run/watch.py",
                "if self._parent is not None and os.getppid() != self._parent:",
                "if self._parent is None and os.getppid() != self._parent:",
            ),
            mutant(
                "death-not-named",
                "a rank that ends since another has died does not know which",
                "smbfast/run/ranks.py",
                "        return next(iter(silent",
                "        return None and next(iter(silent",
            ),
        ),
        limit={"mutant": 900},
    ),
    Row(
        "D2",
        "1, 2, 4, 8 and 16 ranks train on the same global batches; an epoch has each window once.",
        {"push": 20, "nightly": 300, "recorded": 1000},
        batches,
        (
            mutant(
                "seeded-by-rank",
                "each rank draws windows of its own",
                "smbfast/data/loader.py",
                "order = step_windows(windows, objective, batch, seed, step, jepa=jepa)",
                "order = step_windows(windows, objective, batch, seed + rank, step, jepa=jepa)",
            ),
            mutant(
                "masks-by-rank",
                "each rank draws masks of its own",
                "smbfast/data/loader.py",
                "_packed(own, objective, seed, step, wanted) for own in mine]",
                "_packed(own, objective, seed + rank, step, wanted) for own in mine]",
            ),
            mutant(
                "counts-by-rank",
                "each rank divides by the labels and masks of its own windows",
                "smbfast/data/loader.py",
                "counts = _counted(plan, objective, wanted)",
                "counts = _counted(mine, objective, wanted)",
            ),
            mutant(
                "order-by-step",
                "an epoch is shuffled anew at each step, so that windows come twice or never",
                "smbfast/data/loader.py",
                'word(seed, "order", epoch)) for epoch',
                'word(seed, "order", step)) for epoch',
            ),
        ),
    ),
    Row(
        "D3",
        "A run that changes its number of ranks has the batches and losses of one process.",
        {"push": 2, "nightly": 6, "recorded": 12},
        changes,
        (
            mutant(
                "plan-keyed-by-world",
                "the windows of a step depend on how many ranks share it",
                "smbfast/data/loader.py",
                "order = step_windows(windows, objective, batch, seed, step, jepa=jepa)",
                "order = step_windows(windows, objective, batch, seed + ranks, step, jepa=jepa)",
            ),
            mutant(
                "signal-of-another-rank-is-missed",
                "a rank stops and the others wait for it",
                "smbfast/run/ranks.py",
                "bool(any_stop)",
                "stop",
            ),
        ),
        limit={"mutant": 900},
    ),
    Row(
        "N2",
        "A bit that flips in the state of one rank is seen before it is saved, and named.",
        {"push": 312, "nightly": 900, "recorded": 3000},
        flips,
        (
            mutant(
                "moments-not-summed",
                "the second moments of ranks are not compared",
                "smbfast/run/agreement.py",
                "for name, moment in moments.items() if moment}",
                'for name, moment in moments.items() if key != "exp_avg_sq"}',
            ),
            mutant(
                "tail-not-summed",
                "what fills no 64-bit integer is not compared",
                "smbfast/run/agreement.py",
                "return total + flat[whole:].view(_INTEGERS[size]).sum(dtype=torch.int64)",
                "return total",
            ),
            mutant(
                "scale-not-summed",
                "the running scale of horizons is not compared",
                "smbfast/run/agreement.py",
                "{n: averages[n] for n in sorted(scale)}",
                "{}",
            ),
        ),
    ),
    Row(
        "N3",
        "A step that is computed again after a restart is compared: same bits, rounding, or wrong "
        "once. It costs nothing, where computing suspect steps twice would cost steps.",
        {"push": 61, "nightly": 300, "recorded": 1000},
        recomputed,
        (
            mutant(
                "norms-not-compared",
                "a wrong gradient is taken for one of the step behind it",
                "smbfast/run/recomputed.py",
                'NAMES = ("sft", "jepa", "codes", "grad_norm")',
                'NAMES = ("sft", "jepa", "codes")',
            ),
            mutant(
                "read-when-cut-off",
                "the log is cut off at the checkpoint before its steps are read",
                "smbfast/run/metrics.py",
                "        self.again = Recomputed.of(self._path, offset)\n"
                "        os.truncate(self._path, min(offset, self._path.stat().st_size))\n",
                "        os.truncate(self._path, min(offset, self._path.stat().st_size))\n"
                "        self.again = Recomputed.of(self._path, offset)\n",
            ),
        ),
    ),
)
