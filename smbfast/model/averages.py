"""The two forms in which an average of effective weights W + s B A is held.

`Merged` holds each averaged matrix; `Tracked` holds the average of B A alone, as a product of low
rank over the shared W. Both move towards the online weights, give the parameters that take the
place of the decoder's in a forward, and know how far the online weights are.

M modules of one shape, N out, K in features, Q columns held.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from smbkernels import ema_update_
from smbkernels.ema import join, split
from smbkernels.tracked_ema import append_, truncate_
from torch import Tensor


@dataclass(frozen=True)
class Source:
    """An online weight by its name under the decoder, and its adapter: W + s B A.

    Parameters themselves, not what they hold now: a model that is moved puts other tensors there.
    """

    name: str
    weight: Tensor
    b: Tensor | None = None
    a: Tensor | None = None
    scale: float = 1.0

    @property
    def module(self) -> str:
        """The name of the adapted linear."""
        return self.name.removesuffix(".base_layer.weight")


class Merged:
    """Averages of W + s B A, or of W where there is no adapter; fp32 (fp64 of fp64 weights).

    For bf16 weights an average is a bf16 high half, which a forward reads as it is, and an int16
    remainder; together they are the bits of the fp32 average.
    """

    def __init__(self, sources: list[Source]) -> None:
        """Averages that equal the online weights; all with an adapter or none, of one dtype."""
        self.sources = sources
        self._split = sources[0].weight.dtype == torch.bfloat16
        self._low: list[Tensor] | None = None
        if self._split:
            halves = [split(s.weight.float()) for s in sources]
            self._average = [high for high, _ in halves]
            self._low = [low for _, low in halves]
        else:
            wide = torch.promote_types(sources[0].weight.dtype, torch.float32)
            self._average = [s.weight.to(wide, copy=True).contiguous() for s in sources]
        self.update(0.0)

    def update(self, tau: float) -> None:
        """One call for all of them."""
        _move(self._average, self.sources, tau, self._low)

    def weights(self) -> dict[str, Tensor]:
        """Parameters of the decoder by name, in the dtype of the decoder."""
        pairs = zip(self.sources, self._average, strict=True)
        return {s.name: w.to(s.weight.dtype) for s, w in pairs}

    def exact(self) -> Iterator[tuple[str, Tensor]]:
        """Names and averages at full width; what is not split, as it is held."""
        for i, source in enumerate(self.sources):
            full = self._average[i]
            yield source.name, full if self._low is None else join(full, self._low[i])

    def gap(self) -> Tensor:
        """‖online - average‖² and ‖average‖², fp64 [2]."""
        total = torch.zeros(2, dtype=torch.float64, device=self._average[0].device)
        for source, (_, average) in zip(self.sources, self.exact(), strict=True):
            online = average.clone()
            # not the chosen kernel, which would plan launches for these copies
            _move([online], [source], 0.0, update=ema_update_.reference)
            total += torch.stack([_square(online - average), _square(average)])
        return total

    def measures(self) -> dict[str, float]:
        """An exact average has nothing to report."""
        return {}

    def owns(self, name: str) -> bool:
        """Whether `state` has that name for this form and these weights."""
        return name.removesuffix(".remainder") in {s.name for s in self.sources}

    def state(self) -> dict[str, Tensor]:
        """Averages by name; of a split one the high half, and `.remainder`."""
        pairs = zip(self.sources, self._average, strict=True)
        state = {s.name: w for s, w in pairs}
        if self._low is not None:
            named = zip(self.sources, self._low, strict=True)
            state |= {f"{s.name}.remainder": low for s, low in named}
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore `state`, or one that holds fp32 averages of bf16 weights."""
        if self._split and not any(n.endswith(".remainder") for n in state):
            halves = {n: split(full.float()) for n, full in state.items()}
            low = {f"{n}.remainder": low for n, (_, low) in halves.items()}
            state = {n: high for n, (high, _) in halves.items()} | low
        own = self.state()
        refuse_others(own, state)
        for name, value in own.items():
            value.copy_(state[name])


