"""gf.patch_embed as a torch op: registration, compilation, choice of backend, the way to the CUDA object, refusals."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from patch_cases import BF16, CASES, FP16, FP32, UINT8, Case, in_torch
from torch import library as torch_library

import gpt4v_fast as gf
from gpt4v_fast import backends, reference
from gpt4v_fast.backends import call_of
from gpt4v_fast.ops.patch_embed import cuda

ROOT = Path(__file__).parents[2]
OPS = torch.ops.gpt4v_fast
REGISTERED = [
    Case("uint8", (2, 3), (4, 2), pos_embed=FP32),
    Case("floats", (2, 3), (4, 2), pixels=FP32, bias=None, layout="channels last"),
    Case("video-bf16", (2, 1, 3), (1, 2, 2), pixels=BF16, weight=BF16, out_dtype=FP32),
]


@pytest.mark.parametrize("case", REGISTERED, ids=lambda case: case.name)
def test_opcheck(case):
    tensors = {name: x.requires_grad_(name in case.gradients) for name, x in case.tensors().items()}
    call = call_of(gf.patch_embed, **tensors, **case.options(), out_dtype=case.out_dtype)
    torch_library.opcheck(OPS.patch_embed.default, call)
    detached = (x.detach() if isinstance(x, torch.Tensor) else x for x in call)
    arguments = (torch.ones(case.B, case.N, case.E, dtype=call.out_dtype), *detached)
    for needs_pixels in {False, case.pixels != UINT8}:
        wanted = (needs_pixels, True, call.bias is not None, call.pos_embed is not None)
        torch_library.opcheck(OPS.patch_embed_backward.default, (*arguments, *wanted))


def test_gradcheck_of_the_oracle():
    generator = torch.Generator().manual_seed(0)
    shapes = {"pixels": (2, 2, 4, 6), "weight": (3, 2, 2, 3), "bias": (3,), "pos_embed": (4, 3)}
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes.values()]

    def dense(pixels: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
        return reference.patch_embed(pixels, weight, bias=bias, mean=[0.1, 0.2], std=0.5, pos_embed=pos)

    def packed(pixels: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
        images = [pixels[0], pixels[1, :, :2]]
        return reference.patch_embed_packed(images, weight, bias=bias, pos_embed=pos, pos_grid=2)[0]

    assert torch.autograd.gradcheck(dense, leaves)
    assert torch.autograd.gradcheck(packed, leaves)


@pytest.mark.parametrize("case", REGISTERED, ids=lambda case: case.name)
def test_compiles_without_a_graph_break(case):
    tensors = {name: x.requires_grad_(name in case.gradients) for name, x in case.tensors().items()}
    leaves = [tensors[name] for name in case.gradients]

    def run(**tensors: torch.Tensor) -> torch.Tensor:
        return gf.patch_embed(**tensors, **case.options(), out_dtype=case.out_dtype).float().square().sum()

    eager = run(**tensors)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(**tensors)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0)
    for got, want in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_packed_compiles_without_a_graph_break():
    weight, table = torch.randn(6, 3, 4, 4), torch.randn(4, 6)
    images = [torch.rand(3, 8, 12), torch.rand(3, 4, 4)]

    def run(*images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return gf.patch_embed_packed(list(images), weight, pos_embed=table)

    for got, want in zip(torch.compile(run, fullgraph=True, backend="aot_eager")(*images), run(*images), strict=True):
        torch.testing.assert_close(got, want)  # the bicubic weights are decomposed


def test_mean_and_std_as_numbers_lists_or_tensors_are_the_same():
    case = Case("", (2, 2), (4, 4))
    tensors = case.tensors()
    want = gf.patch_embed(**tensors, mean=[0.5, 0.5, 0.5], std=(0.25, 0.25, 0.25))
    for kind in (lambda x: x, lambda x: [x], torch.tensor, lambda x: torch.full((3,), x, dtype=torch.float64)):
        assert torch.equal(want, gf.patch_embed(**tensors, mean=kind(0.5), std=kind(0.25)))
    assert torch.equal(want, gf.patch_embed(**tensors, mean=torch.full((3, 1, 1), 0.5), std=0.25))


def test_a_batch_of_positions_and_the_default_dtype():
    tensors = Case("", (2, 2), (4, 4), weight=BF16, pos_embed=FP32).tensors()
    tokens = gf.patch_embed(**tensors)
    assert tokens.dtype == BF16
    assert torch.equal(tokens, gf.patch_embed(**{**tensors, "pos_embed": tensors["pos_embed"][None]}))


def test_autocast_computes_in_its_dtype():
    tensors = Case("", (2, 2), (4, 4), pos_embed=FP32).tensors()
    with torch.autocast("cpu", dtype=BF16):
        tokens = gf.patch_embed(**tensors)
    halves = {**tensors, "weight": tensors["weight"].to(BF16), "bias": tensors["bias"].to(BF16)}
    assert tokens.dtype == BF16 and torch.equal(tokens, gf.patch_embed(**halves))


def test_gradients_of_what_needs_none_are_not_computed():
    case = Case("", (2, 2), (4, 4), pixels=FP32)
    for only in case.gradients:
        tensors = {name: x.requires_grad_(name == only) for name, x in case.tensors().items()}
        gf.patch_embed(**tensors).sum().backward()
        assert [name for name, x in tensors.items() if x.grad is not None] == [only]


# The choice of a backend.


@pytest.mark.parametrize("isa", backends.available_isas())
def test_explain_names_the_kernel_and_the_isa(isa):
    case = Case("", (2, 2), (4, 4))
    tensors = case.tensors()
    with gf.force(isa=isa):
        choice = gf.explain(gf.patch_embed, **tensors, **case.options())
        packed = gf.explain(gf.patch_embed_packed, [tensors["pixels"][0]], tensors["weight"])
    for found in (choice, packed):
        assert (found.backend, found.kernel, found.on) == ("cpu", "_C.patch_embed", f"CPU ({isa})")


@pytest.mark.parametrize(
    ("capability", "built", "backend", "why"),
    [
        ((9, 0), True, "cuda", ""),
        ((7, 5), True, "reference", "it needs compute capability 8.0, this GPU has 7.5"),
        ((9, 0), False, "reference", "the package was built without nvcc"),
    ],
    ids=["served", "too-old", "not-built"],
)
def test_explain_on_a_gpu(capability, built, backend, why, monkeypatch):
    """There is no GPU here: torch is told to name one, and nothing is launched."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(cuda, "_library", lambda: object() if built else None)
    choice = backends.choose(backends.Traits("patch_embed", "cuda", BF16))
    assert choice.backend == backend
    if backend == "cuda":
        assert "backward: torch's unfold and matmul" in str(choice)
    else:
        assert any(name.startswith("_cuda.") and why in reason for name, reason in choice.rejected)


