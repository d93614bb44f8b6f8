"""The CUDA kernel's own source, run on the CPU under AddressSanitizer and UndefinedBehaviorSanitizer.

device.h says what of a GPU is imitated. The numbers are compared with the fp64 oracle; the sanitizers see every access
outside of a tensor or of shared memory; running the threads in both orders shows what depends on their order.
"""

from __future__ import annotations

import os
import shlex
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from closeness import assert_close, spread_of
from random_rounding import BITS

from gpt4v_fast import reference
from gpt4v_fast._native import DTYPE_CODES

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wall", "-Wextra"]
FP32, BF16, FP16, UINT8 = torch.float32, torch.bfloat16, torch.float16, torch.uint8


@dataclass(frozen=True)
class Case:
    """Sizes are (B, C, frames, H, W), patch is (Pt, Ph, Pw)."""

    sizes: tuple[int, int, int, int, int]
    patch: tuple[int, int, int]
    E: int
    pixels: torch.dtype = UINT8
    weight: torch.dtype = BF16
    tokens: torch.dtype | None = None
    bias: torch.dtype | None = FP32
    pos_embed: torch.dtype | None = None
    layout: str = "contiguous"
    weight_start: int = 0


CASES = {
    "p14-uint8-bf16": Case((1, 3, 1, 28, 42), (1, 14, 14), 20),
    "p14-uint8-fp32": Case((1, 3, 1, 28, 42), (1, 14, 14), 20, weight=FP32),
    "p16-rows-of-16-bytes": Case((1, 3, 1, 32, 32), (1, 16, 16), 33, FP32, FP16, bias=FP16),
    "p7-odd-K-scalar-copies": Case((2, 1, 1, 7, 21), (1, 7, 7), 9, FP32, BF16, pos_embed=BF16),
    "K-of-2-rows-of-4-bytes": Case((1, 2, 1, 5, 3), (1, 1, 1), 5, BF16, BF16),
    "misaligned-weight": Case((1, 3, 1, 8, 8), (1, 8, 8), 17, weight=BF16, weight_start=1),
    "two-blocks-of-tokens-and-channels": Case((1, 1, 1, 26, 10), (1, 2, 1), 131, FP16, FP16, FP32),
    "two-blocks-fp32": Case((1, 1, 1, 26, 10), (1, 2, 1), 131, FP32, FP32, BF16, pos_embed=FP32),
    "video-non-square": Case((2, 3, 4, 6, 8), (2, 3, 4), 11, UINT8, FP32, FP16, bias=BF16, pos_embed=FP16),
    "channels-last": Case((1, 4, 1, 6, 4), (1, 2, 2), 8, layout="channels last"),
    "every-second-column": Case((1, 3, 1, 4, 4), (1, 2, 2), 8, FP32, FP32, layout="strided"),
    "flipped-in-a-larger-image": Case((1, 3, 1, 4, 4), (1, 2, 2), 8, UINT8, FP16, layout="window"),
    "no-channels": Case((1, 0, 1, 4, 4), (1, 2, 2), 8, pos_embed=FP32),
    "no-tokens": Case((0, 3, 1, 4, 4), (1, 2, 2), 8),
}


def build(folder: Path, name: str, *flags: str) -> Path:
    program = folder / name
    source = ROOT / "tests" / "cuda_on_cpu" / "patch_embed.cpp"
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}"]
    command = [*compiler, *FLAGS, *flags, "-Wno-unknown-pragmas", *includes, str(source), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0 and not built.stderr, built.stderr
    return program


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("cuda_on_cpu"), "patch_embed")


def tensors_of(case: Case) -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(len(CASES) + case.E)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    B, C, frames, H, W = case.sizes
    values = (random(B, C, frames, H, W).abs() * 60).clamp(max=255).to(case.pixels)
    if case.layout == "channels last":
        values = values.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    elif case.layout == "strided":
        values = torch.stack((values, values), dim=-1).flatten(-2)[..., ::2]
    elif case.layout == "window":
        larger = torch.zeros(B, C, frames, H + 3, W + 5, dtype=case.pixels)
        larger[..., 2 : 2 + H, 3 : 3 + W] = values
        values = larger[..., 2 : 2 + H, 3 : 3 + W]
    N = frames // case.patch[0] * (H // case.patch[1]) * (W // case.patch[2])
    return {
        "pixels": values,
        "weight": (random(case.E, C, *case.patch) * 0.1).to(case.weight),
        "pixel_scale": random(C).abs() * 0.02,
        "pixel_shift": random(C),
        "bias": None if case.bias is None else random(case.E).to(case.bias),
        "pos_embed": None if case.pos_embed is None else random(N, case.E).to(case.pos_embed),
    }


