"""A varlen attention engine that runs on a CPU: causal, aligned bottom right, in plain products.

H query heads, G key heads, R query heads per key head, L queries and P keys of a sequence.
"""

import torch
from smbkernels import timeline_attention
from smbkernels.attention.engines import Engine

from tests.ops.layouts import inputs, outcome


def parts(query, key, cu_q, cu_k, scale):
    """Of each sequence: its rows, its keys, and the masked scores [G, R, L, P]."""
    H, G = query.shape[1], key.shape[1]
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        rows, keys = slice(int(a), int(b)), slice(int(c), int(d))
        q = query[rows].unflatten(1, (G, H // G))
        score = torch.einsum("qgrc,kgc->grqk", q, key[keys]) * scale
        L, P = score.shape[-2:]
        seen = torch.ones(L, P, dtype=torch.bool).tril(P - L)
        yield rows, keys, score.masked_fill(~seen, -torch.inf)


def forward(query, key, value, cu_q, cu_k, max_q, max_k, scale):
    check_bounds(query, key, cu_q, cu_k, max_q, max_k)
    out, lse = torch.empty_like(query), query.new_empty(query.shape[1], len(query))
    for rows, keys, score in parts(query, key, cu_q, cu_k, scale):
        lse[:, rows] = torch.logsumexp(score, -1).flatten(0, 1)
        weighted = torch.einsum("grqk,kgc->qgrc", score.softmax(-1), value[keys])
        out[rows] = weighted.flatten(1, 2)
    return out, lse


def backward(grad_out, query, key, value, out, lse, cu_q, cu_k, max_q, max_k, scale):
    check_bounds(query, key, cu_q, cu_k, max_q, max_k)
    assert grad_out.is_contiguous() and out.is_contiguous() and lse.is_contiguous()
    H, G = query.shape[1], key.shape[1]
    grads = [torch.empty_like(x) for x in (query, key, value)]
    for rows, keys, score in parts(query, key, cu_q, cu_k, scale):
        q, g, o = (x[rows].unflatten(1, (G, H // G)) for x in (query, grad_out, out))
        p = torch.exp(score - lse[:, rows].unflatten(0, (G, H // G))[..., None])
        ds = torch.einsum("qgrc,kgc->grqk", g, value[keys])
        ds = p * (ds - (g * o).sum(-1).permute(1, 2, 0)[..., None]) * scale
        grads[0][rows] = torch.einsum("grqk,kgc->qgrc", ds, key[keys]).flatten(1, 2)
        grads[1][keys] = torch.einsum("grqk,qgrc->kgc", ds, q)
        grads[2][keys] = torch.einsum("grqk,qgrc->kgc", p, g)
    return tuple(grads)


def check_bounds(query, key, cu_q, cu_k, max_q, max_k):
    for rows, cu, longest in ((query, cu_q, max_q), (key, cu_k, max_k)):
        assert cu.dtype == torch.int32 and cu.is_contiguous() and cu[0] == 0
        assert int(cu[-1]) == len(rows) and int(cu.diff().max()) == longest
        assert int(cu.diff().min()) > 0
    assert bool((cu_k.diff() >= cu_q.diff()).all())


EMULATED = Engine("emulated", forward, backward)


def assert_exact(function, packed, H=4, G=2, C=16):
    given = inputs(packed.tokens, H, G, C, torch.float64)
    exact = outcome(timeline_attention.reference, given, packed, scale=0.3)
    for ours, truth in zip(outcome(function, given, packed, scale=0.3), exact, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-11)
