"""Attention beside SDPA, FlexAttention, OpenVINO and ONNX Runtime: `python -m benchmarks.attention --help`."""

from __future__ import annotations

import dataclasses
import functools
import sys
from dataclasses import dataclass

import torch

import gpt4v_fast as gf
from gpt4v_fast import reference

from . import scales
from .attention_peers import LEAVES, contenders
from .registry import DTYPES, Case, Expected, Inputs, compute_bound, expanded

TRAINING = ("forward", "backward", "forward+backward")


@dataclass(frozen=True)
class Shape:
    """One problem. `mask`: none, causal, window (causal, `window` to the left), documents (causal, so many of one size
    packed; 0: four of different sizes) or images (causal text with two images whose tokens see each other)."""

    name: str
    B: int
    H: int
    S: int
    D: int
    Hkv: int | None = None
    T: int | None = None
    mask: str = "none"
    directions: tuple[str, ...] = TRAINING
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    copies: int = 1
    part: str = "default"
    window: int = 256
    documents: int = 0

    @property
    def keys(self) -> int:
        return self.T or self.S

    @property
    def groups(self) -> int:
        return self.H // (self.Hkv or self.H)

    @functools.cached_property
    def gf_mask(self) -> gf.Mask:
        S = self.S
        if self.mask in ("none", "causal"):
            return gf.Mask(causal=self.mask == "causal")
        if self.mask == "window":
            return gf.Mask(causal=True, window=(self.window, None))
        if self.mask == "documents":
            starts = torch.tensor(self._documents())
            ids = torch.bucketize(torch.arange(S), starts[1:], right=True)
            return gf.Mask(causal=True, documents=ids.to(torch.int32).expand(self.B, S).contiguous())
        if self.mask == "images":
            ids = torch.full((S,), -1, dtype=torch.int32)
            for number, (start, end) in enumerate(self._images()):
                ids[start:end] = number
            return gf.Mask(causal=True, image_blocks=ids.expand(self.B, S).contiguous())
        raise ValueError(f"mask: expected none, causal, window, documents or images, got {self.mask!r}")

    def _documents(self) -> list[int]:
        """Where they start."""
        S = self.S
        return [i * S // self.documents for i in range(self.documents)] or [0, S // 8, S // 2, 5 * S // 8]

    def _images(self) -> list[tuple[int, int]]:
        return [(self.S // 16, 6 * self.S // 16), (8 * self.S // 16, 13 * self.S // 16)]

    @functools.cached_property
    def seen(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The first key that each query sees and the one behind the last; all between are seen."""
        first, end = torch.zeros(self.S, dtype=torch.int64), torch.arange(1, self.S + 1)
        if self.mask == "none":
            end = torch.full_like(end, self.keys)
        if self.mask == "window":
            first = (end - 1 - self.window).clamp(min=0)
        if self.mask == "documents":
            starts = torch.tensor(self._documents())
            first = starts[torch.bucketize(end - 1, starts[1:], right=True)]
        if self.mask == "images":
            for image_start, image_end in self._images():
                end[image_start:image_end] = image_end
        return first, end

    @functools.cached_property
    def visible(self) -> int:
        """Pairs of a query and a key that it sees, over the batch, per head."""
        first, end = self.seen
        return self.B * int((end - first).sum())

    def blocks(self, queries: int, keys: int) -> int:
        """Blocks of the score matrix, per head, in which some query sees some key."""
        first, end = self.seen
        # Both grow with the query, and what neighbours see overlaps or touches: a strip of queries sees one stretch.
        last = torch.arange(queries - 1, self.S + queries - 1, queries).clamp(max=self.S - 1)
        return int(((end[last] - 1) // keys - first[::queries] // keys + 1).sum())

    @property
    def sizes(self) -> dict[str, int]:
        return {"B": self.B, "H": self.H, "Hkv": self.Hkv or self.H, "S": self.S, "T": self.keys, "D": self.D}


SHAPES = (
    Shape("b1_h16_s1024_d64", 1, 16, 1024, 64),
    Shape("b1_h8_s4096_d64_causal", 1, 8, 4096, 64, mask="causal"),
    Shape("b1_h8_s2048_d128_causal", 1, 8, 2048, 128, mask="causal"),
    Shape("b4_h16_s577_d64", 4, 16, 577, 64),
    Shape("b4_h16_s257_d80", 4, 16, 257, 80),
    Shape("b1_h16_s1024_d72", 1, 16, 1024, 72, directions=("forward",)),
    Shape("gqa_h32_kv8_s1024_d128_causal", 1, 32, 1024, 128, Hkv=8, mask="causal"),
    Shape("window256_h8_s2048_d64", 1, 8, 2048, 64, mask="window"),
    Shape("documents_h8_s2048_d64", 1, 8, 2048, 64, mask="documents"),
    Shape("images_h8_s2048_d64", 1, 8, 2048, 64, mask="images"),
    Shape("half_h8_s512_d64", 1, 8, 512, 64, directions=("forward",), dtypes=("fp16",)),
    # Caches of 32 and 64 MiB, taken in turn: a decoder finds its cache in memory, not in a processor's cache.
    Shape("decode_h32_kv8_t8192_d128", 1, 32, 1, 128, Hkv=8, T=8192, directions=("forward",), copies=8),
    Shape("smallest_h4_s16_d32", 1, 4, 16, 32, directions=("forward",)),
    Shape("gpu_b4_h16_s4096_d128_causal", 4, 16, 4096, 128, mask="causal", dtypes=("bf16",), part="gpu"),
    Shape("gpu_b4_h32_s4096_d64", 4, 32, 4096, 64, dtypes=("bf16",), part="gpu"),
    Shape("gpu_b16_h16_s577_d64", 16, 16, 577, 64, dtypes=("bf16",), part="gpu"),
    Shape("gqa_gpu_b2_h32_kv8_s8192_d128_causal", 2, 32, 8192, 128, Hkv=8, mask="causal", dtypes=("bf16",), part="gpu"),
    Shape("quick_causal", 1, 4, 96, 32, Hkv=2, mask="causal", part="quick"),
    Shape("quick_images", 1, 2, 64, 32, mask="images", directions=("forward",), part="quick"),
    Shape("quick_decode", 1, 4, 1, 32, Hkv=2, T=128, directions=("forward",), copies=2, part="quick"),
)

# Products of S x T of the forward pass: q k^T and p v; the backward pass makes five (FlashAttention-2).
PRODUCTS = {"forward": 2, "backward": 5, "forward+backward": 7}


def cases() -> list[Case]:
    return expanded(SHAPES, case)


def case(shape: Shape, dtype_name: str, direction: str) -> Case:
    dtype = DTYPES[dtype_name]
    Hkv = shape.Hkv or shape.H
    elements = 2 * shape.B * (shape.H * shape.S + Hkv * shape.keys) * shape.D  # q and out, k and v
    passes = {"forward": 1, "backward": 2, "forward+backward": 3}[direction]
    decoding = shape.S == 1
    return Case(
        op="attention",
        name=shape.name,
        dtype=dtype,
        direction=direction,
        shape=shape.sizes,
        flops=2.0 * PRODUCTS[direction] * shape.visible * shape.H * shape.D,
        bytes=float(passes * elements * dtype.itemsize),
        bound="read" if decoding else compute_bound(dtype),
        make_inputs=lambda: make_inputs(shape, dtype),
        expected=lambda inputs: expected(inputs, direction),
        contenders=contenders(shape),
        leaves=LEAVES,
        copies=shape.copies,
        part=shape.part,
        warm_up_inputs=lambda: make_inputs(dataclasses.replace(shape, S=min(shape.S, 16), T=shape.T and 16), dtype),
    )


def prefix(inputs: Inputs, tokens: int) -> Inputs:
    """The same problem for the first tokens."""
    shape = dataclasses.replace(inputs["shape"], S=tokens)
    return {"shape": shape} | {name: inputs[name][:, :, :tokens].contiguous() for name in (*LEAVES, "upstream")}


def make_inputs(shape: Shape, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    Hkv = shape.Hkv or shape.H

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    return {
        "q": random(shape.B, shape.H, shape.S, shape.D),
        "k": random(shape.B, Hkv, shape.keys, shape.D),
        "v": random(shape.B, Hkv, shape.keys, shape.D),
        "upstream": random(shape.B, shape.H, shape.S, shape.D),
        "shape": shape,
    }


def expected(inputs: Inputs, direction: str) -> list[Expected]:
    """Exact values for the heads of the last group of the last batch entry, which depend on no other head."""
    shape: Shape = inputs["shape"]
    groups = shape.groups
    part = {name: inputs[name][-1:, -groups:].double() for name in ("q", "upstream")}
    part |= {name: inputs[name][-1:, -1:].double() for name in ("k", "v")}
    mask = shape.gf_mask
    if shape.mask in ("documents", "images"):
        field = {"documents": "documents", "images": "image_blocks"}[shape.mask]
        mask = gf.Mask(causal=True, **{field: getattr(mask, field)[-1:]})
    leaves = [part[name].requires_grad_() for name in LEAVES]
    out = reference.attention(*leaves, mask=mask)
    assert isinstance(out, torch.Tensor)
    with torch.no_grad():
        allowed = mask.dense(shape.S, shape.keys, device=inputs["q"].device)
        allowed = allowed if allowed.dim() == 2 else allowed[:, None]
        dout = None if direction == "forward" else part["upstream"].float()
        q, k, v = (x.float() for x in leaves)  # enough for a scale, and twice as fast
        scale = scales.attention(q, k, v, allowed, inputs["q"].dtype, dout)
    exact = [] if direction == "backward" else [Expected("out", _tail(groups), out.detach(), scale["out"])]
    if direction == "forward":
        return exact
    gradients = torch.autograd.grad(out, leaves, part["upstream"])
    heads = {"q": groups, "k": 1, "v": 1}
    return exact + [
        Expected(f"grad {name}", _tail(heads[name]), value, scale[f"grad {name}"])
        for name, value in zip(LEAVES, gradients, strict=True)
    ]


def _tail(heads: int) -> tuple[slice, slice]:
    return slice(-1, None), slice(-heads, None)


if __name__ == "__main__":
    from .command import main

    sys.exit(main("attention", ["attention"]))
