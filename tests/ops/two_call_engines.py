"""Engines of the two-call decompositions that run on a CPU, in plain products.

Each is as strict as the library whose place it takes, and leaves NaN where that one writes nothing.

H query heads, G key heads, R query heads per key head, B sequences of one length, L queries and P
keys of a sequence.
"""

from itertools import pairwise

import torch
from smbkernels.attention.engines import Engine


def scores(query, key, causal, scale):
    """[G, R, L, P], masked: query j sees keys up to j where it is causal."""
    H, G = query.shape[1], key.shape[1]
    score = torch.einsum("qgrc,kgc->grqk", query.unflatten(1, (G, H // G)), key) * scale
    if causal:
        L, P = score.shape[-2:]
        assert L == P, "a mask of other sequences depends on where it is aligned"
        score = score.masked_fill(~torch.ones(L, P, dtype=torch.bool).tril(), -torch.inf)
    return score


def one_forward(query, key, value, causal, scale):
    score = scores(query, key, causal, scale)
    out = torch.einsum("grqk,kgc->qgrc", score.softmax(-1), value).flatten(1, 2)
    return out, torch.logsumexp(score, -1).flatten(0, 1)


def one_backward(grad_out, query, key, value, out, lse, causal, scale):
    groups = (key.shape[1], query.shape[1] // key.shape[1])
    q, g, o = (x.unflatten(1, groups) for x in (query, grad_out, out))
    p = torch.exp(scores(query, key, causal, scale) - lse.unflatten(0, groups)[..., None])
    ds = torch.einsum("qgrc,kgc->grqk", g, value)
    ds = p * (ds - (g * o).sum(-1).permute(1, 2, 0)[..., None]) * scale
    grad_query = torch.einsum("grqk,kgc->qgrc", ds, key).flatten(1, 2)
    return grad_query, torch.einsum("grqk,qgrc->kgc", ds, q), torch.einsum("grqk,qgrc->kgc", p, g)


def wide(*tensors):
    return tuple(x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)


def ragged_forward(query, key, value, cu_q, cu_k, max_q, max_k, causal, scale):
    check(query, key, cu_q, cu_k, max_q, max_k)
    out = torch.full_like(query, torch.nan)
    lse = wide(out)[0].new_full(out.shape[:2], torch.nan).T.contiguous()
    for rows, keys in sequences(cu_q, cu_k):
        if rows.stop > rows.start:
            tensors = wide(query[rows], key[keys], value[keys])
            out[rows], lse[:, rows] = one_forward(*tensors, causal, scale)
    return out, lse


def ragged_backward(grad_out, query, key, value, out, lse, cu_q, cu_k, max_q, max_k, causal, scale):
    check(query, key, cu_q, cu_k, max_q, max_k)
    assert out.is_contiguous() and grad_out.is_contiguous() and lse.is_contiguous()
    grads = [torch.full_like(x, torch.nan) for x in (query, key, value)]
    for rows, keys in sequences(cu_q, cu_k):
        if rows.stop > rows.start:
            tensors = wide(grad_out[rows], query[rows], key[keys], value[keys], out[rows])
            parts = one_backward(*tensors, lse[:, rows], causal, scale)
            for grad, r, part in zip(grads, (rows, keys, keys), parts, strict=True):
                grad[r] = part.to(grad.dtype)
    return tuple(grads)


def sequences(cu_q, cu_k):
    for q, k in zip(*(pairwise(cu) for cu in (cu_q, cu_k)), strict=True):
        yield slice(*map(int, q)), slice(*map(int, k))


def check(query, key, cu_q, cu_k, max_q, max_k):
    for rows, cu, longest, least in ((query, cu_q, max_q, 0), (key, cu_k, max_k, 1)):
        assert cu.dtype == torch.int32 and cu.is_contiguous() and cu[0] == 0
        assert int(cu[-1]) == len(rows) and int(cu.diff().max()) == longest
        assert int(cu.diff().min()) >= least
        assert rows.stride(-1) == 1


def dense_forward(query, key, value, causal, scale):
    outs, lses = [], []
    check_dense(query, key, value)
    for tensors in zip(*wide(query, key, value), strict=True):
        out, lse = one_forward(*(x.transpose(0, 1) for x in tensors), causal, scale)
        outs.append(out)
        lses.append(lse)
    return torch.stack(outs).to(query.dtype).transpose(1, 2), torch.stack(lses)


def dense_backward(grad_out, query, key, value, out, lse, causal, scale):
    check_dense(grad_out, query, key, value, out)
    results = []
    for *tensors, one in zip(*wide(grad_out, query, key, value, out), lse, strict=True):
        turned = (x.transpose(0, 1) for x in tensors)
        results.append(one_backward(*turned, one, causal, scale))
    parts = zip(*results, strict=True)
    return tuple(torch.stack(x).to(query.dtype).transpose(1, 2) for x in parts)


def check_dense(*tensors):
    """Views of contiguous [B, L, N, C], so that plans cached by strides fit; no length of 1."""
    for x in tensors:
        assert x.transpose(1, 2).is_contiguous() and x.shape[2] > 1


RAGGED = Engine("ragged", ragged_forward, ragged_backward)
DENSE = Engine("dense", dense_forward, dense_backward)
