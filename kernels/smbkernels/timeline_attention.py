"""Attention of trunks and the branches that hang on them, packed in one row of tokens.

    query j of a trunk sees keys [start, start + j] of that trunk
    query j of a branch sees keys [trunk_start, trunk_start + prefix) and [start, start + j]
    out = softmax(scale q k') v over what is seen        lse = log sum exp of the same scores

T tokens, H query heads, G key/value heads (H / G query heads share one), C head dim, S segments.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from smbkernels.registry import Backend, op

# columns of the table of segments
START, LENGTH, TRUNK_START, PREFIX, FIRST_BRANCH, BRANCHES = range(6)


@dataclass(frozen=True)
class Segments:
    """Which tokens see which: made once per batch on the CPU, then used by every layer.

    `table_S6` is int32: start, length, start of the trunk, tokens of the trunk that are seen (0
    for a trunk), and for a trunk the index of its first branch and the number of its branches.
    Branches of one trunk are consecutive rows.
    """

    table_S6: Tensor
    tokens: int
    pairs: int  # visible (query, key) pairs: what attention costs
    longest: int  # longest segment
    prefix_tokens: int  # prefixes of all branches together
    host_S6: Tensor  # the table on the CPU, wherever `table_S6` is: read without a wait

    @classmethod
    def of(
        cls, start_S: Tensor, length_S: Tensor, trunk_start_S: Tensor, prefix_S: Tensor
    ) -> "Segments":
        """From the columns of a packed batch, integers on the CPU.

        Raises:
            ValueError: columns of other kinds or lengths, segments that overlap or leave a gap, a
                branch that names no trunk or sees more than its trunk has, branches of one trunk
                that are not consecutive.
        """
        columns = (start_S, length_S, trunk_start_S, prefix_S)
        for name, column in zip(("start", "length", "trunk_start", "prefix"), columns, strict=True):
            integer = not (column.is_floating_point() or column.is_complex())
            if column.shape != (len(start_S),) or column.device.type != "cpu" or not integer:
                raise ValueError(
                    f"{name}_S must be {len(start_S)} integers on the CPU, got {column.dtype} of "
                    f"{list(column.shape)} on {column.device}"
                )
        rows = torch.stack(columns, 1).tolist()
        trunk_of = {start: i for i, (start, _, _, prefix) in enumerate(rows) if prefix == 0}
        first, count = [0] * len(rows), [0] * len(rows)
        end = pairs = 0
        for i, (start, length, trunk_start, prefix) in enumerate(rows):
            if start != end or length < 1:
                raise ValueError(
                    f"segment {i} must begin at row {end} with at least one token, got "
                    f"start {start}, length {length}"
                )
            end = start + length
            pairs += length * prefix + length * (length + 1) // 2
            if prefix == 0:
                if trunk_start != start:
                    raise ValueError(
                        f"trunk_start of trunk {i} must be its start {start}, got {trunk_start}"
                    )
                continue
            trunk = trunk_of.get(trunk_start)
            if trunk is None or not 0 < prefix <= rows[trunk][LENGTH]:
                raise ValueError(
                    f"branch {i} must see 1 or more tokens of a trunk that has them, got prefix "
                    f"{prefix} of the trunk at row {trunk_start}"
                )
            if count[trunk] and first[trunk] + count[trunk] != i:
                raise ValueError(f"branches of the trunk at {trunk_start} must be consecutive")
            first[trunk] = first[trunk] if count[trunk] else i
            count[trunk] += 1
        table = [[*row, f, c] for row, f, c in zip(rows, first, count, strict=True)]
        table_S6 = torch.tensor(table, dtype=torch.int32).reshape(-1, 6)
        return cls(
            table_S6=table_S6,
            tokens=end,
            pairs=pairs,
            longest=max((row[LENGTH] for row in rows), default=0),
            prefix_tokens=sum(row[PREFIX] for row in rows),
            host_S6=table_S6,
        )

    def to(self, device: torch.device | str) -> "Segments":
        """The same with its table on a device."""
        return replace(self, table_S6=self.table_S6.to(device, non_blocking=True))


def attention_flops(pairs: int, heads: int, head_dim: int, *, backward: bool = False) -> int:
    """Of the matrix products over visible pairs: 2 forward, 5 backward (one is recomputed)."""
    return (5 if backward else 2) * 2 * pairs * heads * head_dim


def _flops(query_THC: Tensor, key_TGC: Tensor, value_TGC: Tensor, segments: Segments, **_) -> int:
    return attention_flops(segments.pairs, query_THC.shape[1], query_THC.shape[2])


def _fits_triton(query_THC: Tensor, *_args, **_kwargs) -> str | None:
    if query_THC.dtype not in (torch.float32, torch.bfloat16):
        return f"dtype must be fp32 or bf16, got {query_THC.dtype}"
    if query_THC.shape[-1] not in (64, 128):
        return f"head dim must be 64 or 128, got {query_THC.shape[-1]}"
    return None


def _fits_varlen(query_THC: Tensor, *_args, **_kwargs) -> str | None:
    if query_THC.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype must be bf16 or fp16, got {query_THC.dtype}"
    if query_THC.shape[-1] % 8 or query_THC.shape[-1] > 256:
        return f"head dim must be a multiple of 8 up to 256, got {query_THC.shape[-1]}"
    return None


@op(
    Backend("triton", "triton.timeline_attention", ("cuda",), _fits_triton),
    Backend("varlen", "attention.varlen", ("cuda",), _fits_varlen),
    Backend("sdpa", "attention.sdpa", ("cpu",)),
    flops=_flops,
)
def timeline_attention(
    query_THC: Tensor,
    key_TGC: Tensor,
    value_TGC: Tensor,
    segments: Segments,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention outputs [T, H, C] and log-sum-exp [H, T], at least fp32 and without gradient.

    Args:
        query_THC: H is a multiple of G.
        key_TGC: of the dtype of the queries, as are the values.
        scale: of the scores; None: C ** -0.5.
    """
    _, H, C = query_THC.shape
    visible_TT = visible(segments).to(query_THC.device)
    wide = torch.promote_types(query_THC.dtype, torch.float32)
    group = H // key_TGC.shape[1]
    key_THC = key_TGC.to(wide).repeat_interleave(group, 1)
    value_THC = value_TGC.to(wide).repeat_interleave(group, 1)
    score_HTT = torch.einsum("qhc,khc->hqk", query_THC.to(wide), key_THC)
    score_HTT = score_HTT * (C**-0.5 if scale is None else scale)
    score_HTT = score_HTT.masked_fill(~visible_TT, -torch.inf)
    lse_HT = torch.logsumexp(score_HTT, -1)
    out_THC = torch.einsum("hqk,khc->qhc", torch.exp(score_HTT - lse_HT[..., None]), value_THC)
    return out_THC.to(query_THC.dtype), lse_HT.detach()


