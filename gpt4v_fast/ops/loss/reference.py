"""The oracles of both losses, the gradient by its formula, and the backends for calls that no kernel takes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from gpt4v_fast import backends
from gpt4v_fast.ops.softcap import cap

if TYPE_CHECKING:
    from gpt4v_fast.ops.loss.cross_entropy import CrossEntropyCall
    from gpt4v_fast.ops.loss.linear_cross_entropy import LinearCrossEntropyCall
    from gpt4v_fast.ops.loss.rows import Rows


class LossStats(NamedTuple):
    """What a loss knows of each token besides itself: lse, argmax and correct have the target's shape."""

    lse: torch.Tensor  # log sum exp of the (capped) logits; 0 where ignored
    argmax: torch.Tensor  # int64, the lowest index of the largest logit; -1 where ignored
    correct: torch.Tensor  # bool: argmax is the label; False where ignored
    z_loss: torch.Tensor  # the part of the loss that z_loss added, reduced as the loss is


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    return_stats: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, LossStats]:
    """F.cross_entropy of the capped logits, plus z_loss * lse^2; arguments as `gpt4v_fast.cross_entropy`."""
    rows, labels = logits.reshape(target.numel(), logits.shape[-1]), target.reshape(-1)
    nll, lse, argmax = cross_entropy_core(rows, labels, weight, ignore_index, label_smoothing, softcap)
    counted = labels != ignore_index
    penalty = z_loss * lse.square()
    if reduction == "none":
        loss, penalty = (nll + penalty).reshape(target.shape), penalty.reshape(target.shape)
    else:
        penalty = penalty.sum() if reduction == "sum" else penalty.sum() / counted.sum()
        loss = penalty + torch.nn.functional.cross_entropy(
            cap(rows, softcap) if softcap else rows,
            labels,
            None if weight is None else weight.to(rows.dtype),
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    if not return_stats:
        return loss
    correct = counted & (argmax == labels)
    lse, argmax, correct = (x.reshape(target.shape) for x in (lse, argmax, correct))
    return loss, LossStats(lse, argmax, correct, penalty.detach())


def cross_entropy_core(
    logits: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(nll, lse, argmax) of each row of logits (N, V): 0, 0, -1 where ignored; NaN, NaN, -1 where bad."""
    counted = target != ignore_index
    bad = counted & ((target < 0) | (target >= logits.shape[1]))
    z = cap(logits, softcap) if softcap else logits
    nll = torch.nn.functional.cross_entropy(
        z,
        torch.where(counted & ~bad, target, -1),
        None if class_weight is None else class_weight.to(z.dtype),
        ignore_index=-1,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    factor = torch.ones_like(nll).masked_fill(bad, math.nan)  # a product, so that the gradient is NaN too
    lse = torch.where(counted, torch.logsumexp(z, dim=1), 0.0)
    return nll * factor, lse * factor, torch.where(counted & ~bad, logits.argmax(dim=1), -1)


def cross_entropy_core_backward(
    grad_nll: torch.Tensor,
    grad_lse: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient of the logits for those of `cross_entropy_core`'s nll and lse; formula in csrc/loss/loss.h.

    lse (N,) is that of more classes than these, where these are a shard of the vocabulary.
    """
    V = logits.shape[1]
    counted = (target != ignore_index)[:, None]
    bad = counted & ((target < 0) | (target >= V))[:, None]
    label = torch.where(counted & ~bad, target[:, None], 0)  # (N, 1)
    z = cap(logits, softcap) if softcap else logits
    weights = logits.new_ones(V) if class_weight is None else class_weight.to(logits.dtype)
    of_label = grad_nll[:, None] * (1.0 - label_smoothing) * weights[label]
    of_all = grad_nll[:, None] * (label_smoothing / V)
    p = torch.softmax(z, dim=1) if lse is None else torch.exp(z - lse[:, None]).to(z.dtype)
    gradient = (of_label + of_all * weights.sum() + grad_lse[:, None]) * p - of_all * weights
    gradient = gradient.scatter_add(1, label, -of_label)
    if softcap:
        e = torch.exp(-2.0 * (logits / softcap).abs())
        gradient = gradient * (4.0 * e / (1.0 + e).square())  # 1 - tanh^2, see cap
    return torch.where(counted, gradient, 0.0).masked_fill(bad, math.nan)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
    shift: int = 0,
    ignore_index: int = -100,
    **options: Any,
) -> torch.Tensor | tuple[torch.Tensor, LossStats]:
    """`cross_entropy` of hidden @ weight^T + bias; arguments as `gpt4v_fast.linear_cross_entropy`."""
    logits = torch.nn.functional.linear(hidden, weight, None if bias is None else bias.to(hidden.dtype))
    if shift:
        last = target.new_full((*target.shape[:-1], min(shift, target.shape[-1])), ignore_index)
        target = torch.cat([target[..., shift:], last], dim=-1)
    return cross_entropy(logits, target, weight=class_weight, ignore_index=ignore_index, **options)


def _core(call: Any, logits: torch.Tensor) -> Rows:
    from gpt4v_fast.ops.loss.rows import Rows

    options = (call.class_weight, call.ignore_index, call.label_smoothing, call.softcap)
    nll, lse, argmax = cross_entropy_core(logits.float(), call.target.reshape(-1), *options)
    return Rows(nll, lse, argmax, torch.zeros_like(lse))


def _core_backward(call: Any, logits: torch.Tensor, saved: Any, slopes: Any, shard: bool) -> torch.Tensor:
    """`shard`: lse is that of the whole vocabulary, and logits are some columns of it."""
    options = (call.class_weight, call.ignore_index, call.label_smoothing, call.softcap)
    lse = saved.lse.double() + saved.lse_low if shard else None
    of_nll, of_lse = slopes
    return cross_entropy_core_backward(of_nll, of_lse, logits.float(), call.labels.reshape(-1), *options, lse)


class CrossEntropy(backends.Backend):
    backend, kernel = "reference", "reference.cross_entropy"

    def forward(self, call: CrossEntropyCall) -> Rows:
        return _core(call, call.logits)

    def backward_rows(
        self, call: CrossEntropyCall, saved: Any, slopes: tuple[torch.Tensor, torch.Tensor], wanted: Any,
        out: torch.Tensor | None = None, shard: bool = False,
    ) -> dict[str, torch.Tensor | None]:  # fmt: skip
        gradient = _core_backward(call, call.logits, saved, slopes, shard)
        return {"logits": gradient.to(call.logits.dtype) if out is None else out.copy_(gradient)}


class LinearCrossEntropy(backends.Backend):
    backend, kernel = "reference", "reference.linear_cross_entropy"

    def forward(self, call: LinearCrossEntropyCall, kept: torch.Tensor | None = None) -> Any:
        return _core(call, _logits(call))

    def backward(
        self, call: LinearCrossEntropyCall, saved: Any, upstream: Any, wanted: Any
    ) -> dict[str, torch.Tensor | None]:
        from gpt4v_fast.ops.loss.rows import slopes

        return self.backward_rows(call, saved, slopes(call, saved, upstream), wanted)

    def backward_rows(
        self, call: LinearCrossEntropyCall, saved: Any, slopes: tuple[torch.Tensor, torch.Tensor], wanted: Any,
        shard: bool = False,
    ) -> dict[str, torch.Tensor | None]:  # fmt: skip
        gradient = _core_backward(call, _logits(call), saved, slopes, shard)
        found: dict[str, torch.Tensor | None] = {}
        if wanted.hidden:
            found["hidden"] = (gradient @ call.weight.float()).to(call.hidden.dtype)
        if wanted.weight:
            found["weight"] = (gradient.t() @ call.hidden.float()).to(call.weight.dtype)
        if wanted.bias and call.bias is not None:
            found["bias"] = gradient.sum(dim=0).to(call.bias.dtype)
        return found


def _logits(call: LinearCrossEntropyCall) -> torch.Tensor:
    bias = None if call.bias is None else call.bias.float()
    return torch.nn.functional.linear(call.hidden.float(), call.weight.float(), bias)
