"""Gradients of the projection to the vocabulary and its cross-entropy in Triton, from hidden, weight and lse.

    G = gradient of the logits;   dh = G weight,   dW = G^T hidden,   db = sum of G over tokens

Logits are computed again in registers and turned into G there; what is written is G alone, in hidden's dtype, for a
chunk of tokens and classes of at most plans.GRADIENT_BYTES, which the two products then read. Rejected: no G at all.
A product's sums over all E columns do not fit registers, so each piece of 256 columns would need logits of its own:
2 N V E (E / 256) flops more for each of the two products, where G costs 6 bytes a logit. Rejected too: atomics in place
of chunks (cut cross-entropy), whose sums differ from run to run.

In fp16 G is scaled by a power of two, or small probabilities would be subnormal there. Sums over several chunks are
fp32: a 16-bit gradient holds their upper half until the last chunk, a scratch tensor the lower.
`plans.sweeps` bounds all scratch. Tokens that do not count are in no product.
Flops: 6 C V E for C counted tokens, 8 where hidden's and weight's gradients need a sweep of their own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl

from gpt4v_fast.kernels import configs
from gpt4v_fast.kernels.loss import plans
from gpt4v_fast.kernels.common import Relaunch, launch_options, on_device, target_arch
from gpt4v_fast.kernels.loss.cross_entropy import class_weights, gradient_slopes, logit_gradient
from gpt4v_fast.kernels.loss.linear_cross_entropy import Inputs, grouped, inputs, list_rows, logits_tile, row_stride
from gpt4v_fast.kernels.loss.linear_cross_entropy_products import gradient_scales
from gpt4v_fast.kernels.loss.sums import finish_sums

# Launchers give the classes of a chunk in these, so that the compiler knows that rows of G begin on 16 bytes.
_VECTOR = tl.constexpr(16)
_BIAS_BLOCK = 128  # classes of a program that adds up the bias gradient


@triton.jit(do_not_specialize=["V", "first_slot", "first_class", "tokens", "vectors"])
def _linear_cross_entropy_gradient_kernel(
    hidden_ptr, weight_ptr, bias_ptr, target_ptr, class_weight_ptr, weight_sum_ptr, rows_ptr, counts_ptr,
    lse_ptr, grad_nll_ptr, grad_lse_ptr, scale_ptr, gradient_ptr, bias_sums_ptr,
    stride_hidden, stride_weight, depth, V, first_slot, first_class, tokens, vectors, smoothing, softcap,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr, GROUP: tl.constexpr,
    UNIT: tl.constexpr, EVEN_E: tl.constexpr, PRECISION: tl.constexpr, SCALED: tl.constexpr, BIAS_SUMS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """G of a tile of a chunk, zeros for tokens and classes that there are not, and its sums over the tile's tokens."""
    classes = vectors * _VECTOR
    live = tl.minimum(tl.load(counts_ptr).to(tl.int32) - first_slot, tokens)
    n_blocks = tl.cdiv(tl.maximum(live, 0), BLOCK_M)
    program = tl.program_id(0)
    if program >= n_blocks * (classes // BLOCK_V):
        return
    block, tile = grouped(program, n_blocks, classes // BLOCK_V, GROUP)
    slots = block * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.load(rows_ptr + first_slot + tl.minimum(slots, live - 1))
    columns = first_class + tile * BLOCK_V + tl.arange(0, BLOCK_V)
    x = logits_tile(
        hidden_ptr, weight_ptr, bias_ptr, rows, columns, stride_hidden, stride_weight, depth, V,
        BLOCK_E, UNIT, EVEN_E, HAS_BIAS, PRECISION,
    )  # fmt: skip
    target = tl.load(target_ptr + rows).to(tl.int32)
    slope_p, slope_target, slope_all = gradient_slopes(
        target, tl.load(grad_nll_ptr + rows), tl.load(grad_lse_ptr + rows), class_weight_ptr, weight_sum_ptr, V,
        smoothing, HAS_WEIGHT, SMOOTHING,
    )  # fmt: skip
    gradient = logit_gradient(
        x, columns[None, :], (columns < V)[None, :], target[:, None], tl.load(lse_ptr + rows)[:, None],
        slope_p[:, None], slope_target[:, None], slope_all[:, None], class_weight_ptr, softcap,
        HAS_WEIGHT, SMOOTHING, SOFTCAP,
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
    gradient_ptr, weight_ptr, target_ptr, rows_ptr, counts_ptr, scale_ptr, out_ptr, upper_ptr, lower_ptr, further_ptr,
    stride_weight, depth, N, V, first_slot, first_class, tokens, vectors, near, ignore_index, is_first, is_last,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr, GROUP: tl.constexpr,
    UNIT: tl.constexpr, EVEN_E: tl.constexpr, PRECISION: tl.constexpr, SCALED: tl.constexpr,
    SEVERAL: tl.constexpr, HALVES: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """grad_hidden of a block of tokens and of columns: (+)= G weight over a chunk of classes, which is RAGGED if those
    that there are do not come in whole blocks.

    Tokens that do not count get what their label says, 0 or NaN, from the last chunk. Lower halves of the first `near`
    tokens, whole blocks of them or all, are at lower_ptr, those of the others at further_ptr.
    """
    E = depth * UNIT
    live = tl.minimum(tl.load(counts_ptr).to(tl.int32) - first_slot, tokens)
    classes = vectors * _VECTOR
    block, column = grouped(tl.program_id(0), tl.cdiv(tokens, BLOCK_M), tl.cdiv(E, BLOCK_E), GROUP)
    if (block * BLOCK_M >= live) & (is_last == 0):
        return
    slots = block * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column * BLOCK_E + tl.arange(0, BLOCK_E)
    exists = (slots < tokens) & (first_slot + slots < N)
    rows = tl.load(rows_ptr + first_slot + slots, mask=exists, other=0)
    inner = tl.arange(0, BLOCK_V)
    gradient_tile = gradient_ptr + ((slots.to(tl.int64) * classes)[:, None] + inner[None, :])  # (BLOCK_M, BLOCK_V)
    first_row = (first_class + inner) * row_stride(stride_weight, UNIT)
    weight_tile = weight_ptr + (first_row[:, None] + columns[None, :])  # (BLOCK_V, BLOCK_E)
    stop = tl.where(block * BLOCK_M < live, tl.minimum(classes, V - first_class), 0)
    sums = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for start in tl.range(0, stop, BLOCK_V):
        g = tl.load(gradient_tile)
        if RAGGED:
            w = tl.load(weight_tile, mask=(inner < stop - start)[:, None] & (columns < E)[None, :], other=0.0)
        elif EVEN_E:
            w = tl.load(weight_tile)
        else:
            w = tl.load(weight_tile, mask=(columns < E)[None, :], other=0.0)
        sums = tl.dot(g, w, sums, input_precision=PRECISION)
        gradient_tile += BLOCK_V
        weight_tile += row_stride(stride_weight, UNIT) * BLOCK_V
    target = tl.load(target_ptr + rows, mask=exists, other=0)
    elsewise = tl.where(target == ignore_index, 0.0, float("nan"))
    if SEVERAL and HALVES:
        is_near = block * BLOCK_M < near
        lower_ptr = tl.where(is_near, lower_ptr, further_ptr)
        lower_rows = slots - tl.where(is_near, 0, near)
    else:
        lower_rows = slots
    finish_sums(
        sums, out_ptr, upper_ptr, lower_ptr, scale_ptr, rows * E, lower_rows.to(tl.int64) * E, column * BLOCK_E, E,
        exists, slots < live, elsewise, is_first, is_last, SCALED, SEVERAL, HALVES,
    )  # fmt: skip


@triton.jit
def _accumulate_all_tokens(
    sums, gradient_tile, hidden_ptr, first_slot, stop, inner, columns, E, classes, stride_hidden,
    BLOCK_M: tl.constexpr, UNIT: tl.constexpr, EVEN_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums + G^T hidden of whole blocks of tokens, where the list is that of all tokens in their order."""
    stride = row_stride(stride_hidden, UNIT)
    hidden_tile = hidden_ptr + (((first_slot + inner) * stride)[:, None] + columns[None, :])  # (BLOCK_M, BLOCK_E)
    for _start in tl.range(0, stop, BLOCK_M):
        g = tl.load(gradient_tile)
        if EVEN_E:
            h = tl.load(hidden_tile)
        else:
            h = tl.load(hidden_tile, mask=(columns < E)[None, :], other=0.0)
        sums = tl.dot(tl.trans(g), h, sums, input_precision=PRECISION)
        gradient_tile += BLOCK_M * tl.cast(classes, tl.int64)
        hidden_tile += BLOCK_M * stride
    return sums


@triton.jit
def _accumulate_tokens(
    sums, gradient_tile, hidden_ptr, rows_ptr, first_slot, start, live, inner, columns, E, classes, stride_hidden,
    BLOCK_M: tl.constexpr, UNIT: tl.constexpr, EVEN_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums + G^T hidden of the tokens from start on. Those behind the last one have zeros in G; they repeat it.

    Which rows are next is looked up a step ahead, and still takes longer than the products of a step.
    """
    gradient_tile += start * tl.cast(classes, tl.int64)
    rows = tl.load(rows_ptr + first_slot + tl.maximum(tl.minimum(start + inner, live - 1), 0))
    for first in tl.range(start, live, BLOCK_M):
        g = tl.load(gradient_tile)
        of_tokens = (rows * row_stride(stride_hidden, UNIT))[:, None] + columns[None, :]
        if EVEN_E:
            h = tl.load(hidden_ptr + of_tokens)  # (BLOCK_M, BLOCK_E)
        else:
            h = tl.load(hidden_ptr + of_tokens, mask=(columns < E)[None, :], other=0.0)
        rows = tl.load(rows_ptr + first_slot + tl.maximum(tl.minimum(first + BLOCK_M + inner, live - 1), 0))
        sums = tl.dot(tl.trans(g), h, sums, input_precision=PRECISION)
        gradient_tile += BLOCK_M * tl.cast(classes, tl.int64)
    return sums


@triton.jit(do_not_specialize=["N", "V", "first_slot", "first_class", "tokens", "vectors", "is_first", "is_last"])
def _linear_cross_entropy_grad_weight_kernel(
    gradient_ptr, hidden_ptr, rows_ptr, counts_ptr, scale_ptr, out_ptr, upper_ptr, lower_ptr,
    stride_hidden, depth, N, V, first_slot, first_class, tokens, vectors, is_first, is_last,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr, GROUP: tl.constexpr,
    UNIT: tl.constexpr, EVEN_E: tl.constexpr, PRECISION: tl.constexpr, SCALED: tl.constexpr,
    SEVERAL: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """grad_weight of a block of classes and of columns: (+)= G^T hidden over the counted tokens of a chunk.

    A bad label makes all of it NaN: its token's gradient is, and every class's sum has it.
    """
    E = depth * UNIT
    live = tl.minimum(tl.load(counts_ptr).to(tl.int32) - first_slot, tokens)
    classes = vectors * _VECTOR
    block, column = grouped(tl.program_id(0), classes // BLOCK_V, tl.cdiv(E, BLOCK_E), GROUP)
    places = block * BLOCK_V + tl.arange(0, BLOCK_V)
    columns = column * BLOCK_E + tl.arange(0, BLOCK_E)
    inner = tl.arange(0, BLOCK_M)
    gradient_tile = gradient_ptr + (inner[:, None] * classes + places[None, :])  # (BLOCK_M, BLOCK_V)
    sums = tl.zeros((BLOCK_V, BLOCK_E), tl.float32)
    # Where every token counts nothing need be looked up for whole blocks of tokens. (One loop behind the other, most
    # often without a step: in two branches each would have shared memory of its own.)
    whole = tl.where(tl.load(counts_ptr) == N, tl.maximum(live, 0) // BLOCK_M * BLOCK_M, 0)
    sums = _accumulate_all_tokens(
        sums, gradient_tile, hidden_ptr, first_slot, whole, inner, columns, E, classes, stride_hidden,
        BLOCK_M, UNIT, EVEN_E, PRECISION,
    )  # fmt: skip
    sums = _accumulate_tokens(
        sums, gradient_tile, hidden_ptr, rows_ptr, first_slot, whole, live, inner, columns, E, classes, stride_hidden,
        BLOCK_M, UNIT, EVEN_E, PRECISION,
    )  # fmt: skip
    good = tl.where(tl.load(counts_ptr + 1) > 0, False, places >= 0)
    finish_sums(
        sums, out_ptr, upper_ptr, lower_ptr, scale_ptr, (first_class + places).to(tl.int64) * E,
        places.to(tl.int64) * E, column * BLOCK_E, E, first_class + places < V, good,
        tl.full((BLOCK_V,), float("nan"), tl.float32), is_first, is_last, SCALED, SEVERAL, HALVES,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Call:
    """What all launches of one backward pass share."""

    tensors: Inputs
    bias: torch.Tensor
    target: torch.Tensor
    class_weight: torch.Tensor
    weight_sum: torch.Tensor
    rows: torch.Tensor
    counts: torch.Tensor
    rows_of: tuple[torch.Tensor, ...]  # lse, grad_nll and grad_lse
    scales: torch.Tensor  # of G in fp16, and its inverse
    numbers: tuple[float, float]  # label_smoothing, softcap
    ignore_index: int
    config: configs.LinearCrossEntropyConfig
    flags: dict[str, Any]  # of the kernel that makes G
    options: dict[str, Any]  # of every launch
    relaunch: Relaunch = dataclasses.field(default_factory=Relaunch)


def linear_cross_entropy_backward(
    grad_nll: torch.Tensor,
    grad_lse: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    lse: torch.Tensor,
    *,
    of_hidden: bool,
    of_weight: bool,
    of_bias: bool,
    class_weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The gradients of hidden and weight (their dtype) and of bias (fp32); None for one that is not asked for.

    lse as `linear_cross_entropy_forward` gave it. A token whose label is ignore_index gets zeros. One whose label is
    outside [0, V) gets NaN, and so do weight and bias, which sum over it.
    """
    (N, E), V = hidden.shape, weight.shape[0]
    of_bias = of_bias and bias is not None
    slopes = (grad_nll, grad_lse)
    grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if of_hidden else None
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if of_weight else None
    grad_bias = hidden.new_zeros(V, dtype=torch.float32) if of_bias else None
    if N == 0:
        return grad_hidden, None if grad_weight is None else grad_weight.zero_(), grad_bias
    with on_device(hidden):
        listed = list_rows(target.contiguous(), V, ignore_index, target_arch())
        options: dict[str, Any] = {
            "class_weight": class_weight,
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
        }
        call = the_call(slopes, hidden, weight, bias, target, lse, listed, softcap=softcap, **options)
        sizes = (N, V, E, hidden.element_size())
        for sweep in plans.sweeps(*sizes, of_hidden, of_weight, of_bias, call.config):
            run_sweep(
                call, sweep,
                grad_hidden if sweep.of_hidden else None, grad_weight if sweep.of_weight else None,
                grad_bias if sweep.of_bias else None,
            )  # fmt: skip
    return grad_hidden, grad_weight, grad_bias


def the_call(
    slopes: tuple[torch.Tensor, torch.Tensor],
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    lse: torch.Tensor,
    listed: tuple[torch.Tensor, torch.Tensor],
    *,
    class_weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
) -> Call:
    """`slopes`: grad_nll and grad_lse; `listed`: what list_rows gave."""
    arch, target = target_arch(), target.contiguous()
    weights, weight_sum = class_weights(hidden, class_weight)
    rich = label_smoothing != 0.0 or any(x is not None for x in (bias, class_weight, softcap))
    config = configs.linear_cross_entropy(arch, hidden.dtype, hidden.shape[1], rich)
    tensors = inputs(hidden, weight)
    scales = gradient_scales(*slopes, hidden, target, class_weight, ignore_index)
    return Call(
        tensors, hidden if bias is None else bias.to(torch.float32).contiguous(), target, weights, weight_sum, *listed,
        tuple(x.to(torch.float32).contiguous() for x in (lse, *slopes)),
        hidden if scales is None else scales, (label_smoothing, softcap or 0.0), ignore_index, config,
        {
            "HAS_BIAS": bias is not None, "HAS_WEIGHT": class_weight is not None,
            "SMOOTHING": label_smoothing != 0.0, "SOFTCAP": softcap is not None,
        },
        {
            "SCALED": scales is not None, "UNIT": tensors.unit,
            "PRECISION": configs.dot_precision(arch, hidden.dtype), **launch_options(arch),
        },
    )  # fmt: skip


def run_sweep(
    call: Call,
    sweep: plans.Sweep,
    grad_hidden: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
    grad_bias: torch.Tensor | None,
) -> None:
    """Adds the chunks of one sweep up in the gradients that are given."""
    hidden, weight = call.tensors.hidden, call.tensors.weight
    E, V, config = hidden.shape[1], weight.shape[0], call.config
    last = sweep.first + sweep.sizes[0]
    gradient = hidden.new_empty(sweep.tokens * sweep.classes)
    bias_sums = hidden.new_empty(sweep.tokens // config.gradient.block_m * sweep.classes, dtype=torch.float32)
    lower_hidden, lower_weight = (hidden.new_empty(n, E, dtype=torch.int16) for n in sweep.lower_halves)
    for first_slot, first_class in sweep.chunks:
        tokens = min(sweep.tokens, last - first_slot)
        classes = sweep.rounded(min(sweep.classes, V - first_class))
        chunk = (first_slot, first_class, tokens, classes)
        launch_gradient(call, chunk, gradient, bias_sums, grad_bias)
        if grad_hidden is not None:
            lower = lower_hidden[first_slot - sweep.first if sweep.keeps_all_tokens else 0 :]
            ends = first_class == 0, first_class + classes >= V
            launch_grad_hidden(call, chunk, ends, gradient, grad_hidden, (lower, lower, tokens))
        if grad_weight is not None:
            ends = first_slot == sweep.first, first_slot + tokens >= last
            launch_grad_weight(call, chunk, ends, gradient, grad_weight, lower_weight)


_Chunk = tuple[int, int, int, int]  # first token of the list, first class, tokens, classes


def launch_gradient(
    call: Call, chunk: _Chunk, gradient: torch.Tensor, bias_sums: torch.Tensor, grad_bias: torch.Tensor | None
) -> None:
    tile, tensors = call.config.gradient, call.tensors
    V, (first_slot, first_class, tokens, classes) = tensors.weight.shape[0], chunk
    call.relaunch(
        _linear_cross_entropy_gradient_kernel, -(-tokens // tile.block_m) * (classes // tile.block_v),
        tensors.hidden, tensors.weight, call.bias, call.target, call.class_weight, call.weight_sum, call.rows,
        call.counts, *call.rows_of, call.scales, gradient, bias_sums,
        tensors.stride_hidden, tensors.stride_weight, tensors.depth,
        V, first_slot, first_class, tokens, classes // _VECTOR.value, *call.numbers,
        **tile.blocks, EVEN_E=tensors.hidden.shape[1] % tile.block_e == 0, BIAS_SUMS=grad_bias is not None,
        **call.flags, **tile.launch_options, **call.options,
    )  # fmt: skip
    if grad_bias is not None:
        options = {name: value for name, value in call.options.items() if not name.isupper()}
        call.relaunch(
            _linear_cross_entropy_grad_bias_kernel, -(-classes // _BIAS_BLOCK),
            bias_sums, call.counts, grad_bias, V, first_slot, first_class, tokens, classes,
            TOKENS=tile.block_m, BLOCK=_BIAS_BLOCK, num_warps=4, **options,
        )  # fmt: skip


def launch_grad_hidden(
    call: Call,
    chunk: _Chunk,
    ends: tuple[bool, bool],
    gradient: torch.Tensor,
    out: torch.Tensor,
    lower: tuple[torch.Tensor, torch.Tensor, int],
) -> None:
    """`lower`: where lower halves of sums are, for the first tokens and for the others, and how many come first."""
    tensors = call.tensors
    (N, E), V = tensors.hidden.shape, tensors.weight.shape[0]
    tile = call.config.of_hidden(chunk[2], E)
    halves = out.element_size() == 2
    call.relaunch(
        _linear_cross_entropy_grad_hidden_kernel, -(-chunk[2] // tile.block_m) * -(-E // tile.block_e),
        gradient, tensors.weight, call.target, call.rows, call.counts, call.scales, out,
        out.view(torch.int16) if halves else out, *lower[:2], tensors.stride_weight, tensors.depth,
        N, V, *chunk[:3], chunk[3] // _VECTOR.value, lower[2], call.ignore_index, *map(int, ends),
        **tile.blocks, EVEN_E=E % tile.block_e == 0, SEVERAL=ends != (True, True), HALVES=halves,
        RAGGED=min(chunk[3], V - chunk[1]) % tile.block_v != 0, **tile.launch_options, **call.options,
    )  # fmt: skip


def launch_grad_weight(
    call: Call, chunk: _Chunk, ends: tuple[bool, bool], gradient: torch.Tensor, out: torch.Tensor, lower: torch.Tensor
) -> None:
    tile, tensors = call.config.grad_weight, call.tensors
    V, E = tensors.weight.shape
    halves = out.element_size() == 2
    call.relaunch(
        _linear_cross_entropy_grad_weight_kernel, chunk[3] // tile.block_v * -(-E // tile.block_e),
        gradient, tensors.hidden, call.rows, call.counts, call.scales, out,
        out.view(torch.int16) if halves else out, lower, tensors.stride_hidden, tensors.depth,
        tensors.hidden.shape[0], V, *chunk[:3], chunk[3] // _VECTOR.value, *map(int, ends),
        **tile.blocks, EVEN_E=E % tile.block_e == 0, SEVERAL=ends != (True, True), HALVES=halves,
        **tile.launch_options, **call.options,
    )  # fmt: skip
