"""Decision nodes whose texts are given, in parts of successive nodes."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import count

import numpy as np

from smbfast.data.node_parts import NodePart
from smbfast.data.nodes import Nodes, NodeText

_STATES = count()


class Listed:
    """What `embed_nodes` and `embed_parts` read; texts are given in the order of their parts.

    Args:
        size: nodes of a part; None makes one part.
        state: of the data; None is another one each time.
    """

    def __init__(
        self,
        nodes: Nodes,
        texts: Iterable[NodeText],
        size: int | None = None,
        state: str | None = None,
    ) -> None:
        self.nodes, self._state = nodes, f"state {next(_STATES)}" if state is None else state
        all_K = np.arange(len(nodes.subject_K))
        cuts = range(size or len(all_K), len(all_K), size or 1)
        self.parts = [NodePart(k, []) for k in np.split(all_K, list(cuts)) if len(k)]
        self._texts, self._held = iter(texts) if size is None else _Parted(texts), size

    def state(self) -> str:
        return self._state

    def counted(self, parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
        return {"nodes": len(self.nodes.subject_K), "embedded": sum(p["embedded"] for p in parts)}

    def texts(self, part: NodePart, counts: dict[str, int]) -> Iterator[NodeText]:
        counts["embedded"] = 0
        for text in self._texts if self._held is None else self._texts.of(part):
            counts["embedded"] += 1
            yield text


class _Parted:
    """Texts in the order of their nodes, which parts take in turn or, of a list, in any order."""

    def __init__(self, texts: Iterable[NodeText]) -> None:
        self._list = texts if isinstance(texts, list) else None
        self._ahead, self._next = iter(texts), None

    def of(self, part: NodePart) -> Iterator[NodeText]:
        first, last = int(part.index_M[0]), int(part.index_M[-1])
        if self._list is not None:
            yield from (text for text in self._list if first <= text.index <= last)
            return
        while (text := self._next or next(self._ahead, None)) and text.index <= last:
            self._next = None
            yield text
        self._next = text
