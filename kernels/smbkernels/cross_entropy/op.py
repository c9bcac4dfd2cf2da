"""Summed cross-entropy of `hidden @ weight.T` at labelled rows, some rows of the head replaced.

    z_nv = hidden_n . weight_v, or hidden_n . token_weight_r for v = token_r
    L    = scale * sum_n (logsumexp_v(z_nv) - z_n,label_n)

    dz_nv   = exp(z_nv - logsumexp_v(z_nv)) - [v = label_n]
    dhidden = scale dz weight    dweight = scale dz' hidden, and 0 in the rows of token_R

and so for token_weight, with the columns of dz that are its own.

N labelled tokens, D width, V vocabulary, R rows of the head that are trained on their own.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from smbkernels.autograd import autocast_dtype, scaled
from smbkernels.operation import Backend, op

# rows of a chunk: below, products wait for the head to be read, and on a GPU the gradient of the
# hidden states has fewer tiles than there are multiprocessors
LEAST, LEAST_ON_CUDA, MOST = 512, 2048, 2048


def head_flops(
    N: int, D: int, V: int, R: int = 0, *, hidden: bool, weight: bool, tokens: bool
) -> int:
    """Of the matrix products: logits, and the gradients that are wanted."""
    return 2 * N * D * (V * (1 + hidden + weight) + R * (1 + hidden + tokens))


def _flops(
    hidden_ND: Tensor, weight_VD: Tensor, label_N: Tensor, token_R: Tensor | None = None, *_, **__
) -> int:
    (N, D), R = hidden_ND.shape, 0 if token_R is None else len(token_R)
    return head_flops(N, D, weight_VD.shape[0], R, hidden=False, weight=False, tokens=False)


def _fits_triton(hidden_ND: Tensor, *_args, **_kwargs) -> str | None:
    """Softmax is computed in fp32 there."""
    if hidden_ND.dtype not in (torch.float32, torch.bfloat16):
        return f"hidden_ND must be fp32 or bf16, got {hidden_ND.dtype}"
    return None


@op(
    Backend("triton", "cross_entropy.triton", ("cuda",), _fits_triton),
    Backend("chunked", "cross_entropy.chunked", ("cuda", "cpu")),
    flops=_flops,
)
def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    label_N: Tensor,
    token_R: Tensor | None = None,
    token_weight_RD: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> Tensor:
    """The scaled sum over rows, a scalar of at least fp32; every row is labelled.

    Args:
        hidden_ND: fp32, bf16 or fp64; products of matrices are in this dtype.
        weight_VD: the head.
        label_N: int64, in [0, V).
        token_R: int64, rows of the head, each once, that `token_weight_RD` stands in for: new
            tokens that are trained beside a frozen head.
        token_weight_RD: their weights.
        scale: of loss and gradients, such as w_sft / labelled tokens of the step; given here, not
            multiplied after, the gradients are complete in one pass, and rounded once.
    """
    logits_NV = F.linear(hidden_ND, weight_VD.to(hidden_ND.dtype))
    if token_R is not None:
        assert token_weight_RD is not None, "token_weight_RD is given with token_R"
        own_NR = F.linear(hidden_ND, token_weight_RD.to(hidden_ND.dtype))
        logits_NV = logits_NV.index_copy(1, token_R, own_NR)
    if logits_NV.dtype.itemsize < 4:
        logits_NV = logits_NV.float()
    return F.cross_entropy(logits_NV, label_N, reduction="sum") * scale


Launch = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


def one_pass(backend: str, launch: Launch) -> Callable[..., Tensor]:
    """The operation on a backend that computes loss and gradients in one pass.

    Args:
        launch: (hidden, weight, label, token, token_weight, scale, needs_hidden, needs_weight,
            needs_tokens) -> the loss and the gradients of hidden, weight and token_weight, each
            like its tensor (empty if not needed).
    """
    name = f"linear_cross_entropy_{backend}"
    loss_and_grads = custom_op(f"smb::{name}", launch, mutates_args=())

    @loss_and_grads.register_fake
    def _(hidden_ND, weight_VD, _label_N, token_R, token_weight_RD, _scale, *needs):
        loss = hidden_ND.new_empty((), dtype=wide(hidden_ND.dtype))
        likes = (hidden_ND, weight_VD, hidden_ND if token_R is None else token_weight_RD)
        grads = (x.new_empty(x.shape if n else (0,)) for x, n in zip(likes, needs, strict=True))
        return loss, *grads

    def save(ctx, inputs, output) -> None:
        ctx.needs = inputs[-3:]
        ctx.save_for_backward(*output[1:])
        ctx.set_materialize_grads(False)

    def backward(ctx, grad_loss, *grads_of_grads):
        if any(g is not None for g in grads_of_grads):
            raise NotImplementedError(
                f"linear_cross_entropy on {backend} has no second derivative; its reference has"
            )
        grads = [
            scaled(grad, grad_loss, in_place=True) if needed and grad_loss is not None else None
            for grad, needed in zip(ctx.saved_tensors, ctx.needs, strict=True)
        ]
        return grads[0], grads[1], None, None, grads[2], *[None] * 4

    loss_and_grads.register_autograd(backward, setup_context=save)

    @register_flop_formula(getattr(torch.ops.smb, name), get_raw=True)
    def _(hidden_ND, weight_VD, _label_N, token_R, _token_weight_RD, _scale, *needs, **_kwargs):
        (N, D), R = hidden_ND.shape, 0 if token_R is None else len(token_R)
        wants = dict(zip(("hidden", "weight", "tokens"), needs, strict=True))
        return head_flops(N, D, weight_VD.shape[0], R, **wants)

    def linear_cross_entropy(
        hidden_ND: Tensor,
        weight_VD: Tensor,
        label_N: Tensor,
        token_R: Tensor | None = None,
        token_weight_RD: Tensor | None = None,
        *,
        scale: float = 1.0,
    ) -> Tensor:
        _check(hidden_ND, weight_VD, label_N, token_R, token_weight_RD)
        dtype = autocast_dtype(hidden_ND)
        if dtype is not None:
            # as autocast does it for the product; the weights are cast by the operation
            hidden_ND = hidden_ND.to(dtype)
        leaves = (hidden_ND, weight_VD, token_weight_RD)
        enabled = torch.is_grad_enabled()
        needs = (enabled and x is not None and x.requires_grad for x in leaves)
        return loss_and_grads(
            hidden_ND, weight_VD, label_N, token_R, token_weight_RD, scale, *needs
        )[0]

    return linear_cross_entropy


def chunk_rows(N: int, D: int, V: int, device: str = "cpu") -> int:
    """Rows of a chunk: its logits are about as large as the hidden states, N D / V (as Liger does).

    Within bounds, and N is cut evenly: no chunk of a row or two is left over.

    Args:
        device: kind of device.
    """
    least = LEAST_ON_CUDA if device == "cuda" else LEAST
    most = min(max(N * D // V, least), MOST)
    chunks = max(-(-N // most), 1)
    return -(-N // chunks)


def wide(dtype: torch.dtype) -> torch.dtype:
    """In which loss, softmax and sums over chunks are computed: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def _check(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    label_N: Tensor,
    token_R: Tensor | None,
    token_weight_RD: Tensor | None,
) -> None:
    if hidden_ND.dim() != 2:
        raise ValueError(f"hidden_ND must be [N, D], got {list(hidden_ND.shape)}")
    N, D = hidden_ND.shape
    if weight_VD.dim() != 2 or weight_VD.shape[1] != D:
        raise ValueError(f"weight_VD must be [V, {D}], got {list(weight_VD.shape)}")
    if (token_R is None) != (token_weight_RD is None):
        given = "token_R" if token_weight_RD is None else "token_weight_RD"
        raise ValueError(f"token_R and token_weight_RD must be given together, got {given} alone")
    R = 0 if token_R is None else token_R.numel()
    if token_weight_RD is not None and token_weight_RD.shape != (R, D):
        raise ValueError(f"token_weight_RD must be [{R}, {D}], got {list(token_weight_RD.shape)}")
    for name, ids, shape in (("label_N", label_N, (N,)), ("token_R", token_R, (R,))):
        if ids is not None and (ids.shape != shape or ids.dtype != torch.int64):
            raise ValueError(
                f"{name} must be int64 of shape {list(shape)}, got {ids.dtype} of {list(ids.shape)}"
            )
    others = {"weight_VD": weight_VD, "label_N": label_N, "token_R": token_R}
    for name, tensor in {**others, "token_weight_RD": token_weight_RD}.items():
        if tensor is not None and tensor.device != hidden_ND.device:
            raise ValueError(f"{name} must be on {hidden_ND.device}, got {tensor.device}")
