"""Named cases of patch embedding: sizes, dtypes and layouts, with PyTorch's own way to the same tokens."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F

FP32, BF16, FP16, UINT8 = torch.float32, torch.bfloat16, torch.float16, torch.uint8


@dataclasses.dataclass(frozen=True)
class Case:
    """pixels (B, C, [frames,] H, W) of a grid of patches (Pt,) Ph, Pw."""

    name: str
    grid: tuple[int, ...]
    patch: tuple[int, ...]
    B: int = 2
    C: int = 3
    E: int = 20
    pixels: torch.dtype = UINT8
    weight: torch.dtype = FP32
    bias: torch.dtype | None = FP32
    pos_embed: torch.dtype | None = None
    out_dtype: torch.dtype | None = None
    layout: str = "contiguous"
    rescale: float | None = None
    normalised: bool = True

    @property
    def N(self) -> int:
        return math.prod(self.grid)

    @property
    def gradients(self) -> tuple[str, ...]:
        names = ["weight", "bias", "pos_embed", "pixels"]
        return tuple(n for n in names if getattr(self, n) not in (None, UINT8))

    def tensors(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.E)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        sizes = [side * count for side, count in zip(self.patch, self.grid, strict=True)]
        spread = 64.0 if self.pixels == UINT8 else 1.0
        pixels = (random(self.B, self.C, *sizes).abs() * spread).clamp(max=255).to(self.pixels)
        fan_in = max(1, self.C * math.prod(self.patch))
        tensors = {
            "pixels": laid_out(pixels, self.layout),
            "weight": laid_out((random(self.E, self.C, *self.patch) * fan_in**-0.5).to(self.weight), self.layout),
        }
        if self.bias is not None:
            tensors["bias"] = random(self.E).to(self.bias)
        if self.pos_embed is not None:
            tensors["pos_embed"] = random(self.N, self.E).to(self.pos_embed)
        return tensors

    def options(self) -> dict[str, Any]:
        mean = [0.48, 0.46, 0.41, 0.5][: self.C] if self.normalised else None
        std = [0.27, 0.26, 0.28, 0.25][: self.C] if self.normalised else None
        return {"mean": mean, "std": std, "rescale": self.rescale}


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another place in memory."""
    last = tensor.dim() - 1
    if layout == "channels last":
        return tensor.movedim(1, last).contiguous().movedim(last, 1)
    if layout == "every second column":
        return torch.stack((tensor, tensor), dim=-1).flatten(-2)[..., ::2]
    if layout == "window of a larger image":  # also misaligned: an odd number of elements from the storage's begin
        larger = F.pad(tensor.float(), (3, 2, 1, 1)).to(tensor.dtype)
        return larger[..., 1:-1, 3:-2]
    if layout == "transposed":
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded over the batch":
        return tensor[:1].expand_as(tensor)
    return tensor


def in_torch(pixels: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
    """What a user of PyTorch writes: normalise in fp32, then a convolution in the weight's dtype."""
    rescale = options.get("rescale") or (1 / 255 if pixels.dtype == UINT8 else 1.0)
    shape = (-1, *[1] * (pixels.dim() - 2))
    mean = torch.as_tensor(options.get("mean") or 0.0).reshape(shape)
    std = torch.as_tensor(options.get("std") or 1.0).reshape(shape)
    normalised = ((pixels.float() * rescale - mean) / std).to(weight.dtype)
    convolve = F.conv2d if weight.dim() == 4 else F.conv3d
    bias, pos_embed = options.get("bias"), options.get("pos_embed")
    tokens = convolve(normalised, weight, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    for term in (bias, pos_embed):
        tokens = tokens if term is None else tokens + term.to(tokens.dtype)
    return tokens.to(options.get("out_dtype") or weight.dtype)


WINDOW = "window of a larger image"
CASES = [
    Case("one-pixel", (1, 1), (1, 1), B=1, C=1, E=1),
    Case("p1-c4", (5, 7), (1, 1), C=4, E=3, pos_embed=FP32),
    Case("p2-c1", (3, 9), (2, 2), C=1, E=7, pixels=FP32, rescale=0.5),
    Case("p7-e-prime", (3, 5), (7, 7), E=131, pixels=FP32, pos_embed=FP32),
    Case("p14-uint8", (3, 4), (14, 14), E=50, pos_embed=FP32),
    Case("p14-bf16", (3, 4), (14, 14), E=50, weight=BF16, bias=BF16, pos_embed=BF16),
    Case("p16-fp16", (2, 3), (16, 16), E=49, pixels=FP16, weight=FP16, bias=FP16),
    Case("p16-bf16-pixels", (2, 3), (16, 16), E=97, pixels=BF16, weight=BF16, bias=None, normalised=False),
    Case("tokens-past-a-block", (11, 13), (2, 3), B=3, E=33, pixels=FP32, pos_embed=FP32),
    Case("tokens-past-a-chunk", (33, 35), (2, 1), B=1, E=5, C=1, pixels=FP32),
    Case("non-square", (4, 3), (3, 5), E=18, pixels=FP32, weight=BF16),
    Case("out-fp32", (2, 2), (8, 8), E=24, weight=BF16, bias=BF16, out_dtype=FP32),
    Case("out-fp16", (2, 2), (8, 8), E=24, pixels=FP32, pos_embed=FP16, out_dtype=FP16),
    Case("video", (2, 3, 2), (2, 4, 4), pixels=FP32, pos_embed=FP32),
    Case("video-uint8-bf16", (3, 2, 2), (1, 6, 5), weight=BF16),
    Case("channels-last", (3, 2), (4, 4), pixels=FP32, layout="channels last"),
    Case("channels-last-uint8", (3, 2), (4, 4), C=4, layout="channels last"),
    Case("strided", (3, 2), (4, 4), pixels=BF16, weight=FP32, layout="every second column"),
    Case("misaligned", (3, 2), (4, 4), pixels=FP32, layout=WINDOW),
    Case("misaligned-uint8-fp16", (3, 2), (4, 4), weight=FP16, layout=WINDOW),
    Case("transposed", (3, 2), (4, 4), pixels=FP32, weight=FP16, layout="transposed"),
    Case("expanded", (3, 2), (4, 4), B=3, E=3, layout="expanded over the batch"),
]
