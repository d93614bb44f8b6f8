"""Patch embedding from pixels beside normalise + convolution: `python -m benchmarks.patch_embed --help`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import gpt4v_fast as gf
from gpt4v_fast import reference

from . import scales
from .registry import DTYPES, Case, Contender, Expected, Function, Inputs, Run, by, compute_bound, expanded

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
LEAVES = ("weight", "bias")


@dataclass(frozen=True)
class Shape:
    """B images (or videos of some frames) of side `size`, patches of P x P (x Pt frames), E features."""

    name: str
    B: int
    size: int
    P: int
    E: int
    frames: int = 0
    Pt: int = 1
    pixels: torch.dtype = torch.uint8
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    directions: tuple[str, ...] = ("forward", "forward+backward")
    part: str = "default"

    @property
    def tokens(self) -> int:
        return self.B * max(1, self.frames // self.Pt) * (self.size // self.P) ** 2

    @property
    def depth(self) -> int:
        return 3 * self.Pt * self.P * self.P

    @property
    def sizes(self) -> dict[str, int]:
        video = {"frames": self.frames, "Pt": self.Pt} if self.frames else {}
        return {
            "B": self.B,
            "C": 3,
            "size": self.size,
            **video,
            "P": self.P,
            "E": self.E,
            "tokens": self.tokens,
        }


SHAPES = (
    Shape("b8_336px_p14_e1024", 8, 336, 14, 1024),
    Shape("b1_224px_p16_e768", 1, 224, 16, 768),
    Shape("b4_448px_p14_e1152", 4, 448, 14, 1152, directions=("forward",)),
    Shape("b8_336px_p14_e1024_float", 8, 336, 14, 1024, pixels=torch.float32, directions=("forward",)),
    Shape("video_b1_f8_224px_p14_e1280", 1, 224, 14, 1280, frames=8, Pt=2, directions=("forward",)),
    Shape("gpu_b64_336px_p14_e1024", 64, 336, 14, 1024, part="gpu"),
    Shape("gpu_b8_224px_p16_e768", 8, 224, 16, 768, dtypes=("bf16",), part="gpu"),
    Shape("quick_image", 2, 28, 7, 48, part="quick"),
    Shape("quick_video", 1, 14, 7, 32, frames=4, Pt=2, directions=("forward",), part="quick"),
)


def cases() -> list[Case]:
    return expanded(SHAPES, _case)


def _case(shape: Shape, dtype_name: str, direction: str) -> Case:
    dtype = DTYPES[dtype_name]
    passes = 1 if direction == "forward" else 2  # backward: the weight's gradient, one more product
    product = shape.tokens * shape.depth * shape.E
    pixels = shape.tokens * shape.depth * shape.pixels.itemsize
    rest = (shape.depth * shape.E + shape.tokens * shape.E) * dtype.itemsize
    return Case(
        op="patch_embed",
        name=shape.name,
        dtype=dtype,
        direction=direction,
        shape=shape.sizes,
        flops=2.0 * passes * product,
        bytes=float(passes * (pixels + rest)),
        bound=compute_bound(dtype),
        make_inputs=lambda: make_inputs(shape, dtype),
        expected=lambda inputs: expected(inputs, direction),
        contenders=contenders(shape),
        leaves=LEAVES,
        part=shape.part,
    )


def make_inputs(shape: Shape, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    frames = (shape.frames,) if shape.frames else ()
    depth = (shape.Pt,) if shape.frames else ()
    size = (shape.B, 3, *frames, shape.size, shape.size)
    pixels = torch.randint(256, size, generator=generator, dtype=torch.uint8)
    if shape.pixels != torch.uint8:
        pixels = (pixels.float() / 255).to(shape.pixels)
    weight = torch.randn(shape.E, 3, *depth, shape.P, shape.P, generator=generator) * shape.depth**-0.5
    return {
        "pixels": pixels,
        "weight": weight.to(dtype),
        "bias": torch.randn(shape.E, generator=generator).to(dtype),
        "upstream": torch.randn(shape.B, shape.tokens // shape.B, shape.E, generator=generator).to(dtype),
        "shape": shape,
    }


def expected(inputs: Inputs, direction: str) -> list[Expected]:
    """The oracle in fp64 on the whole problem: the products are small beside those of the other ops."""
    leaves = [inputs[name].double().requires_grad_() for name in LEAVES]
    weight, bias = leaves
    out = reference.patch_embed(inputs["pixels"], weight, bias=bias, mean=MEAN, std=STD)
    dtype, upstream = inputs["weight"].dtype, inputs["upstream"].double()
    with torch.no_grad():
        patches = _patches(inputs["pixels"], weight)
        scale = scales.linear(patches, weight.flatten(1), dtype).view(out.shape) + bias.abs()
    exact = [Expected("out", (), out.detach(), scale)]
    if direction == "forward":
        return exact
    gradients = torch.autograd.grad(out, leaves, upstream)
    rows = upstream.flatten(0, 1)
    # A row of the weight's gradient is all of one output feature.
    of_weight = scales.linear(patches.mT, rows.mT, dtype).mT
    of_bias = scales.linear(torch.ones_like(rows[:, :1]).mT, rows.mT, dtype)[0]
    return [
        *exact,
        Expected("grad weight", (), gradients[0].flatten(1), of_weight),
        Expected("grad bias", (), gradients[1], of_bias),
    ]


def _patches(pixels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(tokens, depth): the normalised pixels of every patch, in fp64."""
    view = (3,) + (1,) * (pixels.dim() - 2)
    rescale = 1 / 255 if pixels.dtype == torch.uint8 else 1.0
    mean, std = (torch.tensor(x, dtype=torch.float32, device=pixels.device).double().view(view) for x in (MEAN, STD))
    normal = (pixels.double() * rescale - mean) / std
    if pixels.dim() == 4:
        normal, weight = normal[:, :, None], weight[:, :, None]
    return reference.unfold_patches(normal, weight.shape[2:]).flatten(0, 1)


