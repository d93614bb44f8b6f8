"""gf.patch_embed and gf.patch_embed_packed on the CPU: their numbers and gradients against the fp64 oracle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close, compare, spread_of
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import ISAS, at_thread_counts
from loss_cases import poisoned as poisoned  # a fixture
from patch_cases import BF16, CASES, FP16, FP32, UINT8, Case, in_torch

import gpt4v_fast as gf
from gpt4v_fast import reference


def check(case: Case) -> None:
    options = case.options()
    with_dtype = {**options, "out_dtype": case.out_dtype}
    compare(
        lambda **tensors: gf.patch_embed(**tensors, **with_dtype),
        lambda **tensors: reference.patch_embed(**tensors, **options),
        case.tensors(),
        gradients=case.gradients,
        native=lambda **tensors: in_torch(**tensors, **with_dtype),
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tokens_and_gradients(case, isa, poisoned):
    with gf.force(isa=isa), gf.strict():
        check(case)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_reference_backend_serves_the_same(case):
    with gf.force(backend="reference"):
        check(case)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    patch=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    B=st.integers(1, 3),
    C=st.integers(1, 4),
    E=st.integers(1, 60),
    pixels=st.sampled_from([UINT8, FP32, BF16, FP16]),
    weight=st.sampled_from([FP32, BF16, FP16]),
    bias=st.sampled_from([None, FP32, BF16]),
    pos_embed=st.sampled_from([None, FP32, FP16]),
    layout=st.sampled_from(["contiguous", "channels last", "every second column", "transposed"]),
    normalised=st.booleans(),
)
def test_any_arguments(**arguments):
    check(Case("drawn", **arguments))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_bitwise_the_same_for_any_number_of_threads(dtype, isa):
    case = Case("", (11, 13), (3, 2), B=5, E=150, pixels=FP32, weight=dtype, pos_embed=FP32)

    def run() -> list[torch.Tensor]:
        tensors = {name: x.requires_grad_(name in case.gradients) for name, x in case.tensors().items()}
        tokens = gf.patch_embed(**tensors, **case.options())
        return [tokens, *torch.autograd.grad(tokens.float().square().sum(), [tensors[n] for n in case.gradients])]

    with gf.force(isa=isa):
        first, *others = at_thread_counts(run)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


EMPTY = [
    ("no-images", (0, 3, 4, 6), (5, 3, 2, 2)),
    ("no-rows", (2, 3, 0, 6), (5, 3, 2, 2)),
    ("no-channels", (2, 0, 4, 6), (5, 0, 2, 2)),
    ("no-outputs", (2, 3, 4, 6), (0, 3, 2, 2)),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("size", "filters"), [e[1:] for e in EMPTY], ids=[e[0] for e in EMPTY])
def test_sizes_of_zero(size, filters, isa, poisoned):
    B, N, E = size[0], size[2] * size[3] // 4, filters[0]
    leaves = [torch.randn(shape).requires_grad_() for shape in (size, filters, (E,), (N, E))]
    pixels, weight, bias, pos_embed = leaves
    with gf.force(isa=isa):
        tokens = gf.patch_embed(pixels, weight, bias=bias, pos_embed=pos_embed)
        gradients = torch.autograd.grad(tokens.sum(), leaves)
    assert tokens.shape == (B, N, E)
    if size[1] == 0:
        assert torch.equal(tokens, (bias + pos_embed).expand(B, N, E))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients[:2])
    assert torch.equal(gradients[2], torch.full((E,), float(B * N)))
    assert torch.equal(gradients[3], torch.full((N, E), float(B)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_token_or_channel(value, isa):
    case = Case("", (5, 3), (2, 2), E=37, pixels=FP32)
    tensors = case.tensors()
    tensors["pixels"][1, 2, 3, 5] = value  # row 1, column 2 of image 1's patches: token 5
    with gf.force(isa=isa):
        finite = gf.patch_embed(**tensors).isfinite()
    assert not finite[1, 5].any() and finite.sum() == finite.numel() - case.E
    tensors = case.tensors()
    tensors["weight"][36, 0, 0, 0] = value
    with gf.force(isa=isa):
        finite = gf.patch_embed(**tensors).isfinite()
    assert not finite[..., 36].any() and finite[..., :36].all()


@pytest.mark.parametrize("isa", ISAS)
def test_every_uint8_value_is_normalised_as_torch_does(isa):
    pixels = torch.arange(256, dtype=UINT8).reshape(1, 1, 16, 16)
    with gf.force(isa=isa):
        tokens = gf.patch_embed(pixels, torch.ones(1, 1, 1, 1), mean=0.5, std=0.25)
    expected = (torch.arange(256, dtype=torch.float64) / 255 - 0.5) / 0.25
    torch.testing.assert_close(tokens.flatten().double(), expected, rtol=0, atol=4e-7)


def packed_inputs(pixels: torch.dtype, weight: torch.dtype) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(12, 8), (4, 4), (8, 20), (12, 12), (0, 8), (12, 8)]
    images = [(torch.rand(3, *size, generator=generator) * 255).to(pixels) for size in sizes]
    tensors = {
        "weight": (torch.randn(21, 3, 4, 4, generator=generator) * 0.01).to(weight),
        "bias": torch.randn(21, generator=generator),
        "pos_embed": torch.randn(9, 21, generator=generator),
    }
    return images, tensors


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtypes", [(UINT8, FP32), (UINT8, BF16), (FP32, FP32)], ids=str)
def test_packed_tokens_and_gradients(dtypes, isa, poisoned):
    images, tensors = packed_inputs(*dtypes)
    images[2] = images[2].transpose(1, 2).contiguous().transpose(1, 2)
    leaves = {f"image{i}": image for i, image in enumerate(images)} if dtypes[0] == FP32 else {}

    def run(function: Any) -> Any:
        def outputs(weight: torch.Tensor, bias: torch.Tensor, pos_embed: torch.Tensor, **given: torch.Tensor) -> Any:
            options = {"bias": bias, "pos_embed": pos_embed, "mean": [0.4, 0.5, 0.6], "std": 0.3}
            return function(list(given.values()) or images, weight, **options)[0]

        return outputs

    def in_parts(images: list[torch.Tensor], weight: torch.Tensor, pos_embed: torch.Tensor, **options: Any) -> Any:
        """A convolution for each image; positions as transformers' ViT interpolates them."""
        parts = []
        for image in images:
            rows, columns = image.shape[1] // 4, image.shape[2] // 4
            if rows * columns == 0:
                continue
            grid = pos_embed.T.reshape(1, -1, 3, 3)
            grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
            parts.append(in_torch(image[None], weight, pos_embed=grid[0].flatten(1).T, **options)[0])
        return (torch.cat(parts),)

    with gf.force(isa=isa):
        compare(
            run(gf.patch_embed_packed),
            run(reference.patch_embed_packed),
            {**tensors, **leaves},
            gradients=tuple(tensors) + tuple(leaves),
            native=run(in_parts),
        )