@pytest.fixture(scope="module")
def cuda_on_cpu(tmp_path_factory):
    """The CUDA object's source as a shared object for this processor (tests/cuda_on_cpu/device.h)."""
    path = tmp_path_factory.mktemp("cuda_on_cpu") / "_cuda.so"
    command = [*shlex.split(os.environ.get("CXX", "g++")), "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-x", "c++"]
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}"]
    subprocess.run([*command, *includes, str(ROOT / "csrc/cuda/patch_embed.cu"), "-o", str(path)], check=True)
    return cuda.load(path)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.N <= 16 and c.layout != "expanded over the batch"], ids=lambda case: case.name
)
def test_the_launcher_hands_over_every_argument(case, cuda_on_cpu, monkeypatch):
    monkeypatch.setattr(cuda, "_library", lambda: cuda_on_cpu)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    call = call_of(gf.patch_embed, **case.tensors(), **case.options(), out_dtype=case.out_dtype)
    want = OPS.patch_embed(*call)
    tokens = torch.full_like(want, math.nan)
    cuda.patch_embed_forward(call, tokens)
    # 16-bit weights: here the normalised pixels are rounded to 16 bits too.
    eps = torch.finfo(case.weight).eps
    torch.testing.assert_close(tokens.float(), want.float(), rtol=4 * eps, atol=4 * eps * float(want.abs().max()))


@pytest.mark.skipif(not cuda.OBJECT.exists(), reason="the package was built without nvcc")
def test_the_cuda_object_loads_without_a_gpu_and_refuses_what_it_does_not_take():
    library = cuda._library()
    assert library is not None and b"invalid" in library.gpt4v_fast_cuda_error(1)

    def call(B: int, H: int, weight_dtype: int) -> int:
        sizes, strides = cuda._int64s((B, 3, 1, H, 4)), cuda._int64s((12 * H, 4 * H, 0, 4, 1))
        filters = cuda._int64s((5, 3, 1, 2, 2))
        tensors = (None, 3, sizes, strides, None, weight_dtype, filters, None, 0, None, None, None, 0, None, 0)
        return library.gpt4v_fast_patch_embed_forward(*tensors, None)

    assert call(B=0, H=4, weight_dtype=0) == 0
    assert call(B=1, H=3, weight_dtype=0) == 1  # cudaErrorInvalidValue: the height is no multiple of the patch
    assert call(B=1, H=4, weight_dtype=3) == 1  # uint8 weights