def _make(function: Function) -> Callable[[Case, Inputs], Run]:
    def make(case: Case, inputs: Inputs) -> Run:
        run = by(function)(case, inputs)

        def flat() -> dict[str, torch.Tensor]:
            outputs = run()
            if "grad weight" in outputs:
                outputs["grad weight"] = outputs["grad weight"].flatten(1)
            return outputs

        return flat

    return make


def _normalise(x: Inputs) -> torch.Tensor:
    """The usual preprocessing, in fp32 and in place, then the weight's dtype."""
    pixels = x["pixels"]
    view = (3,) + (1,) * (pixels.dim() - 2)
    rescale = 1 / 255 if pixels.dtype == torch.uint8 else 1.0
    std = torch.tensor(STD, device=pixels.device).view(view)
    shift = torch.tensor(MEAN, device=pixels.device).view(view) / std
    normal = pixels.to(torch.float32, copy=True).mul_(rescale / std).sub_(shift)
    return normal.to(x["weight"].dtype)


def _convolution(x: Inputs, channels_last: bool = False) -> torch.Tensor:
    pixels, weight = _normalise(x), x["weight"]
    video = pixels.dim() == 5
    if channels_last:
        order = torch.channels_last_3d if video else torch.channels_last
        pixels, weight = pixels.to(memory_format=order), weight.to(memory_format=order)
    convolution = F.conv3d if video else F.conv2d
    return convolution(pixels, weight, x["bias"], stride=weight.shape[2:]).flatten(2).transpose(1, 2)


def _matrix_product(x: Inputs) -> torch.Tensor:
    """The patches unfolded by a permuted copy, then F.linear."""
    pixels, weight = _normalise(x), x["weight"]
    B, C, H, W = pixels.shape
    P = weight.shape[-1]
    patches = pixels.view(B, C, H // P, P, W // P, P).permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * P * P)
    return F.linear(patches, weight.flatten(1), x["bias"])


def contenders(shape: Shape) -> tuple[Contender, ...]:
    """Ours and every peer that can take this shape."""
    ours = _make(lambda x: gf.patch_embed(x["pixels"], x["weight"], bias=x["bias"], mean=MEAN, std=STD))
    found = [
        Contender("gpt4v_fast", ours, ours=True),
        Contender("normalise + convolution", _make(_convolution)),
        Contender("normalise + convolution, channels last", _make(lambda x: _convolution(x, True))),
    ]
    if not shape.frames:
        found.append(Contender("normalise + unfold + F.linear", _make(_matrix_product)))
    return tuple(found)


if __name__ == "__main__":
    from .command import main

    sys.exit(main("patch_embed", ["patch_embed"]))
