"""`linear_cross_entropy` by backend: which kernel serves a call, and forward and backward of its torch ops with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gpt4v_fast import backends, reference
from gpt4v_fast._native import _C, threads, view
from gpt4v_fast.kernels.loss import plans
from gpt4v_fast.ops import labels
from gpt4v_fast.ops.cross_entropy import LossOptions, look_at_labels, native_weight, row_tensors, triton_options
from gpt4v_fast.ops.linear_cross_entropy_gradients import KEPT_BY_OP

# Bytes that forward may leave for backward at the most (csrc/loss/kept_logits.h), of the 64 MiB of extra memory.
KEPT_BYTES = KEPT_BY_OP

_FEW = frozenset({"few logits"})


def describe(hidden: torch.Tensor, weight: torch.Tensor) -> backends.Request:
    few = plans.by_products(hidden.shape[0], weight.shape[0])
    return backends.Request("linear_cross_entropy", hidden.device.type, hidden.dtype, _FEW if few else frozenset())


def is_fused(hidden: torch.Tensor, weight: torch.Tensor) -> bool:
    return backends.pick(describe(hidden, weight)).kernel == "kernels.linear_cross_entropy"


def _too_many_logits(request: backends.Request) -> str | None:
    if request.features >= _FEW:
        return None
    return f"the fp32 logits need more than {plans.PRODUCT_BYTES >> 20} MiB"


backends.register_kernel("linear_cross_entropy", "cpu", "_C.linear_cross_entropy")
backends.register_kernel("linear_cross_entropy", "triton", "kernels.linear_cross_entropy_products", _too_many_logits)
backends.register_kernel("linear_cross_entropy", "triton", "kernels.linear_cross_entropy")


def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    *loss_options, shift, keep = rest
    options = LossOptions(*loss_options)
    choice = backends.pick(describe(hidden, weight))
    backend = choice.backend
    target = labels.shifted(target, shift, options.ignore_index)
    look_at_labels(target, weight.shape[0], options.ignore_index, backend, shift)
    rows = target.reshape(-1).to(torch.int64)
    if backend == "cpu":
        nll, lse, argmax, lse_low = row_tensors(hidden.shape[0], hidden)
        class_weight = native_weight(options.class_weight)
        tensors = (hidden, weight, bias, rows, class_weight)
        kept = _kept(hidden, weight, keep)
        outputs = (nll, lse, lse_low, argmax, kept if keep else None)
        _C.linear_cross_entropy_forward(*map(view, tensors), *options[1:], *map(view, outputs), threads())
        return nll, lse, argmax, lse_low, kept
    if backend == "triton":
        launch, _ = _triton_kernels(choice)
        nll, lse, argmax = launch(hidden, weight, bias, rows, **_triton_options(options))
    else:
        nll, lse, argmax = reference.cross_entropy_core(_logits(hidden, weight, bias), rows, *options)
    kept = _kept(hidden, weight, keep)
    if kept.numel():
        kept[: 1 << 16] = 0  # an empty header: backward finds nothing
    return nll, lse, argmax, torch.zeros_like(lse), kept


def _kept(hidden: torch.Tensor, weight: torch.Tensor, keep: bool) -> torch.Tensor:
    """Memory for logits that forward leaves for backward; what is not used of it is never touched."""
    if not keep or hidden.device.type != "cpu":
        return hidden.new_empty(0, dtype=torch.uint8)
    rows, classes = hidden.shape[0] + 15, weight.shape[0] + 71  # whole vectors and tiles
    return hidden.new_empty(torch.sym_min(64 + 4 * rows * (classes + 1), KEPT_BYTES), dtype=torch.uint8)


def backward(
    grad_nll: torch.Tensor,
    grad_lse: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    lse: torch.Tensor,
    lse_low: torch.Tensor,
    kept: torch.Tensor,
    *rest: Any,
    shard: bool = False,
) -> tuple[torch.Tensor, ...]:
    """`shard`: lse is that of the whole vocabulary, and weight and bias are some rows of it."""
    *loss_options, shift, of_hidden, of_weight, of_bias = rest
    options = LossOptions(*loss_options)
    choice = backends.pick(describe(hidden, weight))
    backend = choice.backend
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
        further = (lse, lse_low, kept if len(kept) else None, grad_nll, grad_lse, grad_hidden, grad_weight, grad_bias)
        _C.linear_cross_entropy_backward(*map(view, tensors), *options[1:], *map(view, further), threads())
    elif backend == "triton":
        _, launch = _triton_kernels(choice)
        grad_hidden, grad_weight, grad_bias = launch(
            grad_nll, grad_lse, hidden, weight, bias, rows, lse,
            of_hidden=of_hidden, of_weight=of_weight, of_bias=of_bias, **_triton_options(options),
        )  # fmt: skip
    else:
        logits = _logits(hidden, weight, bias)
        exact_lse = lse.double() + lse_low if shard else None
        gradient = reference.cross_entropy_core_backward(grad_nll, grad_lse, logits, rows, *options, exact_lse)
        grad_hidden = gradient @ weight.float() if of_hidden else None
        grad_weight = gradient.t() @ hidden.float() if of_weight else None
        grad_bias = gradient.sum(dim=0) if of_bias else None
    pairs = ((grad_hidden, hidden), (grad_weight, weight), (grad_bias, bias))
    return tuple(hidden.new_empty(0) if g is None or x is None else g.to(x.dtype) for g, x in pairs)


def _triton_kernels(choice: backends.Choice) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The launchers forward and backward; imports triton."""
    if choice.kernel == "kernels.linear_cross_entropy_products":
        from gpt4v_fast.kernels.loss import linear_cross_entropy_products as products

        return products.linear_cross_entropy_forward, products.linear_cross_entropy_backward
    from gpt4v_fast.kernels.loss import linear_cross_entropy as fused
    from gpt4v_fast.kernels.loss import linear_cross_entropy_backward as fused_backward

    return fused.linear_cross_entropy_forward, fused_backward.linear_cross_entropy_backward


def _triton_options(options: LossOptions) -> dict[str, Any]:
    further = triton_options(options)
    return {"class_weight": further.pop("weight"), **further}


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.nn.functional.linear(hidden.float(), weight.float(), None if bias is None else bias.float())


def forward_fake(
    hidden: torch.Tensor, weight: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return *row_tensors(hidden.shape[0], hidden), _kept(hidden, weight, rest[-1])


def backward_fake(
    grad_nll: Any,
    grad_lse: Any,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    pairs = zip((hidden, weight, bias), rest[-3:], strict=True)
    return tuple(hidden.new_empty(0) if x is None or not wanted else x.new_empty(x.shape) for x, wanted in pairs)
