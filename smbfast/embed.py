"""python -m smbfast.embed: a checkpoint and MEDS labels to embeddings at decision nodes.

All nodes of a window come from one forward: complete buckets are the trunk, and what a node does
not share with the others is a branch (`smbfast.data.nodes`).

Legend: K nodes, W windows, S branches, T tokens, D width, P sums of consecutive states, E ends of
prefixes of a trunk.
"""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from smbkernels.attention import Segments
from torch import Tensor
from transformers import AutoTokenizer

from smbfast.batch import pack_segments
from smbfast.checkpoint import restore_final
from smbfast.config import command_line
from smbfast.data.labels import find_tasks, read_labels, with_splits
from smbfast.data.meds import MedsDataset
from smbfast.data.nodes import NodeText, SharedWindow, distinct_nodes, node_texts, shared_windows
from smbfast.data.packing import plan_rows
from smbfast.data.prepared import serializer_of
from smbfast.data.tokens import TextEncoder
from smbfast.files import cannot_write, committed_file
from smbfast.model.backbone import PatientEncoder
from smbfast.model.target import TargetEncoder
from smbfast.runtime import choose_device, duration, few
from smbfast.settings import EmbedSettings

Pool = Literal["last", "mean"]
Packed = Callable[[Tensor, Tensor, Segments], Tensor]  # ids [T], positions [T] -> states [T, D]
_PLANNED = 32  # forwards planned together: what fills them well, and fits in memory


@torch.no_grad()
def embed_nodes(
    packed: Packed,
    texts: Iterator[NodeText],
    device: torch.device,
    *,
    total: int,
    tokens: int,
    pool: Pool,
) -> pa.Table:
    """Embeddings of all nodes; rows in the order of (subject, time).

    Nodes of one window share its trunk, windows of many patients a forward of at most `tokens`
    tokens (a longer window has one of its own).

    Raises:
        ValueError: there is no node, or a model gives states that are not finite.
    """
    nodes: list[NodeText] = []
    parts: list[np.ndarray] = []
    start = last = time.monotonic()
    for windows in _rows(shared_windows(texts, tokens), tokens):
        parts.append(pooled(packed, windows, pool, device).astype(np.float32))
        nodes += [node for window in windows for node in window.nodes]
        now = time.monotonic()
        if now - last > 5:
            last = now
            left = (now - start) / len(nodes) * (total - len(nodes))
            print(f"embed  {len(nodes)}/{total} nodes  eta {duration(left)}", file=sys.stderr)
    if not nodes:
        raise ValueError("no decision node of the labels has a subject with events in the data")
    subject_K = np.array([node.subject for node in nodes], np.int64)
    time_K = np.array([node.time for node in nodes], np.int64)
    order = np.lexsort((time_K, subject_K))
    stacked_KD = np.concatenate(parts)[order]
    if not np.isfinite(stacked_KD).all():
        raise ValueError("embeddings must be finite; this model gives NaN or infinite states")
    values = pa.FixedSizeListArray.from_arrays(pa.array(stacked_KD.ravel()), stacked_KD.shape[1])
    return pa.table(
        {
            "subject_id": pa.array(subject_K[order]),
            "prediction_time": pa.array(time_K[order].astype("datetime64[us]")),
            "split": pa.array([nodes[k].split for k in order], pa.string()),
            "embedding": values,
        }
    )


def _rows(windows: Iterator[SharedWindow], tokens: int) -> Iterator[list[SharedWindow]]:
    """Windows of each forward, planned among so many at a time that memory is bounded."""
    while group := _some(windows, _PLANNED * tokens):
        size_W = np.array([len(window) for window in group])
        for row in plan_rows(size_W, size_W, tokens):
            yield [group[w] for w in row]


def _some(windows: Iterator[SharedWindow], tokens: int) -> list[SharedWindow]:
    group: list[SharedWindow] = []
    while tokens > 0 and (window := next(windows, None)) is not None:
        group.append(window)
        tokens -= len(window)
    return group


def pooled(
    packed: Packed, windows: list[SharedWindow], pool: Pool, device: torch.device
) -> np.ndarray:
    """Embeddings [K, D] of the nodes of some windows, in fp64, from one forward."""
    batch = pack_segments([w.trunk_T for w in windows], [w.branches for w in windows]).to(device)
    hidden_TD = packed(batch.ids_T, batch.position_T, batch.segments)
    return _last(hidden_TD, windows) if pool == "last" else _mean(hidden_TD, windows)


def _last(hidden_TD: Tensor, windows: list[SharedWindow]) -> np.ndarray:
    """The state at each node's last token, on its trunk or at the end of its branch."""
    start, own_start = 0, sum(len(w.trunk_T) for w in windows)  # branches lie behind all trunks
    row_K = []
    for window in windows:
        own_end = own_start + np.cumsum([0, *(len(ids) for _, ids in window.branches)])
        for prefix, branch in zip(window.prefix_K, window.branch_K, strict=True):
            row_K.append((start + prefix if branch < 0 else own_end[branch + 1]) - 1)
        start, own_start = start + len(window.trunk_T), own_end[-1]
    rows = torch.tensor(row_K, device=hidden_TD.device)
    return hidden_TD[rows].cpu().double().numpy()


