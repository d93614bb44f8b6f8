"""Patch embedding of images of different sizes into one packed sequence.

user -> patch_embed_packed -> gpt4v_fast::patch_embed, once for all images: their patches, gathered into one tensor of
the pixels' own dtype (a byte per pixel and channel for uint8), are the "frames" of a one-patch-wide video.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from gpt4v_fast import backends
from gpt4v_fast.ops import checks
from gpt4v_fast.ops.patch_embed import arguments
from gpt4v_fast.ops.patch_embed.api import patch_embed
from gpt4v_fast.ops.patch_embed.packed_reference import resize_positions


@backends.explained
def patch_embed_packed(
    images: Sequence[torch.Tensor],
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    mean: arguments.PerChannel = None,
    std: arguments.PerChannel = None,
    rescale: float | None = None,
    pos_embed: torch.Tensor | None = None,
    pos_grid: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`patch_embed` of images of different sizes, their tokens one after the other.

    Image i of (C, Hi, Wi) becomes Ni = (Hi / P) (Wi / P) tokens, row by row; each token is what `patch_embed` gives.

    Args:
        images: tensors (C, Hi, Wi) of one dtype (uint8, fp32, bf16 or fp16) and one device; an empty list is fine.
        weight: (E, C, Ph, Pw).
        pos_embed: (G*G, E) or (1, G*G, E), a table over a square grid. For an image of another grid it is interpolated
            bicubically (F.interpolate, align_corners=False, in fp32), as transformers' ViT and SigLIP do.
        pos_grid: G; None: the square root of pos_embed's length.
        bias, mean, std, rescale, out_dtype: as for `patch_embed`.

    Returns:
        tokens (sum Ni, E) in out_dtype; cu_seqlens (len(images) + 1,) int32, where image i's tokens begin and end;
        positions (sum Ni, 2) int64, the (row, column) of each token's patch. All on weight's device. Gradients reach
        weight, bias, pos_embed and float images.

    Raises:
        TypeError, ValueError: an argument of a wrong kind, dtype, shape or device; the message names it.
        FallbackError: in strict mode, when no fast kernel takes the call.

    Source: Patch n' Pack: NaViT (Dehghani et al. 2023), section 2.
    """
    grids = check_images(images, weight)
    table, side = check_table(pos_embed, pos_grid, weight)
    pixels = pack_patches(images, weight)
    tokens = patch_embed(
        pixels, weight.unsqueeze(2), bias=bias, mean=mean, std=std, rescale=rescale,
        pos_embed=pack_positions(table, side, grids), out_dtype=out_dtype,
    ).squeeze(0)  # fmt: skip
    ends = [0]
    for rows, columns in grids:
        ends.append(ends[-1] + rows * columns)
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=weight.device)
    return tokens, cu_seqlens, token_positions(grids, weight.device)


def check_images(images: Sequence[torch.Tensor], weight: torch.Tensor) -> list[tuple[int, int]]:
    """The patch grid (rows, columns) of each image; raises for what `patch_embed` would name otherwise."""
    checks.check_tensor("weight", weight, ndim=4)
    if not isinstance(images, (list, tuple)):
        raise TypeError(f"images: expected a list of tensors (C, H, W), got {type(images).__name__}")
    grids = []
    for i, image in enumerate(images):
        name = f"images[{i}]"
        checks.check_tensor(name, image, ndim=3, dtypes=arguments.PIXEL_DTYPES)
        checks.check_like(name, image, "images[0]", images[0])
        checks.check_device(name, image, "weight", weight)
        arguments.check_weight(weight, image, 4, name)
        rows, columns = arguments.patch_grid(name, tuple(image.shape[1:]), tuple(weight.shape[2:]))
        grids.append((rows, columns))
    return grids


def check_table(
    pos_embed: torch.Tensor | None, pos_grid: int | None, weight: torch.Tensor
) -> tuple[torch.Tensor | None, int]:
    """pos_embed as (G*G, E), and G."""
    if pos_grid is not None:
        pos_grid = checks.check_int("pos_grid", pos_grid, 1, checks.INT32_MAX, "None or an integer of at least 1")
    if pos_embed is None:
        if pos_grid is not None:
            raise ValueError(f"pos_grid: expected None where pos_embed is None, got {pos_grid}")
        return None, 0
    checks.check_tensor("pos_embed", pos_embed)
    length = pos_embed.shape[-2] if pos_embed.dim() in (2, 3) else 0
    side = math.isqrt(length) if pos_grid is None else pos_grid
    if side * side != length or side == 0:
        expected = "a square number of rows" if pos_grid is None else f"{side} * {side} rows"
        raise ValueError(f"pos_embed: expected (G*G, E) with {expected}, got shape {tuple(pos_embed.shape)}")
    return arguments.check_positions(pos_embed, weight, length), side


def pack_patches(images: Sequence[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """All patches as (1, C, sum Ni, Ph, Pw): a video whose every frame is one patch."""
    _, C, height, width = weight.shape
    if not images:
        return torch.empty(1, C, 0, height, width, dtype=torch.uint8, device=weight.device)
    patches = [
        image.unflatten(2, (image.shape[2] // width, width))
        .unflatten(1, (image.shape[1] // height, height))
        .permute(0, 1, 3, 2, 4)  # (C, rows, columns, Ph, Pw)
        .reshape(C, (image.shape[1] // height) * (image.shape[2] // width), height, width)
        for image in images
    ]
    return torch.cat(patches, dim=1).unsqueeze(0)


def pack_positions(table: torch.Tensor | None, side: int, grids: list[tuple[int, int]]) -> torch.Tensor | None:
    """The position of every token (sum Ni, E), each grid interpolated once."""
    if table is None:
        return None
    resized = {grid: resize_positions(table.float(), side, *grid) for grid in dict.fromkeys(grids)}
    return torch.cat([table[:0].float(), *(resized[grid] for grid in grids)])


def token_positions(grids: list[tuple[int, int]], device: torch.device) -> torch.Tensor:
    """(row, column) of every token, (sum Ni, 2) int64."""
    positions = [torch.empty(0, 2, dtype=torch.int64, device=device)]
    for rows, columns in grids:
        row = torch.arange(rows, device=device).repeat_interleave(columns)
        column = torch.arange(columns, device=device).repeat(rows)
        positions.append(torch.stack((row, column), dim=1))
    return torch.cat(positions)