# Refusals: the error names the argument, what was expected and what came.


def ones(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


REFUSED: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("pixels-array", {"pixels": [[1]]}, TypeError, "pixels: expected a torch.Tensor, got list"),
    (
        "pixels-3d",
        {"pixels": ones(3, 4, 6)},
        ValueError,
        r"pixels: expected \(B, C, H, W\) or .*, got shape \(3, 4, 6\)",
    ),
    (
        "pixels-int",
        {"pixels": ones(2, 3, 4, 6, dtype=torch.int32)},
        TypeError,
        "pixels: expected dtype uint8, .* int32",
    ),
    ("pixels-double", {"pixels": ones(2, 3, 4, 6).double()}, TypeError, "pixels: expected dtype .*, got float64"),
    ("height", {"pixels": ones(2, 3, 5, 6)}, ValueError, "pixels: expected a height divisible by the patch's 2, got 5"),
    ("width", {"pixels": ones(2, 3, 4, 7)}, ValueError, "pixels: expected a width divisible by the patch's 3, got 7"),
    ("weight-uint8", {"weight": ones(5, 3, 2, 3, dtype=UINT8)}, TypeError, "weight: expected dtype float32.* uint8"),
    (
        "weight-5d",
        {"weight": ones(5, 3, 1, 2, 3)},
        ValueError,
        r"weight: expected \(E, C, P, P\) for 4-dim.* 1, 2, 3\)",
    ),
    ("weight-channels", {"weight": ones(5, 4, 2, 3)}, ValueError, r"weight: expected 3 channels .* \(5, 4, 2, 3\)"),
    ("weight-no-patch", {"weight": ones(5, 3, 0, 3)}, ValueError, r"weight: expected patch sides of at least 1, .*"),
    ("weight-device", {"weight": ones(5, 3, 2, 3).to("meta")}, ValueError, "weight: expected pixels's device cpu, .*"),
    ("bias-shape", {"bias": ones(4)}, ValueError, r"bias: expected shape \(E,\) \(5,\), got \(4,\)"),
    ("bias-int", {"bias": ones(5, dtype=torch.int64)}, TypeError, "bias: expected dtype .*, got int64"),
    ("mean-length", {"mean": [0.5, 0.5]}, ValueError, "mean: expected 1 or 3 numbers, one per channel, got 2"),
    ("mean-nan", {"mean": math.nan}, ValueError, "mean: expected finite numbers that fp32 holds, got nan"),
    (
        "mean-text",
        {"mean": "half"},
        TypeError,
        "mean: expected a number, a sequence of numbers or a tensor, got 'half'",
    ),
    ("mean-grad", {"mean": ones(3).requires_grad_()}, ValueError, "mean: expected a tensor that needs no gradient"),
    (
        "std-zero",
        {"std": [0.2, 0.0, 0.2]},
        ValueError,
        "std: expected finite numbers other than 0 that fp32 holds, got",
    ),
    (
        "std-zero-tensor",
        {"std": torch.zeros(3)},
        ValueError,
        r"std: expected finite numbers other than 0 that fp32 holds, got \[0.0, 0.0, 0.0\]",
    ),
    (
        "std-inf-tensor",
        {"std": torch.tensor(math.inf)},
        ValueError,
        "std: .* other than 0 that fp32 holds, got inf",
    ),
    ("mean-nan-tensor", {"mean": torch.tensor([0.5, math.nan, 0.5])}, ValueError, r"mean: .* got \[0.5, nan, 0.5\]"),
    ("std-shape", {"std": ones(2)}, ValueError, r"std: expected 1 or 3 elements, one per channel, got shape \(2,\)"),
    (
        "rescale-text",
        {"rescale": "1/255"},
        TypeError,
        "rescale: expected None or a finite .*, got str",
    ),
    (
        "rescale-inf",
        {"rescale": math.inf},
        ValueError,
        "rescale: expected None or a finite .*, got inf",
    ),
    ("pos-shape", {"pos_embed": ones(5, 5)}, ValueError, r"pos_embed: expected shape .* \(4, 5\), got \(5, 5\)"),
    ("pos-batch", {"pos_embed": ones(2, 4, 5)}, ValueError, r"pos_embed: .* got \(2, 4, 5\)"),
    ("out-int", {"out_dtype": torch.int8}, TypeError, "out_dtype: expected float32, bfloat16, float16, got torch.int8"),
]


