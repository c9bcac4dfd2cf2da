"""The target of the rivals: a second causal LM.

Legend: see `bench.step.rivals`.
"""

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from bench.step.variants import twin
from smbfast.model.backbone import PatientEncoder


class Teacher:
    """A deep copy of the online causal LM with merged weights, averaged in fp32."""

    @torch.no_grad()
    def __init__(self, encoder: PatientEncoder) -> None:
        lm = twin(encoder.lm, share=lambda name: ".base_layer." not in name)
        self.lm = lm.merge_and_unload().requires_grad_(False)
        names = encoder.lora_layers()
        self.weights = [self.lm.base_model.get_submodule(name).weight for name in names]
        wide = self.weights[0].dtype == torch.float32
        self.masters = self.weights if wide else [w.float() for w in self.weights]

    @torch.no_grad()
    def update(self, layers: list[LoraLayer], tau: float, *, foreach: bool) -> None:
        """W̄ <- τ W̄ + (1 - τ) (W + s B A), and the weights of the forward from it."""
        each = 7 if foreach else 1  # linears of a layer; all would be a second copy of the model
        for i in range(0, len(layers), each):
            masters, group = self.masters[i : i + each], layers[i : i + each]
            if foreach:
                torch._foreach_lerp_(masters, [_merged(layer) for layer in group], 1 - tau)
            else:
                masters[0].mul_(tau).add_(_naively_merged(group[0]), alpha=1 - tau)
        if self.masters is not self.weights:
            torch._foreach_copy_(self.weights, self.masters)


def _merged(layer: LoraLayer) -> Tensor:
    weight = layer.get_base_layer().weight.float()
    b, a = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    return torch.addmm(weight, b, a, alpha=layer.scaling["default"])


def _naively_merged(layer: LoraLayer) -> Tensor:
    return layer.get_base_layer().weight.float() + layer.get_delta_weight("default")
