"""No time before the numbers are right: a contender's outputs against the exact ones.

The error of a row is its largest deviation over the row's scale: the largest magnitude in the exact row, but at least
a share of the largest in the tensor. tests/closeness.py has the package's own, stricter rule; this one must also pass
the peers, which round in other places.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .registry import Expected, Outputs

# Largest error of a row. bf16 keeps 8 bits: its probabilities, outputs and gradients are each rounded once, which adds
# up to some 2%; a wrong mask, scale or label shows as 10% and more in the first rows.
LIMITS = {torch.float32: 5e-4, torch.bfloat16: 0.06, torch.float16: 0.01}

# The least scale of a row, as a share of the tensor's. In a gradient whole rows cancel to nothing: the first causal
# query sees one key, so that its exact gradient is 0 and every rounding would be an infinite error.
LEAST_SCALE = {"out": 0.01, "grad": 0.1}


class WrongResult(ValueError):
    """The contender's numbers are wrong, and so its time means nothing."""


def largest_error(outputs: Outputs, expected: Sequence[Expected]) -> float:
    """The largest row error over all expected parts; infinite where a value is missing, NaN or of a wrong shape."""
    worst = 0.0
    for name, index, exact in expected:
        if name not in outputs:
            return float("inf")
        got = outputs[name][index].detach().to(torch.float64)
        if got.shape != exact.shape or not bool(torch.isfinite(got).all()):
            return float("inf")
        if exact.numel() == 0:
            continue
        row = exact.abs().amax(dim=-1, keepdim=True) if exact.dim() else exact.abs()
        least = LEAST_SCALE[name.split()[0]] * exact.abs().max()
        scale = torch.maximum(row, least).clamp(min=torch.finfo(torch.float32).tiny)
        worst = max(worst, float(((got - exact).abs() / scale).max()))
    return worst


def check(outputs: Outputs, expected: Sequence[Expected], dtype: torch.dtype) -> float:
    """The largest row error.

    Raises:
        WrongResult: it is over the dtype's limit.
    """
    error = largest_error(outputs, expected)
    if not error <= LIMITS[dtype]:
        raise WrongResult(f"its result is wrong: row error {error:.2g}, allowed {LIMITS[dtype]:.2g}")
    return error
