"""Rows of runs that learn nothing, of numbers that are not finite, and of what models remember."""

import json
import math
from pathlib import Path

from tests.mutants import mutant
from tests.reliability import injections, training
from tests.reliability.proof import Proof, Row, Work
from tests.reliability.rank_injections import Pairs
from tests.reliability.scenarios import BLAMED, ENDS, SCENARIOS, SOON, Scenario

LOGS = Path(__file__).resolve().parents[1] / "logs"
PUSHED = (  # of the scenarios: what takes a second of a processor together
    "gradient 0 in all steps",
    "gradient 0 from the third step",
    "loss three times of its start",
    "rate of 1000",
    "weights that are NaN, in JEPA",
    "no label",
    "no pair",
    "no mask in every second step of JEPA alone",
    "a target that never moves",
)
MISTAKEN = PUSHED[:3]  # what shows the mistakes


def _of_scenario(work: Work, scenario: Scenario, data: list[str]) -> list[str]:
    """Say what is wrong with how a run that learns nothing ends, and with what it says."""
    folder = work.folder / scenario.name.replace(" ", "-")
    own = scenario.data(folder / "data") if scenario.data else data
    words = [*training.TINY, *own, *scenario.words]
    ran = training.train(folder / "run", words, *scenario.patches())
    bad, text = [], " ".join(ran.err.split("\n"))
    if ran.code != scenario.code:
        bad.append(f"ends with {ran.code}: {text[-200:]}")
    if not any(words in text for words in scenario.says):
        bad.append("says nothing of the cause")
    bad += [f"blames a {word}" for word in BLAMED if word in text]
    if "Traceback" in text:
        bad.append("leaves a traceback")
    if ran.code == ENDS:
        bad += _of_the_end(ran, scenario)
    else:
        steps = [r["step"] for r in ran.records if r["kind"] == "step"]
        if (ran.folder / "final").exists():
            bad.append("leaves a model")
        if steps and f"step-{steps[-1]:06d}" in ran.checkpoints:
            bad.append("saves the end of the phase")
    return bad


def _of_the_end(ran: training.Ran, scenario: Scenario) -> list[str]:
    """Say what is missing of the alarm in the end card and in the report."""
    from smbfast.reporting.runlog import read_run
    from smbfast.reporting.signals import signals

    card = [x for x in ran.out.splitlines() if x.startswith(("WRONG", "warning"))]
    report = signals(read_run(ran.folder))
    bad = []
    if not any(words in line for line in card for words in scenario.says):
        bad.append("its end card says nothing of it")
    if not any(words in finding.text for finding in report for words in scenario.says):
        bad.append("its report says nothing of it")
    levels = [finding.level for finding in report]
    if levels != sorted(levels):  # bad before warn
        bad.append("its report does not begin with the worst")
    if len(ran.records) > 2 and ran.records[-1]["kind"] != "end":
        bad.append("its log has no end")
    return bad


def _alarm(work: Work) -> Proof:
    data = training.cohort(work.folder)
    names = work.pick(push=PUSHED, recorded=tuple(s.name for s in SCENARIOS), mutant=MISTAKEN)
    bad, count = [], 0
    for scenario in SCENARIOS:
        if scenario.name in names:
            count += 1
            work.say(scenario.name)
            bad += [f"{scenario.name}: {b}" for b in _of_scenario(work, scenario, data)]
    quiet = _false_alarms(work, data) if work.size != "mutant" else []
    bad += [text for text in quiet if text]
    figure = f"no false alarm in {len(quiet)} sound runs, within {SOON} steps"
    return Proof(count + len(quiet), "scenarios", bad, figure)


def _false_alarms(work: Work, data: list[str]) -> list[str]:
    """What sound runs say, of presets as they were logged, and of one that is trained here."""
    from smbfast.reporting.runlog import read_run
    from smbfast.reporting.signals import signals

    folders = []
    for log in sorted(LOGS.glob("*.jsonl")):
        folders.append(work.folder / log.stem)
        folders[-1].mkdir()
        (folders[-1] / "metrics.jsonl").write_text(log.read_text())
    if work.size in ("nightly", "recorded"):
        ran = training.train(work.folder / "sound", ["tiny", *data, "--probe.labels=[]"])
        folders.append(ran.folder)
    return [
        "; ".join(f"{folder.name}: {f.text}" for f in signals(read_run(folder)))
        for folder in folders
    ]


