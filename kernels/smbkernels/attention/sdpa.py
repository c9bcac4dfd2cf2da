"""Timeline attention on a CPU by torch alone: one or two dense parts per segment, no dense mask.

It computes what the C++ backend does not: fp64, fp16, and everything where there is no compiler.

A segment sees its own rows causally, and a branch the prefix of its trunk without a mask. Each part
goes through torch's flash attention for CPUs, in blocks; the two of a branch are merged by their
log-sum-exps l and m:

    lse = log(e^l + e^m)        out = out_l + w (out_m - out_l)        w = 1 / (1 + e^(l - m))

Backward is exact part by part: given the *merged* out and lse, the same kernel's backward computes
P = exp(scale q k' - lse) and dS = P (dout v' - dout . out), which is what the part's keys get. What
a trunk's keys receive is added in order of the segments.

Heads that share keys share them by a stride of 0; in the prefix part, which has no order, they are
further rows of one matrix. fp16 and bf16 are computed in fp32.

R query heads per key head, otherwise as in `op`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from smbkernels.attention.op import Inputs, forward_backward
from smbkernels.attention.op import timeline_attention as attention
from smbkernels.attention.segments import Segments

_ROWS = 256  # queries at a time where a part's scores are held, without the flash kernel


def missing(device: str) -> str | None:
    """Why it cannot run on this kind of device here, or None."""
    return None if device in ("cpu", "meta") else f"tensors are on {device}"


@dataclass(frozen=True)
class Part:
    """Dense attention of queries [B, H, L, C] to keys [B, H, P, C], any strides but the last.

    forward(query, key, value, causal, scale) -> out, lse [B, H, L]
    backward(grad_out, query, key, value, out, lse, causal, scale) -> grad of query, key, value
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _flash_forward(query, key, value, causal: bool, scale: float):
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(query, key, value, 0.0, causal, scale=scale)


def _flash_backward(grad_out, query, key, value, out, lse, causal: bool, scale: float):
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return flash(grad_out, query, key, value, out, lse, 0.0, causal, scale=scale)


def _plain_forward(query, key, value, causal: bool, scale: float):
    out, lse = torch.empty_like(query), query.new_empty(query.shape[:-1])
    for rows, keys, score in _scores(query, key, causal, scale):
        lse[..., rows] = torch.logsumexp(score, -1)
        out[..., rows, :] = torch.exp(score - lse[..., rows, None]) @ value[..., keys, :]
    return out, lse


def _plain_backward(grad_out, query, key, value, out, lse, causal: bool, scale: float):
    grad_query = torch.empty_like(query)
    grad_key, grad_value = key.new_zeros(key.shape), value.new_zeros(value.shape)
    delta = (grad_out * out).sum(-1, keepdim=True)
    for rows, keys, score in _scores(query, key, causal, scale):
        p, g = torch.exp(score - lse[..., rows, None]), grad_out[..., rows, :]
        grad_value[..., keys, :] += p.mT @ g
        p *= (g @ value[..., keys, :].mT - delta[..., rows, :]) * scale
        grad_query[..., rows, :] = p @ key[..., keys, :]
        grad_key[..., keys, :] += p.mT @ query[..., rows, :]
    return grad_query, grad_key, grad_value


def _scores(query: Tensor, key: Tensor, causal: bool, scale: float):
    """Blocks of query rows with the keys any of them sees, and their masked scores."""
    L, P = query.shape[2], key.shape[2]
    for first in range(0, L, _ROWS):
        rows = slice(first, min(first + _ROWS, L))
        keys = slice(0, rows.stop if causal else P)
        score = query[..., rows, :] @ key[..., keys, :].mT * scale
        if causal:
            seen = torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device).tril(first)
            score = score.masked_fill(~seen, -torch.inf)
        yield rows, keys, score


FLASH = Part(_flash_forward, _flash_backward)
PLAIN = Part(_plain_forward, _plain_backward)


def _forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return run_forward(part(), inputs)


def _backward(
    grad_out_THC: Tensor, out_THC: Tensor, lse_HT: Tensor, inputs: Inputs
) -> tuple[Tensor, ...]:
    return run_backward(part(), grad_out_THC, out_THC, lse_HT, inputs)


