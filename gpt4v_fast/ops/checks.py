"""Checks that several ops share; each error names the argument, what was expected and what came."""

from __future__ import annotations

import numbers
from typing import Any

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
FP32_MAX, FP32_TINY = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
BELOW_1 = 1.0 - 2.0**-24  # the largest number of fp32 that is less than 1
FINITE = "a finite number that fp32 holds"


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


def is_number(value: Any) -> bool:
    """Whether it is a real number, of Python, NumPy or a tracer, and no boolean."""
    # torch.compile answers for its own numbers here; it knows no abstract classes.
    if isinstance(value, float | int):
        return not isinstance(value, bool)
    return isinstance(value, torch.SymFloat | torch.SymInt | numbers.Real)


def check_number(name: str, value: Any, low: float = -FP32_MAX, high: float = FP32_MAX, expected: str = "") -> float:
    """The number as a float; raises unless it lies between two bounds within which fp32 holds it.

    Compares and calls no math.isfinite: torch.compile traces comparisons of a number that changes between calls.
    """
    if type(value) is not float and not is_number(value):
        raise TypeError(f"{name}: expected {expected or FINITE}, got {type(value).__name__}")
    number = value if isinstance(value, int) else float(value)  # of an int that float refuses too
    if not low <= number <= high:
        raise ValueError(f"{name}: expected {expected or FINITE}, got {value}")
    return float(number)


def check_scale(scale: float | None, D: int) -> float:
    """The softmax scale: the given one, or D ** -0.5."""
    if scale is None:
        return float(D) ** -0.5 if D else 1.0
    return check_number("scale", scale)


def check_softcap(softcap: float | None) -> float:
    """The softcap as kernels take it: 0.0 for none. They divide by it, so fp32 holds its inverse too."""
    if softcap is None:
        return 0.0
    return check_number("softcap", softcap, FP32_TINY, expected="None or a finite number > 0 that fp32 holds")


def check_probability(name: str, p: float) -> float:
    return check_number(name, p, 0.0, BELOW_1, "a probability in [0, 1), in fp32 too")


def check_int(name: str, value: Any, low: int, high: int, expected: str) -> int:
    """The number as an int; raises unless it is one, of Python or NumPy, from `low` to `high`."""
    if not isinstance(value, int):
        if not isinstance(value, torch.SymInt | numbers.Integral):
            raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
        value = int(value)
    elif isinstance(value, bool):
        raise TypeError(f"{name}: expected {expected}, got bool")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected {expected}, got {value}")
    return value


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
