"""The backward kernels of flash attention; forward.py has the algorithm, the forward kernel and the launchers."""

from __future__ import annotations

import triton
import triton.language as tl

from gpt4v_fast.kernels.attention.chunks import accumulate, operand, row_products, store_sums, zero_sums
from gpt4v_fast.kernels.common import (
    LOG2E,
    key_bounds,
    last_visible,
    load_tile,
    tanh_and_slope,
    tile_pointers,
)

_LOG2E = tl.constexpr(LOG2E)


@triton.jit
def _probabilities(products, lse, to_cap, to_log2, SOFTCAP: tl.constexpr):
    """(p, slope) from q k^T: softmax as the forward pass had it, and d z / d (scale q k^T), 1 without a softcap."""
    if SOFTCAP:
        capped, slope = tanh_and_slope(products * to_cap)
        return tl.exp2(capped * to_log2 - lse), slope
    else:
        return tl.exp2(products * to_log2 - lse), 1.0


@triton.jit
def _accumulate_dq(
    dq, q, dout, lse, delta, k_head, v_head, stride_k, stride_v, queries, first_key, last_key, S, T, offset, to_cap,
    to_log2, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """dq + dz k over the keys first_key..last_key (a multiple of BLOCK_N apart unless MASKED)."""
    QK: tl.constexpr = OPTIONS.QK
    V: tl.constexpr = OPTIONS.V
    PRECISION: tl.constexpr = OPTIONS.PRECISION
    block = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, QK.CHUNK)
    columns_v = tl.arange(0, V.CHUNK)
    k_tile = tile_pointers(k_head + tl.cast(first_key, tl.int64) * stride_k, block, columns, stride_k)
    v_tile = tile_pointers(v_head + tl.cast(first_key, tl.int64) * stride_v, block, columns_v, stride_v)
    if MASKED:
        limit = last_visible(queries, T, offset, OPTIONS.CAUSAL)
    for start in tl.range(first_key, last_key, BLOCK_N):
        n_rows = T - start
        k = operand(k_tile, block, columns, n_rows, QK, MASKED)  # (BLOCK_N, BLOCK_D)
        v = operand(v_tile, block, columns_v, n_rows, V, MASKED)  # (BLOCK_N, BLOCK_DV)
        products = row_products(q, k, queries, S, block, n_rows, QK, MASKED, PRECISION)  # (BLOCK_M, BLOCK_N)
        p, slope = _probabilities(products, lse[:, None], to_cap, to_log2, OPTIONS.SOFTCAP)
        if MASKED:
            p = tl.where((start + block)[None, :] <= limit[:, None], p, 0.0)
        dp = row_products(dout, v, queries, S, block, n_rows, V, MASKED, PRECISION)  # (BLOCK_M, BLOCK_N)
        ds = p * (dp - delta[:, None])
        if OPTIONS.SOFTCAP:
            ds = ds * slope
        dq = accumulate(dq, ds, k, block, n_rows, QK, MASKED, PRECISION)
        k_tile += tl.cast(stride_k, tl.int64) * BLOCK_N
        v_tile += tl.cast(stride_v, tl.int64) * BLOCK_N
    return dq


