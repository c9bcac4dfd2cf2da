"""How far a value may be off because a sum is taken in another order: from the arithmetic alone.

The order changes with the number of threads, the vector instructions and the library, so an error
that was seen on one machine bounds nothing on another. What bounds it everywhere is this. Adding n
terms makes n roundings, each of at most u = eps/2 of the partial sum. Terms of random signs make
partial sums no larger, as a rule, than the result's own size (the root mean square over its
elements), and roundings of random signs: their sum has a standard deviation of at most u √n of that
size. Six standard deviations are passed by one element in 5e8; no test here has more than 1e7.
Where a value goes through several sums, their lengths add, since variances do. An implementation
that sums in blocks or in a tree is better than this, never worse.

A fault that these tests are for (a key left out, a mask off by one, a scale off by 1e-4) is larger
by a factor of ten and more than any allowance that follows.
"""

import math

import torch
from smbkernels import Segments
from smbkernels.attention import visible
from torch import Tensor

SIGMAS = 6


def rounding(*lengths: float, size: float = 1.0, dtype: torch.dtype = torch.float32) -> float:
    """What a value may be off after sums of these lengths, one after the other.

    Args:
        lengths: terms of each sum, or roundings of a chain of other operations.
        size: of the partial sums, relative to what the tolerance is held against.
        dtype: in which sums are taken.
    """
    return SIGMAS * torch.finfo(dtype).eps / 2 * math.sqrt(sum(lengths)) * size


def attention_rounding(lse_HT: Tensor, packed: Segments, C: int, R: int) -> float:
    """What attention in fp32 may be off, relative to the root mean square of its result.

    A score is a sum of C products, and its absolute error is the relative error of its probability:
    u √C times the size of a score. Softmax gives weight to the largest scores of a row, whose size
    the log-sum-exp has. Backward computes scores again, and two more sums of C products of the size
    of the result (grad_out . value, grad_out . out). Last comes a sum over the keys of a query, or
    over all queries of a key.

    Args:
        lse_HT: exact log-sum-exp.
        C: head dim.
        R: query heads of a key head.
    """
    score = max(1.0, float(lse_HT.square().mean().sqrt()))
    seen_TT = visible(packed)
    keys, queries = int(seen_TT.sum(1).max()), R * int(seen_TT.sum(0).max())
    return rounding(2 * C * score**2, 2 * C, max(keys, queries))


def logits_size(hidden_ND: Tensor, weight_VD: Tensor) -> float:
    """Root mean square of the largest logit of each row: the one that softmax gives weight to."""
    largest_N = (hidden_ND.double() @ weight_VD.double().T).abs().amax(1)
    return max(1.0, float(largest_N.square().mean().sqrt()))
