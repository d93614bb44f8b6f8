"""Random rounding: how far the fp64 oracle moves when every step of it is rounded at random, as a kernel rounds.

Inside `with RandomRounding(seed):` each result of a PyTorch operation on fp64 tensors, forward and backward, is rounded
to one of its two neighbours of fp32, at random and right on average, and each sum of n terms also gets the rounding
errors of its n partial sums. Numbers that fp32 can hold stay as they are. What comes out is off by what a kernel that
keeps its statistics and sums in fp32 must expect for these inputs, cancellation and all; the formula and its sources
are in docs/math.md, "How close is close enough".
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._decomp import decomposition_table
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

# Significant bits. tf32x3 multiplies an fp32 number as the sum of two of 11 bits, and drops the product of the lower.
BITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8, "tf32x3": 22}
UNIT = 2.0**-24  # of fp32: half the distance of 1 to the next number
TINY = torch.finfo(torch.float32).tiny  # smaller results may be flushed to zero, which is one more rounding

# Operations of several roundings, which are taken apart, so that each of those happens.
_COMPOSITE = {
    aten._log_softmax.default,
    aten._log_softmax_backward_data.default,
    aten._softmax.default,
    aten._softmax_backward_data.default,
    aten.addmm.default,
    aten.baddbmm.default,
    aten.gelu.default,
    aten.gelu_backward.default,
    aten.logsumexp.default,
    aten.mean.default,
    aten.mean.dim,
    aten.native_layer_norm.default,
    aten.native_layer_norm_backward.default,
    aten.nll_loss_backward.default,
    aten.nll_loss_forward.default,
    aten.silu.default,
    aten.silu_backward.default,
    aten.tanh_backward.default,
    aten.upsample_bicubic2d.default,
    aten.upsample_bicubic2d.vec,
}


def _product_terms(a: torch.Tensor, b: torch.Tensor) -> tuple[int, torch.Tensor]:
    return a.shape[-1], a.square() @ b.square()


def _sum_terms(x: torch.Tensor, *dims: Any, **kwargs: Any) -> tuple[int, torch.Tensor]:
    squares = torch.sum(x.square(), *dims, **kwargs)
    return x.numel() // max(squares.numel(), 1), squares


def _convolution_terms(x: torch.Tensor, w: torch.Tensor, bias: Any, *rest: Any) -> tuple[int, torch.Tensor]:
    return w[0].numel(), torch.convolution(x.square(), w.square(), None, *rest)


# Of each sum: the number of its terms and the sum of their squares.
_SUMS: dict[Any, Callable[..., tuple[int, torch.Tensor]]] = {
    aten.mm.default: _product_terms,
    aten.bmm.default: _product_terms,
    aten.convolution.default: _convolution_terms,
    aten.sum.default: _sum_terms,
    aten.sum.dim_IntList: _sum_terms,
}
_PRODUCTS = (aten.mm.default, aten.bmm.default, aten.convolution.default)

_active: list[RandomRounding] = []


class RandomRounding(TorchDispatchMode):
    """The mode; `operands` and, from `backward()` on, `backward_operands` are how many bits the operands of matrix
    products have, where a kernel rounds its weights or their gradients for the sake of the matrix unit."""

    def __init__(self, seed: int, operands: int = 24, backward_operands: int = 24) -> None:
        super().__init__()
        self._random = random.Random(seed)
        self._operands, self._backward_operands = operands, backward_operands
        self._uniform, self._normal = _numbers()

    def __enter__(self) -> RandomRounding:
        _active.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _active.pop()
        super().__exit__(*error)

    def backward(self) -> None:
        self._operands = self._backward_operands

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _COMPOSITE:
            with self:
                return decomposition_table[function](*args, **kwargs)
        if function in _PRODUCTS and self._operands < 24:
            args = (self.rounded(args[0], self._operands), self.rounded(args[1], self._operands), *args[2:])
        result = function(*args, **kwargs)
        schema = function._schema
        if not schema.is_mutable and any(r.alias_info for r in schema.returns):
            return result  # a view
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        outputs = [x if _is_fp64(x) else None for x in outputs]
        if function in _SUMS and outputs[0] is not None:
            outputs[0] = outputs[0] + self._of_partial_sums(outputs[0], *_SUMS[function](*args, **kwargs))
        rounded = [x if x is None else self.rounded(x) for x in outputs]
        if schema.is_mutable:
            for x, y in zip(outputs, rounded, strict=True):
                if x is not None:
                    x.copy_(y)
            return result
        if not isinstance(result, (tuple, list)):
            return result if rounded[0] is None else rounded[0]
        return type(result)(x if y is None else y for x, y in zip(result, rounded, strict=True))

    def rounded(self, x: torch.Tensor, bits: int = 24) -> torch.Tensor:
        """Each element as one of the two numbers of `bits` bits around it, the nearer with the larger probability."""
        exponent = (x.view(torch.int64) & 0x7FF0_0000_0000_0000).view(torch.float64)  # 2^e for 2^e <= |x| < 2^(e+1)
        step = exponent.mul_(2.0 ** (1 - bits)).clamp_(TINY, 1e300)
        return torch.div(x, step).add_(self._draw(self._uniform, x.shape)).floor_().mul_(step)

    def _of_partial_sums(self, sums: torch.Tensor, n: int, squares: torch.Tensor) -> torch.Tensor:
        """Terms in random order: the k-th partial sum is k/n of the whole plus a bridge of variance k/n (1 - k/n) times
        the squares, and is rounded; flushed terms come on top."""
        deviation = (sums.square().mul_(2).add_(squares).mul_(n / 6)).sqrt_().mul_(UNIT)
        deviation += math.sqrt(n) * TINY * (squares != 0)
        deviation = torch.where(deviation.isfinite(), deviation, 0.0)
        return deviation.mul_(self._draw(self._normal, sums.shape))

    def _draw(self, numbers: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        count = math.prod(shape)
        if count > len(numbers) // 2:
            numbers = numbers.repeat(2 + 2 * count // len(numbers))
        start = self._random.randrange(len(numbers) - count)
        return numbers[start : start + count].view(shape)


def held(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x itself; under random rounding x as a kernel keeps it that has `bits` bits for it. Gradients pass."""
    if not _active:
        return x
    with suspended() as mode:
        change = mode.rounded(x.detach().contiguous(), bits) - x.detach()
    return x + change


@contextlib.contextmanager
def suspended() -> Iterator[RandomRounding]:
    """What is computed in the block is exact, also under random rounding."""
    mode = _active[-1]
    with torch.utils._python_dispatch._disable_current_modes():
        yield mode


def is_active() -> bool:
    return bool(_active)


def _is_fp64(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.dtype == torch.float64


_drawn: list[torch.Tensor] = []


def _numbers() -> tuple[torch.Tensor, torch.Tensor]:
    """Uniform and normal numbers that are drawn once: slices of them at random places are as good and much faster."""
    if not _drawn:
        generator = torch.Generator().manual_seed(0)
        _drawn.append(torch.rand(2**20 + 7, generator=generator, dtype=torch.float64))
        _drawn.append(torch.randn(2**20 + 7, generator=generator, dtype=torch.float64))
    return _drawn[0], _drawn[1]
