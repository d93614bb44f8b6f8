"""Gradients of the projection to the vocabulary and its cross-entropy in Triton, from hidden, weight and lse.

    G = gradient of the logits;   dh = G weight,   dW = G^T hidden,   db = sum of G over tokens

Logits are computed again in registers and turned into G there; what is written is G alone, in hidden's dtype, for a
chunk of tokens and classes of at most plans.GRADIENT_BYTES, which the two products then read. Rejected: no G at all.
A product's sums over all E columns do not fit registers, so each piece of 256 columns would need logits of its own:
2 N V E (E / 256) flops more for each of the two products, where G costs 6 bytes a logit. Rejected too: atomics in place
of chunks (cut cross-entropy), whose sums differ from run to run.

In fp16 G is scaled by a power of two, or small probabilities would be subnormal there. Sums over several chunks are
fp32: a 16-bit gradient holds their upper half until the last chunk, a scratch tensor the lower.
`plans.sweeps` bounds all scratch. Tokens that do not count are in no product.
Flops: 6 C V E for C counted tokens, 8 where hidden's and weight's gradients need a sweep of their own.
"""

from __future__ import annotations

import dataclasses

import torch

from gpt4v_fast.kernels import configs
from gpt4v_fast.kernels.common import Relaunch, launch_options, on_device, target_arch
from gpt4v_fast.kernels.loss import plans
from gpt4v_fast.kernels.loss.cross_entropy import ClassWeights, Loss, class_weights
from gpt4v_fast.kernels.loss.linear_cross_entropy_gradients import (
    OfRows,
    _linear_cross_entropy_grad_bias_kernel,
    _linear_cross_entropy_grad_hidden_kernel,
    _linear_cross_entropy_grad_weight_kernel,
    _linear_cross_entropy_gradient_kernel,
)
from gpt4v_fast.kernels.loss.linear_cross_entropy_products import gradient_scales
from gpt4v_fast.kernels.loss.linear_cross_entropy_tiles import (
    VECTOR,
    Inputs,
    Product,
    Tokens,
    inputs,
    list_rows,
    product,
)
from gpt4v_fast.kernels.loss.sums import Destination, Sums

_BIAS_BLOCK = 128  # classes of a program that adds up the bias gradient


@dataclasses.dataclass(frozen=True)
class Call:
    """What all launches of one backward pass share."""

    tensors: Inputs
    bias: torch.Tensor | None
    listed: Tokens
    class_weights: ClassWeights
    of_rows: OfRows
    scales: torch.Tensor | None  # of G in fp16, and its inverse
    loss: Loss
    numbers: tuple[float, float]  # label_smoothing, softcap
    ignore_index: int
    arch: str
    config: configs.LinearCrossEntropyConfig
    relaunch: Relaunch = dataclasses.field(default_factory=Relaunch)

    def product(self, tile: configs.ProductTile) -> Product:
        return product(tile, self.tensors, self.arch)

    def destination(self, out: torch.Tensor, lower: torch.Tensor) -> Destination:
        halves = out.element_size() == 2
        scales = out if self.scales is None else self.scales
        return Destination(out, out.view(torch.int16) if halves else out, lower, scales)

    def sums(self, out: torch.Tensor, ends: tuple[bool, bool]) -> Sums:
        return Sums(self.scales is not None, ends != (True, True), out.element_size() == 2)


