"""Patch embedding by the CUDA object (csrc/cuda/patch_embed.cu), loaded by ctypes when a CUDA tensor first asks for it.

The object holds its own CUDA runtime and shares the process's driver with torch, so a pointer and a stream are all that
passes between the two.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gpt4v_fast._native import DTYPE_CODES
from gpt4v_fast.ops.patch_embed import reference

if TYPE_CHECKING:
    from gpt4v_fast import backends
    from gpt4v_fast.ops.patch_embed.api import PatchEmbedCall

OBJECT = Path(__file__).parents[2] / "_cuda.so"


class PatchEmbed(reference.PatchEmbed):
    """Its backward pass is the oracle's: torch's own unfold and matrix products."""

    backend, kernel = "cuda", "_cuda.patch_embed (backward: torch's unfold and matmul)"

    def refuses(self, traits: backends.Traits) -> str | None:
        return missing()

    def forward(self, call: PatchEmbedCall) -> torch.Tensor:
        tokens = call.weight.new_empty(call.pixels.shape[0], call.N, call.weight.shape[0], dtype=call.out_dtype)
        patch_embed_forward(call, tokens)
        return tokens


def load(path: Path) -> ctypes.CDLL:
    """The object at `path`, its functions' argument types declared."""
    library = ctypes.CDLL(str(path))
    pointer, integer, sizes = ctypes.c_void_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_int64)
    library.gpt4v_fast_patch_embed_forward.restype = integer
    library.gpt4v_fast_patch_embed_forward.argtypes = [
        *(pointer, integer, sizes, sizes),  # pixels: data, dtype, sizes, strides
        *(pointer, integer, sizes),  # weight, contiguous: data, dtype, sizes
        *(pointer, integer),  # bias
        *(pointer, pointer),  # pixel_scale, pixel_shift
        *(pointer, integer),  # pos_embed
        *(pointer, integer),  # tokens
        pointer,  # the stream
    ]
    library.gpt4v_fast_cuda_error.restype = ctypes.c_char_p
    library.gpt4v_fast_cuda_error.argtypes = [integer]
    return library


@functools.cache
def _library() -> ctypes.CDLL | None:
    return load(OBJECT) if OBJECT.exists() else None


def missing() -> str | None:
    """Why there is no CUDA kernel to run here, or None."""
    if _library() is None:
        return "the package was built without nvcc, so gpt4v_fast/_cuda.so is not there"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"it needs compute capability 8.0, this GPU has {major}.{minor}"


def patch_embed_forward(call: PatchEmbedCall, tokens: torch.Tensor) -> None:
    """Launches the kernel on the current stream of the tensors' device; pixels may have any strides.

    Raises:
        RuntimeError: there is no CUDA object, or CUDA refused the launch.
    """
    library = _library()
    if library is None:
        raise RuntimeError(str(missing()))
    # Kept in locals: what is copied here must live until the launch. Later work on the stream cannot overtake it.
    weight, scale, shift = (x.contiguous() for x in (call.weight, call.pixel_scale, call.pixel_shift))
    bias, pos_embed = (None if x is None else x.contiguous() for x in (call.bias, call.pos_embed))
    pixels = call.pixels
    with torch.cuda.device(pixels.device):
        error = library.gpt4v_fast_patch_embed_forward(
            *(pixels.data_ptr(), DTYPE_CODES[pixels.dtype], _int64s(pixels.shape), _int64s(pixels.stride())),
            *(weight.data_ptr(), DTYPE_CODES[weight.dtype], _int64s(weight.shape)),
            *_pointer_and_dtype(bias),
            *(scale.data_ptr(), shift.data_ptr()),
            *_pointer_and_dtype(pos_embed),
            *_pointer_and_dtype(tokens),
            torch.cuda.current_stream().cuda_stream,
        )
    if error:
        text = library.gpt4v_fast_cuda_error(error).decode()
        raise RuntimeError(f"patch_embed: CUDA error {error} at launch: {text}")


def _int64s(numbers: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _pointer_and_dtype(tensor: torch.Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if tensor is None else (tensor.data_ptr(), DTYPE_CODES[tensor.dtype])
