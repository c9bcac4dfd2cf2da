"""A trained model in Python: embeddings, token ids and text of patients at any moment.

    model = smbfast.load("runs/x/final")
    result = model.embed("MEDS_FOLDER", at="last")
    result.vector_KD, result.table, result.counts

`python -m smbfast.embed` does the same through the same functions, so that for the same patients
and moments both give the same bits.

Legend: K nodes, D width.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoTokenizer

from smbfast.base.files import digest_of, standing
from smbfast.base.progress import Progress
from smbfast.base.runtime import choose_device
from smbfast.data.formats import PatientSerializer, read_encoding, serializer_of
from smbfast.data.labels import find_tasks, read_labels, with_splits
from smbfast.data.meds import MedsDataset
from smbfast.data.moments import as_table, nodes_at, read_moments
from smbfast.data.node_parts import NodeSource
from smbfast.data.nodes import Nodes, NodeText, distinct_nodes, node_texts
from smbfast.probing.embedding import Model, Task, embed_tasks, packed_of
from smbfast.probing.embedding_file import EmbeddingTable
from smbfast.probing.embedding_parts import embed_nodes
from smbfast.run.checkpoint import restore_final
from smbfast.run.matmul import recorded
from smbfast.run.origin import origin_of
from smbfast.settings import POOLS, Pool

Which = Literal["online", "target"]
Forward = Literal["shared", "reference"]


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of decision nodes, in the order of subject and time.

    table: subject_id int64, prediction_time timestamp[us], split string ("" where it is unknown),
        embedding fixed_size_list<float32>[D], one row a node; as the command writes it.
    counts: nodes asked for, embedded, before a subject's first event, of unknown subjects, and
        tokens that did not fit into the context length. Nodes that are not embedded have no row.
    """

    table: pa.Table
    counts: dict[str, int]

    @property
    def subject_K(self) -> np.ndarray:
        """The subjects, int64 [K]."""
        return self.table["subject_id"].to_numpy()

    @property
    def time_K(self) -> np.ndarray:
        """The prediction times, datetime64[us] [K]."""
        return self.table["prediction_time"].to_numpy()

    @property
    def vector_KD(self) -> np.ndarray:
        """The embeddings, float32 [K, D]."""
        column = self.table["embedding"].combine_chunks()
        return column.flatten().to_numpy().reshape(len(self.table), -1)


