"""Helpers that several Triton kernels share: tanh, the online softmax, tiles, and what a launch must know.

Importing this module imports triton; `gpt4v_fast` itself never does before a Triton kernel is asked for.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import triton
import triton.language as tl

# Exponentials run in base 2, one instruction on every GPU (on NVIDIA ex2.approx.ftz, 2 units in the last place, results
# below 2**-126 flushed to 0): scores carry a factor log2(e), results a factor ln(2).
LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
_LOG2E = tl.constexpr(LOG2E)

VECTOR_BYTES = 16  # the widest access of one thread on every target: 128 bits


@triton.jit
def tanh_and_slope(x):
    """tanh(x) in fp32, relative error below 2.5e-7 everywhere, and its derivative 1 - tanh(x)^2, below 5e-7.

    Below 0.55 the odd polynomial x + x**3 P(x**2), fitted by iteratively reweighted least squares on 4,000 Chebyshev
    nodes (largest relative error 3.7e-8 before rounding); above, 1 - q with q = 2 / (exp(2|x|) + 1), where nothing
    cancels because the result is at least 0.5. The derivative is q (2 - q) there, which keeps its digits where tanh(x)
    has been rounded to nearly 1.
    """
    square = x * x
    tail = ((0.01643758 * square - 0.05267181) * square + 0.13320725) * square - 0.33332947
    near = x + x * square * tail
    q = 2.0 / (tl.exp2(tl.abs(x) * (2.0 * _LOG2E)) + 1.0)
    far = 1.0 - q
    is_near = tl.abs(x) < 0.55
    return tl.where(is_near, near, tl.where(x < 0.0, -far, far)), tl.where(is_near, 1.0 - near * near, q * (2.0 - q))


@triton.jit
def tanh(x):
    """tanh(x) as above."""
    value, _slope = tanh_and_slope(x)
    return value


@triton.jit
def tanh_slope(x):
    """Its derivative."""
    _value, slope = tanh_and_slope(x)
    return slope


@triton.jit
def tile_pointers(base, rows, columns, stride):
    """Addresses of a (rows, columns) tile of a matrix with row stride `stride`, below MAX_ROW_STRIDE.

    A loop carries these and adds to them. Rejected: a scalar base plus offsets formed anew in every round (7.4 against
    7.1 instructions per score on sm_80, head size 64, tile 128 x 128, 8 warps), and 64-bit offsets (7.3).
    """
    return base + (rows[:, None] * stride + columns[None, :])


@triton.jit
def load_tile(pointers, rows, columns, n_rows, D: tl.constexpr, MASK_ROWS: tl.constexpr):
    """The tile, with zeros beyond n_rows rows (if asked to look) and D columns."""
    if MASK_ROWS and columns.shape[0] > D:
        return tl.load(pointers, mask=(rows < n_rows)[:, None] & (columns < D)[None, :], other=0.0)
    elif MASK_ROWS:
        return tl.load(pointers, mask=(rows < n_rows)[:, None], other=0.0)
    elif columns.shape[0] > D:
        return tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_tile(base, tile, rows, columns, stride, n_rows, D: tl.constexpr):
    pointers = tile_pointers(base, rows, columns, stride)
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=(rows < n_rows)[:, None] & (columns < D)[None, :])


@triton.jit
def halves(tile):
    """The left and the right half of the columns of a tile."""
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def last_visible(queries, n_keys, offset, CAUSAL: tl.constexpr):
    """The last key that each query may see: one number a row, so that a mask costs one comparison an element."""
    if CAUSAL:
        return tl.minimum(queries + offset, n_keys - 1)
    else:
        return tl.minimum(queries, 0) + (n_keys - 1)


@triton.jit
def online_softmax_step(scores, row_max, row_sum, to_log2, MASKED: tl.constexpr):
    """Take one block of scores into the running softmax: p, the factor for what came before, and the new statistics.

    Scores times to_log2 (positive) are base-2 logits. A row that has seen nothing yet has a maximum of -inf; where a
    mask makes that possible its exponents are taken from 0, so that they give 0 and not NaN.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1) * to_log2)  # (BLOCK_M,)
    if MASKED:
        origin = tl.where(new_max == float("-inf"), 0.0, new_max)
    else:
        origin = new_max
    p = tl.exp2(scores * to_log2 - origin[:, None])  # (BLOCK_M, BLOCK_N)
    rescale = tl.exp2(row_max - origin)
    return p, rescale, new_max, row_sum * rescale + tl.sum(p, 1)


