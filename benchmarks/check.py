"""No time before the numbers are right: a contender's outputs against the exact ones.

    |output - exact| <= eps max_row |exact| + 4 u scale_row

eps is a unit in the last place of the dtype, u half of it, a row the last dimension, and scale (scales.py) how far the
result of right steps may be off, in units of u. This is the rule of tests/closeness.py, which is stricter: there the
scale is that of our own kernels, here it must also pass the peers, which round in other places.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .registry import Expected, Outputs
from .scales import unit

SPREADS = 4.0  # standard deviations


class WrongResult(ValueError):
    """The contender's numbers are wrong, and so its time means nothing."""


def largest_error(outputs: Outputs, expected: Sequence[Expected], dtype: torch.dtype) -> float:
    """The largest error over all expected parts, in shares of what is allowed; infinite where a value is missing, NaN
    or of a wrong shape."""
    worst = 0.0
    for name, index, exact, scale in expected:
        if name not in outputs:
            return float("inf")
        got = outputs[name][index].detach().to(torch.float64)
        if got.shape != exact.shape or not bool(torch.isfinite(got).all()):
            return float("inf")
        if exact.numel() == 0:
            continue
        allowed = unit(dtype) * (2 * _largest_of_row(exact) + SPREADS * _largest_of_row(scale))
        allowed = allowed.clamp(min=torch.finfo(torch.float32).tiny)
        worst = max(worst, float(((got - exact).abs() / allowed).nan_to_num(nan=torch.inf).max()))
    return worst


def _largest_of_row(x: torch.Tensor) -> torch.Tensor:
    return x.abs().amax(dim=-1, keepdim=True) if x.dim() else x.abs()


def check(outputs: Outputs, expected: Sequence[Expected], dtype: torch.dtype) -> float:
    """The largest error in shares of what is allowed.

    Raises:
        WrongResult: it is over 1.
    """
    error = largest_error(outputs, expected, dtype)
    if not error <= 1:
        raise WrongResult(f"its result is wrong: its error is {error:.2g} times what rounding explains")
    return error
