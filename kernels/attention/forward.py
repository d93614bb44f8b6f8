"""Flash attention in Triton, forward and backward, for NVIDIA and AMD.

    z = softcap * tanh(scale * q k^T / softcap), or scale * q k^T;   o = softmax(z) v;   lse = log sum_j exp(z_j)

Forward (Dao, FlashAttention-2, 2023, algorithm 1; the running maximum is Milakov and Gimelshein, 2018): one program
owns BLOCK_M queries of one head and walks over the keys in blocks of BLOCK_N, so that scores live in registers only.
Backward (the same paper, algorithm 2): scores are computed again from lse. One kernel owns queries and makes dq, and,
since it has dout and out at hand, delta = rowsum(dout * out) - dlse; a second one owns keys and makes dk and dv,
walking over the queries of every head of its group. Nothing is added by atomics, so results are the same bits each run.
Heads too wide for the registers are taken some columns at a time (kernels/attention/chunks.py), dk and dv then by a launch each.

Flops: 4 S T D a head forward, 14 S T D backward (2.5 times forward, and 2 products of scores done twice for want of
atomics), half of it when causal. Bytes: q, k, v, out once each from memory if a head's keys fit in L2.

bf16 and fp16 appear in loads, dot operands and stores alone; everything else is fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gpt4v_fast.kernels import configs
from gpt4v_fast.kernels.attention.backward import _attention_backward_dkdv_kernel, _attention_backward_dq_kernel
from gpt4v_fast.kernels.attention.chunks import accumulate, operand, row_products, scale_sums, zero_sums
from gpt4v_fast.kernels.common import (
    LN2,
    LOG2E,
    VECTOR_BYTES,
    key_bounds,
    last_dim_contiguous,
    last_visible,
    launch_options,
    on_device,
    online_softmax_step,
    store_tile,
    strides_in_units,
    tanh,
    target_arch,
    tile_pointers,
)

_LN2 = tl.constexpr(LN2)
MAX_HEAD_DIM = 256
MAX_TILE = 256  # rows of a tile, at most
MAX_ROW_STRIDE = 2**31 // MAX_TILE - MAX_HEAD_DIM  # elements; offsets inside a tile are 32-bit


@triton.jit
def _attend(
    acc, row_max, row_sum, q, k_head, v_head, stride_k, stride_v, queries, n_queries, first_key, last_key, n_keys,
    offset, to_cap, to_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CHUNK_D: tl.constexpr, CHUNK_DV: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys first_key..last_key (a multiple of BLOCK_N apart unless MASKED) for one block of queries."""
    block = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, CHUNK_D)
    columns_v = tl.arange(0, CHUNK_DV)
    k_tile = tile_pointers(k_head + tl.cast(first_key, tl.int64) * stride_k, block, columns, stride_k)
    v_tile = tile_pointers(v_head + tl.cast(first_key, tl.int64) * stride_v, block, columns_v, stride_v)
    if MASKED:
        limit = last_visible(queries, n_keys, offset, CAUSAL)
    for start in tl.range(first_key, last_key, BLOCK_N):
        k = operand(k_tile, block, columns, n_keys - start, D, BLOCK_D, CHUNK_D, MASKED)  # (BLOCK_N, BLOCK_D)
        scores = row_products(
            q, k, queries, n_queries, block, n_keys - start, D, BLOCK_D, CHUNK_D, MASKED, PRECISION
        )  # (BLOCK_M, BLOCK_N)
        if SOFTCAP:
            scores = tanh(scores * to_cap)
        if MASKED:
            scores = tl.where((start + block)[None, :] <= limit[:, None], scores, float("-inf"))
        p, rescale, row_max, row_sum = online_softmax_step(scores, row_max, row_sum, to_log2, MASKED)
        v = operand(v_tile, block, columns_v, n_keys - start, DV, BLOCK_DV, CHUNK_DV, MASKED)  # (BLOCK_N, BLOCK_DV)
        p = p.to(v_head.dtype.element_ty)
        acc = scale_sums(acc, rescale[:, None])
        acc = accumulate(acc, p, v, block, n_keys - start, DV, BLOCK_DV, CHUNK_DV, MASKED, PRECISION)
        k_tile += tl.cast(stride_k, tl.int64) * BLOCK_N
        v_tile += tl.cast(stride_v, tl.int64) * BLOCK_N
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["H", "S", "T", "offset"])
def _attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    H, S, T, offset, to_cap, to_log2,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CHUNK_D: tl.constexpr, CHUNK_DV: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(S, BLOCK_M)
    # The last queries see the most keys, so their blocks start first and the short ones fill the gaps at the end.
    first_query = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    b = (tl.program_id(0) // blocks // H).to(tl.int64)
    h = (tl.program_id(0) // blocks % H).to(tl.int64)
    queries = first_query + tl.arange(0, BLOCK_M)
    block = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, CHUNK_D)
    columns_v = tl.arange(0, CHUNK_DV)
    q_tile = q_ptr + (b * stride_qb + h * stride_qh + first_query.to(tl.int64) * stride_qs) * UNIT
    k_head = k_ptr + (b * stride_kb + h // GROUP * stride_kh) * UNIT
    v_head = v_ptr + (b * stride_vb + h // GROUP * stride_vh) * UNIT

    q_tile = tile_pointers(q_tile, block, columns, stride_qs * UNIT)
    q = operand(q_tile, block, columns, S - first_query, D, BLOCK_D, CHUNK_D, True)  # (BLOCK_M, BLOCK_D)
    acc = zero_sums(BLOCK_M, DV, CHUNK_DV)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    unmasked, last = key_bounds(first_query, T, offset, BLOCK_M, BLOCK_N, CAUSAL)
    CHUNKED: tl.constexpr = CHUNK_D < BLOCK_D or CHUNK_DV < BLOCK_DV
    if CHUNKED:  # masks cost 2% there, and a second loop more registers than there are
        unmasked = 0
    # The masked blocks go first: what their masks need is then no burden on the registers of the long loop.
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, q, k_head, v_head, stride_kt * UNIT, stride_vt * UNIT, queries, S, unmasked, last, T,
        offset, to_cap, to_log2, D, DV, MASKED_N, BLOCK_D, BLOCK_DV, CHUNK_D, CHUNK_DV, CAUSAL, True, SOFTCAP,
        PRECISION,
    )  # fmt: skip
    if not CHUNKED:
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, q, k_head, v_head, stride_kt * UNIT, stride_vt * UNIT, queries, S, 0, unmasked, T,
            offset, to_cap, to_log2, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, CHUNK_D, CHUNK_DV, CAUSAL, False, SOFTCAP,
            PRECISION,
        )  # fmt: skip

    row = (b * H + h) * S + first_query
    saw_nothing = row_sum == 0.0
    lse = tl.where(saw_nothing, float("-inf"), (row_max + tl.log2(row_sum)) * _LN2)
    for c in tl.static_range(len(acc)):
        out = acc[c] / tl.where(saw_nothing, 1.0, row_sum)[:, None]
        store_tile(out_ptr + row * DV + c * CHUNK_DV, out, block, columns_v, DV, S - first_query, DV - c * CHUNK_DV)
    tl.store(lse_ptr + row + block, lse, mask=block < S - first_query)


def _padded(head_dim: int) -> int:
    """The power of two, at least 16 (the least depth of a matrix instruction), that holds a head of this size."""
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head size: expected 1 to {MAX_HEAD_DIM}, got {head_dim}")
    return max(16, triton.next_power_of_2(head_dim))


def _kernel_layout(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` where the kernels can walk it: unit stride along the head, rows not absurdly far apart; else a copy."""
    tensor = last_dim_contiguous(tensor)
    return tensor if tensor.stride(2) <= MAX_ROW_STRIDE or tensor.shape[2] == 1 else tensor.contiguous()


def _positive_scale(q: torch.Tensor, scale: float) -> tuple[torch.Tensor, float, float]:
    """(factor * q, scale > 0, factor): the kernels take a row's maximum before scaling, so scale must be positive."""
    if scale > 0.0:
        return q, scale, 1.0
    return (-q, -scale, -1.0) if scale < 0.0 else (torch.zeros_like(q), 1.0, 0.0)


def _score_factors(scale: float, softcap: float | None) -> tuple[float, float]:
    """(to_cap, to_log2): what multiplies q k^T before tanh, and what makes base-2 logits of the result."""
    return (0.0, scale * LOG2E) if softcap is None else (scale / softcap, softcap * LOG2E)


def _grid(blocks: int, heads: int) -> tuple[int]:
    if blocks * heads >= 2**31:
        raise ValueError(f"attention: at most 2**31 - 1 blocks of rows over all heads, got {blocks * heads}")
    return (blocks * heads,)


def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    offset: int,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out = softmax(z) v and lse = log sum exp(z), z = scale * q k^T, through softcap * tanh(z / softcap) if given.

    q (B, H, S, D), k (B, Hkv, T, D), v (B, Hkv, T, Dv), all fp32, bf16 or fp16; H a multiple of Hkv, D, Dv <= 256.
    causal lets query i see the keys j <= i + offset. Returns out (B, H, S, Dv) in q's dtype and lse (B, H, S), fp32,
    natural logarithm. A query that sees no key gives 0 and -inf. Raises ValueError for a head size above 256.

    Source: Dao, FlashAttention-2 (2023), algorithm 1.
    """
    B, H, S, D = q.shape
    Hkv, T, Dv = v.shape[1:]
    out = q.new_empty((B, H, S, Dv))
    lse = q.new_empty((B, H, S), dtype=torch.float32)
    block_d, block_dv = _padded(D), _padded(Dv)
    if out.numel() == 0 or T == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    q, scale, _ = _positive_scale(q, scale)
    q, k, v = _kernel_layout(q), _kernel_layout(k), _kernel_layout(v)
    to_cap, to_log2 = _score_factors(scale, softcap)
    unit, (q_strides, k_strides, v_strides) = strides_in_units(q, k, v)
    with on_device(q):
        arch = target_arch()
        tile = configs.attention(arch, q.dtype, max(block_d, block_dv)).forward
        if arch == "sm_90" and q.element_size() == 2 and unit * 2 < VECTOR_BYTES:
            # For these rows and values narrower than keys ptxas 12.8 (Triton 3.6) makes a descriptor from registers
            # that it has not set: wrong results, reads outside of shared memory (docs/tuning.md).
            block_dv = max(block_d, block_dv)
        _attention_forward_kernel[_grid(triton.cdiv(S, tile.block_m), B * H)](
            q, k, v, out, lse, *q_strides, *k_strides, *v_strides, H, S, T, offset, to_cap, to_log2,
            GROUP=H // Hkv, D=D, DV=Dv, UNIT=unit,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, MASKED_N=tile.masked, BLOCK_D=block_d, BLOCK_DV=block_dv,
            CHUNK_D=min(tile.chunk, block_d), CHUNK_DV=min(tile.chunk, block_dv),
            CAUSAL=causal, SOFTCAP=softcap is not None, PRECISION=configs.dot_precision(arch, q.dtype),
            **tile.launch_options, **launch_options(arch),
        )  # fmt: skip
    return out, lse


def attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    offset: int,
    softcap: float | None = None,
    dlse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) for the gradients dout of out and, if given, dlse of lse; the rest as `attention_forward` had it.

    dz = p * (dout v^T - rowsum(dout * out) + dlse), dq = scale * dz k, dk = scale * dz^T q, dv = p^T dout; a key's
    gradients are summed over the query heads of its group. The same bits every run: no atomics.

    Source: Dao, FlashAttention-2 (2023), algorithm 2; lse's gradient as in PyTorch's flex_attention.
    """
    B, H, S, D = q.shape
    Hkv, T, Dv = v.shape[1:]
    dq = torch.empty((B, H, S, D), dtype=q.dtype, device=q.device)
    dk = torch.empty((B, Hkv, T, D), dtype=q.dtype, device=q.device)
    dv = torch.empty((B, Hkv, T, Dv), dtype=q.dtype, device=q.device)
    block_d, block_dv = _padded(D), _padded(Dv)
    if S == 0 or T == 0 or B == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    q, scale, factor = _positive_scale(q, scale)
    q, k, v, dout = (_kernel_layout(x) for x in (q, k, v, dout.to(q.dtype)))
    out, lse = out.contiguous(), lse.contiguous()
    delta = torch.empty_like(lse)
    to_cap, to_log2 = _score_factors(scale, softcap)
    unit, (q_strides, k_strides, v_strides, d_strides) = strides_in_units(q, k, v, dout)
    with on_device(q):
        arch = target_arch()
        config = configs.attention(arch, q.dtype, max(block_d, block_dv))
        shared = {
            "GROUP": H // Hkv, "D": D, "DV": Dv, "UNIT": unit, "BLOCK_D": block_d, "BLOCK_DV": block_dv,
            "CAUSAL": causal, "SOFTCAP": softcap is not None, "PRECISION": configs.dot_precision(arch, q.dtype),
            **launch_options(arch),
        }  # fmt: skip
        tile = config.backward_dq
        _attention_backward_dq_kernel[_grid(triton.cdiv(S, tile.block_m), B * H)](
            q, k, v, out, dout, lse, lse if dlse is None else dlse.to(torch.float32).contiguous(), delta, dq,
            *q_strides, *k_strides, *v_strides, *d_strides, H, S, T, offset, scale, to_cap, to_log2,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, MASKED_N=tile.masked, HAS_DLSE=dlse is not None,
            CHUNK_D=min(tile.chunk, block_d), CHUNK_DV=min(tile.chunk, block_dv),
            **tile.launch_options, **shared,
        )  # fmt: skip
        tile = config.backward_dkdv
        # Where rows of a head are taken in chunks, dk and dv in one program would not fit its registers.
        together = max(block_d, block_dv) <= tile.chunk
        for of_k, of_v in [(True, True)] if together else [(True, False), (False, True)]:
            _attention_backward_dkdv_kernel[_grid(triton.cdiv(T, tile.block_n), B * Hkv)](
                q, k, v, dout, lse, delta, dk, dv,
                *q_strides, *k_strides, *v_strides, *d_strides, Hkv, S, T, offset, scale, to_cap, to_log2,
                BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, MASKED_M=tile.masked,
                CHUNK_D=min(tile.chunk, block_d), CHUNK_DV=min(tile.chunk, block_dv), OF_K=of_k, OF_V=of_v,
                **tile.launch_options, **shared,
            )  # fmt: skip
    return (dq if factor == 1.0 else dq * factor), dk, dv
