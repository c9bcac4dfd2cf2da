"""The two forms of the EMA teacher's averages of effective weights W + s B A.

`Merged` stores each averaged matrix. `Tracked` stores the average of B A alone, as a low-rank
product beside the shared W. Both move towards the online weights, provide the parameters that
replace the decoder's in a forward, and measure the distance to the online weights.

Legend: M modules of one shape, N output features, K input features, Q columns stored.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from smbkernels import ema_update_
from smbkernels.ema import join, split
from smbkernels.tracked_ema import append_, truncate_
from torch import Tensor

from smbfast.model.sharding import gathered


@dataclass(frozen=True)
class Source:
    """An online weight W by its name in the decoder, with its LoRA adapter if any: W + s B A.

    It refers to the parameters themselves, not to their data, which moving a model replaces.
    """

    name: str
    weight: Tensor
    b: Tensor | None = None
    a: Tensor | None = None
    scale: float = 1.0

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """B [N, r] and A [r, K] of an adapted weight."""
        assert self.b is not None and self.a is not None
        return self.b, self.a

    @property
    def module(self) -> str:
        """The name of the adapted linear."""
        return self.name.removesuffix(".base_layer.weight")


class Merged:
    """Averages of W + s B A, or of W where there is no adapter; fp32 (fp64 for fp64 weights).

    For bf16 weights, an average is a bf16 high half, which a forward reads directly, and an int16
    remainder. Together they are the bits of the fp32 average.
    """

    def __init__(self, sources: list[Source]) -> None:
        """Start at the online weights. All have an adapter or none has; all are of one dtype."""
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
        """Move all averages towards the online weights, with EMA decay `tau`, in one call."""
        _move(self._average, self.sources, tau, self._low)

    def weights(self) -> dict[str, Tensor]:
        """Return the averages by the names of the decoder's parameters, in their dtype."""
        pairs = zip(self.sources, self._average, strict=True)
        return {s.name: w.to(s.weight.dtype) for s, w in pairs}

    def exact(self) -> Iterator[tuple[str, Tensor]]:
        """Yield names and averages in full precision; only split ones are copied."""
        for i, source in enumerate(self.sources):
            full = self._average[i]
            yield source.name, full if self._low is None else join(full, self._low[i])

    def gap(self) -> Tensor:
        """Return ‖online - average‖² and ‖average‖², fp64 [2]."""
        total = torch.zeros(2, dtype=torch.float64, device=self._average[0].device)
        for source, (_, average) in zip(self.sources, self.exact(), strict=True):
            online = average.clone()
            # the chosen kernel would plan its launches again for each of these copies
            _move([online], [source], 0.0, update=ema_update_.reference)
            total += torch.stack([_square(online - average), _square(average)])
        return total

    def measures(self) -> dict[str, float]:
        """Return nothing: this average is exact."""
        return {}

    def owns(self, name: str) -> bool:
        """Whether `name` is one of the names in `state` for these weights."""
        return name.removesuffix(".remainder") in {s.name for s in self.sources}

    def state(self) -> dict[str, Tensor]:
        """Return the averages by name; a split one as its high half and `<name>.remainder`."""
        pairs = zip(self.sources, self._average, strict=True)
        state = {s.name: w for s, w in pairs}
        if self._low is not None:
            named = zip(self.sources, self._low, strict=True)
            state |= {f"{s.name}.remainder": low for s, low in named}
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore the result of `state`, or fp32 averages of bf16 weights.

        Raises:
            ValueError: if names or shapes are not those of these weights.
        """
        if self._split and not any(n.endswith(".remainder") for n in state):
            halves = {n: split(full.float()) for n, full in state.items()}
            low = {f"{n}.remainder": low for n, (_, low) in halves.items()}
            state = {n: high for n, (high, _) in halves.items()} | low
        own = self.state()
        refuse_others(own, state)
        for name, value in own.items():
            value.copy_(state[name])


class Tracked:
    """The average of B A as a low-rank product U V beside the shared W.

    U V starts as B A. Each update appends (1 - τ) B A to τ U V, and every `every` updates the
    product is truncated to at most `rank` times the rank of the adapter. U and V are fp32 (fp64 for
    fp64 adapters); the truncation is computed in fp64. The scale s never changes; the adapter
    applies it. Modules of one shape are stored and updated together.

    A forward uses U and V in place of B and A, with the same W as the online encoder. For Qwen3-8B
    and r = 16, their Q = 128 columns add 5 % to the FLOPs of the products with W.
    """

    def __init__(self, sources: list[Source], rank: int, every: int) -> None:
        """Start at the online adapters.

        Args:
            sources: weights that all have an adapter.
            rank: the rank after a truncation, as a multiple of the adapter's.
            every: updates between two truncations.
        """
        self.rank, self.every, self.pending = rank, every, 0
        by_shape: dict[tuple, list[Source]] = {}
        for source in sources:
            by_shape.setdefault((*source.weight.shape, source.factors[0].shape[1]), []).append(
                source
            )
        self.groups = [_Group(members, rank, every) for members in by_shape.values()]
        device = sources[0].weight.device
        # discarded norm over the norm of the average: of the last truncation, and the worst of all
        self.discarded = torch.zeros(2, dtype=torch.float64, device=device)

    def update(self, tau: float) -> None:
        """Add the online adapters with EMA decay `tau`; truncate when the columns are full."""
        for group in self.groups:
            group.append(self.pending, tau)
        self.pending += 1
        if self.pending == self.every:
            last = torch.stack([group.truncate() for group in self.groups]).max()
            self.discarded = torch.stack([last, torch.maximum(last, self.discarded[1])])
            self.pending = 0

    def weights(self) -> dict[str, Tensor]:
        """Return U and V by the names of the adapters' parameters, which have fewer columns."""
        return {
            f"{source.module}.lora_{side}.default.weight": factor
            for source, u_NQ, v_QK in self._factors()
            for side, factor in (("A", v_QK), ("B", u_NQ))
        }

    def exact(self) -> Iterator[tuple[str, Tensor]]:
        """Yield names and W + s U V, in the dtype of the factors."""
        for source, u_NQ, v_QK in self._factors():
            weight = gathered(source.weight).to(u_NQ.dtype)
            yield source.name, torch.addmm(weight, u_NQ, v_QK, alpha=source.scale)

    def gap(self) -> Tensor:
        """Return ‖online - average‖², computed from the factors, and ‖average‖²: fp64 [2]."""
        total = torch.zeros(2, dtype=torch.float64, device=self.discarded.device)
        pairs = zip(self._factors(), self.exact(), strict=True)
        for (source, u_NQ, v_QK), (_, average) in pairs:
            b, a = source.factors
            left = torch.cat([b, -u_NQ], 1)
            right = torch.cat([a, v_QK], 0)
            gap = _product_square(left, right) * source.scale**2
            total += torch.stack([gap, _square(average)])
        return total

    def measures(self) -> dict[str, float]:
        """Return what truncation costs, each as the worst value over all modules.

        `discarded` (last truncation) and `discarded_worst` (all truncations): the norm of what was
        discarded over the norm of the average. `target_error`: an upper bound of the distance to
        the exact average, over the norm of the average.
        """
        last, worst = self.discarded.tolist()
        norm_M = torch.stack([_product_square(u, v).sqrt() for _, u, v in self._factors()])
        error = _share(self._lost(), norm_M).max().item()
        return {"discarded": last, "discarded_worst": worst, "target_error": error}

    def owns(self, name: str) -> bool:
        """Whether `name` may be one of the names in `state`."""
        return name.startswith("tracked.") or name.endswith((".u", ".v"))

    def state(self) -> dict[str, Tensor]:
        """Return `<module>.u` and `.v` without unused columns, and the truncation's counters."""
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
        """Restore the result of `state`.

        Raises:
            ValueError: if names, shapes, rank or interval are not those of this average.
        """
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
    """U and V of modules of one shape, stacked."""

    def __init__(self, sources: list[Source], rank: int, every: int) -> None:
        self.sources = sources
        b, a = sources[0].factors
        n, self.r = b.shape
        k = a.shape[1]
        self.held_rank = held_rank(n, k, self.r, rank)
        q = self.held_rank + every * self.r
        dtype = torch.promote_types(b.dtype, torch.float32)
        self.u_MNQ = torch.zeros(len(sources), n, q, dtype=dtype, device=b.device)
        self.v_MQK = torch.zeros(len(sources), q, k, dtype=dtype, device=b.device)
        self._append(0, 0.0)
        # upper bound of ‖U V - exact average‖: the discarded norms, which decay as the average does
        self.lost_M = torch.zeros(len(sources), dtype=torch.float64, device=b.device)

    def append(self, pending: int, tau: float) -> None:
        self._append(self.held_rank + pending * self.r, tau)
        self.lost_M *= tau

    def _append(self, start: int, tau: float) -> None:
        b, a = map(list, zip(*(s.factors for s in self.sources), strict=True))
        append_(self.u_MNQ, self.v_MQK, b, a, start=start, tau=tau)

    def truncate(self) -> Tensor:
        discarded_M, norm_M = truncate_(self.u_MNQ, self.v_MQK, self.held_rank)
        self.lost_M += discarded_M
        return _share(discarded_M, norm_M).max()


def held_rank(n: int, k: int, r: int, rank: int) -> int:
    """Return the rank of a truncated [n, k] average: `rank` times the adapter's, or full rank."""
    return max(r, min(rank * r, n, k))


def refuse_others(own: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Raise a ValueError unless names and shapes are the same."""
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
        [s.factors[0] for s in sources] if adapted else None,
        [s.factors[1] for s in sources] if adapted else None,
        remainder=low,
        scale=[s.scale for s in sources],
        tau=tau,
    )


def _square(value: Tensor) -> Tensor:
    return value.square().sum(dtype=torch.float64)


def _product_square(u_NQ: Tensor, v_QK: Tensor) -> Tensor:
    """Return ‖U V‖², fp64, from the Gram matrices of both factors."""
    u_NQ, v_QK = u_NQ.double(), v_QK.double()
    return ((u_NQ.mT @ u_NQ) * (v_QK @ v_QK.mT)).sum().clamp_min(0)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole, 0)
