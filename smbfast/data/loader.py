"""The data loader: draws the windows of each step and packs them into micro-batches.

A step wants up to three losses: SFT on trunks; JEPA, on branches (`objective.jepa=mask`) or from
positions of trunks (`horizon`); codes to come, from positions of trunks.

The windows of a step are a pure function of (seed, step), and so are their cuts, masks and
positions (`smbfast.data.masking`, `smbfast.data.pairs`). So the step number is the loader's only
state, and neither the number of workers, nor the size of micro-batches, nor a restart changes what
a step trains on.

Legend: W windows, C windows with a cut, T tokens, M masked tokens, R tokens that the mask vector
replaces.
"""

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import numpy as np

from smbfast.base.ahead import made_ahead
from smbfast.batch import PackedBatch, Timeline, WindowPairs, idle_batch, pack_segments
from smbfast.data.draws import FIXED as FIXED
from smbfast.data.draws import permuted, word
from smbfast.data.horizons import Horizons
from smbfast.data.masking import (
    cut_points,
    future_end,
    masked_tokens,
    needs_cuts,
    num_masked,
    replaced_tokens,
)
from smbfast.data.packing import online_cost, plan_micro_batches
from smbfast.data.pairs import window_pairs
from smbfast.data.windows import WindowSet
from smbfast.settings import ObjectiveSettings


@dataclass(frozen=True)
class Step:
    """The micro-batches of one optimizer step, with the counts that its mean losses divide by.

    Of several ranks, these are the micro-batches of one; counts and digest are of the whole step.
    """

    index: int  # number of the step, from 0 over all phases
    micro_batches: list[PackedBatch]
    num_labels: int  # tokens that SFT predicts
    num_masked: int  # masked tokens, or pairs of a position and a horizon, that JEPA predicts
    num_tokens: int  # tokens of trunks
    num_pairs: int = 0  # pairs of a position and a horizon, for which codes are predicted
    num_by_horizon: tuple[int, ...] = ()  # pairs that horizon JEPA predicts, by horizon
    digest: bytes = b""  # of the plan: which windows share a micro-batch, and the counts


@dataclass(frozen=True)
class Wanted:
    """The losses of a step, and how positions of windows are paired with horizons."""

    jepa: bool
    sft: bool = True
    codes: bool = False
    horizons: Horizons | None = None  # of runs that predict within horizons

    def cuts(self, objective: ObjectiveSettings) -> bool:
        """Whether windows are cut."""
        return needs_cuts(objective, jepa=self.jepa)

    def branches(self, objective: ObjectiveSettings) -> bool:
        """Whether cuts have masked futures."""
        return self.jepa and objective.jepa == "mask"

    def latent(self, objective: ObjectiveSettings) -> bool:
        """Whether JEPA predicts mean states within horizons."""
        return self.jepa and objective.jepa == "horizon"


def step_windows(
    windows: WindowSet,
    objective: ObjectiveSettings,
    batch: int,
    seed: int,
    step: int,
    *,
    jepa: bool,
) -> np.ndarray:
    """Return the indices of the windows of a step, int64 [W], in a time that `batch` alone decides.

    Where a step needs cuts, these are windows with a cut, one of each length stratum, so that
    steps have masked tokens in similar numbers. In a run that predicts within horizons they are
    likewise windows with a pair of a position and a horizon, in all its phases, so that steps are
    alike. Otherwise they are any windows. W is `batch`, or the number of such windows if there are
    fewer, and then every step has each of them once.

    Raises:
        ValueError: if cuts or pairs are needed and no window has one.
    """
    if needs_cuts(objective, jepa=jepa):
        windows.require_cuts()
        places = stratified(windows.num_with_cut, batch, seed, step)
        return windows.with_cut_C[places].astype(np.int64)
    if windows.horizons is not None:
        windows.require_pairs()
        places = stratified(windows.num_with_pair, batch, seed, step)
        return windows.with_pair_C[places].astype(np.int64)
    return in_turn(len(windows), batch, seed, step)


