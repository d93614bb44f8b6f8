"""Gradients of linear cross-entropy from logits that forward has kept where the gradient of weight will stand.

Forward (linear_cross_entropy.py) leaves the logits of the first tokens that count, as many as grad_weight has features,
in grad_weight's own memory, 16 bits each (plans.Kept). Here they become G in place, and grad_hidden of
those tokens is one product over all classes. Then, a chunk of classes after the other, G is copied aside, G of the
tokens that were not kept is computed beside it as in linear_cross_entropy_backward.py, and grad_weight is written over
its logits.

    kept: q = round((o - x) log2(e) 2^9), o the largest logit of the token among the classes of a tile
    p = exp2((o - lse) log2(e) - q 2^-9)

p has a relative error of at most log(2) 2^-10 = 0.07%, a third of G's rounding to bf16; x below o by 128 octaves
has p = 0. The logit of the label itself, whose 1 - p may be smaller than that, is kept in fp32.

Flops: 6 N V E with forward's for kept tokens, 8 for the others. Bytes: 12 a kept logit, in all passes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gpt4v_fast.kernels.common import LOG2E, launch_options, on_device
from gpt4v_fast.kernels.loss import linear_cross_entropy_backward as fused
from gpt4v_fast.kernels.loss import plans
from gpt4v_fast.kernels.loss.cross_entropy import gradient_slopes, load_lse, z_gradient
from gpt4v_fast.kernels.loss.linear_cross_entropy import (
    KeptLogits,
    KeptPointers,
    kept_layout,
    kept_places,
    linear_cross_entropy_forward_keeping,
)
from gpt4v_fast.kernels.loss.linear_cross_entropy_backward import (
    Call,
    launch_grad_hidden,
    launch_grad_weight,
    launch_gradient,
    run_sweep,
    the_call,
)
from gpt4v_fast.kernels.loss.linear_cross_entropy_tiles import VECTOR, grouped, row_stride
from gpt4v_fast.kernels.loss.sums import Sums, finish_sums

_LOG2E = tl.constexpr(LOG2E)
_OCTAVE = tl.constexpr(1.0 / 512.0)  # of a step
_ROWS = 32  # tokens of a program that has no product


@triton.jit(do_not_specialize=["V", "E", "tokens", "vectors", "whole", "stop"])
def _linear_cross_entropy_kept_gradient_kernel(
    kept, gradient_ptr, label_ptr, listed, weights, of_rows, V, E, tokens, vectors, whole, stop, smoothing,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, ROUND: tl.constexpr, LOSS: tl.constexpr,
):  # fmt: skip
    """Kept logits become G, each in its own place; zeros for tokens that there are not, where products read them."""
    count = tl.load(listed.counts).to(tl.int32)
    tiles = tl.cdiv(stop, BLOCK_V)
    block = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    if block * BLOCK_M // ROUND * ROUND >= count:
        return
    slots = block * BLOCK_M + tl.arange(0, BLOCK_M)
    live = slots < count
    rows = tl.load(listed.rows + tl.minimum(slots, count - 1))
    target = tl.load(listed.target + rows).to(tl.int32)
    columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    base, places, in_row = kept_places(slots, tile * BLOCK_V, stop, E, vectors, whole, BLOCK_V)
    steps = tl.load(kept.logits + base + places, mask=in_row[None, :], other=0).to(tl.int32) & 0xFFFF
    lse = load_lse(of_rows.lse + rows)
    origin = tl.load(kept.origins + tl.cast(tile, tl.int64) * tokens + slots, mask=live, other=0.0)
    p = tl.exp2(((origin - lse) * _LOG2E)[:, None] - steps.to(tl.float32) * _OCTAVE)  # (BLOCK_M, BLOCK_V)
    p = tl.where(steps == 65535, 0.0, p)  # as far down as steps go, and further
    is_label = columns[None, :] == target[:, None]
    of_label = tl.exp2((tl.load(label_ptr + slots, mask=live, other=0.0) - lse) * _LOG2E)
    p = tl.where(is_label, of_label[:, None], p)
    slope_p, slope_target, slope_all = gradient_slopes(
        target, tl.load(of_rows.grad_nll + rows), tl.load(of_rows.grad_lse + rows), weights, V, smoothing, LOSS
    )
    exists = (columns < V)[None, :]
    gradient = z_gradient(
        p, columns[None, :], exists, target[:, None], slope_p[:, None], slope_target[:, None], slope_all[:, None],
        weights.pointer, LOSS,
    )  # fmt: skip
    gradient = tl.where(live[:, None] & exists, gradient, 0.0)
    tl.store(gradient_ptr + base + places, gradient.to(gradient_ptr.dtype.element_ty), mask=in_row[None, :])


@triton.jit(do_not_specialize=["E", "vectors", "whole", "stop", "first_class", "row_vectors"])
def _linear_cross_entropy_kept_copy_kernel(
    gradient_ptr, to_ptr, counts_ptr, E, vectors, whole, stop, first_class, row_vectors,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """G of a chunk of classes to rows of `row_vectors` vectors, zeros behind the last class."""
    classes = row_vectors * VECTOR
    tiles = tl.cdiv(classes, BLOCK_V)
    block = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    if block * BLOCK_M // ROUND * ROUND >= tl.load(counts_ptr):
        return
    slots = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    base, places, in_row = kept_places(slots, first_class + tile * BLOCK_V, stop, E, vectors, whole, BLOCK_V)
    g = tl.load(gradient_ptr + base + places, mask=in_row[None, :], other=0.0)
    to = to_ptr + (tl.cast(slots, tl.int64)[:, None] * classes + inside[None, :])
    tl.store(to, g, mask=(inside // VECTOR < row_vectors)[None, :])


@triton.jit(do_not_specialize=["N", "V", "tokens", "vectors", "whole", "rest_vectors"])
def _linear_cross_entropy_kept_grad_hidden_kernel(
    gradient_ptr, rest_ptr, weight, listed, out, depth, N, V, tokens, vectors, whole, rest_vectors, ignore_index,
    PRODUCT: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """grad_hidden of a block of kept tokens and of columns: G weight over all classes, those behind the whole chunks
    from rest_ptr."""
    BLOCK_M: tl.constexpr = PRODUCT.BLOCK_M
    BLOCK_V: tl.constexpr = PRODUCT.BLOCK_V
    BLOCK_E: tl.constexpr = PRODUCT.BLOCK_E
    PRECISION: tl.constexpr = PRODUCT.PRECISION
    E = depth * PRODUCT.UNIT
    classes = vectors * VECTOR
    live = tl.minimum(tl.load(listed.counts).to(tl.int32), tokens)
    block, column = grouped(tl.program_id(0), tl.cdiv(tokens, BLOCK_M), tl.cdiv(E, BLOCK_E), PRODUCT.GROUP)
    slots = block * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column * BLOCK_E + tl.arange(0, BLOCK_E)
    inner = tl.arange(0, BLOCK_V)
    in_columns = (columns < E)[None, :]
    stride = row_stride(weight.stride, PRODUCT.UNIT)
    weight_tile = weight.pointer + ((inner * stride)[:, None] + columns[None, :])  # (BLOCK_V, BLOCK_E)
    gradient_tile = gradient_ptr + (slots[:, None] * classes + inner[None, :])  # (BLOCK_M, BLOCK_V)
    to_next_chunk = tl.cast(classes, tl.int64) * (E - 1)  # beside the classes of a row
    in_whole = tl.where(block * BLOCK_M < live, whole * classes, 0)
    inside = 0
    sums = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for _start in tl.range(0, in_whole, BLOCK_V):
        g = tl.load(gradient_tile)
        if PRODUCT.EVEN_E:
            w = tl.load(weight_tile)
        else:
            w = tl.load(weight_tile, mask=in_columns, other=0.0)
        sums = tl.dot(g, w, sums, input_precision=PRECISION)
        inside += BLOCK_V
        at_end = inside == classes
        gradient_tile += BLOCK_V + tl.where(at_end, to_next_chunk, 0)
        weight_tile += stride * BLOCK_V
        inside = tl.where(at_end, 0, inside)
    rest = tl.where(block * BLOCK_M < live, V - whole * classes, 0)
    last = tl.cast(whole, tl.int64) * classes
    gradient_tile = rest_ptr + (slots[:, None] * (rest_vectors * VECTOR) + inner[None, :])
    weight_tile = weight.pointer + (((last + inner) * stride)[:, None] + columns[None, :])
    for start in tl.range(0, rest, BLOCK_V):
        g = tl.load(gradient_tile, mask=(inner // VECTOR < rest_vectors - start // VECTOR)[None, :], other=0.0)
        w = tl.load(weight_tile, mask=(inner < rest - start)[:, None] & in_columns, other=0.0)
        sums = tl.dot(g, w, sums, input_precision=PRECISION)
        gradient_tile += BLOCK_V
        weight_tile += stride * BLOCK_V
    exists = slots < tl.minimum(tokens, N)
    rows = tl.load(listed.rows + slots, mask=exists, other=0)
    target = tl.load(listed.target + rows, mask=exists, other=0)
    elsewise = tl.where(target == ignore_index, 0.0, float("nan"))
    finish_sums(
        sums, out, out.lower, rows * E, rows, column * BLOCK_E, E, exists, slots < live, elsewise, 1, 1, SUMS,
    )  # fmt: skip


def linear_cross_entropy_forward(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, target: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, KeptLogits | None]:
    """(nll, lse, argmax, kept): the arguments of the other ways; kept is None where nothing can be kept."""
    return linear_cross_entropy_forward_keeping(hidden, weight, bias, target, **options)


def linear_cross_entropy_backward(
    grad_nll: torch.Tensor,
    grad_lse: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    lse: torch.Tensor,
    *,
    kept: KeptLogits | None,
    of_hidden: bool,
    of_weight: bool,
    of_bias: bool,
    softcap: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The gradients of hidden, weight and bias. `kept` is used up if weight's is asked for; where it is not, or nothing
    was kept, logits are computed again."""
    tensors = (grad_nll, grad_lse, hidden, weight)
    if kept is None or not of_weight:
        return fused.linear_cross_entropy_backward(
            *tensors, bias, target, lse, of_hidden=of_hidden, of_weight=of_weight, of_bias=of_bias, softcap=softcap,
            **options,
        )  # fmt: skip
    return *linear_cross_entropy_backward_of_kept(*tensors, target, lse, kept, of_hidden=of_hidden, **options), None


