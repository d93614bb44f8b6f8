"""The projection to the vocabulary and its cross-entropy in Triton, forward: logits live in registers, never in memory.

    x = hidden weight^T + bias;   z, lse and nll of x as in kernels/loss/cross_entropy.py

Tokens that count are listed first, by one program on the device: nobody waits for their number. A program of the
forward kernel owns BLOCK_M tokens of the list and a range of the vocabulary (a split). It walks over its classes in
tiles of BLOCK_V: a product over the depth, BLOCK_E at a time, then one step of the online log-sum-exp on the tile
(Milakov and Gimelshein, 2018). A second kernel merges the splits in their order. Programs behind the last counted token
end at once, so ignored tokens cost a launch and no product. Nothing is added by atomics and nobody spins on a lock:
results are the same bits each run.

Flops: 2 C V E for C counted tokens. Bytes: per split and token 12 (16 with smoothing) of statistics; GROUP blocks of
tokens walk over the same classes at the same time, so weight is read C / (BLOCK_M GROUP) times from memory and else
from L2.

Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (2024), for the log-sum-exp in tiles of
the product. Theirs merges tiles under a lock; here the order of additions depends on the shapes alone.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from gpt4v_fast.kernels import configs
from gpt4v_fast.kernels.loss import plans
from gpt4v_fast.kernels.common import (
    LN2,
    LOG2E,
    halves,
    last_dim_contiguous,
    launch_options,
    on_device,
    strides_in_units,
    target_arch,
)
from gpt4v_fast.kernels.loss.cross_entropy import capped, class_weights

_LN2 = tl.constexpr(LN2)
_LOG2E = tl.constexpr(LOG2E)
_VECTOR = tl.constexpr(16)  # elements in which launchers count rows of kept logits, so that they begin on 16 bytes
_STEPS = tl.constexpr(512.0)  # of a kept logit, in an octave
_ROWS_BLOCK = 1024  # labels that the listing program looks at together
_MERGE_BLOCK = 128  # tokens of a merging program


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
def logits_tile(
    hidden_ptr, weight_ptr, bias_ptr, rows, columns, stride_hidden, stride_weight, depth, V,
    BLOCK_E: tl.constexpr, UNIT: tl.constexpr, EVEN_E: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """hidden[rows] weight[columns]^T + bias[columns] in fp32; columns from V on repeat the last class."""
    E = depth * UNIT
    inner = tl.arange(0, BLOCK_E)
    classes = tl.minimum(columns, V - 1).to(tl.int64)
    hidden_tile = hidden_ptr + ((rows * row_stride(stride_hidden, UNIT))[:, None] + inner[None, :])
    weight_tile = weight_ptr + ((classes * row_stride(stride_weight, UNIT))[:, None] + inner[None, :])
    logits = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for start in tl.range(0, E, BLOCK_E):
        if EVEN_E:
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


@triton.jit
def kept_places(slots, start, stop, E, vectors, whole, BLOCK_V: tl.constexpr):
    """(base, places, in_row): where the kept logits of these slots and of classes start.. are (plans.Kept), counted
    from element `base`, and which of the columns a row has."""
    classes = vectors * _VECTOR
    chunk = start // classes
    width = tl.where(chunk < whole, classes, tl.cdiv(stop - whole * classes, _VECTOR) * _VECTOR)
    inside = start - chunk * classes + tl.arange(0, BLOCK_V)
    places = slots[:, None] * width + inside[None, :]
    return tl.cast(chunk, tl.int64) * classes * E, places, inside // _VECTOR < width // _VECTOR


@triton.jit
def _keep_columns(x, origin, slots, start, stop, E, kept_ptr, vectors, whole):
    base, places, in_row = kept_places(slots, start, stop, E, vectors, whole, x.shape[1])
    steps = tl.minimum(tl.maximum((origin[:, None] - x) * (_STEPS * _LOG2E) + 0.5, 0.0), 65535.0)
    tl.store(kept_ptr + base + places, steps.to(tl.int32).to(tl.int16), mask=in_row[None, :])


@triton.jit
def _keep_half(x, origin, slots, start, stop, E, kept_ptr, vectors, whole):
    left, right = halves(x)
    _keep_columns(left, origin, slots, start, stop, E, kept_ptr, vectors, whole)
    _keep_columns(right, origin, slots, start + x.shape[1] // 2, stop, E, kept_ptr, vectors, whole)


@triton.jit
def _keep_logits(
    x, largest, slots, start, stop, E, kept_ptr, origins_ptr, tokens, vectors, whole, BLOCK_V: tl.constexpr
):  # fmt: skip
    """A tile of logits as 16-bit steps of 2^-9 octaves below the largest of each token: see plans.Kept. Of slots
    without a token too, which have room in a whole block and are made zeros later."""
    origin = tl.where(tl.abs(largest) == float("inf"), 0.0, largest)
    tl.store(origins_ptr + tl.cast(start // BLOCK_V, tl.int64) * tokens + slots, origin)
    if BLOCK_V > 128:  # by quarters, or there would not be registers for their places
        left, right = halves(x)
        _keep_half(left, origin, slots, start, stop, E, kept_ptr, vectors, whole)
        _keep_half(right, origin, slots, start + BLOCK_V // 2, stop, E, kept_ptr, vectors, whole)
    else:
        _keep_columns(x, origin, slots, start, stop, E, kept_ptr, vectors, whole)


@triton.jit
def _moved(sums, largest, origin, new_origin):
    """Sums of exp(z - origin) with new_origin in its place; 0 where the largest logit is -inf: nothing was added."""
    return tl.where(largest == float("-inf"), 0.0, sums * tl.exp2((origin - new_origin) * _LOG2E))


@triton.jit
def _origin(largest, softcap, SOFTCAP: tl.constexpr):
    """Where exponents are counted from: the largest z, or 0 for a row of infinities, whose exp(z - 0) exists."""
    return tl.where(tl.abs(largest) == float("inf"), 0.0, capped(largest, softcap, SOFTCAP))


@triton.jit(do_not_specialize=["N", "V", "splits", "tiles_per_split", "tokens", "vectors", "whole", "stop"])
def _linear_cross_entropy_forward_kernel(
    hidden_ptr, weight_ptr, bias_ptr, target_ptr, class_weight_ptr, rows_ptr, counts_ptr,
    largest_ptr, sums_ptr, smooth_ptr, best_ptr, label_ptr, kept_ptr, origins_ptr,
    stride_hidden, stride_weight, depth, N, V, splits, tiles_per_split, tokens, vectors, whole, stop, softcap,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr, GROUP: tl.constexpr,
    UNIT: tl.constexpr, EVEN_E: tl.constexpr, PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr,
    EVEN_V: tl.constexpr, KEEPS: tl.constexpr,
):  # fmt: skip
    """A block of counted tokens and a split of the classes: largest logit and its first column, sum of exp(z - its z),
    with smoothing the sum of w z; each at [split, token of the list]. The logit of a label goes to [token]. Logits of
    the first tokens and classes are kept if asked for."""
    count = tl.load(counts_ptr).to(tl.int32)
    blocks = tl.cdiv(count, BLOCK_M)
    program = tl.program_id(0)
    if program >= blocks * splits:
        return
    block, split = grouped(program, blocks, splits, GROUP)
    slots = block * BLOCK_M + tl.arange(0, BLOCK_M)
    live = slots < count
    rows = tl.load(rows_ptr + tl.minimum(slots, count - 1))  # those behind the last repeat it
    target = tl.load(target_ptr + rows).to(tl.int32)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK_M,), tl.float32)
    smooth = tl.zeros((BLOCK_M,), tl.float32)
    label = tl.zeros((BLOCK_M,), tl.float32)
    best = tl.zeros((BLOCK_M,), tl.int32)
    first = split * tiles_per_split * BLOCK_V
    last = tl.minimum(first + tiles_per_split * BLOCK_V, V)
    for start in tl.range(first, last, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        valid = (columns < V)[None, :]
        x = logits_tile(
            hidden_ptr, weight_ptr, bias_ptr, rows, columns, stride_hidden, stride_weight, depth, V,
            BLOCK_E, UNIT, EVEN_E, HAS_BIAS, PRECISION,
        )  # fmt: skip
        if not EVEN_V:
            x = tl.where(valid, x, float("-inf"))  # (BLOCK_M, BLOCK_V)
        # Few tiles hold a label, and looking for one costs three instructions a logit.
        if tl.max(((target >= start) & (target < start + BLOCK_V)).to(tl.int32), 0) > 0:
            label += tl.sum(tl.where(columns[None, :] == target[:, None], x, 0.0), 1)
        tile_largest = tl.max(x, 1)
        at = tl.min(tl.where(x == tile_largest[:, None], columns[None, :], V - 1), 1)
        best = tl.where(tile_largest > largest, at, best)
        new_largest = tl.maximum(largest, tile_largest)
        new_origin = _origin(new_largest, softcap, SOFTCAP)
        sums = _moved(sums, largest, _origin(largest, softcap, SOFTCAP), new_origin)
        largest = new_largest
        z = capped(x, softcap, SOFTCAP)
        # The difference before the factor log2(e), as in kernels/loss/cross_entropy.py: that of neighbours is exact.
        p = tl.exp2((z - new_origin[:, None]) * _LOG2E)
        if SOFTCAP and not EVEN_V:
            p = tl.where(valid, p, 0.0)
        sums += tl.sum(p, 1)
        if SMOOTHING:
            if not EVEN_V:
                z = tl.where(valid, z, 0.0)
            if HAS_WEIGHT:
                z *= tl.load(class_weight_ptr + columns, mask=columns < V, other=0.0)[None, :]
            smooth += tl.sum(z, 1)
        if KEEPS:  # noqa: SIM102  # the compiler must know this one and can't know the next
            if (block * BLOCK_M < tokens) & (start < stop):
                _keep_logits(
                    x, tile_largest, slots, start, stop, depth * UNIT, kept_ptr, origins_ptr, tokens, vectors, whole,
                    BLOCK_V,
                )  # fmt: skip
    place = tl.cast(split, tl.int64) * N + slots
    tl.store(largest_ptr + place, largest, mask=live)
    tl.store(sums_ptr + place, sums, mask=live)
    tl.store(best_ptr + place, best, mask=live)
    if SMOOTHING:
        tl.store(smooth_ptr + place, smooth, mask=live)
    tl.store(label_ptr + slots, label, mask=live & (target >= first) & (target < last))


@triton.jit(do_not_specialize=["N", "V", "splits", "ignore_index"])
def _linear_cross_entropy_merge_kernel(
    largest_ptr, sums_ptr, smooth_ptr, best_ptr, label_ptr, target_ptr, class_weight_ptr, weight_sum_ptr,
    rows_ptr, counts_ptr, nll_ptr, lse_ptr, argmax_ptr,
    N, V, splits, ignore_index, smoothing, softcap,
    BLOCK: tl.constexpr, HAS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """nll, lse and argmax of each token, from the splits' statistics or from what its label says."""
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = slots < N
    counted = slots < tl.load(counts_ptr)
    rows = tl.load(rows_ptr + slots, mask=exists, other=0)
    target = tl.load(target_ptr + rows, mask=exists, other=0)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    smooth = tl.zeros((BLOCK,), tl.float32)
    best = tl.zeros((BLOCK,), tl.int32)
    for split in tl.range(0, splits):
        place = tl.cast(split, tl.int64) * N + slots
        its_largest = tl.load(largest_ptr + place, mask=counted, other=float("-inf"))
        its_sums = tl.load(sums_ptr + place, mask=counted, other=0.0)
        best = tl.where(its_largest > largest, tl.load(best_ptr + place, mask=counted, other=0), best)
        new_largest = tl.maximum(largest, its_largest)
        new_origin = _origin(new_largest, softcap, SOFTCAP)
        sums = _moved(sums, largest, _origin(largest, softcap, SOFTCAP), new_origin)
        sums += _moved(its_sums, its_largest, _origin(its_largest, softcap, SOFTCAP), new_origin)
        largest = new_largest
        if SMOOTHING:
            smooth += tl.load(smooth_ptr + place, mask=counted, other=0.0)
    origin = _origin(largest, softcap, SOFTCAP)
    log_sum = tl.log2(sums) * _LN2
    z = capped(tl.load(label_ptr + slots, mask=counted, other=0.0), softcap, SOFTCAP)
    nll = origin - z + log_sum
    if HAS_WEIGHT:
        nll *= tl.load(class_weight_ptr + target, mask=counted, other=0.0)
    if SMOOTHING:
        weights = tl.load(weight_sum_ptr) if HAS_WEIGHT else V
        nll = (1.0 - smoothing) * nll + smoothing / V * (weights * (origin + log_sum) - smooth)
    elsewise = tl.where(target == ignore_index, 0.0, float("nan"))
    tl.store(nll_ptr + rows, tl.where(counted, nll, elsewise), mask=exists)
    tl.store(lse_ptr + rows, tl.where(counted, origin + log_sum, elsewise), mask=exists)
    tl.store(argmax_ptr + rows, tl.where(counted, best, -1).to(tl.int64), mask=exists)


