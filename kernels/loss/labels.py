"""What is remembered of a bad label on a GPU, in one launch: see gpt4v_fast/ops/labels.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gpt4v_fast.kernels.common import launch_options, on_device, target_arch

MOST = 1 << 16  # labels that one program looks at; more are better looked at by many
_BLOCK = 4096


@triton.jit(do_not_specialize=["N", "V", "ignore_index"])
def _remember_bad_label_kernel(target_ptr, state_ptr, N, V, ignore_index, BLOCK: tl.constexpr):
    """state (found, label, place, V) of the first label outside [0, V) that is not ignore_index, if it has none yet."""
    first = N
    for start in tl.range(0, N, BLOCK):
        place = start + tl.arange(0, BLOCK)
        label = tl.load(target_ptr + place, mask=place < N, other=ignore_index)
        bad = ((label < 0) | (label >= V)) & (label != ignore_index)
        first = tl.minimum(first, tl.min(tl.where(bad, place, N), 0))
    if (first < N) & (tl.load(state_ptr) == 0):
        tl.store(state_ptr, 1)
        tl.store(state_ptr + 1, tl.load(target_ptr + first))
        tl.store(state_ptr + 2, first)
        tl.store(state_ptr + 3, V)


def remember_bad_label(target: torch.Tensor, state: torch.Tensor, V: int, ignore_index: int) -> None:
    """target: at most MOST int64 labels; state (4,), int64, on their device."""
    with on_device(target):
        _remember_bad_label_kernel[(1,)](
            target.contiguous(), state, target.numel(), V, ignore_index,
            BLOCK=_BLOCK, num_warps=8, **launch_options(target_arch()),
        )  # fmt: skip
