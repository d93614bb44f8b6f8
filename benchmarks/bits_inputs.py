"""What every case of bits.py is made with: seeded inputs, the call, and the gradients of all that may have one.

A case's inputs depend on its name only: they come from a generator that is seeded by it, as sums of uniform numbers,
so that every machine and every later list of cases draws the same ones.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INPUT_ROOM = 0x9E3779B9  # apart from the seeds that anybody else would use

Tensors = dict[str, torch.Tensor]


class Draw:
    """Seeded inputs of one case."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.seed = zlib.crc32(name.encode()) ^ INPUT_ROOM
        self.generator = torch.Generator().manual_seed(self.seed)
        self.dtype = dtype

    def normal(self, *shape: int, dtype: torch.dtype | None = None, size: float = 1.0) -> torch.Tensor:
        """About normal, of standard deviation `size`: only additions and one product, which round alike anywhere."""
        total = sum((torch.rand(shape, generator=self.generator) for _ in range(3)), torch.tensor(-1.5))
        return (total * (2.0 * size)).to(dtype or self.dtype)

    def whole(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.generator, dtype=dtype)


@dataclass(frozen=True)
class BitsCase:
    """A named call; `run` draws the inputs and gives every output and every gradient by name."""

    op: str
    name: str
    dtype: str
    make: Callable[[Draw], Tensors]
    quick: bool = False

    @property
    def id(self) -> str:
        return f"{self.op}/{self.name}/{self.dtype}"

    def run(self) -> Tensors:
        draw = Draw(self.id, DTYPES[self.dtype])
        torch.manual_seed(draw.seed)  # of dropout
        return self.make(draw)


def with_gradients(draw: Draw, leaves: Tensors, function: Callable[..., Tensors], times: int = 1) -> Tensors:
    """`function`'s outputs, and the gradients of `leaves` under random slopes of the outputs that have some; `times`
    backward passes go through one graph."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    outputs = function(**leaves)
    sloped = {name: out for name, out in outputs.items() if out.requires_grad}
    found = {name: out.detach() for name, out in outputs.items()}
    slopes = [draw.normal(*out.shape, dtype=out.dtype) for out in sloped.values()]
    for again in range(times):
        gradients = torch.autograd.grad(
            list(sloped.values()), list(leaves.values()), slopes, retain_graph=again < times - 1, allow_unused=True
        )
        names = (f"grad {name} of pass {again}" for name in leaves)
        found |= {name: g for name, g in zip(names, gradients, strict=True) if g is not None}
    return found
