"""The losses by the C++ kernels (csrc/loss/)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gpt4v_fast import backends
from gpt4v_fast._native import _C, threads
from gpt4v_fast.ops import library
from gpt4v_fast.ops.loss import rows

if TYPE_CHECKING:
    from gpt4v_fast.ops.loss.cross_entropy import CrossEntropyCall
    from gpt4v_fast.ops.loss.linear_cross_entropy import LinearCrossEntropyCall

# Bytes of logits that forward may leave for backward at the most (csrc/loss/kept_logits.h), of 64 MiB of extra memory.
KEPT_BYTES = 56 << 20
HEADER_BYTES = 64  # at its start: whose logits these are

# Counted tokens with more bytes of logits than this have their gradients computed with the loss. Fewer are kept.
KEPT_BY_OP = KEPT_BYTES

# Extra memory of a call whose gradients come with the loss, nearly all of it for logits. The gradient of weight itself
# keeps some until it is written.
EXTRA_BYTES = 60 << 20


def _native(call: Any, target: torch.Tensor) -> Any:
    """The call as the extension takes it: a row of labels, class weights in fp32."""
    weight = call.class_weight
    return call._replace(target=target.reshape(-1), class_weight=None if weight is None else weight.to(torch.float32))


class CrossEntropy(backends.Backend):
    backend, kernel = "cpu", "_C.cross_entropy"

    def forward(self, call: CrossEntropyCall) -> rows.Rows:
        found = rows.empty_rows(call.logits.shape[0], call.logits)
        native = _native(call, call.target)
        _C.cross_entropy_forward(native, found.nll, found.lse, found.lse_low, found.argmax, threads())
        return found

    def backward_rows(
        self, call: CrossEntropyCall, saved: Any, slopes: tuple[torch.Tensor, torch.Tensor], wanted: Any,
        out: torch.Tensor | None = None, shard: bool = False,
    ) -> dict[str, torch.Tensor | None]:  # fmt: skip
        """The gradient for the slopes of nll and lse; `out` may be the logits."""
        logits = torch.empty(call.logits.shape, dtype=call.logits.dtype) if out is None else out
        native = _native(call, call.target)
        _C.cross_entropy_backward(native, saved.lse, saved.lse_low, *slopes, logits, threads())
        return {"logits": logits}


def has_many_logits(call: LinearCrossEntropyCall) -> bool:
    """Whether the counted tokens have more logits than forward can keep for backward, and slopes that are known."""
    if call.hidden.device.type != "cpu" or call.reduction == "none":
        return False
    row_bytes = call.hidden.element_size() * call.weight.shape[0]
    return call.hidden.shape[0] * row_bytes > KEPT_BY_OP and known_slopes(call, KEPT_BY_OP // row_bytes) is not None


def known_slopes(call: LinearCrossEntropyCall, fewest: int = -1) -> tuple[float, float] | None:
    """(a, b): the loss has the slope a in each token's nll, and b lse in its lse. None where no more than `fewest`
    tokens count, or where their weights add up to 0."""
    target = call.labels
    counted = target != call.ignore_index
    tokens = int(counted.sum())
    if tokens <= fewest:
        return None
    if call.reduction == "sum":
        return 1.0, 2.0 * call.z_loss
    weights, total = call.class_weight, float(tokens)
    if weights is not None:
        total = float(rows.weights_of_labels(target, counted, weights).sum(dtype=torch.float64))
    return None if total == 0.0 else (1.0 / total, 2.0 * call.z_loss / tokens)


def _empty_gradients(call: LinearCrossEntropyCall, wanted: Any) -> list[torch.Tensor | None]:
    """For the gradients of hidden, weight and bias, the last in fp32; None where nobody wants one."""
    inputs = ((call.hidden, wanted.hidden), (call.weight, wanted.weight), (call.bias, wanted.bias))
    return [
        None if x is None or not want else torch.empty(x.shape, dtype=torch.float32 if x is call.bias else x.dtype)
        for x, want in inputs
    ]


def _named(call: LinearCrossEntropyCall, gradients: list[torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
    hidden, weight, bias = gradients
    if bias is not None and call.bias is not None:
        bias = bias.to(call.bias.dtype)
    return {"hidden": hidden, "weight": weight, "bias": bias}


class Linear(backends.Backend):
    """Two passes. Forward keeps logits for backward as far as memory goes; backward computes the rest again."""

    backend, kernel = "cpu", "_C.linear_cross_entropy"

    def forward(self, call: LinearCrossEntropyCall, kept: torch.Tensor | None = None) -> Any:
        found = rows.empty_rows(call.hidden.shape[0], call.hidden)
        outputs = (found.nll, found.lse, found.lse_low, found.argmax, kept)
        _C.linear_cross_entropy_forward(_native(call, call.target), *outputs, threads())
        return found

    def backward(
        self, call: LinearCrossEntropyCall, saved: Any, upstream: Any, wanted: Any
    ) -> dict[str, torch.Tensor | None]:
        return self.backward_rows(call, saved, rows.slopes(call, saved, upstream), wanted)

    def backward_rows(
        self, call: LinearCrossEntropyCall, saved: Any, slopes: tuple[torch.Tensor, torch.Tensor], wanted: Any,
        shard: bool = False,
    ) -> dict[str, torch.Tensor | None]:  # fmt: skip
        gradients = _empty_gradients(call, wanted)
        kept = getattr(saved, "kept", None)
        kept = None if kept is None or not kept.numel() else kept
        native = _native(call, call.labels)
        _C.linear_cross_entropy_backward(native, saved.lse, saved.lse_low, kept, *slopes, *gradients, threads())
        return _named(call, gradients)


class LinearWithGradients(Linear):
    """One pass (csrc/loss/linear_cross_entropy_gradients.h): the slopes of a mean or a sum in every token's nll and lse
    are known before the loss is, up to the factor that arrives in the backward pass. With them all gradients come from
    logits that are computed once, some tokens at a time. Two passes, between which logits are kept as far as memory
    goes, compute the rest of them twice."""

    kernel = "_C.linear_cross_entropy_gradients"

    def refuses(self, traits: backends.Traits) -> str | None:
        if "ahead" not in traits.features:
            return "no plain eager call that wants gradients"
        if "many logits" not in traits.features:
            return "the logits of the counted tokens can be kept for backward, or their slopes are not known"
        if traits.dtype != torch.float32 and "gradient of weight" not in traits.features:
            return "nothing is won in 16 bits without a gradient of weight"
        return None

    def forward(self, call: LinearCrossEntropyCall, kept: torch.Tensor | None = None) -> Any:
        return library.Left(*self._compute(call, _Wanted(call)))

    def backward(
        self, call: LinearCrossEntropyCall, saved: Any, upstream: Any, wanted: Any
    ) -> dict[str, torch.Tensor | None]:
        """Hands the gradients out, scaled by what has arrived, and keeps none. Once more, through a retained graph, it
        computes them again in the same way, for the same bits."""
        if upstream.loss is None or upstream.lse is not None:  # the slopes were others
            return super().backward(call, saved, upstream, wanted)
        gradients = saved.left
        if gradients is None:
            _, gradients = self._compute(call._replace(target=call.labels.reshape(-1), shift=0), wanted)
        factor = float(upstream.loss)
        if factor != 1.0:
            gradients = [g if g is None else g.mul_(factor) for g in gradients]
        return _named(call, gradients)

    def _compute(self, call: LinearCrossEntropyCall, wanted: Any) -> tuple[rows.Rows, list[torch.Tensor | None]]:
        """Rows and gradients of a call whose labels are shifted already."""
        found, gradients = rows.empty_rows(call.hidden.shape[0], call.hidden), _empty_gradients(call, wanted)
        slopes = known_slopes(call)
        assert slopes is not None, "refused by its traits"
        outputs = (found.nll, found.lse, found.lse_low, found.argmax)
        _C.linear_cross_entropy_gradients(
            _native(call, call.target), *outputs, *slopes, *gradients, EXTRA_BYTES, threads()
        )
        return found, gradients


class _Wanted:
    """Which inputs want a gradient, before the backward pass says so."""

    def __init__(self, call: LinearCrossEntropyCall):
        self.hidden, self.weight = call.hidden.requires_grad, call.weight.requires_grad
        self.bias = call.bias is not None and call.bias.requires_grad
