"""The projection to the vocabulary and its cross-entropy in one: the public function and its torch ops.

user -> linear_cross_entropy -> gpt4v_fast::linear_cross_entropy
                                    -> _C.linear_cross_entropy_forward (csrc/kernels/linear_cross_entropy.h)
                                    or _C.linear_cross_entropy_gradients (ops/linear_cross_entropy_gradients.py)
                                    or kernels/linear_cross_entropy.py (Triton; logits stay in registers)
                                    or kernels/linear_cross_entropy_products.py (small problems: torch products, Triton)
                                    or reference.cross_entropy_core
With process_group: gpt4v_fast::sharded_linear_cross_entropy, which runs the same on a shard (ops/vocab_parallel.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from gpt4v_fast import backends, reference
from gpt4v_fast._native import _C, threads, view
from gpt4v_fast.kernels import linear_cross_entropy_plans as plans
from gpt4v_fast.ops import checks, labels, library, vocab_parallel
from gpt4v_fast.ops.cross_entropy import (
    LOSS_OPTIONS,
    SHARDS,
    LossOptions,
    check_options,
    look_at_labels,
    native_weight,
    reduce_loss,
    row_tensors,
    sharded_row_tensors,
    triton_options,
)
from gpt4v_fast.ops.linear_cross_entropy_gradients import KEPT_BY_OP, known_slopes, with_gradients
from gpt4v_fast.ops.linear_cross_entropy_kept import can_keep, with_kept_logits
from gpt4v_fast.reference import LossStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Bytes that forward may leave for backward at the most (csrc/kernels/kept_logits.h), of the 64 MiB of extra memory.
KEPT_BYTES = KEPT_BY_OP


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
    if slopes is not None and backends.pick(_describe(*arguments[:2])).backend == "cpu":
        nll, lse, argmax = with_gradients(arguments, slopes, _linear_cross_entropy_backward_op)
    elif process_group is None and can_keep(arguments) and _is_fused(*arguments[:2]):
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


_FEW = frozenset({"few logits"})


def _request(*args: Any, **kwargs: Any) -> backends.Request:
    return _describe(*prepare(*args, **kwargs)[:2])


def _describe(hidden: torch.Tensor, weight: torch.Tensor) -> backends.Request:
    few = plans.by_products(hidden.shape[0], weight.shape[0])
    return backends.Request("linear_cross_entropy", hidden.device.type, hidden.dtype, _FEW if few else frozenset())


def _is_fused(hidden: torch.Tensor, weight: torch.Tensor) -> bool:
    return backends.pick(_describe(hidden, weight)).kernel == "kernels.linear_cross_entropy"


def _too_many_logits(request: backends.Request) -> str | None:
    if request.features >= _FEW:
        return None
    return f"the fp32 logits need more than {plans.PRODUCT_BYTES >> 20} MiB"


backends.register_kernel("linear_cross_entropy", "cpu", "_C.linear_cross_entropy")
backends.register_kernel("linear_cross_entropy", "triton", "kernels.linear_cross_entropy_products", _too_many_logits)
backends.register_kernel("linear_cross_entropy", "triton", "kernels.linear_cross_entropy")
backends.register_explainer(linear_cross_entropy, _request)


def _linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    *loss_options, shift, keep = rest
    options = LossOptions(*loss_options)
    choice = backends.pick(_describe(hidden, weight))
    backend = choice.backend
    target = labels.shifted(target, shift, options.ignore_index)
    look_at_labels(target, weight.shape[0], options.ignore_index, backend, shift)
    rows = target.reshape(-1).to(torch.int64)
    if backend == "cpu":
        nll, lse, argmax, lse_low = row_tensors(hidden.shape[0], hidden)
        class_weight = native_weight(options.class_weight)
        tensors = (hidden, weight, bias, rows, class_weight)
        kept = _kept(hidden, weight, keep)
        outputs = (nll, lse, lse_low, argmax, kept if keep else None)
        _C.linear_cross_entropy_forward(*map(view, tensors), *options[1:], *map(view, outputs), threads())
        return nll, lse, argmax, lse_low, kept
    if backend == "triton":
        forward, _ = _triton_kernels(choice)
        nll, lse, argmax = forward(hidden, weight, bias, rows, **_triton_options(options))
    else:
        nll, lse, argmax = reference.cross_entropy_core(_logits(hidden, weight, bias), rows, *options)
    kept = _kept(hidden, weight, keep)
    if kept.numel():
        kept[: 1 << 16] = 0  # an empty header: backward finds nothing
    return nll, lse, argmax, torch.zeros_like(lse), kept


def _kept(hidden: torch.Tensor, weight: torch.Tensor, keep: bool) -> torch.Tensor:
    """Memory for logits that forward leaves for backward; what is not used of it is never touched."""
    if not keep or hidden.device.type != "cpu":
        return hidden.new_empty(0, dtype=torch.uint8)
    rows, classes = hidden.shape[0] + 15, weight.shape[0] + 71  # whole vectors and tiles
    return hidden.new_empty(torch.sym_min(64 + 4 * rows * (classes + 1), KEPT_BYTES), dtype=torch.uint8)


def _linear_cross_entropy_backward(
    grad_nll: torch.Tensor,
    grad_lse: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    lse: torch.Tensor,
    lse_low: torch.Tensor,
    kept: torch.Tensor,
    *rest: Any,
    shard: bool = False,
) -> tuple[torch.Tensor, ...]:
    """`shard`: lse is that of the whole vocabulary, and weight and bias are some rows of it."""
    *loss_options, shift, of_hidden, of_weight, of_bias = rest
    options = LossOptions(*loss_options)
    choice = backends.pick(_describe(hidden, weight))
    backend = choice.backend
    rows = labels.shifted(target, shift, options.ignore_index).reshape(-1).to(torch.int64)
    if backend == "cpu":
        grad_hidden, grad_weight, grad_bias = (
            torch.empty(tensor.shape, dtype=dtype) if wanted and tensor is not None else None
            for tensor, dtype, wanted in (
                (hidden, hidden.dtype, of_hidden),
                (weight, weight.dtype, of_weight),
                (bias, torch.float32, of_bias),
            )
        )
        class_weight = native_weight(options.class_weight)
        tensors = (hidden, weight, bias, rows, class_weight)
        further = (lse, lse_low, kept if len(kept) else None, grad_nll, grad_lse, grad_hidden, grad_weight, grad_bias)
        _C.linear_cross_entropy_backward(*map(view, tensors), *options[1:], *map(view, further), threads())
    elif backend == "triton":
        _, backward = _triton_kernels(choice)
        grad_hidden, grad_weight, grad_bias = backward(
            grad_nll, grad_lse, hidden, weight, bias, rows, lse,
            of_hidden=of_hidden, of_weight=of_weight, of_bias=of_bias, **_triton_options(options),
        )  # fmt: skip
    else:
        logits = _logits(hidden, weight, bias)
        exact_lse = lse.double() + lse_low if shard else None
        gradient = reference.cross_entropy_core_backward(grad_nll, grad_lse, logits, rows, *options, exact_lse)
        grad_hidden = gradient @ weight.float() if of_hidden else None
        grad_weight = gradient.t() @ hidden.float() if of_weight else None
        grad_bias = gradient.sum(dim=0) if of_bias else None
    pairs = ((grad_hidden, hidden), (grad_weight, weight), (grad_bias, bias))
    return tuple(hidden.new_empty(0) if g is None or x is None else g.to(x.dtype) for g, x in pairs)


def _triton_kernels(choice: backends.Choice) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The launchers forward and backward; imports triton."""
    if choice.kernel == "kernels.linear_cross_entropy_products":
        from gpt4v_fast.kernels import linear_cross_entropy_products as products

        return products.linear_cross_entropy_forward, products.linear_cross_entropy_backward
    from gpt4v_fast.kernels import linear_cross_entropy as fused
    from gpt4v_fast.kernels import linear_cross_entropy_backward as fused_backward

    return fused.linear_cross_entropy_forward, fused_backward.linear_cross_entropy_backward


