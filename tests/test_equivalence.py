"""The shared forward and the three of the reference: the same losses and the same gradients.

fp64 with RMSNorms in fp64 says that the mathematics is the same; fp32 that nothing is lost where
training runs. A gradient is compared as a whole: the norm of the difference over its norm.
"""

from functools import cache, partial
from itertools import chain, permutations, product

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smbfast import objective, reference
from smbfast.batch import PackedBatch, Timeline, pack_segments
from smbfast.data.loader import make_batch, make_micro_batches, make_step
from smbfast.model.backbone import PatientEncoder
from smbfast.model.target import TargetEncoder, TargetForm
from smbfast.run.optim import make_optimizer
from smbfast.run.step import LossScales, Updater, forward_backward
from smbfast.settings import ObjectiveSettings, OptimSettings
from tests.strategies import UNITS, objectives, steps
from tests.tiny import random_window, step_of, window_set
from tests.two_paths import (
    CASES,
    FP32,
    FP64,
    PATHS,
    Case,
    apart,
    assert_same,
    exact_norms,
    make_encoder,
    moved_target,
    run,
    twin,
)
from tests.windows_of_rows import NEW_ROWS, window_of_rows

pytestmark = pytest.mark.numeric

# a gradient goes forward and back through 2 layers of 7 linears, each a sum of at most 24 terms: by
# tests/ops/tolerance.py that leaves u sqrt(2 * 2 * 7 * 24) = 1.5e-6 of its norm in fp32, and norms
# and softmax between the linears let it grow, here to at most three times as much
TOLERANCE = {FP64: 1e-12, FP32: 5e-6}
WEIGHTS = [(1.0, 1.0), (0.1, 2.0), (0.0, 1.0), (1.0, 0.0)]  # of SFT and JEPA
WINDOWS = [random_window(s, buckets=b) for s, b in ((1, 6), (2, 5), (3, 7))]
WINDOWS.append(random_window(4, buckets=1))  # no bucket after its first: no cut
ROOMY = 10_000  # tokens: all windows in one row
KINDS = ["qwen3", "llama"]


@cache
def pairs(kind: str, case: Case) -> dict[torch.dtype, tuple[PatientEncoder, TargetEncoder]]:
    """An encoder and a target that has stayed behind, and the same numbers in fp64.

    Made once: no test changes them.
    """
    torch.manual_seed(0)
    encoder = make_encoder(kind, lora=case.lora, tie=case.tie)
    exact = twin(encoder)
    target = moved_target(encoder, case.form)
    exact.load_state_dict(encoder.state_dict())
    exact.double()
    exact_norms(exact)
    return {FP64: (exact, TargetEncoder.of_state(exact, target.state())), FP32: (encoder, target)}


def assert_paths_agree(
    kind: str,
    case: Case,
    windows: list[Timeline],
    form: ObjectiveSettings,
    plans: list[list[PackedBatch]],
    weights: tuple[float, float],
    *,
    hard: bool = False,
) -> None:
    """Each plan's rows by the shared forward, against the reference on whole windows at once.

    Args:
        hard: fp32 itself may be too coarse: allow what the reference is off from fp64. Norms round
            otherwise in the two paths, and of a gradient whose terms cancel little else is left.
    """
    for row in chain(*plans):
        row.check()
    weights = dict(zip(("sft", "jepa"), weights, strict=True))
    weights["normalize"] = form.target_norm == "layer"
    # with labels and whole trunks, whatever the rows leave out
    whole = make_batch(windows, form, 0, 0, sft=True, jepa=True)
    truth = None
    for dtype, (encoder, target) in pairs(kind, case).items():
        expected = run("reference", encoder, target, [whole], **weights)
        for rows in plans:
            found = run("shared", encoder, target, rows, **weights)
            assert_same(found, expected, TOLERANCE[dtype], truth=truth)
        truth = expected if hard else None


@settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    kind=st.sampled_from(KINDS),
    case=st.sampled_from(CASES),
    windows=steps(),
    form=objectives(),
    capacity=st.sampled_from([16, 80, 160, ROOMY]),
    weights=st.sampled_from(WEIGHTS),
)
def test_any_windows_cuts_masks_and_rows(kind, case, windows, form, capacity, weights):
    wants = {"sft": weights[0] > 0, "jepa": weights[1] > 0}
    plan = make_micro_batches(windows, form, 0, 0, tokens=capacity, **wants)
    assert_paths_agree(kind, case, windows, form, [plan], weights, hard=True)


# half of all: of each three settings, every combination
GRID = [
    setting
    for setting in product(UNITS, [1, 3], ["all", "future"], [None, 9], ["layer", "none"])
    if sum(value in (3, "future", 9, "none") for value in setting) % 2 == 0
]
SKELETONS = ["visible", "hidden"]


