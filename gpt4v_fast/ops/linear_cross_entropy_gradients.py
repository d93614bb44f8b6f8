"""`linear_cross_entropy` with its gradients computed in the forward pass (C++: linear_cross_entropy_gradients.h).

The slopes of a mean or a sum in every token's nll and lse are known before the loss is, up to the factor that arrives
in the backward pass. With them all gradients come from logits that are computed once, some tokens at a time. The two
passes of the op, between which logits are kept as far as memory goes, compute the rest of them twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from gpt4v_fast._native import _C, threads, view
from gpt4v_fast.ops import labels, library
from gpt4v_fast.ops.cross_entropy import LossOptions, labels_weight, look_at_labels, native_weight, row_tensors

# Extra memory of a call, nearly all of it for logits. The gradient of weight itself keeps some until it is written.
EXTRA_BYTES = 60 << 20

# Between forward and backward the op keeps about as much, and then computes nothing twice either.
KEPT_BY_OP = 56 << 20


def known_slopes(arguments: tuple[Any, ...], reduction: str, z_loss: float) -> tuple[float, float] | None:
    """(a, b) for `with_gradients`: the loss has the slope a in each token's nll, and b lse in its lse.

    None where the slopes are not known, where all logits can be kept between the passes, and where nothing is won
    without a gradient of weight. `arguments` are those of the op.
    """
    hidden, weight, _, target, *loss_options, shift, _ = arguments
    if reduction == "none" or not library.is_plain_with_gradient(arguments):
        return None
    if hidden.dtype != torch.float32 and not weight.requires_grad:
        return None
    row_bytes = hidden.element_size() * weight.shape[0]
    if hidden.shape[0] * row_bytes <= KEPT_BY_OP:
        return None
    options = LossOptions(*loss_options)
    target = labels.shifted(target, shift, options.ignore_index)
    counted = target != options.ignore_index
    tokens = int(counted.sum())
    if tokens * row_bytes <= KEPT_BY_OP:
        return None
    if reduction == "sum":
        return 1.0, 2.0 * z_loss
    weights = options.class_weight
    total = tokens if weights is None else float(labels_weight(target, counted, weights).sum(dtype=torch.float64))
    return None if total == 0.0 else (1.0 / total, 2.0 * z_loss / tokens)


def with_gradients(
    arguments: tuple[Any, ...], slopes: tuple[float, float], backward: Callable[..., Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(nll, lse, argmax) of the op, whose gradients are ready; `backward` is the op for slopes that turn out others."""
    nll, lse, argmax = _Function.apply(backward, *arguments[:-1], *slopes)
    return nll, lse, argmax


class _Function(torch.autograd.Function):
    """Its backward pass hands the gradients out, scaled by what has arrived, and keeps none of them. Once more, through
    a retained graph, it computes them again in the same way, for the same bits."""

    @staticmethod
    def forward(ctx: Any, backward: Callable[..., Any], *inputs: Any) -> tuple[torch.Tensor, ...]:
        ctx.backward_op, ctx.numbers, ctx.wanted = backward, inputs[5:], tuple(ctx.needs_input_grad[1:4])
        (nll, lse, argmax, lse_low), ctx.gradients = _compute(ctx.wanted, *inputs)
        ctx.mark_non_differentiable(argmax)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:5], lse, lse_low)
        return nll, lse, argmax

    @staticmethod
    def backward(ctx: Any, grad_nll: torch.Tensor | None, grad_lse: torch.Tensor | None, _: Any) -> tuple[Any, ...]:
        hidden, weight, bias, target, class_weight, lse, lse_low = ctx.saved_tensors
        *options, nll_slope, lse_slope = ctx.numbers
        gradients, ctx.gradients = ctx.gradients, None
        factor = _factor(grad_nll, grad_lse, lse, nll_slope, lse_slope)
        if factor is None or torch.is_grad_enabled():  # another loss, or a second derivative, which the op refuses
            slopes = (torch.zeros_like(lse) if slope is None else slope for slope in (grad_nll, grad_lse))
            nothing_kept = hidden.new_empty(0, dtype=torch.uint8)
            saved = (hidden, weight, bias, target, lse, lse_low, nothing_kept, class_weight)
            gradients = ctx.backward_op(*slopes, *saved, *options, *ctx.wanted)
        else:
            if gradients is None:
                _, gradients = _compute(ctx.wanted, hidden, weight, bias, target, class_weight, *ctx.numbers)
            if factor != 1.0:
                gradients = [g if g is None else g.mul_(factor) for g in gradients]
        return None, *(g if w else None for g, w in zip(gradients, ctx.wanted, strict=True)), *[None] * 8


def _factor(
    grad_nll: torch.Tensor | None, grad_lse: torch.Tensor | None, lse: torch.Tensor, nll_slope: float, lse_slope: float
) -> float | None:
    """How many times nll_slope and lse_slope * lse the gradients of nll and lse are; None if they are not."""
    if grad_nll is None:
        return None
    factor = float(grad_nll[0]) / float(torch.tensor(nll_slope))
    if not math.isfinite(factor) or not bool((grad_nll == grad_nll[0]).all()):
        return None
    of_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    return factor if torch.allclose(of_lse, lse * (lse_slope * factor), rtol=1e-6, atol=0.0) else None


def _compute(
    wanted: tuple[bool, ...],
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    *rest: Any,
) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor | None]]:
    """(nll, lse, argmax, lse_low) and the gradients of hidden, weight and bias that are wanted."""
    *loss_options, shift, nll_slope, lse_slope = rest
    options = LossOptions(*loss_options)
    target = labels.shifted(target, shift, options.ignore_index)
    look_at_labels(target, weight.shape[0], options.ignore_index, "cpu", shift)
    rows = target.reshape(-1).to(torch.int64)
    nll, lse, argmax, lse_low = row_tensors(hidden.shape[0], hidden)
    gradients = [
        torch.empty(x.shape, dtype=dtype) if w and x is not None else None
        for x, dtype, w in zip((hidden, weight, bias), (hidden.dtype, weight.dtype, torch.float32), wanted, strict=True)
    ]
    tensors = (hidden, weight, bias, rows, native_weight(options.class_weight))
    head = (*map(view, tensors), *options[1:], *map(view, (nll, lse, lse_low, argmax)), nll_slope, lse_slope)
    _C.linear_cross_entropy_gradients(*head, *map(view, gradients), EXTRA_BYTES, threads())
    if bias is not None and gradients[2] is not None:
        gradients[2] = gradients[2].to(bias.dtype)
    return (nll, lse, argmax, lse_low), gradients
