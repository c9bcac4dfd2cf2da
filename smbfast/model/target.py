"""The target encoder: an exact fp32 EMA of the online encoder's effective weights, no gradient.

Effective means merged: W + s B A for an adapted linear, the weight itself where all is trained.
Weights that are not trained are shared with the online encoder; trained token rows are averaged;
the head, the predictor and the mask vector have no average.

Legend: B rows, T positions, D width.
"""

import torch
from smbkernels import ema_update_
from torch import Tensor
from torch.func import functional_call

from smbfast.model.backbone import PatientEncoder, decode


class TargetEncoder:
    """`average` by name under the trunk, in fp32 (fp64 for a model in fp64)."""

    def __init__(self, encoder: PatientEncoder) -> None:
        """A target that equals the online encoder."""
        self.encoder = encoder
        self.average: dict[str, Tensor] = {}
        self.updates = 0
        for name, weight, b, a, scale in self._effective():
            average = torch.empty_like(weight, dtype=_wide(weight.dtype))
            self.average[name] = _move(average.copy_(weight), weight, b, a, scale, 0)

    @torch.no_grad()
    def update(self, tau: float) -> None:
        """W̄ <- τ W̄ + (1 - τ) (W + s B A); once per optimizer step, after it."""
        for name, weight, b, a, scale in self._effective():
            _move(self.average[name], weight, b, a, scale, tau)
        self.updates += 1

    @torch.no_grad()
    def hidden(self, ids_BT: Tensor) -> Tensor:
        """Last hidden states after the final norm, [B, T, D], of unmasked rows."""
        encoder = self.encoder
        weights = {
            n: w.to(encoder.trunk.get_parameter(n).dtype) for n, w in self.average.items() if n
        }
        if not encoder.is_lora:
            table = weights[_embedding_name(encoder)]
            embedded_BTD = torch.nn.functional.embedding(ids_BT, table)
            return functional_call(
                encoder.trunk, weights, kwargs={"inputs_embeds": embedded_BTD, "use_cache": False}
            ).last_hidden_state
        with encoder.lm.disable_adapter():
            embedded_BTD = self._embed(ids_BT)
            return functional_call(
                _Decoder(encoder.trunk), {f"trunk.{n}": w for n, w in weights.items()}, embedded_BTD
            )

    @torch.no_grad()
    def distance(self) -> float:
        """‖online - target‖ / ‖target‖ over the effective weights that are averaged."""
        gap = norm = 0.0
        for name, weight, b, a, scale in self._effective():
            average = self.average[name]
            online = _move(average.clone(), weight, b, a, scale, 0)
            gap += (online - average).square().sum().item()
            norm += average.square().sum().item()
        return (gap / max(norm, 1e-30)) ** 0.5

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {(n or "token_rows"): w for n, w in self.average.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore `state`; names and shapes must be those of this encoder.

        Raises:
            ValueError: they are not.
        """
        own = self.state()
        if {n: w.shape for n, w in own.items()} != {n: w.shape for n, w in state.items()}:
            raise ValueError(
                "the target encoder of this checkpoint has other shapes than the model"
            )
        for name, weight in own.items():
            weight.copy_(state[name])

    def _effective(self) -> list[tuple[str, Tensor, Tensor | None, Tensor | None, float]]:
        """(name, W, B, A, s) of every averaged weight; "" names the trained token rows."""
        encoder = self.encoder
        if not encoder.is_lora:
            trained = encoder.trunk.named_parameters()
            return [(n, p.detach(), None, None, 1.0) for n, p in trained if p.requires_grad]
        weights = []
        for name, layer in encoder.lora_layers().items():
            b = layer.lora_B["default"].weight.detach()
            a = layer.lora_A["default"].weight.detach()
            weight = layer.get_base_layer().weight.detach()
            weights.append((f"{name}.base_layer.weight", weight, b, a, layer.scaling["default"]))
        rows = encoder.trained_rows()
        if rows:
            weights.append(("", rows[1].detach(), None, None, 1.0))
        return weights

    def _embed(self, ids_BT: Tensor) -> Tensor:
        rows = self.encoder.trained_rows()
        embedded_BTD = self.encoder.base.get_input_embeddings()(ids_BT)
        if rows is None:
            return embedded_BTD
        tokens = torch.tensor(rows[0], device=ids_BT.device)
        match = ids_BT[..., None] == tokens
        chosen = self.average[""][match.int().argmax(-1)].to(embedded_BTD.dtype)
        return torch.where(match.any(-1)[..., None], chosen, embedded_BTD)


class _Decoder(torch.nn.Module):
    """A trunk as a module whose input is its embeddings."""

    def __init__(self, trunk: torch.nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, embedded_BTD: Tensor) -> Tensor:
        return decode(self.trunk, embedded_BTD)


def _embedding_name(encoder: PatientEncoder) -> str:
    table = encoder.base.get_input_embeddings().weight
    return next(n for n, p in encoder.trunk.named_parameters() if p is table)


def _move(
    average: Tensor, weight: Tensor, b: Tensor | None, a: Tensor | None, scale: float, tau: float
) -> Tensor:
    pair = ([b], [a]) if b is not None and a is not None else (None, None)
    ema_update_([average], [weight], *pair, scale=[scale], tau=tau)
    return average


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