def visible(segments: Segments) -> Tensor:
    """The dense mask [T, T], queries by keys: for the reference and for tests."""
    mask_TT = torch.zeros(segments.tokens, segments.tokens, dtype=torch.bool)
    for start, length, trunk_start, prefix, _, _ in segments.host_S6.tolist():
        end = start + length
        mask_TT[start:end, start:end] = torch.ones(length, length, dtype=torch.bool).tril()
        mask_TT[start:end, trunk_start : trunk_start + prefix] = True
    return mask_TT


def forward_backward(
    backend: str,
    forward: Callable[..., tuple[Tensor, Tensor]],
    backward: Callable[..., tuple],
    *,
    on_device: bool = False,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The operation on a backend.

    Args:
        forward: (query, key, value, table_S6, scale) -> out [T, H, C] and lse [H, T].
        backward: (grad_out, query, key, value, out, lse, table_S6, scale) -> the gradients of
            query, key and value. All that either returns is contiguous.
        on_device: they read the table where the queries are, and a gradient of any strides;
            otherwise the table on the CPU, and a contiguous gradient.
    """
    name = f"smb::timeline_attention_{backend}"

    @custom_op(name, mutates_args=())
    def attend(
        query_THC: Tensor,
        key_TGC: Tensor,
        value_TGC: Tensor,
        table_S6: Tensor,
        scale: float,
        pairs: int,
    ) -> tuple[Tensor, Tensor]:
        return forward(query_THC, key_TGC, value_TGC, table_S6, scale)

    @attend.register_fake
    def _(query_THC, key_TGC, value_TGC, table_S6, scale, pairs):
        T, H, _ = query_THC.shape
        wide = torch.promote_types(query_THC.dtype, torch.float32)
        return query_THC.new_empty(query_THC.shape), query_THC.new_empty(H, T, dtype=wide)

    @custom_op(f"{name}_bwd", mutates_args=())
    def attend_bwd(
        grad_out_THC: Tensor,
        query_THC: Tensor,
        key_TGC: Tensor,
        value_TGC: Tensor,
        out_THC: Tensor,
        lse_HT: Tensor,
        table_S6: Tensor,
        scale: float,
        pairs: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_out_THC = grad_out_THC if on_device else grad_out_THC.contiguous()
        inputs = (query_THC, key_TGC, value_TGC, out_THC, lse_HT, table_S6)
        return backward(grad_out_THC, *inputs, scale)

    @attend_bwd.register_fake
    def _(grad_out_THC, query_THC, key_TGC, value_TGC, *_):
        return tuple(x.new_empty(x.shape) for x in (query_THC, key_TGC, value_TGC))

    def keep(ctx, inputs, output) -> None:
        *tensors, ctx.scale, ctx.pairs = inputs
        *tensors, table_S6 = tensors
        ctx.save_for_backward(*tensors, *output, table_S6)
        ctx.set_materialize_grads(False)

    def grads(ctx, grad_out_THC, _grad_lse):
        if grad_out_THC is None:
            return (None,) * 6
        return *attend_bwd(grad_out_THC, *ctx.saved_tensors, ctx.scale, ctx.pairs), *[None] * 3

    attend.register_autograd(grads, setup_context=keep)
    packets = [getattr(torch.ops.smb, f"timeline_attention_{backend}{end}") for end in ("", "_bwd")]

    @register_flop_formula(packets[0], get_raw=True)
    def _(query_THC, key_TGC, value_TGC, table_S6, scale, pairs, **_):
        return attention_flops(pairs, query_THC.shape[1], query_THC.shape[2])

    @register_flop_formula(packets[1], get_raw=True)
    def _(grad_out_THC, query_THC, *rest, **_):
        return attention_flops(rest[-1], query_THC.shape[1], query_THC.shape[2], backward=True)

    def timeline_attention(
        query_THC: Tensor,
        key_TGC: Tensor,
        value_TGC: Tensor,
        segments: Segments,
        *,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        check(query_THC, key_TGC, value_TGC, segments)
        table_S6 = segments.table_S6 if on_device else segments.host_S6
        if on_device and table_S6.device != query_THC.device:
            raise ValueError(
                f"segments must be on {query_THC.device} as the queries, got "
                f"{table_S6.device}: `segments.to(device)` moves them once per batch"
            )
        scale = query_THC.shape[-1] ** -0.5 if scale is None else scale
        tensors = (query_THC, key_TGC, value_TGC, table_S6)
        out_THC, lse_HT = attend(*tensors, scale, segments.pairs)
        return out_THC, lse_HT.detach()

    return timeline_attention


def check(query_THC: Tensor, key_TGC: Tensor, value_TGC: Tensor, segments: Segments) -> None:
    """Raise a ValueError that names what does not fit the others."""
    if query_THC.dim() != 3 or query_THC.shape[0] != segments.tokens:
        raise ValueError(
            f"query_THC must be [{segments.tokens}, H, C], got {list(query_THC.shape)}"
        )
    T, H, C = query_THC.shape
    for name, x in (("key_TGC", key_TGC), ("value_TGC", value_TGC)):
        if x.dim() != 3 or x.shape != (T, key_TGC.shape[1], C) or H % x.shape[1]:
            raise ValueError(
                f"{name} must be [{T}, G, {C}] with the same G for keys and values that divides "
                f"{H}, got {list(x.shape)}"
            )
        if x.dtype != query_THC.dtype:
            raise ValueError(f"{name} must be {query_THC.dtype} as the queries, got {x.dtype}")
