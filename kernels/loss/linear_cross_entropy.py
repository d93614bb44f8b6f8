"""The projection to the vocabulary and its cross-entropy in Triton, forward: logits live in registers, never in memory.

    x = hidden weight^T + bias;   z, lse and nll of x as in kernels/loss/cross_entropy.py

Tokens that count are listed first, by one program on the device: nobody waits for their number. A program of the
forward kernel owns BLOCK_M tokens of the list and a range of the vocabulary (a split). It walks over its classes in
tiles of BLOCK_V: a product over the depth, BLOCK_E at a time, then one step of the online log-sum-exp on the tile
(Milakov and Gimelshein, 2018). A second kernel merges the splits in their order. Programs behind the last counted token
end at once, so ignored tokens cost a launch and no product. Nothing is added by atomics and nobody spins on a lock:
results are the same bits each run.

Flops: 2 C V E for C counted tokens. Bytes: per split and token 12 (16 with smoothing) of statistics; GROUP blocks of
tokens walk over the same classes at the same time, so weight is read C / (BLOCK_M GROUP) times from memory and else
from L2.

Two more modules are ways of the same op: linear_cross_entropy_kept.py keeps logits for backward where it can,
linear_cross_entropy_products.py writes all of them. Each of the three has `linear_cross_entropy_forward` and
`linear_cross_entropy_backward` with the same arguments; the kept way's forward also returns what it keeps, which its
backward takes as `kept`.

Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (2024), for the log-sum-exp in tiles of
the product. Theirs merges tiles under a lock; here the order of additions depends on the shapes alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from gpt4v_fast.kernels import configs
from gpt4v_fast.kernels.common import LN2, LOG2E, halves, launch_options, on_device, target_arch
from gpt4v_fast.kernels.loss import plans
from gpt4v_fast.kernels.loss.cross_entropy import Loss, capped, class_weights, no_loss_at_infinity
from gpt4v_fast.kernels.loss.linear_cross_entropy_backward import linear_cross_entropy_backward
from gpt4v_fast.kernels.loss.linear_cross_entropy_tiles import (
    VECTOR,
    Tokens,
    grouped,
    inputs,
    list_rows,
    logits_tile,
    product,
)

__all__ = ["linear_cross_entropy_backward", "linear_cross_entropy_forward", "linear_cross_entropy_forward_keeping"]

_LN2 = tl.constexpr(LN2)
_LOG2E = tl.constexpr(LOG2E)
_STEPS = tl.constexpr(512.0)  # of a kept logit, in an octave
_MERGE_BLOCK = 128  # tokens of a merging program


@triton.jit
def kept_places(slots, start, stop, E, vectors, whole, BLOCK_V: tl.constexpr):
    """(base, places, in_row): where the kept logits of these slots and of classes start.. are (plans.Kept), counted
    from element `base`, and which of the columns a row has."""
    classes = vectors * VECTOR
    chunk = start // classes
    width = tl.where(chunk < whole, classes, tl.cdiv(stop - whole * classes, VECTOR) * VECTOR)
    inside = start - chunk * classes + tl.arange(0, BLOCK_V)
    places = slots[:, None] * width + inside[None, :]
    return tl.cast(chunk, tl.int64) * classes * E, places, inside // VECTOR < width // VECTOR


@triton.jit
def _keep_columns(x, origin, slots, start, stop, E, kept_ptr, vectors, whole):
    base, places, in_row = kept_places(slots, start, stop, E, vectors, whole, x.shape[1])
    steps = tl.minimum(tl.maximum((origin[:, None] - x) * (_STEPS * _LOG2E) + 0.5, 0.0), 65535.0)
    tl.store(kept_ptr + base + places, steps.to(tl.int32).to(tl.int16), mask=in_row[None, :])


@triton.jit
def _keep_half(x, origin, slots, start, stop, E, kept_ptr, vectors, whole):
    left, right = halves(x)
    _keep_columns(left, origin, slots, start, stop, E, kept_ptr, vectors, whole)
    _keep_columns(right, origin, slots, start + x.shape[1] // 2, stop, E, kept_ptr, vectors, whole)


@triton.jit
def _keep_logits(x, largest, slots, start, stop, E, kept, tokens, vectors, whole, BLOCK_V: tl.constexpr):
    """A tile of logits as 16-bit steps of 2^-9 octaves below the largest of each token: see plans.Kept. Of slots
    without a token too, which have room in a whole block and are made zeros later."""
    origin = tl.where(tl.abs(largest) == float("inf"), 0.0, largest)
    tl.store(kept.origins + tl.cast(start // BLOCK_V, tl.int64) * tokens + slots, origin)
    if BLOCK_V > 128:  # by quarters, or there would not be registers for their places
        left, right = halves(x)
        _keep_half(left, origin, slots, start, stop, E, kept.logits, vectors, whole)
        _keep_half(right, origin, slots, start + BLOCK_V // 2, stop, E, kept.logits, vectors, whole)
    else:
        _keep_columns(x, origin, slots, start, stop, E, kept.logits, vectors, whole)


@triton.jit
def _moved(sums, largest, origin, new_origin):
    """Sums of exp(z - origin) with new_origin in its place; 0 where the largest logit is -inf: nothing was added."""
    return tl.where(largest == float("-inf"), 0.0, sums * tl.exp2((origin - new_origin) * _LOG2E))


@triton.jit
def _origin(largest, softcap, SOFTCAP: tl.constexpr):
    """Where exponents are counted from: the largest z, or 0 for a row of infinities, whose exp(z - 0) exists."""
    return tl.where(tl.abs(largest) == float("inf"), 0.0, capped(largest, softcap, SOFTCAP))


@triton.jit(do_not_specialize=["N", "V", "splits", "tiles_per_split", "tokens", "vectors", "whole", "stop"])
def _linear_cross_entropy_forward_kernel(
    hidden, weight, bias_ptr, listed, class_weight_ptr, statistics, kept,
    depth, N, V, splits, tiles_per_split, tokens, vectors, whole, stop, softcap,
    HAS_BIAS: tl.constexpr, EVEN_V: tl.constexpr, KEEPS: tl.constexpr, PRODUCT: tl.constexpr, LOSS: tl.constexpr,
):  # fmt: skip
    """A block of counted tokens and a split of the classes: largest logit and its first column, sum of exp(z - its z),
    with smoothing the sum of w z; each at [split, token of the list]. The logit of a label goes to [token]. Logits of
    the first tokens and classes are kept if asked for."""
    BLOCK_M: tl.constexpr = PRODUCT.BLOCK_M
    BLOCK_V: tl.constexpr = PRODUCT.BLOCK_V
    SOFTCAP: tl.constexpr = LOSS.SOFTCAP
    count = tl.load(listed.counts).to(tl.int32)
    blocks = tl.cdiv(count, BLOCK_M)
    program = tl.program_id(0)
    if program >= blocks * splits:
        return
    block, split = grouped(program, blocks, splits, PRODUCT.GROUP)
    slots = block * BLOCK_M + tl.arange(0, BLOCK_M)
    live = slots < count
    rows = tl.load(listed.rows + tl.minimum(slots, count - 1))  # those behind the last repeat it
    target = tl.load(listed.target + rows).to(tl.int32)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK_M,), tl.float32)
    smooth = tl.zeros((BLOCK_M,), tl.float32)
    label = tl.zeros((BLOCK_M,), tl.float32)
    best = tl.zeros((BLOCK_M,), tl.int32)
    first = split * tiles_per_split * BLOCK_V
    last = tl.minimum(first + tiles_per_split * BLOCK_V, V)
    for start in tl.range(first, last, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        valid = (columns < V)[None, :]
        x = logits_tile(hidden, weight, bias_ptr, rows, columns, depth, V, HAS_BIAS, PRODUCT)
        if not EVEN_V:
            x = tl.where(valid, x, float("-inf"))  # (BLOCK_M, BLOCK_V)
        # Few tiles hold a label, and looking for one costs three instructions a logit.
        if tl.max(((target >= start) & (target < start + BLOCK_V)).to(tl.int32), 0) > 0:
            label += tl.sum(tl.where(columns[None, :] == target[:, None], x, 0.0), 1)
        tile_largest = tl.max(x, 1)
        at = tl.min(tl.where(x == tile_largest[:, None], columns[None, :], V - 1), 1)
        best = tl.where(tile_largest > largest, at, best)
        new_largest = tl.maximum(largest, tile_largest)
        new_origin = _origin(new_largest, softcap, SOFTCAP)
        sums = _moved(sums, largest, _origin(largest, softcap, SOFTCAP), new_origin)
        largest = new_largest
        z = capped(x, softcap, SOFTCAP)
        # The difference before the factor log2(e), as in kernels/loss/cross_entropy.py: that of neighbours is exact.
        p = tl.exp2((z - new_origin[:, None]) * _LOG2E)
        if SOFTCAP and not EVEN_V:
            p = tl.where(valid, p, 0.0)
        sums += tl.sum(p, 1)
        if LOSS.SMOOTHING:
            if not EVEN_V:
                z = tl.where(valid, z, 0.0)
            if LOSS.HAS_WEIGHT:
                z *= tl.load(class_weight_ptr + columns, mask=columns < V, other=0.0)[None, :]
            smooth += tl.sum(z, 1)
        if KEEPS:  # noqa: SIM102  # the compiler must know this one and can't know the next
            if (block * BLOCK_M < tokens) & (start < stop):
                E = depth * PRODUCT.UNIT
                _keep_logits(x, tile_largest, slots, start, stop, E, kept, tokens, vectors, whole, BLOCK_V)
    place = tl.cast(split, tl.int64) * N + slots
    tl.store(statistics.largest + place, largest, mask=live)
    tl.store(statistics.sums + place, sums, mask=live)
    tl.store(statistics.best + place, best, mask=live)
    if LOSS.SMOOTHING:
        tl.store(statistics.smooth + place, smooth, mask=live)
    tl.store(statistics.label + slots, label, mask=live & (target >= first) & (target < last))


@triton.jit(do_not_specialize=["N", "V", "splits", "ignore_index"])
def _linear_cross_entropy_merge_kernel(
    statistics, listed, weights, nll_ptr, lse_ptr, argmax_ptr, N, V, splits, ignore_index, smoothing, softcap,
    BLOCK: tl.constexpr, LOSS: tl.constexpr,
):  # fmt: skip
    """nll, lse and argmax of each token, from the splits' statistics or from what its label says."""
    SOFTCAP: tl.constexpr = LOSS.SOFTCAP
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = slots < N
    counted = slots < tl.load(listed.counts)
    rows = tl.load(listed.rows + slots, mask=exists, other=0)
    target = tl.load(listed.target + rows, mask=exists, other=0)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    smooth = tl.zeros((BLOCK,), tl.float32)
    best = tl.zeros((BLOCK,), tl.int32)
    for split in tl.range(0, splits):
        place = tl.cast(split, tl.int64) * N + slots
        its_largest = tl.load(statistics.largest + place, mask=counted, other=float("-inf"))
        its_sums = tl.load(statistics.sums + place, mask=counted, other=0.0)
        best = tl.where(its_largest > largest, tl.load(statistics.best + place, mask=counted, other=0), best)
        new_largest = tl.maximum(largest, its_largest)
        new_origin = _origin(new_largest, softcap, SOFTCAP)
        sums = _moved(sums, largest, _origin(largest, softcap, SOFTCAP), new_origin)
        sums += _moved(its_sums, its_largest, _origin(its_largest, softcap, SOFTCAP), new_origin)
        largest = new_largest
        if LOSS.SMOOTHING:
            smooth += tl.load(statistics.smooth + place, mask=counted, other=0.0)
    origin = _origin(largest, softcap, SOFTCAP)
    log_sum = tl.log2(sums) * _LN2
    z = capped(tl.load(statistics.label + slots, mask=counted, other=0.0), softcap, SOFTCAP)
    nll = origin - z + log_sum
    if LOSS.HAS_WEIGHT:
        nll *= tl.load(weights.pointer + target, mask=counted, other=0.0)
    if LOSS.SMOOTHING:
        weight_sum = tl.load(weights.sum) if LOSS.HAS_WEIGHT else V
        nll = (1.0 - smoothing) * nll + smoothing / V * (weight_sum * (origin + log_sum) - smooth)
    nll = no_loss_at_infinity(nll, largest, LOSS)
    elsewise = tl.where(target == ignore_index, 0.0, float("nan"))
    tl.store(nll_ptr + rows, tl.where(counted, nll, elsewise), mask=exists)
    tl.store(lse_ptr + rows, tl.where(counted, origin + log_sum, elsewise), mask=exists)
    tl.store(argmax_ptr + rows, tl.where(counted, best, -1).to(tl.int64), mask=exists)