@triton.jit
def key_bounds(first_query, n_keys, offset, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr):
    """(unmasked, last): every query of the block sees all keys below `unmasked` (whole blocks), none from `last` on."""
    last = n_keys
    everyone = n_keys
    if CAUSAL:
        last = tl.maximum(tl.minimum(n_keys, first_query + BLOCK_M + offset), 0)
        everyone = tl.maximum(tl.minimum(n_keys, first_query + 1 + offset), 0)
    return everyone // BLOCK_N * BLOCK_N, last


def interpreted() -> bool:
    """Whether kernels run under Triton's interpreter (TRITON_INTERPRET=1 when triton was imported)."""
    return bool(triton.knobs.runtime.interpret)


def target_arch() -> str:
    """The name under which `configs` knows the current device: "sm_90", "gfx942", or "interpreter"."""
    if interpreted():
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch).split(":")[0]


def launch_options(arch: str) -> dict[str, Any]:
    """Compiler options of every launch: fused multiply-adds always, subnormals flushed where that is an option."""
    if arch.startswith("gfx"):
        return {"enable_fp_fusion": True, "allow_flush_denorm": True}
    return {"enable_fp_fusion": True}


class Relaunch:
    """Launches kernels again and again with arguments that the compiler has no interest in: other numbers of those that
    it does not specialise on, other tensors that begin on 16 bytes.

    The first launch of a kernel goes the usual way, which binds and specialises every argument (43 us with 30 of them
    on the host of an H200, Triton 3.6, as long as some kernels). The others hand what that compiled to its launcher.
    All are on the stream that is current when this is made.
    """

    def __init__(self) -> None:
        self._compiled: dict[Any, Any] = {}
        self._stream: Any = None

    def __call__(self, function: Any, programs: int, *args: Any, **named: Any) -> None:
        """function[(programs,)](*args, **named); args are all that are not compile-time constants."""
        constants = [named[name] for name in function.arg_names[len(args) :]]
        key = (id(function), *constants)
        compiled = self._compiled.get(key)
        if compiled is None:  # always so under the interpreter, which compiles nothing
            self._compiled[key] = function[(programs,)](*args, **named)
            return
        if self._stream is None:
            driver = triton.runtime.driver.active
            self._stream = driver.get_current_stream(driver.get_current_device())
        hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
        metadata = compiled.launch_metadata((programs, 1, 1), self._stream, *args, *constants)  # for those hooks
        known = compiled.function, compiled.packed_metadata, metadata
        compiled.run(programs, 1, 1, self._stream, *known, *hooks, *args, *constants)


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """The context in which a kernel on `tensor` must be launched: its own device, not the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def last_dim_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` itself where neighbours in its last dimension are neighbours in memory, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def strides_in_units(*tensors: torch.Tensor) -> tuple[int, list[tuple[int, ...]]]:
    """(unit, strides of all but the last dimension in units), the unit a number of elements that divides them all.

    Triton learns of an integer argument only whether 16 divides it, so the row stride of a head size like 72 would lose
    its wide accesses. Multiplying by a compile-time unit inside the kernel gives the compiler back what is true. The
    unit is as many elements as 16 bytes hold, or less where a stride asks for less.
    """
    strides = [
        tuple(0 if size == 1 else stride for size, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True))
        for t in tensors
    ]
    unit = math.gcd(VECTOR_BYTES // min(t.element_size() for t in tensors), *(s for row in strides for s in row))
    return unit, [tuple(s // unit for s in row) for row in strides]
