"""Softmax cross-entropy of given logits: the public function and its call object.

user -> cross_entropy -> CrossEntropyCall -> gpt4v_fast::cross_entropy
                             -> cpu.py        _C.cross_entropy_forward (csrc/loss/cross_entropy.h)
                             or triton.py     kernels/loss/cross_entropy.py
                             or reference.py  the oracle
With process_group: gpt4v_fast::sharded_cross_entropy, which runs the same on a shard (sharded.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch

from gpt4v_fast import backends
from gpt4v_fast._native import _C
from gpt4v_fast.ops import checks, library
from gpt4v_fast.ops.loss import arguments, cpu, labels, reference, rows, sharded, triton, vocab_parallel
from gpt4v_fast.ops.loss.reference import LossStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    from gpt4v_fast.ops.loss.options import CrossEntropyOptions


class _CrossEntropyFields(NamedTuple):
    logits: torch.Tensor  # (N, V)
    target: torch.Tensor  # int64, N labels of any shape
    class_weight: torch.Tensor | None = None  # (V,)
    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float = 0.0  # 0: none
    reduction: str = "mean"
    z_loss: float = 0.0
    inplace_backward: bool = False


class CrossEntropyCall(backends.Call, _CrossEntropyFields):
    """A checked call of `cross_entropy`."""

    __slots__ = ()
    MAIN = "logits"
    op = "cross_entropy"

    @property
    def labels(self) -> torch.Tensor:
        """The label of every token, of the tokens' shape."""
        return self.target


@overload
def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[CrossEntropyOptions],
) -> torch.Tensor: ...
@overload
def cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, *, return_stats: Literal[True], **options: Unpack[CrossEntropyOptions]
) -> tuple[torch.Tensor, LossStats]: ...
@overload
def cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, *, return_stats: bool, **options: Unpack[CrossEntropyOptions]
) -> torch.Tensor | tuple[torch.Tensor, LossStats]: ...
@backends.explained
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
    checks.check_tensor("logits", logits)
    if logits.dim() == 0 or (logits.shape[-1] == 0 and process_group is None):
        raise ValueError(f"logits: expected shape (..., V) with V at least 1, got {tuple(logits.shape)}")
    V = logits.shape[-1]
    if isinstance(target, torch.Tensor) and target.shape != logits.shape[:-1]:
        _check_classes_last(logits, target)
    target = labels.check_target(target, tuple(logits.shape[:-1]), f"logits {tuple(logits.shape)}", logits)
    options = arguments.check_options(
        "weight", weight, V, logits, ignore_index, reduction, label_smoothing, z_loss, softcap
    )
    shards = vocab_parallel.find_shards("logits", V, process_group, vocab_sizes)
    if inplace_backward:
        if shards is not None:
            raise ValueError("inplace_backward: expected False with a process_group, got True")
        if logits.is_leaf and logits.requires_grad and torch.is_grad_enabled():
            raise ValueError("inplace_backward: expected logits that were computed, got a leaf that requires grad")
    call = CrossEntropyCall(
        logits.reshape(target.numel(), V), target, **options, inplace_backward=bool(inplace_backward)
    )
    outputs: Any
    if shards is None:
        outputs = _cross_entropy_op(call)
    else:
        fields = {name: value for name, value in call._asdict().items() if name != "inplace_backward"}
        outputs = _sharded_op(ShardedCrossEntropyCall(**fields, **shards._asdict(), with_argmax=return_stats))
    return rows.result(call, outputs, target, return_stats)


def _check_classes_last(logits: torch.Tensor, target: torch.Tensor) -> None:
    shape, labels_shape = tuple(logits.shape), tuple(target.shape)
    if len(shape) > 2 and labels_shape == (shape[0], *shape[2:]):
        raise ValueError(
            f"logits: expected shape (..., V), the classes last, got {shape} for target {labels_shape}, the classes "
            "second as for F.cross_entropy: logits.movedim(1, -1) has them last"
        )


def _run(call: CrossEntropyCall) -> Any:
    backend = backends.pick(call)
    rows.look_at_labels(call.target, call.logits.shape[1], call.ignore_index, backend.backend)
    outputs = rows.reduce_rows(call, backend.forward(call), call.target)
    return library.Left(outputs, True) if call.inplace_backward else outputs


def _backward(call: CrossEntropyCall, saved: Any, upstream: Any, wanted: Any) -> dict[str, torch.Tensor | None]:
    # Where nothing is left the op itself runs, and no registered op may return its argument.
    out = call.logits.detach() if saved.left and _can_be_overwritten(call.logits) else None
    slopes = rows.slopes(call, saved, upstream)
    backend: Any = backends.pick(call, again=True)
    gradient = backend.backward_rows(call, saved, slopes, wanted, out=out)["logits"]
    if out is not None:
        torch.autograd.graph.increment_version(call.logits)
    return {"logits": gradient}


def _can_be_overwritten(logits: torch.Tensor) -> bool:
    return logits.stride(1) == 1 and logits.stride(0) >= logits.shape[1]


backends.register("cross_entropy", cpu.CrossEntropy(), triton.CrossEntropy(), reference.CrossEntropy())
_C.read_cross_entropy_calls(CrossEntropyCall._fields)
_cross_entropy_op = library.define(
    "cross_entropy",
    CrossEntropyCall,
    rows.LossOutputs,
    run=_run,
    fake=lambda call: rows.empty_outputs(call, call.logits),
    gradient=library.Gradient(
        run=_backward,
        of=("logits",),
        saves=("lse", "lse_low", "tokens", "total"),
        constants=("argmax", "penalty", "lse_low", "tokens", "total"),
        function="cross_entropy",
    ),
)


class _ShardedCrossEntropyFields(NamedTuple):
    """`_CrossEntropyFields` without inplace_backward, of this process's columns, and the shards."""

    logits: torch.Tensor
    target: torch.Tensor
    class_weight: torch.Tensor | None
    ignore_index: int
    label_smoothing: float
    softcap: float
    reduction: str
    z_loss: float
    sizes: tuple[int, ...]
    rank: int
    group: str
    with_argmax: bool


class ShardedCrossEntropyCall(sharded.ShardedCall, _ShardedCrossEntropyFields):
    """A checked call of `cross_entropy` with a process group."""

    __slots__ = ()
    shift, reduce_grad_hidden = 0, False
    differs = ("cross_entropy",)

    def local(self, target: torch.Tensor, class_weight: torch.Tensor | None, smoothing: float) -> CrossEntropyCall:
        return CrossEntropyCall(
            self.logits, target, class_weight, vocab_parallel.IGNORED, smoothing, self.softcap, "none"
        )

    @property
    def labels(self) -> torch.Tensor:
        return self.target

    def logit_at(self, columns: torch.Tensor) -> torch.Tensor:
        return self.logits.gather(1, columns[:, None])[:, 0].float()


_sharded_op = sharded.define("sharded_cross_entropy", ShardedCrossEntropyCall, ("logits",), "cross_entropy")
