"""The options of the losses' public functions as types, for their overloads by `return_stats`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

import torch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LossOptions(TypedDict, total=False):
    ignore_index: int
    reduction: str
    label_smoothing: float
    z_loss: float
    softcap: float | None
    process_group: ProcessGroup | None
    vocab_sizes: Sequence[int] | None


class CrossEntropyOptions(LossOptions, total=False):
    weight: torch.Tensor | None
    inplace_backward: bool


class LinearCrossEntropyOptions(LossOptions, total=False):
    bias: torch.Tensor | None
    class_weight: torch.Tensor | None
    shift: int
    reduce_grad_hidden: bool
