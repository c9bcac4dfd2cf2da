"""Gradients of the keys and values of `timeline_attention`: programs that own keys.

The plan stands in `timeline_attention.py`, tiles and blocks are those of `..._kernels.py`. Branches
of a trunk are consecutive rows, so that their queries are one range, whose blocks may hold rows of
several branches; a table of rows says where each query stops seeing.
"""

import triton
import triton.language as tl

from smbkernels.triton.timeline_attention_kernels import (
    LOG2_E,
    _find_tile,
    _load_block,
    _load_tile,
    _store_tile,
)


@triton.jit(do_not_specialize=["tokens", "segments"])
def _timeline_attention_bwd_rows_kernel(
    delta_ptr,
    end_ptr,
    out_ptr,
    grad_ptr,
    table_ptr,
    tokens,
    heads,
    segments,
    stride_gt,
    stride_gh,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SCAN: tl.constexpr,
):
    pid = tl.program_id(0)
    head = pid % heads
    segment, start, length, first_m = _find_tile(table_ptr, segments, pid // heads, BLOCK_M, SCAN)
    if first_m >= length:
        return
    row_m = start + first_m
    rows_m = length - first_m
    stride_ot = heads * HEAD_DIM
    out = _load_tile(out_ptr, row_m, head, stride_ot, HEAD_DIM, rows_m, BLOCK_M, HEAD_DIM)
    grad = _load_tile(grad_ptr, row_m, head, stride_gt, stride_gh, rows_m, BLOCK_M, HEAD_DIM)
    delta_m = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    offs_m = tl.arange(0, BLOCK_M)
    mask_m = offs_m < rows_m
    tl.store(delta_ptr + head.to(tl.int64) * tokens + row_m + offs_m, delta_m, mask=mask_m)
    if head == 0:
        # the key row at which a query stops seeing: in its own segment, and in its trunk
        own_end_m = row_m + offs_m + 1
        trunk_end = tl.load(table_ptr + segment * 6 + 2) + tl.load(table_ptr + segment * 6 + 3)
        tl.store(end_ptr + row_m + offs_m, own_end_m, mask=mask_m)
        tl.store(end_ptr + tokens + row_m + offs_m, trunk_end, mask=mask_m)


@triton.jit
def _reaching_branches(table_ptr, first, branches, first_n, rows_n, tokens, SCAN: tl.constexpr):
    """Rows from the first branch to the last that see keys of a tile; whether all see all of it."""
    low = tokens
    high = 0
    seeing = 0
    for base in range(0, branches, SCAN):
        offs_s = base + tl.arange(0, SCAN)
        mask_s = offs_s < branches
        row_ptrs = table_ptr + (first + offs_s) * 6
        start_s = tl.load(row_ptrs, mask=mask_s, other=0)
        length_s = tl.load(row_ptrs + 1, mask=mask_s, other=0)
        visible_s = tl.load(row_ptrs + 3, mask=mask_s, other=0) - first_n
        low = tl.minimum(low, tl.min(tl.where(visible_s > 0, start_s, tokens)))
        high = tl.maximum(high, tl.max(tl.where(visible_s > 0, start_s + length_s, 0)))
        seeing += tl.sum(tl.where(visible_s >= rows_n, length_s, 0))
    return low, tl.maximum(high, low), seeing == high - low


@triton.jit
def _key_gradients(
    k_acc,
    v_acc,
    k,
    v,
    q_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    end_ptr,
    row,
    rows,
    row_n,
    scale_log2,
    stride_qt,
    stride_gt,
    DOT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One block of queries of one head, all products transposed: keys by queries."""
    q = _load_block(q_ptr, row, stride_qt, rows, BLOCK_M, HEAD_DIM, MASKED).to(DOT)
    offs_m = tl.arange(0, BLOCK_M)
    if MASKED:
        # queries beyond the range are zeros, as are their gradients: they add nothing
        lse_m = tl.load(lse_ptr + row + offs_m, mask=offs_m < rows, other=0.0) * LOG2_E
        delta_m = tl.load(delta_ptr + row + offs_m, mask=offs_m < rows, other=0.0)
    else:
        lse_m = tl.load(lse_ptr + row + offs_m) * LOG2_E
        delta_m = tl.load(delta_ptr + row + offs_m)
    score = tl.dot(k, q.T, input_precision="ieee")
    p = tl.exp2(score * scale_log2 - lse_m[None, :])
    if MASKED:
        end_m = tl.load(end_ptr + row + offs_m, mask=offs_m < rows, other=0)
        p = tl.where((row_n + tl.arange(0, BLOCK_N))[:, None] < end_m[None, :], p, 0.0)
    grad = _load_block(grad_ptr, row, stride_gt, rows, BLOCK_M, HEAD_DIM, MASKED).to(DOT)
    v_acc = tl.dot(p.to(DOT), grad, v_acc, input_precision="ieee")
    p_grad = tl.dot(v, grad.T, input_precision="ieee")
    score_grad = p * (p_grad - delta_m[None, :])
    k_acc = tl.dot(score_grad.to(DOT), q, k_acc, input_precision="ieee")
    return k_acc, v_acc


@triton.jit(do_not_specialize=["tokens", "segments"])
def _timeline_attention_bwd_key_kernel(
    k_grad_ptr,
    v_grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    end_ptr,
    table_ptr,
    tokens,
    kv_heads,
    segments,
    scale,
    scale_log2,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_gt,
    stride_gh,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCAN: tl.constexpr,
):
    pid = tl.program_id(0)
    kv_head = pid % kv_heads
    # the first tiles of a segment are seen by most queries
    segment, start, length, first_n = _find_tile(
        table_ptr, segments, pid // kv_heads, BLOCK_N, SCAN
    )
    if first_n >= length:
        return
    row_n = start + first_n
    rows_n = length - first_n
    first_branch = tl.load(table_ptr + segment * 6 + 4)
    branches = tl.load(table_ptr + segment * 6 + 5)
    low, high, all_see_all = _reaching_branches(
        table_ptr, first_branch, branches, first_n, tl.minimum(rows_n, BLOCK_N), tokens, SCAN
    )
    k = _load_tile(k_ptr, row_n, kv_head, stride_kt, stride_kh, rows_n, BLOCK_N, HEAD_DIM).to(DOT)
    v = _load_tile(v_ptr, row_n, kv_head, stride_vt, stride_vh, rows_n, BLOCK_N, HEAD_DIM).to(DOT)
    k_acc = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    v_acc = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    # blocks of queries, own from the diagonal on, then of branches: seeing the whole tile, or not
    diagonal = tl.cdiv(BLOCK_N, BLOCK_M)
    own = tl.cdiv(rows_n, BLOCK_M)
    own_whole = tl.maximum(rows_n // BLOCK_M - diagonal, 0)
    branch_whole = tl.where(all_see_all, (high - low) // BLOCK_M, 0)
    for i in range((own_whole + branch_whole) * GROUP):
        block = i // GROUP
        head = (kv_head * GROUP + i % GROUP).to(tl.int64)
        first_m = tl.where(block < own_whole, row_n + diagonal * BLOCK_M, low - own_whole * BLOCK_M)
        k_acc, v_acc = _key_gradients(
            k_acc, v_acc, k, v, q_ptr + head * stride_qh, grad_ptr + head * stride_gh,
            lse_ptr + head * tokens, delta_ptr + head * tokens, end_ptr,
            first_m + block * BLOCK_M, BLOCK_M, row_n, scale_log2, stride_qt, stride_gt,
            DOT, HEAD_DIM, BLOCK_M, BLOCK_N, False,
        )  # fmt: skip
    own_partial = own - own_whole
    branch_partial = tl.cdiv(high - low, BLOCK_M) - branch_whole
    for i in range((own_partial + branch_partial) * GROUP):
        block = i // GROUP
        head = (kv_head * GROUP + i % GROUP).to(tl.int64)
        is_own = block < own_partial
        # behind the diagonal, the last block of the segment
        block += tl.where(
            is_own, tl.where(block < diagonal, 0, own_whole), branch_whole - own_partial
        )
        row = tl.where(is_own, row_n, low) + block * BLOCK_M
        rows = tl.where(is_own, row_n + rows_n, high) - row
        k_acc, v_acc = _key_gradients(
            k_acc, v_acc, k, v, q_ptr + head * stride_qh, grad_ptr + head * stride_gh,
            lse_ptr + head * tokens, delta_ptr + head * tokens,
            end_ptr + tl.where(is_own, 0, tokens), row, rows, row_n, scale_log2,
            stride_qt, stride_gt, DOT, HEAD_DIM, BLOCK_M, BLOCK_N, True,
        )  # fmt: skip
    _store_tile(k_grad_ptr, k_acc * scale, row_n, kv_head, kv_heads, rows_n, BLOCK_N, HEAD_DIM)
    _store_tile(v_grad_ptr, v_acc, row_n, kv_head, kv_heads, rows_n, BLOCK_N, HEAD_DIM)
