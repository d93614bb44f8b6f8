"""Softmax cross-entropy of given logits: the public function, its torch ops, and the ways to a kernel.

user -> cross_entropy -> gpt4v_fast::cross_entropy -> _C.cross_entropy_forward (csrc/loss/cross_entropy.h)
                                                   or kernels/loss/cross_entropy.py (Triton)
                                                   or reference.cross_entropy_core
With process_group: gpt4v_fast::sharded_cross_entropy, which runs the same on a shard (ops/vocab_parallel.py).

The ops give nll and lse of each row; reductions, means and z_loss are small torch operations on those.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from gpt4v_fast import backends, reference
from gpt4v_fast._native import _C, threads, view
from gpt4v_fast.ops import checks, labels, library, vocab_parallel
from gpt4v_fast.reference import LossStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

REDUCTIONS = ("mean", "sum", "none")


class LossOptions(NamedTuple):
    """The arguments of the loss ops behind their tensors, in the schema's order; softcap 0 is none."""

    class_weight: torch.Tensor | None
    ignore_index: int
    label_smoothing: float
    softcap: float


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
    inplace_backward: bool = False,
    process_group: ProcessGroup | None = None,
    vocab_sizes: Sequence[int] | None = None,
) -> torch.Tensor | tuple[torch.Tensor, LossStats]:
    """Softmax cross-entropy over the last dimension, with the numbers of F.cross_entropy of the fp32 logits.

        z = c tanh(x / c), or x without softcap;   lse = log sum_j exp z_j
        nll = (1 - eps) w_y (lse - z_y) + eps / V sum_j w_j (lse - z_j)
        loss = nll + z_loss lse^2 for each counted token, 0 for an ignored one

    "mean" divides the sum of nll by the sum of the counted labels' weights (F.cross_entropy's rule) and the z
    part by the number of counted tokens; with none counted it is NaN and its gradients are zero. Statistics
    are fp32.

    Args:
        logits: (..., V), fp32, bf16 or fp16, any strides.
        target: (...), integer labels in [0, V), or ignore_index.
        weight: (V,), class weights w; a constant, no gradient reaches it.
        ignore_index: the label of tokens that do not count.
        reduction: "mean", "sum" or "none".
        label_smoothing: eps above, in [0, 1].
        z_loss: factor of lse^2 (PaLM, Chowdhery et al. 2022).
        softcap: c above (Gemma 2), or None.
        return_stats: also return LossStats(lse, argmax, correct, z_loss); lse is differentiable.
        inplace_backward: let the gradient take the logits' own memory, which halves what the largest tensors of a
            training step need and spares the time to get more. The logits are overwritten by the backward pass: whoever
            else needs them then, and a second backward pass, gets torch's error about an in-place operation. Logits
            whose rows overlap or are not contiguous, and those of compiled code, which plans memory itself, stay.
        process_group: the processes that share the vocabulary (tensor parallelism): logits and weight are this
            process's columns of V, in the order of the ranks; labels are of the whole vocabulary and the same on every
            process, and so is the result, to the bit. Two all-reduces of a few numbers per token; none backward.
            Logits that are a DTensor sharded along V bring group and sizes with them.
        vocab_sizes: how many classes each rank holds; None: all as many as this one.

    Returns:
        The loss, fp32: a scalar, or (...) for "none". With return_stats (loss, stats).

    Raises:
        TypeError, ValueError: an argument of a wrong kind, dtype, shape or device; the message names it.
            inplace_backward with logits that are a leaf (their values would become their .grad) or a process_group.
        IndexError: a label outside [0, V) that is not ignore_index, with its place; on a GPU the loss and the
            gradients of that row are NaN instead, and `check_labels` raises.
        FallbackError: in strict mode, when no fast kernel takes the call.
        With process_group a bad label raises on every process, and so do labels, options or sizes that differ between
        them (on a GPU: losses are NaN). A bad argument of another kind on one process alone leaves the others waiting.

    Source: Milakov and Gimelshein (2018) for the online softmax; PyTorch's F.cross_entropy for the arguments.
    """
    if vocab_parallel.is_dtensor(logits):
        parts = vocab_parallel.local_parts("logits", logits, -1, process_group, vocab_sizes)
        logits, process_group, vocab_sizes = parts
        target, weight = vocab_parallel.whole(target), vocab_parallel.to_local(weight)
    numbers = (ignore_index, reduction, label_smoothing, z_loss, softcap)
    arguments = prepare(logits, target, weight, *numbers, return_stats, inplace_backward, process_group, vocab_sizes)
    target, options = arguments[1], LossOptions(*arguments[2:6])
    if process_group is None:
        nll, lse, argmax, _ = _cross_entropy_op(*arguments)
        return reduce_loss(nll, lse, argmax, target, options, reduction, z_loss, return_stats)
    nll, lse, argmax, _, label_weight, _ = _sharded_cross_entropy_op(*arguments)
    return reduce_loss(nll, lse, argmax, target, options, reduction, z_loss, return_stats, label_weight)