def linear_cross_entropy_backward_of_kept(
    grad_nll: torch.Tensor,
    grad_lse: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    kept: KeptLogits,
    *,
    of_hidden: bool,
    **options: Any,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The gradients of hidden and weight, as `linear_cross_entropy_backward` gives them, from what
    `linear_cross_entropy_forward_keeping` left, which is used up: weight's takes its memory."""
    V, E = weight.shape
    grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if of_hidden else None
    grad_weight = kept.memory[: V * E].view(V, E)
    with on_device(hidden):
        call = the_call((grad_nll, grad_lse), hidden, weight, None, lse, kept.listed, **options)
        _turn_into_gradient(call, kept)
        kept.origins = None  # of no more use: their memory is the chunks'
        block = _round(call)
        rows = kept.plan.tokens + -(-max(0, hidden.shape[0] - kept.plan.tokens) // block) * block
        gradient = hidden.new_empty(rows * kept.plan.classes)
        if grad_hidden is not None:
            _grad_hidden_of_kept(call, kept, gradient, grad_hidden)
        _chunks(call, kept, gradient, rows, grad_hidden, grad_weight)
    return grad_hidden, grad_weight


def _chunks(
    call: Call,
    kept: KeptLogits,
    gradient: torch.Tensor,
    rows: int,
    grad_hidden: torch.Tensor | None,
    grad_weight: torch.Tensor,
) -> None:
    """grad_weight, a chunk of classes at a time, and grad_hidden of the tokens that were not kept; `gradient` is room
    for so many rows of a chunk."""
    hidden, plan = call.tensors.hidden.pointer, kept.plan
    (N, E), V = hidden.shape, grad_weight.shape[0]
    others = max(0, N - plan.tokens)
    if others and grad_hidden is not None and others * E * 2 > plans.SUMS_BYTES:
        # Lower halves of sums have no room: the logits of these tokens are computed once more.
        sizes = (others, V, E, hidden.element_size())
        for sweep in plans.sweeps(*sizes, True, False, False, call.config, first=plan.tokens):
            run_sweep(call, sweep, grad_hidden, None, None)
        grad_hidden = None
    several = grad_hidden is not None and plan.classes < V
    in_weight = kept.memory[plan.stop * E :] if plan.stop < V else kept.memory
    further = hidden.new_empty(max(0, others - plan.near) if several else 0, E, dtype=torch.int16)
    lower = (in_weight.view(torch.int16), further, plan.near)
    unit = call.config.unit
    for first_class in range(0, V, plan.classes):
        classes = -(-min(plan.classes, V - first_class) // unit) * unit
        of_others, first_slot = gradient[plan.tokens * classes :], plan.tokens
        if first_class < plan.stop:
            _copy_aside(call, kept, first_class, classes, gradient)
            if others:
                launch_gradient(call, (first_slot, first_class, others, classes), of_others, of_others, None)
        else:
            launch_gradient(call, (0, first_class, N, classes), gradient, gradient, None)
        if others and grad_hidden is not None:
            ends = first_class == 0, first_class + classes >= V
            launch_grad_hidden(call, (first_slot, first_class, others, classes), ends, of_others, grad_hidden, lower)
        launch_grad_weight(call, (0, first_class, rows, classes), (True, True), gradient, grad_weight, further)


def _turn_into_gradient(call: Call, kept: KeptLogits) -> None:
    plan, (V, E) = kept.plan, call.tensors.weight.pointer.shape
    assert kept.origins is not None, "kept logits can be used once"
    _linear_cross_entropy_kept_gradient_kernel[(plan.tokens // _rows(call) * -(-plan.stop // plan.tile),)](
        KeptPointers(kept.memory.view(torch.int16), kept.origins), kept.memory, kept.label, call.listed,
        call.class_weights, call.of_rows, V, E, *kept_layout(plan), call.numbers[0],
        BLOCK_M=_rows(call), BLOCK_V=plan.tile, ROUND=_round(call), LOSS=call.loss, num_warps=8,
        **launch_options(call.arch),
    )  # fmt: skip


def _copy_aside(call: Call, kept: KeptLogits, first_class: int, classes: int, to: torch.Tensor) -> None:
    plan, E = kept.plan, call.tensors.weight.pointer.shape[1]
    call.relaunch(
        _linear_cross_entropy_kept_copy_kernel, plan.tokens // _rows(call) * -(-classes // plan.tile),
        kept.memory, to, call.listed.counts, E, *kept_layout(plan)[1:], first_class, classes // VECTOR.value,
        BLOCK_M=_rows(call), BLOCK_V=plan.tile, ROUND=_round(call), num_warps=8, **launch_options(call.arch),
    )  # fmt: skip


def _grad_hidden_of_kept(call: Call, kept: KeptLogits, gradient: torch.Tensor, out: torch.Tensor) -> None:
    """All of it at once; G of classes whose logits were not kept goes to `gradient` first."""
    tensors, plan = call.tensors, kept.plan
    (N, E), V = tensors.hidden.pointer.shape, tensors.weight.pointer.shape[0]
    tile = call.config.of_hidden(plan.tokens, E)
    first, rest = plan.whole * plan.classes, kept.memory
    vectors = -(-(V - first) // VECTOR.value)
    if plan.stop < V:
        unit = call.config.unit
        classes = -(-(V - first) // unit) * unit
        launch_gradient(call, (0, first, min(N, plan.tokens), classes), gradient, gradient, None)
        rest, vectors = gradient, classes // VECTOR.value
    elif first < V:
        rest = kept.memory[first * E :]
    _linear_cross_entropy_kept_grad_hidden_kernel[(-(-plan.tokens // tile.block_m) * -(-E // tile.block_e),)](
        kept.memory, rest, tensors.weight, call.listed, call.destination(out, out),
        tensors.depth, N, V, *kept_layout(plan)[:3], vectors, call.ignore_index,
        PRODUCT=call.product(tile), SUMS=Sums(False, False, False), **tile.launch_options, **launch_options(call.arch),
    )  # fmt: skip


def _rows(call: Call) -> int:
    return min(_ROWS, _round(call))


def _round(call: Call) -> int:
    """Products read the rows of G in blocks of so many."""
    return max(call.config.gradient.block_m, call.config.grad_hidden.block_m)
