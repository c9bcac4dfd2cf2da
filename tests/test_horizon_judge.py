"""Horizon JEPA and codes to come, against the judge of `tests.horizon_oracle`."""

from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from smbfast import objective, reference
from smbfast.batch import UNKNOWN, PackedBatch, Timeline
from smbfast.data.horizons import Horizons, usable
from smbfast.data.loader import make_batch
from smbfast.data.pairs import window_pairs
from smbfast.model.backbone import PatientEncoder, Predictor
from smbfast.model.codes_head import CodesHead
from smbfast.model.target import TargetEncoder, TargetForm
from smbfast.run.optim import make_optimizer
from smbfast.run.step import LossScales, Updater, forward_backward
from smbfast.settings import ObjectiveSettings, OptimSettings
from tests.horizon_oracle import HorizonOracle, Record, Running, View
from tests.horizon_records import CLASSES, RECORDS, SPANS, TEXT, shown, views_of, window_set
from tests.second_oracle import AdamW
from tests.two_paths import FP32, FP64, Case, apart, exact_norms, make_encoder, moved_target, twin

NAMES = ("1d", "3d", "30d", "365d")
ALL = {**RECORDS, **TEXT}
PATHS = {"shared": objective.losses, "reference": reference.losses}
WEIGHTS = (0.7, 1.3, 0.9)  # of SFT, JEPA and codes
SEED = 3
# as in tests/test_equivalence.py: rounding of fp32 through two layers, forward and back
TOLERANCE = {FP64: 1e-12, FP32: 5e-6}


@pytest.mark.parametrize("censored", ["drop", "none"])
@pytest.mark.parametrize("name", ALL)
def test_pairs_are_usable_where_what_comes_is_known(name, censored):
    record = ALL[name]
    horizons = Horizons(NAMES, record.length, censored)
    assert horizons.spans_H.tolist() == list(SPANS)
    time_B = np.array([bucket.time for bucket in record.buckets])
    terminal = UNKNOWN if record.terminal is None else record.terminal
    expected = [
        [record.is_usable(number, span, censored) for span in SPANS]
        for number in range(len(record.buckets))
    ]
    assert usable(time_B, record.last, terminal, horizons).tolist() == expected


@pytest.mark.parametrize("censored", ["drop", "none"])
@pytest.mark.parametrize("name", ALL)
def test_a_window_has_the_pairs_tokens_and_classes_of_its_record(name, censored):
    record = ALL[name]
    horizons = Horizons(NAMES, record.length, censored)
    options = {"positions": 99, "seed": 0, "step": 0}
    windows = window_set(record, horizons)
    views = views_of(record, windows)

    def known(view: View) -> list[tuple[int, int]]:
        return view.at(view.ends).usable(SPANS, censored)

    def tokens(view: View, p: int, h: int) -> list[int]:
        return view.tokens_within(p, SPANS[h])

    for window, view in views:
        expected = [
            (view.rows[p][-1], h, tokens(view, p, h), view.classes_within(p, SPANS[h]))
            for p, h in known(view)
        ]
        for latent, codes in ((True, True), (False, True), (True, False)):
            pairs = window_pairs(window, horizons, latent=latent, codes=codes, **options)
            token_P = pairs.token_N[pairs.position_P].tolist()
            classes: list[list[int]] = [[] for _ in token_P]
            for pair, number in zip(pairs.pair_Z.tolist(), pairs.class_Z.tolist(), strict=True):
                classes[pair].append(number)
            found = list(zip(token_P, pairs.horizon_P.tolist(), strict=True))
            wanted = [x for x in expected if codes or x[2]]
            assert found == [x[:2] for x in wanted]
            inside = [list(range(t + 1, end)) for t, end in zip(token_P, pairs.end_P, strict=True)]
            assert inside == [x[2] if latent else [] for x in wanted]
            assert all(len(own) == len(set(own)) for own in classes)
            assert [set(own) for own in classes] == [x[3] if codes else set() for x in wanted]
    compared = [any(tokens(view, p, h) for p, h in known(view)) for _, view in views]
    assert windows.has_pair_W.tolist() == compared
    by_length = sorted(np.flatnonzero(compared), key=lambda w: len(views[w][0]))
    assert windows.with_pair_C.tolist() == by_length


