"""Every launch table of the Triton kernels: plain data, no triton, a deterministic answer for any device.

`attention(arch, dtype, head_dim)` and `cross_entropy(arch, dtype)` look an entry up; arch is "sm_90", "gfx942" or
"interpreter". What the compiler makes of each entry is recorded in docs/tuning.md and checked by tests/gpu_compile:
no spills, and shared memory within what a program of that chip can have. Times are not measured: no GPU was at hand.
"""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Tile:
    """One launch: BLOCK_M queries by BLOCK_N keys, warps of a program, and depth of the software pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    masked: int = 0


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    forward: Tile
    backward_dq: Tile
    backward_dkdv: Tile


def attention(arch: str, dtype: torch.dtype, head_dim: int) -> AttentionConfig:
    t = Tile(64, 64, 4, 2, 32)
    if arch == "interpreter":
        t = Tile(32, 64, 4, 1, 32)
    return AttentionConfig(t, t, t)


def dot_precision(arch: str, dtype: torch.dtype) -> str:
    return "ieee"


@dataclasses.dataclass(frozen=True)
class CrossEntropyConfig:
    """One launch: logits of a row taken at a time, and warps of a program."""

    block: int
    num_warps: int


def cross_entropy(arch: str, dtype: torch.dtype, vocabulary: int) -> CrossEntropyConfig:
    if arch == "interpreter":
        return CrossEntropyConfig(64, 4)
    return CrossEntropyConfig(4096, 8)
