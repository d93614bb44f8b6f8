"""Patch embedding cases of bits.py: batches, video, images of different sizes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

import gpt4v_fast as gf

from .bits_inputs import DTYPES, BitsCase, Draw, Tensors, with_gradients

PATCH_OPTIONS: dict[str, dict[str, Any]] = {
    "uint8": {"pixels": torch.uint8},
    "uint8, normalised": {"pixels": torch.uint8, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)},
    "uint8, rescale": {"pixels": torch.uint8, "rescale": 0.01, "mean": 0.5},
    "uint8, channels last": {"pixels": torch.uint8, "layout": "channels last"},
    "uint8, bias, positions": {"pixels": torch.uint8, "bias": True, "positions": True},
    "fp32": {"pixels": torch.float32},
    "bf16": {"pixels": torch.bfloat16},
    "fp16": {"pixels": torch.float16},
    "normalised": {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)},
    "bias": {"bias": True},
    "positions": {"positions": True},
    "channels last": {"layout": "channels last", "bias": True},
    "cropped": {"layout": "cropped", "positions": True},
    "fp32 out": {"out_dtype": torch.float32, "bias": True},
    "bf16 out": {"out_dtype": torch.bfloat16, "positions": True},
    "fp16 out": {"out_dtype": torch.float16},
    "video": {"frames": 4, "bias": True},
    "video, uint8": {"frames": 4, "pixels": torch.uint8, "positions": True, "std": 0.3},
    "forward only": {"bias": True, "positions": True, "forward_only": True},
    "everything": {"mean": 0.4, "std": (0.2, 0.3, 0.25), "bias": True, "positions": True, "out_dtype": torch.float32},
}
PATCH_SIZES = {"odd": (2, 3, 15, 28, 5, 7, 37), "usual": (1, 3, 32, 48, 16, 16, 96)}  # B, C, H, W, Ph, Pw, E


def _pixels(draw: Draw, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return draw.whole(0, 256, *shape).to(torch.uint8) if dtype == torch.uint8 else draw.normal(*shape, dtype=dtype)


def _patch_embed(size: str, option: str, draw: Draw) -> Tensors:
    B, C, H, W, Ph, Pw, E = PATCH_SIZES[size]
    options = dict(PATCH_OPTIONS[option])
    dtype, layout, frames = options.pop("pixels", draw.dtype), options.pop("layout", ""), options.pop("frames", 0)
    time, patch_time = ((frames,), (2,)) if frames else ((), ())
    pixels = _pixels(draw, dtype, B, C, *time, H, W)
    if layout == "channels last":
        pixels = _pixels(draw, dtype, B, H, W, C).permute(0, 3, 1, 2)
    if layout == "cropped":
        pixels = _pixels(draw, dtype, B, C, H + 3, W + 5)[:, :, 1 : H + 1, 2 : W + 2]
    leaves = {"weight": draw.normal(E, C, *patch_time, Ph, Pw, size=0.1)}
    if options.pop("bias", False):
        leaves["bias"] = draw.normal(E)
    if options.pop("positions", False):
        leaves["pos_embed"] = draw.normal((frames or 2) // 2 * (H // Ph) * (W // Pw), E)
    fixed = {"pixels": pixels} if dtype == torch.uint8 else {}
    if not fixed:
        leaves["pixels"] = pixels
    forward_only = options.pop("forward_only", False)

    def call(**tensors: Any) -> Tensors:
        tensors = {**fixed, **tensors}
        return {"tokens": gf.patch_embed(tensors.pop("pixels"), tensors.pop("weight"), **tensors, **options)}

    if forward_only:
        with torch.no_grad():
            return call(**leaves)
    return with_gradients(draw, leaves, call)


PACKED_OPTIONS = ("plain", "uint8", "normalised", "bias", "positions", "grid", "one image")


def _packed(option: str, draw: Draw) -> Tensors:
    E, C, P = 40, 3, 7
    sizes = ((14, 21),) if option == "one image" else ((14, 21), (7, 7), (35, 28))
    dtype = torch.uint8 if option == "uint8" else draw.dtype
    images = {f"image {i}": _pixels(draw, dtype, C, *size) for i, size in enumerate(sizes)}
    leaves = {"weight": draw.normal(E, C, P, P, size=0.1)} | ({} if option == "uint8" else images)
    options: dict[str, Any] = {}
    if option == "normalised":
        options |= {"mean": (0.5, 0.4, 0.3), "std": 0.25}
    if option == "bias":
        leaves["bias"] = draw.normal(E)
    if option in ("positions", "grid"):
        leaves["pos_embed"] = draw.normal(9, E)
        options["pos_grid"] = 3 if option == "grid" else None

    def call(weight: torch.Tensor, **tensors: Any) -> Tensors:
        taken = [tensors.pop(name, image) for name, image in images.items()]
        tokens, starts, positions = gf.patch_embed_packed(taken, weight, **tensors, **options)
        return {"tokens": tokens, "cu_seqlens": starts, "positions": positions}

    return with_gradients(draw, leaves, call)


def cases() -> Iterator[BitsCase]:
    for dtype in DTYPES:
        for size in PATCH_SIZES:
            for option in PATCH_OPTIONS:
                name, make = f"{size}, {option}", partial(_patch_embed, size, option)
                yield BitsCase("patch_embed", name, dtype, make, option == "bias")
        for option in PACKED_OPTIONS:
            yield BitsCase("patch_embed_packed", option, dtype, partial(_packed, option), option == "bias")
