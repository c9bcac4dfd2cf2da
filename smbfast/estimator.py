"""The embeddings of a trained model as a step of scikit-learn.

    risk = make_pipeline(
        smbfast.PatientEmbedder(model="runs/x/final", data="MEDS_FOLDER"),
        StandardScaler(),
        LogisticRegression(max_iter=1000),
    )
    risk.fit(nodes, outcome)  # nodes: a frame with subject_id and prediction_time

X is a table of decision nodes: what is known of a patient, `data`, is beside it, as the same
patients stand in many rows and folds. Each node is embedded once by a process, or once by all
processes that share a folder `cache`.

Legend: N rows of X, K distinct nodes, D width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import Any, Literal, get_args

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import Tags

import smbfast
from smbfast.base.claims import claimed
from smbfast.base.counts import of_whole
from smbfast.base.files import digest_of
from smbfast.data.meds import MedsDataset
from smbfast.data.moments import as_table, node_keys, nodes_at
from smbfast.probing.node_cache import NodeCache
from smbfast.serving import Embedder, Which, at_hand, let_go
from smbfast.settings import POOLS, Pool

Missing = Literal["error", "nan"]

_TOGETHER = 1 << 28  # bytes of embeddings by every pool that one forward may give: our choice
_MOST = 1 << 32  # bytes of caches in memory, beyond which those not used for longest go: our choice
_CACHES: dict[tuple[str, Pool], NodeCache] = {}
_FILLING = RLock()  # of threads; a model has one forward at a time


class PatientEmbedder(TransformerMixin, BaseEstimator):
    """Turn decision nodes into the embeddings of a trained model.

    It learns nothing from X or y, so it may be used without `fit`, and in a cross-validation no
    outcome reaches it. Rows of one patient belong in one fold: `GroupKFold` with `subject_id`.

    Equal to `python -m smbfast.embed` on the same nodes to the bit, if they are embedded at once;
    nodes that are embedded in several calls, as by folds, differ by rounding (2e-6 of the largest).

    Args:
        model: the folder of a trained model, its name on the Hugging Face Hub, or a model that
            `smbfast.load` gave.
        data: a MEDS folder, or its events as a table of pyarrow, pandas or polars. Of a table,
            scikit-learn makes a copy for each fold: a folder is better for many patients.
        codes: beside a table of events, see `Embedder.embed`.
        pool: `last`, `mean`, `layers` or `spread`; None pools as the run did for its own probes.
        encoder: `online`, or its EMA teacher `target`.
        missing: what becomes of rows that cannot be embedded, as their subject is not in the data
            or has no event by then: `error` refuses X and says how many; `nan` gives NaN.
        cache: a folder, made if it is missing and readable by you alone, in which embeddings stay
            for later sessions and for the processes of `n_jobs`. None holds them in memory, where
            each process has its own, until `clear_cache`.
        backbone: of an adapter, where its backbone is now, if not where it was in training.
        revision: of the Hub; None for the newest commit.
        device: `cpu`, `cuda`, `cuda:1`, or `auto`, the first GPU or else the CPU.
        tokens: the most tokens of a forward, as of the command.
    """

    def __init__(
        self,
        model: Any = None,
        data: Any = None,
        *,
        codes: Any = None,
        pool: Pool | None = None,
        encoder: Which = "online",
        missing: Missing = "error",
        cache: str | Path | None = None,
        backbone: str | Path | None = None,
        revision: str | None = None,
        device: str = "auto",
        tokens: int = 16384,
    ) -> None:
        self.model = model
        self.data = data
        self.codes = codes
        self.pool = pool
        self.encoder = encoder
        self.missing = missing
        self.cache = cache
        self.backbone = backbone
        self.revision = revision
        self.device = device
        self.tokens = tokens

    def fit(self, X: Any, y: Any = None) -> "PatientEmbedder":
        """Check the parameters and that X has its two columns; there is nothing to learn.

        Raises:
            ValueError: a parameter cannot be used, or X is no table of nodes.
        """
        self._require_parameters()
        node_keys(as_table(X, "X"), "X")
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Return the embeddings of nodes in the order of X, float32 [N, D].

        Args:
            X: a table of pyarrow, pandas or polars with subject_id and prediction_time, rows in
                any order, the same node as often as it is needed; further columns are not read.

        Raises:
            ValueError: a parameter or X cannot be used, or rows have no embedding and `missing`
                is `error`.
        """
        self._require_parameters()
        subject_N, time_N = node_keys(as_table(X, "X"), "X")
        model = self._loaded()
        pool: Pool = self.pool or model.record["pool"]
        dataset = model.dataset(self.data, self.codes)
        with _FILLING:
            made = self._filled(model, dataset, pool, subject_N, time_N)
            rows_ND = made.rows(subject_N, time_N)
        missing_N = np.isnan(rows_ND[:, 0])
        if missing_N.any() and self.missing == "error":
            _refuse(dataset, subject_N[missing_N], len(subject_N))
        return rows_ND

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Return `embedding_0`, `embedding_1` and so on, of type object [D]."""
        model = self._loaded()
        width = model.width(self.pool or model.record["pool"])
        return np.array([f"embedding_{i}" for i in range(width)], dtype=object)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.requires_fit, tags.no_validation = False, True
        tags.input_tags.two_d_array = False  # of numbers: X has times
        return tags

    def _require_parameters(self) -> None:
        for name, expected in (
            ("pool", (None, *POOLS)),
            ("encoder", get_args(Which)),
            ("missing", get_args(Missing)),
        ):
            if getattr(self, name) not in expected:
                words = ", ".join(map(str, expected))
                raise ValueError(f"`{name}` must be one of {words}, got {getattr(self, name)!r}")
        if not isinstance(self.model, str | Path | Embedder):
            raise ValueError(
                "`model` must be the folder of a trained model, or what smbfast.load returned, got "
                f"{type(self.model).__name__}"
            )
        if self.data is None:
            raise ValueError("`data` must be a MEDS folder or a table of its events, got None")

    def _cache_folder(self) -> Path | None:
        """Return the folder of `cache`, which is none of the data: all its parquet is events."""
        if self.cache is None:
            return None
        folder = Path(self.cache)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"`cache` must be a folder; {folder} is a file")
        if isinstance(self.data, str | Path):
            data = Path(self.data).resolve()
            if data in (folder.resolve(), *folder.resolve().parents):
                raise ValueError(
                    f"`cache` must be a folder outside of `data`, which is only read, got {folder}"
                )
        return folder

    def _loaded(self) -> Embedder:
        if isinstance(self.model, Embedder):
            return self.model
        return at_hand(self.model, self.backbone, self.device, revision=self.revision)

    def _filled(
        self,
        model: Embedder,
        dataset: MedsDataset,
        pool: Pool,
        subject_N: np.ndarray,
        time_N: np.ndarray,
    ) -> NodeCache:
        """Return the cache by `pool`, which has all these nodes."""
        key = digest_of(
            (model.digest, dataset.state(), self.encoder, self.tokens),
            (model.device.type, torch.__version__, smbfast.__version__),
        )
        folder = self._cache_folder()
        made = _cache_of(key, pool, model.width(pool), folder)
        if not made.lacks(subject_N, time_N).any():
            return made
        with _shared(folder, key):
            made.refresh()  # another process may have been here
            lacks_N = made.lacks(subject_N, time_N)
            if lacks_N.any():
                nodes = nodes_at(dataset, (subject_N[lacks_N], time_N[lacks_N]))
                widths = {p: model.width(p) for p in POOLS}
                num_bytes = 4 * len(nodes.subject_K) * sum(widths.values())
                pools = [pool] if num_bytes > _TOGETHER else list(POOLS)
                sinks, _ = model.embedded(
                    pools, dataset, nodes, encoder=self.encoder, tokens=self.tokens
                )
                for each, sink in sinks.items():
                    index_M, value_MD = sink.written()
                    value_KD = np.full((len(nodes.subject_K), widths[each]), np.nan, np.float32)
                    if len(index_M):
                        value_KD[index_M] = value_MD
                    cache = _cache_of(key, each, widths[each], folder)
                    cache.refresh()
                    cache.add(nodes.subject_K, nodes.time_K, value_KD)
        _bound(made)
        return made


def clear_cache() -> None:
    """Let go of the embeddings, models and opened folders that this process holds in memory."""
    with _FILLING:
        _CACHES.clear()
        let_go()


@contextmanager
def _shared(folder: Path | None, key: str) -> Iterator[None]:
    """Wait until no other process makes embeddings for the same cache."""
    if folder is None:
        yield
        return
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`cache` must be a folder for embeddings; {folder} is a file")
    if not folder.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with claimed(folder, key, wait=True):
        yield


def _cache_of(key: str, pool: Pool, width: int, folder: Path | None) -> NodeCache:
    """Return the cache of a model, data and pool, as the one used last."""
    file = None if folder is None else folder.absolute() / f"{key}-{pool}.parquet"
    where = (str(file or key), pool)
    made = _CACHES.pop(where, None) or NodeCache(width, file)
    _CACHES[where] = made
    return made


def _bound(made: NodeCache) -> None:
    """Let caches go that have not been used for longest, but for the one in use."""
    for where, cache in list(_CACHES.items()):
        if sum(c.nbytes for c in _CACHES.values()) <= _MOST:
            return
        if cache is not made:
            del _CACHES[where]


def _refuse(dataset: MedsDataset, subject_M: np.ndarray, num_rows: int) -> None:
    known = [dataset.subjects(split) for split in dataset.splits]
    unknown = int((~np.isin(subject_M, np.concatenate([np.empty(0, np.int64), *known]))).sum())
    none = len(subject_M)
    raise ValueError(
        f"every row of X must have an embedding, but {of_whole(none, num_rows)} of {num_rows:,} "
        f"have none: {of_whole(unknown, none)} of subjects that are not in `data`, "
        f"{of_whole(none - unknown, none)} at a time before the first event of their subject. "
        "missing='nan' gives them NaN"
    )
