"""Every launch table of the Triton kernels: plain data, no triton, a deterministic answer for any device.

`attention`, `cross_entropy` and `linear_cross_entropy` look an entry up; arch is "sm_90", "gfx942" or "interpreter".
Entries were chosen by what the compiler makes of them (docs/notes/2026-11-gpu-machine-code.md): no spills, 8 warps or
more on a multiprocessor, shared memory that the chip has, then the fewest instructions per score in the unmasked loop.
Those of the linear loss in 16 bits on sm_90 are the fastest of what was timed on an H200; other times are not measured.
tests/gpu_compile holds every entry to it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Tile:
    """One launch of an attention kernel.

    masked is BLOCK_N (BLOCK_M for dk and dv, which walk over queries) in the blocks that a mask cuts; it divides
    block_n (block_m). Masks need registers, so where they would spill, masked blocks are smaller. Heads wider than
    chunk are taken that many columns at a time, all their blocks as if a mask cut them, and dk and dv by a launch each.
    """

    block_m: int  # queries
    block_n: int  # keys
    num_warps: int
    num_stages: int  # blocks in flight between memory and the matrix units
    masked: int
    chunk: int = 256  # columns of a head in registers at once
    registers: int | None = None  # of a thread, at most; given, ptxas does not spill for the sake of one program more

    @property
    def launch_options(self) -> dict[str, int]:
        """What a launch of this entry says to the compiler."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.registers is None else {**options, "maxnreg": self.registers}


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    forward: Tile
    backward_dq: Tile
    backward_dkdv: Tile


@dataclasses.dataclass(frozen=True)
class CrossEntropyConfig:
    """One launch of a cross-entropy kernel: logits of a row taken at a time, and warps of a program."""

    block: int
    num_warps: int


@dataclasses.dataclass(frozen=True)
class ProductTile:
    """One launch of a linear cross-entropy kernel. Two of the blocks span its tile, it walks along the third."""

    block_m: int  # tokens
    block_v: int  # classes
    block_e: int  # depth
    num_warps: int
    num_stages: int
    registers: int | None = None  # as in Tile
    group: int = 16  # rows of tiles that are walked together

    @property
    def launch_options(self) -> dict[str, int]:
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.registers is None else {**options, "maxnreg": self.registers}


