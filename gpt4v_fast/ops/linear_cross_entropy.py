"""The projection to the vocabulary and its cross-entropy in one: the public function and its torch ops.

user -> linear_cross_entropy -> gpt4v_fast::linear_cross_entropy
                                    -> by_backend.forward (ops/linear_cross_entropy_backends.py):
                                       _C.linear_cross_entropy_forward (csrc/loss/linear_cross_entropy.h)
                                    or _C.linear_cross_entropy_gradients (ops/linear_cross_entropy_gradients.py)
                                    or kernels/loss/linear_cross_entropy.py (Triton; logits stay in registers)
                                    or kernels/loss/linear_cross_entropy_products.py (small problems: torch products, Triton)
                                    or reference.cross_entropy_core
With process_group: gpt4v_fast::sharded_linear_cross_entropy, which runs the same on a shard (ops/vocab_parallel.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from gpt4v_fast import backends
from gpt4v_fast.ops import checks, labels, library, vocab_parallel
from gpt4v_fast.ops import linear_cross_entropy_backends as by_backend
from gpt4v_fast.ops.cross_entropy import (
    LOSS_OPTIONS,
    SHARDS,
    LossOptions,
    check_options,
    reduce_loss,
    sharded_row_tensors,
)
from gpt4v_fast.ops.linear_cross_entropy_gradients import known_slopes, with_gradients
from gpt4v_fast.ops.linear_cross_entropy_kept import can_keep, with_kept_logits
from gpt4v_fast.reference import LossStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    shift: int = 0,
    return_stats: bool = False,
    process_group: ProcessGroup | None = None,
    vocab_sizes: Sequence[int] | None = None,
    reduce_grad_hidden: bool = True,
) -> torch.Tensor | tuple[torch.Tensor, LossStats]:
    """`cross_entropy` of the logits hidden @ weight^T + bias, which are never written whole.

    The logits are fp32 whatever the inputs are, tokens whose label is ignore_index are dropped before any product, and
    extra memory is at most 64 MiB beside the gradients for any N and V (on a CPU for E up to 65,536; on a GPU also
    beside some numbers per token, and without a synchronisation). Where a gradient is wanted on a CPU, as much of it as
    is free keeps logits until the backward pass, which computes the rest again; the gradients of means and sums of more
    logits than that, in eager mode, are computed with the loss, and scaled by what arrives in the backward pass.
    Small problems, whose fp32 logits take at most 32 MiB, run on a GPU as products of all tokens, ignored ones too;
    `explain` says which way a call takes.

    Args:
        hidden: (..., E), fp32, bf16 or fp16, any strides. Under autocast, hidden, weight and bias take its
            dtype.
        weight: (V, E) in hidden's dtype.
        target: (...), integer labels in [0, V), or ignore_index.
        bias: (V,), any of these float dtypes.
        class_weight: (V,), weights of the classes; a constant, no gradient reaches it.
        shift: position t predicts label t + shift along hidden's last but one dimension, without a copy of
            hidden; the last `shift` positions do not count. 1 is a language model's loss.
        ignore_index, reduction, label_smoothing, z_loss, softcap, return_stats: as for `cross_entropy`;
            position t of the "none" loss and of the statistics is about the prediction that is made there.
        process_group, vocab_sizes: as for `cross_entropy`: weight, bias and class_weight are this process's rows of
            the vocabulary, hidden and target are the same on every process. A weight that is a DTensor of Shard(0)
            brings both with it; then hidden may be a DTensor of its mesh too, of any placement.
        reduce_grad_hidden: all-reduce the gradient of hidden over process_group (in fp32), so that every process has
            the whole of it, as behind Megatron's copy to the tensor-parallel region. False leaves each process its
            partial sum, for callers that add them up themselves (sequence parallelism: one reduce-scatter).

    Returns:
        The loss, fp32: a scalar, or target's shape for "none". With return_stats (loss, stats). Gradients
        reach hidden, weight and bias. With process_group each process has the same loss, and gradients of its rows.

    Raises:
        TypeError, ValueError, IndexError, FallbackError: as `cross_entropy`.

    Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (2024).
    """
    if vocab_parallel.is_dtensor(weight):
        hidden, reduce_grad_hidden = vocab_parallel.replicated(hidden, weight, reduce_grad_hidden)
        parts = vocab_parallel.local_parts("weight", weight, 0, process_group, vocab_sizes)
        weight, process_group, vocab_sizes = parts
        bias, class_weight = (vocab_parallel.to_local(x) for x in (bias, class_weight))
        target = vocab_parallel.whole(target)
    numbers = (ignore_index, reduction, label_smoothing, z_loss, softcap, shift)
    further = (return_stats, process_group, vocab_sizes, reduce_grad_hidden)
    arguments = prepare(hidden, weight, target, bias, class_weight, *numbers, *further)
    options = LossOptions(*arguments[4:8])
    label_weight = None
    slopes = known_slopes(arguments, reduction, z_loss) if process_group is None else None
    if slopes is not None and backends.pick(by_backend.describe(*arguments[:2])).backend == "cpu":
        nll, lse, argmax = with_gradients(arguments, slopes, _linear_cross_entropy_backward_op)
    elif process_group is None and can_keep(arguments) and by_backend.is_fused(*arguments[:2]):
        nll, lse, argmax = with_kept_logits(arguments, _linear_cross_entropy_backward_op)
    elif process_group is None:
        nll, lse, argmax, *_ = _linear_cross_entropy_op(*arguments)
    else:
        nll, lse, argmax, _, label_weight, _ = _sharded_linear_cross_entropy_op(*arguments)
    target = labels.shifted(arguments[3], shift, ignore_index)
    return reduce_loss(nll, lse, argmax, target, options, reduction, z_loss, return_stats, label_weight)


def prepare(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    shift: int = 0,
    return_stats: bool = False,
    process_group: ProcessGroup | None = None,
    vocab_sizes: Sequence[int] | None = None,
    reduce_grad_hidden: bool = True,
) -> tuple[Any, ...]:
    """Checks `linear_cross_entropy`'s arguments and returns those of the torch op (the sharded one with a group)."""
    checks.check_tensor("hidden", hidden)
    checks.check_tensor("weight", weight, ndim=2)
    if bias is not None:
        checks.check_tensor("bias", bias)
    hidden, weight, bias = library.autocast(hidden, weight, bias)
    checks.check_like("weight", weight, "hidden", hidden)
    V, E = weight.shape
    if V == 0 and process_group is None:
        raise ValueError(f"weight: expected shape (V, E) with V at least 1, got {tuple(weight.shape)}")
    if hidden.dim() == 0 or hidden.shape[-1] != E:
        raise ValueError(f"hidden: expected shape (..., E) with weight's E = {E}, got {tuple(hidden.shape)}")
    if bias is not None:
        checks.check_shape("bias", bias, (V,), "(V,)")
        checks.check_device("bias", bias, "hidden", hidden)
    target = labels.check_target(target, tuple(hidden.shape[:-1]), f"hidden {tuple(hidden.shape)}", hidden)
    options = check_options(
        "class_weight", class_weight, V, hidden, ignore_index, reduction, label_smoothing, z_loss, softcap
    )
    if isinstance(shift, bool) or not isinstance(shift, int):
        raise TypeError(f"shift: expected an int, got {type(shift).__name__}")
    if shift < 0 or (shift > 0 and target.dim() == 0):
        raise ValueError(f"shift: expected 0 or more, and 0 for a single token, got {shift}")
    shards = vocab_parallel.find_shards("weight", V, process_group, vocab_sizes)
    # vmap would stack what each element keeps.
    keep = torch.is_grad_enabled() and not library.is_mapped()
    keep = keep and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    further = (keep,) if shards is None else (*shards, return_stats, reduce_grad_hidden)
    return hidden.reshape(target.numel(), E), weight, bias, target, *options, shift, *further


