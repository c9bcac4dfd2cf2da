"""The target of the rivals: a second causal LM.

Legend: see `bench.step.rivals`; R trained token rows.
"""

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from bench.step.variants import twin
from smbfast.model.backbone import PatientEncoder

COPIED = (".base_layer.", ".original_module.")  # what merging writes into


class Teacher:
    """A deep copy of the online causal LM with merged weights, averaged in fp32.

    Of one that is trained whole, all weights are averaged. Beside LoRA, so are the rows of the
    token embeddings that are trained; the head is read by no target.
    """

    @torch.no_grad()
    def __init__(self, encoder: PatientEncoder) -> None:
        self.online: list[LoraLayer | Tensor] = list(encoder.lora_layers().values())
        if encoder.is_lora:
            lm = twin(encoder.lm, share=lambda name: not any(c in name for c in COPIED))
            self.lm = lm.merge_and_unload().requires_grad_(False)
            names = encoder.lora_layers()
            self.weights = [self.lm.base_model.get_submodule(name).weight for name in names]
        else:
            self.lm = twin(encoder.lm).requires_grad_(False)
            self.online += encoder.lm.parameters()
            self.weights = list(self.lm.parameters())
        wide = self.weights[0].dtype == torch.float32
        self.masters = self.weights if wide else [w.float() for w in self.weights]
        self.rows = encoder.trained_rows()
        if self.rows:
            token, row_RD = self.rows
            self.token_R = torch.tensor(token, device=row_RD.device)
            self.row_RD = row_RD.float().clone()

    def averages(self) -> list[Tensor]:
        """What it holds."""
        return [*self.lm.parameters(), *self.masters, *([self.row_RD] if self.rows else [])]

    @torch.no_grad()
    def update(self, tau: float, *, foreach: bool) -> None:
        """W̄ <- τ W̄ + (1 - τ) (W + s B A), and the weights of the forward from it."""
        each = 7 if foreach else 1  # linears of a layer; all would be a second copy of the model
        for i in range(0, len(self.online), each):
            masters, group = self.masters[i : i + each], self.online[i : i + each]
            if foreach:
                torch._foreach_lerp_(masters, [_merged(online) for online in group], 1 - tau)
            else:
                masters[0].mul_(tau).add_(_naively_merged(group[0]), alpha=1 - tau)
        if self.masters is not self.weights:
            torch._foreach_copy_(self.weights, self.masters)
        if self.rows:
            self.row_RD.lerp_(self.rows[1].float(), 1 - tau)
            table_VD = self.lm.get_input_embeddings().weight
            table_VD.index_copy_(0, self.token_R, self.row_RD.to(table_VD.dtype))


def _merged(online: LoraLayer | Tensor) -> Tensor:
    if isinstance(online, Tensor):
        return online
    weight = online.get_base_layer().weight.float()
    b, a = online.lora_B["default"].weight, online.lora_A["default"].weight
    return torch.addmm(weight, b, a, alpha=online.scaling["default"])


def _naively_merged(online: LoraLayer | Tensor) -> Tensor:
    if isinstance(online, Tensor):
        return online
    return online.get_base_layer().weight.float() + online.get_delta_weight("default")
