"""python -m smbfast.embed: a checkpoint and MEDS labels to embeddings at decision nodes.

A node (subject, prediction time) is embedded once, however many tasks ask for it, from complete
buckets and the tail of the current one: only events with `time <= prediction_time` are seen.

Legend: K nodes, B rows of a batch, T positions, D width.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field
from torch import Tensor
from transformers import AutoTokenizer

from smbfast.batch import Timeline
from smbfast.checkpoint import restore_final
from smbfast.config import Settings, command_line
from smbfast.data.labels import Labels, find_tasks, read_labels, with_splits
from smbfast.data.meds import BIRTH, STATIC, EventBatch, MedsDataset
from smbfast.data.prepared import serializer_of
from smbfast.data.serialize import Serializer
from smbfast.data.timelines import node_timeline, node_window
from smbfast.data.tokens import TextEncoder
from smbfast.files import cannot_write, committed_file
from smbfast.model.backbone import PatientEncoder, padded
from smbfast.model.target import TargetEncoder
from smbfast.runtime import choose_device, duration, few

Hidden = Callable[[Tensor], Tensor]  # ids [B, T] -> hidden states [B, T, D]


@dataclass(frozen=True)
class Nodes:
    """Distinct decision nodes, sorted by subject and time."""

    subject_K: np.ndarray  # int64
    time_K: np.ndarray  # int64 microseconds since 1970
    split_K: np.ndarray  # str


@dataclass(frozen=True)
class NodeText:
    """What one node is embedded from."""

    subject: int
    time: int
    split: str
    ids_T: np.ndarray


class EmbedSettings(Settings):
    """Embed patients at the prediction times of MEDS label files.

    Writes parquet with subject_id, prediction_time, split and embedding, one row a node.
    """

    model: str = Field(description="the `final` folder of a run")
    data: str = Field(description="a MEDS folder")
    labels: list[str] = Field(description="task folders, or names under <data>/labels")
    out: str = Field(description="parquet file to write")
    encoder: Literal["online", "target"] = Field("online", description="which one embeds")
    pool: Literal["last", "mean"] | None = Field(
        None, description="last token, or mean of the window; none: as the run was probed"
    )
    batch: int = Field(16, ge=1, description="nodes of one forward")
    device: str = Field("auto", description="auto, cpu, cuda")


def distinct_nodes(tasks: list[Labels]) -> Nodes:
    """The nodes of all tasks, each once."""
    nodes = {
        (int(s), int(t)): str(split)
        for task in tasks
        for s, t, split in zip(task.subject_N, task.time_N, task.split_N, strict=True)
    }
    keys = sorted(nodes)
    pairs = np.array(keys, np.int64).reshape(-1, 2)
    return Nodes(pairs[:, 0], pairs[:, 1], np.array([nodes[k] for k in keys], dtype=str))


def node_texts(
    dataset: MedsDataset,
    serializer: Serializer,
    nodes: Nodes,
    window: int,
    counts: dict[str, int],
) -> Iterator[NodeText]:
    """The window of each node, in the order of the data; what is skipped or lost is counted.

    Counted: nodes of unknown subjects, nodes before a subject's first event, tokens lost.
    """
    counts.update(nodes=len(nodes.subject_K), embedded=0, before_first_event=0, tokens_lost=0)
    begin = serializer.encoder.begin
    known = 0
    for split in [s for s in dataset.splits if s in nodes.split_K]:  # "" is an unknown subject's
        mine = nodes.split_K == split
        for batch in dataset.batches(split, np.unique(nodes.subject_K[mine])):
            timelines = serializer.timelines(batch)
            births = np.array([c == BIRTH for c in batch.codes])[batch.code_N]
            timed_N = (batch.time_N != STATIC) & ~births
            for s, timeline in enumerate(timelines):
                subject = timeline.subject
                rows = slice(int(batch.offset_S1[s]), int(batch.offset_S1[s + 1]))
                # nodes are sorted by subject: no pass over all of them for every subject
                first, last = np.searchsorted(nodes.subject_K, [subject, subject + 1])
                at = first + np.flatnonzero(mine[first:last])
                known += len(at)
                tails = _tails(batch, rows, timed_N, serializer, nodes.time_K[at])
                for k, (complete, tail) in zip(at, _complete(timeline, tails), strict=True):
                    record = node_timeline(timeline, complete, tail)
                    if not len(record.bucket_end_B):
                        counts["before_first_event"] += 1
                        continue
                    cut, lost = node_window(record, window, begin)
                    counts["tokens_lost"] += lost
                    counts["embedded"] += 1
                    yield NodeText(subject, int(nodes.time_K[k]), split, cut.ids_T)
    counts["unknown_subjects"] = len(nodes.subject_K) - known


def _tails(
    batch: EventBatch,
    rows: slice,
    timed_N: np.ndarray,
    serializer: Serializer,
    time_K: np.ndarray,
) -> list[tuple[int, Timeline | None]]:
    """For each node of a subject: its bucket, and the bucket's events up to the node as tokens."""
    time_N = batch.time_N[rows]
    timed = np.flatnonzero(timed_N[rows])
    key_K = serializer.bucket_key(time_K)
    picks = []
    for node_time, key in zip(time_K, key_K, strict=True):
        a = np.searchsorted(time_N[timed], key, side="left")
        b = np.searchsorted(time_N[timed], node_time, side="right")
        picks.append(timed[a:b] + rows.start)
    offset = np.concatenate([[0], np.cumsum([len(p) for p in picks])])
    full = [i for i, p in enumerate(picks) if len(p)]
    tails: list[tuple[int, Timeline | None]] = [(int(k), None) for k in key_K]
    if full:
        chosen = np.concatenate([picks[i] for i in full])
        bounds = np.append(offset[full], offset[-1])
        for i, tail in zip(full, serializer.timelines(batch.rows(chosen, bounds)), strict=True):
            tails[i] = (int(key_K[i]), tail)
    return tails


