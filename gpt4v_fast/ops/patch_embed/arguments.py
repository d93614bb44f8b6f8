"""Checks of patch_embed's arguments; each error names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from gpt4v_fast.ops import checks

PIXEL_DTYPES = (torch.uint8, *checks.FLOAT_DTYPES)
PerChannel = float | Sequence[float] | torch.Tensor | None


def check_weight(weight: torch.Tensor, C: int, ndim: int) -> None:
    if weight.dim() != ndim:
        expected = "(E, C, P, P)" if ndim == 4 else "(E, C, Pt, P, P)"
        raise ValueError(f"weight: expected {expected} for {ndim}-dimensional pixels, got shape {tuple(weight.shape)}")
    if weight.shape[1] != C:
        raise ValueError(f"weight: expected {C} channels as in pixels, got shape {tuple(weight.shape)}")
    if min(weight.shape[2:]) < 1:
        raise ValueError(f"weight: expected patch sides of at least 1, got shape {tuple(weight.shape)}")


def patch_grid(name: str, sizes: tuple[int, ...], patch: tuple[int, ...]) -> tuple[int, ...]:
    """Patches along each axis; raises unless they tile the image."""
    axes = ("frames", "height", "width")[-len(sizes) :]
    for axis, size, side in zip(axes, sizes, patch, strict=True):
        if size % side:
            raise ValueError(f"{name}: expected a {axis} divisible by the patch's {side}, got {size}")
    return tuple(size // side for size, side in zip(sizes, patch, strict=True))


def check_bias(bias: torch.Tensor | None, weight: torch.Tensor) -> None:
    if bias is None:
        return
    checks.check_tensor("bias", bias)
    checks.check_device("bias", bias, "weight", weight)
    checks.check_shape("bias", bias, (weight.shape[0],), "(E,)")


def check_positions(pos_embed: torch.Tensor, weight: torch.Tensor, N: int) -> torch.Tensor:
    """pos_embed as (N, E)."""
    checks.check_tensor("pos_embed", pos_embed)
    checks.check_device("pos_embed", pos_embed, "weight", weight)
    if pos_embed.dim() == 3 and pos_embed.shape[0] == 1:
        pos_embed = pos_embed.squeeze(0)
    checks.check_shape("pos_embed", pos_embed, (N, weight.shape[0]), "(N, E) or (1, N, E) with (N, E) =")
    return pos_embed


def check_out_dtype(out_dtype: torch.dtype | None, weight: torch.Tensor) -> torch.dtype:
    if out_dtype is None:
        return weight.dtype
    if out_dtype not in checks.FLOAT_DTYPES:
        raise TypeError(f"out_dtype: expected {checks.names(checks.FLOAT_DTYPES)}, got {out_dtype}")
    return out_dtype


def pixel_transform(
    pixels: torch.Tensor, C: int, mean: PerChannel, std: PerChannel, rescale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """scale = rescale / std and shift = -mean / std, each (C,) fp32: normalise(x) = x scale + shift."""
    if rescale is None:
        rescale = 1.0 if pixels.is_floating_point() else 1 / 255
    elif isinstance(rescale, bool) or not isinstance(rescale, (int, float)):
        raise TypeError(f"rescale: expected a number or None, got {type(rescale).__name__}")
    elif not math.isfinite(rescale):
        raise ValueError(f"rescale: expected a finite number, got {rescale}")
    center = _per_channel("mean", mean, 0.0, C, pixels.device)
    spread = _per_channel("std", std, 1.0, C, pixels.device)
    return (rescale / spread).float().expand(C), (-center / spread).float().expand(C)


def _per_channel(name: str, value: PerChannel, default: float, C: int, device: torch.device) -> torch.Tensor:
    """(C,) or (1,) in fp64, on `device`."""
    wanted = "finite numbers other than 0" if name == "std" else "finite numbers"
    if isinstance(value, torch.Tensor):
        checks.check_tensor(name, value, dtypes=(torch.float64, *checks.FLOAT_DTYPES))
        if value.numel() != 1 and value.numel() != C:
            raise ValueError(f"{name}: expected 1 or {C} elements, one per channel, got shape {tuple(value.shape)}")
        if value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: expected a tensor that needs no gradient, got one that does")
        # On a GPU nobody looks: reading the tensor would wait for the device.
        is_seen = value.device.type == "cpu" and not torch.compiler.is_compiling()
        if is_seen and not (value.isfinite().all() and (name != "std" or value.all())):
            raise ValueError(f"{name}: expected {wanted}, got {value.tolist()}")
        return value.reshape(-1).to(device=device, dtype=torch.float64)
    numbers = [default] if value is None else [value] if isinstance(value, (int, float)) else list(value)
    if any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in numbers):
        raise TypeError(f"{name}: expected a number, a sequence of numbers or a tensor, got {value!r}")
    if len(numbers) != 1 and len(numbers) != C:  # not `in`: under torch.compile C may be symbolic
        raise ValueError(f"{name}: expected 1 or {C} numbers, one per channel, got {len(numbers)}")
    if not all(math.isfinite(x) for x in numbers) or (name == "std" and 0.0 in numbers):
        raise ValueError(f"{name}: expected {wanted}, got {value}")
    return torch.tensor(numbers, dtype=torch.float64, device=device)
