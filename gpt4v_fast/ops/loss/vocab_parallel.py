"""The losses with the vocabulary split over processes: each holds some rows of the weight (or columns of the logits).

Every process runs the ordinary kernels on its shard, in any of their backends; the logits are never gathered. Two
all-reduces of numbers per token make the global result from the local ones: the largest of the local lse (and, for
statistics, of the local logits), then sums:

    lse = m + log sum_r exp(lse_r - m),   nll = sum_r (a_r + s_r (lse - lse_r))

with m the largest lse_r, a_r what the kernel of shard r makes of nll with its own lse, and s_r the factor of lse in it:
(1 - eps) w_y where the label stands in the shard, plus eps / V times the sum of the shard's class weights. No term is a
difference of large numbers. Backward, a shard's gradient is the ordinary one with the global lse and with the slopes of
`LocalCall.slopes`; the gradients of hidden are partial sums over the vocabulary, and are added up once.

Source: Shoeybi et al., "Megatron-LM" (2019), section 3, for the parallel cross-entropy.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist

from gpt4v_fast.ops.loss import labels

# The local kernels' ignore_index, and a label that is none: their labels are columns of the shard.
IGNORED, BAD = -1, -2

_LOW = 1 << 32


class Shards(NamedTuple):
    """Who holds which part of the vocabulary: classes per rank, this process's rank, the group's name."""

    sizes: tuple[int, ...]
    rank: int
    group: str

    @property
    def V(self) -> int:
        return sum(self.sizes)

    @property
    def start(self) -> int:
        return sum(self.sizes[: self.rank])

    @property
    def size(self) -> int:
        return self.sizes[self.rank]


def find_shards(name: str, size: int, process_group: Any, vocab_sizes: Sequence[int] | None) -> Shards | None:
    """The shards of a call, `size` the classes of this process's tensor `name`; None without a process group."""
    if process_group is None:
        if vocab_sizes is not None:
            raise ValueError("vocab_sizes: expected None without a process_group, got sizes")
        return None
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(f"process_group: expected a torch.distributed.ProcessGroup, got {type(process_group).__name__}")
    rank, ranks = dist.get_rank(process_group), dist.get_world_size(process_group)
    if rank < 0:
        raise ValueError("process_group: expected a group that this process belongs to")
    sizes = (size,) * ranks if vocab_sizes is None else tuple(vocab_sizes)
    if len(sizes) != ranks:
        raise ValueError(f"vocab_sizes: expected one size for each of {ranks} processes, got {len(sizes)}")
    if sizes[rank] != size:
        raise ValueError(f"{name}: expected the {sizes[rank]} classes that vocab_sizes has for rank {rank}, got {size}")
    return Shards(sizes, rank, process_group.group_name)


