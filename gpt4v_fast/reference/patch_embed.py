"""Patch embedding of images and of videos, by unfolding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def patch_embed(
    pixels: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    mean: float | Sequence[float] | torch.Tensor | None = None,
    std: float | Sequence[float] | torch.Tensor | None = None,
    rescale: float | None = None,
    pos_embed: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """patches((pixels * rescale - mean) / std) weight^T + bias + pos_embed; arguments as `gpt4v_fast.patch_embed`."""
    if rescale is None:
        rescale = 1.0 if pixels.is_floating_point() else 1 / 255
    dtype = torch.promote_types(torch.promote_types(weight.dtype, torch.float32), pixels.dtype)
    per_channel = (-1, *[1] * (pixels.dim() - 2))
    mean, std = (
        torch.as_tensor(default if value is None else value, dtype=dtype, device=pixels.device).reshape(per_channel)
        for value, default in ((mean, 0.0), (std, 1.0))
    )
    normalised = (pixels.to(dtype) * rescale - mean) / std
    return patch_tokens(normalised, weight, bias, pos_embed).to(weight.dtype if out_dtype is None else out_dtype)


def patch_tokens(
    normalised: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, pos_embed: torch.Tensor | None
) -> torch.Tensor:
    """The unfolded patches of (B, C, [frames,] H, W) times weight (E, C, [Pt,] P, P), plus bias and pos_embed."""
    if normalised.dim() == 4:
        normalised, weight = normalised.unsqueeze(2), weight.unsqueeze(2)
    tokens = unfold_patches(normalised.to(weight.dtype), weight.shape[2:]) @ weight.flatten(1).T
    for term in (bias, pos_embed):
        tokens = tokens if term is None else tokens + term
    return tokens


def unfold_patches(pixels: torch.Tensor, patch: Sequence[int]) -> torch.Tensor:
    """(B, C, frames, H, W) as (B, N, C Pt Ph Pw): the non-overlapping patches, row by row."""
    B, C, *sizes = pixels.shape
    grid = [size // side for size, side in zip(sizes, patch, strict=True)]
    split = [number for pair in zip(grid, patch, strict=True) for number in pair]
    patches = pixels.reshape(B, C, *split).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return patches.reshape(B, math.prod(grid), C * math.prod(patch))
