"""Kernels of linear cross-entropy's gradients; linear_cross_entropy_backward.py has the algorithm and the launchers."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gpt4v_fast.kernels.loss.cross_entropy import gradient_slopes, load_lse, logit_gradient
from gpt4v_fast.kernels.loss.linear_cross_entropy_tiles import VECTOR, grouped, logits_tile, row_stride
from gpt4v_fast.kernels.loss.sums import finish_sums


class OfRows(NamedTuple):
    """Of each token, (N,), fp32."""

    lse: Any
    grad_nll: Any
    grad_lse: Any


@triton.jit(do_not_specialize=["V", "first_slot", "first_class", "tokens", "vectors"])
def _linear_cross_entropy_gradient_kernel(
    hidden, weight, bias_ptr, listed, weights, of_rows, scale_ptr, gradient_ptr, bias_sums_ptr,
    depth, V, first_slot, first_class, tokens, vectors, smoothing, softcap,
    HAS_BIAS: tl.constexpr, BIAS_SUMS: tl.constexpr, SCALED: tl.constexpr, PRODUCT: tl.constexpr, LOSS: tl.constexpr,
):  # fmt: skip
    """G of a tile of a chunk, zeros for tokens and classes that there are not, and its sums over the tile's tokens."""
    BLOCK_M: tl.constexpr = PRODUCT.BLOCK_M
    BLOCK_V: tl.constexpr = PRODUCT.BLOCK_V
    classes = vectors * VECTOR
    live = tl.minimum(tl.load(listed.counts).to(tl.int32) - first_slot, tokens)
    n_blocks = tl.cdiv(tl.maximum(live, 0), BLOCK_M)
    program = tl.program_id(0)
    if program >= n_blocks * (classes // BLOCK_V):
        return
    block, tile = grouped(program, n_blocks, classes // BLOCK_V, PRODUCT.GROUP)
    slots = block * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.load(listed.rows + first_slot + tl.minimum(slots, live - 1))
    columns = first_class + tile * BLOCK_V + tl.arange(0, BLOCK_V)
    x = logits_tile(hidden, weight, bias_ptr, rows, columns, depth, V, HAS_BIAS, PRODUCT)
    target = tl.load(listed.target + rows).to(tl.int32)
    slope_p, slope_target, slope_all = gradient_slopes(
        target, tl.load(of_rows.grad_nll + rows), tl.load(of_rows.grad_lse + rows), weights, V, smoothing, LOSS
    )
    gradient = logit_gradient(
        x, columns[None, :], (columns < V)[None, :], target[:, None], load_lse(of_rows.lse + rows)[:, None],
        slope_p[:, None], slope_target[:, None], slope_all[:, None], weights.pointer, softcap, LOSS,
    )  # fmt: skip
    gradient = tl.where((slots < live)[:, None] & (columns < V)[None, :], gradient, 0.0)  # (BLOCK_M, BLOCK_V)
    if BIAS_SUMS:
        place = tl.cast(block, tl.int64) * classes + tile * BLOCK_V
        tl.store(bias_sums_ptr + place + tl.arange(0, BLOCK_V), tl.sum(gradient, 0))
    if SCALED:
        gradient *= tl.load(scale_ptr)
    place = tl.cast(block * BLOCK_M, tl.int64) * classes + tile * BLOCK_V
    offsets = tl.arange(0, BLOCK_M)[:, None] * classes + tl.arange(0, BLOCK_V)[None, :]
    tl.store(gradient_ptr + place + offsets, gradient.to(gradient_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["V", "first_slot", "first_class", "tokens", "classes"])
def _linear_cross_entropy_grad_bias_kernel(
    bias_sums_ptr, counts_ptr, grad_bias_ptr, V, first_slot, first_class, tokens, classes,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_bias += the sums of a chunk's blocks of TOKENS tokens, in their order; NaN where a label is bad."""
    live = tl.minimum(tl.load(counts_ptr).to(tl.int32) - first_slot, tokens)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = (columns < classes) & (first_class + columns < V)
    sums = tl.load(grad_bias_ptr + first_class + columns, mask=exists, other=0.0)
    for block in tl.range(0, tl.cdiv(tl.maximum(live, 0), TOKENS)):
        sums += tl.load(bias_sums_ptr + tl.cast(block, tl.int64) * classes + columns, mask=exists, other=0.0)
    sums = tl.where(tl.load(counts_ptr + 1) > 0, float("nan"), sums)
    tl.store(grad_bias_ptr + first_class + columns, sums, mask=exists)


@triton.jit(
    do_not_specialize=["N", "V", "first_slot", "first_class", "tokens", "vectors", "near", "is_first", "is_last"]
)
def _linear_cross_entropy_grad_hidden_kernel(
    gradient_ptr, weight, listed, out, further_ptr,
    depth, N, V, first_slot, first_class, tokens, vectors, near, ignore_index, is_first, is_last,
    RAGGED: tl.constexpr, PRODUCT: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """grad_hidden of a block of tokens and of columns: (+)= G weight over a chunk of classes, which is RAGGED if those
    that there are do not come in whole blocks.

    Tokens that do not count get what their label says, 0 or NaN, from the last chunk. Lower halves of the first `near`
    tokens, whole blocks of them or all, are at out.lower, those of the others at further_ptr.
    """
    BLOCK_M: tl.constexpr = PRODUCT.BLOCK_M
    BLOCK_V: tl.constexpr = PRODUCT.BLOCK_V
    BLOCK_E: tl.constexpr = PRODUCT.BLOCK_E
    PRECISION: tl.constexpr = PRODUCT.PRECISION
    E = depth * PRODUCT.UNIT
    live = tl.minimum(tl.load(listed.counts).to(tl.int32) - first_slot, tokens)
    classes = vectors * VECTOR
    block, column = grouped(tl.program_id(0), tl.cdiv(tokens, BLOCK_M), tl.cdiv(E, BLOCK_E), PRODUCT.GROUP)
    if (block * BLOCK_M >= live) & (is_last == 0):
        return
    slots = block * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column * BLOCK_E + tl.arange(0, BLOCK_E)
    exists = (slots < tokens) & (first_slot + slots < N)
    rows = tl.load(listed.rows + first_slot + slots, mask=exists, other=0)
    inner = tl.arange(0, BLOCK_V)
    gradient_tile = gradient_ptr + ((slots.to(tl.int64) * classes)[:, None] + inner[None, :])  # (BLOCK_M, BLOCK_V)
    stride = row_stride(weight.stride, PRODUCT.UNIT)
    first_row = (first_class + inner) * stride
    weight_tile = weight.pointer + (first_row[:, None] + columns[None, :])  # (BLOCK_V, BLOCK_E)
    stop = tl.where(block * BLOCK_M < live, tl.minimum(classes, V - first_class), 0)
    sums = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for start in tl.range(0, stop, BLOCK_V):
        g = tl.load(gradient_tile)
        if RAGGED:
            w = tl.load(weight_tile, mask=(inner < stop - start)[:, None] & (columns < E)[None, :], other=0.0)
        elif PRODUCT.EVEN_E:
            w = tl.load(weight_tile)
        else:
            w = tl.load(weight_tile, mask=(columns < E)[None, :], other=0.0)
        sums = tl.dot(g, w, sums, input_precision=PRECISION)
        gradient_tile += BLOCK_V
        weight_tile += stride * BLOCK_V
    target = tl.load(listed.target + rows, mask=exists, other=0)
    elsewise = tl.where(target == ignore_index, 0.0, float("nan"))
    if SUMS.SEVERAL and SUMS.HALVES:
        is_near = block * BLOCK_M < near
        lower_ptr = tl.where(is_near, out.lower, further_ptr)
        lower_rows = slots - tl.where(is_near, 0, near)
    else:
        lower_ptr = out.lower
        lower_rows = slots
    finish_sums(
        sums, out, lower_ptr, rows * E, lower_rows.to(tl.int64) * E, column * BLOCK_E, E,
        exists, slots < live, elsewise, is_first, is_last, SUMS,
    )  # fmt: skip


@triton.jit
def _accumulate_all_tokens(
    sums, gradient_tile, hidden, first_slot, stop, inner, columns, E, classes, PRODUCT: tl.constexpr
):
    """sums + G^T hidden of whole blocks of tokens, where the list is that of all tokens in their order."""
    BLOCK_M: tl.constexpr = PRODUCT.BLOCK_M
    PRECISION: tl.constexpr = PRODUCT.PRECISION
    stride = row_stride(hidden.stride, PRODUCT.UNIT)
    hidden_tile = hidden.pointer + (((first_slot + inner) * stride)[:, None] + columns[None, :])  # (BLOCK_M, BLOCK_E)
    for _start in tl.range(0, stop, BLOCK_M):
        g = tl.load(gradient_tile)
        if PRODUCT.EVEN_E:
            h = tl.load(hidden_tile)
        else:
            h = tl.load(hidden_tile, mask=(columns < E)[None, :], other=0.0)
        sums = tl.dot(tl.trans(g), h, sums, input_precision=PRECISION)
        gradient_tile += BLOCK_M * tl.cast(classes, tl.int64)
        hidden_tile += BLOCK_M * stride
    return sums


@triton.jit
def _accumulate_tokens(
    sums, gradient_tile, hidden, rows_ptr, first_slot, start, live, inner, columns, E, classes, PRODUCT: tl.constexpr
):
    """sums + G^T hidden of the tokens from start on. Those behind the last one have zeros in G; they repeat it.

    Which rows are next is looked up a step ahead, and still takes longer than the products of a step.
    """
    BLOCK_M: tl.constexpr = PRODUCT.BLOCK_M
    PRECISION: tl.constexpr = PRODUCT.PRECISION
    gradient_tile += start * tl.cast(classes, tl.int64)
    rows = tl.load(rows_ptr + first_slot + tl.maximum(tl.minimum(start + inner, live - 1), 0))
    for first in tl.range(start, live, BLOCK_M):
        g = tl.load(gradient_tile)
        of_tokens = (rows * row_stride(hidden.stride, PRODUCT.UNIT))[:, None] + columns[None, :]
        if PRODUCT.EVEN_E:
            h = tl.load(hidden.pointer + of_tokens)  # (BLOCK_M, BLOCK_E)
        else:
            h = tl.load(hidden.pointer + of_tokens, mask=(columns < E)[None, :], other=0.0)
        rows = tl.load(rows_ptr + first_slot + tl.maximum(tl.minimum(first + BLOCK_M + inner, live - 1), 0))
        sums = tl.dot(tl.trans(g), h, sums, input_precision=PRECISION)
        gradient_tile += BLOCK_M * tl.cast(classes, tl.int64)
    return sums


@triton.jit(do_not_specialize=["N", "V", "first_slot", "first_class", "tokens", "vectors", "is_first", "is_last"])
def _linear_cross_entropy_grad_weight_kernel(
    gradient_ptr, hidden, listed, out,
    depth, N, V, first_slot, first_class, tokens, vectors, is_first, is_last,
    PRODUCT: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """grad_weight of a block of classes and of columns: (+)= G^T hidden over the counted tokens of a chunk.

    A bad label makes all of it NaN: its token's gradient is, and every class's sum has it.
    """
    BLOCK_M: tl.constexpr = PRODUCT.BLOCK_M
    BLOCK_V: tl.constexpr = PRODUCT.BLOCK_V
    BLOCK_E: tl.constexpr = PRODUCT.BLOCK_E
    E = depth * PRODUCT.UNIT
    live = tl.minimum(tl.load(listed.counts).to(tl.int32) - first_slot, tokens)
    classes = vectors * VECTOR
    block, column = grouped(tl.program_id(0), classes // BLOCK_V, tl.cdiv(E, BLOCK_E), PRODUCT.GROUP)
    places = block * BLOCK_V + tl.arange(0, BLOCK_V)
    columns = column * BLOCK_E + tl.arange(0, BLOCK_E)
    inner = tl.arange(0, BLOCK_M)
    gradient_tile = gradient_ptr + (inner[:, None] * classes + places[None, :])  # (BLOCK_M, BLOCK_V)
    sums = tl.zeros((BLOCK_V, BLOCK_E), tl.float32)
    # Where every token counts nothing need be looked up for whole blocks of tokens. (One loop behind the other, most
    # often without a step: in two branches each would have shared memory of its own.)
    whole = tl.where(tl.load(listed.counts) == N, tl.maximum(live, 0) // BLOCK_M * BLOCK_M, 0)
    sums = _accumulate_all_tokens(sums, gradient_tile, hidden, first_slot, whole, inner, columns, E, classes, PRODUCT)
    sums = _accumulate_tokens(
        sums, gradient_tile, hidden, listed.rows, first_slot, whole, live, inner, columns, E, classes, PRODUCT
    )
    good = tl.where(tl.load(listed.counts + 1) > 0, False, places >= 0)
    finish_sums(
        sums, out, out.lower, (first_class + places).to(tl.int64) * E,
        places.to(tl.int64) * E, column * BLOCK_E, E, first_class + places < V, good,
        tl.full((BLOCK_V,), float("nan"), tl.float32), is_first, is_last, SUMS,
    )  # fmt: skip