def prepare(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    return_stats: bool = False,
    inplace_backward: bool = False,
    process_group: ProcessGroup | None = None,
    vocab_sizes: Sequence[int] | None = None,
) -> tuple[Any, ...]:
    """Checks `cross_entropy`'s arguments and returns those of the torch op (the sharded one with a process group)."""
    checks.check_tensor("logits", logits)
    if logits.dim() == 0 or (logits.shape[-1] == 0 and process_group is None):
        raise ValueError(f"logits: expected shape (..., V) with V at least 1, got {tuple(logits.shape)}")
    V = logits.shape[-1]
    target = labels.check_target(target, tuple(logits.shape[:-1]), f"logits {tuple(logits.shape)}", logits)
    options = check_options("weight", weight, V, logits, ignore_index, reduction, label_smoothing, z_loss, softcap)
    shards = vocab_parallel.find_shards("logits", V, process_group, vocab_sizes)
    if inplace_backward:
        if shards is not None:
            raise ValueError("inplace_backward: expected False with a process_group, got True")
        if logits.is_leaf and logits.requires_grad and torch.is_grad_enabled():
            raise ValueError("inplace_backward: expected logits that were computed, got a leaf that requires grad")
    further = (bool(inplace_backward),) if shards is None else (*shards, return_stats)
    return logits.reshape(target.numel(), V), target, *options, *further


