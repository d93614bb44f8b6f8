"""Linear cross-entropy of a small problem on a GPU: three matrix products around the cross-entropy kernels.

For logits that are few enough to be written, all at once: linear_cross_entropy.py never writes them, at the price of
more launches. Tokens whose label is ignored take part in the products, whose sizes the host must know: to
drop them it would have to wait for the device to count them.

8 N V E flops forward and backward, since logits are computed again. At most 2 PRODUCT_BYTES of memory beside the
results: fp32 logits, their gradient in 16 bits, and in fp16 or where it is small a slice of an fp32 product on its way
to 16 bits.
"""

from __future__ import annotations

from typing import Any

import torch

from gpt4v_fast.kernels.loss import plans
from gpt4v_fast.kernels.loss.cross_entropy import cross_entropy_backward, cross_entropy_forward


def gradient_scales(
    grad_nll: torch.Tensor,
    grad_lse: torch.Tensor,
    hidden: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    ignore_index: int,
) -> torch.Tensor | None:
    """A power of two that brings the gradient of the logits into fp16's range, below 2^15, and its inverse; else None.

    |dz_j| <= 3 |grad_nll| max |w| + |grad_lse|. Stays on the device.
    """
    if hidden.dtype != torch.float16 or grad_nll.numel() == 0:
        return None
    heaviest = 1.0 if class_weight is None else class_weight.abs().max().float()
    bound = 3.0 * heaviest * grad_nll.float().abs() + grad_lse.float().abs()
    bound = torch.where(target == ignore_index, 0.0, bound).max()
    bound = torch.where(bound.isfinite(), bound, 1.0)  # what is NaN stays so at any scale
    exponent = (15 - torch.frexp(bound).exponent).clamp(-100, 100).float()
    return torch.stack([torch.exp2(exponent), torch.exp2(-exponent)])


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, summed and returned in fp32; 16-bit operands as they are on a GPU, widened elsewhere."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _product_like(like: torch.Tensor, a: torch.Tensor, b: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """a @ b, times factor if given, in the shape and dtype of `like`, summed in fp32 and rounded once."""
    rows = max(1, plans.PRODUCT_BYTES // 2 // (4 * max(1, like.shape[1])))
    if factor is None and (like.dtype == torch.float32 or (like.shape[0] > rows and a.is_cuda)):
        # 16-bit results of this size are enough for every multiprocessor: cuBLAS does not split their sums, whose parts
        # it would round to 16 bits.
        return a @ b
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    for first in range(0, like.shape[0], rows):
        product = _product(a[first : first + rows], b)
        out[first : first + rows] = product if factor is None else product.mul_(factor)
    return out


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
    return cross_entropy_forward(_logits(hidden, weight, bias), target, weight=class_weight, **options)


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
    """The gradients of hidden and weight (their dtype) and of bias (fp32); None for one that is not asked for."""
    logits = _logits(hidden, weight, bias)
    gradient = cross_entropy_backward(
        grad_nll, grad_lse, logits, target, lse, weight=class_weight, out=logits, **options
    )  # fmt: skip
    grad_bias = gradient.sum(dim=0) if of_bias and bias is not None else None
    scales = gradient_scales(grad_nll, grad_lse, hidden, target, class_weight, options["ignore_index"])
    scale, inverse = (None, None) if scales is None else scales
    gradient = (gradient if scale is None else gradient.mul_(scale)).to(hidden.dtype)
    grad_hidden = _product_like(hidden, gradient, weight, inverse) if of_hidden else None
    grad_weight = _product_like(weight, gradient.t(), hidden, inverse) if of_weight else None
    return grad_hidden, grad_weight, grad_bias
