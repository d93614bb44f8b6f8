"""The oracle of patch embedding, by unfolding, and the backend that runs it where no kernel takes a call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from gpt4v_fast import backends

if TYPE_CHECKING:
    from gpt4v_fast.ops.patch_embed.api import PatchEmbedCall


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


class PatchEmbed(backends.Backend):
    backend, kernel = "reference", "reference.patch_embed"

    def forward(self, call: PatchEmbedCall) -> torch.Tensor:
        bias, pos_embed = (None if x is None else x.float() for x in (call.bias, call.pos_embed))
        normalised = _normalise(call.pixels.float(), call)
        return patch_tokens(normalised, call.weight.float(), bias, pos_embed).to(call.out_dtype)

    def backward(self, call: PatchEmbedCall, saved: Any, upstream: Any, wanted: Any) -> dict[str, torch.Tensor | None]:
        inputs = {name: getattr(call, name) for name in ("weight", "pixels") if getattr(wanted, name)}
        with torch.enable_grad():
            leaves = {name: x.detach().float().requires_grad_() for name, x in inputs.items()}
            weight, pixels = (leaves.get(name, getattr(call, name).float()) for name in ("weight", "pixels"))
            tokens = patch_tokens(_normalise(pixels, call), weight, None, None)
            found = torch.autograd.grad(tokens, list(leaves.values()), upstream.tokens.float())
        return {name: g.to(x.dtype) for (name, x), g in zip(inputs.items(), found, strict=True)}


def _normalise(pixels: torch.Tensor, call: PatchEmbedCall) -> torch.Tensor:
    return pixels * call.pixel_scale.view(-1, 1, 1, 1) + call.pixel_shift.view(-1, 1, 1, 1)