@dataclasses.dataclass
class KeptLogits:
    """What forward keeps for backward, which uses it up."""

    plan: plans.Kept
    memory: torch.Tensor  # (plan.elements,) of hidden's dtype: logits now, the gradient of weight later
    origins: torch.Tensor | None  # (tiles, plan.tokens), fp32
    label: torch.Tensor  # (N,) of the list: the logit of each label, fp32
    rows: torch.Tensor  # as list_rows gave them
    counts: torch.Tensor


class Inputs(NamedTuple):
    """What the kernels take of hidden and weight: rows of neighbours in memory, strides and depth in units."""

    hidden: torch.Tensor
    weight: torch.Tensor
    stride_hidden: int
    stride_weight: int
    depth: int
    unit: int


def inputs(hidden: torch.Tensor, weight: torch.Tensor) -> Inputs:
    hidden, weight = last_dim_contiguous(hidden), last_dim_contiguous(weight)
    unit, ((of_hidden,), (of_weight,)) = strides_in_units(hidden, weight)
    shared = math.gcd(unit, hidden.shape[1])
    factor = unit // shared
    return Inputs(hidden, weight, of_hidden * factor, of_weight * factor, hidden.shape[1] // shared, shared)


def kept_layout(plan: plans.Kept) -> tuple[int, int, int, int]:
    """(tokens, vectors of a chunk's row, whole chunks, classes in all) for the kernels."""
    return plan.tokens, plan.classes // _VECTOR.value, plan.whole, plan.stop


def list_rows(target: torch.Tensor, V: int, ignore_index: int, arch: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows (N,), counts (2,)), int64: the tokens, counted ones first, and the numbers of counted and of bad ones."""
    rows, counts = torch.empty_like(target), target.new_empty(2)
    _linear_cross_entropy_rows_kernel[(1,)](
        target, rows, counts, target.shape[0], V, ignore_index,
        BLOCK=_ROWS_BLOCK, num_warps=4, **launch_options(arch),
    )  # fmt: skip
    return rows, counts


def linear_cross_entropy_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    *,
    class_weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(nll, lse, argmax) of each row of hidden (N, E) @ weight (V, E)^T + bias (V,); target (N,) int64.

    As `cross_entropy_forward` of the fp32 logits; rows of tokens that do not count are not read.
    """
    return _forward(
        hidden, weight, bias, target, False, class_weight=class_weight, ignore_index=ignore_index,
        label_smoothing=label_smoothing, softcap=softcap,
    )[:3]  # fmt: skip


def linear_cross_entropy_forward_keeping(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, KeptLogits | None]:
    """As `linear_cross_entropy_forward`, and what `linear_cross_entropy_backward_of_kept` goes on from; None where
    nothing can be kept."""
    return _forward(hidden, weight, bias, target, True, **options)


def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    keeps: bool,
    *,
    class_weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, KeptLogits | None]:
    (N, E), V = hidden.shape, weight.shape[0]
    nll, lse, label = (hidden.new_empty(N, dtype=torch.float32) for _ in range(3))
    argmax = hidden.new_empty(N, dtype=torch.int64)
    kept = None
    if N == 0:
        return nll, lse, argmax, kept
    target, tensors = target.contiguous(), inputs(hidden, weight)
    biases = hidden if bias is None else bias.to(torch.float32).contiguous()
    weights, weight_sum = class_weights(hidden, class_weight)
    with on_device(hidden):
        arch = target_arch()
        rich = label_smoothing != 0.0 or any(x is not None for x in (bias, class_weight, softcap))
        config = configs.linear_cross_entropy(arch, hidden.dtype, E, rich)
        tile = config.forward
        plain = bias is None and softcap is None
        plan = plans.kept(N, V, E, hidden.dtype, plain, config) if keeps else None
        splits, tiles_per_split = plans.vocabulary_splits(arch, N, V, tile)
        largest, sums, smooth = (hidden.new_empty(splits, N, dtype=torch.float32) for _ in range(3))
        best = hidden.new_empty(splits, N, dtype=torch.int32)
        rows, counts = list_rows(target, V, ignore_index, arch)
        flags = {
            "HAS_WEIGHT": class_weight is not None, "SMOOTHING": label_smoothing != 0.0, "SOFTCAP": softcap is not None
        }  # fmt: skip
        memory, origins, layout = best, largest, (0, 1, 0, 0)  # stand-ins that are never touched
        if plan is not None:
            origins = hidden.new_empty(-(-V // tile.block_v), plan.tokens, dtype=torch.float32)
            kept = KeptLogits(plan, hidden.new_empty(plan.elements), origins, label, rows, counts)
            memory, layout = kept.memory.view(torch.int16), kept_layout(plan)
        _linear_cross_entropy_forward_kernel[(-(-N // tile.block_m) * splits,)](
            tensors.hidden, tensors.weight, biases, target, weights, rows, counts,
            largest, sums, smooth, best, label, memory, origins,
            tensors.stride_hidden, tensors.stride_weight, tensors.depth, N, V, splits, tiles_per_split, *layout,
            softcap or 0.0,
            **tile.blocks, UNIT=tensors.unit, EVEN_E=E % tile.block_e == 0, HAS_BIAS=bias is not None,
            EVEN_V=V % tile.block_v == 0, KEEPS=kept is not None,
            PRECISION=configs.dot_precision(arch, hidden.dtype), **flags, **tile.launch_options, **launch_options(arch),
        )  # fmt: skip
        _linear_cross_entropy_merge_kernel[(-(-N // _MERGE_BLOCK),)](
            largest, sums, smooth, best, label, target, weights, weight_sum, rows, counts, nll, lse, argmax,
            N, V, splits, ignore_index, label_smoothing, softcap or 0.0,
            BLOCK=_MERGE_BLOCK, **flags, num_warps=4, **launch_options(arch),
        )  # fmt: skip
    return nll, lse, argmax, kept
