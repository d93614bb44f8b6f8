"""Checks of the arguments that both losses have."""

from __future__ import annotations

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
    bounds = checks.INT64_MIN, checks.INT64_MAX
    return {
        "class_weight": class_weight,
        "ignore_index": checks.check_int("ignore_index", ignore_index, *bounds, "an int of 64 bits"),
        "label_smoothing": checks.check_number("label_smoothing", label_smoothing, 0.0, 1.0, "a number in [0, 1]"),
        "softcap": checks.check_softcap(softcap),
        "reduction": reduction,
        "z_loss": checks.check_number("z_loss", z_loss, 0.0, expected="a finite number of 0 or more that fp32 holds"),
    }