def test_positions_are_drawn_by_identity_and_evenly():
    horizons = Horizons(NAMES, 0, "none")
    [(window, view)] = shown([RECORDS["censored"]], horizons, 99)
    known = {view.rows[p][-1] for p, _ in view.at(view.ends).usable(SPANS, "none")}
    counts: Counter = Counter()
    for step in range(200):
        options = {"positions": 5, "seed": 1, "step": step, "latent": True, "codes": True}
        drawn = window_pairs(window, horizons, **options).token_N.tolist()
        assert drawn == window_pairs(window, horizons, **options).token_N.tolist()
        assert len(set(drawn)) == 5 and drawn == sorted(drawn)
        counts.update(drawn)
    assert counts.keys() == known
    # each of the eight is drawn 200 x 5 / 8 = 125 times on average, with a deviation of 7
    assert min(counts.values()) > 125 - 5 * 7 and max(counts.values()) < 125 + 5 * 7


FORM = ObjectiveSettings(jepa="horizon", positions=4)
# exact in fp32, as their roots are powers of two
PREVALENCE = [2.0 ** -(2 * (1 + n % 4)) for n in range(len(SPANS) * CLASSES)]


def horizon_encoder(
    kind: str, case: Case, *, weighted: bool = False, dtype: torch.dtype = FP64
) -> PatientEncoder:
    """A tiny encoder with a predictor of horizons and a head of codes none of which is zero."""
    encoder = make_encoder(kind, lora=case.lora, tie=case.tie, dtype=dtype)
    prevalence_HK = np.array(PREVALENCE).reshape(len(SPANS), CLASSES)
    encoder.predictor = Predictor(encoder.width, 2, len(SPANS))
    encoder.codes = CodesHead(encoder.width, prevalence_HK, weighted)
    with torch.no_grad():
        encoder.codes.class_KE.add_(0.3 * torch.randn_like(encoder.codes.class_KE))
    return encoder.to(dtype)


def judge_of(other: PatientEncoder, *, weighted: bool = False) -> HorizonOracle:
    """The judge, on an encoder of its own."""
    layers = [m for m in other.predictor if isinstance(m, torch.nn.Linear)]
    head, table_HD = other.codes, other.predictor.horizon_HD
    assert head is not None and table_HD is not None
    prevalence_HC = torch.tensor(PREVALENCE, dtype=FP64).reshape(len(SPANS), CLASSES)
    return HorizonOracle(
        other.lm,
        layers,
        other.mask_vector,
        table_HD,
        (head.inner_HED, head.class_KE, head.bias_HK),
        prevalence_HC if weighted else None,
    )


def drawn(
    windows: list[tuple[Timeline, View]], horizons: Horizons, step: int, form=FORM
) -> list[View]:
    """The views with the positions that the loader draws."""
    views = []
    for window, view in windows:
        options = {"positions": form.positions, "seed": SEED, "step": step}
        pairs = window_pairs(window, horizons, latent=True, codes=True, **options)
        number = {view.rows[p][-1]: p for p in view.ends}
        views.append(view.at(number[token] for token in pairs.token_N.tolist()))
    return views


def batches(
    windows: list[tuple[Timeline, View]], horizons: Horizons, step: int, num: int, form=FORM
) -> list[PackedBatch]:
    """The windows in micro-batches."""
    packed = []
    for first in range(num):
        own = [window for window, _ in windows[first::num]]
        packed.append(make_batch(own, form, SEED, step, jepa=True, codes=True, horizons=horizons))
        packed[-1].check()
    return packed


def scales_of(micro_batches: list[PackedBatch]) -> LossScales:
    w_sft, w_jepa, w_codes = WEIGHTS
    labels = sum(b.num_labels for b in micro_batches)
    latent = sum(b.num_latent for b in micro_batches)
    pairs = sum(b.num_pairs for b in micro_batches)
    return LossScales.of(w_sft, w_jepa, labels, latent, w_codes, pairs)


def assert_step(encoder, other, losses, expected, tol: float) -> None:
    """Losses, and the gradient of every weight, which is less than a rounding where all cancel."""
    for name, own, value in zip(("sft", "jepa", "codes"), losses, expected, strict=True):
        assert float(own) == pytest.approx(float(value.detach()), rel=tol), name
    truth = {n: p.grad for n, p in other.named_parameters() if p.grad is not None}
    floor = 1e-3 * float(torch.cat([g.flatten() for g in truth.values()]).norm())
    own = {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}
    assert own.keys() == truth.keys(), own.keys() ^ truth.keys()
    far = {n: apart(own[n].double(), truth[n], floor) for n in truth}
    assert all(a <= tol for a in far.values()), {n: a for n, a in far.items() if not a <= tol}


