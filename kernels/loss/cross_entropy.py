"""Softmax cross-entropy of given logits in Triton: a pass over the vocabulary forward, one backward, in place if asked.

    z = softcap * tanh(x / softcap), or x;   lse = log sum_j exp(z_j)
    nll = (1 - eps) w_y (lse - z_y) + eps / V * sum_j w_j (lse - z_j)
    dz_j = (g_nll ((1 - eps) w_y + eps / V * sum w) + g_lse) p_j - g_nll ((1 - eps) w_y [j = y] + eps / V * w_j)

One program owns one row. Bytes: 2 a logit forward, 4 backward (read, write) in bf16, 6 in all, the least there is. The
running maximum and sum are those of Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).

128-bit accesses for any V: a row of 50,257 16-bit logits starts on any 2-byte boundary, and a compiler that knows no
more must read it in 16-bit pieces. So a row is cut into the fewer than VECTOR elements before its first 16-byte
boundary, a body of whole vectors, and the fewer than VECTOR elements after the last. Body accesses are whole vectors,
wholly inside the row; the two edges are one small tile. Nothing outside the row is read or written.

Rejected: rounding the row start down and masking, which reads the neighbours' elements (or, at the ends of the tensor,
nobody's), and makes the in-place gradient a race between rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from gpt4v_fast.kernels import configs
from gpt4v_fast.kernels.common import (
    LN2,
    LOG2E,
    VECTOR_BYTES,
    last_dim_contiguous,
    launch_options,
    on_device,
    tanh,
    tanh_slope,
    target_arch,
)

_LN2 = tl.constexpr(LN2)
_LOG2E = tl.constexpr(LOG2E)


class Loss(NamedTuple):
    """Which terms the loss has, for the compiler."""

    HAS_WEIGHT: bool
    SMOOTHING: bool
    SOFTCAP: bool


class ClassWeights(NamedTuple):
    pointer: Any  # a torch.Tensor (V,) for the launcher
    sum: Any  # of one element


@triton.jit
def _row_parts(row, stride, lead, V, VECTOR: tl.constexpr):
    """(body, head, vectors): where the body of a row starts, its first column, and how many vectors it has.

    Positions count elements from a 16-byte boundary `lead` elements before the tensor. A short row may end before its
    first boundary: then head is more than V and there are no vectors.
    """
    start = lead + row * stride
    body = tl.multiple_of((start + VECTOR - 1) // VECTOR * VECTOR, VECTOR)
    head = (body - start).to(tl.int32)
    return body, head, tl.maximum(V - head, 0) // VECTOR


@triton.jit
def _edge_columns(head, vectors, V, VECTOR: tl.constexpr):
    """The columns before and after the body as one tile of 2 VECTOR elements, and which of them exist."""
    lane = tl.arange(0, 2 * VECTOR)
    columns = tl.where(lane < VECTOR, lane, head + vectors * VECTOR + lane - VECTOR)
    return columns, (columns < V) & ((lane >= VECTOR) | (lane < head))


@triton.jit
def capped(x, softcap, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        return softcap * tanh(x / softcap)
    else:
        return x


@triton.jit
def _online_step(
    x, valid, columns, row_max, origin, sums, smooth, weight_ptr, softcap, MASKED: tl.constexpr, LOSS: tl.constexpr
):
    """Take one tile of logits into a row's statistics: maximum logit, origin of the exponents, and sums lane by lane.

    sums holds exp(z - origin), smooth holds w z. (z - origin) is formed before it is multiplied by log2(e): the
    difference of neighbours is exact, and one more instruction costs less than a wrong digit in every probability.
    """
    new_max = tl.maximum(row_max, tl.max(x, 0))
    # exp(z - origin) must exist for a row of infinities too: then 0 is as good an origin as any.
    new_origin = tl.where(tl.abs(new_max) == float("inf"), 0.0, capped(new_max, softcap, LOSS.SOFTCAP))
    rescale = tl.where(row_max == float("-inf"), 0.0, tl.exp2((origin - new_origin) * _LOG2E))
    z = capped(x, softcap, LOSS.SOFTCAP)
    p = tl.exp2((z - new_origin) * _LOG2E)
    if MASKED and LOSS.SOFTCAP:
        p = tl.where(valid, p, 0.0)
    sums = sums * rescale + p
    if LOSS.SMOOTHING:
        if MASKED:
            z = tl.where(valid, z, 0.0)
        if LOSS.HAS_WEIGHT:
            z = z * tl.load(weight_ptr + columns, mask=valid, other=0.0)
        smooth += z
    return new_max, new_origin, sums, smooth


@triton.jit
def no_loss_at_infinity(nll, largest, LOSS: tl.constexpr):
    """NaN where the largest logit is infinite, as inf - inf is; a softcap makes it finite."""
    return nll if LOSS.SOFTCAP else tl.where(largest == float("inf"), float("nan"), nll)


@triton.jit
def load_lse(pointers):
    """lse for a gradient: NaN where it is infinite, so that all of the row's gradient is."""
    lse = tl.load(pointers)
    return tl.where(lse == float("inf"), float("nan"), lse)