@dataclasses.dataclass(frozen=True)
class LinearCrossEntropyConfig:
    forward: ProductTile
    gradient: ProductTile  # of the logits
    grad_hidden: ProductTile
    grad_weight: ProductTile  # its block_m divides that of gradient, whose zeros it counts on
    few: ProductTile | None = None  # grad_hidden's where its tiles would leave half of a device idle

    @property
    def unit(self) -> int:
        """Chunks of backward have whole blocks of every kernel."""
        return math.lcm(*(tile.block_v for tile in (self.gradient, self.grad_hidden, self.grad_weight)))

    def of_hidden(self, tokens: int, E: int) -> ProductTile:
        """grad_hidden's tile for so many tokens. Those of `few` lie within it, and walk in the same steps."""
        tiles = -(-tokens // self.grad_hidden.block_m) * -(-E // self.grad_hidden.block_e)
        return self.grad_hidden if self.few is None or 2 * tiles > MULTIPROCESSORS else self.few


def _attention(forward: tuple[int, ...], dq: tuple[int, ...], dkdv: tuple[int, ...]) -> AttentionConfig:
    return AttentionConfig(Tile(*forward), Tile(*dq), Tile(*dkdv))


def _tiles(*tiles: tuple[Any, ...]) -> tuple[ProductTile, ...]:
    return tuple(ProductTile(*tile) for tile in tiles)


# (family, bits of an element, head size rounded up to a power of two); forward, dq, dk and dv: block_m, block_n,
# num_warps, num_stages, masked, and where heads are taken in chunks, chunk and registers. What decides:
#   sm_80   two products in a chain share their warps only where the accumulator is no wider than high: BLOCK_M >= Dv,
#           or scores are computed more than once; 255 registers a thread bound the rest.
#   sm_86   the same instructions in 99 KB of shared memory (sm_89 and sm_120 too).
#   sm_90   a warp group multiplies 64 rows (queries, or keys for dk and dv) at once; dk and dv of 256-wide heads do not
#           fit its registers and run on the sm_80 instructions.
#   sm_100  accumulators live in tensor memory; a pipeline of two stages around the loop over a group's heads spills.
#   gfx942  a warp takes 32 rows; with fewer rows than that a warp, scores are computed more than once. 64 KB of LDS.
#           dk and dv of 256-wide fp32 heads spill unless taken in chunks.
#   cuda    fp32 as three products of tf32 halves, which doubles operands and so the registers. Heads over 128 go in
#           chunks (attention/chunks.py); tiles wider than high, so that warps share columns and compute no score twice.
ATTENTION: dict[tuple[str, int, int], AttentionConfig] = {
    ("sm_80", 16, 32): _attention((128, 128, 8, 2, 128), (128, 32, 4, 2, 32), (32, 128, 4, 2, 32)),
    ("sm_80", 16, 64): _attention((128, 128, 8, 2, 64), (128, 64, 8, 2, 64), (32, 128, 8, 2, 32)),
    ("sm_80", 16, 128): _attention((128, 64, 8, 2, 32), (64, 64, 4, 2, 16), (128, 64, 8, 2, 64)),
    ("sm_80", 16, 256): _attention((64, 64, 8, 2, 32), (64, 64, 8, 2, 64), (64, 32, 8, 2, 32)),
    ("sm_86", 16, 32): _attention((128, 128, 8, 2, 128), (128, 32, 4, 2, 32), (32, 128, 4, 2, 32)),
    ("sm_86", 16, 64): _attention((128, 128, 8, 2, 64), (128, 64, 8, 2, 64), (32, 128, 8, 2, 32)),
    ("sm_86", 16, 128): _attention((128, 64, 8, 2, 32), (64, 64, 4, 2, 16), (64, 64, 8, 2, 32)),
    ("sm_86", 16, 256): _attention((32, 32, 4, 2, 16), (32, 64, 8, 1, 16), (32, 32, 8, 2, 32)),
    ("sm_90", 16, 32): _attention((128, 128, 8, 2, 128), (128, 128, 8, 2, 128), (128, 128, 8, 2, 64)),
    ("sm_90", 16, 64): _attention((128, 128, 8, 2, 128), (128, 128, 8, 2, 64), (64, 128, 8, 2, 64)),
    ("sm_90", 16, 128): _attention((128, 128, 8, 2, 64), (128, 64, 8, 2, 64), (32, 128, 8, 2, 32)),
    ("sm_90", 16, 256): _attention((128, 64, 8, 2, 32), (128, 32, 8, 2, 16), (64, 32, 8, 2, 32)),
    ("sm_100", 16, 32): _attention((128, 128, 8, 2, 64), (128, 128, 8, 2, 64), (64, 128, 8, 1, 64)),
    ("sm_100", 16, 64): _attention((128, 128, 8, 2, 64), (128, 128, 8, 2, 64), (64, 128, 8, 1, 64)),
    ("sm_100", 16, 128): _attention((128, 128, 8, 2, 64), (128, 64, 8, 2, 64), (32, 128, 8, 1, 32)),
    ("sm_100", 16, 256): _attention((128, 64, 8, 2, 32), (128, 32, 8, 2, 32), (64, 32, 8, 2, 32)),
    ("gfx942", 16, 32): _attention((128, 64, 4, 1, 64), (128, 64, 4, 1, 64), (32, 128, 4, 1, 32)),
    ("gfx942", 16, 64): _attention((128, 64, 4, 2, 32), (128, 64, 4, 1, 64), (32, 128, 4, 1, 32)),
    ("gfx942", 16, 128): _attention((128, 64, 4, 2, 32), (128, 32, 4, 1, 32), (16, 128, 4, 1, 16)),
    ("gfx942", 16, 256): _attention((128, 32, 4, 1, 32), (128, 32, 4, 1, 32), (16, 64, 4, 1, 16)),
    ("cuda", 32, 32): _attention((64, 32, 4, 2, 16), (32, 32, 4, 2, 16), (16, 32, 4, 2, 16)),
    ("cuda", 32, 64): _attention((128, 32, 8, 2, 32), (32, 32, 4, 1, 16), (16, 32, 4, 2, 16)),
    ("sm_120", 32, 64): _attention((32, 32, 4, 2, 32), (32, 32, 4, 1, 16), (16, 32, 4, 2, 16)),  # 128 rows spill there
    ("cuda", 32, 128): _attention((32, 32, 8, 2, 32), (16, 32, 8, 2, 32), (16, 16, 4, 1, 16)),
    ("cuda", 32, 256): _attention(
        (16, 32, 4, 2, 32, 32, 255), (16, 32, 4, 2, 32, 32, 255), (32, 16, 4, 2, 32, 32, 255)
    ),
    ("gfx942", 32, 32): _attention((128, 32, 4, 1, 32), (128, 32, 4, 1, 32), (32, 128, 4, 1, 32)),
    ("gfx942", 32, 64): _attention((128, 32, 4, 1, 32), (128, 32, 4, 1, 32), (32, 128, 4, 1, 32)),
    ("gfx942", 32, 128): _attention((128, 32, 4, 1, 32), (128, 16, 4, 1, 16), (16, 64, 4, 1, 16)),
    ("gfx942", 32, 256): _attention((64, 16, 4, 1, 16), (64, 16, 4, 1, 16), (32, 64, 4, 1, 32, 64)),
}

# Small enough that short sequences have several blocks, of both kinds; large enough that tests end soon.
_INTERPRETER_ATTENTION = _attention((32, 64, 4, 1, 32), (32, 64, 4, 1, 32), (64, 32, 4, 1, 32))
_INTERPRETER_CHUNKED = _attention((32, 64, 4, 1, 32, 32), (32, 64, 4, 1, 32, 32), (64, 32, 4, 1, 32, 32))
_INTERPRETER_LINEAR_CROSS_ENTROPY = LinearCrossEntropyConfig(*[ProductTile(32, 64, 32, 4, 1, group=2)] * 4)
_INTERPRETER_CROSS_ENTROPY = CrossEntropyConfig(64, 4)

# By bits of an element: two loads of 128 bits a thread in flight, four programs on a multiprocessor (52 registers a
# thread on sm_90).
CROSS_ENTROPY = {16: CrossEntropyConfig(4096, 8), 32: CrossEntropyConfig(2048, 8)}

# Linear cross-entropy: block_m, block_v, block_e, num_warps, num_stages, registers. "cuda" is what the other NVIDIA
# families have for fp32, whose three products of tf32 halves run on the sm_80 instructions there.
# (family, bits of an element, simple): the forward and the gradient kernel; simple is a depth in whole blocks and none
# of bias, smoothing, class weights and softcap. What decides: the largest tile that does not spill. In 255 registers
# that is 128 x 256 on sm_90, whose matrix unit reads operands from shared memory, and 128 x 128 else; a softcap, narrow
# loads of odd depths, or 64 values of a bias in each thread take the registers of half a tile.
LINEAR_LOGITS: dict[tuple[str, int, bool], tuple[ProductTile, ...]] = {
    ("sm_80", 16, True): _tiles((128, 128, 64, 8, 3), (128, 128, 64, 8, 3)),
    ("sm_80", 16, False): _tiles((128, 64, 32, 8, 3, 255), (128, 64, 32, 8, 3, 255)),
    ("sm_86", 16, True): _tiles((128, 128, 64, 8, 3), (128, 128, 64, 8, 3)),
    ("sm_86", 16, False): _tiles((128, 64, 32, 8, 3, 255), (128, 64, 32, 8, 3, 255)),
    ("sm_90", 16, True): _tiles((128, 256, 32, 8, 4), (128, 256, 64, 8, 3)),  # 64 deep spills 8 bytes in Triton 3.8
    ("sm_90", 16, False): _tiles((128, 64, 32, 8, 3, 255), (128, 64, 32, 8, 3, 255)),
    ("sm_100", 16, True): _tiles((128, 128, 64, 8, 3), (128, 128, 64, 8, 3)),
    ("sm_100", 16, False): _tiles((128, 64, 32, 8, 3, 255), (128, 64, 32, 8, 3, 255)),
    ("gfx942", 16, True): _tiles((128, 128, 64, 8, 2), (128, 128, 64, 8, 2)),
    ("gfx942", 16, False): _tiles((128, 64, 32, 8, 2), (128, 64, 32, 8, 2)),
    ("cuda", 32, True): _tiles((128, 64, 16, 8, 3), (128, 64, 16, 8, 3)),
    ("cuda", 32, False): _tiles((64, 32, 16, 4, 2, 255), (64, 32, 16, 4, 2, 255)),
    ("sm_90", 32, True): _tiles((128, 128, 32, 8, 2), (128, 128, 32, 8, 2)),
    ("sm_90", 32, False): _tiles((64, 32, 32, 4, 2, 255), (64, 32, 32, 4, 2, 255)),
    ("sm_100", 32, True): _tiles((128, 128, 32, 8, 2), (128, 128, 32, 8, 2)),
    ("sm_100", 32, False): _tiles((64, 32, 32, 4, 2, 255), (64, 32, 32, 4, 2, 255)),
    ("gfx942", 32, True): _tiles((128, 128, 32, 8, 2), (128, 128, 32, 8, 2)),
    ("gfx942", 32, False): _tiles((128, 64, 32, 8, 2), (128, 64, 32, 8, 2)),
}

# (family, bits of an element, whether 16 bytes divide a row of E, or WIDE where 256 features do): grad_hidden,
# grad_weight and, where that was timed, grad_hidden of few tokens.
WIDE = 2
LINEAR_PRODUCTS: dict[tuple[str, int, int], tuple[ProductTile, ...]] = {
    ("sm_80", 16, True): _tiles((128, 64, 128, 8, 3), (64, 128, 128, 8, 3)),
    ("sm_80", 16, False): _tiles((64, 32, 64, 8, 2, 255), (32, 64, 64, 8, 2, 255)),
    ("sm_86", 16, True): _tiles((128, 32, 128, 8, 3), (32, 128, 128, 8, 3)),
    ("sm_86", 16, False): _tiles((64, 32, 64, 8, 2, 255), (32, 64, 64, 8, 2, 255)),
    ("sm_90", 16, True): _tiles((128, 64, 128, 8, 3), (64, 128, 128, 8, 3), (64, 64, 64, 4, 4)),
    ("sm_90", 16, WIDE): _tiles((128, 64, 256, 8, 3), (64, 128, 256, 8, 3, None, 4), (64, 64, 64, 4, 4)),
    ("sm_90", 16, False): _tiles((64, 32, 64, 8, 2, 255), (32, 64, 64, 8, 2, 255)),
    ("sm_100", 16, True): _tiles((128, 64, 128, 8, 3), (64, 128, 128, 8, 3)),
    ("sm_100", 16, False): _tiles((64, 32, 64, 8, 2, 255), (32, 64, 64, 8, 2, 255)),
    ("gfx942", 16, True): _tiles((128, 64, 128, 8, 2), (64, 128, 128, 8, 2)),
    ("gfx942", 16, False): _tiles((64, 32, 64, 4, 2), (32, 64, 64, 4, 2)),
    ("cuda", 32, True): _tiles((128, 16, 64, 8, 3), (16, 128, 64, 8, 3)),
    ("cuda", 32, False): _tiles((64, 32, 32, 4, 2, 255), (32, 64, 32, 4, 2, 255)),
    ("sm_90", 32, True): _tiles((128, 32, 64, 8, 3), (32, 128, 64, 8, 3)),
    ("sm_90", 32, False): _tiles((64, 32, 32, 4, 2, 255), (32, 64, 32, 4, 2, 255)),
    ("sm_100", 32, True): _tiles((128, 32, 128, 8, 2), (32, 128, 128, 8, 2)),
    ("sm_100", 32, False): _tiles((64, 32, 32, 4, 2, 255), (32, 64, 32, 4, 2, 255)),
    ("gfx942", 32, True): _tiles((128, 32, 128, 8, 2), (32, 128, 128, 8, 2)),
    ("gfx942", 32, False): _tiles((64, 32, 64, 4, 2), (32, 64, 64, 4, 2)),
}

# Of an H100 or H200; tiles and chunks that fill them to the last wave lose a little on other devices.
MULTIPROCESSORS = 132

_FAMILIES = {"sm_80": "sm_80", "sm_87": "sm_80", "sm_90": "sm_90", "sm_100": "sm_100", "sm_103": "sm_100"}


def family(arch: str) -> str:
    """Whose entries a device uses: its own, or those of the chip with the same instructions and no more memory."""
    if arch.startswith("gfx"):
        return "gfx942"
    return _FAMILIES.get(arch, "sm_86")


def attention(arch: str, dtype: torch.dtype, head_dim: int) -> AttentionConfig:
    """The entry for a device, an element type and the larger of the two head sizes."""
    if arch == "interpreter":
        return _INTERPRETER_CHUNKED if dtype == torch.float32 and head_dim > 128 else _INTERPRETER_ATTENTION
    padded = next(size for size in (32, 64, 128, 256) if head_dim <= size)
    if dtype == torch.float32 and not arch.startswith("gfx"):
        own = "sm_120" if arch.startswith("sm_12") else "cuda"
        return ATTENTION.get((own, 32, padded), ATTENTION["cuda", 32, padded])
    return ATTENTION[family(arch), 8 * dtype.itemsize, padded]


def dot_precision(arch: str, dtype: torch.dtype) -> str:
    """How matrix units multiply. Only fp32 has a choice: as it is on AMD; on NVIDIA as three products of tf32 halves,
    each within 2**-20 of the exact product, where a single one (Triton's default) would be within 2**-10."""
    return "tf32x3" if dtype == torch.float32 and not arch.startswith("gfx") else "ieee"


def cross_entropy(arch: str, dtype: torch.dtype, vocabulary: int) -> CrossEntropyConfig:
    """The same for every GPU, less for a vocabulary that does not fill it."""
    if arch == "interpreter":
        return _INTERPRETER_CROSS_ENTROPY
    full = CROSS_ENTROPY[8 * dtype.itemsize]
    block = min(full.block, max(256, 2 ** (max(vocabulary, 1) - 1).bit_length()))
    return CrossEntropyConfig(block, max(1, full.num_warps * block // full.block))


def linear_cross_entropy(arch: str, dtype: torch.dtype, E: int, rich: bool) -> LinearCrossEntropyConfig:
    """The entry for a device and an element type; `rich`: with a bias, smoothing, class weights or a softcap."""
    if arch == "interpreter":
        return _INTERPRETER_LINEAR_CROSS_ENTROPY
    bits = 8 * dtype.itemsize
    own = family(arch)
    if (own, bits, True) not in LINEAR_LOGITS:
        own = "cuda"
    logits = LINEAR_LOGITS[own, bits, not rich and E % 64 == 0]
    aligned = LINEAR_PRODUCTS[own, bits, E * bits % 128 == 0]
    products = LINEAR_PRODUCTS.get((own, bits, WIDE), aligned) if E % 256 == 0 else aligned
    return LinearCrossEntropyConfig(*logits, *products)