class LocalCall(NamedTuple):
    """One call of a loss kernel on this shard, for some of the tokens.

    `scale * nll` of the kernel is the shard's share of nll as far as it knows, with its own lse in place of the global.
    """

    rows: torch.Tensor  # (N,) int64: columns of the shard, IGNORED for tokens of another call
    class_weight: torch.Tensor | None
    label_smoothing: float
    scale: torch.Tensor  # (N,) fp64, 0 for tokens of another call

    def slopes(
        self, grad_nll: torch.Tensor, grad_lse: torch.Tensor, elsewhere: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The kernel's grad_nll and grad_lse; `elsewhere` is the factor of lse in the other shards' parts of nll."""
        through_lse = grad_lse.double() + grad_nll.double() * elsewhere
        return (grad_nll.double() * self.scale).float(), through_lse.float()


class Plan(NamedTuple):
    """What this shard has to do with each token, from the global labels."""

    calls: list[LocalCall]
    counted: torch.Tensor  # (N,) bool
    label_weight: torch.Tensor  # (N,) fp64: the label's class weight where it stands in this shard, else 0
    lse_slope: torch.Tensor  # (N,) fp64: s_r above
    weight_sum: torch.Tensor  # () fp64: of the shard's class weights


def plan(target: torch.Tensor, options: Any, shards: Shards) -> Plan:
    """The local calls. Smoothing needs two, for the tokens whose label stands in the shard and for the others: the
    kernels smooth around a label, and have none for the latter."""
    eps, weight, size, V = options.label_smoothing, options.class_weight, shards.size, shards.V
    target = target.reshape(-1).to(torch.int64)
    counted, bad = target != options.ignore_index, labels.are_bad(target, V, options.ignore_index)
    own = counted & (target >= shards.start) & (target < shards.start + size)
    column = torch.where(own, target - shards.start, 0)
    ones = torch.ones(target.shape, dtype=torch.float64, device=target.device)
    if size == 0:  # an uneven split may leave a rank without a class
        return Plan([], counted, 0 * ones, 0 * ones, ones.new_zeros(()))
    own_weight = torch.where(own, ones if weight is None else weight.double()[column], 0.0)
    weight_sum = ones.new_full((), size) if weight is None else weight.double().sum()
    column = torch.where(bad, BAD, column)
    if eps == 0.0:
        rows = torch.where(counted, column, IGNORED)
        calls = [LocalCall(rows, None, 0.0, own_weight)]
    else:
        # As much smoothing as gives the kernel, which knows this shard's classes only, the ratio of the two parts.
        share = eps * size / V
        calls = [
            LocalCall(torch.where(own, column, IGNORED), weight, share / (share + 1 - eps), own * (share + 1 - eps)),
            LocalCall(torch.where(counted & ~own, column, IGNORED), weight, 1.0, (counted & ~own) * (share * ones)),
        ]
    return Plan(calls, counted, own_weight, (1 - eps) * own_weight + counted * (eps / V * weight_sum), weight_sum)


class Pair(NamedTuple):
    """lse of each row in two parts, fp64: at logits of 1e15 their sum would be rounded."""

    high: torch.Tensor
    low: torch.Tensor


class Merged(NamedTuple):
    """The outputs of the ops, the same bits on every process."""

    nll: torch.Tensor  # (N,) fp32
    lse: torch.Tensor  # (N,) fp32
    argmax: torch.Tensor  # (N,) int64 in the whole vocabulary, -1 where ignored; all -1 where nobody asked for it
    lse_low: torch.Tensor  # (N,) fp32
    label_weight: torch.Tensor  # (N,) fp32
    weight_sum: torch.Tensor  # () fp64


def forward(call: Any, raises: bool, remember: Callable[[torch.Tensor], None]) -> Merged:
    """Runs the kernel on this shard and merges the shards.

    Args:
        call: a ShardedCall (sharded.py).
        raises: whether a bad label raises; on a GPU nobody waits for it, and `remember(target)` keeps it.
    """
    shards, target, ignore_index = call.shards, call.labels, call.ignore_index
    V = shards.V
    bad = labels.are_bad(target, V, ignore_index)
    if not raises:
        remember(target)
    # Nothing raises before the first all-reduce: the other processes would wait there.
    none_counted = torch.full_like(target, ignore_index)
    work = plan(none_counted if raises and bad.any() else target, call, shards)
    share, own, argmax = _run_local(work, call.run_rows)

    options = (ignore_index, call.label_smoothing, call.softcap)
    same = (shards.sizes, options, call.class_weight is None, not call.with_argmax, target.numel(), *call.differs)
    checks = [bad.any().to(torch.int64), *_both_signs(_label_sum(target)), *_both_signs(_hash(same, target.device))]
    keys = [_ordered(own.high.float())]
    if call.with_argmax:
        best = call.logit_at(argmax) if work.calls else torch.full_like(own.high, -torch.inf, dtype=torch.float32)
        keys.append(_ordered(best) * _LOW + (_LOW - 1 - (argmax + shards.start)))
    largest = _all_reduce(torch.cat([torch.stack(checks), *keys]), dist.ReduceOp.MAX, shards)
    differs = largest[1:5:2] != -largest[2:5:2]
    if raises:
        _raise_together(largest[0], differs, target, V, ignore_index, call.shift)
    keys = list(largest[5:].reshape(len(keys), len(own.high)))
    nll, (lse, lse_low), label_weight, weight_sum = _sums(work, share, own, _from_ordered(keys[0]), call, shards)
    if not raises:
        nll, lse = (torch.where(differs.any(), torch.nan, x) for x in (nll, lse))
    best_column = _LOW - 1 - (keys[-1] & (_LOW - 1)) if call.with_argmax else -1
    return Merged(
        torch.where(work.counted, nll, 0.0).float(),
        torch.where(work.counted, lse, 0.0).float(),
        torch.where(work.counted & ~bad.reshape(-1), best_column, -1),
        torch.where(work.counted, lse_low, 0.0).float(),
        label_weight.float(),
        weight_sum,
    )


def _run_local(
    work: Plan, run: Callable[[LocalCall], tuple[torch.Tensor, ...]]
) -> tuple[torch.Tensor, Pair, torch.Tensor]:
    """This shard's share of nll with its own lse (fp64), its lse, and its argmax, a column of the shard."""
    share = torch.zeros_like(work.label_weight)
    lse, lse_low = torch.where(work.counted, 0.0 if work.calls else -torch.inf, share), torch.zeros_like(share)
    argmax = torch.zeros_like(work.counted, dtype=torch.int64)
    for call in work.calls:
        nll, its_lse, its_argmax, its_low = run(call)
        served = call.rows != IGNORED
        share += torch.where(call.scale != 0, call.scale * nll, 0.0)
        lse = torch.where(served, its_lse.double(), lse)
        lse_low = torch.where(served & its_lse.isfinite(), its_low.double(), lse_low)
        argmax = torch.where(served & (its_argmax >= 0), its_argmax, argmax)
    return share, Pair(lse, lse_low), argmax


def _sums(
    work: Plan, share: torch.Tensor, lse: Pair, largest: torch.Tensor, options: Any, shards: Shards
) -> tuple[torch.Tensor, Pair, torch.Tensor, torch.Tensor]:
    """The global nll and lse, the labels' class weights (N,) and the sum of all class weights (), in fp64."""
    N = share.shape[0]
    origin = torch.where(largest.isinf(), 0.0, largest.double())
    above = (lse.high - origin) + lse.low
    moved = torch.where(work.lse_slope == 0, share, share - work.lse_slope * above)
    # A shard of nothing but -inf: its logits are no classes, and a label among them costs infinity.
    moved = torch.where(lse.high == -torch.inf, torch.where(work.lse_slope == 0, 0.0, torch.inf), moved)
    parts = [work.weight_sum.reshape(1), torch.exp(above), moved]
    if options.class_weight is not None:
        parts.append(work.label_weight)
    total = _all_reduce(torch.cat(parts), dist.ReduceOp.SUM, shards)
    weight_sum, sums = total[0].clone(), total[1:].reshape(len(parts) - 1, N)
    label_weight = work.counted.double() if options.class_weight is None else sums[2]
    log_sum = torch.log(sums[0])
    nll = sums[1] + _slope(label_weight, weight_sum, options.label_smoothing, shards.V) * log_sum
    high = (origin + log_sum).float().double()
    # A row with an infinite logit, wherever it is, has no loss and no gradient.
    low = torch.where(high.isfinite(), (origin - high) + log_sum, torch.where(high == torch.inf, torch.nan, 0.0))
    nll = torch.where(largest == torch.inf, torch.nan, nll)
    return nll, Pair(high, low), label_weight, weight_sum


def backward_calls(
    call: Any, slopes: tuple[torch.Tensor, torch.Tensor], label_weight: torch.Tensor, weight_sum: torch.Tensor
) -> Iterator[tuple[LocalCall, tuple[torch.Tensor, torch.Tensor]]]:
    """The local calls of a ShardedCall, each with its slopes of nll and lse."""
    work = plan(call.labels, call, call.shards)
    slope = _slope(label_weight.double(), weight_sum, call.label_smoothing, call.shards.V)
    elsewhere = torch.where(work.counted, slope, 0.0) - work.lse_slope
    for local in work.calls:
        yield local, local.slopes(*slopes, elsewhere)


def add_up(gradients: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """The sum of the calls' gradients, in `like`'s dtype; zeros where there was no call."""
    if len(gradients) > 1:
        return (gradients[0].float() + gradients[1].float()).to(like.dtype)
    return gradients[0] if gradients else torch.zeros_like(like, memory_format=torch.contiguous_format)


def _slope(label_weight: torch.Tensor, weight_sum: torch.Tensor, eps: float, V: int) -> torch.Tensor:
    return (1 - eps) * label_weight + eps / V * weight_sum


def all_reduce_sum(tensor: torch.Tensor, shards: Shards) -> torch.Tensor:
    """The sum over the processes, in fp32, in the dtype of `tensor`."""
    return _all_reduce(tensor.float(), dist.ReduceOp.SUM, shards).to(tensor.dtype)


def _all_reduce(tensor: torch.Tensor, how: Any, shards: Shards) -> torch.Tensor:
    group = dist.distributed_c10d._resolve_process_group(cast(Any, shards.group))
    dist.all_reduce(tensor, op=how, group=group)
    return tensor


def _raise_together(
    bad_somewhere: torch.Tensor,
    differs: torch.Tensor,
    target: torch.Tensor,
    V: int,
    ignore_index: int,
    shift: int,
) -> None:
    """Raises on every process where one of them has a reason to."""
    if differs[1]:
        raise ValueError("process_group: expected the same arguments and vocab_sizes on every process, got others")
    labels.raise_if_bad(target, V, ignore_index, shift)
    if bad_somewhere:
        raise IndexError(
            f"target: expected labels in [0, {V}) or ignore_index, but another process has one that is not"
        )
    if differs[0]:
        raise ValueError("target: expected the same labels on every process of process_group, got others")


def _label_sum(target: torch.Tensor) -> torch.Tensor:
    """A number that other labels, or the same in another order, are unlikely to give."""
    flat = target.reshape(-1).to(torch.int64)
    return (flat * (2 * torch.arange(flat.shape[0], device=flat.device) + 0x9E3779B9)).sum()


def _hash(arguments: tuple[Any, ...], device: torch.device) -> torch.Tensor:
    # Not Python's hash, which differs from process to process.
    return torch.full((), zlib.crc32(repr(arguments).encode()), dtype=torch.int64, device=device)


def _both_signs(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Their maxima over the processes are of opposite sign exactly where all have the same x."""
    return x, -x


def _ordered(x: torch.Tensor) -> torch.Tensor:
    """fp32 as int64 of less than 32 bits in the same order; 0 and -0 are equal."""
    bits = (x + 0.0).view(torch.int32).to(torch.int64)
    return torch.where(bits >= 0, bits, -bits - (1 << 31))


def _from_ordered(key: torch.Tensor) -> torch.Tensor:
    bits = torch.where(key >= 0, key, -key - (1 << 31))
    return bits.to(torch.int32).view(torch.float32)


def is_dtensor(tensor: Any) -> bool:
    # torch.distributed.tensor takes a while to import, and nobody has a DTensor without a process group.
    if type(tensor) is torch.Tensor or not dist.is_available() or not dist.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local_parts(
    name: str, tensor: Any, dim: int, process_group: Any, vocab_sizes: Any
) -> tuple[torch.Tensor, Any, tuple[int, ...]]:
    """(this process's shard, the group, the sizes of the shards) of a DTensor that is sharded along `dim`."""
    from torch.distributed.tensor import Replicate, Shard

    if process_group is not None or vocab_sizes is not None:
        raise ValueError(f"{name}: expected a plain tensor beside process_group or vocab_sizes, got a DTensor")
    dim %= tensor.dim()
    sharded = [i for i, placement in enumerate(tensor.placements) if type(placement) is Shard and placement.dim == dim]
    others = [placement for i, placement in enumerate(tensor.placements) if i not in sharded]
    if len(sharded) != 1 or not all(isinstance(placement, Replicate) for placement in others):
        raise ValueError(f"{name}: expected a DTensor of one Shard({dim}) placement, got {tensor.placements}")
    ranks, V = tensor.device_mesh.size(sharded[0]), tensor.shape[dim]
    each = -(-V // ranks)  # as torch.chunk splits
    sizes = tuple(max(0, min(each, V - rank * each)) for rank in range(ranks))
    return tensor.to_local(), tensor.device_mesh.get_group(sharded[0]), sizes


def to_local(tensor: Any) -> Any:
    """The local shard of a DTensor; another argument as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def whole(tensor: Any) -> Any:
    """All of a DTensor; another argument as it is."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def replicated(hidden: Any, weight: Any, reduce_grad: bool) -> tuple[Any, bool]:
    """(the whole of hidden on every process, whether the op has to all-reduce its gradient) beside a DTensor weight.

    Where hidden is a DTensor, its own redistribution brings the partial gradients back to its placement: a
    reduce-scatter where it was sharded.
    """
    if not is_dtensor(hidden):
        return hidden, reduce_grad
    from torch.distributed.tensor import Partial, Replicate, Shard

    if hidden.device_mesh != weight.device_mesh:
        raise ValueError("hidden: expected a DTensor of weight's device mesh, got one of another")
    grad_placements = [Partial() if isinstance(p, Shard) else Replicate() for p in weight.placements]
    hidden = hidden.redistribute(placements=[Replicate()] * len(grad_placements))
    return hidden.to_local(grad_placements=grad_placements), False
