"""Cross-entropy of the head in chunks of rows: the logits of all rows are never held.

A chunk of logits is made, turned into its gradient in place, multiplied into the gradients that are
wanted, and overwritten by the next. Nothing is read back to the host.

C rows of a chunk; the rest as in the operation.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from smbkernels.cross_entropy.op import Launch, chunk_rows, one_pass, wide
from smbkernels.matmul.products import forced, padded, times

# (logits [C, V], which become their gradient; label [C, 1]; log-probability of the label [C, 1],
# which is written; a buffer like the logits; whether the gradient is needed)
Gradient = Callable[[Tensor, Tensor, Tensor, Tensor, bool], None]


def missing(device: str) -> str | None:
    """It runs wherever torch does."""
    return None


def in_chunks(gradient_: Gradient, *, widens: bool) -> Launch:
    """The launch of `one_pass`, with this way from logits to their gradient.

    Args:
        widens: whether the buffer is one of its own, in fp32, where logits are narrower.
    """

    def launch(
        hidden_ND: Tensor,
        weight_VD: Tensor,
        label_N: Tensor,
        token_R: Tensor | None,
        token_weight_RD: Tensor | None,
        scale: float,
        needs_hidden: bool,
        needs_weight: bool,
        needs_tokens: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (N, D), V = hidden_ND.shape, weight_VD.shape[0]
        dtype, sums = hidden_ND.dtype, wide(hidden_ND.dtype)
        head_VD, label_N1 = weight_VD.to(dtype), label_N.contiguous()[:, None]
        token_RD = None if token_weight_RD is None else token_weight_RD.to(dtype)
        dhidden_ND = hidden_ND.new_empty((N, D) if needs_hidden else (0,))
        dweight_VD = hidden_ND.new_zeros((V, D) if needs_weight else (0,), dtype=sums)
        token_shape = token_RD.shape if needs_tokens and token_RD is not None else (0,)
        dtoken_RD = hidden_ND.new_zeros(token_shape, dtype=sums)
        log_p_N1 = hidden_ND.new_empty((N, 1), dtype=sums)
        needs_grad = needs_hidden or needs_weight or needs_tokens
        C = chunk_rows(N, D, V, hidden_ND.device.type)
        logits_CV = hidden_ND.new_empty((C, V))
        is_wide = widens and dtype != sums
        buffer_CV = logits_CV.new_empty((C, V), dtype=sums) if is_wide else logits_CV
        for start in range(0, N, max(C, 1)):
            chunk = slice(start, min(start + C, N))
            hidden_CD = hidden_ND[chunk]
            dz_PV = dz_CV = spare_CV = logits_CV[: len(hidden_CD)]  # gives back the last chunk's
            dz_PV = _logits(hidden_CD, head_VD, dz_PV)
            dz_CV = dz_PV[: len(hidden_CD)]
            spare_CV = buffer_CV[: len(hidden_CD)] if is_wide else dz_CV
            if token_R is not None and token_RD is not None:
                dz_CV.index_copy_(1, token_R, hidden_CD @ token_RD.t())
            gradient_(dz_CV, label_N1[chunk], log_p_N1[chunk], spare_CV, needs_grad)
            if not needs_grad:
                continue
            # `scale` comes with the products: it costs no pass here
            if token_R is not None:
                dz_CR = dz_CV.index_select(1, token_R)
                dz_CV.index_fill_(1, token_R, 0)
            if needs_hidden:
                _times_head(dhidden_ND[chunk], dz_PV, head_VD, scale)
                if token_RD is not None:
                    dhidden_ND[chunk].addmm_(dz_CR, token_RD, alpha=scale)
            if needs_tokens:
                _add_product(dtoken_RD, dz_CR, hidden_CD, scale)
            if needs_weight:
                _add_product(dweight_VD, dz_CV, hidden_CD, scale)
        dtoken_RD = dtoken_RD.to(dtype if token_weight_RD is None else token_weight_RD.dtype)
        return log_p_N1.sum() * -scale, dhidden_ND, dweight_VD.to(weight_VD.dtype), dtoken_RD

    return launch


def _gradient_(
    logits_CV: Tensor, label_C1: Tensor, log_p_C1: Tensor, buffer_CV: Tensor, needs_grad: bool
) -> None:
    if buffer_CV.dtype != logits_CV.dtype:
        buffer_CV.copy_(logits_CV)
    torch.log_softmax(buffer_CV, 1, out=buffer_CV)
    torch.gather(buffer_CV, 1, label_C1, out=log_p_C1)
    if needs_grad:
        torch.exp(buffer_CV, out=logits_CV)
        logits_CV.scatter_(1, label_C1, log_p_C1.expm1().to(logits_CV.dtype))


def _logits(hidden_CD: Tensor, head_VD: Tensor, out_CV: Tensor) -> Tensor:
    """hidden head' in `out_CV`; by oneDNN a tensor of its own, with the rows that `padded` adds."""
    if forced(hidden_CD):
        return times(padded(hidden_CD), head_VD.t())
    return torch.mm(hidden_CD, head_VD.t(), out=out_CV)


def _times_head(out_CD: Tensor, dz_PV: Tensor, head_VD: Tensor, scale: float) -> None:
    """out = scale dz head, of as many rows as `out_CD` has."""
    if forced(dz_PV):
        torch.mul(times(dz_PV, head_VD)[: len(out_CD)], scale, out=out_CD)
    else:
        out_CD.addmm_(dz_PV, head_VD, beta=0, alpha=scale)


def _add_product(total_VD: Tensor, dz_CV: Tensor, hidden_CD: Tensor, scale: float) -> None:
    """total += scale dz' hidden, rounded to the dtype of the total alone."""
    if total_VD.dtype == dz_CV.dtype:
        total_VD.addmm_(dz_CV.t(), hidden_CD, alpha=scale)
    elif total_VD.device.type == "cuda":
        factors = (total_VD, dz_CV.t(), hidden_CD)
        torch.addmm(*factors, out_dtype=total_VD.dtype, alpha=scale, out=total_VD)
    else:
        total_VD.addmm_(dz_CV.t().to(total_VD.dtype), hidden_CD.to(total_VD.dtype), alpha=scale)


_launch = in_chunks(_gradient_, widens=True)
linear_cross_entropy = one_pass("chunked", _launch)