def _mean(hidden_TD: Tensor, windows: list[SharedWindow]) -> np.ndarray:
    """The mean over each node's tokens: the part of the trunk that it sees, and its branch.

    Each token is summed once, in fp32 at least: the pieces of a trunk between the ends of prefixes
    are added up, in fp64, from the trunk's own start: nothing that a node does not see, not even
    another patient's rounding, reaches it.
    """
    ends = [np.unique(window.prefix_K) for window in windows]  # the last is the trunk's
    pieces = [length for end_E in ends for length in np.diff(end_E, prepend=0).tolist()]
    own = [len(ids) for window in windows for _, ids in window.branches]
    exact = torch.promote_types(hidden_TD.dtype, torch.float32)
    sums = [rows.sum(0, dtype=exact) for rows in hidden_TD.split(pieces + own)]
    sum_PD = torch.stack(sums).cpu().double().numpy()
    first, first_own = 0, len(pieces)
    mean_K = []
    for window, end_E in zip(windows, ends, strict=True):
        seen_ED = sum_PD[first : first + len(end_E)].cumsum(0)
        own_SD = sum_PD[first_own : first_own + len(window.branches)]
        for node, prefix, branch in zip(
            window.nodes, window.prefix_K, window.branch_K, strict=True
        ):
            sum_D = seen_ED[np.searchsorted(end_E, prefix)]
            mean_K.append((sum_D if branch < 0 else sum_D + own_SD[branch]) / len(node.ids_T))
        first, first_own = first + len(end_E), first_own + len(window.branches)
    return np.stack(mean_K)


def write_embeddings(table: pa.Table, path: Path) -> None:
    """Parquet with page checksums, private to the user, atomically."""
    with committed_file(path, private=True) as staging:
        pq.write_table(table, staging, write_page_checksum=True)


def packed_of(
    encoder: PatientEncoder,
    target: TargetEncoder | None,
    which: Literal["online", "target"],
    path: Literal["shared", "reference"],
) -> Packed:
    """The forward of the encoder asked for.

    Raises:
        ValueError: the target encoder is asked for, but the run had none.
    """
    chosen = encoder if which == "online" else target
    if chosen is None:
        raise ValueError("encoder=target needs a run with a JEPA phase; this one had none")
    return chosen.packed if path == "shared" else one_by_one(chosen.hidden)


def one_by_one(hidden: Callable[[Tensor], Tensor]) -> Packed:
    """The reference of a packed forward: one for each trunk, and one for each branch and what it
    sees.

    Args:
        hidden: ids [B, T] to hidden states [B, T, D].
    """

    def packed(ids_T: Tensor, position_T: Tensor, segments: Segments) -> Tensor:
        states = []
        for start, length, trunk, prefix in segments.host_S6[:, :4].tolist():
            seen_T = torch.cat([ids_T[trunk : trunk + prefix], ids_T[start : start + length]])
            states.append(hidden(seen_T[None])[0, prefix:])
        return torch.cat(states)

    return packed


def main(argv: list[str] | None = None) -> None:
    settings = command_line(EmbedSettings, argv, prog="python -m smbfast.embed")
    try:
        _run(settings)
    except ValueError as error:
        raise SystemExit(f"smbfast.embed: {error}") from None
    except OSError as error:
        raise SystemExit(f"smbfast.embed: {cannot_write(error)}") from None
    except KeyboardInterrupt:
        raise SystemExit("\nsmbfast.embed: stopped; nothing was written") from None


def _run(settings: EmbedSettings) -> None:
    device = choose_device(settings.device)
    folder = Path(settings.model)
    encoder, target, record = restore_final(folder, device)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    text_encoder = TextEncoder(tokenizer, record["delimiters"])
    dataset = MedsDataset.open(Path(settings.data))
    serializer = serializer_of(dataset, text_encoder, record)
    folders = find_tasks(settings.labels, dataset.path)
    tasks = [with_splits(read_labels(folder), dataset) for folder in folders]
    nodes = distinct_nodes(tasks)
    counts: dict[str, int] = {}
    texts = node_texts(dataset, serializer, nodes, record["window"], counts)
    table = embed_nodes(
        packed_of(encoder, target, settings.encoder, settings.path),
        texts,
        device,
        total=len(nodes.subject_K),
        tokens=settings.tokens,
        pool=settings.pool or record["pool"],
    )
    write_embeddings(table, Path(settings.out))
    print(f"embedded {len(table):,} nodes of {len(tasks)} tasks: {settings.out}")
    print(", ".join(f"{k.replace('_', ' ')} {few(v)}" for k, v in counts.items()))


if __name__ == "__main__":
    main()
