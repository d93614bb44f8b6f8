"""From pixels to patch tokens: the public function, its torch op, and the ways to a kernel.

user -> patch_embed -> gpt4v_fast::patch_embed -> _C.patch_embed_forward (csrc/patch_embed/patch_embed.h)
                                               or _cuda_launcher.patch_embed_forward (csrc/cuda/patch_embed.cu)
                                               or reference.patch_tokens
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from gpt4v_fast import _cuda_launcher, backends, reference
from gpt4v_fast._native import _C, threads, view
from gpt4v_fast.ops import checks, library

PIXEL_DTYPES = (torch.uint8, *checks.FLOAT_DTYPES)
PerChannel = float | Sequence[float] | torch.Tensor | None


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
    return _patch_embed_op(*prepare(pixels, weight, bias, mean, std, rescale, pos_embed, out_dtype))


def prepare(
    pixels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    mean: PerChannel = None,
    std: PerChannel = None,
    rescale: float | None = None,
    pos_embed: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Any, ...]:
    """Checks `patch_embed`'s arguments and returns those of the torch op."""
    checks.check_tensor("pixels", pixels, dtypes=PIXEL_DTYPES)
    checks.check_tensor("weight", weight)
    if pixels.dim() not in (4, 5):
        raise ValueError(f"pixels: expected (B, C, H, W) or (B, C, frames, H, W), got shape {tuple(pixels.shape)}")
    check_weight(weight, pixels.shape[1], pixels.dim())
    checks.check_device("weight", weight, "pixels", pixels)
    grid = patch_grid("pixels", tuple(pixels.shape[2:]), tuple(weight.shape[2:]))
    scale, shift = pixel_transform(pixels, pixels.shape[1], mean, std, rescale)
    check_bias(bias, weight)
    weight, bias = library.autocast(weight, bias)
    if pos_embed is not None:
        pos_embed = check_positions(pos_embed, weight, math.prod(grid))
    if pixels.dim() == 4:
        pixels, weight = pixels.unsqueeze(2), weight.unsqueeze(2)
    return pixels, weight, bias, scale, shift, pos_embed, check_out_dtype(out_dtype, weight)


def check_weight(weight: torch.Tensor, C: int, ndim: int) -> None:
    if weight.dim() != ndim:
        expected = "(E, C, P, P)" if ndim == 4 else "(E, C, Pt, P, P)"
        raise ValueError(f"weight: expected {expected} for {ndim}-dimensional pixels, got shape {tuple(weight.shape)}")
    if weight.shape[1] != C:
        raise ValueError(f"weight: expected {C} channels as in pixels, got shape {tuple(weight.shape)}")
    if min(weight.shape[2:]) < 1:
        raise ValueError(f"weight: expected patch sides of at least 1, got shape {tuple(weight.shape)}")


