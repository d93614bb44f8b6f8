"""The bridge to the C++ extension: how it reads torch's tensors, threads as torch has them.

The extension takes tensors themselves, or what `view` makes of them.
"""

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

try:
    _C.read_tensors_of(torch.Tensor, torch.nn.Parameter, torch.Tensor.__dlpack_c_exchange_api__)
except AttributeError as error:  # pragma: no cover - an old build in a source tree, or a torch older than 2.11
    raise ImportError(
        "gpt4v_fast._C was built from other sources than these (run `pip install .` again), or torch is too old: "
        f"{error}"
    ) from error

# The order is that of DType in csrc/view.h.
DTYPE_CODES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.uint8: 3,
    torch.int32: 4,
    torch.int64: 5,
    torch.bool: 6,
    torch.float64: 7,
}

TensorView = tuple[int, int, tuple[int, ...], tuple[int, ...]]


def view(tensor: torch.Tensor | None) -> TensorView | None:
    """A tensor in numbers. The caller keeps the tensor alive for the length of the call."""
    if tensor is None:
        return None
    return tensor.data_ptr(), DTYPE_CODES[tensor.dtype], tuple(tensor.shape), tensor.stride()


def threads() -> int:
    return torch.get_num_threads()


def last_dim_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where its last dimension is contiguous, else a contiguous copy."""
    usual = tensor.is_contiguous() or tensor.stride(-1) == 1 or tensor.shape[-1] <= 1
    return tensor if usual else tensor.contiguous()


__all__ = ["DTYPE_CODES", "_C", "TensorView", "last_dim_contiguous", "threads", "view"]