@pytest.mark.parametrize(
    ("place", "unit", "cuts", "labels", "horizon", "norm"),
    [(i, *g) for i, g in enumerate(GRID)],
    ids=lambda v: str(v),
)
def test_every_setting(place, unit, cuts, labels, horizon, norm):
    """Each with the four weights, in one row and in four; models and targets in turn."""
    form = ObjectiveSettings(
        mask_unit=unit,
        cuts=cuts,
        sft_labels=labels,
        horizon=horizon,
        target_norm=norm,
        skeleton=SKELETONS[place // 3 % 2],
        min_future=4,
        span=3,
    )
    kind, case = KINDS[place % 2], CASES[place // 2 % len(CASES)]
    weights = WEIGHTS[place % 4]
    wants = {"sft": weights[0] > 0, "jepa": weights[1] > 0}
    plans = []
    read = 3 + (wants["sft"] and labels == "all")  # the window without a cut has nothing else
    for tokens, count in ((ROOMY, 1), (1, read)):
        step = step_of(0, make_micro_batches(WINDOWS, form, 0, 0, tokens=tokens, **wants))
        assert len(step.micro_batches) == count and (step.num_masked > 0) == wants["jepa"]
        # every window but one has all its cuts
        branches = 3 * cuts * wants["jepa"]
        assert sum(len(b.segment_tuples) for b in step.micro_batches) == read + branches
        plans.append(step.micro_batches)
    assert_paths_agree(kind, case, WINDOWS, form, plans, weights, hard=True)


@pytest.mark.parametrize("dtype", [FP64, FP32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_packed_equals_one_patient_at_a_time(case, dtype):
    """And in any order: means are of the whole step."""
    form = ObjectiveSettings(min_future=4, cuts=2)
    encoder, target = pairs("qwen3", case)[dtype]
    alone = [make_batch([w], form, 0, 0, jepa=True) for w in WINDOWS]
    expected = run("shared", encoder, target, alone)
    for order in list(permutations(WINDOWS))[::7]:
        packed = make_batch(list(order), form, 0, 0, jepa=True)
        assert_same(run("shared", encoder, target, [packed]), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("skeleton", SKELETONS)
@pytest.mark.parametrize("dtype", [FP64, FP32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_measured_losses_and_states_are_the_same(case, dtype, skeleton):
    form = ObjectiveSettings(min_future=4, cuts=3, skeleton=skeleton)
    batch = make_batch(WINDOWS, form, 0, 0, jepa=True)
    encoder, target = pairs("llama", case)[dtype]
    with torch.no_grad():
        sft, _, states, _ = objective.measure(encoder, target, batch)
        true_sft, _, true, _ = reference.measure(encoder, target, batch)
        assert objective.measure(encoder, None, batch).masked is None
    assert apart(sft, true_sft) < TOLERANCE[dtype]
    for name, expected in vars(true).items():
        assert apart(getattr(states, name), expected) < TOLERANCE[dtype], name


def test_what_precedes_a_masked_first_token_is_the_context():
    """A cut lies before a bucket's header, which is never masked; a batch may hold any branch."""
    ids_T = WINDOWS[0].ids_T
    future = ids_T[9:14].copy()
    future[[0, 1, 3]] = 0
    batch = pack_segments(
        [ids_T], [[(9, future)]], masked=[[np.array([0, 1, 3])]], next_tokens=[ids_T]
    )
    encoder, target = pairs("llama", CASES[0])[FP64]
    with torch.no_grad():
        states = objective.measure(encoder, target, batch).masked
        true = reference.measure(encoder, target, batch).masked
        hidden_UD = target.hidden(batch.target_ids_U[None])[0]
    assert apart(states.previous_MD, hidden_UD[[8, 8, 11]]) < TOLERANCE[FP64]
    for name, expected in vars(true).items():
        assert apart(getattr(states, name), expected) < TOLERANCE[FP64], name


@cache
def pair_of_rows(case: Case) -> dict[torch.dtype, tuple[PatientEncoder, TargetEncoder]]:
    """As `pairs`, with two thousand tokens that are new to the backbone."""
    size = NEW_ROWS.stop
    torch.manual_seed(0)
    encoder = make_encoder(lora=case.lora, tie=case.tie, rows=NEW_ROWS, vocab_size=size)
    exact = twin(encoder)
    target = moved_target(encoder, case.form)
    exact.load_state_dict(encoder.state_dict())
    exact.double()
    exact_norms(exact)
    return {FP64: (exact, TargetEncoder.of_state(exact, target.state())), FP32: (encoder, target)}


@pytest.mark.parametrize("dtype", [FP64, FP32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_thousand_new_rows(case, dtype):
    """Codes as tokens of a backbone: losses, and every gradient, of the rows above all."""
    form = ObjectiveSettings(min_future=4, cuts=2)
    windows = [window_of_rows(seed, buckets=b) for seed, b in ((1, 6), (2, 5), (3, 7))]
    encoder, target = pair_of_rows(case)[dtype]
    whole = make_batch(windows, form, 0, 0, sft=True, jepa=True)
    expected = run("reference", encoder, target, [whole])
    for tokens in (ROOMY, 80):
        rows = make_micro_batches(windows, form, 0, 0, tokens=tokens, sft=True, jepa=True)
        assert_same(run("shared", encoder, target, rows), expected, TOLERANCE[dtype])
    if case.lora:  # a gradient in each row: of the table where it is the head, of the head else
        name = "embed_tokens" if case.tie else "lm_head"
        trained = {n: g for n, g in expected[1].items() if "trainable_tokens" in n}
        assert len(trained) == 2 - case.tie
        gradient_RD = next(g for n, g in trained.items() if name in n)
        assert len(gradient_RD) == len(NEW_ROWS) and bool((gradient_RD.norm(dim=1) > 0).all())


@pytest.mark.parametrize("recompute", ["mlp", "full"])
@pytest.mark.parametrize("case", [CASES[0], CASES[4]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_computed_again_is_the_same(kind, case, recompute):
    """Bit for bit: the same kernels on the same numbers."""
    batch = make_batch(WINDOWS, ObjectiveSettings(min_future=4, cuts=3), 0, 0, jepa=True)
    encoder, target = pairs(kind, case)[FP32]
    kept = run("shared", encoder, target, [batch])
    again = run("shared", encoder, target, [batch], recompute=recompute)
    assert again[0] == kept[0] and again[1].keys() == kept[1].keys()
    assert all(torch.equal(again[1][n], g) for n, g in kept[1].items())


@pytest.mark.parametrize("recompute", ["none", "mlp", "full"])
@pytest.mark.parametrize("jepa", [0.0, 1.0])
def test_adapters_alone(jepa, recompute):
    """Without JEPA nothing that the first layer reads wants a gradient."""
    encoder = make_encoder(rows=(), dtype=FP64)
    target = moved_target(encoder)
    batch = make_batch(WINDOWS, ObjectiveSettings(min_future=4), 0, 0, jepa=jepa > 0)
    expected = run("reference", encoder, target, [batch], jepa=jepa)
    found = run("shared", encoder, target, [batch], jepa=jepa, recompute=recompute)
    assert_same(found, expected, TOLERANCE[FP64])


@torch.no_grad()
@pytest.mark.parametrize("path", PATHS)
def test_labels_begin_with_the_last_token_of_the_context(path):
    """Which both paths are given: against the tokens of the windows themselves."""
    encoder, target = pairs("qwen3", CASES[0])[FP64]
    form = ObjectiveSettings(min_future=4, cuts=2, sft_labels="future")
    for window in WINDOWS[:3]:
        batch = make_batch([window], form, 0, 0, jepa=True)
        cut = min(prefix for *_, prefix in batch.segment_tuples if prefix)
        ids_T = torch.from_numpy(window.ids_T).long()
        hidden_TD = encoder.hidden(ids_T[None])[0]
        logits = hidden_TD[cut - 1 : -1] @ encoder.head_VD.T
        expected = torch.nn.functional.cross_entropy(logits, ids_T[cut:], reduction="sum")
        weights = {"sft_scale": 1.0, "jepa_scale": 0.0, "normalize": True}
        assert apart(PATHS[path](encoder, target, batch, **weights)[0], expected) < 1e-12


def trained(path: str, encoder: PatientEncoder, case: Case, tokens: int) -> list[list[float]]:
    """30 steps of both losses, by the step that training takes; the losses of each."""
    form = ObjectiveSettings(min_future=4, cuts=2)
    target = TargetEncoder(encoder, TargetForm(case.form, rank=1, every=4))
    updater = Updater(make_optimizer(encoder, OptimSettings()), clip=1.0)
    losses = partial(PATHS[path], normalize=True)
    totals, windows = [], window_set(WINDOWS, form)
    for index in range(30):
        step = make_step(windows, form, index, batch=3, tokens=tokens, seed=0, jepa=True)
        scales = LossScales.of(1.0, 1.0, step.num_labels, step.num_masked)
        summed = forward_backward(losses, encoder, target, step.micro_batches, scales)
        updater.step(1e-3, target, 0.9)
        totals.append([float(summed.sft), float(summed.jepa)])
    return totals


@pytest.mark.parametrize(("kind", "case"), [("llama", CASES[0]), ("qwen3", CASES[5])], ids=str)
def test_thirty_steps_stay_together(kind, case):
    """Losses within 1e-5, parameters within 1e-4; one path in one row, the other in several."""
    one = make_encoder(kind, lora=case.lora, tie=case.tie)
    other = twin(one)
    before = {n: p.detach().clone() for n, p in one.named_parameters()}
    expected = trained("reference", one, case, ROOMY)
    found = trained("shared", other, case, 64)
    for left, right in zip(found, expected, strict=True):
        assert left == pytest.approx(right, rel=1e-5)
    assert found[-1][0] < 0.9 * found[0][0]
    for (name, p), q in zip(other.named_parameters(), one.parameters(), strict=True):
        assert apart(p.detach(), q.detach()) < 1e-4, name
        assert torch.equal(p, before[name]) != p.requires_grad, name