@triton.jit(do_not_specialize=["heads", "S", "T", "offset"])
def _attention_backward_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, dlse_ptr, delta_ptr, dq_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_db, stride_dh, stride_ds, heads, S, T, offset, scale, to_cap, to_log2,
    HAS_DLSE: tl.constexpr, BLOCKS: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """delta and dq of BLOCKS.M queries of one head.

    Its tensors and strides are no NamedTuples (arguments.py), nor are dkdv's below: in their order dq takes 36 bytes of
    stack for fp32 heads of 256 on gfx942, and dkdv 16 for bf16 heads of 32 on sm_90, in this one nothing (Triton 3.9,
    causal, 2026-11-30, tests/gpu_compile).
    """
    QK: tl.constexpr = OPTIONS.QK
    V: tl.constexpr = OPTIONS.V
    UNIT: tl.constexpr = OPTIONS.UNIT
    BLOCK_M: tl.constexpr = BLOCKS.M
    blocks = tl.cdiv(S, BLOCK_M)
    first_query = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    b = (tl.program_id(0) // blocks // heads).to(tl.int64)
    h = (tl.program_id(0) // blocks % heads).to(tl.int64)
    queries = first_query + tl.arange(0, BLOCK_M)
    block = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, QK.CHUNK)
    columns_v = tl.arange(0, V.CHUNK)
    n_rows = S - first_query
    row = (b * heads + h) * S + first_query
    q_tile = q_ptr + (b * stride_qb + h * stride_qh + first_query.to(tl.int64) * stride_qs) * UNIT
    dout_tile = dout_ptr + (b * stride_db + h * stride_dh + first_query.to(tl.int64) * stride_ds) * UNIT
    k_head = k_ptr + (b * stride_kb + h // OPTIONS.GROUP * stride_kh) * UNIT
    v_head = v_ptr + (b * stride_vb + h // OPTIONS.GROUP * stride_vh) * UNIT

    out_tile = tile_pointers(out_ptr + row * V.D, block, columns_v, V.D)
    dout_tile = tile_pointers(dout_tile, block, columns_v, stride_ds * UNIT)
    q_tile = tile_pointers(q_tile, block, columns, stride_qs * UNIT)
    dout_rows = operand(dout_tile, block, columns_v, n_rows, V, True)  # (BLOCK_M, BLOCK_DV)
    if V.CHUNK == V.BLOCK:
        out = load_tile(out_tile, block, columns_v, n_rows, V.D, True)  # (BLOCK_M, BLOCK_DV)
        delta = tl.sum(out.to(tl.float32) * dout_rows.to(tl.float32), 1)
    else:
        delta = tl.zeros((BLOCK_M,), tl.float32)
        DV: tl.constexpr = V.D
        CHUNK_DV: tl.constexpr = V.CHUNK
        for start in tl.static_range(0, DV, CHUNK_DV):
            out = load_tile(out_tile + start, block, columns_v, n_rows, DV - start, True)  # (BLOCK_M, CHUNK)
            chunk = load_tile(dout_tile + start, block, columns_v, n_rows, DV - start, True)
            delta += tl.sum(out.to(tl.float32) * chunk.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + row + block, mask=block < n_rows, other=0.0)
    # Rows past the end get an lse of +inf, so that their probabilities are 0 without a mask; a row that saw nothing has
    # no use for the gradient of its lse, whatever that is.
    lse = tl.load(lse_ptr + row + block, mask=block < n_rows, other=float("inf")) * _LOG2E
    delta = tl.where(lse == float("-inf"), 0.0, delta)
    tl.store(delta_ptr + row + block, delta, mask=block < n_rows)
    q_rows = operand(q_tile, block, columns, n_rows, QK, True)  # (BLOCK_M, BLOCK_D)

    dq = zero_sums(BLOCK_M, QK)
    unmasked, last = key_bounds(first_query, T, offset, BLOCK_M, BLOCKS.N, OPTIONS.CAUSAL)
    CHUNKED: tl.constexpr = QK.CHUNK < QK.BLOCK or V.CHUNK < V.BLOCK
    if CHUNKED:  # one walk, as in the forward kernel
        unmasked = 0
    stride_k = stride_kt * UNIT
    stride_v = stride_vt * UNIT
    dq = _accumulate_dq(
        dq, q_rows, dout_rows, lse, delta, k_head, v_head, stride_k, stride_v, queries, unmasked, last, S, T, offset,
        to_cap, to_log2, BLOCKS.MASKED, True, OPTIONS,
    )  # fmt: skip
    if not CHUNKED:
        dq = _accumulate_dq(
            dq, q_rows, dout_rows, lse, delta, k_head, v_head, stride_k, stride_v, queries, 0, unmasked, S, T, offset,
            to_cap, to_log2, BLOCKS.N, False, OPTIONS,
        )  # fmt: skip
    store_sums(dq_ptr + row * QK.D, dq, scale, block, n_rows, QK)


@triton.jit
def _accumulate_dkdv(
    dk, dv, k, v, q_head, dout_head, lse_head, delta_head, stride_q, stride_d, keys, first_query, n_blocks, jump_from,
    jump_to, S, T, offset, to_cap, to_log2,
    OF_K: tl.constexpr, OF_V: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """n_blocks blocks of queries of one head for one block of keys; scores stand transposed, (keys, queries).

    A masked walk takes the blocks that the diagonal cuts, up to jump_from, and then the last, ragged one at jump_to.
    """
    QK: tl.constexpr = OPTIONS.QK
    V: tl.constexpr = OPTIONS.V
    PRECISION: tl.constexpr = OPTIONS.PRECISION
    block = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, QK.CHUNK)
    columns_v = tl.arange(0, V.CHUNK)
    start = first_query
    if MASKED:
        start = tl.where(start < jump_from, start, jump_to)
    q_tile = tile_pointers(q_head + tl.cast(start, tl.int64) * stride_q, block, columns, stride_q)
    dout_tile = tile_pointers(dout_head + tl.cast(start, tl.int64) * stride_d, block, columns_v, stride_d)
    for _ in tl.range(0, n_blocks):
        n_rows = S - start
        q = operand(q_tile, block, columns, n_rows, QK, MASKED)  # (BLOCK_M, BLOCK_D)
        dout = operand(dout_tile, block, columns_v, n_rows, V, MASKED)  # (BLOCK_M, BLOCK_DV)
        if MASKED:
            # Rows past the end get an lse of +inf, so that their probabilities are 0.
            lse = tl.load(lse_head + start + block, mask=block < n_rows, other=float("inf"))
            delta = tl.load(delta_head + start + block, mask=block < n_rows, other=0.0)
        else:
            lse = tl.load(lse_head + start + block)
            delta = tl.load(delta_head + start + block)
        products = row_products(k, q, keys, T, block, n_rows, QK, MASKED, PRECISION)  # (BLOCK_N, BLOCK_M)
        p, slope = _probabilities(products, (lse * _LOG2E)[None, :], to_cap, to_log2, OPTIONS.SOFTCAP)
        if MASKED:
            limit = last_visible(start + block, T, offset, OPTIONS.CAUSAL)
            p = tl.where(keys[:, None] <= limit[None, :], p, 0.0)
        if OF_V:
            dv = accumulate(dv, p, dout, block, n_rows, V, MASKED, PRECISION)
        if OF_K:
            dp = row_products(v, dout, keys, T, block, n_rows, V, MASKED, PRECISION)  # (BLOCK_N, BLOCK_M)
            ds = p * (dp - delta[None, :])
            if OPTIONS.SOFTCAP:
                ds = ds * slope
            dk = accumulate(dk, ds, q, block, n_rows, QK, MASKED, PRECISION)
        step = BLOCK_M
        if MASKED:
            step = tl.where((start < jump_from) & (start + BLOCK_M >= jump_from), jump_to - start, BLOCK_M)
        start += step
        q_tile += tl.cast(stride_q, tl.int64) * step
        dout_tile += tl.cast(stride_d, tl.int64) * step
    return dk, dv


@triton.jit(do_not_specialize=["heads", "S", "T", "offset"])
def _attention_backward_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_db, stride_dh, stride_ds, heads, S, T, offset, scale, to_cap, to_log2,
    OF_K: tl.constexpr, OF_V: tl.constexpr, BLOCKS: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """dk and dv (those of them that are asked for) of BLOCKS.N keys of one key head."""
    QK: tl.constexpr = OPTIONS.QK
    V: tl.constexpr = OPTIONS.V
    UNIT: tl.constexpr = OPTIONS.UNIT
    BLOCK_M: tl.constexpr = BLOCKS.M
    MASKED_M: tl.constexpr = BLOCKS.MASKED
    BLOCK_N: tl.constexpr = BLOCKS.N
    blocks = tl.cdiv(T, BLOCK_N)
    first_key = tl.program_id(0) % blocks * BLOCK_N
    b = (tl.program_id(0) // blocks // heads).to(tl.int64)
    hkv = (tl.program_id(0) // blocks % heads).to(tl.int64)
    block = tl.arange(0, BLOCK_N)
    keys = first_key + block
    columns = tl.arange(0, QK.CHUNK)
    columns_v = tl.arange(0, V.CHUNK)
    n_rows = T - first_key
    k_tile = k_ptr + (b * stride_kb + hkv * stride_kh + first_key.to(tl.int64) * stride_kt) * UNIT
    v_tile = v_ptr + (b * stride_vb + hkv * stride_vh + first_key.to(tl.int64) * stride_vt) * UNIT
    k_tile = tile_pointers(k_tile, block, columns, stride_kt * UNIT)
    v_tile = tile_pointers(v_tile, block, columns_v, stride_vt * UNIT)
    k_rows = operand(k_tile, block, columns, n_rows, QK, True)  # (BLOCK_N, BLOCK_D)
    v_rows = operand(v_tile, block, columns_v, n_rows, V, True)  # (BLOCK_N, BLOCK_DV)

    # Queries below `first` see no key of this block, those from `everyone` on see all of them that exist. Keys past the
    # end need no mask: each makes a row of dk and dv that is never stored.
    first = 0
    everyone = 0
    if OPTIONS.CAUSAL:
        first = tl.minimum(tl.maximum(first_key - offset, 0), S) // MASKED_M * MASKED_M
        everyone = tl.cdiv(tl.maximum(first_key + BLOCK_N - 1 - offset, 0), BLOCK_M) * BLOCK_M
    whole = S // BLOCK_M * BLOCK_M
    CHUNKED: tl.constexpr = QK.CHUNK < QK.BLOCK or V.CHUNK < V.BLOCK
    everyone = whole if CHUNKED else tl.minimum(everyone, whole)  # chunked: one masked walk over all blocks
    first = tl.minimum(first, everyone)
    masked_blocks = (everyone - first) // MASKED_M + tl.cdiv(S - whole, MASKED_M)
    dk = zero_sums(BLOCK_N, QK)
    dv = zero_sums(BLOCK_N, V)
    for member in range(OPTIONS.GROUP):
        h = hkv * OPTIONS.GROUP + member
        q_head = q_ptr + (b * stride_qb + h * stride_qh) * UNIT
        dout_head = dout_ptr + (b * stride_db + h * stride_dh) * UNIT
        statistics = (b * heads * OPTIONS.GROUP + h) * S
        dk, dv = _accumulate_dkdv(
            dk, dv, k_rows, v_rows, q_head, dout_head, lse_ptr + statistics, delta_ptr + statistics, stride_qs * UNIT,
            stride_ds * UNIT, keys, first, masked_blocks, everyone, whole, S, T, offset, to_cap, to_log2,
            OF_K, OF_V, MASKED_M, True, OPTIONS,
        )  # fmt: skip
        if not CHUNKED:
            dk, dv = _accumulate_dkdv(
                dk, dv, k_rows, v_rows, q_head, dout_head, lse_ptr + statistics, delta_ptr + statistics,
                stride_qs * UNIT, stride_ds * UNIT, keys, everyone, (whole - everyone) // BLOCK_M, 0, 0,
                S, T, offset, to_cap, to_log2, OF_K, OF_V, BLOCK_M, False, OPTIONS,
            )  # fmt: skip
    row = (b * heads + hkv) * T + first_key
    if OF_K:
        store_sums(dk_ptr + row * QK.D, dk, scale, block, n_rows, QK)
    if OF_V:
        store_sums(dv_ptr + row * V.D, dv, 1.0, block, n_rows, V)
