"""The projection to the vocabulary and its cross-entropy in one: the public function and its call object.

user -> linear_cross_entropy -> LinearCrossEntropyCall -> gpt4v_fast::linear_cross_entropy
            -> cpu.py        _C.linear_cross_entropy_gradients or _C.linear_cross_entropy_forward (csrc/loss/)
            or triton.py     kernels/loss/: by products (small problems), fused and keeping logits, fused
            or reference.py  the oracle
With process_group: gpt4v_fast::sharded_linear_cross_entropy, which runs the same on a shard (sharded.py).
docs/kernels/linear_cross_entropy.md says why each of these ways exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, overload

import torch

from gpt4v_fast import backends
from gpt4v_fast._native import _C
from gpt4v_fast.kernels.loss import plans
from gpt4v_fast.ops import checks, library, modes
from gpt4v_fast.ops.loss import arguments, cpu, labels, reference, rows, sharded, triton, vocab_parallel
from gpt4v_fast.ops.loss.reference import LossStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    from gpt4v_fast.ops.loss.options import LinearCrossEntropyOptions

# Whether gradients are wanted, and if so, whether forward may do work ahead for its own backward pass.
NEVER, LATER, AHEAD = "", "later", "ahead"


class _LinearCrossEntropyFields(NamedTuple):
    hidden: torch.Tensor  # (N, E)
    weight: torch.Tensor  # (V, E)
    bias: torch.Tensor | None  # (V,)
    target: torch.Tensor  # int64, N labels of any shape, not shifted yet
    class_weight: torch.Tensor | None = None  # (V,)
    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float = 0.0  # 0: none
    reduction: str = "mean"
    z_loss: float = 0.0
    shift: int = 0
    gradients: str = NEVER  # see above


class LinearCrossEntropyCall(backends.Call, _LinearCrossEntropyFields):
    """A checked call of `linear_cross_entropy`."""

    __slots__ = ()
    MAIN = "hidden"
    EXTRAS = ("bias", "few logits", "ahead", "many logits", "gradient of weight")
    FEATURE_NAMES: ClassVar = {"ignore_index": None, "gradients": "gradients"}
    op = "linear_cross_entropy"

    @property
    def labels(self) -> torch.Tensor:
        """The label of every token, of the tokens' shape: position t holds that of t + shift."""
        return labels.shifted(self.target, self.shift, self.ignore_index)

    def extras(self) -> tuple[bool, ...]:
        few = plans.by_products(self.hidden.shape[0], self.weight.shape[0])
        is_ahead = self.gradients == AHEAD
        return self.bias is not None, few, is_ahead, is_ahead and cpu.has_many_logits(self), self.weight.requires_grad


class LinearCrossEntropyOutputs(NamedTuple):
    """rows.LossOutputs, and memory that forward filled for backward."""

    loss: torch.Tensor
    lse: torch.Tensor
    argmax: torch.Tensor
    penalty: torch.Tensor
    lse_low: torch.Tensor
    tokens: torch.Tensor
    total: torch.Tensor
    kept: torch.Tensor  # bytes of logits (csrc/loss/kept_logits.h), or empty


@overload
def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[LinearCrossEntropyOptions],
) -> torch.Tensor: ...
@overload
def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    return_stats: Literal[True],
    **options: Unpack[LinearCrossEntropyOptions],
) -> tuple[torch.Tensor, LossStats]: ...
@overload
def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    return_stats: bool,
    **options: Unpack[LinearCrossEntropyOptions],
) -> torch.Tensor | tuple[torch.Tensor, LossStats]: ...
@backends.explained
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
    hidden, weight, bias = _check_tensors(hidden, weight, bias, is_shard=process_group is not None)
    V, E = weight.shape
    target = labels.check_target(target, tuple(hidden.shape[:-1]), f"hidden {tuple(hidden.shape)}", hidden)
    options = arguments.check_options(
        "class_weight", class_weight, V, hidden, ignore_index, reduction, label_smoothing, z_loss, softcap
    )
    shift = checks.check_int("shift", shift, 0, checks.INT64_MAX, "an int of 0 or more")
    positions = target.shape[-1] if target.dim() else 0
    if shift > positions:
        raise ValueError(
            f"shift: expected at most the {positions} positions of target (0 for a single token), got {shift}"
        )
    shards = vocab_parallel.find_shards("weight", V, process_group, vocab_sizes)
    hidden = hidden.reshape(target.numel(), E)
    outputs: Any
    call: Any = LinearCrossEntropyCall(hidden, weight, bias, target, **options, shift=shift)
    if shards is None:
        call = call._replace(gradients=_when_gradients(call))
        outputs = _linear_cross_entropy_op(call)
    else:
        fields = {name: value for name, value in call._asdict().items() if name != "gradients"}
        call = ShardedLinearCrossEntropyCall(
            **fields, **shards._asdict(), with_argmax=return_stats, reduce_grad_hidden=reduce_grad_hidden
        )
        outputs = _sharded_op(call)
    return rows.result(call, outputs, call.labels if return_stats else target, return_stats)


