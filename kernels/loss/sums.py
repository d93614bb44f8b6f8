"""The end of linear cross-entropy's products on a GPU: sums become a gradient, or wait for the next chunk."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gpt4v_fast.kernels.common import halves


class Destination(NamedTuple):
    """Where a gradient's sums go."""

    out: Any  # the gradient
    upper: Any  # its memory as 16-bit integers, where it has 16 bits: upper halves until the last chunk
    lower: Any  # lower halves until then
    scales: Any  # the second one is a factor of the finished sums


class Sums(NamedTuple):
    """What becomes of sums over a chunk, for the compiler."""

    SCALED: bool
    SEVERAL: bool  # chunks
    HALVES: bool


@triton.jit
def _finish_part(
    sums, to, lower_ptr, out_rows, lower_rows, first_column, E, exists, counted, elsewise, is_first, is_last,
    SUMS: tl.constexpr,
):  # fmt: skip
    columns = first_column + tl.arange(0, sums.shape[1])
    mask = exists[:, None] & (columns < E)[None, :]
    places = out_rows[:, None] + columns[None, :]
    if SUMS.SEVERAL:
        lower_places = lower_rows[:, None] + columns[None, :]
        held = mask & counted[:, None]
        earlier = tl.where(is_first == 0, held, False)
        if SUMS.HALVES:
            upper = tl.load(to.upper + places, mask=earlier, other=0).to(tl.int32)
            lower = tl.load(lower_ptr + lower_places, mask=earlier, other=0).to(tl.int32)
            sums += ((upper << 16) | (lower & 0xFFFF)).to(tl.float32, bitcast=True)
        else:
            sums += tl.load(to.out + places, mask=earlier, other=0.0)
        held = tl.where(is_last == 0, held, False)
        if SUMS.HALVES:
            bits = sums.to(tl.int32, bitcast=True)
            tl.store(to.upper + places, (bits >> 16).to(tl.int16), mask=held)
            tl.store(lower_ptr + lower_places, bits.to(tl.int16), mask=held)
        else:
            tl.store(to.out + places, sums, mask=held)
        mask = tl.where(is_last == 0, False, mask)
    if SUMS.SCALED:
        sums *= tl.load(to.scales + 1)
    sums = tl.where(counted[:, None], sums, elsewise[:, None])
    tl.store(to.out + places, sums.to(to.out.dtype.element_ty), mask=mask)


@triton.jit
def finish_sums(
    sums, to, lower_ptr, out_rows, lower_rows, first_column, E, exists, counted, elsewise, is_first, is_last,
    SUMS: tl.constexpr,
):  # fmt: skip
    """Writes a gradient's sums over a chunk or, where there are several, adds those of the chunks before.

    Until the last chunk sums stay fp32: in the gradient itself, or half in its 16 bits (to.upper is to.out) and half
    beside. Rows that do not count get `elsewise` in the end. Earlier sums are added here, not before the product's
    loop, where they would take the registers of its loads; wide tiles are finished by halves for the same reason.
    """
    WIDTH: tl.constexpr = sums.shape[1]
    if SUMS.SEVERAL and WIDTH > 128:
        parts = halves(sums)
    else:
        parts = (sums,)
    for part in tl.static_range(len(parts)):
        _finish_part(
            parts[part], to, lower_ptr, out_rows, lower_rows, first_column + part * (WIDTH // len(parts)), E, exists,
            counted, elsewise, is_first, is_last, SUMS,
        )  # fmt: skip
