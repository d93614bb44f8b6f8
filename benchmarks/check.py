"""No time before the numbers are right: a contender's outputs against the exact ones, by the rule of the tests
(gpt4v_fast/closeness.py). The spread is that of scales.py, which also passes the peers, who round in other
places than our kernels; plain PyTorch is a peer here, and its error excuses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gpt4v_fast.closeness import judge, row_largest

from .registry import Expected, Outputs
from .scales import unit


class WrongResult(ValueError):
    """The contender's numbers are wrong, and so its time means nothing."""


def largest_error(outputs: Outputs, expected: Sequence[Expected], dtype: torch.dtype) -> float:
    """The largest error over all expected parts, in shares of what is allowed; infinite where a value is missing, NaN
    or of a wrong shape."""
    worst = 0.0
    for name, index, exact, scale in expected:
        if name not in outputs or (got := outputs[name][index]).shape != exact.shape:
            return float("inf")
        if exact.numel() > 0:
            judged = judge(got, exact, dtype, spread=unit(dtype) * row_largest(scale))
            worst = max(worst, float(judged.shares.max()))
    return worst


def check(outputs: Outputs, expected: Sequence[Expected], dtype: torch.dtype) -> float:
    """The largest error in shares of what is allowed.

    Raises:
        WrongResult: it is over 1.
    """
    error = largest_error(outputs, expected, dtype)
    if not error <= 1:
        raise WrongResult(f"its result is wrong: its error is {error:.2g} times what rounding explains")
    return error