def _triton_options(options: LossOptions) -> dict[str, Any]:
    further = triton_options(options)
    return {"class_weight": further.pop("weight"), **further}


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.nn.functional.linear(hidden.float(), weight.float(), None if bias is None else bias.float())


def _linear_cross_entropy_fake(
    hidden: torch.Tensor, weight: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return *row_tensors(hidden.shape[0], hidden), _kept(hidden, weight, rest[-1])


def _linear_cross_entropy_backward_fake(
    grad_nll: Any,
    grad_lse: Any,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    pairs = zip((hidden, weight, bias), rest[-3:], strict=True)
    return tuple(hidden.new_empty(0) if x is None or not wanted else x.new_empty(x.shape) for x, wanted in pairs)


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
    _linear_cross_entropy,
    _linear_cross_entropy_fake,
    setup_context=_setup_context,
    backward=_autograd,
)
_linear_cross_entropy_backward_op = library.define_op(
    "linear_cross_entropy_backward(Tensor grad_nll, Tensor grad_lse, Tensor hidden, Tensor weight, "
    f"Tensor? bias, Tensor target, Tensor lse, Tensor lse_low, Tensor kept, {LOSS_OPTIONS}, int shift, bool of_hidden, "
    "bool of_weight, bool of_bias) -> (Tensor, Tensor, Tensor)",
    _linear_cross_entropy_backward,
    _linear_cross_entropy_backward_fake,
    gradient_of="linear_cross_entropy",
)


def _sharded_linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, target: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, ...]:
    *loss_options, shift, sizes, rank, group, with_argmax, _ = rest

    def local(rows: torch.Tensor, *options: Any) -> tuple[torch.Tensor, ...]:
        return _linear_cross_entropy(hidden, weight, bias, rows, *options, 0, False)[:4]

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
    backend = backends.pick(_describe(hidden, weight)).backend
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
        _linear_cross_entropy_backward(
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
    _linear_cross_entropy_backward_fake,
    gradient_of="linear_cross_entropy",
)