def linear_cross_entropy_backward(
    grad_nll: torch.Tensor,
    grad_lse: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    lse: torch.Tensor,
    *,
    of_hidden: bool,
    of_weight: bool,
    of_bias: bool,
    class_weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The gradients of hidden and weight (their dtype) and of bias (fp32); None for one that is not asked for.

    lse as `linear_cross_entropy_forward` gave it. A token whose label is ignore_index gets zeros. One whose label is
    outside [0, V) gets NaN, and so do weight and bias, which sum over it.
    """
    (N, E), V = hidden.shape, weight.shape[0]
    of_bias = of_bias and bias is not None
    slopes = (grad_nll, grad_lse)
    grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if of_hidden else None
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if of_weight else None
    grad_bias = hidden.new_zeros(V, dtype=torch.float32) if of_bias else None
    if N == 0:
        return grad_hidden, None if grad_weight is None else grad_weight.zero_(), grad_bias
    with on_device(hidden):
        listed = list_rows(target.contiguous(), V, ignore_index, target_arch())
        call = the_call(
            slopes, hidden, weight, bias, lse, listed, class_weight=class_weight, ignore_index=ignore_index,
            label_smoothing=label_smoothing, softcap=softcap,
        )  # fmt: skip
        sizes = (N, V, E, hidden.element_size())
        for sweep in plans.sweeps(*sizes, of_hidden, of_weight, of_bias, call.config):
            run_sweep(
                call, sweep,
                grad_hidden if sweep.of_hidden else None, grad_weight if sweep.of_weight else None,
                grad_bias if sweep.of_bias else None,
            )  # fmt: skip
    return grad_hidden, grad_weight, grad_bias


def the_call(
    slopes: tuple[torch.Tensor, torch.Tensor],
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lse: torch.Tensor,
    listed: Tokens,
    *,
    class_weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None = None,
) -> Call:
    """`slopes`: grad_nll and grad_lse; `listed`: what list_rows gave."""
    arch = target_arch()
    rich = label_smoothing != 0.0 or any(x is not None for x in (bias, class_weight, softcap))
    config = configs.linear_cross_entropy(arch, hidden.dtype, hidden.shape[1], rich)
    scales = gradient_scales(*slopes, hidden, listed.target, class_weight, ignore_index)
    return Call(
        inputs(hidden, weight), None if bias is None else bias.to(torch.float32).contiguous(), listed,
        class_weights(hidden, class_weight), OfRows(*(x.to(torch.float32).contiguous() for x in (lse, *slopes))),
        scales, Loss(class_weight is not None, label_smoothing != 0.0, softcap is not None),
        (label_smoothing, softcap or 0.0), ignore_index, arch, config,
    )  # fmt: skip


def run_sweep(
    call: Call,
    sweep: plans.Sweep,
    grad_hidden: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
    grad_bias: torch.Tensor | None,
) -> None:
    """Adds the chunks of one sweep up in the gradients that are given."""
    hidden, weight = call.tensors.hidden.pointer, call.tensors.weight.pointer
    E, V, config = hidden.shape[1], weight.shape[0], call.config
    last = sweep.first + sweep.sizes[0]
    gradient = hidden.new_empty(sweep.tokens * sweep.classes)
    bias_sums = hidden.new_empty(sweep.tokens // config.gradient.block_m * sweep.classes, dtype=torch.float32)
    lower_hidden, lower_weight = (hidden.new_empty(n, E, dtype=torch.int16) for n in sweep.lower_halves)
    for first_slot, first_class in sweep.chunks:
        tokens = min(sweep.tokens, last - first_slot)
        classes = sweep.rounded(min(sweep.classes, V - first_class))
        chunk = (first_slot, first_class, tokens, classes)
        launch_gradient(call, chunk, gradient, bias_sums, grad_bias)
        if grad_hidden is not None:
            lower = lower_hidden[first_slot - sweep.first if sweep.keeps_all_tokens else 0 :]
            ends = first_class == 0, first_class + classes >= V
            launch_grad_hidden(call, chunk, ends, gradient, grad_hidden, (lower, lower, tokens))
        if grad_weight is not None:
            ends = first_slot == sweep.first, first_slot + tokens >= last
            launch_grad_weight(call, chunk, ends, gradient, grad_weight, lower_weight)


_Chunk = tuple[int, int, int, int]  # first token of the list, first class, tokens, classes


def launch_gradient(
    call: Call, chunk: _Chunk, gradient: torch.Tensor, bias_sums: torch.Tensor, grad_bias: torch.Tensor | None
) -> None:
    tile, tensors = call.config.gradient, call.tensors
    hidden, weight = tensors.hidden, tensors.weight
    V, (first_slot, first_class, tokens, classes) = weight.pointer.shape[0], chunk
    call.relaunch(
        _linear_cross_entropy_gradient_kernel, -(-tokens // tile.block_m) * (classes // tile.block_v),
        hidden, weight, hidden.pointer if call.bias is None else call.bias, call.listed, call.class_weights,
        call.of_rows, hidden.pointer if call.scales is None else call.scales, gradient, bias_sums,
        tensors.depth, V, first_slot, first_class, tokens, classes // VECTOR.value, *call.numbers,
        HAS_BIAS=call.bias is not None, BIAS_SUMS=grad_bias is not None, SCALED=call.scales is not None,
        PRODUCT=call.product(tile), LOSS=call.loss, **tile.launch_options, **launch_options(call.arch),
    )  # fmt: skip
    if grad_bias is not None:
        call.relaunch(
            _linear_cross_entropy_grad_bias_kernel, -(-classes // _BIAS_BLOCK),
            bias_sums, call.listed.counts, grad_bias, V, first_slot, first_class, tokens, classes,
            TOKENS=tile.block_m, BLOCK=_BIAS_BLOCK, num_warps=4, **launch_options(call.arch),
        )  # fmt: skip


def launch_grad_hidden(
    call: Call,
    chunk: _Chunk,
    ends: tuple[bool, bool],
    gradient: torch.Tensor,
    out: torch.Tensor,
    lower: tuple[torch.Tensor, torch.Tensor, int],
) -> None:
    """`lower`: where lower halves of sums are, for the first tokens and for the others, and how many come first."""
    tensors = call.tensors
    (N, E), V = tensors.hidden.pointer.shape, tensors.weight.pointer.shape[0]
    tile = call.config.of_hidden(chunk[2], E)
    call.relaunch(
        _linear_cross_entropy_grad_hidden_kernel, -(-chunk[2] // tile.block_m) * -(-E // tile.block_e),
        gradient, tensors.weight, call.listed, call.destination(out, lower[0]), lower[1],
        tensors.depth, N, V, *chunk[:3], chunk[3] // VECTOR.value, lower[2], call.ignore_index, *map(int, ends),
        RAGGED=min(chunk[3], V - chunk[1]) % tile.block_v != 0, PRODUCT=call.product(tile), SUMS=call.sums(out, ends),
        **tile.launch_options, **launch_options(call.arch),
    )  # fmt: skip


def launch_grad_weight(
    call: Call, chunk: _Chunk, ends: tuple[bool, bool], gradient: torch.Tensor, out: torch.Tensor, lower: torch.Tensor
) -> None:
    tile, tensors = call.config.grad_weight, call.tensors
    V, E = tensors.weight.pointer.shape
    call.relaunch(
        _linear_cross_entropy_grad_weight_kernel, chunk[3] // tile.block_v * -(-E // tile.block_e),
        gradient, tensors.hidden, call.listed, call.destination(out, lower),
        tensors.depth, tensors.hidden.pointer.shape[0], V, *chunk[:3], chunk[3] // VECTOR.value, *map(int, ends),
        PRODUCT=call.product(tile), SUMS=call.sums(out, ends), **tile.launch_options, **launch_options(call.arch),
    )  # fmt: skip
