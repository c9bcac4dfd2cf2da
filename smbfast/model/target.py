"""The target encoder: an EMA of the online encoder's effective weights, no gradient.

Effective means merged: W + s B A for an adapted linear, the weight itself where all is trained.
Weights that are not trained are shared with the online encoder; trained token rows are averaged;
the head, the predictor and the mask vector have no average. `smbfast.model.averages` holds the two
forms of an average of adapted linears: merged, exact but a second copy of every adapted matrix,
and tracked, of low rank over the shared base.

Legend: B rows, T positions (of a padded row, or tokens of a pack), D width, R trained token rows.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from smbkernels.attention import Segments
from torch import Tensor
from torch.func import functional_call

from smbfast.model.averages import Merged, Source, Tracked, held_rank, refuse_others
from smbfast.model.backbone import PatientEncoder, decode
from smbfast.settings import ObjectiveSettings

Form = Literal["auto", "merged", "tracked"]
ROWS = "token_rows"
NARROW = 0.2  # products that tracked columns add, as a share of those they are added to


@dataclass(frozen=True)
class TargetForm:
    """How a target averages adapted linears."""

    name: Form = "auto"
    rank: int = 4  # of a tracked target, as a multiple of the adapter's
    every: int = 4  # updates between the truncations of a tracked target

    @classmethod
    def of(cls, objective: ObjectiveSettings) -> "TargetForm":
        """As the settings have it."""
        return cls(objective.target_form, objective.tracked_rank, objective.tracked_every)

    def resolved(self, encoder: PatientEncoder) -> "TargetForm":
        """What `auto` is for this encoder: tracked with LoRA, merged for a narrow model in fp32.

        A tracked target adds its columns to the products with every adapted [N, K]: 5 % at
        Qwen3-8B, 40 % at width 512. Where that is more than `NARROW` and weights are fp32, so that
        a merged average is exact in the forward too, a second copy costs less (our choice).

        Raises:
            ValueError: tracked without LoRA.
        """
        if self.name == "tracked" and not encoder.is_lora:
            raise ValueError("a tracked target needs LoRA: a weight trained whole is merged")
        if self.name != "auto":
            return self
        return replace(self, name="merged" if self._merges(encoder) else "tracked")

    def columns(self, n: int, k: int, r: int) -> int:
        """Columns that a tracked average of an adapter [n, r] [r, k] holds."""
        return held_rank(n, k, r, self.rank) + self.every * r

    def _merges(self, encoder: PatientEncoder) -> bool:
        adapted = [s for s in _sources(encoder) if s.b is not None]
        if adapted and not all(s.weight.element_size() >= 4 for s in adapted):
            return False
        shapes = [(*s.weight.shape, s.b.shape[1]) for s in adapted]
        added = sum(self.columns(n, k, r) * (n + k) for n, k, r in shapes)
        return added >= NARROW * sum(n * k for n, k, _ in shapes)


@dataclass(frozen=True)
class JepaStates:
    """What the JEPA loss compares, and what diagnostics look at."""

    prediction_MD: Tensor
    online_MD: Tensor  # online hidden state at the masked positions
    target_MD: Tensor  # target hidden state there, before T
    previous_MD: Tensor  # target hidden state at the last visible token before each


class TargetEncoder:
    """Averages of the decoder's weights, and the forward that reads them."""

    @torch.no_grad()
    def __init__(self, encoder: PatientEncoder, form: TargetForm | None = None) -> None:
        """A target that equals the online encoder.

        Args:
            form: None is `TargetForm()`, which is resolved for this encoder.

        Raises:
            ValueError: tracked without LoRA.
        """
        form = (form or TargetForm()).resolved(encoder)
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

    @classmethod
    def of_state(cls, encoder: PatientEncoder, state: dict[str, Tensor]) -> "TargetEncoder":
        """The target encoder that a checkpoint keeps, in the form that it was kept in.

        Raises:
            ValueError: names or shapes are not those of this encoder.
        """
        settings = state.get("tracked.settings")
        if settings is None:
            target = cls(encoder, TargetForm("merged"))
        else:
            target = cls(encoder, TargetForm("tracked", int(settings[0]), int(settings[1])))
        target.load(state)
        return target

    @torch.no_grad()
    def update(self, tau: float) -> None:
        """W̄ <- τ W̄ + (1 - τ) (W + s B A); once per optimizer step, after it."""
        for part in self.parts:
            part.update(tau)
        self.updates += 1

    @torch.no_grad()
    def hidden(self, ids_BT: Tensor) -> Tensor:
        """Last hidden states after the final norm, [B, T, D], of unmasked rows."""
        encoder = self.encoder
        weights = self._weights()
        rows_nD = weights.pop(ROWS, None)
        if not encoder.is_lora:
            table = weights[_embedding_name(encoder)]
            embedded_BTD = torch.nn.functional.embedding(ids_BT, table)
        else:
            embedded_BTD = encoder.embed_packed(ids_BT, rows_nD)
        return self._lent(weights, partial(decode, encoder.decoder), embedded_BTD)

    @torch.no_grad()
    def packed(
        self, ids_T: Tensor, position_T: Tensor, segments: Segments, *, norm: bool = True
    ) -> Tensor:
        """Last hidden states [T, D] of unmasked tokens in one row, after the final norm.

        Args:
            norm: False: before it, for `final_norm`.
        """
        encoder = self.encoder
        weights = self._weights()
        rows_RD = weights.pop(ROWS, None)
        if not encoder.is_lora:
            table = weights[_embedding_name(encoder)]
            embedded_TD = torch.nn.functional.embedding(ids_T, table)
        else:
            embedded_TD = encoder.embed_packed(ids_T, rows_RD)
        run = partial(encoder.packed_decoder, position_T=position_T, segments=segments, norm=norm)
        return self._lent(weights, run, embedded_TD)

    def final_norm(self) -> tuple[Tensor, float]:
        """Weight [D] and eps of the final RMSNorm, for those rows that `packed` is needed at."""
        norm = self.encoder.decoder.norm
        own = self.encoder.is_lora  # LoRA shares the norms
        weight_D = norm.weight if own else self._weights()["norm.weight"]
        return weight_D.detach(), norm.variance_epsilon

    @torch.no_grad()
    def measures(self) -> dict[str, float]:
        """`distance`, ‖online - target‖ / ‖target‖ over the weights that are averaged; of a
        tracked target also what its truncations cost."""
        gap, norm = torch.stack([part.gap() for part in self.parts]).sum(0).tolist()
        measures = {"distance": (gap / max(norm, 1e-30)) ** 0.5}
        for part in self.parts:
            measures |= part.measures()
        return measures

    @torch.no_grad()
    def exact(self) -> dict[str, Tensor]:
        """The averaged effective weights by name under the decoder, at full width."""
        return {n: w for part in self.parts for n, w in part.exact()}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {n: w for part in self.parts for n, w in part.state().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore `state`; names and shapes must be those of this encoder.

        Raises:
            ValueError: they are not.
        """
        shares = [{n: w for n, w in state.items() if part.owns(n)} for part in self.parts]
        refuse_others({}, {n: w for n, w in state.items() if not any(n in s for s in shares)})
        for part, share in zip(self.parts, shares, strict=True):
            part.load(share)

    def _weights(self) -> dict[str, Tensor]:
        return {n: w for part in self.parts for n, w in part.weights().items()}

    def _lent(
        self, weights: dict[str, Tensor], run: Callable[[Tensor], Tensor], embedded: Tensor
    ) -> Tensor:
        """`run` on a decoder whose parameters are the averages."""
        encoder = self.encoder
        inside = encoder.is_lora and self.form == "merged"  # the averages hold the adapters
        with encoder.lm.disable_adapter() if inside else nullcontext():
            named = {f"decoder.{n}": w for n, w in weights.items()}
            return functional_call(_Decoder(encoder.decoder, run), named, embedded)


class _Decoder(torch.nn.Module):
    """A decoder as a module whose input is its embeddings."""

    def __init__(self, decoder: torch.nn.Module, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.decoder, self.run = decoder, run

    def forward(self, embedded: Tensor) -> Tensor:
        return self.run(embedded)


def target_bytes(encoder: PatientEncoder, form: TargetForm) -> int:
    """Memory of the averages that such a target would hold."""
    total, tracked = 0, form.resolved(encoder).name == "tracked"
    for source in _sources(encoder):
        weight = source.weight
        if source.b is not None and tracked:
            (n, r), k = source.b.shape, source.a.shape[1]
            total += 4 * (n + k) * form.columns(n, k, r)
        else:
            total += max(4, weight.element_size()) * weight.numel()
    return total


def _sources(encoder: PatientEncoder) -> list[Source]:
    """Every weight that is averaged; the trained token rows last."""
    if not encoder.is_lora:
        trained = encoder.decoder.named_parameters()
        return [Source(n, p) for n, p in trained if p.requires_grad]
    sources = [
        Source(
            f"{name}.base_layer.weight",
            layer.get_base_layer().weight,
            layer.lora_B["default"].weight,
            layer.lora_A["default"].weight,
            layer.scaling["default"],
        )
        for name, layer in encoder.lora_layers().items()
    ]
    rows = encoder.trained_rows()
    return [*sources, Source(ROWS, rows[1])] if rows else sources


def _embedding_name(encoder: PatientEncoder) -> str:
    table = encoder.base.get_input_embeddings().weight
    return next(n for n, p in encoder.decoder.named_parameters() if p is table)
