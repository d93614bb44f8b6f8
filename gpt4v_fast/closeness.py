"""How close is close enough: the one rule that tests and benchmarks judge a result by.

    |fast - exact| <= 2 |native - exact| + floor,    element by element
    floor = one unit in the last place of the row's scale + 5 times the row's spread

exact is the fp64 oracle, native is plain PyTorch in the tested dtype (or nothing, and its error 0), and the row's scale
is the largest magnitude in the row of exact: along the last dimension, always. The spread is how far a right result
strays: tests measure it under random rounding, benchmarks estimate it from the terms of every sum. docs/math.md, "How
close is close enough", derives it. NaN never passes; infinities stand where exact has them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

FLOOR_ULPS = 1.0  # half for rounding the result, half for the last step before
SPREADS = 5.0  # standard deviations: one element in 1.7 million of normally distributed errors of just that spread
NATIVE_ERRORS = 2.0


class Judgement(NamedTuple):
    """Element by element: the error, the error that is allowed, and whether the element is wrong. All have exact's
    shape, and are fp64 and boolean."""

    error: torch.Tensor
    allowed: torch.Tensor
    wrong: torch.Tensor

    @property
    def shares(self) -> torch.Tensor:
        """Errors in shares of what is allowed; infinite where the element is wrong for another reason."""
        share = (self.error / self.allowed).nan_to_num(nan=torch.inf)
        return torch.where(self.wrong & (share <= 1), torch.inf, share)


def judge(
    fast: torch.Tensor,
    exact: torch.Tensor,
    dtype: torch.dtype,
    *,
    native: torch.Tensor | None = None,
    spread: torch.Tensor | None = None,
) -> Judgement:
    """Judges `fast` by the rule.

    Args:
        fast, exact, native: tensors of one shape; exact is fp64.
        dtype: whose unit in the last place counts.
        spread: of each row of exact, with a last dimension of 1.
    """
    got, want = fast.detach().double(), exact.detach().double()
    infinite = torch.isinf(want)
    agrees = torch.where(infinite, got == want, torch.isfinite(got))
    error = torch.where(infinite, 0.0, (got - want).abs())
    allowed = FLOOR_ULPS * units(want, dtype).expand_as(want)
    if native is not None:
        allowed = allowed + NATIVE_ERRORS * native_error(native, want)
    if spread is not None:
        allowed = allowed + SPREADS * spread
    return Judgement(error, allowed, ~((error <= allowed) & agrees))  # a NaN compares false, and so is wrong


def units(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A unit in the last place of each row's scale."""
    info = torch.finfo(dtype)
    return info.eps * row_largest(exact.masked_fill(exact.isinf(), 0.0)).clamp(min=info.tiny)


def native_error(native: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """How far plain PyTorch is off; 0 where it is not finite, which excuses nothing."""
    plain = native.detach().double()
    return torch.where(exact.isinf() | ~plain.isfinite(), 0.0, (plain - exact).abs().nan_to_num())


def row_largest(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude along the last dimension, kept as a dimension of 1."""
    return x.abs().amax(dim=-1, keepdim=True) if x.dim() else x.abs()