def patch_grid(name: str, sizes: tuple[int, ...], patch: tuple[int, ...]) -> tuple[int, ...]:
    """Patches along each axis; raises unless they tile the image."""
    axes = ("frames", "height", "width")[-len(sizes) :]
    for axis, size, side in zip(axes, sizes, patch, strict=True):
        if size % side:
            raise ValueError(f"{name}: expected a {axis} divisible by the patch's {side}, got {size}")
    return tuple(size // side for size, side in zip(sizes, patch, strict=True))


def check_bias(bias: torch.Tensor | None, weight: torch.Tensor) -> None:
    if bias is None:
        return
    checks.check_tensor("bias", bias)
    checks.check_device("bias", bias, "weight", weight)
    checks.check_shape("bias", bias, (weight.shape[0],), "(E,)")


def check_positions(pos_embed: torch.Tensor, weight: torch.Tensor, N: int) -> torch.Tensor:
    """pos_embed as (N, E)."""
    checks.check_tensor("pos_embed", pos_embed)
    checks.check_device("pos_embed", pos_embed, "weight", weight)
    if pos_embed.dim() == 3 and pos_embed.shape[0] == 1:
        pos_embed = pos_embed.squeeze(0)
    checks.check_shape("pos_embed", pos_embed, (N, weight.shape[0]), "(N, E) or (1, N, E) with (N, E) =")
    return pos_embed


def check_out_dtype(out_dtype: torch.dtype | None, weight: torch.Tensor) -> torch.dtype:
    if out_dtype is None:
        return weight.dtype
    if out_dtype not in checks.FLOAT_DTYPES:
        raise TypeError(f"out_dtype: expected {checks.names(checks.FLOAT_DTYPES)}, got {out_dtype}")
    return out_dtype


def pixel_transform(
    pixels: torch.Tensor, C: int, mean: PerChannel, std: PerChannel, rescale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """scale = rescale / std and shift = -mean / std, each (C,) fp32: normalise(x) = x scale + shift."""
    if rescale is None:
        rescale = 1.0 if pixels.is_floating_point() else 1 / 255
    elif isinstance(rescale, bool) or not isinstance(rescale, (int, float)):
        raise TypeError(f"rescale: expected a number or None, got {type(rescale).__name__}")
    elif not math.isfinite(rescale):
        raise ValueError(f"rescale: expected a finite number, got {rescale}")
    center = _per_channel("mean", mean, 0.0, C, pixels.device)
    spread = _per_channel("std", std, 1.0, C, pixels.device)
    return (rescale / spread).float().expand(C), (-center / spread).float().expand(C)


def _per_channel(name: str, value: PerChannel, default: float, C: int, device: torch.device) -> torch.Tensor:
    """(C,) or (1,) in fp64, on `device`."""
    wanted = "finite numbers other than 0" if name == "std" else "finite numbers"
    if isinstance(value, torch.Tensor):
        checks.check_tensor(name, value, dtypes=(torch.float64, *checks.FLOAT_DTYPES))
        if value.numel() != 1 and value.numel() != C:
            raise ValueError(f"{name}: expected 1 or {C} elements, one per channel, got shape {tuple(value.shape)}")
        if value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: expected a tensor that needs no gradient, got one that does")
        # On a GPU nobody looks: reading the tensor would wait for the device.
        is_seen = value.device.type == "cpu" and not torch.compiler.is_compiling()
        if is_seen and not (value.isfinite().all() and (name != "std" or value.all())):
            raise ValueError(f"{name}: expected {wanted}, got {value.tolist()}")
        return value.reshape(-1).to(device=device, dtype=torch.float64)
    numbers = [default] if value is None else [value] if isinstance(value, (int, float)) else list(value)
    if any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in numbers):
        raise TypeError(f"{name}: expected a number, a sequence of numbers or a tensor, got {value!r}")
    if len(numbers) != 1 and len(numbers) != C:  # not `in`: under torch.compile C may be symbolic
        raise ValueError(f"{name}: expected 1 or {C} numbers, one per channel, got {len(numbers)}")
    if not all(math.isfinite(x) for x in numbers) or (name == "std" and 0.0 in numbers):
        raise ValueError(f"{name}: expected {wanted}, got {value}")
    return torch.tensor(numbers, dtype=torch.float64, device=device)


def _request(*args: Any, **kwargs: Any) -> backends.Request:
    pixels, weight, *_ = prepare(*args, **kwargs)
    return describe(pixels, weight)


def describe(pixels: torch.Tensor, weight: torch.Tensor) -> backends.Request:
    """What `backends.pick` needs to know of a call of `patch_embed`."""
    return backends.Request("patch_embed", pixels.device.type, weight.dtype)


backends.register_kernel("patch_embed", "cpu", "_C.patch_embed")
backends.register_kernel(
    "patch_embed",
    "cuda",
    "_cuda.patch_embed (backward: torch's unfold and matmul)",
    lambda request: _cuda_launcher.missing(),
)
backends.register_explainer(patch_embed, _request)


def _patch_embed(
    pixels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    pixel_scale: torch.Tensor,
    pixel_shift: torch.Tensor,
    pos_embed: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    tensors = (pixels, weight, bias, pixel_scale, pixel_shift, pos_embed)
    backend = backends.pick(describe(pixels, weight)).backend
    if backend == "reference":
        normalised = _normalise(pixels.float(), pixel_scale, pixel_shift)
        bias, pos_embed = (None if x is None else x.float() for x in (bias, pos_embed))
        return reference.patch_tokens(normalised, weight.float(), bias, pos_embed).to(out_dtype)
    tokens = _patch_embed_fake(*tensors, out_dtype)
    if backend == "cuda":
        _cuda_launcher.patch_embed_forward(*tensors, tokens)
    else:
        _C.patch_embed_forward(*(view(x) for x in (*tensors, tokens)), threads())
    return tokens


def _normalise(pixels: torch.Tensor, pixel_scale: torch.Tensor, pixel_shift: torch.Tensor) -> torch.Tensor:
    return pixels * pixel_scale.view(-1, 1, 1, 1) + pixel_shift.view(-1, 1, 1, 1)


def _patch_embed_backward(
    grad_tokens: torch.Tensor,
    pixels: torch.Tensor,
    weight: torch.Tensor,
    pixel_scale: torch.Tensor,
    pixel_shift: torch.Tensor,
    needs_weight: bool,
    needs_pixels: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    absent = weight.new_empty(0)
    if backends.pick(describe(pixels, weight)).backend != "cpu":
        with torch.enable_grad():
            leaves = [x.detach().float().requires_grad_() for x in (weight, pixels)]
            tokens = reference.patch_tokens(_normalise(leaves[1], pixel_scale, pixel_shift), leaves[0], None, None)
        needed = [leaf for leaf, needs in zip(leaves, (needs_weight, needs_pixels), strict=True) if needs]
        found = iter(torch.autograd.grad(tokens, needed, grad_tokens.float()))
        grad_weight = next(found) if needs_weight else absent
        grad_pixels = next(found) if needs_pixels else absent
    else:
        grad_weight = torch.empty(weight.shape, dtype=torch.float32) if needs_weight else absent
        grad_pixels = torch.empty(pixels.shape, dtype=pixels.dtype) if needs_pixels else absent
        wanted = (grad_weight if needs_weight else None, grad_pixels if needs_pixels else None)
        tensors = (pixels, weight, pixel_scale, pixel_shift, grad_tokens, *wanted)
        _C.patch_embed_backward(*(view(x) for x in tensors), threads())
    return grad_weight.to(weight.dtype), grad_pixels.to(pixels.dtype) if needs_pixels else weight.new_empty(0)


def _patch_embed_fake(
    pixels: torch.Tensor,
    weight: torch.Tensor,
    bias: Any,
    pixel_scale: Any,
    pixel_shift: Any,
    pos_embed: Any,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    N = math.prod(size // side for size, side in zip(pixels.shape[2:], weight.shape[2:], strict=True))
    return weight.new_empty(pixels.shape[0], N, weight.shape[0], dtype=out_dtype)


def _patch_embed_backward_fake(
    grad_tokens: Any,
    pixels: torch.Tensor,
    weight: torch.Tensor,
    pixel_scale: Any,
    pixel_shift: Any,
    needs_weight: bool,
    needs_pixels: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    grad_weight = weight.new_empty(weight.shape if needs_weight else 0)
    return grad_weight, pixels.new_empty(pixels.shape) if needs_pixels else weight.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    pixels, weight, bias, pixel_scale, pixel_shift, pos_embed, _ = inputs
    ctx.save_for_backward(pixels, weight, pixel_scale, pixel_shift)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.pos_dtype = None if pos_embed is None else pos_embed.dtype


def _autograd(ctx: Any, grad_tokens: torch.Tensor) -> tuple[Any, ...]:
    needs_pixels, needs_weight, needs_bias, _, _, needs_pos, _ = ctx.needs_input_grad
    grad_weight = grad_pixels = grad_bias = grad_pos = None
    if needs_weight or needs_pixels:
        needed = (needs_weight, needs_pixels)
        gradients = _patch_embed_backward_op(grad_tokens, *ctx.saved_tensors, *needed)
        grad_weight, grad_pixels = (g if needs else None for g, needs in zip(gradients, needed, strict=True))
    if needs_bias:
        grad_bias = grad_tokens.sum((0, 1), dtype=torch.float32).to(ctx.bias_dtype)
    if needs_pos:
        grad_pos = grad_tokens.sum(0, dtype=torch.float32).to(ctx.pos_dtype)
    return grad_pixels, grad_weight, grad_bias, None, None, grad_pos, None


_patch_embed_op = library.define_op(
    "patch_embed(Tensor pixels, Tensor weight, Tensor? bias, Tensor pixel_scale, Tensor pixel_shift, "
    "Tensor? pos_embed, ScalarType out_dtype) -> Tensor",
    _patch_embed,
    _patch_embed_fake,
    setup_context=_setup_context,
    backward=_autograd,
)
_patch_embed_backward_op = library.define_op(
    "patch_embed_backward(Tensor grad_tokens, Tensor pixels, Tensor weight, Tensor pixel_scale, Tensor pixel_shift, "
    "bool needs_weight, bool needs_pixels) -> (Tensor, Tensor)",
    _patch_embed_backward,
    _patch_embed_backward_fake,
    gradient_of="patch_embed",
)
