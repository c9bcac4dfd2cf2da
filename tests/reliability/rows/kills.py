"""Rows of runs that are killed or stopped and go on, and of their checkpoints."""

from tests.mutants import mutant
from tests.reliability.proof import MUTANT, Proof, Row, Work

LOOP = "smbfast/run/loop.py"
CHECKPOINT = "smbfast/run/checkpoint.py"
OPEN_RUN = "smbfast/run/open_run.py"


def _killed(work: Work) -> Proof:
    from tests.reliability import small_runs
    from tests.reliability.killing import EVERY_SHAPE, Killing
    from tests.reliability.small_runs import Shape

    first = Shape("codes", "whole", "horizon")
    shapes = list(work.pick(push=(first, Shape("codes", "tracked", "mask")), nightly=EVERY_SHAPE))
    small_runs.make_data(work.folder, shapes if work.size != MUTANT else [first])
    killing = Killing(
        work,
        per_life=work.pick(push=4, nightly=5),
        damages=work.pick(push=1, recorded=20),
        whole=work.pick(push=False, nightly=True),
    )
    if work.size == MUTANT:
        killing.at_steps(first, (5, 5))
        return killing.proof()
    for shape in shapes:
        killing.shape(shape, work.pick(push=4, nightly=5, recorded=9))
    return killing.proof()


def _stopped(work: Work) -> Proof:
    from tests.reliability import small_runs
    from tests.reliability.killing import EVERY_SHAPE, stopped_at_every_step
    from tests.reliability.small_runs import TOTAL, Shape

    alone = [shape for shape in EVERY_SHAPE if shape.world == 1]
    shapes = work.pick(push=[Shape("codes", "tracked", "horizon")], nightly=alone)
    small_runs.make_data(work.folder, list(shapes))
    bad = [text for shape in shapes for text in stopped_at_every_step(work, shape)]
    figure = f"{len(shapes)} kinds of run, all tensors of all checkpoints and all lines to the bit"
    return Proof(len(shapes) * TOTAL, "stops", bad, figure)


def _golden(work: Work) -> Proof:
    import shutil

    from tests.reliability import golden

    names = list(golden.SHAPES) if work.size != MUTANT else ["horizons"]
    bad: list[str] = []
    exact = refused = 0
    for number, name in enumerate(names):
        folder = work.folder / f"{name}-whole"
        shutil.copytree(golden.HERE, folder)
        if not number or work.size not in ("push", MUTANT):
            bad += golden.refusals(name, work.folder / name)
            refused += 4
        problems = golden.open_golden(name, folder)
        if not problems:
            problems, same = golden.next_step(name, folder)
            exact += same
        bad += problems
    figure = f"all tensors to the bit, and {exact} next losses (others: within {golden.ALIKE:.0e})"
    figure += f"; {refused} of other formats refused by name"
    return Proof(len(names), "golden checkpoints", bad, figure)


def _repeated(work: Work) -> Proof:
    from tests.reliability import small_runs
    from tests.reliability.killing import EVERY_SHAPE
    from tests.reliability.repeated import forked_twice, started_twice
    from tests.reliability.small_runs import Shape

    shapes = work.pick(
        push=(Shape("codes", "whole", "hybrid", prepares=True),), nightly=EVERY_SHAPE
    )
    small_runs.make_data(work.folder, list(shapes))
    bad = [text for shape in shapes for text in forked_twice(work, shape)]
    anew = work.pick(push=0, nightly=1, recorded=4, mutant=0)
    bad += [text for shape in shapes[:anew] for text in started_twice(work, shape)]
    figure = f"{anew} of them with other hashes of strings, clocks and languages"
    return Proof(len(shapes) + anew, "pairs of runs", bad, figure)


ROWS = (
    Row(
        "R2",
        "A run that is killed at any moment and begun again ends as one that nobody killed.",
        {"push": 8, "nightly": 60, "recorded": 100},
        _killed,
        (
            mutant(
                "optimizer-of-before",
                "a checkpoint counts the optimizer's steps before the last",
                CHECKPOINT,
                'steps[name] = int(state["step"])',
                'steps[name] = int(state["step"]) - 1',
            ),
            mutant(
                "optimizer-order",
                "a checkpoint has the moments of the last parameter of the same shape",
                CHECKPOINT,
                "state = optimizer.state.get(parameter)",
                "state = optimizer.state.get([p for p in trained(encoder).values() "
                "if p.shape == parameter.shape][-1])",
            ),
            mutant(
                "metrics-offset",
                "a checkpoint's place in the log is one byte late",
                OPEN_RUN,
                '"metrics_offset": offset,',
                '"metrics_offset": offset + 1,',
            ),
            mutant(
                "target-updates",
                "a run that goes on counts the updates of its target from 0",
                CHECKPOINT,
                'target.updates = record["target_updates"]',
                "target.updates = 0",
            ),
            mutant(
                "horizon-statistics",
                "the running scale of horizon targets is not what was saved",
                "smbfast/model/target.py",
                "            self.scale.load(scale)",
                "            pass",
            ),
        ),
    ),
    Row(
        "R3",
        "A run that is stopped at every step and goes on equals one that was never stopped.",
        {"push": 12, "nightly": 120},
        _stopped,
        (
            mutant(
                "schedule-of-a-process",
                "warm-up and decay of the learning rate begin again where a run goes on",
                LOOP,
                "lr = learning_rate(settings, at)",
                "lr = learning_rate(settings, place(settings, step - first))",
            ),
            mutant(
                "draws-of-a-process",
                "a run that goes on draws other windows, cuts and masks",
                OPEN_RUN,
                "seed=self.settings.run.seed,",
                "seed=self.settings.run.seed + (self.progress.seconds > 0),",
            ),
            mutant(
                "moments-forgotten",
                "a run that goes on has lost the second moments of its optimizer",
                CHECKPOINT,
                '"exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(parameter.device),',
                '"exp_avg_sq": 0 * tensors[f"exp_avg_sq.{name}"].to(parameter.device),',
            ),
        ),
    ),
    Row(
        "R8",
        "A checkpoint of every released format loads to the bit and goes on as it did.",
        {"push": 4},
        _golden,
        (
            mutant(
                "tensor-renamed",
                "a tensor of the scale of horizons has another name",
                "smbfast/model/horizon_scale.py",
                '_NAMES = ("weight_H1",',
                '_NAMES = ("weight_H",',
            ),
            mutant(
                "any-format",
                "a manifest of any format is read as today's",
                "smbfast/base/files.py",
                "    if version != FORMAT:\n        raise ForeignFormat(",
                "    if version is None:\n        raise ForeignFormat(",
            ),
            mutant(
                "moments-of-half-precision",
                "moments of the optimizer are rounded where they are loaded",
                CHECKPOINT,
                '"exp_avg": tensors[f"exp_avg.{name}"].to(parameter.device),',
                '"exp_avg": tensors[f"exp_avg.{name}"].bfloat16().to(parameter),',
            ),
        ),
    ),
    Row(
        "D1",
        "A command that is run twice leaves the same bits.",
        {"push": 1, "nightly": 13, "recorded": 16},
        _repeated,
        (
            mutant(
                "unseeded-mask",
                "masks are drawn without a seed",
                "smbfast/data/masking.py",
                'random = generator(seed, "mask", step, k, window.subject, window.start)',
                "random = np.random.default_rng()",
            ),
            mutant(
                "unseeded-weights",
                "a new model begins with weights of no seed",
                "smbfast/model/backbone.py",
                "torch.manual_seed(settings.run.seed)",
                "torch.seed()",
            ),
        ),
    ),
)
