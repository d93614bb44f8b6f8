"""The oracle of patch embedding of images of different sizes, one after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from gpt4v_fast.ops.patch_embed.reference import patch_embed


def patch_embed_packed(
    images: Sequence[torch.Tensor],
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    mean: float | Sequence[float] | torch.Tensor | None = None,
    std: float | Sequence[float] | torch.Tensor | None = None,
    rescale: float | None = None,
    pos_embed: torch.Tensor | None = None,
    pos_grid: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`patch_embed` image by image, joined; arguments and results as `gpt4v_fast.patch_embed_packed`."""
    tokens, positions = [weight.new_empty(0, weight.shape[0])], [torch.empty(0, 2, dtype=torch.int64)]
    for image in images:
        rows, columns = image.shape[1] // weight.shape[2], image.shape[2] // weight.shape[3]
        pos = pos_embed
        if pos is not None:
            side = math.isqrt(pos.shape[-2]) if pos_grid is None else pos_grid
            pos = resize_positions(pos.reshape(-1, pos.shape[-1]), side, rows, columns)
        part = patch_embed(image[None], weight, bias=bias, mean=mean, std=std, rescale=rescale, pos_embed=pos)
        tokens.append(part[0])
        positions.append(torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).reshape(-1, 2))
    lengths = torch.tensor([len(t) for t in tokens], dtype=torch.int32, device=weight.device)
    joined = torch.cat(tokens).to(weight.dtype if out_dtype is None else out_dtype)
    return joined, lengths.cumsum(0, dtype=torch.int32), torch.cat(positions).to(weight.device)


def resize_positions(pos_embed: torch.Tensor, side: int, rows: int, columns: int) -> torch.Tensor:
    """A position table (side * side, E) for another grid, (rows * columns, E), bicubically as in transformers' ViT."""
    if (rows, columns) == (side, side):
        return pos_embed
    if rows == 0 or columns == 0:
        return pos_embed[:0]
    grid = pos_embed.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).reshape(rows * columns, -1)