def run_forward(part: Part, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Outputs [T, H, C] and log-sum-exp [H, T]."""
    query_THC, key_TGC, value_TGC, host_S6, scale = inputs
    T, H, C = query_THC.shape
    G = key_TGC.shape[1]
    query, key, value = _wide(query_THC), _wide(key_TGC), _wide(value_TGC)
    out_THC, lse_HT = query.new_empty(T, H, C), query.new_empty(H, T)
    query_GRTC, out_GRTC = _grouped(query, G), _grouped(out_THC, G)
    key_GRTC, value_GRTC = _shared(key, H // G), _shared(value, H // G)
    lse_GRT = lse_HT.view(G, H // G, T)
    for start, length, trunk_start, prefix, _, _ in host_S6.tolist():
        own = [x.narrow(2, start, length) for x in (query_GRTC, key_GRTC, value_GRTC)]
        out, lse = part.forward(*own, True, scale)
        if prefix:
            seen = [x.narrow(2, trunk_start, prefix)[:, :1] for x in (key_GRTC, value_GRTC)]
            far_out, far_lse = part.forward(_as_rows(own[0]), *seen, False, scale)
            far_out, far_lse = far_out.reshape(own[0].shape), far_lse.reshape(lse.shape)
            out = torch.lerp(out, far_out, torch.sigmoid(far_lse - lse).unsqueeze(-1))
            lse = torch.logaddexp(lse, far_lse)
        out_GRTC.narrow(2, start, length).copy_(out)
        lse_GRT.narrow(2, start, length).copy_(lse)
    return out_THC.to(query_THC.dtype), lse_HT


def run_backward(
    part: Part, grad_out_THC: Tensor, out_THC: Tensor, lse_HT: Tensor, inputs: Inputs
) -> tuple[Tensor, ...]:
    """Gradients of query, key and value."""
    query_THC, key_TGC, value_TGC, host_S6, scale = inputs
    (T, H, _), G = query_THC.shape, key_TGC.shape[1]
    query, key, value = _wide(query_THC), _wide(key_TGC), _wide(value_TGC)
    grads = [torch.empty_like(query, memory_format=torch.contiguous_format)]
    grads += [x.new_zeros(x.shape) for x in (key, value)]
    rows = [_grouped(x, G) for x in (_wide(grad_out_THC), query, _wide(out_THC), grads[0])]
    key_GRTC, value_GRTC = _shared(key, H // G), _shared(value, H // G)
    grad_key_GTC, grad_value_GTC = (x.transpose(0, 1) for x in grads[1:])
    lse_GRT = lse_HT.view(G, H // G, T)
    for start, length, trunk_start, prefix, _, _ in host_S6.tolist():
        grad, q, out, grad_query = (x.narrow(2, start, length) for x in rows)
        lse = lse_GRT.narrow(2, start, length)
        k, v = (x.narrow(2, start, length) for x in (key_GRTC, value_GRTC))
        dq, dk, dv = part.backward(grad, q, k, v, out, lse, True, scale)
        grad_query.copy_(dq)
        grad_key_GTC.narrow(1, start, length).add_(dk.sum(1))
        grad_value_GTC.narrow(1, start, length).add_(dv.sum(1))
        if prefix:
            k, v = (x.narrow(2, trunk_start, prefix)[:, :1] for x in (key_GRTC, value_GRTC))
            far = (_as_rows(grad), _as_rows(q), k, v, _as_rows(out))
            far_lse = lse.reshape(G, 1, -1)
            dq, dk, dv = part.backward(*far, far_lse, False, scale)
            grad_query.add_(dq.reshape(q.shape))
            grad_key_GTC.narrow(1, trunk_start, prefix).add_(dk.squeeze(1))
            grad_value_GTC.narrow(1, trunk_start, prefix).add_(dv.squeeze(1))
    return tuple(x.to(query_THC.dtype) for x in grads)


def _wide(x: Tensor) -> Tensor:
    """At least fp32, heads contiguous."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x if x.stride(-1) == 1 else x.contiguous()


def _grouped(x_THC: Tensor, groups: int) -> Tensor:
    """A view [G, R, T, C]."""
    return x_THC.unflatten(1, (groups, -1)).permute(1, 2, 0, 3)


def _shared(x_TGC: Tensor, heads: int) -> Tensor:
    """A view [G, R, T, C] in which R has stride 0."""
    return x_TGC.transpose(0, 1).unsqueeze(1).expand(-1, heads, -1, -1)


def _as_rows(x_GRLC: Tensor) -> Tensor:
    """A copy [G, 1, R * L, C]."""
    return x_GRLC.flatten(1, 2).unsqueeze(1)


@functools.cache
def part() -> Part:
    """The flash kernel of this torch where it keeps what is asked of it, else plain products.

    The kernel is not a public function: it is tried once on a trunk with a branch.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = ((7, 2, 8), (7, 1, 8), (7, 1, 8), (7, 2, 8))
    q, k, v, grad = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    columns = ([0, 4], [4, 3], [0, 0], [0, 3])
    host_S6 = Segments.of(*(torch.tensor(c) for c in columns)).host_S6
    inputs = Inputs(q, k, v, host_S6, 0.3)
    results = []
    for one in (PLAIN, FLASH):
        try:
            out, lse = run_forward(one, inputs)
            grads = run_backward(one, grad, out, lse, inputs)
        except (AttributeError, RuntimeError, TypeError):
            return PLAIN
        results.append(torch.cat([x.flatten() for x in (out, lse, *grads)]))
    return FLASH if torch.allclose(results[0], results[1], rtol=1e-9, atol=1e-9) else PLAIN


timeline_attention = forward_backward("sdpa", _forward, _backward)
timeline_attention.__doc__ = attention.__doc__
