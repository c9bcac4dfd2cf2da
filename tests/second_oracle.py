"""The objective and its target once more, from transformers and PEFT alone, one patient at a time.

Shares no line with `smbfast.objective`, `smbfast.reference` or `smbfast.model.target`: logits and
hidden states are those of the language model called as anyone would call it, the target is a deep
copy whose merged weights are averaged in fp64, and AdamW and clipping are written out. What is
given is what was drawn: the windows, their cuts and the masked positions.
"""

import copy
from dataclasses import dataclass, field

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn


@dataclass(frozen=True)
class Patient:
    """A window, the tokens of it that are labels, and its cuts with their masked positions."""

    ids: np.ndarray
    labelled: np.ndarray  # positions whose token is predicted from the one before
    # end of the future, positions that are predicted, and all that read the mask vector
    cuts: list[tuple[int, np.ndarray, np.ndarray]] = field(default_factory=list)


def hidden_states(lm: nn.Module, **inputs: Tensor) -> Tensor:
    """[T, D] after the final norm."""
    return lm(**inputs, output_hidden_states=True, use_cache=False).hidden_states[-1][0]


def predictor(layers: list[nn.Linear], value: Tensor) -> Tensor:
    """Linear, GELU, ..., Linear, by hand."""
    for layer in layers[:-1]:
        value = value @ layer.weight.T + layer.bias
        value = 0.5 * value * (1 + torch.erf(value / 2**0.5))
    return value @ layers[-1].weight.T + layers[-1].bias


class Oracle:
    """Online language model, predictor, mask vector, and a copied teacher."""

    def __init__(self, lm: nn.Module, layers: list[nn.Linear], mask_vector: nn.Parameter) -> None:
        self.lm, self.layers, self.mask_vector = lm, layers, mask_vector
        self.teacher = self.merged()

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """A copy of the language model with its adapters inside its weights, in fp64."""
        lm = copy.deepcopy(self.lm)
        lm = lm.merge_and_unload() if isinstance(lm, PeftModel) else lm
        return lm.double().requires_grad_(False)

    @torch.no_grad()
    def average(self, tau: float) -> None:
        """Teacher <- tau teacher + (1 - tau) online, weight by weight."""
        online = dict(self.merged().named_parameters())
        for name, weight in self.teacher.named_parameters():
            weight.copy_(tau * weight + (1 - tau) * online[name])

    def loss(self, patients: list[Patient], w_sft: float, w_jepa: float, norm: bool) -> Tensor:
        """Both losses, means over all labels and all masked positions of the patients."""
        sft = jepa = torch.zeros((), dtype=torch.float64)
        for patient in patients:
            ids = torch.from_numpy(patient.ids.astype(np.int64))
            log_probability = self.lm(input_ids=ids[None]).logits[0].log_softmax(-1)
            for position in patient.labelled.tolist():
                sft = sft - log_probability[position - 1, ids[position]]
            for end, masked, replaced in patient.cuts:
                positions = masked.tolist(), replaced.tolist()
                jepa = jepa + self.masked_loss(ids[:end], *positions, norm)
        labels = sum(len(p.labelled) for p in patients)
        positions = sum(len(m) for p in patients for _, m, _ in p.cuts)
        return w_sft * sft / max(labels, 1) + w_jepa * jepa / max(positions, 1)

    def masked_loss(
        self, ids: Tensor, masked: list[int], replaced: list[int], norm: bool
    ) -> Tensor:
        """The sum over masked positions of the squared error, a mean over the width."""
        embedded = list(self.lm.get_input_embeddings()(ids))
        for position in replaced:
            embedded[position] = self.mask_vector
        online = hidden_states(self.lm, inputs_embeds=torch.stack(embedded)[None])
        target = hidden_states(self.teacher, input_ids=ids[None])
        total = torch.zeros((), dtype=torch.float64)
        for position in masked:
            wanted = target[position]
            if norm:
                centred = wanted - wanted.mean()
                wanted = centred / (centred.square().mean() + 1e-5).sqrt()
            total = total + (predictor(self.layers, online[position]) - wanted).square().mean()
        return total


class AdamW:
    """Clip the norm of all gradients, then Adam with decoupled weight decay."""

    def __init__(self, decay_of: dict[nn.Parameter, float], betas: tuple, clip: float) -> None:
        self.decay_of, self.betas, self.clip = decay_of, betas, clip
        self.moments = {p: (torch.zeros_like(p), torch.zeros_like(p), 0) for p in decay_of}

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """Returns the norm before clipping."""
        with_gradient = [p for p in self.decay_of if p.grad is not None]
        norm = sum(float(p.grad.square().sum()) for p in with_gradient) ** 0.5
        share = min(1.0, self.clip / (norm + 1e-6))
        for parameter in with_gradient:
            first, second, steps = self.moments[parameter]
            gradient, steps = share * parameter.grad, steps + 1
            first = self.betas[0] * first + (1 - self.betas[0]) * gradient
            second = self.betas[1] * second + (1 - self.betas[1]) * gradient**2
            size = (second / (1 - self.betas[1] ** steps)).sqrt() + 1e-8
            parameter.mul_(1 - lr * self.decay_of[parameter])
            parameter.sub_(lr * first / (1 - self.betas[0] ** steps) / size)
            self.moments[parameter] = first, second, steps
            parameter.grad = None
        return norm
