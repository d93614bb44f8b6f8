"""Checks of the arguments that both losses have."""

from __future__ import annotations

import math
from typing import Any

import torch

from gpt4v_fast.ops import checks

REDUCTIONS = ("mean", "sum", "none")


def check_options(
    weight_name: str,
    class_weight: torch.Tensor | None,
    V: int,
    like: torch.Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> dict[str, Any]:
    """The fields of a call object that both losses have, checked."""
    if class_weight is not None:
        checks.check_tensor(weight_name, class_weight)
        checks.check_shape(weight_name, class_weight, (V,), "(V,)")
        if class_weight.device != like.device:
            raise ValueError(f"{weight_name}: expected the device {like.device}, got {class_weight.device}")
        if class_weight.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{weight_name}: expected a tensor that needs no gradient, got one that does")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
    if not math.isfinite(z_loss):
        raise ValueError(f"z_loss: expected a finite number, got {z_loss}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")
    return {
        "class_weight": class_weight,
        "ignore_index": ignore_index,
        "label_smoothing": float(label_smoothing),
        "softcap": checks.check_softcap(softcap),
        "reduction": reduction,
        "z_loss": float(z_loss),
    }