def _complete(
    timeline: Timeline, tails: list[tuple[int, Timeline | None]]
) -> list[tuple[int, Timeline | None]]:
    """Buckets that were complete when the node's own bucket began."""
    return [(int(np.searchsorted(timeline.bucket_time_B, key)), tail) for key, tail in tails]


@torch.no_grad()
def embed_nodes(
    hidden: Hidden,
    texts: Iterator[NodeText],
    device: torch.device,
    *,
    total: int,
    batch: int,
    pool: Literal["last", "mean"],
) -> pa.Table:
    """Embeddings of all nodes; rows in the order of (subject, time).

    Nodes of like length share a forward, within groups that bound memory.
    """
    columns: dict[str, list] = {"subject": [], "time": [], "split": [], "embedding": []}
    start = last = time.monotonic()
    for group in _groups(texts, batch * 32):
        group.sort(key=lambda n: len(n.ids_T), reverse=True)
        for first in range(0, len(group), batch):
            rows = group[first : first + batch]
            ids = [torch.from_numpy(n.ids_T.astype(np.int64)) for n in rows]
            states_BTD = hidden(padded(ids, 0).to(device)).float()
            for node, states_TD in zip(rows, states_BTD, strict=True):
                own_TD = states_TD[: len(node.ids_T)]
                pooled = own_TD[-1] if pool == "last" else own_TD.mean(0)
                columns["subject"].append(node.subject)
                columns["time"].append(node.time)
                columns["split"].append(node.split)
                columns["embedding"].append(pooled.cpu().numpy())
            now = time.monotonic()
            if now - last > 5:
                done, last = len(columns["subject"]), now
                left = (now - start) / done * (total - done)
                print(f"embed  {done}/{total} nodes  eta {duration(left)}", file=sys.stderr)
    if not columns["subject"]:
        raise ValueError("no decision node of the labels has a subject with events in the data")
    order = np.lexsort((columns["time"], columns["subject"]))
    stacked = np.stack(columns["embedding"])[order]
    if not np.isfinite(stacked).all():
        raise ValueError("embeddings must be finite; this model gives NaN or infinite states")
    values = pa.FixedSizeListArray.from_arrays(pa.array(stacked.ravel()), stacked.shape[1])
    return pa.table(
        {
            "subject_id": pa.array(np.array(columns["subject"], np.int64)[order]),
            "prediction_time": pa.array(
                np.array(columns["time"], np.int64)[order].astype("datetime64[us]")
            ),
            "split": pa.array(np.array(columns["split"])[order].tolist(), pa.string()),
            "embedding": values,
        }
    )


def write_embeddings(table: pa.Table, path: Path) -> None:
    """Parquet with page checksums, private to the user, atomically."""
    with committed_file(path, private=True) as staging:
        pq.write_table(table, staging, write_page_checksum=True)


def hidden_of(encoder: PatientEncoder, target: TargetEncoder | None, which: str) -> Hidden:
    """The forward of the encoder asked for.

    Raises:
        ValueError: the target encoder is asked for, but the run had none.
    """
    if which == "online":
        return encoder.hidden
    if target is None:
        raise ValueError("encoder=target needs a run with a JEPA phase; this one had none")
    return target.hidden


def _groups(items: Iterator[NodeText], size: int) -> Iterator[list[NodeText]]:
    group: list[NodeText] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


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
        hidden_of(encoder, target, settings.encoder),
        texts,
        device,
        total=len(nodes.subject_K),
        batch=settings.batch,
        pool=settings.pool or record["pool"],
    )
    write_embeddings(table, Path(settings.out))
    print(f"embedded {len(table):,} nodes of {len(tasks)} tasks: {settings.out}")
    print(", ".join(f"{k.replace('_', ' ')} {few(v)}" for k, v in counts.items()))


if __name__ == "__main__":
    main()
