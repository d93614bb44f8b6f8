"""The softcap of scores and of logits."""

from __future__ import annotations

import torch


def cap(x: torch.Tensor, softcap: float) -> torch.Tensor:
    """softcap * tanh(x / softcap), with a derivative that is right to the last digits for every x.

    Where tanh rounds to 1, autograd's 1 - tanh^2 is 0, in fp64 from |x| = 19 softcap on; but 1 - tanh(y) is
    2 e / (1 + e) with e = exp(-2 y), whose derivative has nothing that cancels.
    """
    y = x / softcap
    e = torch.exp(-2.0 * y.abs())
    return softcap * torch.where(y.abs() < 0.5, torch.tanh(y), torch.sign(y) * (1.0 - 2.0 * e / (1.0 + e)))
