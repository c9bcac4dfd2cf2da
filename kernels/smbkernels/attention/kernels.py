"""Triton kernels of `timeline_attention`; `triton` describes what is launched, and what it costs.

`fwd` and `bwd_query` are programs that own queries, `bwd_key` programs that own keys.

A tile is BLOCK rows of one segment. Tiles are numbered by slots that need no prefix sum: tile j of
segment i has slot start_i // BLOCK + i + j. As start_i+1 = start_i + length_i, these never
overlap, and T // BLOCK + S slots hold all tiles; a program whose slot is empty exits.

What a tile is multiplied with is a list of blocks from one or more ranges of rows. Blocks that
are wholly visible run in a loop without a mask, the rest in a second loop. A mask is one bound for
each query: it sees the keys below it, counted from the first row of the range.

Branches of a trunk are consecutive rows. To a tile of keys their queries are therefore one range,
whose blocks may hold rows of several branches; a table of rows, made by `bwd_rows`, says where each
query stops seeing.
"""

import triton
import triton.language as tl

LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _find_tile(table_ptr, segments, slot, BLOCK: tl.constexpr, SCAN: tl.constexpr):
    """Segment, its start and length, and the first row of the tile within it."""
    count = 0
    for base in range(0, segments, SCAN):
        offs_s = base + tl.arange(0, SCAN)
        mask_s = offs_s < segments
        start_s = tl.load(table_ptr + offs_s * 6, mask=mask_s, other=0)
        count += tl.sum(((start_s // BLOCK + offs_s <= slot) & mask_s).to(tl.int32))
    segment = count - 1
    start = tl.load(table_ptr + segment * 6)
    length = tl.load(table_ptr + segment * 6 + 1)
    return segment, start, length, (slot - start // BLOCK - segment) * BLOCK


@triton.jit
def _load_tile(
    x_ptr, row, head, stride_xt, stride_xh, rows, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """`rows` rows of a head from `row` on, then zeros; offsets of a row pass 2^31."""
    offs_t = tl.arange(0, BLOCK)
    offs_c = tl.arange(0, HEAD_DIM)
    base_ptr = x_ptr + row.to(tl.int64) * stride_xt + head.to(tl.int64) * stride_xh
    x_ptrs = base_ptr + (offs_t[:, None] * stride_xt + offs_c[None, :])
    return tl.load(x_ptrs, mask=offs_t[:, None] < rows, other=0.0)


@triton.jit
def _store_tile(x_ptr, x, row, head, heads, rows, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The first `rows` rows, into a contiguous [T, heads, HEAD_DIM]."""
    offs_t = tl.arange(0, BLOCK)
    offs_c = tl.arange(0, HEAD_DIM)
    base_ptr = x_ptr + (row.to(tl.int64) * heads + head) * HEAD_DIM
    x_ptrs = base_ptr + (offs_t[:, None] * (heads * HEAD_DIM) + offs_c[None, :])
    tl.store(x_ptrs, x.to(x_ptr.dtype.element_ty), mask=offs_t[:, None] < rows)


@triton.jit
def _load_block(
    x_ptr, row, stride_xt, rows, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr
):
    """As `_load_tile`, of a head whose first row is at `x_ptr`; without a mask all rows exist."""
    offs_t = tl.arange(0, BLOCK)
    offs_c = tl.arange(0, HEAD_DIM)
    base_ptr = x_ptr + row.to(tl.int64) * stride_xt
    x_ptrs = base_ptr + (offs_t[:, None] * stride_xt + offs_c[None, :])
    if MASKED:
        return tl.load(x_ptrs, mask=offs_t[:, None] < rows, other=0.0)
    return tl.load(x_ptrs)


@triton.jit
def _whole_keys(start, trunk, prefix, i, BLOCK_N: tl.constexpr):
    """Row of the i-th key block that all queries of a tile see wholly."""
    of_trunk = prefix // BLOCK_N
    return tl.where(i < of_trunk, trunk + i * BLOCK_N, start + (i - of_trunk) * BLOCK_N)


@triton.jit
def _partial_keys(first_m, offs_m, start, length, trunk, prefix, i, BLOCK_N: tl.constexpr):
    """Row of the i-th block that is seen in part, its rows, and how many of them a query sees."""
    of_trunk = (prefix % BLOCK_N > 0).to(tl.int32)
    in_trunk = i < of_trunk
    own = (first_m // BLOCK_N + i - of_trunk) * BLOCK_N
    first_n = tl.where(in_trunk, prefix // BLOCK_N * BLOCK_N, own)
    row = tl.where(in_trunk, trunk, start) + first_n
    rows = tl.where(in_trunk, prefix, length) - first_n
    visible_m = tl.where(in_trunk, prefix, offs_m + 1) - first_n
    return row, rows, visible_m


@triton.jit
def _count_keys(first_m, length, prefix, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """How many blocks a tile of queries sees wholly, and how many in part."""
    of_own = first_m // BLOCK_N
    whole = prefix // BLOCK_N + of_own
    end = tl.minimum(first_m + BLOCK_M, length)
    partial = (prefix % BLOCK_N > 0).to(tl.int32) + tl.cdiv(end, BLOCK_N) - of_own
    return whole, partial


@triton.jit
def _attend(
    acc,
    top_m,
    sum_m,
    q,
    k_ptr,
    v_ptr,
    row,
    rows,
    visible_m,
    scale_log2,
    stride_kt,
    stride_vt,
    DOT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One block of keys; `top_m` and `sum_m` are in units of log2."""
    k = _load_block(k_ptr, row, stride_kt, rows, BLOCK_N, HEAD_DIM, MASKED).to(DOT)
    score = tl.dot(q, k.T, input_precision="ieee")
    if MASKED:
        score = tl.where(tl.arange(0, BLOCK_N)[None, :] < visible_m[:, None], score, -float("inf"))
    # the first block of a query always holds a key it sees, so that `higher_m` is finite
    higher_m = tl.maximum(top_m, tl.max(score, 1) * scale_log2)
    p = tl.exp2(score * scale_log2 - higher_m[:, None])
    keep_m = tl.exp2(top_m - higher_m)
    v = _load_block(v_ptr, row, stride_vt, rows, BLOCK_N, HEAD_DIM, MASKED).to(DOT)
    acc = tl.dot(p.to(DOT), v, acc * keep_m[:, None], input_precision="ieee")
    return acc, higher_m, sum_m * keep_m + tl.sum(p, 1)


@triton.jit(do_not_specialize=["tokens", "segments", "slots"])
def _timeline_attention_fwd_kernel(
    out_ptr,
    lse_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    tokens,
    heads,
    segments,
    slots,
    scale_log2,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCAN: tl.constexpr,
):
    pid = tl.program_id(0)
    # from the last slot back: the last tiles of a segment see most keys
    slot = slots - 1 - pid // heads
    head = pid % heads
    segment, start, length, first_m = _find_tile(table_ptr, segments, slot, BLOCK_M, SCAN)
    if first_m >= length:
        return
    trunk = tl.load(table_ptr + segment * 6 + 2)
    prefix = tl.load(table_ptr + segment * 6 + 3)
    offs_m = first_m + tl.arange(0, BLOCK_M)
    row_m = start + first_m
    rows_m = length - first_m
    q = _load_tile(q_ptr, row_m, head, stride_qt, stride_qh, rows_m, BLOCK_M, HEAD_DIM).to(DOT)
    k_ptr += (head // GROUP).to(tl.int64) * stride_kh
    v_ptr += (head // GROUP).to(tl.int64) * stride_vh

    top_m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    sum_m = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    whole, partial = _count_keys(first_m, length, prefix, BLOCK_M, BLOCK_N)
    for i in range(whole):
        row = _whole_keys(start, trunk, prefix, i, BLOCK_N)
        acc, top_m, sum_m = _attend(
            acc, top_m, sum_m, q, k_ptr, v_ptr, row, BLOCK_N, offs_m, scale_log2,
            stride_kt, stride_vt, DOT, HEAD_DIM, BLOCK_N, False,
        )  # fmt: skip
    for i in range(partial):
        row, rows, visible_m = _partial_keys(
            first_m, offs_m, start, length, trunk, prefix, i, BLOCK_N
        )
        acc, top_m, sum_m = _attend(
            acc, top_m, sum_m, q, k_ptr, v_ptr, row, rows, visible_m, scale_log2,
            stride_kt, stride_vt, DOT, HEAD_DIM, BLOCK_N, True,
        )  # fmt: skip

    _store_tile(out_ptr, acc / sum_m[:, None], row_m, head, heads, rows_m, BLOCK_M, HEAD_DIM)
    lse_ptr += head.to(tl.int64) * tokens + start
    lse_m = (top_m + tl.log2(sum_m)) * LN_2
    tl.store(lse_ptr + offs_m, lse_m, mask=offs_m < length)


@triton.jit
def _query_gradient(
    acc,
    q,
    grad,
    lse_m,
    delta_m,
    k_ptr,
    v_ptr,
    row,
    rows,
    visible_m,
    scale_log2,
    stride_kt,
    stride_vt,
    DOT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One block of keys; `lse_m` is in units of log2."""
    k = _load_block(k_ptr, row, stride_kt, rows, BLOCK_N, HEAD_DIM, MASKED).to(DOT)
    score = tl.dot(q, k.T, input_precision="ieee")
    p = tl.exp2(score * scale_log2 - lse_m[:, None])
    if MASKED:
        p = tl.where(tl.arange(0, BLOCK_N)[None, :] < visible_m[:, None], p, 0.0)
    v = _load_block(v_ptr, row, stride_vt, rows, BLOCK_N, HEAD_DIM, MASKED).to(DOT)
    p_grad = tl.dot(grad, v.T, input_precision="ieee")
    score_grad = p * (p_grad - delta_m[:, None])
    return tl.dot(score_grad.to(DOT), k, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["tokens", "segments", "slots"])
def _timeline_attention_bwd_query_kernel(
    q_grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    table_ptr,
    tokens,
    heads,
    segments,
    slots,
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
    slot = slots - 1 - pid // heads
    head = pid % heads
    segment, start, length, first_m = _find_tile(table_ptr, segments, slot, BLOCK_M, SCAN)
    if first_m >= length:
        return
    trunk = tl.load(table_ptr + segment * 6 + 2)
    prefix = tl.load(table_ptr + segment * 6 + 3)
    offs_m = first_m + tl.arange(0, BLOCK_M)
    row_m = start + first_m
    rows_m = length - first_m
    q = _load_tile(q_ptr, row_m, head, stride_qt, stride_qh, rows_m, BLOCK_M, HEAD_DIM).to(DOT)
    grad = _load_tile(grad_ptr, row_m, head, stride_gt, stride_gh, rows_m, BLOCK_M, HEAD_DIM).to(
        DOT
    )
    stat_m = head.to(tl.int64) * tokens + start + offs_m
    mask_m = offs_m < length
    lse_m = tl.load(lse_ptr + stat_m, mask=mask_m, other=0.0) * LOG2_E
    delta_m = tl.load(delta_ptr + stat_m, mask=mask_m, other=0.0)
    k_ptr += (head // GROUP).to(tl.int64) * stride_kh
    v_ptr += (head // GROUP).to(tl.int64) * stride_vh

    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    whole, partial = _count_keys(first_m, length, prefix, BLOCK_M, BLOCK_N)
    for i in range(whole):
        row = _whole_keys(start, trunk, prefix, i, BLOCK_N)
        acc = _query_gradient(
            acc, q, grad, lse_m, delta_m, k_ptr, v_ptr, row, BLOCK_N, offs_m, scale_log2,
            stride_kt, stride_vt, DOT, HEAD_DIM, BLOCK_N, False,
        )  # fmt: skip
    for i in range(partial):
        row, rows, visible_m = _partial_keys(
            first_m, offs_m, start, length, trunk, prefix, i, BLOCK_N
        )
        acc = _query_gradient(
            acc, q, grad, lse_m, delta_m, k_ptr, v_ptr, row, rows, visible_m, scale_log2,
            stride_kt, stride_vt, DOT, HEAD_DIM, BLOCK_N, True,
        )  # fmt: skip
    _store_tile(q_grad_ptr, acc * scale, row_m, head, heads, rows_m, BLOCK_M, HEAD_DIM)


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
