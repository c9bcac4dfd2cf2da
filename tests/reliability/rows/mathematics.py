"""Rows of what is computed: texts, the future, accumulation, packs, growth, export."""

import gc
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.mutants import mutant
from tests.reliability.proof import Proof, Row, Work, from_tests

EXACT = 1e-12  # of losses and gradients in fp64, relative
EXPORT = 2e-6  # of a logit in fp32: sums of 24 terms in another order
GROWTH = 1.03  # of resident memory from the fifth part of a run on


def examples(test: Any, count: int, *arguments: Any) -> tuple[int, list[str]]:
    """Run a test of hypothesis on `count` examples; the number that were run, and what failed."""
    from hypothesis import HealthCheck, Phase, settings

    inner, ran = test.hypothesis.inner_test, 0

    def counted(*words: Any, **named: Any) -> None:
        nonlocal ran
        ran += 1
        inner(*words, **named)

    test.hypothesis.inner_test = counted
    test._hypothesis_internal_use_settings = settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        phases=[Phase.explicit, Phase.generate],  # any example that breaks it will do
        suppress_health_check=list(HealthCheck),
    )
    try:
        test(*arguments)
    except AssertionError as error:
        return ran, [f"{test.__name__}: {str(error)[:200] or 'an example broke it'}"]
    return ran, []


def _broken(what: str, check: Callable[[], None]) -> list[str]:
    try:
        check()
    except AssertionError as error:
        return [f"{what}: {str(error)[:200]}"]
    return []


def prove_text(work: Work) -> Proof:
    """No text of the data gives an id that has a meaning of its own, by tokenizers of six makes."""
    from tests.bad_input import test_bad_text

    count, bad = examples(
        test_bad_text.test_no_text_gives_a_reserved_id, work.pick(push=300, recorded=20_000)
    )
    figure = f"each by {len(test_bad_text.ENCODERS)} tokenizers"
    if work.size == "recorded":
        whole = from_tests("tests/bad_input/test_bad_text.py", work=work)
        figure += f"; {whole.count} tests of prepared texts"
        bad += whole.bad
    return Proof(count, "texts", bad, figure)


def prove_future(work: Work) -> Proof:
    """What comes after a node changes no token of it, and a masked future no online state."""
    from tests import test_objective
    from tests.data import test_prefix_law

    count, bad = examples(
        test_prefix_law.test_nothing_after_a_node_changes_it, work.pick(push=60, recorded=1000)
    )
    more, worse = examples(test_prefix_law.test_generated_tables, work.pick(push=30, recorded=1000))
    for name in (
        "test_masked_predictions_see_only_what_stands_before_them",
        "test_the_unmasked_future_of_the_trunk_never_enters_the_online_side",
    ):
        bad += _broken(name, getattr(test_objective, name))
    return Proof(count + more, "timelines", bad + worse, "and 2 tests of the objective, to the bit")


def _step_windows(seed: int, most: int = 6) -> list:
    from numpy.random import default_rng

    from tests.tiny import random_window

    random = default_rng(seed)
    buckets = random.integers(2, 8, random.integers(3, most + 1))
    return [random_window(1 + seed * 10 + i, buckets=int(b)) for i, b in enumerate(buckets)]


def _gradients(case: Any, kind: str, batches: list) -> tuple[dict, dict]:
    """Losses and gradients of a step in fp64, as the loop computes them."""
    from smbfast.objective import losses
    from smbfast.run.step import LossScales, forward_backward
    from tests.test_equivalence import FP64, pairs

    encoder, target = pairs(kind, case)[FP64]
    counts = (sum(b.num_labels for b in batches), sum(b.num_masked for b in batches))
    encoder.zero_grad(set_to_none=True)
    scales = LossScales.of(0.7, 1.3, *counts)
    found = forward_backward(partial(losses, normalize=True), encoder, target, batches, scales)
    gradients = {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}
    encoder.zero_grad(set_to_none=True)
    return {n: float(v) for n, v in found._asdict().items()}, gradients


