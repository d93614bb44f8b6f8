"""The dropout stream of attention: a counter-based generator, in int64 arithmetic."""

from __future__ import annotations

import math

import torch

_UINT32 = 0xFFFFFFFF


def dropout_keep(
    seed: int, p: float, B: int, H: int, S: int, T: int, device: torch.device, sequence: int = 0
) -> torch.Tensor:
    """Which probabilities survive dropout: (B, H, S, T) booleans from Philox4x32-10 (Salmon et al. 2011).

    key = (seed mod 2^32, seed div 2^32), counter = (j div 4, i, (sequence + b) H + h, 0); key j takes word j mod 4 and
    is kept when it is at least floor(p 2^32). The bits depend on the position alone, not on tiles or threads.
    """
    counter = torch.meshgrid(
        torch.arange(sequence * H, (sequence + B) * H, device=device),
        torch.arange(S, device=device),
        torch.arange((T + 3) // 4, device=device),
        indexing="ij",
    )
    rows, i, groups = counter
    words = philox4x32((groups, i, rows, torch.zeros_like(rows)), seed)
    bits = torch.stack(words, dim=-1).reshape(B, H, S, -1)[..., :T]
    return bits >= math.floor(p * 2**32)


def philox4x32(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ten rounds of Philox4x32 on int64 tensors that hold 32-bit words."""
    x0, x1, x2, x3 = counter
    key0, key1 = seed & _UINT32, (seed >> 32) & _UINT32
    for _ in range(10):
        high0, low0 = _multiply_32(0xD2511F53, x0)
        high1, low1 = _multiply_32(0xCD9E8D57, x2)
        x0, x1, x2, x3 = high1 ^ x1 ^ key0, low1, high0 ^ x3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & _UINT32, (key1 + 0xBB67AE85) & _UINT32
    return x0, x1, x2, x3


def _multiply_32(a: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The high and low words of a 32 x 32-bit product, in int64 arithmetic that does not overflow."""
    low = (a & 0xFFFF) * x  # below 2^48
    high = (a >> 16) * x + (low >> 16)  # below 2^49
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
