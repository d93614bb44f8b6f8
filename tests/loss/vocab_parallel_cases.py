"""What the processes of tests/loss/process_group.py do for tests/loss/test_vocab_parallel*.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import library as torch_library

import gpt4v_fast as gf
from gpt4v_fast import backends

OPS = {"linear_cross_entropy": gf.linear_cross_entropy, "cross_entropy": gf.cross_entropy}

both_sizes = pytest.mark.parametrize("ranks", [2, 4])

# Which dimension of an argument is split over the vocabulary.
SPLIT = {
    "linear_cross_entropy": {"weight": 0, "bias": 0, "class_weight": 0},
    "cross_entropy": {"logits": -1, "weight": 0},
}

# The outputs and the leaves of the last `forward`, for `backward`.
_graph: dict[str, Any] = {}


def even_sizes(V: int, ranks: int) -> tuple[int, ...]:
    """As torch.chunk splits."""
    each = -(-V // ranks)
    return tuple(max(0, min(each, V - rank * each)) for rank in range(ranks))


def shard(op: str, name: str, tensor: Any, sizes: tuple[int, ...], rank: int) -> Any:
    if name not in SPLIT[op] or not isinstance(tensor, torch.Tensor):
        return tensor
    return tensor.split(sizes, dim=SPLIT[op][name])[rank].contiguous()


def forward(
    group: Any,
    op: str,
    tensors: dict[str, torch.Tensor],
    sizes: tuple[int, ...],
    backend: str | None,
    target: torch.Tensor,
    options: dict[str, Any],
) -> Any:
    """(loss, lse, argmax, correct, z part) of the op on this process's shards."""
    rank = dist.get_rank(group)
    leaves = {name: shard(op, name, x, sizes, rank).requires_grad_() for name, x in tensors.items()}
    options = {name: shard(op, name, x, sizes, rank) for name, x in options.items()}
    with gf.force(backend=backend):
        loss, stats = OPS[op](
            target=target, return_stats=True, process_group=group, vocab_sizes=sizes, **leaves, **options
        )
    _graph.update(leaves=leaves, outputs=(loss, stats.lse), backend=backend)
    return tuple(x.detach() for x in (loss, *stats))