def _cut(seed: int, windows: list) -> list[list]:
    """The windows of a step in micro-batches of random sizes, in a random order."""
    from numpy.random import default_rng

    random = default_rng(seed)
    order = [windows[i] for i in random.permutation(len(windows))]
    ends = sorted({*random.integers(1, len(order), 2).tolist(), len(order)})
    return [order[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def _prove_steps(work: Work, count: int, cuts: Callable[[int, list], list[list]]) -> Proof:
    """Steps cut in one way against each window as a micro-batch of its own."""
    from smbfast.data.loader import make_batch
    from smbfast.settings import ObjectiveSettings
    from tests.test_equivalence import CASES
    from tests.two_paths import assert_same

    def check(number: int, windows: list) -> None:
        case, kind = CASES[number % len(CASES)], ("qwen3", "llama")[number // 2 % 2]
        form = ObjectiveSettings(min_future=4, cuts=1 + number % 2)
        alone, batches = (
            [make_batch(part, form, 0, 0, jepa=True) for part in parts]
            for parts in ([[w] for w in windows], cuts(number, windows))
        )
        expected = _gradients(case, kind, alone)
        assert_same(_gradients(case, kind, batches), expected, EXACT)

    bad: list[str] = []
    for number in range(count):
        windows = _step_windows(work.seed * count + number)
        bad += _broken(f"step {number} of {len(windows)} windows", partial(check, number, windows))
    return Proof(count, "steps", bad, f"losses and gradients within {EXACT:.0e} in fp64")


def prove_accumulation(work: Work) -> Proof:
    """The gradient of a step is one, however gradient accumulation cuts it."""
    return _prove_steps(work, work.pick(push=12, recorded=200), _cut)


def prove_packs(work: Work) -> Proof:
    """Patients packed together have the losses and gradients of each alone."""

    def together(number: int, windows: list) -> list[list]:
        order = _cut(number, windows)
        return [[window for part in order for window in part]]

    return _prove_steps(work, work.pick(push=12, recorded=200), together)


def prove_export(work: Work) -> Proof:
    """A final folder and what PEFT merges of it give the logits of training in plain libraries."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    forms = [(k, tie, lora) for lora in (True, False) for k in ("qwen3", "llama") for tie in (1, 0)]
    bad: list[str] = []
    largest: dict[str, float] = {}
    forms = forms[: work.pick(push=8, mutant=2)]
    for number, (kind, tie, lora) in enumerate(forms):
        folder = work.folder / f"final-{number}"
        ids_1T, expected_1TV = _exported(folder, kind, bool(tie), lora, number)
        with torch.no_grad():
            load = AutoPeftModelForCausalLM if lora else AutoModelForCausalLM
            plain = load.from_pretrained(folder)
            pairs = {"final in fp32": (plain(input_ids=ids_1T).logits, expected_1TV, EXPORT)}
            if lora:  # in fp64, as rounding once more in fp32 is no mistake
                apart_1TV = plain.double()(input_ids=ids_1T).logits
                merged_1TV = plain.merge_and_unload()(input_ids=ids_1T).logits
                pairs["merged in fp64"] = (merged_1TV, apart_1TV, EXACT)
        name = f"{kind} {'tied' if tie else 'untied'} {'LoRA' if lora else 'whole'}"
        for what, (logit_1TV, own_1TV, most) in pairs.items():
            gap = float((logit_1TV - own_1TV).abs().max() / own_1TV.abs().max())
            largest[what] = max(largest.get(what, 0.0), gap)
            bad += [] if gap <= most else [f"{name}: a logit of {what} is off by {gap:.1e}"]
    figure = ", ".join(f"{what} {gap:.1e}" for what, gap in largest.items())
    return Proof(len(forms), "models", bad, f"largest difference of a logit: {figure}")


def _exported(folder: Path, kind: str, tie: bool, lora: bool, seed: int) -> tuple[Any, Any]:
    """Write a tiny encoder as a run does; ids with the rows that LoRA trains, and their logits."""
    import torch
    from peft import get_peft_model

    from smbfast.data.tokens import train_tokenizer
    from smbfast.model.backbone import PatientEncoder, lora_config
    from smbfast.run.checkpoint import save_final
    from smbfast.settings import LoraSettings
    from tests.tiny import DELIMITERS, tiny_lm
    from tests.two_paths import move

    tokenizer = train_tokenizer(["a word\n"], 300)
    lm = tiny_lm(kind, seed, tie=tie, vocab_size=len(tokenizer))
    base = folder.with_name(f"{folder.name}-base")
    if lora:
        lm.save_pretrained(base)
        lm = get_peft_model(lm, lora_config(lm, LoraSettings(r=4, alpha=8), DELIMITERS))
    encoder = PatientEncoder(lm, 2)
    move(encoder, seed, 0.2)
    ids_1T = torch.arange(len(tokenizer))[None]
    with torch.no_grad():
        logit_1TV = encoder.lm(input_ids=ids_1T).logits
    record = {"backbone": str(base), "trains": "lora" if lora else "all"}
    save_final(folder, encoder, None, tokenizer, record)
    return ids_1T, logit_1TV


def prove_growth(work: Work) -> Proof:
    """After a fifth of its steps a run holds no more memory, tensors or open files."""
    from smbfast import train
    from smbfast.run import loop

    steps = work.pick(push=60, nightly=500, recorded=2000)
    seen: list[tuple[int, int, int]] = []
    every = max(steps // 40, 4)
    log_step = loop.log_step

    def measured(log: Any, run: Any, step: Any, *words: Any, **named: Any) -> None:
        log_step(log, run, step, *words, **named)
        if (step.index + 1) % every == 0:
            gc.collect()
            seen.append((_resident(), _tensors(), len(os.listdir("/proc/self/fd"))))
            work.say(f"step {step.index + 1}: {seen[-1]}")

    loop.log_step = measured
    gc.freeze()  # what was there before is neither counted nor looked at again
    settings = ["tiny", f"--run.dir={work.folder / 'run'}", *SMALL, f"--run.log_every={every}"]
    first = steps // 10
    settings += [f"--phases.0.steps={first}", f"--phases.1.steps={steps - first}"]
    settings += [f"--eval.every={max(steps // 20, 15)}", f"--run.save_every={max(steps // 20, 10)}"]
    train.main(settings)
    return _grown(seen, steps, resident=work.size not in ("push", "mutant"))


SMALL = ["--cohort.patients=60", "--data.window=128", "--model.hidden=16", "--model.layers=1"]
SMALL += ["--model.ffn=32", "--optim.batch=2", "--run.threads=1", "--probe.labels=[]"]
SMALL += ["--eval.windows=8"]


def _grown(seen: list[tuple[int, int, int]], steps: int, *, resident: bool) -> Proof:
    """Compare the last quarter of a run with its first half, when all phases have begun."""
    seen = seen[:-1]  # at the last one no step is made ahead
    early = seen[len(seen) // 5 : len(seen) // 2]
    late = seen[-len(seen) // 4 :]
    # a checkpoint under way has its file and tensors for a while: what leaks is there at any time
    most_early, most_late = (
        (max(resident), *map(min, others))
        for resident, *others in (zip(*part, strict=True) for part in (early, late))
    )
    names = ("bytes of resident memory", "tensors", "open files")
    ratio = [b / a for a, b in zip(most_early, most_late, strict=True)]
    allowed = (GROWTH if resident else 2.0, 1.0, 1.0)
    bad = [
        f"{name} grew from {a:,} to {b:,}"
        for name, a, b, r, most in zip(names, most_early, most_late, ratio, allowed, strict=True)
        if r > most
    ]
    figure = f"resident memory {ratio[0] - 1:+.1%}, {most_late[1]} tensors, {most_late[2]} files"
    return Proof(steps, "steps", bad, figure)


def _resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))


def _tensors() -> int:
    import torch

    return sum(issubclass(type(value), torch.Tensor) for value in gc.get_objects())


ROWS: tuple[Row, ...] = (
    Row(
        "M3",
        "No text of the data becomes structure: none of its tokens has a meaning of its own.",
        {"push": 300, "recorded": 20_000},
        prove_text,
        (
            mutant(
                "control-tokens-read",
                "a text that holds the name of a control token is encoded as that token",
                "smbfast/data/tokens.py",
                "if not self._reserved.isdisjoint(ids):",
                "if self._reserved.issuperset(ids):",
            ),
        ),
    ),
    Row(
        "M4",
        "No event after a prediction time or a cut changes an embedding or a masked prediction.",
        {"push": 90, "recorded": 2000},
        prove_future,
        (
            mutant(
                "row-node-sees-its-whole-bucket",
                "the bucket of a decision node counts as complete",
                "smbfast/data/nodes.py",
                "bucket_time_B, serializer.bucket_key(time_K))",
                'bucket_time_B, serializer.bucket_key(time_K), side="right")',
            ),
            mutant(
                "row-node-sees-the-next-moment",
                "a decision node sees events one microsecond after it",
                "smbfast/data/nodes.py",
                'node_time, side="right"',
                'node_time + 1, side="right"',
            ),
        ),
    ),
    Row(
        "D4",
        "The losses and gradients of a step do not depend on how gradient accumulation cuts it.",
        {"push": 12, "recorded": 200},
        prove_accumulation,
        (
            mutant(
                "mean-of-means",
                "each micro-batch weighs the same, however much it holds",
                "smbfast/run/step.py",
                "        backward(terms)\n",
                "        backward([t if t is None else t / len(micro_batches) for t in terms])\n",
            ),
        ),
    ),
    Row(
        "D5",
        "Patients that are packed together have the losses and gradients of each alone.",
        {"push": 12, "recorded": 200},
        prove_packs,
        (
            mutant(
                "positions-of-the-pack",
                "the positions of a patient go on where those of its neighbour end",
                "smbfast/batch.py",
                "position_T = np.arange(length_S.sum()) - np.repeat(start_S - prefix_S, length_S)",
                "position_T = np.arange(length_S.sum())",
            ),
        ),
    ),
    Row(
        "X1",
        "What a run leaves gives the logits of training in transformers and PEFT alone.",
        {"push": 8},
        prove_export,
        (
            mutant(
                "token-rows-dropped",
                "an adapter is saved without the rows of new tokens",
                "smbfast/run/checkpoint.py",
                "        lm.save_pretrained(str(staging), **options)\n",
                "        rows = [p for n, p in lm.named_parameters() if 'tokens_delta' in n]\n"
                "        for row_RD in rows:\n"
                "            row_RD.detach().zero_()\n"
                "        lm.save_pretrained(str(staging), **options)\n",
            ),
        ),
    ),
    Row(
        "M6",
        "A long run holds no more memory, tensors or open files at its end than at its start.",
        {"push": 60, "nightly": 500, "recorded": 2000},
        prove_growth,
        (
            mutant(
                "losses-kept",
                "the gradient norm of every step stays on the device",
                "smbfast/run/step.py",
                "        return grad_norm\n\n    def report_skips",
                "        self.__dict__.setdefault('norms', []).append(grad_norm)\n"
                "        return grad_norm\n\n    def report_skips",
            ),
            mutant(
                "file-left-open",
                "each line of the log opens its file again",
                "smbfast/run/metrics.py",
                "            self._file.flush()\n",
                "            self._file.flush()\n"
                "            self.__dict__.setdefault('files', []).append(open(self._path))\n",
            ),
        ),
    ),
)
