"""`linear_cross_entropy` on a GPU whose forward pass keeps logits in the memory of weight's gradient
(kernels/loss/linear_cross_entropy_kept.py).

An op may not give out as a result what it got as an argument, so forward and backward are called here within a
torch.autograd.Function: in eager mode, outside of torch.func's transforms. Elsewhere the op computes logits twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gpt4v_fast.ops import labels, library
from gpt4v_fast.ops.cross_entropy import LossOptions, look_at_labels


def can_keep(arguments: tuple[Any, ...]) -> bool:
    """Whether a call of the fused Triton kernels with the op's `arguments` may keep logits: weight's gradient is
    wanted, and nobody traces or transforms. Whether its sizes allow it is for the launcher to say."""
    hidden, weight, bias, target, *loss_options, _shift, _keep = arguments
    options = LossOptions(*loss_options)
    if hidden.dtype != torch.bfloat16 or bias is not None or options.softcap != 0.0:
        return False
    tensors = [x for x in (hidden, weight, target, options.class_weight) if x is not None]
    is_plain = all(type(x) in (torch.Tensor, torch.nn.Parameter) for x in tensors)
    is_eager = torch.is_grad_enabled() and not library.is_traced_or_transformed()
    return is_plain and weight.requires_grad and is_eager


def with_kept_logits(
    arguments: tuple[Any, ...], backward: Callable[..., Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(nll, lse, argmax) of the op; `backward` is the op for where nothing is kept (any more)."""
    nll, lse, argmax = _Function.apply(backward, *arguments[:-1])
    return nll, lse, argmax


class _Function(torch.autograd.Function):
    """The first backward pass uses up what forward kept; further ones, through a retained graph, compute it again."""

    @staticmethod
    def forward(ctx: Any, backward: Callable[..., Any], *inputs: Any) -> tuple[torch.Tensor, ...]:
        from gpt4v_fast.kernels.loss.linear_cross_entropy import linear_cross_entropy_forward_keeping

        hidden, weight, bias, target, *loss_options, shift = inputs
        options = LossOptions(*loss_options)
        shifted = labels.shifted(target, shift, options.ignore_index)
        look_at_labels(shifted, weight.shape[0], options.ignore_index, "triton", shift)
        nll, lse, argmax, ctx.kept = linear_cross_entropy_forward_keeping(
            hidden, weight, bias, shifted.reshape(-1), class_weight=options.class_weight,
            ignore_index=options.ignore_index, label_smoothing=options.label_smoothing,
        )  # fmt: skip
        ctx.backward_op, ctx.numbers = backward, inputs[5:]
        ctx.mark_non_differentiable(argmax)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:5], lse)
        return nll, lse, argmax

    @staticmethod
    def backward(ctx: Any, grad_nll: torch.Tensor | None, grad_lse: torch.Tensor | None, _: Any) -> tuple[Any, ...]:
        hidden, weight, bias, target, class_weight, lse = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None
        wanted = tuple(ctx.needs_input_grad[1:4])
        grad_nll, grad_lse = (torch.zeros_like(lse) if slope is None else slope for slope in (grad_nll, grad_lse))
        # Under create_graph a second derivative is meant, which the op refuses.
        if kept is None or not wanted[1] or torch.is_grad_enabled():
            nothing_kept = hidden.new_empty(0, dtype=torch.uint8)
            saved = (hidden, weight, bias, target, lse, torch.zeros_like(lse), nothing_kept, class_weight)
            gradients = ctx.backward_op(grad_nll, grad_lse, *saved, *ctx.numbers, *wanted)
        else:
            from gpt4v_fast.kernels.loss.linear_cross_entropy_kept import linear_cross_entropy_backward_of_kept

            options = LossOptions(class_weight, *ctx.numbers[:-1])
            rows = labels.shifted(target, ctx.numbers[-1], options.ignore_index).reshape(-1)
            grad_hidden, grad_weight = linear_cross_entropy_backward_of_kept(
                grad_nll, grad_lse, hidden, weight, rows, lse, kept, of_hidden=wanted[0],
                class_weight=class_weight, ignore_index=options.ignore_index, label_smoothing=options.label_smoothing,
            )  # fmt: skip
            gradients = (grad_hidden, grad_weight, None)
        return None, *(g if w else None for g, w in zip(gradients, wanted, strict=True)), *[None] * 6