@pytest.mark.parametrize(
    ("kind", "case", "path", "records", "censored"),
    [
        ("qwen3", Case(False, "merged"), "shared", "codes", "drop"),
        ("llama", Case(False, "merged", False), "reference", "text", "none"),
        ("llama", Case(True, "merged", False), "shared", "codes", "none"),
        ("qwen3", Case(True, "tracked"), "reference", "codes", "drop"),
        ("qwen3", Case(True, "tracked"), "shared", "text", "drop"),
    ],
    ids=str,
)
def test_three_steps_are_those_of_the_judge(kind, case, path, records, censored):
    """Losses, gradients, their norm, every weight, the average and the scale, in fp64."""
    text, weighted = records == "text", case.lora
    # a tracked average of all ranks is a product of roots of a Gram matrix: its square root of
    # rounding, 1.5e-8 of what was added to it, is in the targets of the steps that follow
    tol = 1e-8 if case.form == "tracked" else TOLERANCE[FP64]
    horizons = Horizons(NAMES, ALL["days"].length if text else 0, censored)
    windows = shown((TEXT if text else RECORDS).values(), horizons)
    encoder = horizon_encoder(kind, case, weighted=weighted)
    other = twin(encoder)
    judge, running = judge_of(other, weighted=weighted), Running(len(SPANS), encoder.width)
    target = TargetEncoder(encoder, TargetForm(case.form, rank=64, every=2))
    updater = Updater(make_optimizer(encoder, OptimSettings(clip=0.5)), clip=0.5)
    adamw = AdamW(decays(other), (0.9, 0.95), clip=0.5)
    for step, (lr, tau, num) in enumerate(((1e-3, 0.9, 1), (2e-3, 0.8, 2), (5e-4, 0.5, 5))):
        micro_batches = batches(windows, horizons, step, num)
        losses = partial(PATHS[path], normalize=True)
        found = forward_backward(losses, encoder, target, micro_batches, scales_of(micro_batches))
        terms = judge.losses(drawn(windows, horizons, step), SPANS, censored, running)
        expected = [weight * term for weight, term in zip(WEIGHTS, terms, strict=True)]
        sum(expected).backward()
        assert_step(encoder, other, found, expected, tol if step else TOLERANCE[FP64])
        grad_norm = updater.step(lr, target, tau)
        assert float(grad_norm) == pytest.approx(adamw.step(lr), rel=1e-9)
        judge.average(tau)
        # a weight whose gradient is next to nothing moves by a whole step of its rounding
        with torch.no_grad():
            for own, theirs in zip(encoder.parameters(), other.parameters(), strict=True):
                assert float((own - theirs).norm()) <= 1e-8 * float(theirs.norm())
                theirs.copy_(own)


def decays(encoder: torch.nn.Module) -> dict[torch.nn.Parameter, float]:
    """0.01 for matrices that are trained whole; the start of a code's logit is none."""
    bare = ("lora_", "trainable", "codes.bias")
    return {
        p: 0.01 if p.ndim > 1 and not any(word in n for word in bare) else 0.0
        for n, p in encoder.named_parameters()
        if p.requires_grad
    }


@pytest.mark.parametrize("path", PATHS)
def test_fp32_loses_nothing_but_rounding(path):
    encoder = horizon_encoder("qwen3", Case(True, "merged"), weighted=True, dtype=FP32)
    other = twin(encoder).double()
    exact_norms(other)
    horizons = Horizons(NAMES, 0, "drop")
    windows = shown(RECORDS.values(), horizons)
    target = TargetEncoder(encoder, TargetForm("merged"))
    micro_batches = batches(windows, horizons, 0, 2)
    losses = partial(PATHS[path], normalize=True)
    found = forward_backward(losses, encoder, target, micro_batches, scales_of(micro_batches))
    judge, running = judge_of(other, weighted=True), Running(len(SPANS), encoder.width)
    terms = judge.losses(drawn(windows, horizons, 0), SPANS, "drop", running)
    expected = [weight * term for weight, term in zip(WEIGHTS, terms, strict=True)]
    sum(expected).backward()
    assert_step(encoder, other, found, expected, TOLERANCE[FP32])