def num_windows_read(windows: WindowSet, objective: ObjectiveSettings, *, jepa: bool) -> int:
    """Return the number of windows of which `step_windows` draws, which is an epoch.

    An epoch reads each once; in strata, if they have one size, and else about once.
    """
    if needs_cuts(objective, jepa=jepa):
        return windows.num_with_cut
    return len(windows) if windows.horizons is None else windows.num_with_pair


def stratified(num: int, batch: int, seed: int, step: int) -> np.ndarray:
    """Return one place of each of `batch` strata of `range(num)`, int64 [min(batch, num)].

    Strata are runs of places whose sizes differ by one at most. An epoch of a stratum has as many
    steps as the stratum has places, and each place once, in an order drawn for that epoch.
    """
    count = min(batch, num)
    edges = [s * num // count for s in range(count + 1)]
    places = []
    for s, (first, end) in enumerate(pairwise(edges)):
        epoch, turn = divmod(step, end - first)
        places.append(first + permuted(turn, end - first, word(seed, "stratum", epoch, s)))
    return np.array(places, np.int64)


def in_turn(num: int, batch: int, seed: int, step: int) -> np.ndarray:
    """Return the places of a step in `range(num)`, int64 [min(batch, num)].

    An epoch has every place once, in an order drawn for that epoch.
    """
    count = min(batch, num)
    turns = (divmod(i, num) for i in range(step * count, (step + 1) * count))
    places = [permuted(turn, num, word(seed, "order", epoch)) for epoch, turn in turns]
    return np.array(places, np.int64)


def make_step(
    windows: WindowSet,
    objective: ObjectiveSettings,
    step: int,
    *,
    batch: int,
    tokens: int,
    seed: int,
    sft: bool = True,
    jepa: bool,
    codes: bool = False,
    ratio: float = 0.0,
    rank: int = 0,
    ranks: int = 1,
    even: bool = False,
) -> Step:
    """Draw the windows of a step and pack those of a rank into its micro-batches.

    Windows of other ranks are planned and counted, but their tokens are not read.

    Args:
        step: number of the step, from 0.
        batch: number of windows; see `step_windows`.
        tokens: online tokens that a micro-batch may hold.
        sft: whether the step has the SFT loss.
        jepa: whether the step has the JEPA loss.
        codes: whether the step has the loss of codes to come.
        ratio: the cost of a visible pair over that of a token (`smbfast.data.packing`).
        rank: the rank whose micro-batches are made.
        ranks: the number of processes that share the step.
        even: whether all ranks get as many micro-batches; one that has fewer rows gets idle ones.
    """
    order = step_windows(windows, objective, batch, seed, step, jepa=jepa)
    chosen = [windows[i] for i in order.tolist()]
    # so that ties in cost do not depend on the draw
    chosen.sort(key=lambda w: (w.subject, w.start))
    wanted = Wanted(sft=sft, jepa=jepa, codes=codes, horizons=windows.horizons)
    plan = _planned(chosen, objective, seed, step, wanted, tokens, ratio, ranks)
    mine = plan[rank::ranks]
    micro_batches = [_packed(own, objective, seed, step, wanted) for own in mine]
    if even:
        micro_batches += [idle_batch()] * (-(-len(plan) // ranks) - len(mine))
    counts = _counted(plan, objective, wanted)
    names = [[(d.window.subject, d.window.start) for d in own] for own in plan]
    digest = blake2b(repr((step, tokens, counts, names)).encode(), digest_size=8).digest()
    return Step(step, micro_batches, digest=digest, **counts)


def make_micro_batches(
    windows: list[Timeline],
    objective: ObjectiveSettings,
    seed: int,
    step: int,
    *,
    tokens: int,
    ratio: float = 0.0,
    **losses: Any,
) -> list[PackedBatch]:
    """Pack windows into as few micro-batches of `tokens` as `plan_micro_batches` needs.

    The arguments are those of `make_step`, and `losses` those of `Wanted`. Windows without anything
    to predict are left out.
    """
    wanted = Wanted(**losses)
    plan = _planned(windows, objective, seed, step, wanted, tokens, ratio)
    return [_packed(own, objective, seed, step, wanted) for own in plan]


def make_batch(
    windows: list[Timeline], objective: ObjectiveSettings, seed: int, step: int, **losses: Any
) -> PackedBatch:
    """Pack all windows into one batch; those that have nothing to predict are left out.

    Without SFT, nothing is predicted on a trunk, and it ends at its last cut or position.

    Args:
        losses: those of `Wanted`.
    """
    wanted = Wanted(**losses)
    drawn = [_drawn(w, objective, seed, step, wanted) for w in windows]
    return _packed([d for d in drawn if d.trunk], objective, seed, step, wanted)


@dataclass(frozen=True)
class _Drawn:
    """What a step predicts of a window."""

    window: Timeline
    cuts: list[int]
    pairs: WindowPairs | None
    trunk: int  # tokens of its trunk, 0 if nothing is predicted


def _planned(
    windows: list[Timeline],
    objective: ObjectiveSettings,
    seed: int,
    step: int,
    wanted: Wanted,
    tokens: int,
    ratio: float,
    ranks: int = 1,
) -> list[list[_Drawn]]:
    """Return what is predicted of the windows of each micro-batch, those of all ranks."""
    drawn = [_drawn(w, objective, seed, step, wanted) for w in windows]
    used = [d for d in drawn if d.trunk]
    if not used:
        return []
    sizes = [_online_size(d, objective, wanted) for d in used]
    tokens_W, pairs_W = np.array(sizes, np.int64).T
    plan = plan_micro_batches(tokens_W, online_cost(tokens_W, pairs_W, ratio), tokens, ranks)
    return [[used[i] for i in planned.tolist()] for planned in plan]


def _drawn(
    window: Timeline, objective: ObjectiveSettings, seed: int, step: int, wanted: Wanted
) -> _Drawn:
    cuts, pairs, latent = [], None, wanted.latent(objective)
    if wanted.cuts(objective):
        cuts = cut_points(window, objective, seed, step)
    if wanted.horizons is not None and (latent or wanted.codes):
        most = objective.positions
        pairs = window_pairs(
            window,
            wanted.horizons,
            positions=most,
            seed=seed,
            step=step,
            latent=latent,
            codes=wanted.codes,
        )
    if wanted.sft and (cuts or objective.sft_labels == "all"):
        return _Drawn(window, cuts, pairs, len(window))
    ends = [0, *(cuts if wanted.branches(objective) else [])]
    if pairs is not None and len(pairs.token_N):
        ends.append(int(pairs.token_N[-1]) + 1)
    return _Drawn(window, cuts, pairs, max(ends))


def _online_size(drawn: _Drawn, objective: ObjectiveSettings, wanted: Wanted) -> tuple[int, int]:
    """Return tokens and visible pairs of a trunk and its branches."""
    cuts, trunk = (drawn.cuts if wanted.branches(objective) else []), drawn.trunk
    futures = [(cut, future_end(drawn.window, cut, objective) - cut) for cut in cuts]
    pairs = trunk * (trunk + 1) // 2 + sum(n * cut + n * (n + 1) // 2 for cut, n in futures)
    return trunk + sum(n for _, n in futures), pairs


def _counted(
    plan: list[list[_Drawn]], objective: ObjectiveSettings, wanted: Wanted
) -> dict[str, Any]:
    """Return the counts of a `Step` of micro-batches that are not packed: no token is read."""
    labels = masked = 0
    by_horizon = np.zeros(_num_horizons(objective, wanted), np.int64)
    drawn = [own for planned in plan for own in planned]
    for own in drawn:
        if wanted.sft and (own.cuts or objective.sft_labels == "all"):
            first = own.cuts[0] if objective.sft_labels == "future" else 0
            labels += len(own.window) - 1 - max(own.window.labels_from - 1, first - 1, 0)
        for cut in own.cuts if wanted.branches(objective) else []:
            masked += num_masked(own.window, cut, objective)
        if own.pairs is not None and len(by_horizon):
            horizon_Q = own.pairs.horizon_P[own.pairs.latent_P]
            by_horizon += np.bincount(horizon_Q, minlength=len(by_horizon))
    latent = int(by_horizon.sum())
    return {
        "num_labels": labels,
        "num_masked": masked + latent,
        "num_tokens": sum(len(own.window) for own in drawn),
        "num_pairs": sum(len(own.pairs.position_P) for own in drawn if own.pairs is not None),
        "num_by_horizon": tuple(by_horizon.tolist()) if latent else (),
    }


def prefetched(
    make: Iterable[Callable[[], Step]],
    *,
    workers: int = 2,
    pin: bool = False,
    stop: Callable[[], object] = lambda: False,
) -> Generator[Step, None, None]:
    """Yield the results of the callables `make` in order, computed ahead by threads.

    Threads are enough, as a step of 8 windows takes a few milliseconds, mostly in NumPy. The log
    shows how long training waited for them.

    Args:
        workers: the number of threads, and half of that of finished steps that may wait; with 0, a
            step is made when it is asked for.
        pin: whether to copy batches into page-locked memory, for a GPU.
        stop: whether a signal asked to stop; a step that does not come is then not waited for.

    Raises:
        RunFailed, KeyboardInterrupt: see `made_ahead`.
    """

    def made(make_one: Callable[[], Step]) -> Step:
        step = make_one()
        return _pinned(step) if pin else step

    calls = (partial(made, one) for one in make)
    return made_ahead(calls, what="the loader", threads=workers, waiting=2 * workers, stop=stop)


def _pinned(step: Step) -> Step:
    return replace(step, micro_batches=[b.pinned() for b in step.micro_batches])


def _packed(
    drawn: list[_Drawn], objective: ObjectiveSettings, seed: int, step: int, wanted: Wanted
) -> PackedBatch:
    trunks, next_tokens, whole = [], [], []
    branches: list[list[tuple[int, np.ndarray]]] = []
    masked: list[list[np.ndarray]] = []
    replaced: list[list[np.ndarray]] = []
    for own in drawn:
        window, cuts = own.window, own.cuts
        whole.append(window.ids_T)
        trunks.append(window.ids_T[: own.trunk])
        predicts = wanted.sft and (cuts or objective.sft_labels == "all")
        labels = _labels(window, objective, cuts) if predicts else np.full(own.trunk, -100)
        next_tokens.append(labels)
        branches.append([])
        masked.append([])
        replaced.append([])
        for k, cut in enumerate(cuts if wanted.branches(objective) else []):
            masked_M = masked_tokens(window, cut, objective, seed, step, k)
            replaced_R = replaced_tokens(window, cut, objective, masked_M) - cut
            future = window.ids_T[cut : future_end(window, cut, objective)].copy()
            future[replaced_R] = 0  # the online encoder cannot read the id of such a token
            branches[-1].append((cut, future))
            masked[-1].append(masked_M - cut)
            replaced[-1].append(replaced_R)
    pairs = [own.pairs for own in drawn if own.pairs is not None]
    return pack_segments(
        trunks,
        branches,
        next_tokens=next_tokens,
        masked=masked,
        replaced=replaced,
        windows=whole,
        pairs=pairs or None,
        num_horizons=_num_horizons(objective, wanted),
    )


def _num_horizons(objective: ObjectiveSettings, wanted: Wanted) -> int:
    return len(wanted.horizons) if wanted.horizons and wanted.latent(objective) else 0


def _labels(window: Timeline, objective: ObjectiveSettings, cuts: list[int]) -> np.ndarray:
    labels = np.full(len(window), -100, np.int64)
    labels[:-1] = window.ids_T[1:]
    labels[: max(window.labels_from - 1, 0)] = -100
    if objective.sft_labels == "future":
        labels[: cuts[0] - 1] = -100
    return labels
