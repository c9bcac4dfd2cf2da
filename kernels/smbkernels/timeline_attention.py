"""Attention of trunks and the branches that hang on them, packed in one row of tokens.

    query j of a trunk sees keys [start, start + j] of that trunk
    query j of a branch sees keys [trunk_start, trunk_start + prefix) and [start, start + j]
    out = softmax(scale q k') v over what is seen        lse = log sum exp of the same scores

T tokens, H query heads, G key/value heads (H / G query heads share one), C head dim, S segments.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

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

    @classmethod
    def of(
        cls, start_S: Tensor, length_S: Tensor, trunk_start_S: Tensor, prefix_S: Tensor
    ) -> "Segments":
        """From the columns of a packed batch, integers on the CPU.

        Raises:
            ValueError: segments overlap or leave a gap, a branch names no trunk or sees more than
                its trunk has, or branches of one trunk are not consecutive.
        """
        rows = torch.stack([start_S, length_S, trunk_start_S, prefix_S], 1).tolist()
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
        return cls(
            table_S6=torch.tensor(table, dtype=torch.int32).reshape(-1, 6),
            tokens=end,
            pairs=pairs,
            longest=max((row[LENGTH] for row in rows), default=0),
            prefix_tokens=sum(row[PREFIX] for row in rows),
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
    """Attention outputs [T, H, C] and log-sum-exp [H, T], the latter fp32 and without gradient.

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
    for start, length, trunk_start, prefix, _, _ in segments.table_S6.tolist():
        end = start + length
        mask_TT[start:end, start:end] = torch.ones(length, length, dtype=torch.bool).tril()
        mask_TT[start:end, trunk_start : trunk_start + prefix] = True
    return mask_TT
