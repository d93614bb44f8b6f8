"""Every launch table of the Triton kernels: plain data, no triton, a deterministic answer for any device.

`attention`, `cross_entropy` and `linear_cross_entropy` look an entry up; arch is "sm_90", "gfx942" or "interpreter".
Entries were chosen by what the compiler makes of them (docs/tuning.md): no spills, 8 warps or more on a multiprocessor,
shared memory that the chip has, then the fewest instructions per score in the unmasked loop. Those of the linear
loss in 16 bits on sm_90 are the fastest of what was timed on an H200; other times are not measured. tests/gpu_compile
holds every entry to it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
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
    def blocks(self) -> dict[str, int]:
        return {"BLOCK_M": self.block_m, "BLOCK_V": self.block_v, "BLOCK_E": self.block_e, "GROUP": self.group}

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
#           chunks (kernels/chunks.py); tiles wider than high, so that warps share columns and compute no score twice.
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

# Programs of the forward kernel: 30 for each of 132 multiprocessors, so that a tenth of them still fills a device. Each
# leaves 16 bytes a token: at most 8 MiB.
FORWARD_PROGRAMS = 4096

# fp32 logits that are written all at once where a problem has no more: three large products, few launches. On an H200's
# host both ways take as long around that size (docs/tuning.md).
LINEAR_PRODUCT_BYTES = 32 << 20

# Scratch of the backward pass: the gradient of a chunk of logits, and lower halves of fp32 sums over several chunks.
# 8,192 tokens in a chunk leave 1,536 classes: for each of the two products more than 1,500 of multiplications
# per element that is read, and 8 bytes of sums read and written per 3,072 flops.
GRADIENT_BYTES = 24 << 20
SUMS_BYTES = 32 << 20
CHUNK_TOKENS = 8192

# What decides how many classes a chunk has, beside the room: grad_weight's tiles should fill the multiprocessors of a
# device to the last wave (132 on an H100 or H200; others lose a little), and grad_hidden's sums are read and written
# once a chunk, which takes as long as its product of some 600 classes (8 bytes at 4 TB/s, 2 flops a class at 600
# TFLOP/s). Launches of a chunk take at least 10 us.
MULTIPROCESSORS = 132
SUMS_CLASSES = 600
CHUNK_FLOPS = 6e9

# Logits that forward keeps for backward in the memory of grad_weight: of at most E tokens, if those are at least one in
# KEPT_SHARE; and all scratch of such a call.
KEPT_BYTES = 62 << 20
KEPT_SHARE = 8

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


def linear_cross_entropy_by_products(N: int, V: int) -> bool:
    """Whether the logits are few enough to be written; else they stay in registers."""
    return 4 * N * V <= LINEAR_PRODUCT_BYTES


def vocabulary_splits(arch: str, N: int, V: int, tile: ProductTile) -> tuple[int, int]:
    """(ranges that forward's programs take of V, tiles of each): enough programs to fill a device several times over
    even when most tokens are ignored, which only the device knows. The same numbers on every device of an entry."""
    programs = 6 if arch == "interpreter" else FORWARD_PROGRAMS
    blocks, tiles = -(-N // tile.block_m), -(-V // tile.block_v)
    tiles_per_split = -(-tiles // max(1, programs // blocks))
    return -(-tiles // tiles_per_split), tiles_per_split


def _best_classes(choices: Iterable[int], sizes: tuple[int, int, int], tile: ProductTile, sums: bool) -> int:
    """Of the possible numbers of classes of a chunk the one that takes the least time; `sizes`: tokens, classes and
    features of all chunks; `sums`: those of grad_hidden are read and written for every chunk."""
    N, V, E = sizes
    columns = max(1, -(-E // tile.block_e))
    a_chunk = CHUNK_FLOPS / (2 * max(N * E, 1)) + (SUMS_CLASSES if sums else 0)

    def cost(classes: int) -> float:
        """In classes that a full device takes as long for."""
        waves = [-(-(-(-c // tile.block_v) * columns) // MULTIPROCESSORS) for c in (classes, V % classes)]
        of_waves = (V // classes * waves[0] + waves[1]) * MULTIPROCESSORS * tile.block_v / columns
        return of_waves + -(-V // classes) * a_chunk

    return min(sorted(choices, reverse=True), key=cost)


@functools.lru_cache(maxsize=1024)
def _chunk_classes(most: int, unit: int, sizes: tuple[int, int, int], tile: ProductTile, sums: bool) -> int:
    return _best_classes(range(unit, most + 1, unit), sizes, tile, sums)


@dataclasses.dataclass(frozen=True)
class Kept:
    """Logits that forward keeps for backward where grad_weight will stand, as 16-bit steps below the largest of a tile:
    those of the first `tokens` counted tokens, [chunk of classes][token][class]. A chunk's rows of grad_weight are as
    large as its logits or larger, and are written once its logits are of no more use.

    Of the classes from `stop` on, the last chunk, nothing is kept where lower halves of grad_hidden's sums need the
    place: grad_weight's last rows are theirs until they are written.
    """

    sizes: tuple[int, int, int]  # N, V, E
    tokens: int  # in whole blocks
    classes: int  # of a chunk
    stop: int
    tile: int  # classes with one origin
    near: int  # of the tokens that are not kept, those whose lower halves stand in grad_weight's rows from stop on

    @property
    def whole(self) -> int:
        """Chunks of so many classes; the rest up to stop is another, whose rows are padded to 16 elements."""
        return self.stop // self.classes

    @property
    def elements(self) -> int:
        """Of 16 bits, that grad_weight's memory must have: V E, and a little for the padding."""
        _, V, E = self.sizes
        padded = -(-(self.stop - self.whole * self.classes) // 16) * 16
        return max(V * E, self.whole * self.classes * E + self.tokens * padded)


def linear_cross_entropy_kept(
    N: int, V: int, E: int, dtype: torch.dtype, plain: bool, config: LinearCrossEntropyConfig
) -> Kept | None:
    """What forward keeps, or None. Only where G is rounded to bf16, which is coarser than the steps; `plain`: without a
    bias, whose gradient is not rounded, and without a softcap, whose slope would be that of a rounded logit."""
    if dtype != torch.bfloat16 or not plain or N == 0:
        return None
    return _kept(N, V, E, config, KEPT_BYTES, SUMS_BYTES)


@functools.lru_cache(maxsize=1024)
def _kept(N: int, V: int, E: int, config: LinearCrossEntropyConfig, room: int, sums_room: int) -> Kept | None:
    block = math.lcm(config.forward.block_m, config.gradient.block_m, config.grad_hidden.block_m)
    unit = math.lcm(config.forward.block_v, config.unit)
    rows = -(-N // block) * block
    for tokens in range(min(rows, E // block * block), 0, -block):
        if tokens * KEPT_SHARE < N:
            return None
        others = max(0, N - tokens)
        if others * E * 2 > sums_room:  # then grad_hidden of these has a sweep of its own before the rest
            others = 0

        def lent(classes: int, others: int = others) -> tuple[int, int]:
            """(stop, near) for chunks of so many classes."""
            if others == 0 or classes >= V:
                return V, others
            stop = (V - 1) // classes * classes
            return stop, min(others, (V - stop) // block * block)

        def scratch(classes: int, others: int = others) -> int:
            beside = others - lent(classes)[1] if classes < V else 0
            return 2 * rows * classes + 2 * E * beside

        most = min(room // (2 * rows), -(-V // unit) * unit)
        choices = [classes for classes in range(unit, most + 1, unit) if scratch(classes) <= room]
        if choices and -(-V // config.forward.block_v) * tokens * 4 <= room:  # origins, in forward
            classes = _best_classes(choices, (N, V, E), config.grad_weight, others > 0)
            stop, near = lent(classes)
            return Kept((N, V, E), tokens, classes, stop, config.forward.block_v, near)
    return None


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One walk of backward over all logits, a chunk at a time; all tokens of some classes before the next classes, or,
    where grad_hidden alone is made, all classes of some tokens before the next tokens."""

    sizes: tuple[int, int]  # N, V
    tokens: int  # of a chunk, in whole blocks
    classes: int
    of_hidden: bool
    of_weight: bool
    of_bias: bool
    class_unit: int  # chunks have whole blocks of classes too
    halves: bool  # 16-bit gradients keep the lower halves of their sums beside them
    first: int = 0  # of the N tokens, in the list of counted ones

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """(first token, first class) of each chunk in its turn."""
        tokens = range(self.first, self.first + self.sizes[0], self.tokens)
        classes = range(0, self.sizes[1], self.classes)
        if self.keeps_all_tokens:
            return [(token, first) for first in classes for token in tokens]
        return [(token, first) for token in tokens for first in classes]

    @property
    def keeps_all_tokens(self) -> bool:
        return self.of_weight or not self.of_hidden

    @property
    def lower_halves(self) -> tuple[int, int]:
        """Rows of the scratch tensors beside grad_hidden and grad_weight; none where one chunk makes the sums whole."""
        N, V = self.sizes
        of_hidden = self.halves and self.of_hidden and self.classes < V
        of_weight = self.halves and self.of_weight and self.tokens < N
        tokens = N if self.keeps_all_tokens else min(N, self.tokens)
        return of_hidden * tokens, of_weight * self.classes

    def rounded(self, classes: int) -> int:
        return -(-classes // self.class_unit) * self.class_unit


def linear_cross_entropy_sweeps(
    N: int,
    V: int,
    E: int,
    itemsize: int,
    of_hidden: bool,
    of_weight: bool,
    of_bias: bool,
    config: LinearCrossEntropyConfig,
    first: int = 0,
) -> list[Sweep]:
    """How backward walks over the logits of N tokens, `first` of the list being the first, in at most GRADIENT_BYTES +
    SUMS_BYTES + 1/7 of either for any N and V.

    One sweep serves both products where the lower halves of grad_hidden's sums fit in SUMS_BYTES (N E up to 16.7
    million), or need no room in fp32; else each has its own and logits are computed once more.
    """
    unit = config.unit
    elements = GRADIENT_BYTES // itemsize
    kept = N + V if itemsize > 2 else SUMS_BYTES // (2 * max(E, 1))  # rows of sums that there is room for

    def sweep(hidden: bool, weight: bool, bias: bool) -> Sweep:
        alone = hidden and not weight
        block = max(config.gradient.block_m, config.grad_hidden.block_m)
        tokens = max(block, min(-(-N // block) * block, CHUNK_TOKENS, kept // block * block if alone else CHUNK_TOKENS))
        classes = elements // tokens if tokens >= N or not weight else min(elements // tokens, kept)
        classes = max(unit, min(classes // unit * unit, -(-V // unit) * unit))
        if weight:
            classes = _chunk_classes(classes, unit, (N, V, E), config.grad_weight, hidden)
        return Sweep((N, V), tokens, classes, hidden, weight, bias, unit, itemsize == 2, first)

    if of_hidden and of_weight and kept < N:
        return [sweep(True, False, False), sweep(False, True, of_bias)]
    return [sweep(of_hidden, of_weight, of_bias)]