def test_packed_says_where_tokens_come_from():
    images, tensors = packed_inputs(UINT8, FP32)
    tokens, cu_seqlens, positions = gf.patch_embed_packed(images, **tensors)
    assert tokens.shape == (6 + 1 + 10 + 9 + 0 + 6, 21) and tokens.dtype == FP32
    assert cu_seqlens.tolist() == [0, 6, 7, 17, 26, 26, 32] and cu_seqlens.dtype == torch.int32
    assert positions[:7].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1], [0, 0]]
    want = reference.patch_embed_packed(images, **tensors)
    assert torch.equal(positions, want[2]) and torch.equal(cu_seqlens, want[1])
    alone = gf.patch_embed(images[3][None], tensors["weight"], bias=tensors["bias"], pos_embed=tensors["pos_embed"])
    assert torch.equal(tokens[17:26], alone[0]), "an image of the table's own grid: the table itself"
    halves = gf.patch_embed_packed(images, **tensors, pos_grid=3, out_dtype=FP16)
    assert torch.equal(halves[0], tokens.half())


def test_packed_without_images():
    _, tensors = packed_inputs(UINT8, BF16)
    tokens, cu_seqlens, positions = gf.patch_embed_packed([], **tensors)
    assert tokens.shape == (0, 21) and tokens.dtype == BF16
    assert cu_seqlens.tolist() == [0] and positions.shape == (0, 2)


def test_module_is_a_convolution_with_normalisation():
    options = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}
    module = gf.nn.PatchEmbed(3, 24, 8, grid=(2, 3), **options)
    pixels = torch.randint(0, 256, (2, 3, 16, 24), dtype=UINT8, generator=torch.Generator().manual_seed(0))
    tensors = {"pixels": pixels, **{name: p.detach() for name, p in module.named_parameters()}}

    def exact() -> torch.Tensor:
        wide = {n: t if n == "pixels" else t.double() for n, t in tensors.items()}
        return reference.patch_embed(**wide, **options)

    assert_close(module(pixels), exact(), in_torch(**tensors, **options), spread=spread_of(exact, exact()))
    torch.nn.Conv2d(3, 24, 8, stride=8).load_state_dict({n: tensors[n] for n in ("weight", "bias")})
    module(pixels).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    video = gf.nn.PatchEmbed(1, 5, (2, 4, 4), bias=False)
    assert video(torch.rand(1, 1, 4, 8, 8)).shape == (1, 8, 5) and video.bias is None