def changed(record: Record, t: int, how: str) -> Record:
    """The same patient up to `t`; later events in another order, or all but the last deleted."""
    known = [b for b in record.buckets if b.time <= t]
    later = [b for b in record.buckets if b.time > t]
    if how == "deleted":
        return replace(record, buckets=(*known, *later[-1:]))
    others = [
        replace(b, ids=a.ids, classes=a.classes) for a, b in zip(later[::-1], later, strict=True)
    ]
    return replace(record, buckets=(*known, *others))


@pytest.mark.parametrize("how", ["permuted", "deleted"])
def test_what_comes_behind_a_horizon_changes_nothing(how):
    """Neither what is predicted nor what it is compared with, and every death stays a pair."""
    encoder = horizon_encoder("qwen3", Case(True, "merged"))
    target = moved_target(encoder, "merged")
    horizons, record = Horizons(NAMES, 0, "drop"), RECORDS["long"]
    form = ObjectiveSettings(jepa="horizon", positions=99)
    t = record.buckets[5].time + SPANS[2]  # 30 days behind the sixth bucket
    states = []
    for own in (record, changed(record, t, how)):
        [(window, view)] = shown([own], horizons, 999)
        [batch] = batches([(window, view)], horizons, 0, 1, form)
        with torch.no_grad():
            latent = objective.measure(encoder, target, batch).latent
        pairs = batch.pairs
        number = {view.rows[p][-1]: p for p in view.ends}
        names = [
            (number[row], h)
            for row, h in zip(
                pairs.row_N[pairs.position_P].tolist(), pairs.horizon_P.tolist(), strict=True
            )
        ]
        come: list[set[int]] = [set() for _ in names]
        for pair, own_class in zip(pairs.pair_Z.tolist(), pairs.class_Z.tolist(), strict=True):
            come[pair].add(own_class)
        place = {names[q]: n for n, q in enumerate(pairs.latent_Q.tolist())}
        inside = [(p, h) for p, h in names if own.known_at(p) + SPANS[h] <= t]
        rows = [place[pair] for pair in inside if pair in place]
        states.append(
            (
                [(pair, pair in place, come[names.index(pair)]) for pair in inside],
                torch.cat([latent.prediction_QD[rows], latent.target_QD[rows]]),
                latent,
            )
        )
    (pairs, compared, before), (others, unchanged, after) = states
    assert pairs == others and len(pairs) > 10
    torch.testing.assert_close(compared, unchanged, rtol=0, atol=1e-12)
    # what is left out of the comparison has changed
    assert before.target_QD.shape != after.target_QD.shape or not torch.allclose(
        before.target_QD, after.target_QD
    )


def test_every_death_within_a_horizon_is_a_pair():
    """Whatever is dropped: a record without a death is followed as far as it goes, one with, on."""
    for record in ALL.values():
        if record.terminal is None:
            continue
        horizons = Horizons(NAMES, record.length, "drop")
        [(window, view)] = shown([record], horizons, 999)
        options = {"positions": 99, "seed": 0, "step": 0, "latent": False, "codes": True}
        pairs = window_pairs(window, horizons, **options)
        dies = {p for p in pairs.pair_Z[pairs.class_Z == CLASSES - 1].tolist()}
        held = {(int(pairs.token_N[pairs.position_P[p]]), int(pairs.horizon_P[p])) for p in dies}
        assert held == {
            (view.rows[p][-1], h)
            for p in view.ends
            for h, span in enumerate(SPANS)
            if record.known_at(p) < record.terminal
            and any(CLASSES - 1 in record.buckets[q].classes for q in record.coming(p, span))
        }


def test_the_head_of_codes_starts_at_the_prevalence():
    """A rare code weighs as one with a prevalence of 0.001 does."""
    prevalence_HK = np.array([[0.25, 1e-3], [0.5, 1e-6]])
    head = CodesHead(8, prevalence_HK, weighted=True)
    # logits and roots of fp32
    torch.testing.assert_close(
        torch.sigmoid(head.bias_HK).double(), torch.from_numpy(prevalence_HK)
    )
    expected = torch.tensor([[2.0, 1000**0.5], [2**0.5, 1000**0.5]])
    torch.testing.assert_close(head.weight_HK, expected)
