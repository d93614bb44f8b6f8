"""The projection to the vocabulary and its cross-entropy in one: the public function and its torch ops.

user -> linear_cross_entropy -> gpt4v_fast::linear_cross_entropy
                                    -> _C.linear_cross_entropy_forward (csrc/kernels/linear_cross_entropy.h)
                                    or kernels/linear_cross_entropy.py (chunks of torch products and Triton)
                                    or reference.cross_entropy_core
"""

from __future__ import annotations

from typing import Any

import torch

from gpt4v_fast import backends, reference
from gpt4v_fast._native import _C, threads, view
from gpt4v_fast.ops import checks, labels, library
from gpt4v_fast.ops.cross_entropy import (
    LOSS_OPTIONS,
    LossOptions,
    check_options,
    describe,
    look_at_labels,
    native_weight,
    reduce_loss,
    row_tensors,
    triton_options,
)
from gpt4v_fast.reference import LossStats


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    shift: int = 0,
    return_stats: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, LossStats]:
    """`cross_entropy` of the logits hidden @ weight^T + bias, which are never written whole.

    On a CPU the logits are fp32 whatever the inputs are, tokens whose label is ignore_index are dropped
    before any product, and extra memory is at most 64 MiB beside the gradients for any N and V.

    Args:
        hidden: (..., E), fp32, bf16 or fp16, any strides. Under autocast, hidden, weight and bias take its
            dtype.
        weight: (V, E) in hidden's dtype.
        target: (...), integer labels in [0, V), or ignore_index.
        bias: (V,), any of these float dtypes.
        class_weight: (V,), weights of the classes; a constant, no gradient reaches it.
        shift: position t predicts label t + shift along hidden's last but one dimension, without a copy of
            hidden; the last `shift` positions do not count. 1 is a language model's loss.
        ignore_index, reduction, label_smoothing, z_loss, softcap, return_stats: as for `cross_entropy`;
            position t of the "none" loss and of the statistics is about the prediction that is made there.

    Returns:
        The loss, fp32: a scalar, or target's shape for "none". With return_stats (loss, stats). Gradients
        reach hidden, weight and bias.

    Raises:
        TypeError, ValueError, IndexError, FallbackError: as `cross_entropy`.

    Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (2024).
    """
    numbers = (ignore_index, reduction, label_smoothing, z_loss, softcap, shift)
    arguments = prepare(hidden, weight, target, bias, class_weight, *numbers)
    options = LossOptions(*arguments[4:8])
    nll, lse, argmax, _ = _linear_cross_entropy_op(*arguments)
    target = labels.shifted(target, shift, ignore_index)
    return reduce_loss(nll, lse, argmax, target, options, reduction, z_loss, return_stats)


def prepare(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    shift: int = 0,
    return_stats: bool = False,
) -> tuple[Any, ...]:
    """Checks `linear_cross_entropy`'s arguments and returns those of the torch op."""
    checks.check_tensor("hidden", hidden)
    checks.check_tensor("weight", weight, ndim=2)
    if bias is not None:
        checks.check_tensor("bias", bias)
    hidden, weight, bias = library.autocast(hidden, weight, bias)
    checks.check_like("weight", weight, "hidden", hidden)
    V, E = weight.shape
    if V == 0:
        raise ValueError(f"weight: expected shape (V, E) with V at least 1, got {tuple(weight.shape)}")
    if hidden.dim() == 0 or hidden.shape[-1] != E:
        raise ValueError(f"hidden: expected shape (..., E) with weight's E = {E}, got {tuple(hidden.shape)}")
    if bias is not None:
        checks.check_shape("bias", bias, (V,), "(V,)")
        checks.check_device("bias", bias, "hidden", hidden)
    labels.check_target(target, tuple(hidden.shape[:-1]), f"hidden {tuple(hidden.shape)}", hidden)
    options = check_options(
        "class_weight", class_weight, V, hidden, ignore_index, reduction, label_smoothing, z_loss, softcap
    )
    if isinstance(shift, bool) or not isinstance(shift, int):
        raise TypeError(f"shift: expected an int, got {type(shift).__name__}")
    if shift < 0 or (shift > 0 and target.dim() == 0):
        raise ValueError(f"shift: expected 0 or more, and 0 for a single token, got {shift}")
    return hidden.reshape(target.numel(), E), weight, bias, target, *options, shift


def _request(*args: Any, **kwargs: Any) -> backends.Request:
    return describe("linear_cross_entropy", prepare(*args, **kwargs)[0])


backends.register_kernel("linear_cross_entropy", "cpu", "_C.linear_cross_entropy")
backends.register_kernel("linear_cross_entropy", "triton", "kernels.linear_cross_entropy")
backends.register_explainer(linear_cross_entropy, _request)


