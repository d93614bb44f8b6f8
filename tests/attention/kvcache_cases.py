"""A call of attention_kvcache as the tests describe it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from attention_cases import FP32


@dataclasses.dataclass(frozen=True)
class Cached:
    """S queries against caches that hold `lengths` tokens before `new` ones (0: none) are appended."""

    name: str
    lengths: tuple[int, ...]
    S: int = 1
    new: int = 0
    H: int = 4
    Hkv: int = 2
    D: int = 16
    Dv: int = 16
    capacity: int = 150
    page: int = 0
    rotary: int = 0
    interleaved: bool = False
    tables: torch.dtype = FP32
    sinks: bool = False
    dtype: torch.dtype = FP32
    causal: bool = True
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(6)
        B = len(self.lengths)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype)

        tensors = {"q": random(B, self.S, self.H, self.D)}
        if self.page:
            each = -(-self.capacity // self.page)
            pages = B * each + 3
            tensors["k_cache"] = random(pages, self.page, self.Hkv, self.D)
            tensors["v_cache"] = random(pages, self.page, self.Hkv, self.Dv)
            tensors["block_table"] = torch.randperm(pages, generator=generator)[: B * each].view(B, each).int()
        else:
            tensors["k_cache"] = random(B, self.capacity, self.Hkv, self.D)
            tensors["v_cache"] = random(B, self.capacity, self.Hkv, self.Dv)
        tensors["cache_lengths"] = torch.tensor(self.lengths, dtype=torch.int32)
        if self.new:
            tensors["k"], tensors["v"] = random(B, self.new, self.Hkv, self.D), random(B, self.new, self.Hkv, self.Dv)
        if self.rotary:
            angles = torch.rand(self.capacity, self.rotary // 2, generator=generator) * 6
            tensors["rotary_cos"], tensors["rotary_sin"] = angles.cos().to(self.tables), angles.sin().to(self.tables)
        if self.sinks:
            tensors["sinks"] = torch.randn(self.H, generator=generator)
        return tensors

    def options(self) -> dict[str, Any]:
        return {
            "rotary_interleaved": self.interleaved,
            "causal": self.causal,
            "window": self.window,
            "softcap": self.softcap,
            "return_lse": True,
        }