def _not_finite(work: Work) -> Proof:
    data = training.cohort(work.folder, 40)
    trials = injections.drawn(work.pick(push=3, nightly=12, recorded=45, mutant=1), work.seed)
    if work.size == "push":  # one run to compare with
        trials = [trial._replace(step=4) for trial in trials]
    like: dict[int, training.Ran] = {}
    bad: list[str] = []
    for i, trial in enumerate(trials):
        if trial.step not in like:
            folder = work.folder / f"like-{trial.step}"
            like[trial.step] = injections.skipping(folder, data, trial.step)
        ran = injections.injected(work.folder / str(i), data, trial)
        work.say(trial.words)
        wrong = injections.wrong_with(ran, like[trial.step], trial)
        bad += [f"{trial.words}: {text}" for text in wrong]
    ends = injections.drawn(work.pick(push=1, nightly=3, recorded=9, mutant=1), work.seed + 1)
    for i, trial in enumerate(ends):
        at = trial._replace(step=1 + trial.step % 2)
        wrong = injections.gives_up(work.folder / f"end-{i}", data, at)
        bad += [f"{at.words} and on: {text}" for text in wrong]
    count, of_ranks = len(trials) + len(ends), 0
    if work.size in ("nightly", "recorded") or (work.size == "mutant" and not bad):
        wrong, of_ranks = _on_one_rank(work, data)
        bad += wrong
    figure = f"{len(ends)} of them in all steps from one on, {of_ranks} on one rank of two"
    return Proof(count + of_ranks, "injections", bad, figure)


