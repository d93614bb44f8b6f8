"""How the Triton kernels of the linear loss divide tokens and classes: how many logits are written, kept or computed
again, in chunks of which size. Plain arithmetic, no triton, the same answer on every device of an entry in configs.py.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable

import torch

from gpt4v_fast.kernels import configs

# Programs of the forward kernel: 30 for each of 132 multiprocessors, so that a tenth of them still fills a device. Each
# leaves 16 bytes a token: at most 8 MiB.
FORWARD_PROGRAMS = 4096

# fp32 logits that are written all at once where a problem has no more: three large products, few launches. On an H200's
# host both ways take as long around that size (docs/notes/2026-11-host-time.md).
PRODUCT_BYTES = 32 << 20

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
SUMS_CLASSES = 600
CHUNK_FLOPS = 6e9

# Logits that forward keeps for backward in the memory of grad_weight: of at most E tokens, if those are at least one in
# KEPT_SHARE; and all scratch of such a call.
KEPT_BYTES = 62 << 20
KEPT_SHARE = 8


def by_products(N: int, V: int) -> bool:
    """Whether the logits are few enough to be written; else they stay in registers."""
    return 4 * N * V <= PRODUCT_BYTES


def vocabulary_splits(arch: str, N: int, V: int, tile: configs.ProductTile) -> tuple[int, int]:
    """(ranges that forward's programs take of V, tiles of each): enough programs to fill a device several times over
    even when most tokens are ignored, which only the device knows. The same numbers on every device of an entry."""
    programs = 6 if arch == "interpreter" else FORWARD_PROGRAMS
    blocks, tiles = -(-N // tile.block_m), -(-V // tile.block_v)
    tiles_per_split = -(-tiles // max(1, programs // blocks))
    return -(-tiles // tiles_per_split), tiles_per_split


def _best_classes(choices: Iterable[int], sizes: tuple[int, int, int], tile: configs.ProductTile, sums: bool) -> int:
    """Of the possible numbers of classes of a chunk the one that takes the least time; `sizes`: tokens, classes and
    features of all chunks; `sums`: those of grad_hidden are read and written for every chunk."""
    N, V, E = sizes
    columns = max(1, -(-E // tile.block_e))
    a_chunk = CHUNK_FLOPS / (2 * max(N * E, 1)) + (SUMS_CLASSES if sums else 0)

    def cost(classes: int) -> float:
        """In classes that a full device takes as long for."""
        waves = [-(-(-(-c // tile.block_v) * columns) // configs.MULTIPROCESSORS) for c in (classes, V % classes)]
        of_waves = (V // classes * waves[0] + waves[1]) * configs.MULTIPROCESSORS * tile.block_v / columns
        return of_waves + -(-V // classes) * a_chunk

    return min(sorted(choices, reverse=True), key=cost)


@functools.lru_cache(maxsize=1024)
def _chunk_classes(most: int, unit: int, sizes: tuple[int, int, int], tile: configs.ProductTile, sums: bool) -> int:
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


def kept(
    N: int, V: int, E: int, dtype: torch.dtype, plain: bool, config: configs.LinearCrossEntropyConfig
) -> Kept | None:
    """What forward keeps, or None. Only where G is rounded to bf16, which is coarser than the steps; `plain`: without a
    bias, whose gradient is not rounded, and without a softcap, whose slope would be that of a rounded logit."""
    if dtype != torch.bfloat16 or not plain or N == 0:
        return None
    return _kept(N, V, E, config, KEPT_BYTES, SUMS_BYTES)


@functools.lru_cache(maxsize=1024)
def _kept(N: int, V: int, E: int, config: configs.LinearCrossEntropyConfig, room: int, sums_room: int) -> Kept | None:
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


def sweeps(
    N: int,
    V: int,
    E: int,
    itemsize: int,
    of_hidden: bool,
    of_weight: bool,
    of_bias: bool,
    config: configs.LinearCrossEntropyConfig,
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
