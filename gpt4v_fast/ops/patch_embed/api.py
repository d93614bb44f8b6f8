"""From pixels to patch tokens: the public function and its call object.

user -> patch_embed -> PatchEmbedCall -> gpt4v_fast::patch_embed
                           -> cpu.py        _C.patch_embed_forward (csrc/patch_embed/)
                           or cuda.py       csrc/cuda/patch_embed.cu
                           or reference.py  the oracle
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from gpt4v_fast import backends
from gpt4v_fast._native import _C
from gpt4v_fast.ops import checks, library, modes
from gpt4v_fast.ops.patch_embed import cpu, cuda, reference
from gpt4v_fast.ops.patch_embed.arguments import (
    PIXEL_DTYPES,
    PerChannel,
    check_bias,
    check_out_dtype,
    check_positions,
    check_weight,
    patch_grid,
    pixel_transform,
)


class _PatchEmbedFields(NamedTuple):
    pixels: torch.Tensor  # (B, C, frames, H, W), frames 1 for still images; uint8 or float
    weight: torch.Tensor  # (E, C, Pt, Ph, Pw)
    bias: torch.Tensor | None  # (E,)
    pixel_scale: torch.Tensor  # (C,) fp32, rescale / std
    pixel_shift: torch.Tensor  # (C,) fp32, -mean / std
    pos_embed: torch.Tensor | None  # (N, E)
    out_dtype: torch.dtype


class PatchEmbedCall(backends.Call, _PatchEmbedFields):
    """A checked call of `patch_embed` or `patch_embed_packed`: normalise(x) = x pixel_scale + pixel_shift."""

    __slots__ = ()
    MAIN = "weight"
    op = "patch_embed"

    @property
    def N(self) -> int:
        """Tokens of an image."""
        sizes = zip(self.pixels.shape[2:], self.weight.shape[2:], strict=True)
        return math.prod(size // side for size, side in sizes)


class PatchEmbedOutputs(NamedTuple):
    tokens: torch.Tensor  # (B, N, E)


@backends.explained
def patch_embed(
    pixels: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    mean: PerChannel = None,
    std: PerChannel = None,
    rescale: float | None = None,
    pos_embed: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Normalises images and turns each patch into a token, without writing the normalised image.

        tokens[b, n, e] = sum_k weight[e, k] ((x[b, n, k] rescale - mean[c(k)]) / std[c(k)]) + bias[e] + pos_embed[n, e]

    x[b, n, k] is element k of patch n; the patches tile the image row by row. This is a convolution whose stride is
    its kernel, `conv(normalise(pixels)).flatten(2).transpose(1, 2) + pos_embed`. Sums are fp32.

    Args:
        pixels: (B, C, H, W), or (B, C, frames, H, W) for video; uint8, fp32, bf16 or fp16; any strides (channels last
            is a permuted view). H, W and frames are multiples of the patch's sides.
        weight: (E, C, Ph, Pw), or (E, C, Pt, Ph, Pw) for video; fp32, bf16 or fp16, any strides.
        bias: (E,), any of these float dtypes.
        mean, std: a number, C numbers, or a tensor of one or C; None: 0 and 1. Constants: no gradient reaches them.
        rescale: factor of the pixels before mean and std; None: 1/255 for uint8, 1 for floats.
        pos_embed: (N, E) or (1, N, E), any of these float dtypes, added to the tokens of every image.
        out_dtype: fp32, bf16 or fp16; None: weight's.

    Returns:
        tokens (B, N, E) in out_dtype. Gradients reach weight, bias, pos_embed and, where they are floats, pixels.

    Raises:
        TypeError, ValueError: an argument of a wrong kind, dtype, shape or device; the message names it.
        FallbackError: in strict mode, when no fast kernel takes the call.

    Source: An Image is Worth 16x16 Words (Dosovitskiy et al. 2020), equation 1; ViViT (Arnab et al. 2021) for video.
    """
    checks.check_tensor("pixels", pixels, dtypes=PIXEL_DTYPES)
    checks.check_tensor("weight", weight)
    if pixels.dim() not in (4, 5):
        raise ValueError(f"pixels: expected (B, C, H, W) or (B, C, frames, H, W), got shape {tuple(pixels.shape)}")
    check_weight(weight, pixels, pixels.dim())
    checks.check_device("weight", weight, "pixels", pixels)
    grid = patch_grid("pixels", tuple(pixels.shape[2:]), tuple(weight.shape[2:]))
    scale, shift = pixel_transform(pixels, pixels.shape[1], mean, std, rescale)
    check_bias(bias, weight)
    weight, bias = modes.autocast(weight, bias)
    if pos_embed is not None:
        pos_embed = check_positions(pos_embed, weight, math.prod(grid))
    if pixels.dim() == 4:
        pixels, weight = pixels.unsqueeze(2), weight.unsqueeze(2)
    call = PatchEmbedCall(pixels, weight, bias, scale, shift, pos_embed, check_out_dtype(out_dtype, weight))
    return _patch_embed_op(call).tokens


def _fake(call: PatchEmbedCall) -> PatchEmbedOutputs:
    shape = (call.pixels.shape[0], call.N, call.weight.shape[0])
    return PatchEmbedOutputs(call.weight.new_empty(shape, dtype=call.out_dtype))


def _backward(call: PatchEmbedCall, saved: Any, upstream: Any, wanted: Any) -> dict[str, torch.Tensor | None]:
    grad_tokens, gradients = upstream.tokens, {}
    if wanted.weight or wanted.pixels:
        gradients = backends.pick(call, again=True).backward(call, saved, upstream, wanted)
    if call.bias is not None and wanted.bias:
        gradients["bias"] = grad_tokens.sum((0, 1), dtype=torch.float32).to(call.bias.dtype)
    if call.pos_embed is not None and wanted.pos_embed:
        gradients["pos_embed"] = grad_tokens.sum(0, dtype=torch.float32).to(call.pos_embed.dtype)
    return gradients


backends.register("patch_embed", cpu.PatchEmbed(), cuda.PatchEmbed(), reference.PatchEmbed())
_C.read_patch_embed_calls(PatchEmbedCall._fields)
_patch_embed_op = library.define(
    "patch_embed",
    PatchEmbedCall,
    PatchEmbedOutputs,
    run=lambda call: PatchEmbedOutputs(backends.pick(call).forward(call)),
    fake=_fake,
    gradient=library.Gradient(
        run=_backward,
        of=("pixels", "weight", "bias", "pos_embed"),
        saves=(),
        constants=(),
        function="patch_embed",
    ),
)