def _request(*args: Any, **kwargs: Any) -> backends.Request:
    return by_backend.describe(*prepare(*args, **kwargs)[:2])


backends.register_explainer(linear_cross_entropy, _request)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, bias, target, class_weight, *scalars, _ = inputs
    _, lse, argmax, lse_low, kept = output
    ctx.mark_non_differentiable(argmax, lse_low, kept)
    ctx.set_materialize_grads(False)  # or zeros as large as `kept` would be made
    ctx.save_for_backward(hidden, weight, bias, target, lse, lse_low, kept, class_weight)
    ctx.scalars = scalars


def _autograd(ctx: Any, grad_nll: torch.Tensor | None, grad_lse: torch.Tensor | None, *unused: Any) -> tuple[Any, ...]:
    hidden, weight, bias, target, lse, lse_low, kept, class_weight = ctx.saved_tensors
    wanted = tuple(ctx.needs_input_grad[:3])
    slopes = (torch.zeros_like(lse) if slope is None else slope for slope in (grad_nll, grad_lse))
    gradients = _linear_cross_entropy_backward_op(
        *slopes, hidden, weight, bias, target, lse, lse_low, kept, class_weight, *ctx.scalars, *wanted
    )
    return *(g if w else None for g, w in zip(gradients, wanted, strict=True)), *[None] * 7


_linear_cross_entropy_op = library.define_op(
    f"linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, {LOSS_OPTIONS}, "
    "int shift, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    by_backend.forward,
    by_backend.forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)
