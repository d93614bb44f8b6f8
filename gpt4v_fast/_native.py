"""The bridge to the C++ extension: tensors as (pointer, dtype, sizes, strides), threads as torch has them."""

from __future__ import annotations

import torch

# torch comes first on purpose: it brings libgomp.so.1 into the process, and the extension then shares that OpenMP
# runtime instead of starting a second one.
try:
    import gpt4v_fast._C as _C
except ImportError as error:  # pragma: no cover - shown to people who run from a source tree that was not built
    raise ImportError(
        "gpt4v_fast._C, the compiled part of the package, is missing or was built for another Python. "
        "Run `pip install .` (or `pip install -e .` to develop) in the source folder."
    ) from error

# The order is that of DType in csrc/args.h.
DTYPE_CODES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.uint8: 3,
    torch.int32: 4,
    torch.int64: 5,
    torch.bool: 6,
}

TensorView = tuple[int, int, tuple[int, ...], tuple[int, ...]]


def view(tensor: torch.Tensor | None) -> TensorView | None:
    """What the extension takes for a tensor. The caller keeps the tensor alive for the length of the call."""
    if tensor is None:
        return None
    return tensor.data_ptr(), DTYPE_CODES[tensor.dtype], tuple(tensor.shape), tensor.stride()


def threads() -> int:
    return torch.get_num_threads()


def last_dim_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where its last dimension is contiguous, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


__all__ = ["DTYPE_CODES", "_C", "TensorView", "last_dim_contiguous", "threads", "view"]
