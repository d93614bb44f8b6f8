"""Flash attention in Triton, forward and backward, for NVIDIA and AMD.

    z = softcap * tanh(scale * q k^T / softcap), or scale * q k^T;   o = softmax(z) v;   lse = log sum_j exp(z_j)

Forward (Dao, FlashAttention-2, 2023, algorithm 1; the running maximum is Milakov and Gimelshein, 2018): one program
owns BLOCK_M queries of one head and walks over the keys in blocks of BLOCK_N, so that scores live in registers only.
Backward (the same paper, algorithm 2): scores are computed again from lse. One kernel owns queries and makes dq, and,
since it has dout and out at hand, delta = rowsum(dout * out) - dlse; a second one owns keys and makes dk and dv,
walking over the queries of every head of its group. Nothing is added by atomics, so results are the same bits each run.
Heads too wide for the registers are taken some columns at a time (kernels/attention/chunks.py); dk and dv then have a
launch each.

Flops: 4 S T D a head forward, 14 S T D backward (2.5 times forward, and 2 products of scores done twice for want of
atomics), half of it when causal. Bytes: q, k, v, out once each from memory if a head's keys fit in L2.

bf16 and fp16 appear in loads, dot operands and stores alone; everything else is fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gpt4v_fast.kernels import configs
from gpt4v_fast.kernels.attention.arguments import Blocks, Columns, Heads, Options, head_of, rows_of
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
    acc, row_max, row_sum, q, k_head, v_head, stride_k, stride_v, queries, first_key, last_key, S, T, offset, to_cap,
    to_log2, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """Keys first_key..last_key (a multiple of BLOCK_N apart unless MASKED) for one block of queries."""
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
        scores = row_products(q, k, queries, S, block, n_rows, QK, MASKED, PRECISION)  # (BLOCK_M, BLOCK_N)
        if OPTIONS.SOFTCAP:
            scores = tanh(scores * to_cap)
        if MASKED:
            scores = tl.where((start + block)[None, :] <= limit[:, None], scores, float("-inf"))
        p, rescale, row_max, row_sum = online_softmax_step(scores, row_max, row_sum, to_log2, MASKED)
        v = operand(v_tile, block, columns_v, n_rows, V, MASKED)  # (BLOCK_N, BLOCK_DV)
        p = p.to(v_head.dtype.element_ty)
        acc = scale_sums(acc, rescale[:, None])
        acc = accumulate(acc, p, v, block, n_rows, V, MASKED, PRECISION)
        k_tile += tl.cast(stride_k, tl.int64) * BLOCK_N
        v_tile += tl.cast(stride_v, tl.int64) * BLOCK_N
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["heads", "S", "T", "offset"])
def _attention_forward_kernel(
    q, k, v, out_ptr, lse_ptr, heads, S, T, offset, to_cap, to_log2, BLOCKS: tl.constexpr, OPTIONS: tl.constexpr
):
    """out and lse of BLOCKS.M queries of one head."""
    QK: tl.constexpr = OPTIONS.QK
    V: tl.constexpr = OPTIONS.V
    UNIT: tl.constexpr = OPTIONS.UNIT
    BLOCK_M: tl.constexpr = BLOCKS.M
    blocks = tl.cdiv(S, BLOCK_M)
    # The last queries see the most keys, so their blocks start first and the short ones fill the gaps at the end.
    first_query = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    b = (tl.program_id(0) // blocks // heads).to(tl.int64)
    h = (tl.program_id(0) // blocks % heads).to(tl.int64)
    queries = first_query + tl.arange(0, BLOCK_M)
    block = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, QK.CHUNK)
    columns_v = tl.arange(0, V.CHUNK)
    q_tile = rows_of(q, b, h, first_query, UNIT)
    k_head = head_of(k, b, h // OPTIONS.GROUP, UNIT)
    v_head = head_of(v, b, h // OPTIONS.GROUP, UNIT)

    q_tile = tile_pointers(q_tile, block, columns, q.row * UNIT)
    n_rows = S - first_query
    q_rows = operand(q_tile, block, columns, n_rows, QK, True)  # (BLOCK_M, BLOCK_D)
    acc = zero_sums(BLOCK_M, V)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    unmasked, last = key_bounds(first_query, T, offset, BLOCK_M, BLOCKS.N, OPTIONS.CAUSAL)
    CHUNKED: tl.constexpr = QK.CHUNK < QK.BLOCK or V.CHUNK < V.BLOCK
    if CHUNKED:  # masks cost 2% there, and a second loop more registers than there are
        unmasked = 0
    stride_k = k.row * UNIT
    stride_v = v.row * UNIT
    # The masked blocks go first: what their masks need is then no burden on the registers of the long loop.
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, q_rows, k_head, v_head, stride_k, stride_v, queries, unmasked, last, S, T, offset,
        to_cap, to_log2, BLOCKS.MASKED, True, OPTIONS,
    )  # fmt: skip
    if not CHUNKED:
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, q_rows, k_head, v_head, stride_k, stride_v, queries, 0, unmasked, S, T, offset,
            to_cap, to_log2, BLOCKS.N, False, OPTIONS,
        )  # fmt: skip

    row = (b * heads + h) * S + first_query
    saw_nothing = row_sum == 0.0
    lse = tl.where(saw_nothing, float("-inf"), (row_max + tl.log2(row_sum)) * _LN2)
    for c in tl.static_range(len(acc)):
        out = acc[c] / tl.where(saw_nothing, 1.0, row_sum)[:, None]
        out_tile = out_ptr + row * V.D + c * V.CHUNK
        store_tile(out_tile, out, block, columns_v, V.D, n_rows, V.D - c * V.CHUNK)
    tl.store(lse_ptr + row + block, lse, mask=block < n_rows)


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


def _heads(*tensors: torch.Tensor) -> tuple[int, list[Heads]]:
    """(unit of the strides, the tensors as kernels take them)."""
    unit, strides = strides_in_units(*tensors)
    return unit, [Heads(tensor, *of_tensor) for tensor, of_tensor in zip(tensors, strides, strict=True)]


def _blocks(tile: configs.Tile) -> Blocks:
    return Blocks(tile.block_m, tile.block_n, tile.masked)


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
    unit, heads = _heads(q, k, v)
    with on_device(q):
        arch = target_arch()
        tile = configs.attention(arch, q.dtype, max(block_d, block_dv)).forward
        if arch == "sm_90" and q.element_size() == 2 and unit * 2 < VECTOR_BYTES:
            # For these rows and values narrower than keys ptxas 12.8 (Triton 3.6) makes a descriptor from registers
            # that it has not set: wrong results, reads outside of shared memory (docs/notes/2026-11-gpu-attention.md).
            block_dv = max(block_d, block_dv)
        options = Options(
            Columns(D, block_d, min(tile.chunk, block_d)), Columns(Dv, block_dv, min(tile.chunk, block_dv)),
            H // Hkv, unit, causal, softcap is not None, configs.dot_precision(arch, q.dtype),
        )  # fmt: skip
        _attention_forward_kernel[_grid(triton.cdiv(S, tile.block_m), B * H)](
            *heads,
            out,
            lse,
            H,
            S,
            T,
            offset,
            to_cap,
            to_log2,
            BLOCKS=_blocks(tile),
            OPTIONS=options,
            **tile.launch_options,
            **launch_options(arch),
        )
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
    unit, heads = _heads(q, k, v, dout)
    pointers, strides = [x.pointer for x in heads], [stride for x in heads for stride in (x.batch, x.head, x.row)]
    with on_device(q):
        arch = target_arch()
        config = configs.attention(arch, q.dtype, max(block_d, block_dv))
        known = H // Hkv, unit, causal, softcap is not None, configs.dot_precision(arch, q.dtype)

        def options(chunk: int) -> Options:
            return Options(
                Columns(D, block_d, min(chunk, block_d)), Columns(Dv, block_dv, min(chunk, block_dv)), *known
            )

        tile = config.backward_dq
        _attention_backward_dq_kernel[_grid(triton.cdiv(S, tile.block_m), B * H)](
            *pointers[:3], out, pointers[3], lse, lse if dlse is None else dlse.to(torch.float32).contiguous(), delta,
            dq, *strides, H, S, T, offset, scale, to_cap, to_log2, HAS_DLSE=dlse is not None, BLOCKS=_blocks(tile),
            OPTIONS=options(tile.chunk), **tile.launch_options, **launch_options(arch),
        )  # fmt: skip
        tile = config.backward_dkdv
        # Where rows of a head are taken in chunks, dk and dv in one program would not fit its registers.
        together = max(block_d, block_dv) <= tile.chunk
        for of_k, of_v in [(True, True)] if together else [(True, False), (False, True)]:
            _attention_backward_dkdv_kernel[_grid(triton.cdiv(T, tile.block_n), B * Hkv)](
                *pointers,
                lse,
                delta,
                dk,
                dv,
                *strides,
                Hkv,
                S,
                T,
                offset,
                scale,
                to_cap,
                to_log2,
                OF_K=of_k,
                OF_V=of_v,
                BLOCKS=_blocks(tile),
                OPTIONS=options(tile.chunk),
                **tile.launch_options,
                **launch_options(arch),
            )
    return (dq if factor == 1.0 else dq * factor), dk, dv
