"""What the losses' kernels give for each row, and the reduction of rows to a loss, forward and backward.

A kernel gives nll and lse of each token's row of logits; the loss is

    "none"  nll + z_loss lse^2                               "sum"  sum nll + z_loss sum lse^2
    "mean"  sum nll / total + z_loss sum lse^2 / tokens

over the counted tokens, total being the sum of their labels' class weights (F.cross_entropy's rule). The ops reduce
inside: backward turns the gradient of the loss into one of nll and of lse for each row (`slopes`).
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch

from gpt4v_fast.ops.loss import labels
from gpt4v_fast.ops.loss.reference import LossStats


class Rows(NamedTuple):
    nll: torch.Tensor  # (N,) fp32, 0 where ignored
    lse: torch.Tensor  # (N,) fp32, 0 where ignored
    argmax: torch.Tensor  # (N,) int64, -1 where ignored
    lse_low: torch.Tensor  # (N,) fp32: what rounding lse left out


class LossOutputs(NamedTuple):
    """The outputs of the loss ops."""

    loss: torch.Tensor  # fp32, a scalar or, for "none", the target's shape
    lse: torch.Tensor  # (N,) fp32
    argmax: torch.Tensor  # (N,) int64
    penalty: torch.Tensor  # fp32, z_loss's part of the loss, of its shape; empty where z_loss is 0
    lse_low: torch.Tensor  # (N,) fp32
    tokens: torch.Tensor  # int64 scalar, the tokens that count; empty but for "mean"
    total: torch.Tensor  # fp64 scalar, the class weights of their labels; empty but for "mean" with class weights


class LossCall(Protocol):
    """What both losses' call objects have."""

    target: torch.Tensor
    class_weight: torch.Tensor | None
    ignore_index: int
    label_smoothing: float
    softcap: float
    reduction: str
    z_loss: float


def empty_rows(rows: int, like: torch.Tensor) -> Rows:
    nll, lse, lse_low = (like.new_empty(rows, dtype=torch.float32) for _ in range(3))
    return Rows(nll, lse, like.new_empty(rows, dtype=torch.int64), lse_low)


def empty_outputs(call: Any, like: torch.Tensor) -> LossOutputs:
    """Of a call's shapes, for the fake kernels."""
    rows = empty_rows(call.target.numel(), like)
    shape = call.target.shape if call.reduction == "none" else ()
    loss, penalty = (like.new_empty(shape, dtype=torch.float32) for _ in range(2))
    nothing = like.new_empty(0, dtype=torch.float64)
    is_mean, is_weighted = call.reduction == "mean", call.class_weight is not None
    return LossOutputs(
        loss,
        rows.lse,
        rows.argmax,
        penalty if call.z_loss else like.new_empty(0, dtype=torch.float32),
        rows.lse_low,
        like.new_empty((), dtype=torch.int64) if is_mean else like.new_empty(0, dtype=torch.int64),
        like.new_empty((), dtype=torch.float64) if is_mean and is_weighted else nothing,
    )


def reduce_rows(call: Any, rows: Rows, target: torch.Tensor, label_weight: torch.Tensor | None = None) -> LossOutputs:
    """The loss of the rows. `target` is shifted, of the tokens' shape; `label_weight` (N,) the labels' class weights
    where call.class_weight is a shard of the vocabulary.

    Sums are taken in fp64: their order, which torch lets depend on the number of threads, is then lost in rounding.
    """
    nll, lse = rows.nll, rows.lse
    penalty = call.z_loss * lse.square() if call.z_loss else None
    tokens, total = nll.new_empty(0, dtype=torch.int64), nll.new_empty(0, dtype=torch.float64)
    if call.reduction == "none":
        loss, penalty = nll.reshape(target.shape), None if penalty is None else penalty.reshape(target.shape)
        loss = loss.clone() if penalty is None else loss + penalty
    else:
        loss = nll.sum(dtype=torch.float64)
        penalty = None if penalty is None else penalty.sum(dtype=torch.float64)
        if call.reduction == "mean":
            counted = target != call.ignore_index
            tokens = counted.sum()
            if call.class_weight is not None:
                if label_weight is None:
                    label_weight = weights_of_labels(target, counted, call.class_weight)
                total = label_weight.sum(dtype=torch.float64)
            loss = loss / (total if call.class_weight is not None else tokens)
            penalty = None if penalty is None else penalty / tokens
        loss = (loss if penalty is None else loss + penalty).to(torch.float32)
    penalty = nll.new_empty(0) if penalty is None else penalty.to(torch.float32)
    return LossOutputs(loss, lse, rows.argmax, penalty, rows.lse_low, tokens, total)


def weights_of_labels(target: torch.Tensor, counted: torch.Tensor, class_weight: torch.Tensor) -> torch.Tensor:
    """The class weight of every token's label, 0 where it does not count."""
    V = class_weight.shape[0]
    inside = torch.where(counted & (target >= 0) & (target < V), target, 0).reshape(-1).to(torch.int64)
    return torch.where(counted.reshape(-1), class_weight.to(torch.float32)[inside], 0.0)


def slopes(call: Any, saved: Any, upstream: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of nll and of lse, (N,) fp32 each, for those of the loss and of the statistics' lse."""
    lse, grad_loss = saved.lse, upstream.loss
    N = lse.shape[0]
    if grad_loss is None:
        of_nll = of_penalty = torch.zeros_like(lse)
    elif call.reduction == "none":
        of_nll = of_penalty = grad_loss.reshape(N)
    elif call.reduction == "sum":
        of_nll = of_penalty = grad_loss.expand(N)
    else:
        grad_loss = grad_loss.double()
        of_nll = (grad_loss / (saved.tokens if call.class_weight is None else saved.total)).float().expand(N)
        of_penalty = (grad_loss / saved.tokens).float()
    of_lse = torch.zeros_like(lse) if upstream.lse is None else upstream.lse
    if call.z_loss and grad_loss is not None:
        of_lse = of_lse + (of_penalty * call.z_loss) * (2.0 * lse)
    return of_nll, of_lse


def result(call: Any, outputs: Any, target: torch.Tensor, return_stats: bool) -> Any:
    """What the public functions return; `target` is shifted, of the tokens' shape."""
    if not return_stats:
        return outputs.loss
    argmax = outputs.argmax.reshape(target.shape)
    correct = (target != call.ignore_index) & (argmax == target)
    penalty = outputs.penalty if call.z_loss else torch.zeros_like(outputs.loss.detach())
    return outputs.loss, LossStats(outputs.lse.reshape(target.shape), argmax, correct, penalty.detach())


def look_at_labels(target: torch.Tensor, V: int, ignore_index: int, backend: str, shift: int = 0) -> None:
    """Raises for a bad label on a CPU; remembers it where a Triton kernel meets it."""
    if labels.raise_at_once(target, backend):
        labels.raise_if_bad(target, V, ignore_index, shift)
    else:
        labels.remember_bad(target, V, ignore_index, backend)
