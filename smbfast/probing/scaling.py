"""Scales the features of a linear probe, on train alone and without a copy of them.

Dense features are standardised; sparse ones are divided by their largest absolute value, or, where
that is asked for, standardised too. A probe works on `(x - shift) * factor`, and never holds it:
shift and factor go into its weights. The shift changes nothing but an intercept, which no penalty
holds; with it, weights and intercept hardly depend on each other. Shape suffixes: N rows, F
features, C rows of a chunk, E entries of a sparse matrix.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix, diags, issparse

from smbfast.probing.features import Features, Gapped, Rows
from smbfast.probing.ridge import Basis

_MOST, _SAMPLE = 1024, 50_000  # features and rows for `directions`: our choice
_FLAT = 1e-6  # of the mean: a deviation that ten roundings of float32 make is no spread


@dataclass(frozen=True)
class Scaling:
    """A scaled feature is `(x - shift_F) * factor_F` (float64); factor 0 where train has no spread,
    so that such a feature says nothing."""

    shift_F: np.ndarray
    factor_F: np.ndarray

    def weights(self, weight_F: np.ndarray) -> tuple[np.ndarray, float]:
        """Return the weights of the features as they are, and what is to be added to the score, for
        weights of the scaled features."""
        own_F = weight_F * self.factor_F
        return own_F, -float(self.shift_F @ own_F)

    def gradient(self, product_F: np.ndarray, total: float) -> np.ndarray:
        """Return the gradient by the weights of the scaled features, of the products and the sum of
        the errors (`errors @ features`, `errors.sum()`)."""
        return (product_F - self.shift_F * total) * self.factor_F


def chunks(feature_NF: Features) -> Iterator[tuple[slice, np.ndarray | csr_matrix]]:
    """Yield which rows and their values; all at once where they are in memory."""
    assert not isinstance(feature_NF, Gapped)  # of which a linear model could make nothing
    if isinstance(feature_NF, Rows):
        yield from feature_NF.chunks()
    else:
        yield slice(0, feature_NF.shape[0]), feature_NF


def scaling(feature_NF: Features, *, standardise: bool = False) -> Scaling:
    """Return the scaling that the rows given (those of train, at least one) decide.

    Args:
        standardise: whether sparse features are standardised as well.
    """
    num_rows, num_features = feature_NF.shape
    if issparse(feature_NF):
        if standardise:
            return _standardised(feature_NF)
        own_NF = csr_matrix(feature_NF)
        largest_F = np.asarray(abs(own_NF).max(0).todense(), np.float64).ravel()
        shift_F = np.bincount(own_NF.indices, own_NF.data, minlength=num_features) / num_rows
        return Scaling(shift_F, _inverse(largest_F, largest_F > 0))
    shift_F, square_F = np.zeros(num_features), np.zeros(num_features)
    for _, chunk_CF in chunks(feature_NF):
        shift_F += chunk_CF.sum(0) / num_rows
    for _, chunk_CF in chunks(feature_NF):
        square_F += np.square(chunk_CF - shift_F).sum(0) / num_rows
    spread_F = np.sqrt(square_F)
    return Scaling(shift_F, _inverse(spread_F, spread_F > _FLAT * np.abs(shift_F)))


def _standardised(feature_NF: csr_matrix) -> Scaling:
    """Return the scaling of sparse features to mean 0 and deviation 1, zeros counted."""
    num_rows, num_features = feature_NF.shape
    column_E, value_E = feature_NF.indices, feature_NF.data
    shift_F = np.bincount(column_E, value_E, minlength=num_features) / num_rows
    far_E = np.square(value_E - shift_F[column_E])
    zeros_F = num_rows - np.bincount(column_E, minlength=num_features)
    square_F = np.bincount(column_E, far_E, minlength=num_features) + zeros_F * shift_F**2
    spread_F = np.sqrt(square_F / num_rows)
    return Scaling(shift_F, _inverse(spread_F, spread_F > _FLAT * np.abs(shift_F)))


def directions(feature_NF: Features, scaled: Scaling, curvature_N: np.ndarray) -> Basis | None:
    """Return the directions in which scaled features vary together, of at most 50,000 rows evenly
    spaced, with their variance when each row weighs its curvature.

    None where features are more than 1,024, of which the directions cost more than they save.
    """
    num_rows, num_features = feature_NF.shape
    if num_features > _MOST:
        return None
    chosen = np.arange(0, num_rows, -(-num_rows // _SAMPLE))
    product_FF = np.zeros((num_features, num_features))
    for part, chunk_CF in chunks(feature_NF[chosen]):
        product_FF += _product(chunk_CF, scaled, curvature_N[chosen][part])
    variance_F, turn_FF = np.linalg.eigh(product_FF / len(chosen))
    # none is taken for smaller than what rounding leaves of it
    least = 1e-12 * max(float(variance_F[-1]), 1e-300)
    return Basis(turn_FF, np.maximum(variance_F, least))


def _product(
    chunk_CF: np.ndarray | csr_matrix, scaled: Scaling, weight_C: np.ndarray
) -> np.ndarray:
    """Return the products of scaled features, summed over weighted rows: float64 [F, F]."""
    if not issparse(chunk_CF):
        own_CF = (chunk_CF - scaled.shift_F) * scaled.factor_F
        return own_CF.T @ (own_CF * weight_C[:, None])
    # the shift is taken from the sums: shifted, sparse features would be dense
    sum_F, shift_F = weight_C @ chunk_CF, scaled.shift_F
    cross_FF = np.outer(sum_F - weight_C.sum() * shift_F / 2, shift_F)
    product_FF = (chunk_CF.T @ (diags(weight_C) @ chunk_CF)).toarray() - cross_FF - cross_FF.T
    return product_FF * np.outer(scaled.factor_F, scaled.factor_F)


def scores(feature_NF: Features, scaled: Scaling, weight_F: np.ndarray) -> np.ndarray:
    """Return the product of scaled features and weights for every row, float64 [N]."""
    own_F, offset = scaled.weights(weight_F)
    score_N = np.empty(feature_NF.shape[0])
    for part, chunk_CF in chunks(feature_NF):
        score_N[part] = chunk_CF @ own_F + offset
    return score_N


def _inverse(size_F: np.ndarray, moving_F: np.ndarray) -> np.ndarray:
    return np.divide(1.0, size_F, out=np.zeros_like(size_F), where=moving_F)