class Embedder:
    """A model of a finished run, with its tokenizer, context length and form of the text."""

    def __init__(self, folder: Path, device: torch.device, path: str | None = None) -> None:
        """Load it. See `load`."""
        self.folder, self.device = standing(Path(folder)), device
        self._encoder, self._target, self.record = restore_final(self.folder, device, path)
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        self._encoding = read_encoding(self.folder, self.tokenizer, self.record)

    def embed(
        self,
        data: Any,
        at: Any,
        *,
        codes: Any = None,
        encoder: Which = "online",
        pool: Pool | None = None,
        path: Forward = "shared",
        tokens: int = 16384,
    ) -> Embeddings:
        """Return the embeddings of patients at moments, each from what was known by then.

        The result is in memory; for more nodes than fit there, use `python -m smbfast.embed`.

        Args:
            data: a MEDS folder, or its events as a table of pyarrow, pandas or polars: subject_id,
                time, code, and numeric_value and text_value if there are any; the rows of a subject
                together and sorted by time.
            at: "last", the time of each subject's last event; a date or time for every subject,
                such as "2024-01-31", which is the midnight that begins that day; or a table, or a
                parquet or csv file, with subject_id and prediction_time.
            codes: beside a table of events, the table or parquet file `metadata/codes.parquet`.
                Without it the text formats write codes in place of their descriptions, which is not
                what the model was trained on, and rare codes have no parents.
            encoder: `online`, or its EMA teacher `target`.
            pool: `last`, `mean`, `layers` or `spread`, as of the command; None pools as the run
                did for its own probes.
            path, tokens: as of the command.

        Raises:
            ValueError: data or moments that cannot be used, no node that can be embedded, or an
                encoder that the model does not have.
        """
        pool = pool or self.record["pool"]
        more = {"codes": codes, "encoder": encoder, "path": path, "tokens": tokens}
        return self.embed_by([pool], data, at, **more)[pool]

    def embed_by(
        self,
        pools: Sequence[Pool],
        data: Any,
        at: Any,
        *,
        codes: Any = None,
        encoder: Which = "online",
        path: Forward = "shared",
        tokens: int = 16384,
    ) -> dict[Pool, Embeddings]:
        """Return the embeddings by each of several pools, from one forward for all of them.

        Each has the bits that `embed` gives by that pool alone.

        Args:
            pools: of `last`, `mean`, `layers` and `spread`.
            data, at, codes, encoder, path, tokens: see `embed`.

        Raises:
            ValueError: a pool is none of these; see `embed` for the rest.
        """
        for pool in pools:
            if pool not in POOLS:
                raise ValueError(f"pools must be of {', '.join(POOLS)}, got {pool!r}")
        model = Model(packed_of(self._encoder, self._target, encoder, path))
        moments, dataset = read_moments(at), _dataset(data, codes)
        source = self._source(dataset, nodes_at(dataset, moments))
        nodes = source.nodes
        sinks = {pool: EmbeddingTable(nodes) for pool in pools}
        lost: list[dict[str, int]] = [{} for _ in source.parts]
        # part by part as the command, so that no forward is another
        tasks = (
            Task([(sinks, model)], source.texts(part, own))
            for part, own in zip(source.parts, lost, strict=True)
        )
        progress = Progress("smbfast.embed", len(nodes.subject_K), "embeddings")
        with self._products():
            embed_tasks(tasks, self.device, tokens=tokens, stopped=Event(), progress=progress.add)
        counts = source.counted(lost)
        return {
            pool: Embeddings(sink.table(origin_of(self.folder, encoder, pool)), counts)
            for pool, sink in sinks.items()
        }

    def tokens(self, data: Any, at: Any, *, codes: Any = None) -> pa.Table:
        """Return the token ids that each node is embedded from.

        For transformers, PEFT or vLLM (`prompt_token_ids`): their hidden state at the last id is
        the embedding that `pool="last"` gives.

        Args:
            data, at, codes: see `embed`.

        Returns:
            subject_id int64, prediction_time timestamp[us], token_ids list<int32>; a row for each
            node that can be embedded, in the order of subject and time.
        """
        moments, dataset = read_moments(at), _dataset(data, codes)
        nodes = nodes_at(dataset, moments)
        texts = sorted(self._texts(dataset, nodes, {}), key=lambda text: text.index)
        times = np.array([text.time for text in texts], "datetime64[us]")
        lengths = [len(text.ids_T) for text in texts]
        flat = np.concatenate([np.empty(0, np.int32), *(text.ids_T for text in texts)])
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        columns = {
            "subject_id": pa.array([text.subject for text in texts], pa.int64()),
            "prediction_time": pa.array(times, pa.timestamp("us")),
            "token_ids": pa.ListArray.from_arrays(offsets, pa.array(flat.astype(np.int32))),
        }
        return pa.table(columns)

    def text(self, data: Any, at: Any, *, codes: Any = None) -> pa.Table:
        """Return `tokens` with a column `text` of what the ids say.

        In a text format that is the text itself, which the tokenizer encodes to the same ids
        (without special tokens of its own); in codes, the names of the tokens, each on a line.
        """
        table = self.tokens(data, at, codes=codes)
        rows = [row.values.to_numpy() for row in table["token_ids"].combine_chunks()]
        return table.append_column("text", pa.array([self._text(ids) for ids in rows], pa.string()))

    def write(
        self,
        out: Path,
        data: Path,
        *,
        labels: list[str] | None = None,
        at: Any = None,
        encoder: Which = "online",
        pool: Pool | None = None,
        path: Forward = "shared",
        tokens: int = 16384,
    ) -> dict[str, int] | None:
        """Write the embeddings as parquet, whatever their number, and return the counts.

        Any number of processes that do the same at the same time share the work, and what a kill
        leaves is gone on with.

        Args:
            out: the file; a folder, or a name that does not end in .parquet, is refused at once.
            data: a MEDS folder.
            labels: task folders, or names under `data`/labels, whose nodes are embedded; `at` is
                None then.
            at, encoder, pool, path, tokens: see `embed`.

        Returns:
            The counts; None where the file was there, or another process has written it.

        Raises:
            ValueError: see `embed`; or another process embeds something else to the same file.
            OSError: the file cannot be written.
        """
        pool = pool or self.record["pool"]
        origin = origin_of(self.folder, encoder, pool)
        model = Model(packed_of(self._encoder, self._target, encoder, path))
        moments = read_moments(at) if at is not None else None
        dataset = _dataset(data, None)
        if moments is None:
            folders = find_tasks(labels or [], dataset.path)
            tasks = [read_labels(folder, values=False) for folder in folders]
            nodes = distinct_nodes([with_splits(task, dataset) for task in tasks])
        else:
            nodes = nodes_at(dataset, moments)
        key = digest_of(origin, path, tokens, self.device.type, torch.__version__, nodes.digest())
        with self._products():
            source = self._source(dataset, nodes)
            return embed_nodes(
                out, model, source, self.device, tokens=tokens, pool=pool, key=key, origin=origin
            )

    def _source(self, dataset: MedsDataset, nodes: Nodes) -> NodeSource:
        serializer: PatientSerializer = serializer_of(dataset, self._encoding, self.record)
        return NodeSource(dataset, serializer, nodes, self.record["window"])

    def _texts(
        self, dataset: MedsDataset, nodes: Nodes, counts: dict[str, int]
    ) -> Iterator[NodeText]:
        serializer: PatientSerializer = serializer_of(dataset, self._encoding, self.record)
        return node_texts(dataset, serializer, nodes, self.record["window"], counts)

    def _text(self, ids_T: np.ndarray) -> str:
        if self.record.get("data_format") == "codes":
            return "\n".join(self.tokenizer.convert_ids_to_tokens(ids_T.tolist()))
        return str(self.tokenizer.decode(ids_T.tolist(), clean_up_tokenization_spaces=False))

    def _products(self) -> AbstractContextManager:
        """Compute products by what the run did, so that embeddings are those of its probes."""
        return recorded(self.record.get("matmul"), self.device)


def load(folder: str | Path, *, path: str | Path | None = None, device: str = "auto") -> Embedder:
    """Load a trained model: `final` in a run folder, or one of the folders under `best`.

    Args:
        folder: the model's folder.
        path: of a LoRA adapter, the folder or hub name of its backbone, if that is no longer where
            it was during training. Its weights are compared with those of the run.
        device: `cpu`, `cuda`, `cuda:1`, or `auto`, the first GPU or else the CPU.

    Raises:
        ValueError: the folder is no trained model or is damaged, or its backbone is missing or
            another.
    """
    return Embedder(Path(folder), choose_device(device), None if path is None else str(path))


def _dataset(data: Any, codes: Any) -> MedsDataset:
    if isinstance(data, MedsDataset):
        return data
    if isinstance(data, str | Path):
        if codes is not None:
            raise ValueError("`codes` must be given beside a table; a folder has codes of its own")
        return MedsDataset.open(Path(data), need_train=False)
    if isinstance(codes, str | Path):
        codes = pq.read_table(codes)
    elif codes is not None:
        codes = as_table(codes, "codes")
    return MedsDataset.of_table(as_table(data, "data"), codes)
