"""Survival probe: Cox proportional hazards by lifelines on a few standardised components.

Scaler, components and regression are fitted on train alone. Shape suffixes: N rows, F features,
K components, C rows of a chunk.
"""

import warnings
from dataclasses import dataclass

import lifelines
import numpy as np
import pandas as pd
from lifelines.exceptions import ConvergenceError
from scipy.sparse import issparse
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.preprocessing import MaxAbsScaler

from smbfast.probing.features import Features, Rows, max_abs

RIDGE = 0.1  # lifelines' `penalizer`, on standardised components: our choice
EVENTS_PER_COMPONENT = 5  # fewer components where train has few events: our choice


@dataclass(frozen=True)
class CoxProbe:
    """risk_N float64: the log partial hazard of every row given (higher = earlier event)."""

    risk_N: np.ndarray
    components: int


def not_measurable(duration_N: np.ndarray, event_N: np.ndarray, split_N: np.ndarray) -> str | None:
    """Return why a time-to-event task cannot be measured, or None."""
    if not event_N[split_N == "train"].any():
        return "train has no event"
    held_out = split_N == "held_out"
    duration_N, event_N = duration_N[held_out], event_N[held_out]
    if not event_N.any():
        return "held_out has no event"
    first = duration_N[event_N].min()
    outlives = (duration_N > first) | ((duration_N == first) & ~event_N)
    return None if outlives.any() else "held_out has no two rows that can be compared"


def components(feature_NF: Features, split_N: np.ndarray, wanted: int, seed: int) -> np.ndarray:
    """Return at most `wanted` components of the features, float64 [N, K].

    They have mean 0 and deviation 1 on train. Features are first scaled by their largest absolute
    value, as in the binary probe. Dense features go through PCA, sparse ones through truncated SVD.
    A direction without spread on train is left out.
    """
    train = split_N == "train"
    if isinstance(feature_NF, Rows):
        return _standardised(_streamed_pca(feature_NF, train, wanted), train)
    scaled_NF = MaxAbsScaler().fit(feature_NF[train]).transform(feature_NF)
    rows, features = int(train.sum()), feature_NF.shape[1]
    num_components = max(1, min(wanted, rows - 1, features - issparse(feature_NF)))
    if issparse(feature_NF):
        reducer = TruncatedSVD(num_components, random_state=seed)
    else:
        reducer = PCA(num_components, random_state=seed)
    # features without any spread make it divide zero by zero for a ratio nobody reads
    with np.errstate(invalid="ignore", divide="ignore"):
        component_NK = reducer.fit(scaled_NF[train]).transform(scaled_NF)
    return _standardised(component_NK, train)


def _streamed_pca(feature_NF: Rows, train_N: np.ndarray, wanted: int) -> np.ndarray:
    """Return the leading principal components of features that lie in a file, [N, K].

    They are eigenvectors of the covariance on train, which is summed chunk by chunk in two passes.
    """
    train = feature_NF[train_N]
    rows, num_features = train.shape
    num_components = max(1, min(wanted, rows - 1, num_features))
    scale_F, mean_F = max_abs(train), np.zeros(num_features)
    for _, chunk_CF in train.chunks():
        mean_F += (chunk_CF / scale_F).sum(0) / rows
    product_FF = np.zeros((num_features, num_features))
    for _, chunk_CF in train.chunks():
        centred_CF = chunk_CF / scale_F - mean_F
        product_FF += centred_CF.T @ centred_CF
    _, axis_FF = np.linalg.eigh(product_FF)  # eigenvalues ascend
    axis_FK = axis_FF[:, ::-1][:, :num_components]
    component_NK = np.empty((len(train_N), num_components))
    for part, chunk_CF in feature_NF.chunks():
        component_NK[part] = (chunk_CF / scale_F - mean_F) @ axis_FK
    return component_NK


def _standardised(component_NK: np.ndarray, train: np.ndarray) -> np.ndarray:
    mean_K, spread_K = component_NK[train].mean(0), component_NK[train].std(0)
    moving_K = spread_K > 1e-9 * max(1.0, float(spread_K.max()))
    return (component_NK[:, moving_K] - mean_K[moving_K]) / spread_K[moving_K]


def probe_survival(
    feature_NF: Features,
    duration_N: np.ndarray,
    event_N: np.ndarray,
    split_N: np.ndarray,
    *,
    wanted: int,
    seed: int,
) -> CoxProbe:
    """Fit on train, and return the risk of every row.

    Raises:
        ValueError: the regression does not converge.
    """
    train = split_N == "train"
    allowed = max(1, int(event_N[train].sum()) // EVENTS_PER_COMPONENT)
    component_NK = components(feature_NF, split_N, min(wanted, allowed), seed)
    if component_NK.shape[1] == 0:
        return CoxProbe(np.zeros(len(duration_N)), 0)
    frame = pd.DataFrame(component_NK[train]).add_prefix("component")
    frame["duration"], frame["event"] = duration_N[train], event_N[train]
    with warnings.catch_warnings():
        # its warnings on separation and near-constant columns are answered by the ridge
        warnings.simplefilter("ignore")
        try:
            model = lifelines.CoxPHFitter(penalizer=RIDGE).fit(frame, "duration", "event")
        except (ConvergenceError, np.linalg.LinAlgError):
            raise ValueError("the Cox regression does not converge") from None
    return CoxProbe(component_NK @ model.params_.to_numpy(), component_NK.shape[1])
