"""Arguments of the attention kernels: tensors with their strides, and what the compiler knows, as NamedTuples.

Triton takes a NamedTuple apart and specialises its members like arguments of their own (16 divides it, it is 1, it is
None). `do_not_specialize` does not reach them (Triton 3.6 to 3.9): sizes that change from call to call, for which no
kernel should be compiled anew, stay arguments of their own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Heads(NamedTuple):
    """A tensor (batch, heads, rows, columns) whose columns are neighbours; strides count units (Options.UNIT)."""

    pointer: Any  # a torch.Tensor for the launcher
    batch: int
    head: int
    row: int


class Columns(NamedTuple):
    """Of a head: D, in a tile of BLOCK columns, CHUNK at a time (chunks.py)."""

    D: int
    BLOCK: int
    CHUNK: int


class Options(NamedTuple):
    QK: Columns
    V: Columns
    GROUP: int  # query heads of a key/value head
    UNIT: int  # elements
    CAUSAL: bool
    SOFTCAP: bool
    PRECISION: str  # of tl.dot


class Blocks(NamedTuple):
    """Of queries and keys in a tile of scores, and of the dimension that the kernel walks where a mask cuts it."""

    M: int
    N: int
    MASKED: int


@triton.jit
def head_of(tensor, b, h, UNIT: tl.constexpr):
    """The address of a head's first row."""
    return tensor.pointer + (b * tensor.batch + h * tensor.head) * UNIT


@triton.jit
def rows_of(tensor, b, h, first_row, UNIT: tl.constexpr):
    """The address of a head's row `first_row`."""
    return tensor.pointer + (b * tensor.batch + h * tensor.head + first_row.to(tl.int64) * tensor.row) * UNIT