_linear_cross_entropy_backward_op = library.define_op(
    "linear_cross_entropy_backward(Tensor grad_nll, Tensor grad_lse, Tensor hidden, Tensor weight, "
    f"Tensor? bias, Tensor target, Tensor lse, Tensor lse_low, Tensor kept, {LOSS_OPTIONS}, int shift, bool of_hidden, "
    "bool of_weight, bool of_bias) -> (Tensor, Tensor, Tensor)",
    by_backend.backward,
    by_backend.backward_fake,
    gradient_of="linear_cross_entropy",
)


def _sharded_linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, target: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, ...]:
    *loss_options, shift, sizes, rank, group, with_argmax, _ = rest

    def local(rows: torch.Tensor, *options: Any) -> tuple[torch.Tensor, ...]:
        return by_backend.forward(hidden, weight, bias, rows, *options, 0, False)[:4]

    def logit_at(columns: torch.Tensor) -> torch.Tensor:
        # A few rows at a time: both factors become fp32.
        products = [
            (h.float() * weight[c].float()).sum(dim=1) + (0.0 if bias is None else bias[c].float())
            for h, c in zip(hidden.split(256), columns.split(256), strict=True)
        ]
        return torch.cat(products)

    options, shards = LossOptions(*loss_options), vocab_parallel.Shards(tuple(sizes), rank, group)
    target = labels.shifted(target, shift, options.ignore_index)
    what = ("linear_cross_entropy", hidden.dtype, hidden.shape[1])
    backend = backends.pick(by_backend.describe(hidden, weight)).backend
    functions = (local, logit_at if with_argmax else None)
    return vocab_parallel.forward(*functions, target, options, shards, what, backend, shift)


def _sharded_linear_cross_entropy_backward(
    grad_nll: torch.Tensor,
    grad_lse: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    lse: torch.Tensor,
    lse_low: torch.Tensor,
    label_weight: torch.Tensor,
    weight_sum: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    *loss_options, shift, sizes, rank, group, _, reduce_grad_hidden, of_hidden, of_weight, of_bias = rest
    options, shards = LossOptions(*loss_options), vocab_parallel.Shards(tuple(sizes), rank, group)
    target = labels.shifted(target, shift, options.ignore_index)
    wanted, nothing = (of_hidden, of_weight, of_bias), hidden.new_empty(0, dtype=torch.uint8)
    gradients = [
        by_backend.backward(
            *slopes, hidden, weight, bias, rows, lse, lse_low, nothing, *its_options, 0, *wanted, shard=True
        )
        for slopes, rows, its_options in vocab_parallel.backward_calls(
            grad_nll, grad_lse, target, label_weight, weight_sum, options, shards
        )
    ]
    inputs = zip((hidden, weight, bias), wanted, strict=True)
    grad_hidden, grad_weight, grad_bias = (
        vocab_parallel.add_up([each[i] for each in gradients], x) if want and x is not None else hidden.new_empty(0)
        for i, (x, want) in enumerate(inputs)
    )
    if of_hidden and reduce_grad_hidden:
        grad_hidden = vocab_parallel.all_reduce_sum(grad_hidden, shards)
    return grad_hidden, grad_weight, grad_bias


def _setup_sharded_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, bias, target, class_weight, *scalars = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(hidden, weight, bias, target, output[1], *output[3:], class_weight)
    ctx.scalars = scalars


def _sharded_autograd(ctx: Any, grad_nll: torch.Tensor, grad_lse: torch.Tensor, *unused: Any) -> tuple[Any, ...]:
    wanted = tuple(ctx.needs_input_grad[:3])
    gradients = _sharded_linear_cross_entropy_backward_op(grad_nll, grad_lse, *ctx.saved_tensors, *ctx.scalars, *wanted)
    return *(g if w else None for g, w in zip(gradients, wanted, strict=True)), *[None] * 11


_sharded_linear_cross_entropy_op = library.define_op(
    f"sharded_linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, {LOSS_OPTIONS}, "
    f"int shift, {SHARDS}, bool with_argmax, bool reduce_grad_hidden) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _sharded_linear_cross_entropy,
    lambda hidden, *rest: sharded_row_tensors(hidden.shape[0], hidden),
    setup_context=_setup_sharded_context,
    backward=_sharded_autograd,
)
_sharded_linear_cross_entropy_backward_op = library.define_op(
    "sharded_linear_cross_entropy_backward(Tensor grad_nll, Tensor grad_lse, Tensor hidden, Tensor weight, "
    "Tensor? bias, Tensor target, Tensor lse, Tensor lse_low, Tensor label_weight, Tensor weight_sum, "
    f"{LOSS_OPTIONS}, int shift, {SHARDS}, bool with_argmax, bool reduce_grad_hidden, bool of_hidden, "
    "bool of_weight, bool of_bias) -> (Tensor, Tensor, Tensor)",
    _sharded_linear_cross_entropy_backward,
    by_backend.backward_fake,
    gradient_of="linear_cross_entropy",
)
