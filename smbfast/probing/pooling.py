"""Pools the hidden states of decision nodes into embeddings, several ways from one forward.

A node sees a prefix of its trunk and perhaps a branch. The tokens of a pack are divided into
pieces, which every node sees whole or not at all: those of a trunk between the ends of prefixes,
and each branch. A piece is reduced once, on the device, and pieces are put together in fp64 from
the trunk's own start. So nothing that a node does not see reaches it, not even the rounding of
another patient's sums. States of a layer are reduced when the layer has run, and are not held.

The pools, and their width for D the width of the model and L its number of layers (our choice):

    last     the state at the node's last token, after the final norm: D
    mean     the mean of these states over the tokens of the node's window: D
    layers   the same mean of the states after every layer, side by side, from the input embeddings
             to those after the final norm (`hidden_states` of transformers): (L + 1) D
    spread   last, mean, and the largest value and the standard deviation over these tokens: 4 D

Legend: K nodes, W windows, S branches, T tokens, D width, P pieces, E ends of prefixes of a trunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from smbkernels.attention import Segments
from torch import Tensor

from smbfast.batch import PackedBatch, pack_segments
from smbfast.data.nodes import NodeText, SharedWindow
from smbfast.model.decoder import Each
from smbfast.settings import Pool


class Packed(Protocol):
    """The forward of a pack: ids [T] and positions [T] to the states of `rows`, or of all T.

    `each` is called with the states of all T after every layer (`PackedDecoder`).
    """

    def __call__(
        self,
        ids_T: Tensor,
        position_T: Tensor,
        segments: Segments,
        /,
        *,
        rows: Tensor | None = None,
        each: Each | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Row:
    """The windows of one forward, packed."""

    windows: list[SharedWindow]
    batch: PackedBatch

    @classmethod
    def of(cls, windows: list[SharedWindow]) -> "Row":
        """Pack windows."""
        batch = pack_segments([w.trunk_T for w in windows], [w.branches for w in windows])
        return cls(windows, batch)

    @property
    def nodes(self) -> list[NodeText]:
        """The nodes of all windows."""
        return [node for window in self.windows for node in window.nodes]


def width_of(pool: Pool, width: int, num_layers: int) -> int:
    """Return the width of embeddings of a model of this width and number of layers."""
    return {"last": width, "mean": width, "layers": (num_layers + 1) * width, "spread": 4 * width}[
        pool
    ]


def pooled(packed: Packed, row: Row, pool: Pool, device: torch.device) -> np.ndarray:
    """Return the embeddings of the nodes of a row, fp64 [K, width], from one forward."""
    return pooled_by(packed, row, [pool], device)[pool]


def pooled_by(
    packed: Packed, row: Row, pools: Sequence[Pool], device: torch.device
) -> dict[Pool, np.ndarray]:
    """Return the embeddings of the nodes of a row by each pool, fp64 [K, its width].

    There is one forward for all of them. Those by one pool have the same bits whichever others are
    asked for.
    """
    batch, wanted = row.batch.to(device), set(pools)
    at_end = bool(wanted & {"last", "spread"})
    last_K = torch.tensor(_last(row.windows)).to(device) if at_end else None
    seen = _Seen(_Pieces.of(row.windows), layers="layers" in wanted)
    # for the last tokens alone, the last layer need not be computed for all
    more = {} if wanted == {"last"} else {"each": seen}
    states = packed(batch.ids_T, batch.position_T, batch.segments, rows=last_K, **more)
    made: dict[Pool, np.ndarray] = {}
    if at_end:
        made["last"] = _host(states)
    if "mean" in wanted:
        made["mean"] = seen.mean()
    if "layers" in wanted:
        made["layers"] = np.concatenate(seen.layer_means(), axis=1)
    if "spread" in wanted:
        made["spread"] = np.concatenate([made["last"], *seen.spread()], axis=1)
    return {pool: made[pool] for pool in pools}


class _Seen:
    """Takes the states of all tokens after each layer, and reduces them over those of each node."""

    def __init__(self, pieces: "_Pieces", *, layers: bool) -> None:
        self._pieces, self._layers = pieces, layers
        self._sums: list[Tensor] = []
        self.final_TD = torch.empty(0)

    def __call__(self, states_TD: Tensor) -> None:
        self.final_TD = states_TD  # in the end that; those of earlier layers are let go
        if self._layers:
            self._sums.append(self._pieces.sums(states_TD))

    def mean(self) -> np.ndarray:
        """Return the means of the states after the final norm, fp64 [K, D]."""
        return self._pieces.mean(_host(self._pieces.sums(self.final_TD)))

    def layer_means(self) -> list[np.ndarray]:
        """Return the means of the states of each layer, fp64 [K, D] each."""
        return [self._pieces.mean(_host(sum_PD)) for sum_PD in self._sums]

    def spread(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return mean, largest value and standard deviation after the final norm, fp64 [K, D]."""
        pieces, split = self._pieces, self.final_TD.split(self._pieces.length_P)
        most_PD = torch.stack([rows.amax(0) for rows in split])
        # in fp64, as a small deviation is the difference of two large squares
        sum_PD = torch.stack([rows.sum(0, dtype=torch.float64) for rows in split])
        square_PD = torch.stack([rows.double().square().sum(0) for rows in split])
        mean_KD, square_KD = pieces.mean(_host(sum_PD)), pieces.mean(_host(square_PD))
        deviation_KD = np.sqrt(np.maximum(square_KD - mean_KD**2, 0))
        return mean_KD, pieces.joined(_host(most_PD), np.maximum), deviation_KD