def backward(group: Any, upstream: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The gradients of this process's shards."""
    leaves = _graph["leaves"]
    with gf.force(backend=_graph["backend"]):
        gradients = torch.autograd.grad(_graph["outputs"], list(leaves.values()), upstream)
    return dict(zip(leaves, gradients, strict=True))


def loss(group: Any, op: str, by_rank: list[dict[str, Any]]) -> torch.Tensor:
    """The loss of this process's arguments."""
    return OPS[op](process_group=group, **by_rank[dist.get_rank(group)]).detach()


def without_waiting(group: Any, op: str, by_rank: list[dict[str, Any]]) -> Any:
    """(losses, gradients of the first two arguments, what check_labels raised), as on a GPU: nobody looks at labels."""
    arguments = by_rank[dist.get_rank(group)]
    leaves = [x.requires_grad_() for name, x in arguments.items() if name in ("hidden", "weight", "logits")]
    with gf.force(backend="triton"):
        losses = OPS[op](process_group=group, reduction="none", **arguments)
        gradients = torch.autograd.grad(losses[0], leaves)
    try:
        gf.check_labels()
    except IndexError as error:
        return losses.detach(), gradients, str(error)
    return losses.detach(), gradients, ""


def collectives(
    group: Any, op: str, arguments: dict[str, torch.Tensor], gradients: tuple[str, ...], options: dict[str, Any]
) -> list[tuple[str, int]]:
    """(operation, elements) of each all-reduce, forward and backward to `gradients`; other collectives raise."""
    seen: list[tuple[str, int]] = []
    plain = dist.all_reduce

    def counted(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, **kwargs: Any) -> Any:
        seen.append((str(op).split(".")[-1], tensor.numel()))
        return plain(tensor, op=op, **kwargs)

    others = {name: getattr(dist, name) for name in ("all_gather", "all_gather_into_tensor", "broadcast", "reduce")}

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("another collective than all_reduce")

    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    V = arguments["weight"].shape[0] if op == "linear_cross_entropy" else arguments["logits"].shape[-1]
    leaves = {name: shard(op, name, x, even_sizes(V, ranks), rank) for name, x in arguments.items()}
    leaves = {name: x.requires_grad_(name in gradients) for name, x in leaves.items()}
    dist.all_reduce = counted
    for name in others:
        setattr(dist, name, refuse)
    try:
        loss = OPS[op](process_group=group, vocab_sizes=even_sizes(V, ranks), **leaves, **options)
        (loss if isinstance(loss, torch.Tensor) else loss[0]).sum().backward()
    finally:
        dist.all_reduce = plain
        for name, function in others.items():
            setattr(dist, name, function)
    return seen


def partial_gradients(group: Any, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> Any:
    """(this process's part of the gradient of hidden, the all-reduced gradient)."""
    ranks = dist.get_world_size(group)
    weight = weight.chunk(ranks)[dist.get_rank(group)]
    hidden = hidden.requires_grad_()
    return [
        torch.autograd.grad(
            gf.linear_cross_entropy(hidden, weight, target, process_group=group, reduce_grad_hidden=reduce), hidden
        )[0]
        for reduce in (False, True)
    ]


def with_dtensors(
    group: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, target: torch.Tensor, placement: str
) -> Any:
    """(loss, gradients as whole tensors, their placements) with weight and bias as DTensors of Shard(0)."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = DeviceMesh.from_group(group, "cpu")
    weight, bias = (distribute_tensor(x, mesh, [Shard(0)]).requires_grad_() for x in (weight, bias))
    if placement == "plain":
        hidden = hidden.requires_grad_()
    else:
        hidden = distribute_tensor(
            hidden, mesh, [Replicate() if placement == "replicate" else Shard(0)]
        ).requires_grad_()
    class_weight = distribute_tensor(torch.linspace(0.5, 1.5, weight.shape[0]), mesh, [Shard(0)])
    loss = gf.linear_cross_entropy(hidden, weight, target, bias=bias, class_weight=class_weight, label_smoothing=0.1)
    loss.backward()
    gradients = [x.grad for x in (hidden, weight, bias)]
    placements = [str(x.placements) if isinstance(x, DTensor) else "plain" for x in gradients]
    return loss.detach(), [x.full_tensor() if isinstance(x, DTensor) else x for x in gradients], placements


def logits_as_dtensor(group: Any, logits: torch.Tensor, target: torch.Tensor) -> Any:
    """(loss, gradient as a whole tensor) of logits that are a DTensor sharded along the vocabulary."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = DeviceMesh.from_group(group, "cpu")
    logits = distribute_tensor(logits, mesh, [Shard(logits.dim() - 1)]).requires_grad_()
    loss = gf.cross_entropy(logits, target, z_loss=0.1)
    loss.backward()
    return loss.detach(), logits.grad.full_tensor()


def parallel_module(group: Any, hidden: torch.Tensor, target: torch.Tensor, sharded: bool) -> Any:
    """For gf.nn.LinearCrossEntropyLoss on one process, after parallelize_module, and compiled: loss and gradients."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    def loss_and_gradients(function: Any, hidden: torch.Tensor) -> list[torch.Tensor]:
        hidden.requires_grad_()
        loss = function(hidden, target)
        gradients = torch.autograd.grad(loss, [hidden, module.linear.weight, module.linear.bias])
        return [x.full_tensor() if isinstance(x, DTensor) else x for x in (loss.detach(), *gradients)]

    torch.manual_seed(0)
    torch._dynamo.reset()
    module = gf.nn.LinearCrossEntropyLoss(hidden.shape[-1], 14, bias=True, label_smoothing=0.1)
    results = [loss_and_gradients(module, hidden)]
    mesh = DeviceMesh.from_group(group, "cpu")
    parallelize_module(module.linear, mesh, ColwiseParallel())
    hidden = distribute_tensor(hidden.detach(), mesh, [Shard(0)]) if sharded else hidden.detach()
    results.append(loss_and_gradients(module, hidden))
    results.append(loss_and_gradients(torch.compile(module, backend="aot_eager", fullgraph=True), hidden))
    return results


def wrong_dtensor(group: Any, weight: torch.Tensor) -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    weight = distribute_tensor(weight, DeviceMesh.from_group(group, "cpu"), [Shard(1)])
    gf.linear_cross_entropy(torch.randn(3, weight.shape[1]), weight, torch.zeros(3, dtype=torch.int64))


def compiled(group: Any, lengths: list[int], **options: Any) -> Any:
    """(compilations, greatest difference to eager) of loss and gradients under torch.compile at these N."""
    import torch._dynamo.testing

    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    torch.manual_seed(0)
    weight = torch.randn(4 * ranks, 8).chunk(ranks)[rank].requires_grad_()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss_of(hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return gf.linear_cross_entropy(hidden, weight, target, process_group=group, **options)

    fast, differences = torch.compile(loss_of, fullgraph=True, backend=counter), []
    for N in lengths:
        hidden, target = torch.randn(N, 8, requires_grad=True), torch.randint(0, 4 * ranks, (N,))
        results = [
            [loss, *torch.autograd.grad(loss, (hidden, weight))]
            for loss in (f(hidden, target) for f in (fast, loss_of))
        ]
        differences += [(a - b).abs().max().item() for a, b in zip(*results, strict=True)]
    return counter.frame_count, max(differences)


def under_autocast_and_transforms(group: Any, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> Any:
    """Gradients of hidden and weight four ways: by autograd and torch.func.grad, without and with autocast."""
    weight = weight.chunk(dist.get_world_size(group))[dist.get_rank(group)]

    def loss_of(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return gf.linear_cross_entropy(hidden, weight, target.to(torch.uint8), process_group=group)

    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
            results.append(torch.autograd.grad(loss_of(*leaves), leaves))
            results.append(torch.func.grad(loss_of, argnums=(0, 1))(hidden, weight))
    return results


def registered(group: Any) -> None:
    """opcheck of the sharded ops in every process at once."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    torch.manual_seed(0)
    hidden, weight, target = (
        torch.randn(5, 8),
        torch.randn(3 * ranks, 8).chunk(ranks)[rank],
        torch.randint(0, 3 * ranks, (5,)),
    )
    options: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0, "process_group": group}
    ops = torch.ops.gpt4v_fast
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    call = backends.call_of(gf.linear_cross_entropy, hidden, weight, target, **options)
    torch_library.opcheck(ops.sharded_linear_cross_entropy.default, tuple(call), test_utils=tests)
    call = backends.call_of(gf.cross_entropy, hidden, target % 8, **options)
    torch_library.opcheck(ops.sharded_cross_entropy.default, tuple(call), test_utils=tests)
