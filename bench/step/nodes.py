"""Embeddings of several decision nodes of a window: from one forward, or from one forward each.

    B1    a sequence of its own for each node, packed
    E1    a forward of its own for each node, in transformers' and PEFT's code
    B4    complete buckets once, the tails of the nodes as branches

B1 and B4 go through `encoder.packed`; all without gradients.
"""

import torch
from torch import Tensor

from bench.step.variants import ONLINE, Part, Variant, untimed
from bench.step.workloads import Workload, node_batches
from smbfast.model.backbone import PatientEncoder
from smbfast.reference import padded


class Nodes(Variant):
    """The last hidden state of every node of a workload."""

    def __init__(self, encoder: PatientEncoder, *, shared: bool) -> None:
        super().__init__(encoder)
        self.shared = shared

    def take(self, workload: Workload) -> None:
        device = self.parameters[0].device
        packs = node_batches(workload, shared=self.shared)
        self.packs = [(batch.to(device), last.to(device)) for batch, last in packs]

    @torch.no_grad()
    def states(self, part: Part) -> Tensor:
        """In the order of windows and nodes: [nodes, D]."""
        with part(ONLINE):
            forward = self.encoder.packed
            return torch.cat(
                [forward(b.ids_T, b.position_T, b.segments)[last] for b, last in self.packs]
            )

    def accumulate(self, part: Part) -> tuple[Tensor, Tensor]:
        states = self.states(part)
        return states, states

    def outcome(self) -> dict[str, Tensor]:
        return {"hidden states": self.states(untimed)}

    def step(self, part: Part = untimed) -> None:
        self.states(part)

    def update(self, tau: float) -> None:
        """There is no target."""

    def averages(self) -> list[Tensor]:
        return []


class PlainNodes(Nodes):
    """E1: the loop that a user writes."""

    def __init__(self, encoder: PatientEncoder) -> None:
        super().__init__(encoder, shared=False)

    @torch.no_grad()
    def states(self, part: Part) -> Tensor:
        model, states = self.encoder.base.model, []
        with part(ONLINE):
            for batch, _ in self.packs:
                for start, length, *_ in batch.segment_tuples:
                    ids_1T = batch.ids_T[None, start : start + length]
                    states.append(model(input_ids=ids_1T, use_cache=False)[0][0, -1])
        return torch.stack(states)


class NodesReference(Nodes):
    """A padded sequence of its own for each node."""

    def __init__(self, encoder: PatientEncoder) -> None:
        super().__init__(encoder, shared=False)

    @torch.no_grad()
    def states(self, part: Part) -> Tensor:
        states = []
        for batch, _ in self.packs:
            sequences = [batch.ids_T[s : s + n] for s, n, *_ in batch.segment_tuples]
            hidden_BTD = self.encoder.hidden(padded(sequences, 0))
            states += [h[len(ids) - 1] for h, ids in zip(hidden_BTD, sequences, strict=True)]
        return torch.stack(states)