def check_options(
    weight_name: str,
    class_weight: torch.Tensor | None,
    V: int,
    like: torch.Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> LossOptions:
    """Checks the arguments that both losses have."""
    if class_weight is not None:
        checks.check_tensor(weight_name, class_weight)
        checks.check_shape(weight_name, class_weight, (V,), "(V,)")
        if class_weight.device != like.device:
            raise ValueError(f"{weight_name}: expected the device {like.device}, got {class_weight.device}")
        if class_weight.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{weight_name}: expected a tensor that needs no gradient, got one that does")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
    if not math.isfinite(z_loss):
        raise ValueError(f"z_loss: expected a finite number, got {z_loss}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")
    return LossOptions(class_weight, ignore_index, float(label_smoothing), checks.check_softcap(softcap))


def reduce_loss(
    nll: torch.Tensor,
    lse: torch.Tensor,
    argmax: torch.Tensor,
    target: torch.Tensor,
    options: LossOptions,
    reduction: str,
    z_loss: float,
    return_stats: bool,
    label_weight: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, LossStats]:
    """The loss, and its statistics if asked, from the rows' nll and lse; target has the shape of the tokens.
    label_weight is the labels' class weights where options.class_weight is a shard.

    Sums are taken in fp64: their order, which torch lets depend on the number of threads, is then lost in
    rounding.
    """
    counted = target != options.ignore_index
    penalty = z_loss * lse.square() if z_loss else None
    if reduction == "none":
        loss, penalty = nll.reshape(target.shape), None if penalty is None else penalty.reshape(target.shape)
    else:
        loss = nll.sum(dtype=torch.float64)
        penalty = None if penalty is None else penalty.sum(dtype=torch.float64)
    if reduction == "mean":
        tokens = counted.sum()
        weight = options.class_weight
        if weight is not None and label_weight is None:
            label_weight = labels_weight(target, counted, weight)
        loss = loss / (tokens if weight is None or label_weight is None else label_weight.sum(dtype=torch.float64))
        penalty = None if penalty is None else penalty / tokens
    loss = (loss if penalty is None else loss + penalty).to(torch.float32)
    if not return_stats:
        return loss
    argmax = argmax.reshape(target.shape)
    part = torch.zeros_like(loss) if penalty is None else penalty.detach().to(torch.float32)
    return loss, LossStats(lse.reshape(target.shape), argmax, counted & (argmax == target), part.detach())


def labels_weight(target: torch.Tensor, counted: torch.Tensor, class_weight: torch.Tensor) -> torch.Tensor:
    """The class weight of every token's label, 0 where it does not count."""
    V = class_weight.shape[0]
    inside = torch.where(counted & (target >= 0) & (target < V), target, 0).reshape(-1).to(torch.int64)
    return torch.where(counted.reshape(-1), class_weight.to(torch.float32)[inside], 0.0)


def _request(*args: Any, **kwargs: Any) -> backends.Request:
    logits = prepare(*args, **kwargs)[0]
    return describe("cross_entropy", logits)


def describe(op: str, tensor: torch.Tensor) -> backends.Request:
    return backends.Request(op, tensor.device.type, tensor.dtype)


backends.register_kernel("cross_entropy", "cpu", "_C.cross_entropy")
backends.register_kernel("cross_entropy", "triton", "kernels.cross_entropy")
backends.register_explainer(cross_entropy, _request)


def look_at_labels(target: torch.Tensor, V: int, ignore_index: int, backend: str, shift: int = 0) -> None:
    """Raises for a bad label on a CPU; remembers it where a Triton kernel meets it."""
    if labels.raise_at_once(target, backend):
        labels.raise_if_bad(target, V, ignore_index, shift)
    else:
        labels.remember_bad(target, V, ignore_index, backend)


def row_tensors(rows: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Empty nll, lse, argmax and lse_low, as the ops return them."""
    nll, lse, lse_low = (like.new_empty(rows, dtype=torch.float32) for _ in range(3))
    return nll, lse, like.new_empty(rows, dtype=torch.int64), lse_low


def native_weight(class_weight: torch.Tensor | None) -> torch.Tensor | None:
    return None if class_weight is None else class_weight.to(torch.float32)


def triton_options(options: LossOptions) -> dict[str, Any]:
    return {
        "weight": options.class_weight,
        "ignore_index": options.ignore_index,
        "label_smoothing": options.label_smoothing,
        "softcap": options.softcap or None,
    }


def _cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    *loss_options, _ = rest
    options = LossOptions(*loss_options)
    backend = backends.pick(describe("cross_entropy", logits)).backend
    N, V = logits.shape
    look_at_labels(target, V, options.ignore_index, backend)
    rows = target.reshape(-1).to(torch.int64)
    if backend == "cpu":
        nll, lse, argmax, lse_low = row_tensors(N, logits)
        weight = native_weight(options.class_weight)
        head = (view(logits), view(rows), view(weight), *options[1:])
        _C.cross_entropy_forward(*head, view(nll), view(lse), view(lse_low), view(argmax), threads())
        return nll, lse, argmax, lse_low
    if backend == "triton":
        from gpt4v_fast.kernels.loss import cross_entropy as kernel

        nll, lse, argmax = kernel.cross_entropy_forward(logits, rows, **triton_options(options))
    else:
        nll, lse, argmax = reference.cross_entropy_core(logits.float(), rows, *options)
    return nll, lse, argmax, torch.zeros_like(lse)


def _cross_entropy_backward(
    grad_nll: torch.Tensor,
    grad_lse: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    lse_low: torch.Tensor,
    *rest: Any,
    shard: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`shard`: lse is that of the whole vocabulary, and logits are some columns of it. `out` may be logits."""
    options = LossOptions(*rest)
    backend = backends.pick(describe("cross_entropy", logits)).backend
    rows = target.reshape(-1).to(torch.int64)
    if backend == "cpu":
        grad_logits = torch.empty(logits.shape, dtype=logits.dtype) if out is None else out
        weight = native_weight(options.class_weight)
        head = (view(logits), view(rows), view(weight), *options[1:])
        _C.cross_entropy_backward(*head, *(view(x) for x in (lse, lse_low, grad_nll, grad_lse, grad_logits)), threads())
        return grad_logits
    if backend == "triton":
        from gpt4v_fast.kernels.loss import cross_entropy as kernel

        return kernel.cross_entropy_backward(grad_nll, grad_lse, logits, rows, lse, **triton_options(options), out=out)
    exact_lse = lse.double() + lse_low if shard else None
    gradient = reference.cross_entropy_core_backward(grad_nll, grad_lse, logits.float(), rows, *options, exact_lse)
    return gradient.to(logits.dtype) if out is None else out.copy_(gradient)


def _cross_entropy_fake(
    logits: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return row_tensors(logits.shape[0], logits)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits, target, class_weight, *scalars = inputs
    _, lse, argmax, lse_low = output
    ctx.mark_non_differentiable(argmax, lse_low)
    ctx.set_materialize_grads(False)  # or zeros would be made for all outputs
    ctx.save_for_backward(logits, target, lse, lse_low, class_weight)
    ctx.scalars = scalars


def _autograd(ctx: Any, grad_nll: torch.Tensor | None, grad_lse: torch.Tensor | None, *unused: Any) -> tuple[Any, ...]:
    logits, target, lse, lse_low, class_weight = ctx.saved_tensors
    *options, inplace = ctx.scalars
    slopes = (torch.zeros_like(lse) if slope is None else slope for slope in (grad_nll, grad_lse))
    arguments = (*slopes, logits, target, lse, lse_low, class_weight, *options)
    if inplace and _can_be_overwritten(logits):
        # No registered op may return its argument.
        gradient = _cross_entropy_backward(*arguments, out=logits.detach())
        torch.autograd.graph.increment_version(logits)
    else:
        gradient = _cross_entropy_backward_op(*arguments)
    return gradient, *[None] * 6


def _can_be_overwritten(logits: torch.Tensor) -> bool:
    rows_apart = logits.stride(1) == 1 and logits.stride(0) >= logits.shape[1]
    return rows_apart and not torch.is_grad_enabled() and not library.is_traced_or_transformed()


LOSS_OPTIONS = "Tensor? class_weight, int ignore_index, float label_smoothing, float softcap"

_cross_entropy_op = library.define_op(
    f"cross_entropy(Tensor logits, Tensor target, {LOSS_OPTIONS}, bool inplace_backward) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _cross_entropy,
    _cross_entropy_fake,
    setup_context=_setup_context,
    backward=_autograd,
)
_cross_entropy_backward_op = library.define_op(
    "cross_entropy_backward(Tensor grad_nll, Tensor grad_lse, Tensor logits, Tensor target, Tensor lse, "
    f"Tensor lse_low, {LOSS_OPTIONS}) -> Tensor",
    _cross_entropy_backward,
    lambda grad_nll, grad_lse, logits, *rest: logits.new_empty(logits.shape),
    gradient_of="cross_entropy",
)


def _sharded_cross_entropy(logits: torch.Tensor, target: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    *loss_options, sizes, rank, group, with_argmax = rest

    def local(rows: torch.Tensor, *options: Any) -> tuple[torch.Tensor, ...]:
        return _cross_entropy(logits, rows, *options, False)

    def logit_at(columns: torch.Tensor) -> torch.Tensor:
        return logits.gather(1, columns[:, None])[:, 0].float()

    shards = vocab_parallel.Shards(tuple(sizes), rank, group)
    options = LossOptions(*loss_options)
    backend = backends.pick(describe("cross_entropy", logits)).backend
    functions = (local, logit_at if with_argmax else None)
    return vocab_parallel.forward(*functions, target, options, shards, ("cross_entropy",), backend)


def _sharded_cross_entropy_backward(
    grad_nll: torch.Tensor,
    grad_lse: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    lse_low: torch.Tensor,
    label_weight: torch.Tensor,
    weight_sum: torch.Tensor,
    *rest: Any,
) -> torch.Tensor:
    *loss_options, sizes, rank, group, _ = rest
    options, shards = LossOptions(*loss_options), vocab_parallel.Shards(tuple(sizes), rank, group)
    gradients = [
        _cross_entropy_backward(*slopes, logits, rows, lse, lse_low, *its_options, shard=True)
        for slopes, rows, its_options in vocab_parallel.backward_calls(
            grad_nll, grad_lse, target, label_weight, weight_sum, options, shards
        )
    ]
    return vocab_parallel.add_up(gradients, logits)


def _setup_sharded_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits, target, class_weight, *scalars = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(logits, target, output[1], *output[3:], class_weight)
    ctx.scalars = scalars


def _sharded_autograd(ctx: Any, grad_nll: torch.Tensor, grad_lse: torch.Tensor, *unused: Any) -> tuple[Any, ...]:
    gradient = _sharded_cross_entropy_backward_op(grad_nll, grad_lse, *ctx.saved_tensors, *ctx.scalars)
    return gradient, *[None] * 9


def sharded_row_tensors(rows: int, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Empty outputs of the sharded ops."""
    label_weight, weight_sum = like.new_empty(rows, dtype=torch.float32), like.new_empty((), dtype=torch.float64)
    return *row_tensors(rows, like), label_weight, weight_sum


SHARDS = "SymInt[] sizes, int rank, str group"

_sharded_cross_entropy_op = library.define_op(
    f"sharded_cross_entropy(Tensor logits, Tensor target, {LOSS_OPTIONS}, {SHARDS}, bool with_argmax) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _sharded_cross_entropy,
    lambda logits, *rest: sharded_row_tensors(logits.shape[0], logits),
    setup_context=_setup_sharded_context,
    backward=_sharded_autograd,
)
_sharded_cross_entropy_backward_op = library.define_op(
    "sharded_cross_entropy_backward(Tensor grad_nll, Tensor grad_lse, Tensor logits, Tensor target, Tensor lse, "
    f"Tensor lse_low, Tensor label_weight, Tensor weight_sum, {LOSS_OPTIONS}, {SHARDS}, bool with_argmax) -> Tensor",
    _sharded_cross_entropy_backward,
    lambda grad_nll, grad_lse, logits, *rest: logits.new_empty(logits.shape),
    gradient_of="cross_entropy",
)