def raw(tensor: torch.Tensor | None) -> bytes:
    """The bytes of a tensor's whole storage."""
    return b"" if tensor is None else bytes(tensor.untyped_storage().tolist())


def run(program: Path, folder: Path, case: Case, tensors: dict[str, torch.Tensor | None], order: str) -> torch.Tensor:
    pixels, weight, *others = tensors.values()
    assert pixels is not None and weight is not None
    dtype = case.tokens or case.weight
    shape = (case.sizes[0], *[s // p for s, p in zip(case.sizes[2:], case.patch, strict=True)])
    tokens = torch.empty(shape[0], shape[1] * shape[2] * shape[3], case.E, dtype=dtype)
    codes = [-1 if t is None else DTYPE_CODES[t.dtype] for t in (pixels, weight, *others[2:], tokens)]
    weight_start = case.weight_start * weight.element_size()
    blobs = [raw(pixels), b"\0" * weight_start + raw(weight), *(raw(t) for t in others)]
    numbers = [
        *codes,
        pixels.storage_offset() * pixels.element_size(),
        weight_start,
        *pixels.shape,
        *pixels.stride(),
        *weight.shape,
        tokens.numel() * tokens.element_size(),
        *(len(blob) for blob in blobs),
    ]
    (folder / "case").write_bytes(struct.pack(f"{len(numbers)}q", *numbers) + b"".join(blobs))
    done = subprocess.run(
        [str(program), str(folder / "case"), str(folder / "result"), order], capture_output=True, text=True
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr}"
    result = bytearray((folder / "result").read_bytes())
    return torch.frombuffer(result, dtype=dtype).reshape(tokens.shape) if result else tokens


def oracle(case: Case, tensors: dict[str, torch.Tensor | None], dtype: torch.dtype) -> torch.Tensor:
    """The tokens in `dtype`, from pixels normalised in fp32 or better as PyTorch would do it."""
    wide = torch.promote_types(dtype, torch.float32)
    pixels, weight, scale, shift, bias, pos = (None if t is None else t.to(wide) for t in tensors.values())
    normalised = pixels * scale.view(-1, 1, 1, 1) + shift.view(-1, 1, 1, 1)
    bias, pos = (None if t is None else t.to(dtype) for t in (bias, pos))
    return reference.patch_tokens(normalised, weight.to(dtype), bias, pos)


@pytest.mark.parametrize("name", CASES)
def test_kernel_source_agrees_with_the_oracle(name: str, program: Path, tmp_path: Path) -> None:
    case = CASES[name]
    tensors = tensors_of(case)
    forward = run(program, tmp_path, case, tensors, "forward")
    # 16-bit weights mean 16-bit products, also where the tokens are fp32.
    tested = forward.to(case.weight) if case.weight != FP32 else forward
    exact, native = oracle(case, tensors, torch.float64), oracle(case, tensors, case.weight)
    spread = spread_of(lambda: oracle(case, tensors, torch.float64), exact, BITS[case.weight])
    assert_close(tested, exact, native, name="tokens", spread=spread)
    backward = run(program, tmp_path, case, tensors, "backward")
    assert torch.equal(forward, backward), "the result depends on the order in which threads run"


def test_a_missing_barrier_is_noticed(tmp_path: Path) -> None:
    """Without any barrier the same source reads shared memory that nobody has written: NaN, or an address far away."""
    case = CASES["p14-uint8-fp32"]
    tensors = tensors_of(case)
    broken = build(tmp_path, "broken", "-DCUDA_ON_CPU_WITHOUT_BARRIERS")
    with pytest.raises(AssertionError):
        tokens = run(broken, tmp_path, case, tensors, "forward")
        exact, native = oracle(case, tensors, torch.float64), oracle(case, tensors, case.weight)
        spread = spread_of(lambda: oracle(case, tensors, torch.float64), exact)
        assert_close(tokens, exact, native, name="tokens", spread=spread)


def test_reads_outside_of_a_tensor_are_noticed(program: Path, tmp_path: Path) -> None:
    """A storage one byte shorter than the strides say ends in AddressSanitizer's report."""
    case = CASES["p14-uint8-bf16"]
    tensors = tensors_of(case)
    assert tensors["pixels"] is not None
    tensors["pixels"].untyped_storage().resize_(tensors["pixels"].numel() - 1)
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        run(program, tmp_path, case, tensors, "forward")
