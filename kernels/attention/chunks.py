"""Products over heads too wide for the registers: CHUNK columns at a time where BLOCK is more than CHUNK, else at once.

As three products of tf32 halves, fp32 rows of 256 take twice their size in registers, for each operand. So the rows of
a wide head are never whole there: an operand is no tile but the pointers of its first CHUNK columns, a product over
columns is a loop whose loads are pipelined, and an accumulator is a tuple of (rows, CHUNK) tiles. Queries come from the
caches again for every block of keys: 32 bytes a score beside the 128 of keys and values, in tiles of 16 x 32.

`OF` is the head's arguments.Columns. Where BLOCK = CHUNK the functions are a load, a dot or a store, and compile to
just that.
"""

# Kernels grow tuples in loops, which Triton unrolls and types anew.
# mypy: disable-error-code="assignment"
from __future__ import annotations

import triton
import triton.language as tl

from gpt4v_fast.kernels.common import load_tile, store_tile


@triton.jit
def operand(pointers, rows, columns, n_rows, OF: tl.constexpr, MASK_ROWS: tl.constexpr):
    """What `row_products` and `accumulate` take: the tile, or its pointers where BLOCK columns are more than CHUNK."""
    if OF.CHUNK < OF.BLOCK:
        return pointers
    else:
        return load_tile(pointers, rows, columns, n_rows, OF.D, MASK_ROWS)


@triton.jit
def row_products(a, b, rows_a, n_a, rows_b, n_b, OF: tl.constexpr, MASK_B: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T for operands of D columns. Chunks come from memory (or its caches) once for every use."""
    D: tl.constexpr = OF.D
    CHUNK: tl.constexpr = OF.CHUNK
    if CHUNK == OF.BLOCK:
        return tl.dot(a, tl.trans(b), input_precision=PRECISION)
    else:
        columns = tl.arange(0, CHUNK)
        products = tl.zeros((rows_a.shape[0], rows_b.shape[0]), tl.float32)
        for start in tl.range(0, D // CHUNK * CHUNK, CHUNK):
            a_tile = load_tile(a + start, rows_a, columns, n_a, CHUNK, True)  # (rows of a, CHUNK)
            b_tile = load_tile(b + start, rows_b, columns, n_b, CHUNK, MASK_B)  # (rows of b, CHUNK)
            products = tl.dot(a_tile, tl.trans(b_tile), products, input_precision=PRECISION)
        if D % CHUNK > 0:
            a_tile = load_tile(a + D // CHUNK * CHUNK, rows_a, columns, n_a, D % CHUNK, True)
            b_tile = load_tile(b + D // CHUNK * CHUNK, rows_b, columns, n_b, D % CHUNK, MASK_B)
            products = tl.dot(a_tile, tl.trans(b_tile), products, input_precision=PRECISION)
        return products


@triton.jit
def zero_sums(ROWS: tl.constexpr, OF: tl.constexpr):
    """An accumulator of D columns: a tuple of (ROWS, CHUNK) tiles, as many as it takes."""
    D: tl.constexpr = OF.D  # Triton 3.6 takes no member of a NamedTuple for a bound of static_range
    CHUNK: tl.constexpr = OF.CHUNK
    sums = ()
    for _ in tl.static_range(0, D, CHUNK):
        sums += (tl.zeros((ROWS, CHUNK), tl.float32),)
    return sums


@triton.jit
def scale_sums(sums, factor):
    """sums times factor: a scalar, or a column of one number a row."""
    scaled = ()
    for c in tl.static_range(len(sums)):
        scaled += (sums[c] * factor,)
    return scaled


@triton.jit
def accumulate(sums, a, b, rows_b, n_b, OF: tl.constexpr, MASK_B: tl.constexpr, PRECISION: tl.constexpr):
    """sums + a b, of `zero_sums`' form; a is a tile, b an operand of D columns."""
    D: tl.constexpr = OF.D
    CHUNK: tl.constexpr = OF.CHUNK
    if CHUNK == OF.BLOCK:
        return (tl.dot(a.to(b.dtype), b, sums[0], input_precision=PRECISION),)
    else:
        columns = tl.arange(0, CHUNK)
        more = ()
        for c in tl.static_range(len(sums)):
            tile = load_tile(b + c * CHUNK, rows_b, columns, n_b, D - c * CHUNK, MASK_B)  # (rows of b, CHUNK)
            more += (tl.dot(a.to(tile.dtype), tile, sums[c], input_precision=PRECISION),)
        return more


@triton.jit
def store_sums(base, sums, factor, rows, n_rows, OF: tl.constexpr):
    """sums times a scalar to rows of D elements that follow one another."""
    D: tl.constexpr = OF.D
    CHUNK: tl.constexpr = OF.CHUNK
    columns = tl.arange(0, CHUNK)
    for c in tl.static_range(len(sums)):
        store_tile(base + c * CHUNK, sums[c] * factor, rows, columns, D, n_rows, D - c * CHUNK)