@dataclass(frozen=True)
class _Pieces:
    """The pieces of a pack, and which of them each node sees.

    length_P: tokens of each piece, in the order of the pack: trunks first, branches behind them.
    end_WE: by window the ends of its trunk's pieces, which are those of prefixes.
    """

    windows: list[SharedWindow]
    length_P: list[int]
    end_WE: list[np.ndarray]

    @classmethod
    def of(cls, windows: list[SharedWindow]) -> "_Pieces":
        ends = [np.unique(window.prefix_K) for window in windows]  # the last is the trunk's
        trunks = [length for end_E in ends for length in np.diff(end_E, prepend=0).tolist()]
        own = [len(ids) for window in windows for _, ids in window.branches]
        return cls(windows, trunks + own, ends)

    def sums(self, states_TD: Tensor) -> Tensor:
        """Return the sums of the pieces, [P, D], in fp32 at least."""
        exact = torch.promote_types(states_TD.dtype, torch.float32)
        return torch.stack([rows.sum(0, dtype=exact) for rows in states_TD.split(self.length_P)])

    def mean(self, sum_PD: np.ndarray) -> np.ndarray:
        """Return the means over the tokens of each node, from the sums of pieces: [K, D]."""
        length_K = [len(node.ids_T) for window in self.windows for node in window.nodes]
        return self.joined(sum_PD, np.add) / np.array(length_K)[:, None]

    def joined(self, value_PD: np.ndarray, together: np.ufunc) -> np.ndarray:
        """Return the values of each node, [K, D]: those of its pieces taken `together`."""
        first, first_own = 0, sum(map(len, self.end_WE))
        joined_KD = []
        for window, end_E in zip(self.windows, self.end_WE, strict=True):
            seen_ED = together.accumulate(value_PD[first : first + len(end_E)])
            for prefix, branch in zip(window.prefix_K, window.branch_K, strict=True):
                value_D = seen_ED[np.searchsorted(end_E, prefix)]
                own = [value_PD[first_own + branch]] if branch >= 0 else []
                joined_KD.append(together(value_D, *own) if own else value_D)
            first, first_own = first + len(end_E), first_own + len(window.branches)
        return np.stack(joined_KD)


def _last(windows: list[SharedWindow]) -> list[int]:
    """Return the row of each node's last token, on its trunk or at the end of its branch."""
    start, own_start = 0, sum(len(w.trunk_T) for w in windows)  # branches lie behind all trunks
    row_K: list[int] = []
    for window in windows:
        own_end = own_start + np.cumsum([0, *(len(ids) for _, ids in window.branches)])
        for prefix, branch in zip(window.prefix_K, window.branch_K, strict=True):
            row_K.append((start + prefix if branch < 0 else own_end[branch + 1]) - 1)
        start, own_start = start + len(window.trunk_T), own_end[-1]
    return row_K


def _host(values: Tensor) -> np.ndarray:
    return values.cpu().double().numpy()
