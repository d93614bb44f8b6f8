"""The end of linear cross-entropy's products on a GPU: sums become a gradient, or wait for the next chunk."""

from __future__ import annotations

import triton
import triton.language as tl

from gpt4v_fast.kernels.common import halves


@triton.jit
def _finish_part(
    sums, out_ptr, upper_ptr, lower_ptr, scale_ptr, out_rows, lower_rows, first_column, E, exists, counted, elsewise,
    is_first, is_last, SCALED: tl.constexpr, SEVERAL: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    columns = first_column + tl.arange(0, sums.shape[1])
    mask = exists[:, None] & (columns < E)[None, :]
    places = out_rows[:, None] + columns[None, :]
    if SEVERAL:
        lower_places = lower_rows[:, None] + columns[None, :]
        held = mask & counted[:, None]
        earlier = tl.where(is_first == 0, held, False)
        if HALVES:
            upper = tl.load(upper_ptr + places, mask=earlier, other=0).to(tl.int32)
            lower = tl.load(lower_ptr + lower_places, mask=earlier, other=0).to(tl.int32)
            sums += ((upper << 16) | (lower & 0xFFFF)).to(tl.float32, bitcast=True)
        else:
            sums += tl.load(out_ptr + places, mask=earlier, other=0.0)
        held = tl.where(is_last == 0, held, False)
        if HALVES:
            bits = sums.to(tl.int32, bitcast=True)
            tl.store(upper_ptr + places, (bits >> 16).to(tl.int16), mask=held)
            tl.store(lower_ptr + lower_places, bits.to(tl.int16), mask=held)
        else:
            tl.store(out_ptr + places, sums, mask=held)
        mask = tl.where(is_last == 0, False, mask)
    if SCALED:
        sums *= tl.load(scale_ptr + 1)
    sums = tl.where(counted[:, None], sums, elsewise[:, None])
    tl.store(out_ptr + places, sums.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def finish_sums(
    sums, out_ptr, upper_ptr, lower_ptr, scale_ptr, out_rows, lower_rows, first_column, E, exists, counted, elsewise,
    is_first, is_last, SCALED: tl.constexpr, SEVERAL: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Writes a gradient's sums over a chunk or, where there are several, adds those of the chunks before.

    Until the last chunk sums stay fp32: in the gradient itself, or half in its 16 bits (upper_ptr is out_ptr) and half
    beside. Rows that do not count get `elsewise` in the end. Earlier sums are added here, not before the product's
    loop, where they would take the registers of its loads; wide tiles are finished by halves for the same reason.
    """
    WIDTH: tl.constexpr = sums.shape[1]
    if SEVERAL and WIDTH > 128:
        left, right = halves(sums)
        _finish_part(
            left, out_ptr, upper_ptr, lower_ptr, scale_ptr, out_rows, lower_rows, first_column, E, exists, counted,
            elsewise, is_first, is_last, SCALED, SEVERAL, HALVES,
        )  # fmt: skip
        _finish_part(
            right, out_ptr, upper_ptr, lower_ptr, scale_ptr, out_rows, lower_rows, first_column + WIDTH // 2, E,
            exists, counted, elsewise, is_first, is_last, SCALED, SEVERAL, HALVES,
        )  # fmt: skip
    else:
        _finish_part(
            sums, out_ptr, upper_ptr, lower_ptr, scale_ptr, out_rows, lower_rows, first_column, E, exists, counted,
            elsewise, is_first, is_last, SCALED, SEVERAL, HALVES,
        )  # fmt: skip