@pytest.mark.parametrize(("bad", "error", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_bad_input_is_refused(bad, error, message):
    good = {"pixels": ones(2, 3, 4, 6), "weight": ones(5, 3, 2, 3)}
    gf.patch_embed(**good)
    with pytest.raises(error, match=message):
        gf.patch_embed(**{**good, **bad})
    with pytest.raises(error, match=message):
        gf.explain(gf.patch_embed, **{**good, **bad})


REFUSED_PACKED: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("one-tensor", {"images": ones(3, 4, 6)}, TypeError, r"images: expected a list of tensors \(C, H, W\), got Tensor"),
    (
        "a-batch",
        {"images": [ones(1, 3, 4, 6)]},
        ValueError,
        r"images\[0\]: expected 3 dimensions, got shape \(1, 3, 4, 6\)",
    ),
    ("a-name", {"images": [ones(3, 4, 6), "cat.png"]}, TypeError, r"images\[1\]: expected a torch.Tensor, got str"),
    (
        "two-dtypes",
        {"images": [ones(3, 4, 6), ones(3, 4, 6, dtype=FP16)]},
        TypeError,
        r"images\[1\]: expected images\[0\]'s dtype float32, got float16",
    ),
    ("width", {"images": [ones(3, 4, 6), ones(3, 4, 8)]}, ValueError, r"images\[1\]: .* width divisible .* 3, got 8"),
    ("channels", {"images": [ones(1, 4, 6)]}, ValueError, r"weight: expected 1 channels"),
    ("weight-video", {"weight": ones(5, 3, 1, 2, 3)}, ValueError, "weight: expected 4 dimensions"),
    (
        "pos-not-square",
        {"pos_embed": ones(8, 5)},
        ValueError,
        r"pos_embed: .* a square number of rows, got shape \(8, 5\)",
    ),
    (
        "pos-grid",
        {"pos_embed": ones(9, 5), "pos_grid": 2},
        ValueError,
        r"pos_embed: .* with 2 \* 2 rows, got shape \(9, 5\)",
    ),
    ("pos-width", {"pos_embed": ones(9, 6)}, ValueError, r"pos_embed: expected shape .* \(9, 5\), got \(9, 6\)"),
    (
        "grid-zero",
        {"pos_embed": ones(9, 5), "pos_grid": 0},
        ValueError,
        "pos_grid: expected None or an integer .* got 0",
    ),
    ("grid-alone", {"pos_grid": 3}, ValueError, "pos_grid: expected None where pos_embed is None, got 3"),
    ("bias-shape", {"bias": ones(4)}, ValueError, r"bias: expected shape \(E,\) \(5,\), got \(4,\)"),
]


@pytest.mark.parametrize(
    ("bad", "error", "message"), [r[1:] for r in REFUSED_PACKED], ids=[r[0] for r in REFUSED_PACKED]
)
def test_bad_packed_input_is_refused(bad, error, message):
    good = {"images": [ones(3, 4, 6), ones(3, 2, 3)], "weight": ones(5, 3, 2, 3)}
    gf.patch_embed_packed(**good)
    with pytest.raises(error, match=message):
        gf.patch_embed_packed(**{**good, **bad})
    with pytest.raises(error, match=message):
        gf.explain(gf.patch_embed_packed, **{**good, **bad})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_size": 0}, "patch_size: expected .* each at least 1, got 0"),
        ({"patch_size": (1, 2, 3, 4)}, "patch_size: expected"),
        ({"patch_size": 4, "grid": (2, 2, 2)}, r"grid: expected 2 numbers, each at least 1, got \(2, 2, 2\)"),
    ],
)
def test_bad_module_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        gf.nn.PatchEmbed(3, 8, **arguments)


def test_native_comparison_is_the_convolution():
    """in_torch, which the tests measure by, and the oracle are two ways to the same fp64 numbers."""
    for case in CASES:
        tensors = {n: x if x.dtype == UINT8 else x.double() for n, x in case.tensors().items()}
        exact = reference.patch_embed(**tensors, **case.options())
        torch.testing.assert_close(in_torch(**tensors, **case.options()), exact, rtol=1e-5, atol=1e-5)
