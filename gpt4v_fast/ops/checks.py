"""Checks that several ops share; each error names the argument, what was expected and what came."""

from __future__ import annotations

import math
from typing import Any

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_tensor(
    name: str, tensor: Any, *, ndim: int | None = None, dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES
) -> None:
    """Raises unless `tensor` is a strided torch.Tensor of one of `dtypes` with `ndim` dimensions."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a strided tensor, got layout {tensor.layout}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {names(dtypes)}, got {names((tensor.dtype,))}")
    if ndim is not None and tensor.dim() != ndim:
        raise ValueError(f"{name}: expected {ndim} dimensions, got shape {tuple(tensor.shape)}")


def check_like(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Raises unless both tensors have the same dtype and device."""
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name}: expected {other_name}'s dtype {names((other.dtype,))}, got {names((tensor.dtype,))}")
    check_device(name, tensor, other_name, other)


def check_device(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name}: expected {other_name}'s device {other.device}, got {tensor.device}")


def check_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...], meaning: str = "") -> None:
    if tensor.shape != expected:
        what = f" {meaning}" if meaning else ""
        raise ValueError(f"{name}: expected shape{what} {expected}, got {tuple(tensor.shape)}")


def check_scale(scale: float | None, D: int) -> float:
    """The softmax scale: the given one, or D ** -0.5."""
    if scale is None:
        return float(D) ** -0.5 if D else 1.0
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    return float(scale)


def check_softcap(softcap: float | None) -> float:
    """The softcap as kernels take it: 0.0 for none."""
    if softcap is None:
        return 0.0
    if not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap: expected None or a finite number > 0, got {softcap}")
    return float(softcap)


def check_probability(name: str, p: float) -> float:
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{name}: expected a probability in [0, 1), got {p}")
    return float(p)


def fits_int32(numbers: torch.Tensor) -> bool:
    """Whether int32 holds all of int32 or int64 numbers. It reads them, so they should be on a CPU."""
    if numbers.dtype == torch.int32 or not numbers.numel():
        return True
    low, high = numbers.aminmax()
    return int(low) >= INT32_MIN and int(high) <= INT32_MAX


def check_int32(name: str, numbers: torch.Tensor) -> torch.Tensor:
    """int32 of int32 or int64 numbers on a CPU; raises ValueError unless it holds them all."""
    if not fits_int32(numbers):
        place = ((numbers < INT32_MIN) | (numbers > INT32_MAX)).nonzero()[0]
        raise ValueError(
            f"{name}: expected numbers that int32 holds, got {int(numbers[tuple(place)])} at {tuple(place.tolist())}"
        )
    return numbers.to(torch.int32)


def clamp_int32(numbers: torch.Tensor) -> torch.Tensor:
    """int32 of int32 or int64 numbers, the nearest to those that it does not hold."""
    return numbers if numbers.dtype == torch.int32 else numbers.clamp(INT32_MIN, INT32_MAX).to(torch.int32)
