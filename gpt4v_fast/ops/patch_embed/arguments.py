"""Checks of patch_embed's arguments; each error names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from gpt4v_fast.ops import checks

PIXEL_DTYPES = (torch.uint8, *checks.FLOAT_DTYPES)
# Of what is divided by, fp32 holds the inverse too.
_SMALLEST = {"mean": 0.0, "std": checks.FP32_TINY}
_EXPECTED = {"mean": "finite numbers that fp32 holds", "std": "finite numbers other than 0 that fp32 holds"}
PerChannel = float | Sequence[float] | torch.Tensor | None


def check_weight(weight: torch.Tensor, pixels: torch.Tensor, ndim: int, name: str = "pixels") -> None:
    """The weight (E, C, ...) of `ndim` dimensions beside pixels ([B,] C, [frames,] H, W)."""
    if weight.dim() != ndim:
        expected = "(E, C, P, P)" if ndim == 4 else "(E, C, Pt, P, P)"
        raise ValueError(f"weight: expected {expected} for {ndim}-dimensional pixels, got shape {tuple(weight.shape)}")
    C = pixels.shape[1 - ndim]
    if weight.shape[1] != C:
        if pixels.shape[-1] == weight.shape[1]:
            raise ValueError(
                f"{name}: expected {'(..., C, H, W)' if ndim == 4 else '(B, C, frames, H, W)'} with weight's C = "
                f"{weight.shape[1]}, got shape {tuple(pixels.shape)}, which looks channels last: pass a permuted view"
            )
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
    else:
        rescale = checks.check_number("rescale", rescale, expected=f"None or {checks.FINITE}")
    center = _per_channel("mean", mean, 0.0, C, pixels.device)
    spread = _per_channel("std", std, 1.0, C, pixels.device)
    return (rescale / spread).float().expand(C), (-center / spread).float().expand(C)


def _per_channel(name: str, value: PerChannel, default: float, C: int, device: torch.device) -> torch.Tensor:
    """(C,) or (1,) in fp64, on `device`."""
    if isinstance(value, torch.Tensor):
        checks.check_tensor(name, value, dtypes=(torch.float64, *checks.FLOAT_DTYPES))
        if value.numel() != 1 and value.numel() != C:
            raise ValueError(f"{name}: expected 1 or {C} elements, one per channel, got shape {tuple(value.shape)}")
        if value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: expected a tensor that needs no gradient, got one that does")
        # On a GPU nobody looks: reading the tensor would wait for the device.
        is_seen = value.device.type == "cpu" and not torch.compiler.is_compiling()
        if is_seen and not all(_SMALLEST[name] <= x <= checks.FP32_MAX for x in value.abs().flatten().tolist()):
            raise ValueError(f"{name}: expected {_EXPECTED[name]}, got {value.tolist()}")
        return value.reshape(-1).to(device=device, dtype=torch.float64)
    given: Any = [default] if value is None else [value] if checks.is_number(value) else value
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"{name}: expected a number, a sequence of numbers or a tensor, got {value!r}")
    numbers = [_check_of_channel(name, number, value) for number in given]
    if len(numbers) != 1 and len(numbers) != C:  # not `in`: under torch.compile C may be symbolic
        raise ValueError(f"{name}: expected 1 or {C} numbers, one per channel, got {len(numbers)}")
    return torch.tensor(numbers, dtype=torch.float64, device=device)


def _check_of_channel(name: str, number: Any, given: object) -> float:
    if not checks.is_number(number):
        raise TypeError(f"{name}: expected a number, a sequence of numbers or a tensor, got {given!r}")
    low, number = _SMALLEST[name], number if isinstance(number, int) else float(number)
    if not (low <= number <= checks.FP32_MAX or -checks.FP32_MAX <= number <= -low):
        raise ValueError(f"{name}: expected {_EXPECTED[name]}, got {given}")
    return float(number)
