"""Linear cross-entropy on a GPU: chunks of tokens, large products around the cross-entropy kernels.

The fp32 logits of one chunk, at most CHUNK_BYTES, are all that is ever there of them; backward computes them
again and turns them into their gradient in place. 8 N V E flops forward and backward beyond the 2 N V E of
the loss itself.

Tokens whose label is ignored take part in the products: to drop them one would have to wait for the device to
count them. grad_weight is summed over the chunks in fp32, which for 16-bit weights costs a (V, E) fp32
tensor.
"""

from __future__ import annotations

from typing import Any

import torch

from gpt4v_fast.kernels.cross_entropy import cross_entropy_backward, cross_entropy_forward

CHUNK_BYTES = 64 << 20  # of fp32 logits; large enough that the products run at full speed for any vocabulary


def _chunks(N: int, V: int) -> list[slice]:
    tokens = max(1, CHUNK_BYTES // (4 * V))
    return [slice(first, min(first + tokens, N)) for first in range(0, N, tokens)]


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, summed and returned in fp32; 16-bit operands as they are on a GPU, widened elsewhere."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    logits = _product(hidden, weight.t())
    return logits if bias is None else logits.add_(bias)


def linear_cross_entropy_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    *,
    class_weight: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(nll, lse, argmax) of each row of hidden (N, E) @ weight (V, E)^T + bias (V,); target (N,) int64.

    class_weight is `cross_entropy_forward`'s weight; `options` and results are as there.
    """
    N = hidden.shape[0]
    nll, lse = (hidden.new_empty(N, dtype=torch.float32) for _ in range(2))
    argmax = hidden.new_empty(N, dtype=torch.int64)
    for rows in _chunks(N, weight.shape[0]):
        logits = _logits(hidden[rows], weight, bias)
        nll[rows], lse[rows], argmax[rows] = cross_entropy_forward(logits, target[rows], weight=class_weight, **options)
    return nll, lse, argmax


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
    **options: Any,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The gradients of hidden (its dtype), weight (fp32 sums) and bias (fp32 sums); None for one that is not
    asked for."""
    grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if of_hidden else None
    grad_weight = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None
    grad_bias = torch.zeros_like(bias, dtype=torch.float32) if of_bias and bias is not None else None
    for rows in _chunks(hidden.shape[0], weight.shape[0]):
        logits = _logits(hidden[rows], weight, bias)
        gradient = cross_entropy_backward(
            grad_nll[rows], grad_lse[rows], logits, target[rows], lse[rows], weight=class_weight, out=logits, **options
        )
        if grad_bias is not None:
            grad_bias += gradient.sum(dim=0)
        gradient = gradient.to(hidden.dtype)
        if grad_hidden is not None:
            grad_hidden[rows] = _product(gradient, weight)
        if grad_weight is not None:
            grad_weight += _product(gradient.t(), hidden[rows])
    return grad_hidden, grad_weight, grad_bias
