"""A trained model in Python: embeddings, token ids and text of patients at any moment.

    model = smbfast.load("runs/x/final")
    result = model.embed("MEDS_FOLDER", at="last")
    result.vector_KD, result.subject_K, result.time_K, result.counts

`python -m smbfast.embed` does the same through the same functions, so that for the same patients
and moments both give the same bits. What calls about one patient after another share is made once:
codes.parquet is read, and the vocabulary laid out, by the first of them.

Legend: K nodes, D width.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import torch
from transformers import AutoTokenizer

from smbfast.base.digests import short
from smbfast.base.files import MANIFEST, digest_of, standing
from smbfast.base.hub_names import divided, is_local
from smbfast.base.progress import Progress
from smbfast.base.runtime import choose_device
from smbfast.data.code_table import CodeTable
from smbfast.data.codes.ladder import RUNGS, SECTION
from smbfast.data.formats import PatientSerializer, read_encoding, serializer_of
from smbfast.data.labels import find_tasks, read_labels, with_splits
from smbfast.data.meds import MedsDataset
from smbfast.data.moments import as_table, events_table, nodes_at, read_moments
from smbfast.data.node_parts import NodeSource
from smbfast.data.nodes import Nodes, NodeText, distinct_nodes, node_texts
from smbfast.data.source_index import stamp
from smbfast.data.splits import find_files
from smbfast.probing.embedding import Model, Task, embed_tasks, packed_of
from smbfast.probing.embedding_file import EmbeddingTable
from smbfast.probing.embedding_parts import embed_nodes
from smbfast.probing.pooling import width_of
from smbfast.run.checkpoint import restore_final
from smbfast.run.hub import fetched
from smbfast.run.matmul import recorded
from smbfast.run.origin import origin_of
from smbfast.settings import POOLS, Pool, require_meds_folder

Which = Literal["online", "target"]
Forward = Literal["shared", "reference"]
_MOST_UNKNOWN = 0.9  # share of events beyond which data are of another coding system: our choice
_MOST_AT_HAND = 2  # models: a search over two of them loads each once (our choice)
_AT_HAND: dict[tuple, "Embedder"] = {}
_FETCHED: dict[tuple[str, str | None], Path] = {}  # folders of names on the Hub
_OPENED: list[tuple[Any, MedsDataset]] = []  # the folder that was opened last, and its state
_LOADING = Lock()


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
    """A model of a finished run, with its tokenizer, context length and form of the text.

    It does not change, so copies are the same object. A pickle holds its name, from which the model
    is loaded again, and not its weights.

    Attributes:
        folder: of the model.
        device: that it computes on.
        record: `smbfast.json`, what the run says of the model: its `window`, `pool` and others.
        digest: of all files of the model, as it stands in the metadata of its embeddings.
        tokenizer: of transformers.
    """

    def __init__(
        self, folder: Path, device: torch.device, path: str | None = None, codes: Any = None
    ) -> None:
        """Load it. See `load`."""
        self.folder, self.device = standing(Path(folder)), device
        self._encoder, self._target, self.record = restore_final(self.folder, device, path)
        self._origin = origin_of(self.folder, "online", self.record["pool"])
        self.digest: str = self._origin["model"]
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        self._encoding = read_encoding(self.folder, self.tokenizer, self.record)
        self._path, self._codes = path, codes
        self._named: tuple[Any, CodeTable] | None = None  # codes, as they were given, and as read
        self._laid_out: tuple[Any, PatientSerializer] | None = None  # by descriptions of codes

    def __repr__(self) -> str:
        of = self.record.get("data_format", "text-paper"), self.record["window"]
        return f"<smbfast model {self.folder}: {of[0]}, window {of[1]}, on {self.device}>"

    def __copy__(self) -> "Embedder":
        return self

    def __deepcopy__(self, _memo: dict) -> "Embedder":
        return self

    def __reduce__(self) -> tuple:
        where = str(self.folder.absolute()), self._path, str(self.device)
        return _of_pickle, (*where, self._codes, self.digest)

    def embed(
        self,
        data: Any,
        at: Any = "last",
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
            data: a MEDS folder, or events as a table of pyarrow, pandas or polars, of one patient
                or of many: subject_id, time, code, and numeric_value and text_value if there are
                any. The rows of a table may lie in any order.
            at: "last", the time of each subject's last event; a date or time for every subject,
                such as "2024-01-31", which is the midnight that begins that day; or a table, or a
                parquet or csv file, with subject_id and prediction_time.
            codes: beside a table of events, `metadata/codes.parquet` as a table or file, or the
                MEDS folder that has it; None takes what `load` was given. Without any, the text
                formats write codes in place of their descriptions, which is not what the model was
                trained on and is warned of, and rare codes have no parents.
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
        at: Any = "last",
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
        if encoder not in get_args(Which):
            raise ValueError(f"`encoder` must be online or target, got {encoder!r}")
        moments, dataset = read_moments(at), self.dataset(data, codes)
        nodes = nodes_at(dataset, moments)
        sinks, counts = self.embedded(
            pools, dataset, nodes, encoder=encoder, path=path, tokens=tokens
        )
        return {
            pool: Embeddings(sink.table(self.origin(encoder, pool)), counts)
            for pool, sink in sinks.items()
        }

    def embedded(
        self,
        pools: Sequence[Pool],
        dataset: MedsDataset,
        nodes: Nodes,
        *,
        encoder: Which = "online",
        path: Forward = "shared",
        tokens: int = 16384,
    ) -> tuple[dict[Pool, EmbeddingTable], dict[str, int]]:
        """Return what `embed_by` makes its result of, also where no node can be embedded."""
        _require_tokens(tokens)
        model = Model(packed_of(self._encoder, self._target, encoder, path))
        source = self._source(dataset, nodes)
        before = self._serializer(dataset).counts.copy()
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
        if words := _on_codes(self._serializer(dataset).counts - before):
            warnings.warn(words, stacklevel=4)
        return sinks, source.counted(lost)

    def origin(self, encoder: Which, pool: Pool) -> dict[str, Any]:
        """Return what stands in the metadata of embeddings, `smbfast.run.origin.origin_of`."""
        choice = self.record.get("pool_choice") if pool == self.record["pool"] else None
        return self._origin | {"encoder": encoder, "pool": pool, "pool_choice": choice}

    def width(self, pool: Pool) -> int:
        """Return the width of an embedding by a pool."""
        config = self._encoder.lm.config
        return width_of(pool, config.hidden_size, config.num_hidden_layers)

    def dataset(self, data: Any, codes: Any = None) -> MedsDataset:
        """Return the dataset of `data` and `codes`, see `embed`.

        That of a folder is opened once, and again when a file in it has changed.
        """
        if isinstance(data, MedsDataset):
            return data
        if isinstance(data, str | Path):
            if codes is not None:
                raise ValueError(
                    "`codes` must be given beside a table; a folder has codes of its own"
                )
            return _opened(Path(data))
        table = events_table(data, "data")
        known = self._code_table(self._codes if codes is None else codes)
        if known is None and self.record.get("data_format") != "codes":
            warnings.warn(
                "the model reads descriptions of codes, and none are given with this table: give "
                "codes=, the table or file metadata/codes.parquet of its MEDS folder",
                stacklevel=4,
            )
        return MedsDataset.of_table(table, known)

    def tokens(self, data: Any, at: Any = "last", *, codes: Any = None) -> pa.Table:
        """Return the token ids that each node is embedded from.

        For transformers, PEFT or vLLM (`prompt_token_ids`): their hidden state at the last id is
        the embedding that `pool="last"` gives.

        Args:
            data, at, codes: see `embed`.

        Returns:
            subject_id int64, prediction_time timestamp[us], token_ids list<int32>; a row for each
            node that can be embedded, in the order of subject and time.
        """
        moments, dataset = read_moments(at), self.dataset(data, codes)
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

    def text(self, data: Any, at: Any = "last", *, codes: Any = None) -> pa.Table:
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
        _require_tokens(tokens)
        pool = pool or self.record["pool"]
        origin = self.origin(encoder, pool)
        model = Model(packed_of(self._encoder, self._target, encoder, path))
        moments = read_moments(at) if at is not None else None
        dataset = self.dataset(data)
        if moments is None:
            folders = find_tasks(labels or [], dataset.path)
            tasks = [read_labels(folder, values=False) for folder in folders]
            nodes = distinct_nodes([with_splits(task, dataset) for task in tasks])
        else:
            nodes = nodes_at(dataset, moments)
        key = digest_of(origin, path, tokens, self.device.type, torch.__version__, nodes.digest())
        before = self._serializer(dataset).counts.copy()
        with self._products():
            source = self._source(dataset, nodes)
            counts = embed_nodes(
                out, model, source, self.device, tokens=tokens, pool=pool, key=key, origin=origin
            )
        if words := _on_codes(self._serializer(dataset).counts - before):
            print(f"smbfast: {words}", file=sys.stderr)
        return counts

    def _source(self, dataset: MedsDataset, nodes: Nodes) -> NodeSource:
        return NodeSource(dataset, self._serializer(dataset), nodes, self.record["window"])

    def _texts(
        self, dataset: MedsDataset, nodes: Nodes, counts: dict[str, int]
    ) -> Iterator[NodeText]:
        window = self.record["window"]
        return node_texts(dataset, self._serializer(dataset), nodes, window, counts)

    def _serializer(self, dataset: MedsDataset) -> PatientSerializer:
        """Return the serializer of a dataset, which that of the same codes has as well."""
        said = dataset.descriptions, dataset.parents
        if self._laid_out is None or any(
            a is not b for a, b in zip(self._laid_out[0], said, strict=True)
        ):
            self._laid_out = said, serializer_of(dataset, self._encoding, self.record)
        return self._laid_out[1]

    def _code_table(self, codes: Any) -> CodeTable | None:
        """Return what `codes` says; a file, or a table of Arrow, is read once."""
        if codes is None:
            return None
        key = codes
        if isinstance(codes, str | Path):
            file = Path(codes)
            file = file / "metadata" / "codes.parquet" if file.is_dir() else file
            key = file.absolute(), stamp(file)
        if self._named is not None:  # tables are compared by `is`: equality would read them
            last = self._named[0]
            if key is last or (isinstance(key, tuple) and key == last):
                return self._named[1]
        if isinstance(codes, str | Path):
            read = CodeTable.open(file)
        else:
            read = CodeTable.of_table(as_table(codes, "codes"), Path("the table of codes"))
        if isinstance(key, tuple | pa.Table):  # a frame of another library may change
            self._named = key, read
        return read

    def _text(self, ids_T: np.ndarray) -> str:
        if self.record.get("data_format") == "codes":
            return "\n".join(self.tokenizer.convert_ids_to_tokens(ids_T.tolist()))
        return str(self.tokenizer.decode(ids_T.tolist(), clean_up_tokenization_spaces=False))

    def _products(self) -> AbstractContextManager:
        """Compute products by what the run did, so that embeddings are those of its probes."""
        return recorded(self.record.get("matmul"), self.device)


def _require_tokens(tokens: int) -> None:
    if tokens < 64:  # as of the command: none at all would embed no node, and say so
        raise ValueError(f"`tokens` must be at least 64, got {tokens}")


def load(
    folder: str | Path,
    *,
    revision: str | None = None,
    path: str | Path | None = None,
    codes: Any = None,
    device: str = "auto",
) -> Embedder:
    """Load a trained model: `final` in a run folder, or one of the folders under `best`.

    Args:
        folder: the model's folder; or `owner/name` or `owner/name@revision` of the Hugging Face
            Hub, whose files are downloaded once and verified. No network is asked about a folder.
        revision: of the Hub, a commit, tag or branch; None for the newest commit.
        path: of a LoRA adapter, the folder or hub name of its backbone, if that is no longer where
            it was during training. Its weights are compared with those of the run.
        codes: what `codes` of the methods is where a call has none, see `Embedder.embed`.
        device: `cpu`, `cuda`, `cuda:1`, or `auto`, the first GPU or else the CPU.

    Raises:
        ValueError: the folder is no trained model or is damaged, or its backbone is missing or
            another; or there is no such model on the Hub, or no way there.
    """
    where = None if path is None else str(path)
    return Embedder(fetched(folder, revision), choose_device(device), where, codes)


def _on_codes(counts: Counter[str]) -> str:
    """Return a warning about events whose codes the model does not know; "" without one.

    Args:
        counts: of a serializer, of the events that were read.
    """
    num_events = sum(counts[rung] for rung in RUNGS)  # none in text, which writes any code
    if counts[RUNGS[SECTION]] <= _MOST_UNKNOWN * num_events:
        return ""
    return (
        "of more than nine in ten of these events the model knows neither the code nor one near "
        "it, and reads no more than when they were and of which section; are they of another "
        "coding system than its training data?"
    )


def at_hand(
    folder: str | Path,
    path: str | Path | None = None,
    device: str = "auto",
    *,
    revision: str | None = None,
) -> Embedder:
    """Return what `load` gives, and the same object as long as the model's files stay.

    The last two are held. The Hub is asked about a name once.
    """
    with _LOADING:
        name = str(folder), revision
        model_folder = _FETCHED.get(name) or fetched(folder, revision)
        if not is_local(divided(name[0])[0]):
            _FETCHED[name] = model_folder
        manifest = model_folder.absolute() / MANIFEST
        key = manifest, stamp(manifest) if manifest.is_file() else None, path, device
        model = _AT_HAND.pop(key, None) or load(model_folder, path=path, device=device)
        _AT_HAND[key] = model
        while len(_AT_HAND) > _MOST_AT_HAND:
            del _AT_HAND[next(iter(_AT_HAND))]
    return model


def let_go() -> None:
    """Hold no model and no opened folder any longer."""
    with _LOADING:
        _AT_HAND.clear()
        _FETCHED.clear()
        _OPENED.clear()


def _of_pickle(folder: str, path: str | None, device: str, codes: Any, digest: str) -> Embedder:
    """Return the model that was pickled; a ValueError if another one lies in its place."""
    model = (
        load(folder, path=path, codes=codes, device=device)
        if codes is not None
        else at_hand(folder, path, device)
    )
    if model.digest != digest:
        raise ValueError(
            f"{folder} must hold the model that was pickled, with the digest {short(digest)}; it "
            f"holds another, {short(model.digest)}"
        )
    return model


def _opened(path: Path) -> MedsDataset:
    """Return the dataset of a folder, the one that was opened last as long as its files stay."""
    require_meds_folder(path)
    layout = find_files(path, need_train=False)
    files = dict.fromkeys(file for own in layout.files.values() for file in own)
    tables = (path / "metadata" / n for n in ("codes.parquet", "subject_splits.parquet"))
    known = [*files, *(table for table in tables if table.is_file())]
    state = path.absolute(), [(file, stamp(file)) for file in known]
    with _LOADING:
        if not _OPENED or _OPENED[0][0] != state:
            _OPENED[:] = [(state, MedsDataset.open(path, need_train=False))]
        return _OPENED[0][1]