class Tracked:
    """The average of B A as U V of rank R over the shared W, by groups of modules of one shape.

    s never changes and stays where the adapter applies it. U V starts as B A, each update appends
    (1 - τ) B A to τ U V, and every `every` updates the product is cut to rank R, at most `rank`
    times that of the adapter. fp32 (fp64 of fp64 adapters); the cut is computed in fp64.

    A forward takes U and V in the place of B and A, on the very products with W that the online
    encoder takes. At Qwen3-8B and r = 16 their Q = 128 columns add 5 % to those products.
    """

    def __init__(self, sources: list[Source], rank: int, every: int) -> None:
        """An average that equals the online adapters."""
        self.rank, self.every, self.pending = rank, every, 0
        by_shape: dict[tuple, list[Source]] = {}
        for source in sources:
            by_shape.setdefault((*source.weight.shape, source.b.shape[1]), []).append(source)
        self.groups = [_Group(members, rank, every) for members in by_shape.values()]
        device = sources[0].weight.device
        self.discarded = torch.zeros(2, dtype=torch.float64, device=device)  # last, worst share

    def update(self, tau: float) -> None:
        """Fold the online adapters in; cut when the columns are used up."""
        for group in self.groups:
            group.append(self.pending, tau)
        self.pending += 1
        if self.pending == self.every:
            last = torch.stack([group.truncate() for group in self.groups]).max()
            self.discarded = torch.stack([last, torch.maximum(last, self.discarded[1])])
            self.pending = 0

    def weights(self) -> dict[str, Tensor]:
        """Parameters of the adapters by name, wider than those they take the place of."""
        return {
            f"{source.module}.lora_{side}.default.weight": factor
            for source, u_NQ, v_QK in self._factors()
            for side, factor in (("A", v_QK), ("B", u_NQ))
        }

    def exact(self) -> Iterator[tuple[str, Tensor]]:
        """Names and W + s U V, at the width of the factors."""
        for source, u_NQ, v_QK in self._factors():
            weight = source.weight.to(u_NQ.dtype)
            yield source.name, torch.addmm(weight, u_NQ, v_QK, alpha=source.scale)

    def gap(self) -> Tensor:
        """‖online - average‖² and ‖average‖², fp64 [2]; the first from factors alone."""
        total = torch.zeros(2, dtype=torch.float64, device=self.discarded.device)
        pairs = zip(self._factors(), self.exact(), strict=True)
        for (source, u_NQ, v_QK), (_, average) in pairs:
            left = torch.cat([source.b, -u_NQ], 1)
            right = torch.cat([source.a, v_QK], 0)
            gap = _product_square(left, right) * source.scale**2
            total += torch.stack([gap, _square(average)])
        return total

    def measures(self) -> dict[str, float]:
        """What truncation costs, the worst of all modules.

        `discarded` of the last truncation and `discarded_worst` of any: norm of what was discarded
        over that of the average. `target_error`: an upper bound, over the norm of the average, of
        how far it is from the exact one.
        """
        last, worst = self.discarded.tolist()
        norm_M = torch.stack([_product_square(u, v).sqrt() for _, u, v in self._factors()])
        error = _share(self._lost(), norm_M).max().item()
        return {"discarded": last, "discarded_worst": worst, "target_error": error}

    def owns(self, name: str) -> bool:
        """Whether `state` may have that name."""
        return name.startswith("tracked.") or name.endswith((".u", ".v"))

    def state(self) -> dict[str, Tensor]:
        """`<module>.u` and `.v` without unused columns, and the counters of the truncation."""
        state = {}
        for group in self.groups:
            used = group.held_rank + self.pending * group.r
            for m, source in enumerate(group.sources):
                state[f"{source.module}.u"] = group.u_MNQ[m, :, :used]
                state[f"{source.module}.v"] = group.v_MQK[m, :used]
        state["tracked.settings"] = torch.tensor([self.rank, self.every, self.pending])
        state["tracked.discarded"] = self.discarded
        state["tracked.lost"] = self._lost()
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore `state`; unused columns are zero again."""
        settings = state.get("tracked.settings", torch.zeros(3))
        rank, every, pending = (int(n) for n in settings)
        if (rank, every) != (self.rank, self.every) or not 0 <= pending < every:
            raise ValueError(
                f"a tracked target of rank {self.rank}, truncated every {self.every} updates, "
                f"cannot hold the state of one of rank {rank}, every {every}, {pending} pending"
            )
        before, self.pending = self.pending, pending
        try:
            refuse_others(self.state(), state)
        except ValueError:
            self.pending = before
            raise
        for group in self.groups:
            group.u_MNQ.zero_()
            group.v_MQK.zero_()
        for name, value in self.state().items():
            value.copy_(state[name])
        sizes = [len(group.sources) for group in self.groups]
        for group, lost_M in zip(self.groups, state["tracked.lost"].split(sizes), strict=True):
            group.lost_M.copy_(lost_M)

    def _lost(self) -> Tensor:
        return torch.cat([group.lost_M for group in self.groups])

    def _factors(self) -> Iterator[tuple[Source, Tensor, Tensor]]:
        for group in self.groups:
            yield from zip(group.sources, group.u_MNQ, group.v_MQK, strict=True)


class _Group:
    """U and V of modules of one shape."""

    def __init__(self, sources: list[Source], rank: int, every: int) -> None:
        self.sources = sources
        n, self.r = sources[0].b.shape
        k = sources[0].a.shape[1]
        self.held_rank = held_rank(n, k, self.r, rank)
        q = self.held_rank + every * self.r
        like = {"dtype": torch.promote_types(sources[0].b.dtype, torch.float32)}
        like["device"] = sources[0].b.device
        self.u_MNQ = torch.zeros(len(sources), n, q, **like)
        self.v_MQK = torch.zeros(len(sources), q, k, **like)
        self._append(0, 0.0)
        # an upper bound of ‖U V - exact average‖: what was discarded, decaying as the average does
        self.lost_M = torch.zeros(len(sources), dtype=torch.float64, device=like["device"])

    def append(self, pending: int, tau: float) -> None:
        self._append(self.held_rank + pending * self.r, tau)
        self.lost_M *= tau

    def _append(self, start: int, tau: float) -> None:
        b, a = [s.b for s in self.sources], [s.a for s in self.sources]
        append_(self.u_MNQ, self.v_MQK, b, a, start=start, tau=tau)

    def truncate(self) -> Tensor:
        discarded_M, norm_M = truncate_(self.u_MNQ, self.v_MQK, self.held_rank)
        self.lost_M += discarded_M
        return _share(discarded_M, norm_M).max()


def held_rank(n: int, k: int, r: int, rank: int) -> int:
    """The rank that a tracked [n, k] keeps: `rank` times that of its adapter, or full rank."""
    return max(r, min(rank * r, n, k))


def refuse_others(own: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Raise unless names and shapes are the same."""
    if {n: w.shape for n, w in own.items()} != {n: w.shape for n, w in state.items()}:
        raise ValueError("the target encoder of this checkpoint has other shapes than the model")


def _move(
    average: list[Tensor],
    sources: list[Source],
    tau: float,
    low: list[Tensor] | None = None,
    update: Callable[..., None] | None = None,
) -> None:
    adapted = sources[0].b is not None
    (update or ema_update_)(
        average,
        [s.weight for s in sources],
        [s.b for s in sources] if adapted else None,
        [s.a for s in sources] if adapted else None,
        remainder=low,
        scale=[s.scale for s in sources],
        tau=tau,
    )


def _square(value: Tensor) -> Tensor:
    return value.square().sum(dtype=torch.float64)


def _product_square(u_NQ: Tensor, v_QK: Tensor) -> Tensor:
    """‖U V‖², from the Gram matrices of both."""
    u_NQ, v_QK = u_NQ.double(), v_QK.double()
    return ((u_NQ.mT @ u_NQ) * (v_QK @ v_QK.mT)).sum().clamp_min(0)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole, 0)
