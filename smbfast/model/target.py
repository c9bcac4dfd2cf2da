"""The target encoder (EMA teacher, momentum encoder): an average of the online encoder's weights.

It averages effective weights, without gradients: W + s B A for a linear with a LoRA adapter, the
weight itself where all is trained. Weights that are not trained are shared with the online encoder.
Trained token rows are averaged; the head, the predictor and the mask vector have no average.
`smbfast.model.averages` has two forms for adapted linears: merged, which is exact but a second copy
of each adapted matrix, and tracked, which is of low rank beside the shared base.

Legend: B padded sequences, T positions (of a padded sequence, or tokens of a pack), D width,
R trained token rows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from smbkernels.attention import Segments
from torch import Tensor

from smbfast.model.averages import Merged, Source, Tracked, held_rank, refuse_others
from smbfast.model.backbone import PatientEncoder, decode
from smbfast.model.decoder import Each, HfModule
from smbfast.model.horizon_scale import HorizonScale
from smbfast.settings import ObjectiveSettings

Form = Literal["auto", "merged", "tracked"]
Slot = tuple[torch.nn.Module, str]  # a module that holds a parameter, and its name there
ROWS = "token_rows"
SCALE = "horizon_scale."  # before the names of its tensors
_COUNTERS = 3 * 8 + 2 * 8  # bytes: the settings and the discarded norms of a tracked target
NARROW = 0.2  # largest share of FLOPs that tracked columns may add to a forward: our choice
# columns that updates of a tracked average may add in any case; else as many as its weight has, and
# those of one update always: our choice
_COLUMNS = 1 << 14


@dataclass(frozen=True)
class TargetForm:
    """How a target encoder averages adapted linears."""

    name: Form = "auto"
    rank: int = 4  # of a tracked target, as a multiple of the adapter's
    every: int = 4  # updates between two truncations of a tracked target

    @classmethod
    def of(cls, objective: ObjectiveSettings) -> "TargetForm":
        """Read the form from the settings."""
        return cls(objective.target_form, objective.tracked_rank, objective.tracked_every)

    def resolved(self, encoder: PatientEncoder) -> "TargetForm":
        """Return this form with `auto` decided: tracked with LoRA, merged for a narrow fp32 model.

        The columns of a tracked target add FLOPs to every adapted product [N, K]: 5 % for Qwen3-8B,
        40 % at width 512. Where they add more than `NARROW` and weights are fp32, so that a merged
        average is exact in the forward as well, a second copy of the weights costs less than that
        (our choice).

        Raises:
            ValueError: if the form is tracked, and the encoder has no LoRA adapter, or no average
                can have its rank or its columns.
        """
        if self.name == "tracked" and not encoder.is_lora:
            raise ValueError(
                "a tracked target needs LoRA; without it, objective.target_form must be merged"
            )
        form = self
        if self.name == "auto":
            merges = not encoder.is_shared_out and self._merges(encoder)
            form = replace(self, name="merged" if merges else "tracked")
        if form.name == "tracked":
            form._require_columns(encoder)
        return form

    def columns(self, n: int, k: int, r: int) -> int:
        """Return the number of columns that the average of an adapter [n, r] [r, k] has."""
        return held_rank(n, k, r, self.rank) + self.every * r

    def _require_columns(self, encoder: PatientEncoder) -> None:
        for n, k, r in _shapes(_adapted(encoder)):
            most = max(max(n, k, _COLUMNS) // r, 1)
            if not 1 <= self.every <= most or self.rank < 1:
                raise ValueError(
                    "objective.tracked_rank must be 1 or more, and objective.tracked_every 1 to "
                    f"{most} with an adapter of rank {r}, got {self.rank} and {self.every}"
                )

    def _merges(self, encoder: PatientEncoder) -> bool:
        adapted = _adapted(encoder)
        if adapted and not all(s.weight.element_size() >= 4 for s in adapted):
            return False
        shapes = _shapes(adapted)
        added = sum(self.columns(n, k, r) * (n + k) for n, k, r in shapes)
        return added >= NARROW * sum(n * k for n, k, _ in shapes)


@dataclass(frozen=True)
class HorizonStates:
    """What horizon JEPA compares and diagnostics read, at Q pairs of a position and a horizon."""

    prediction_QD: Tensor
    target_QD: Tensor  # the target's mean state within the horizon, standardised
    at_QD: Tensor  # the target's state at the position itself
    horizon_Q: Tensor  # int64: number of the horizon


@dataclass(frozen=True)
class JepaStates:
    """The states that the JEPA loss compares and that diagnostics read, at the masked tokens."""

    prediction_MD: Tensor
    online_MD: Tensor  # online hidden state, before the predictor
    target_MD: Tensor  # target hidden state, before the layer norm of the loss
    previous_MD: Tensor  # target hidden state of the last unmasked token before each


class TargetEncoder:
    """The averages of the decoder's weights, and the forward that uses them."""

    @torch.no_grad()
    def __init__(self, encoder: PatientEncoder, form: TargetForm | None = None) -> None:
        """Start at the weights of the online encoder.

        Args:
            form: resolved for this encoder; None for `TargetForm()`.

        Raises:
            ValueError: if the form is tracked and the encoder has no LoRA adapter, or merged and
                ranks share the base.
        """
        form = (form or TargetForm()).resolved(encoder)
        if form.name == "merged" and encoder.is_shared_out:
            raise ValueError(
                "a merged target would hold a second copy of every adapted weight, which "
                "model.fsdp shares out; objective.target_form must be tracked with it"
            )
        self.encoder = encoder
        self.form = form.name
        self.updates = 0
        self.parts: list[Merged | Tracked] = []
        by_kind: dict[tuple, list[Source]] = {}
        for source in _sources(encoder):
            tracked = source.b is not None and self.form == "tracked"
            kind = (tracked, source.b is not None, None if tracked else source.weight.dtype)
            by_kind.setdefault(kind, []).append(source)
        for (tracked, *_), sources in by_kind.items():
            self.parts.append(
                Tracked(sources, form.rank, form.every) if tracked else Merged(sources)
            )
        self.scale: HorizonScale | None = None  # of horizon JEPA
        if encoder.num_horizons:
            device = encoder.mask_vector.device
            self.scale = HorizonScale(encoder.num_horizons, encoder.width, device)
        self._slots: dict[str, list[Slot]] = {}
        # what a forward reads, by name; until the next update
        self._read: dict[str, Tensor] | None = None

    @classmethod
    def of_state(cls, encoder: PatientEncoder, state: dict[str, Tensor]) -> "TargetEncoder":
        """Restore a target encoder from a checkpoint's tensors, in the form they were saved in.

        Raises:
            ValueError: if names or shapes are not those of this encoder, or a tracked average was
                saved with settings that none can have.
        """
        settings = state.get("tracked.settings")
        if settings is None:
            target = cls(encoder, TargetForm("merged"))
        else:
            numbers = settings.flatten().tolist()
            if len(numbers) != 3 or not all(isinstance(n, int) for n in numbers):
                raise ValueError("the rank of a tracked target must be a whole number; it is not")
            target = cls(encoder, TargetForm("tracked", *numbers[:2]))
        target.load(state)
        return target

    @torch.no_grad()
    def update(self, tau: float) -> None:
        """Set W̄ to τ W̄ + (1 - τ) (W + s B A); call it once after each optimizer step."""
        for part in self.parts:
            part.update(tau)
        self.updates += 1
        self._read = None

    @torch.no_grad()
    def hidden(self, ids_BT: Tensor, *, each: Each | None = None) -> Tensor:
        """Return hidden states after the final norm, [B, T, D], of unmasked padded sequences.

        Args:
            each: called with the states of every layer; see `smbfast.model.backbone.decode`.
        """
        return self._run(partial(decode, self.encoder.decoder, each=each), ids_BT)

    @torch.no_grad()
    def packed(
        self,
        ids_T: Tensor,
        position_T: Tensor,
        segments: Segments,
        *,
        rows: Tensor | None = None,
        norm: bool = True,
        each: Each | None = None,
    ) -> Tensor:
        """Return hidden states [T, D] of a pack of unmasked trunks.

        Args:
            rows: those of T whose states are wanted, int64; None for all.
            norm: whether to apply the final norm; if not, apply `final_norm` where it is needed.
            each: called with the states of every layer, see `smbfast.model.decoder.PackedDecoder`.
        """
        pack = partial(self.encoder.packed_decoder, position_T=position_T, segments=segments)
        return self._run(partial(pack, norm=norm, rows_R=rows, each=each), ids_T)

    def final_norm(self) -> tuple[Tensor, float]:
        """Return weight [D] and eps of the final RMSNorm, to normalize single rows of `packed`."""
        norm = self.encoder.decoder.norm
        is_shared = self.encoder.is_lora  # LoRA does not train the norms
        weight_D = norm.weight if is_shared else self._weights()["norm.weight"]
        return weight_D.detach(), norm.variance_epsilon

    @torch.no_grad()
    def measures(self) -> dict[str, float]:
        """Return `distance`, which is ‖online - target‖ / ‖target‖ over all averaged weights.

        A tracked target adds what its truncations cost (`smbfast.model.averages.Tracked`).
        """
        gap, norm = torch.stack([part.gap() for part in self.parts]).sum(0).tolist()
        measures = {"distance": (gap / max(norm, 1e-30)) ** 0.5}
        for part in self.parts:
            measures |= part.measures()
        return measures

    @torch.no_grad()
    def exact(self) -> dict[str, Tensor]:
        """Return the averaged effective weights in full precision by their name in the decoder."""
        return {n: w for part in self.parts for n, w in part.exact()}

    def state(self) -> dict[str, Tensor]:
        """Return the tensors to save in a checkpoint."""
        scale = self.scale.state() if self.scale else {}
        return {n: w for part in self.parts for n, w in part.state().items()} | {
            f"{SCALE}{n}": w for n, w in scale.items()
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore the result of `state`.

        Raises:
            ValueError: if names or shapes are not those of this encoder.
        """
        self._read = None
        scale = {n.removeprefix(SCALE): w for n, w in state.items() if n.startswith(SCALE)}
        state = {n: w for n, w in state.items() if not n.startswith(SCALE)}
        if (self.scale is None) != (not scale):
            raise ValueError("the target must have the scale of horizon JEPA if the encoder has it")
        if self.scale:
            self.scale.load(scale)
        shares = [{n: w for n, w in state.items() if part.owns(n)} for part in self.parts]
        refuse_others({}, {n: w for n, w in state.items() if not any(n in s for s in shares)})
        for part, share in zip(self.parts, shares, strict=True):
            part.load(share)

    def _weights(self) -> dict[str, Tensor]:
        if self._read is None:
            read = {n: w for part in self.parts for n, w in part.weights().items()}
            compute = self.encoder.compute
            self._read = read if compute is None else {n: w.to(compute) for n, w in read.items()}
        return self._read

    def _run(self, run: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
        """Call `run` on embeddings while the averages stand in for the decoder's parameters."""
        encoder = self.encoder
        lm: HfModule = encoder.lm
        weights = self._weights()
        if encoder.is_lora:
            embedded = encoder.embed_packed(ids, weights.get(ROWS))
        else:
            embedded = torch.nn.functional.embedding(ids, weights[_embedding_name(encoder)])
        merged = encoder.is_lora and self.form == "merged"  # the averages include the adapters
        with lm.disable_adapter() if merged else nullcontext(), self._lent(weights):
            return run(embedded)

    @contextmanager
    def _lent(self, weights: dict[str, Tensor]) -> Iterator[None]:
        """Put `weights` where the decoder's modules hold parameters, and these back at the end.

        As `torch.func.functional_call` does, which looks for all names in every call: for the 504
        adapters of 36 layers that took 12 ms of the host, and this 0.14 ms.
        """
        if not self._slots:
            self._slots = _slots(self.encoder.decoder, [n for n in weights if n != ROWS])
        places = [(m._parameters, key, n) for n, slots in self._slots.items() for m, key in slots]
        before = [parameters[key] for parameters, key, _ in places]
        lend: dict[str, HfModule] = weights  # a module is meant to hold parameters, not tensors
        try:
            for parameters, key, name in places:
                parameters[key] = lend[name]
            yield
        finally:
            for (parameters, key, _), own in zip(places, before, strict=True):
                parameters[key] = own


def _slots(decoder: HfModule, names: list[str]) -> dict[str, list[Slot]]:
    """Return where the modules hold the parameters of these names, every place of a shared one."""
    held: dict[int, list[Slot]] = {}
    for module in decoder.modules():
        for key, parameter in module._parameters.items():
            held.setdefault(id(parameter), []).append((module, key))
    return {n: held[id(decoder.get_parameter(n))] for n in names}


def target_bytes(encoder: PatientEncoder, form: TargetForm) -> int:
    """Return the bytes that the averages of a target of this form take, and copies to compute."""
    total, tracked = 0, form.resolved(encoder).name == "tracked"
    for source in _sources(encoder):
        weight = source.weight
        if source.b is not None and tracked:
            b, a = source.factors
            (n, r), k = b.shape, a.shape[1]
            total += 4 * (n + k) * form.columns(n, k, r)
        else:
            copied = 0 if encoder.compute is None else encoder.compute.itemsize
            total += (max(4, weight.element_size()) + copied) * weight.numel()
    return total


def state_bytes(encoder: PatientEncoder, form: TargetForm) -> int:
    """Return the most bytes that `TargetEncoder.state` has, at any step, of a target of a form."""
    tracked = form.resolved(encoder).name == "tracked"
    total = _COUNTERS + 8 * encoder.num_horizons * (1 + 2 * encoder.width)
    for source in _sources(encoder):
        if source.b is not None and tracked:
            b, a = source.factors
            (n, r), k = b.shape, a.shape[1]
            # full columns are truncated before a step ends; fp64 says what a module has lost
            total += 4 * (n + k) * (form.columns(n, k, r) - r) + 8
        else:
            total += max(4, source.weight.element_size()) * source.weight.numel()
    return total


def _sources(encoder: PatientEncoder) -> list[Source]:
    """List every weight that is averaged, the trained token rows last."""
    if not encoder.is_lora:
        trained = encoder.decoder.named_parameters()
        return [Source(n, p) for n, p in trained if p.requires_grad]
    layers: dict[str, HfModule] = dict(encoder.lora_layers())
    sources = [
        Source(
            f"{name}.base_layer.weight",
            layer.get_base_layer().weight,
            layer.lora_B["default"].weight,
            layer.lora_A["default"].weight,
            layer.scaling["default"],
        )
        for name, layer in layers.items()
    ]
    rows = encoder.trained_rows()
    return [*sources, Source(ROWS, rows[1])] if rows else sources


def _adapted(encoder: PatientEncoder) -> list[Source]:
    return [s for s in _sources(encoder) if s.b is not None]


def _shapes(adapted: list[Source]) -> list[tuple[int, int, int]]:
    """Return [n, k, r] of each weight [n, k] with an adapter of rank r."""
    factors = (s.factors for s in adapted)
    return [(b.shape[0], a.shape[1], b.shape[1]) for b, a in factors]


def _embedding_name(encoder: PatientEncoder) -> str:
    table = encoder.base.get_input_embeddings().weight
    return next(n for n, p in encoder.decoder.named_parameters() if p is table)
