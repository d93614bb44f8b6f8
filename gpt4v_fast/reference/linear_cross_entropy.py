"""Cross-entropy of a linear layer's logits."""

from __future__ import annotations

from typing import Any

import torch

from gpt4v_fast.reference.cross_entropy import LossStats, cross_entropy


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
    shift: int = 0,
    ignore_index: int = -100,
    **options: Any,
) -> torch.Tensor | tuple[torch.Tensor, LossStats]:
    """`cross_entropy` of hidden @ weight^T + bias; arguments as `gpt4v_fast.linear_cross_entropy`."""
    logits = torch.nn.functional.linear(hidden, weight, None if bias is None else bias.to(hidden.dtype))
    if shift:
        last = target.new_full((*target.shape[:-1], min(shift, target.shape[-1])), ignore_index)
        target = torch.cat([target[..., shift:], last], dim=-1)
    return cross_entropy(logits, target, weight=class_weight, ignore_index=ignore_index, **options)