def _linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    *loss_options, shift = rest
    options = LossOptions(*loss_options)
    backend = backends.pick(describe("linear_cross_entropy", hidden)).backend
    target = labels.shifted(target, shift, options.ignore_index)
    look_at_labels(target, weight.shape[0], options.ignore_index, backend, shift)
    rows = target.reshape(-1).to(torch.int64)
    if backend == "cpu":
        nll, lse, argmax, lse_low = row_tensors(hidden.shape[0], hidden)
        class_weight = native_weight(options.class_weight)
        tensors = (hidden, weight, bias, rows, class_weight)
        outputs = (nll, lse, lse_low, argmax)
        _C.linear_cross_entropy_forward(*map(view, tensors), *options[1:], *map(view, outputs), threads())
        return nll, lse, argmax, lse_low
    if backend == "triton":
        from gpt4v_fast.kernels import linear_cross_entropy as kernel

        nll, lse, argmax = kernel.linear_cross_entropy_forward(hidden, weight, bias, rows, **_triton_options(options))
    else:
        nll, lse, argmax = reference.cross_entropy_core(_logits(hidden, weight, bias), rows, *options)
    return nll, lse, argmax, torch.zeros_like(lse)


def _linear_cross_entropy_backward(
    grad_nll: torch.Tensor,
    grad_lse: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    lse: torch.Tensor,
    lse_low: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    *loss_options, shift, of_hidden, of_weight, of_bias = rest
    options = LossOptions(*loss_options)
    backend = backends.pick(describe("linear_cross_entropy", hidden)).backend
    rows = labels.shifted(target, shift, options.ignore_index).reshape(-1).to(torch.int64)
    if backend == "cpu":
        grad_hidden, grad_weight, grad_bias = (
            torch.empty(tensor.shape, dtype=dtype) if wanted and tensor is not None else None
            for tensor, dtype, wanted in (
                (hidden, hidden.dtype, of_hidden),
                (weight, weight.dtype, of_weight),
                (bias, torch.float32, of_bias),
            )
        )
        class_weight = native_weight(options.class_weight)
        tensors = (hidden, weight, bias, rows, class_weight)
        further = (lse, lse_low, grad_nll, grad_lse, grad_hidden, grad_weight, grad_bias)
        _C.linear_cross_entropy_backward(*map(view, tensors), *options[1:], *map(view, further), threads())
    elif backend == "triton":
        from gpt4v_fast.kernels import linear_cross_entropy as kernel

        grad_hidden, grad_weight, grad_bias = kernel.linear_cross_entropy_backward(
            grad_nll, grad_lse, hidden, weight, bias, rows, lse,
            of_hidden=of_hidden, of_weight=of_weight, of_bias=of_bias, **_triton_options(options),
        )  # fmt: skip
    else:
        logits = _logits(hidden, weight, bias)
        gradient = reference.cross_entropy_core_backward(grad_nll, grad_lse, logits, rows, *options)
        grad_hidden = gradient @ weight.float() if of_hidden else None
        grad_weight = gradient.t() @ hidden.float() if of_weight else None
        grad_bias = gradient.sum(dim=0) if of_bias else None
    pairs = ((grad_hidden, hidden), (grad_weight, weight), (grad_bias, bias))
    return tuple(hidden.new_empty(0) if g is None or x is None else g.to(x.dtype) for g, x in pairs)


def _triton_options(options: LossOptions) -> dict[str, Any]:
    further = triton_options(options)
    return {"class_weight": further.pop("weight"), **further}


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.nn.functional.linear(hidden.float(), weight.float(), None if bias is None else bias.float())


def _linear_cross_entropy_fake(
    hidden: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return row_tensors(hidden.shape[0], hidden)


def _linear_cross_entropy_backward_fake(
    grad_nll: Any,
    grad_lse: Any,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    pairs = zip((hidden, weight, bias), rest[-3:], strict=True)
    return tuple(hidden.new_empty(0) if x is None or not wanted else x.new_empty(x.shape) for x, wanted in pairs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, bias, target, class_weight, *scalars = inputs
    _, lse, argmax, lse_low = output
    ctx.mark_non_differentiable(argmax, lse_low)
    ctx.save_for_backward(hidden, weight, bias, target, lse, lse_low, class_weight)
    ctx.scalars = scalars


def _autograd(ctx: Any, grad_nll: torch.Tensor, grad_lse: torch.Tensor, *unused: Any) -> tuple[Any, ...]:
    hidden, weight, bias, target, lse, lse_low, class_weight = ctx.saved_tensors
    wanted = tuple(ctx.needs_input_grad[:3])
    gradients = _linear_cross_entropy_backward_op(
        grad_nll, grad_lse, hidden, weight, bias, target, lse, lse_low, class_weight, *ctx.scalars, *wanted
    )
    return *(g if w else None for g, w in zip(gradients, wanted, strict=True)), *[None] * 6


_linear_cross_entropy_op = library.define_op(
    f"linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, {LOSS_OPTIONS}, "
    "int shift) -> (Tensor, Tensor, Tensor, Tensor)",
    _linear_cross_entropy,
    _linear_cross_entropy_fake,
    setup_context=_setup_context,
    backward=_autograd,
)
_linear_cross_entropy_backward_op = library.define_op(
    "linear_cross_entropy_backward(Tensor grad_nll, Tensor grad_lse, Tensor hidden, Tensor weight, "
    f"Tensor? bias, Tensor target, Tensor lse, Tensor lse_low, {LOSS_OPTIONS}, int shift, bool of_hidden, "
    "bool of_weight, bool of_bias) -> (Tensor, Tensor, Tensor)",
    _linear_cross_entropy_backward,
    _linear_cross_entropy_backward_fake,
    gradient_of="linear_cross_entropy",
)