@triton.jit(do_not_specialize=["V", "lead"])
def _cross_entropy_forward_kernel(
    logits_ptr, target_ptr, weights, nll_ptr, lse_ptr, argmax_ptr, stride, lead, V, ignore_index, smoothing, softcap,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr, LOSS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    ignored = target == ignore_index
    counted = (target >= 0) & (target < V) & (target != ignore_index)
    body, head, vectors = _row_parts(row, stride, lead, tl.where(counted, V, 0), VECTOR)
    logits_ptr += body  # column c of the row is now at logits_ptr + c - head
    lane = tl.arange(0, BLOCK)
    row_max = float("-inf")
    origin = 0.0
    sums = tl.zeros((BLOCK,), tl.float32)
    smooth = tl.zeros((BLOCK,), tl.float32)
    best = 0  # where in the body the tile with the largest logit starts
    whole = vectors * VECTOR // BLOCK * BLOCK
    for start in tl.range(0, whole, BLOCK):
        x = tl.load(logits_ptr + start + lane).to(tl.float32)  # (BLOCK,)
        previous = row_max
        row_max, origin, sums, smooth = _online_step(
            x, lane >= 0, head + start + lane, row_max, origin, sums, smooth, weights.pointer, softcap,
            False, LOSS,
        )  # fmt: skip
        best = tl.where(row_max > previous, start, best)
    # The mask is the same for all elements of a vector, so that the compiler may load vectors.
    valid = lane // VECTOR < vectors - whole // VECTOR
    x = tl.load(logits_ptr + whole + lane, mask=valid, other=float("-inf")).to(tl.float32)
    previous = row_max
    row_max, origin, sums, smooth = _online_step(
        x, valid, head + whole + lane, row_max, origin, sums, smooth, weights.pointer, softcap,
        True, LOSS,
    )  # fmt: skip
    best = tl.where(row_max > previous, whole, best)
    columns, exists = _edge_columns(head, vectors, tl.where(counted, V, 0), VECTOR)
    edge = tl.load(logits_ptr + columns - head, mask=exists, other=float("-inf")).to(tl.float32)  # (2 VECTOR,)
    edge_zeros = tl.zeros((2 * VECTOR,), tl.float32)
    body_origin = origin
    body_max = row_max
    row_max, origin, edge_sums, edge_smooth = _online_step(
        edge, exists, columns, row_max, origin, edge_zeros, edge_zeros, weights.pointer, softcap,
        True, LOSS,
    )  # fmt: skip
    rescale = tl.where(body_max == float("-inf"), 0.0, tl.exp2((body_origin - origin) * _LOG2E))
    log_sum = tl.log2(tl.sum(sums, 0) * rescale + tl.sum(edge_sums, 0)) * _LN2

    # The lowest column that holds the maximum, in its tile of the body or at the edges; for a row of NaN, the last one.
    valid = best // VECTOR + lane // VECTOR < vectors
    x = tl.load(logits_ptr + best + lane, mask=valid, other=float("-inf")).to(tl.float32)
    inner = tl.min(tl.where(valid & (x == row_max), head + best + lane, V - 1), 0)
    outer = tl.min(tl.where(exists & (edge == row_max), columns, V - 1), 0)
    tl.store(argmax_ptr + row, tl.where(counted, tl.minimum(inner, outer), -1).to(tl.int64))

    z = capped(tl.load(logits_ptr + target - head, mask=counted, other=0.0).to(tl.float32), softcap, LOSS.SOFTCAP)
    nll = origin - z + log_sum
    if LOSS.HAS_WEIGHT:
        nll *= tl.load(weights.pointer + target, mask=counted, other=0.0)
    if LOSS.SMOOTHING:
        weight_sum = tl.load(weights.sum) if LOSS.HAS_WEIGHT else V
        smooth_sum = weight_sum * (origin + log_sum) - (tl.sum(smooth, 0) + tl.sum(edge_smooth, 0))
        nll = (1.0 - smoothing) * nll + smoothing / V * smooth_sum
    nll = no_loss_at_infinity(nll, row_max, LOSS)
    elsewise = tl.where(ignored, 0.0, float("nan"))
    tl.store(nll_ptr + row, tl.where(counted, nll, elsewise))
    tl.store(lse_ptr + row, tl.where(counted, origin + log_sum, elsewise))


@triton.jit
def gradient_slopes(target, grad_nll, grad_lse, weights, V, smoothing, LOSS: tl.constexpr):
    """(slope_p, slope_target, slope_all) of `logit_gradient` for labels that count, of one row or of several."""
    slope_target = grad_nll
    slope_p = grad_nll
    slope_all = tl.zeros_like(grad_nll)
    if LOSS.HAS_WEIGHT:
        slope_target *= tl.load(weights.pointer + target)
        slope_p = slope_target
    if LOSS.SMOOTHING:
        weight_sum = tl.load(weights.sum) if LOSS.HAS_WEIGHT else V
        slope_target *= 1.0 - smoothing
        slope_all = grad_nll * (smoothing / V)
        slope_p = slope_target + slope_all * weight_sum
    return slope_p + grad_lse, slope_target, slope_all


@triton.jit
def z_gradient(p, columns, valid, target, slope_p, slope_target, slope_all, weight_ptr, LOSS: tl.constexpr):
    """slope_p * p - slope_target * [column = target] - slope_all * w for probabilities p."""
    gradient = slope_p * p
    if LOSS.SMOOTHING:
        if LOSS.HAS_WEIGHT:
            gradient -= slope_all * tl.load(weight_ptr + columns, mask=valid, other=0.0)
        else:
            gradient -= slope_all
    return tl.where(columns == target, gradient - slope_target, gradient)


@triton.jit
def logit_gradient(
    x, columns, valid, target, lse, slope_p, slope_target, slope_all, weight_ptr, softcap, LOSS: tl.constexpr
):
    """`z_gradient` of p = softmax(z), times dz/dx."""
    p = tl.exp2((capped(x, softcap, LOSS.SOFTCAP) - lse) * _LOG2E)
    gradient = z_gradient(p, columns, valid, target, slope_p, slope_target, slope_all, weight_ptr, LOSS)
    if LOSS.SOFTCAP:
        gradient *= tanh_slope(x / softcap)
    return gradient


@triton.jit(do_not_specialize=["V", "lead", "out_lead"])
def _cross_entropy_backward_kernel(
    grad_nll_ptr, grad_lse_ptr, logits_ptr, target_ptr, lse_ptr, weights, out_ptr,
    stride, lead, out_stride, out_lead, V, ignore_index, smoothing, softcap,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr, SAME_BOUNDARIES: tl.constexpr, LOSS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    body, head, vectors = _row_parts(row, stride, lead, V, VECTOR)
    out_body = out_lead + row * out_stride + head
    if SAME_BOUNDARIES:
        out_body = tl.multiple_of(out_body // VECTOR * VECTOR, VECTOR)
    logits_ptr += body
    out_ptr += out_body
    lane = tl.arange(0, BLOCK)
    whole = vectors * VECTOR // BLOCK * BLOCK
    valid = lane // VECTOR < vectors - whole // VECTOR
    columns, exists = _edge_columns(head, vectors, V, VECTOR)
    column = (target - head).to(tl.int32)  # of the label, counted from the body as the lanes are
    if (target >= 0) & (target < V) & (target != ignore_index):
        lse = load_lse(lse_ptr + row)
        slope_p, slope_target, slope_all = gradient_slopes(
            target, tl.load(grad_nll_ptr + row), tl.load(grad_lse_ptr + row), weights, V, smoothing, LOSS
        )
        weight_ptr = weights.pointer + head
        for start in tl.range(0, whole, BLOCK):
            x = tl.load(logits_ptr + start + lane).to(tl.float32)  # (BLOCK,)
            gradient = logit_gradient(
                x, start + lane, lane >= 0, column, lse, slope_p, slope_target, slope_all, weight_ptr, softcap, LOSS
            )
            tl.store(out_ptr + start + lane, gradient.to(out_ptr.dtype.element_ty))
        x = tl.load(logits_ptr + whole + lane, mask=valid, other=0.0).to(tl.float32)
        gradient = logit_gradient(
            x, whole + lane, valid, column, lse, slope_p, slope_target, slope_all, weight_ptr, softcap, LOSS
        )
        tl.store(out_ptr + whole + lane, gradient.to(out_ptr.dtype.element_ty), mask=valid)
        x = tl.load(logits_ptr + columns - head, mask=exists, other=0.0).to(tl.float32)
        gradient = logit_gradient(
            x, columns - head, exists, column, lse, slope_p, slope_target, slope_all, weight_ptr, softcap, LOSS
        )
        tl.store(out_ptr + columns - head, gradient.to(out_ptr.dtype.element_ty), mask=exists)
    else:
        # An ignored row gets zeros, a label that is none gets NaN, whatever the logits hold: they are not looked at.
        nothing = tl.where(target == ignore_index, 0.0, float("nan")).to(out_ptr.dtype.element_ty)
        for start in tl.range(0, whole, BLOCK):
            tl.store(out_ptr + start + lane, tl.zeros((BLOCK,), out_ptr.dtype.element_ty) + nothing)
        tl.store(out_ptr + whole + lane, tl.zeros((BLOCK,), out_ptr.dtype.element_ty) + nothing, mask=valid)
        tl.store(out_ptr + columns - head, tl.zeros((2 * VECTOR,), out_ptr.dtype.element_ty) + nothing, mask=exists)


def _from_boundary(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(the same elements seen from the 16-byte boundary before them, how many elements before them that is).

    Where the tensor's storage does not reach back to a boundary, the tensor itself and 0: right, with narrow accesses.
    """
    lead = tensor.data_ptr() % VECTOR_BYTES // tensor.element_size()
    if lead == 0 or lead > tensor.storage_offset():
        return tensor, 0
    return tensor.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset() - lead), lead


def _row_stride(tensor: torch.Tensor) -> int:
    return tensor.stride(0) if tensor.shape[0] > 1 else tensor.shape[1]


def class_weights(logits: torch.Tensor, weight: torch.Tensor | None) -> ClassWeights:
    """For the kernels, in fp32; without weights stand-ins that are never read."""
    if weight is None:
        return ClassWeights(logits, logits)
    weight = weight.to(torch.float32).contiguous()
    return ClassWeights(weight, weight.sum())


def cross_entropy_forward(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(nll, lse, argmax) of each row: the loss as this file begins with, log sum exp(z), the largest logit's column.

    logits (N, V) fp32, bf16 or fp16, any row stride; target (N,) int64; weight (V,); softcap positive. nll and lse are
    fp32, argmax int64 and the lowest of equals. A row whose target is ignore_index gives 0, 0 and -1. A target outside
    [0, V) gives NaN, NaN and -1, and its row is not read. With NaN among the logits nll and lse are NaN and argmax is
    some column.

    Source: Milakov and Gimelshein (2018) for the running sum; label smoothing as in torch.nn.functional.cross_entropy.
    """
    N, V = logits.shape
    nll = torch.empty(N, dtype=torch.float32, device=logits.device)
    lse = torch.empty_like(nll)
    argmax = torch.empty(N, dtype=torch.int64, device=logits.device)
    if N == 0:
        return nll, lse, argmax
    logits, lead = _from_boundary(last_dim_contiguous(logits))
    weights = class_weights(logits, weight)
    loss = Loss(weight is not None, label_smoothing != 0.0, softcap is not None)
    with on_device(logits):
        arch = target_arch()
        config = configs.cross_entropy(arch, logits.dtype, V)
        _cross_entropy_forward_kernel[(N,)](
            logits, target.contiguous(), weights, nll, lse, argmax,
            _row_stride(logits), lead, V, ignore_index, label_smoothing, softcap or 0.0,
            BLOCK=config.block, VECTOR=VECTOR_BYTES // logits.element_size(), LOSS=loss,
            num_warps=config.num_warps, **launch_options(arch),
        )  # fmt: skip
    return nll, lse, argmax


def cross_entropy_backward(
    grad_nll: torch.Tensor,
    grad_lse: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient (N, V) of the logits, in their dtype, for the gradients grad_nll and grad_lse (N,) of nll and lse.

    lse as `cross_entropy_forward` gave it. out may be logits itself: each element is read before it is written, by the
    same thread, and no row touches another. A row whose target is ignore_index gets zeros, one whose target is outside
    [0, V) gets NaN. Raises ValueError for an out of another shape or dtype, or without unit stride along V.
    """
    N, V = logits.shape
    if out is None:
        out = torch.empty((N, V), dtype=logits.dtype, device=logits.device)
    if out.shape != logits.shape or out.dtype != logits.dtype or (out.stride(1) != 1 and V > 1):
        raise ValueError(
            f"out: expected {logits.dtype} of shape {tuple(logits.shape)} with unit stride along the classes, "
            f"got {out.dtype} of shape {tuple(out.shape)} with strides {out.stride()}"
        )
    if out.numel() == 0:
        return out
    logits, lead = _from_boundary(last_dim_contiguous(logits))
    target_out, out_lead = _from_boundary(out)
    vector = VECTOR_BYTES // logits.element_size()
    strides = _row_stride(logits), _row_stride(out)
    weights = class_weights(logits, weight)
    loss = Loss(weight is not None, label_smoothing != 0.0, softcap is not None)
    with on_device(logits):
        arch = target_arch()
        config = configs.cross_entropy(arch, logits.dtype, V)
        _cross_entropy_backward_kernel[(N,)](
            grad_nll.to(torch.float32).contiguous(), grad_lse.to(torch.float32).contiguous(), logits,
            target.contiguous(), lse.contiguous(), weights, target_out,
            strides[0], lead, strides[1], out_lead, V, ignore_index, label_smoothing, softcap or 0.0,
            BLOCK=config.block, VECTOR=vector,
            SAME_BOUNDARIES=(strides[0] - strides[1]) % vector == 0 and (lead - out_lead) % vector == 0,
            LOSS=loss,
            num_warps=config.num_warps, **launch_options(arch),
        )  # fmt: skip
    return out