def _on_one_rank(work: Work, data: list[str]) -> tuple[list[str], int]:
    """What two ranks do wrong where a number of one of them is not finite, and of how many."""
    pairs = Pairs(work.folder / "pairs", data)
    pairs.folder.mkdir()
    count = work.pick(push=0, nightly=3, recorded=18, mutant=1)
    trials = injections.drawn(count, work.seed + 2)
    # the first and another step of the scale of horizons
    places = work.pick(push=0, nightly=1, recorded=2, mutant=0)
    trials += [injections.Injection("target", math.nan, 3 + i) for i in range(places)]
    ends = [] if work.size == "mutant" else injections.drawn(count // 3, work.seed + 3)
    bad = []
    for i, trial in enumerate(trials):
        name, on = f"{trial.words} of rank {i % 2}", i % 2
        bad += [f"{name}: {text}" for text in pairs.wrong_with(str(i), trial, on)]
        work.say(f"{name} {len(bad)} bad")
    for i, trial in enumerate(ends):
        at, on = trial._replace(step=1 + trial.step % 2), i % 2
        name = f"{at.words} of rank {on} and on"
        bad += [f"{name}: {text}" for text in pairs.gives_up(f"end-{i}", at, on)]
        name = f"{at.value} in the sum that rank {on} has at step {at.step + 1}"
        bad += [f"{name}: {text}" for text in pairs.splits(f"split-{i}", at, on)]
        work.say(f"{name} {len(bad)} bad")
    return bad, len(trials) + 2 * len(ends)


def _memory(work: Work) -> Proof:
    """Each trial is a secret: of ten patients, of nobody, of one whose codes nobody else has."""
    from bench.memorisation import Plan, measured

    plan = [Plan(10), Plan(0), Plan(0), Plan(1, rare=True)]
    steps = 300 if work.size in ("nightly", "recorded") else 90
    bad, seen = [], []
    for seed in range(work.pick(push=1, nightly=2, recorded=6)):
        folder = work.folder / str(seed)
        folder.mkdir()
        small = ["--model.hidden=32", "--model.layers=1", "--run.threads=1"]
        said = measured(
            folder, plan, format="codes", patients=60, length=3, steps=steps, seed=seed, more=small
        )
        for record in said:
            bits, carriers, apart = (record[k] for k in ("exposure", "carriers", "read_apart"))
            rare = record["codes"] == "of nobody else"
            least, most = (1, 1) if rare else (5, 9) if carriers else (0, 6)
            seen.append(f"{bits} of {'a rare one' if rare else carriers}")
            work.say(seen[-1])
            if not least <= bits <= most:
                bad.append(f"{bits} bits of a secret of {carriers} in {steps} steps, seed {seed}")
            if (apart == 1) != rare:
                bad.append(f"{apart} orders read apart, of a secret of {carriers}")
    return Proof(len(seen), "secrets", bad, f"bits, of 9: {', '.join(seen[:4])}")


def logged(run: Path) -> str:
    """The log of a sound run as it is held in `LOGS`: what the alarm hears, and no more."""
    lines = []
    for text in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(text)
        if record["kind"] == "header":
            config = record["config"]
            keys = ("name", "steps", "w_sft", "w_jepa", "w_codes", "freeze")
            phases = [{key: phase[key] for key in keys} for phase in config["phases"]]
            form = {key: config["objective"][key] for key in ("tau", "tau_end")}
            record = {"kind": "header", "config": {"phases": phases, "objective": form}}
        elif record["kind"] in ("step", "eval"):
            keys = ("kind", "step", "phase", "sft", "jepa", "codes", "loss", "grad_norm", "counts")
            record = {
                key: round(record[key], 5) if isinstance(record[key], float) else record[key]
                for key in keys
                if record.get(key) is not None
            }
        else:
            continue
        lines.append(json.dumps(record))
    return "\n".join(lines) + "\n"


ROWS: tuple[Row, ...] = (
    Row(
        "L2",
        "A run that trains nothing says so within 50 steps, in its end card and in its report, and "
        "names the cause; a phase without any signal ends it; sound runs say nothing",
        {"push": 12, "nightly": 25},
        _alarm,
        (
            mutant(
                "phase-without-signal-done",
                "a phase in which no step had a signal ends as any other",
                "smbfast/run/alarms.py",
                "    if why is None or",
                "    if True or",
            ),
            mutant(
                "alarm-at-a-thousand",
                "a loss may be a thousand times of its start",
                "smbfast/reporting/signals.py",
                "FAR = 2.0",
                "FAR = 1000.0",
            ),
            mutant(
                "zero-gradient-not-counted",
                "a gradient of exactly 0 is not counted",
                "smbfast/run/step.py",
                "zero=norms.count(0.0)",
                "zero=0",
            ),
        ),
    ),
    Row(
        "N1",
        "A step with a number that is not finite, on any rank, leaves the bits of a run that "
        "passes over it; no such number is saved, the last good checkpoint stays, and step and "
        "phase are named",
        {"push": 4, "nightly": 15, "recorded": 40},
        _not_finite,
        (
            mutant(
                "skip-decided-late",
                "whether a step is skipped is decided after the optimizer has made it",
                "smbfast/run/step.py",
                "            self._norms.append(grad_norm)\n            self.optimizer.step()\n",
                "            self._norms.append(grad_norm)\n"
                "            flag, self.optimizer.found_inf = self.optimizer.found_inf, None\n"
                "            self.optimizer.step()\n"
                "            self.optimizer.found_inf = flag\n",
            ),
            mutant(
                "patience-without-end",
                "a run goes on however many steps in a row are not finite",
                "smbfast/run/step.py",
                "        if longest >= PATIENCE:",
                "        if longest >= 1000 * PATIENCE:",
            ),
            mutant(
                "a-rank-s-nan-is-summed-as-zero",
                "a number of one rank that is not finite counts as 0 in the sum of all",
                "smbfast/run/ranks.py",
                "losses.to(dtype)])\n",
                "losses.to(dtype)]).nan_to_num(0.0, 0.0, 0.0)\n",
            ),
        ),
    ),
    Row(
        "P4",
        "A secret is drawn from a model that saw it often, and by chance alone from one that never "
        "did; one of codes that fewer than ten patients have is not even read",
        {"push": 4, "nightly": 8, "recorded": 24},
        _memory,
        (
            mutant(
                "exposure-of-no-secret",
                "the exposure is that of the mean order, not of the secret",
                "bench/memorisation.py",
                "own = losses[secret]",
                "own = losses.mean()",
            ),
            mutant(
                "exposure-of-what-stands-before",
                "of each order the first event alone is judged",
                "bench/memorisation.py",
                "losses += (loss * real[:, common:]).sum(1).tolist()",
                "losses += (loss * real[:, common:])[:, :1].sum(1).tolist()",
            ),
        ),
    ),
)