class Statistics(NamedTuple):
    """Of tokens of the list: [split, token] but for label's."""

    largest: Any  # logit
    sums: Any  # of exp(z - its z)
    smooth: Any  # sum of w z
    best: Any  # the first class with the largest logit
    label: Any  # its logit, [token]


class KeptPointers(NamedTuple):
    logits: Any
    origins: Any


@dataclasses.dataclass
class KeptLogits:
    """What forward keeps for backward, which uses it up."""

    plan: plans.Kept
    memory: torch.Tensor  # (plan.elements,) of hidden's dtype: logits now, the gradient of weight later
    origins: torch.Tensor | None  # (tiles, plan.tokens), fp32
    label: torch.Tensor  # (N,) of the list: the logit of each label, fp32
    listed: Tokens


def kept_layout(plan: plans.Kept) -> tuple[int, int, int, int]:
    """(tokens, vectors of a chunk's row, whole chunks, classes in all) for the kernels."""
    return plan.tokens, plan.classes // VECTOR.value, plan.whole, plan.stop


def linear_cross_entropy_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    *,
    class_weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(nll, lse, argmax) of each row of hidden (N, E) @ weight (V, E)^T + bias (V,); target (N,) int64.

    As `cross_entropy_forward` of the fp32 logits; rows of tokens that do not count are not read.
    """
    return _forward(
        hidden, weight, bias, target, False, class_weight=class_weight, ignore_index=ignore_index,
        label_smoothing=label_smoothing, softcap=softcap,
    )[:3]  # fmt: skip


def linear_cross_entropy_forward_keeping(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, KeptLogits | None]:
    """As `linear_cross_entropy_forward`, and what `linear_cross_entropy_backward_of_kept` goes on from; None where
    nothing can be kept."""
    return _forward(hidden, weight, bias, target, True, **options)


def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    keeps: bool,
    *,
    class_weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, KeptLogits | None]:
    (N, E), V = hidden.shape, weight.shape[0]
    nll, lse, label = (hidden.new_empty(N, dtype=torch.float32) for _ in range(3))
    argmax = hidden.new_empty(N, dtype=torch.int64)
    kept = None
    if N == 0:
        return nll, lse, argmax, kept
    target, tensors = target.contiguous(), inputs(hidden, weight)
    biases = hidden if bias is None else bias.to(torch.float32).contiguous()
    weights = class_weights(hidden, class_weight)
    loss = Loss(class_weight is not None, label_smoothing != 0.0, softcap is not None)
    with on_device(hidden):
        arch = target_arch()
        rich = label_smoothing != 0.0 or any(x is not None for x in (bias, class_weight, softcap))
        config = configs.linear_cross_entropy(arch, hidden.dtype, E, rich)
        tile = config.forward
        plain = bias is None and softcap is None
        plan = plans.kept(N, V, E, hidden.dtype, plain, config) if keeps else None
        splits, tiles_per_split = plans.vocabulary_splits(arch, N, V, tile)
        largest, sums, smooth = (hidden.new_empty(splits, N, dtype=torch.float32) for _ in range(3))
        best = hidden.new_empty(splits, N, dtype=torch.int32)
        statistics = Statistics(largest, sums, smooth, best, label)
        listed = list_rows(target, V, ignore_index, arch)
        places, layout = KeptPointers(best, largest), (0, 1, 0, 0)  # stand-ins that are never touched
        if plan is not None:
            origins = hidden.new_empty(-(-V // tile.block_v), plan.tokens, dtype=torch.float32)
            kept = KeptLogits(plan, hidden.new_empty(plan.elements), origins, label, listed)
            places, layout = KeptPointers(kept.memory.view(torch.int16), origins), kept_layout(plan)
        _linear_cross_entropy_forward_kernel[(-(-N // tile.block_m) * splits,)](
            tensors.hidden, tensors.weight, biases, listed, weights.pointer, statistics, places,
            tensors.depth, N, V, splits, tiles_per_split, *layout, softcap or 0.0,
            HAS_BIAS=bias is not None, EVEN_V=V % tile.block_v == 0, KEEPS=kept is not None,
            PRODUCT=product(tile, tensors, arch), LOSS=loss, **tile.launch_options, **launch_options(arch),
        )  # fmt: skip
        _linear_cross_entropy_merge_kernel[(-(-N // _MERGE_BLOCK),)](
            statistics, listed, weights, nll, lse, argmax, N, V, splits, ignore_index, label_smoothing, softcap or 0.0,
            BLOCK=_MERGE_BLOCK, LOSS=loss, num_warps=4, **launch_options(arch),
        )  # fmt: skip
    return nll, lse, argmax, kept