def _check_tensors(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, is_shard: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Kinds, dtypes, devices and shapes; in autocast's dtype where autocast is on."""
    checks.check_tensor("hidden", hidden)
    checks.check_tensor("weight", weight, ndim=2)
    if bias is not None:
        checks.check_tensor("bias", bias)
    hidden, weight, bias = modes.autocast(hidden, weight, bias)
    checks.check_like("weight", weight, "hidden", hidden)
    V, E = weight.shape
    if V == 0 and not is_shard:  # an uneven split may leave a process without a class
        raise ValueError(f"weight: expected shape (V, E) with V at least 1, got {tuple(weight.shape)}")
    if hidden.dim() == 0 or hidden.shape[-1] != E:
        raise ValueError(f"hidden: expected shape (..., E) with weight's E = {E}, got {tuple(hidden.shape)}")
    if bias is not None:
        checks.check_shape("bias", bias, (V,), "(V,)")
        checks.check_device("bias", bias, "hidden", hidden)
    return hidden, weight, bias


def _when_gradients(call: LinearCrossEntropyCall) -> str:
    wanted = torch.is_grad_enabled() and any(map(modes.needs_gradient, (call.hidden, call.weight, call.bias)))
    if not wanted or modes.is_mapped():  # vmap would stack what each element keeps
        return NEVER
    return AHEAD if modes.may_leave(call) else LATER


def _run(call: LinearCrossEntropyCall) -> Any:
    backend = backends.pick(call)
    shifted = call.labels
    rows.look_at_labels(shifted, call.weight.shape[0], call.ignore_index, backend.backend, call.shift)
    kept = _kept(call)
    if kept.numel() and type(backend) is not cpu.Linear:
        kept[: cpu.HEADER_BYTES] = 0  # nothing is kept; the memory may hold an earlier call's logits
    result = backend.forward(call._replace(target=shifted.reshape(-1), shift=0), kept if kept.numel() else None)
    found = result.outputs if type(result) is library.Left else result
    outputs = LinearCrossEntropyOutputs(*rows.reduce_rows(call, found, shifted), kept)
    return library.Left(outputs, result.left) if found is not result else outputs


def _kept(call: LinearCrossEntropyCall) -> torch.Tensor:
    """Memory for logits that forward leaves for backward; what is not used of it is never touched."""
    if call.gradients == NEVER or call.hidden.device.type != "cpu":
        return call.hidden.new_empty(0, dtype=torch.uint8)
    height, width = call.hidden.shape[0] + 15, call.weight.shape[0] + 71  # whole vectors and AMX tiles
    return call.hidden.new_empty(torch.sym_min(64 + 4 * height * (width + 1), cpu.KEPT_BYTES), dtype=torch.uint8)


def _backward(call: LinearCrossEntropyCall, saved: Any, upstream: Any, wanted: Any) -> dict[str, torch.Tensor | None]:
    return backends.pick(call, again=True).backward(call, saved, upstream, wanted)


backends.register(
    "linear_cross_entropy",
    cpu.LinearWithGradients(),
    cpu.Linear(),
    triton.LinearByProducts(),
    triton.LinearKeepingLogits(),
    triton.Linear(),
    reference.LinearCrossEntropy(),
)
_C.read_linear_cross_entropy_calls(LinearCrossEntropyCall._fields)
_linear_cross_entropy_op = library.define(
    "linear_cross_entropy",
    LinearCrossEntropyCall,
    LinearCrossEntropyOutputs,
    run=_run,
    fake=lambda call: LinearCrossEntropyOutputs(*rows.empty_outputs(call, call.hidden), _kept(call)),
    gradient=library.Gradient(
        run=_backward,
        of=("hidden", "weight", "bias"),
        saves=("lse", "lse_low", "tokens", "total", "kept"),
        constants=("argmax", "penalty", "lse_low", "tokens", "total", "kept"),
        function="linear_cross_entropy",
    ),
)


class _ShardedLinearCrossEntropyFields(NamedTuple):
    """`_LinearCrossEntropyFields` without gradients, of this process's rows of the vocabulary, and the shards."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    target: torch.Tensor
    class_weight: torch.Tensor | None
    ignore_index: int
    label_smoothing: float
    softcap: float
    reduction: str
    z_loss: float
    shift: int
    sizes: tuple[int, ...]
    rank: int
    group: str
    with_argmax: bool
    reduce_grad_hidden: bool


class ShardedLinearCrossEntropyCall(sharded.ShardedCall, _ShardedLinearCrossEntropyFields):
    """A checked call of `linear_cross_entropy` with a process group."""

    __slots__ = ()

    @property
    def differs(self) -> tuple[Any, ...]:
        return ("linear_cross_entropy", self.hidden.dtype, self.hidden.shape[1])

    def local(
        self, target: torch.Tensor, class_weight: torch.Tensor | None, smoothing: float
    ) -> LinearCrossEntropyCall:
        tensors = (self.hidden, self.weight, self.bias, target, class_weight)
        return LinearCrossEntropyCall(*tensors, vocab_parallel.IGNORED, smoothing, self.softcap, "none")

    @property
    def labels(self) -> torch.Tensor:
        return labels.shifted(self.target, self.shift, self.ignore_index)

    def logit_at(self, columns: torch.Tensor) -> torch.Tensor:
        # A few rows at a time: both factors become fp32.
        products = [
            (h.float() * self.weight[c].float()).sum(dim=1) + (0.0 if self.bias is None else self.bias[c].float())
            for h, c in zip(self.hidden.split(256), columns.split(256), strict=True)
        ]
        return torch.cat(products)


_sharded_op = sharded.define(
    "sharded_linear_cross_entropy",
    ShardedLinearCrossEntropyCall,
    ("hidden", "weight", "bias"),
    "linear_cross_entropy",
)
