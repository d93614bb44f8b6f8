"""What the kernels of the linear loss share: the list of tokens, the order of tiles, and a tile of logits.

Their arguments go in NamedTuples, of which Triton specialises every member as an argument of its own. Sizes and places
of a chunk change from launch to launch: they stay arguments of their own, since `do_not_specialize` does not reach the
members of a tuple (Triton 3.6 to 3.9).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from gpt4v_fast.kernels import configs
from gpt4v_fast.kernels.common import last_dim_contiguous, launch_options, strides_in_units

VECTOR = tl.constexpr(16)  # elements in which launchers count rows of logits and of G, which so begin on 16 bytes
_ROWS_BLOCK = 1024  # labels that the listing program looks at together


class Matrix(NamedTuple):
    """Rows whose elements are neighbours; the stride counts units (Product.UNIT)."""

    pointer: Any  # a torch.Tensor for the launcher
    stride: int


class Tokens(NamedTuple):
    """Labels (N,), and the list of tokens: rows (N,), those that count first; counts (2,), how many count, how many
    labels are bad. All int64."""

    target: Any
    rows: Any
    counts: Any


class Product(NamedTuple):
    """A tile of tokens, classes and features, and how it is multiplied, for the compiler."""

    BLOCK_M: int
    BLOCK_V: int
    BLOCK_E: int
    GROUP: int  # rows of tiles that are walked together
    UNIT: int  # elements
    EVEN_E: bool  # BLOCK_E divides the features
    PRECISION: str  # of tl.dot


@triton.jit(do_not_specialize=["N", "V", "ignore_index"])
def _linear_cross_entropy_rows_kernel(target_ptr, rows_ptr, counts_ptr, N, V, ignore_index, BLOCK: tl.constexpr):
    """rows: counted tokens in their order, then the others from the end. counts: how many count, how many are bad."""
    lane = tl.arange(0, BLOCK)
    n_counted = tl.cast(0, tl.int64)
    n_bad = tl.cast(0, tl.int64)
    for start in tl.range(0, N, BLOCK):
        row = tl.cast(start, tl.int64) + lane  # (BLOCK,)
        exists = row < N
        target = tl.load(target_ptr + row, mask=exists, other=-1)
        ignored = target == ignore_index
        counted = exists & (target >= 0) & (target < V) & (target != ignore_index)
        ones = counted.to(tl.int32)
        before = n_counted + (tl.cumsum(ones, 0) - ones)
        tl.store(rows_ptr + tl.where(counted, before, N - 1 - (row - before)), row, mask=exists)
        n_counted += tl.sum(ones, 0)
        n_bad += tl.sum((exists & (counted == 0) & (ignored == 0)).to(tl.int32), 0)
    tl.store(counts_ptr, n_counted)
    tl.store(counts_ptr + 1, n_bad)


@triton.jit
def grouped(program, n_rows, n_columns, GROUP: tl.constexpr):
    """(row, column) of a program in a grid that is walked GROUP rows at a time, column by column.

    Programs that run at the same time then need few rows and few columns of the operands, which stay in L2.
    """
    first = program // (GROUP * n_columns) * GROUP
    size = tl.minimum(n_rows - first, GROUP)
    inside = program % (GROUP * n_columns)
    return first + inside % size, inside // size


@triton.jit
def row_stride(units, UNIT: tl.constexpr):
    return tl.cast(units, tl.int64) * UNIT


@triton.jit
def logits_tile(hidden, weight, bias_ptr, rows, columns, depth, V, HAS_BIAS: tl.constexpr, PRODUCT: tl.constexpr):
    """hidden[rows] weight[columns]^T + bias[columns] in fp32; columns from V on repeat the last class."""
    UNIT: tl.constexpr = PRODUCT.UNIT
    BLOCK_E: tl.constexpr = PRODUCT.BLOCK_E
    PRECISION: tl.constexpr = PRODUCT.PRECISION
    E = depth * UNIT
    inner = tl.arange(0, BLOCK_E)
    classes = tl.minimum(columns, V - 1).to(tl.int64)
    hidden_tile = hidden.pointer + ((rows * row_stride(hidden.stride, UNIT))[:, None] + inner[None, :])
    weight_tile = weight.pointer + ((classes * row_stride(weight.stride, UNIT))[:, None] + inner[None, :])
    logits = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for start in tl.range(0, E, BLOCK_E):
        if PRODUCT.EVEN_E:
            h = tl.load(hidden_tile)  # (BLOCK_M, BLOCK_E)
            w = tl.load(weight_tile)  # (BLOCK_V, BLOCK_E)
        else:
            h = tl.load(hidden_tile, mask=(inner < E - start)[None, :], other=0.0)
            w = tl.load(weight_tile, mask=(inner < E - start)[None, :], other=0.0)
        logits = tl.dot(h, tl.trans(w), logits, input_precision=PRECISION)
        hidden_tile += BLOCK_E
        weight_tile += BLOCK_E
    if HAS_BIAS:
        logits += tl.load(bias_ptr + classes)[None, :]
    return logits


class Inputs(NamedTuple):
    """What the kernels take of hidden and weight, the depth in units."""

    hidden: Matrix
    weight: Matrix
    depth: int
    unit: int


def inputs(hidden: torch.Tensor, weight: torch.Tensor) -> Inputs:
    hidden, weight = last_dim_contiguous(hidden), last_dim_contiguous(weight)
    unit, ((of_hidden,), (of_weight,)) = strides_in_units(hidden, weight)
    shared = math.gcd(unit, hidden.shape[1])
    factor = unit // shared
    matrices = Matrix(hidden, of_hidden * factor), Matrix(weight, of_weight * factor)
    return Inputs(*matrices, hidden.shape[1] // shared, shared)


def product(tile: configs.ProductTile, tensors: Inputs, arch: str) -> Product:
    hidden = tensors.hidden.pointer
    even = hidden.shape[1] % tile.block_e == 0
    precision = configs.dot_precision(arch, hidden.dtype)
    return Product(tile.block_m, tile.block_v, tile.block_e, tile.group, tensors.unit, even, precision)


def list_rows(target: torch.Tensor, V: int, ignore_index: int, arch: str) -> Tokens:
    """The list of the tokens whose contiguous labels are given."""
    rows, counts = torch.empty_like(target), target.new_empty(2)
    _linear_cross_entropy_rows_kernel[(1,)](
        target, rows, counts, target.shape[0], V, ignore_index,
        BLOCK=_ROWS_BLOCK, num_warps=4, **launch_options(arch),
    )  # fmt: skip
    return Tokens(target, rows, counts)
