"""Both losses as a training loop has them: compiled, under autocast, scaled, accumulated, and with nothing to learn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from closeness import compare
from loss_cases import BF16, EVERYTHING, FP16, FP32, IGNORED, class_weights, make_labels
from triton_interpreter import call

import gpt4v_fast as gf
from gpt4v_fast import reference

V, E = 11, 8
both_losses = pytest.mark.parametrize("op", ["linear_cross_entropy", "cross_entropy"])
reductions = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
OPTIONS = {"plain": {}, "everything": {name: value for name, value in EVERYTHING.items() if name != "weighted"}}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def tensors_of(op: str, N: int, dtype: torch.dtype = FP32, with_bias: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(N)
    if op == "cross_entropy":
        return {"logits": torch.randn(N, V, generator=generator).to(dtype)}
    hidden, weight = (torch.randn(rows, E, generator=generator).to(dtype) for rows in (N, V))
    bias = {"bias": torch.randn(V, generator=generator).to(dtype)} if with_bias else {}
    return {"hidden": hidden, "weight": weight, **bias}


def all_options(op: str, options: dict[str, Any]) -> dict[str, Any]:
    """With class weights, where there are options at all."""
    name = "weight" if op == "cross_entropy" else "class_weight"
    return {**options, name: class_weights(V)} if options else {}


# torch.compile.


@pytest.mark.parametrize("op, shift", [("cross_entropy", 0), ("linear_cross_entropy", 0), ("linear_cross_entropy", 1)])
@every_option
@pytest.mark.parametrize("reduction, return_stats", [("mean", False), ("none", True)])
def test_one_graph_for_every_length(op, options, reduction, return_stats, shift):
    """Forward and backward without a graph break; the second length compiles for all further ones."""
    torch._dynamo.reset()
    function = getattr(gf, op)
    further = {**all_options(op, options), "reduction": reduction, "return_stats": return_stats}
    further |= {"shift": shift} if shift else {}
    backwards = []

    def count_backward(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        backwards.append(graph)
        return graph

    forward = torch._dynamo.testing.CompileCounter()
    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=forward, bw_compiler=count_backward)

    def loss_of(tensors: dict[str, torch.Tensor], target: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = function(target=target, **tensors, **further)
        return (result[0], result[1].lse) if return_stats else (result,)

    compiled = torch.compile(loss_of, fullgraph=True, backend=backend)
    for N in (5, 6, 9, 14, 64):
        tensors = {name: x.requires_grad_() for name, x in tensors_of(op, N, with_bias=bool(options)).items()}
        target, results = make_labels(N, V, 0.3), []
        for run in (compiled, loss_of):
            outputs = run(tensors, target)
            upstream = [torch.full_like(x, 0.5) for x in outputs]
            results.append([*outputs, *torch.autograd.grad(outputs, list(tensors.values()), upstream)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert forward.frame_count == len(backwards) == 2


@both_losses
def test_compiles_under_autocast(op):
    torch._dynamo.reset()
    tensors = {name: x.requires_grad_() for name, x in tensors_of(op, 6).items()}
    target = make_labels(6, V, 0.3)

    def loss_of(**tensors: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=BF16):
            return getattr(gf, op)(target=target, **tensors)

    losses = [loss_of(**tensors), torch.compile(loss_of, fullgraph=True, backend="aot_eager")(**tensors)]
    gradients = [torch.autograd.grad(loss, list(tensors.values())) for loss in losses]
    assert torch.equal(*losses) and all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@both_losses
@every_option
def test_on_meta_tensors(op, options):
    """Shapes and dtypes without numbers, as models are built before their weights are loaded."""
    tensors = {name: x.to("meta").requires_grad_() for name, x in tensors_of(op, 6).items()}
    further = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in all_options(op, options).items()}
    target = torch.zeros(6, dtype=torch.int64, device="meta")
    loss, stats = getattr(gf, op)(target=target, **tensors, **further, reduction="none", return_stats=True)
    assert loss.shape == stats.lse.shape == (6,) and loss.dtype == FP32 and loss.is_meta
    for gradient, leaf in zip(torch.autograd.grad(loss.sum(), list(tensors.values())), tensors.values(), strict=True):
        assert gradient.shape == leaf.shape and gradient.dtype == leaf.dtype and gradient.is_meta


# Autocast.


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("given", [{}, {"hidden": "autocast"}, {"weight": "autocast", "bias": FP16}], ids=str)
def test_autocast_takes_what_linear_takes(given, dtype):
    """Inputs of any float dtype go into the product in autocast's; the loss is fp32, gradients as the inputs."""
    tensors = tensors_of("linear_cross_entropy", 6)
    for name, other in given.items():
        tensors[name] = tensors[name].to(dtype if other == "autocast" else other)
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    target = make_labels(6, V, 0.3)
    with torch.autocast("cpu", dtype=dtype):
        loss = gf.linear_cross_entropy(target=target, **leaves)
        torch_loss = F.cross_entropy(F.linear(leaves["hidden"], leaves["weight"], leaves["bias"]), target)
        with torch.autocast("cpu", enabled=False):
            explicit = gf.linear_cross_entropy(target=target, **{name: x.to(dtype) for name, x in leaves.items()})
    assert loss.dtype == torch_loss.dtype == FP32 and torch.equal(loss, explicit)
    torch.testing.assert_close(loss, torch_loss, rtol=2e-2, atol=2e-2)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    assert [g.dtype for g in gradients] == [x.dtype for x in leaves.values()]
    assert all(
        torch.equal(a, b) for a, b in zip(gradients, torch.autograd.grad(explicit, list(leaves.values())), strict=True)
    )


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_autocast_leaves_logits_as_they_are(dtype):
    logits = torch.randn(6, V).to(dtype).requires_grad_()
    target = make_labels(6, V, 0.3)
    with torch.autocast("cpu", dtype=BF16):
        loss, torch_loss = gf.cross_entropy(logits, target), F.cross_entropy(logits, target)
    assert loss.dtype == torch_loss.dtype == FP32 and torch.equal(loss, gf.cross_entropy(logits, target))
    torch.testing.assert_close(loss, torch_loss, rtol=1e-5, atol=1e-6)
    assert torch.autograd.grad(loss, logits)[0].dtype == dtype


def test_without_autocast_dtypes_may_not_differ():
    tensors = tensors_of("linear_cross_entropy", 6)
    tensors["weight"] = tensors["weight"].bfloat16()
    with pytest.raises(TypeError, match="weight: expected hidden's dtype float32, got bfloat16"):
        gf.linear_cross_entropy(target=make_labels(6, V), **tensors)


# Upstream gradients, accumulation.


@both_losses
@reductions
@every_option
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_any_upstream_gradient(op, reduction, options, dtype):
    """Of the loss and of lse, against the oracle; some of it 0 and negative."""
    target = make_labels(30, V, 0.3)
    further = {**all_options(op, options), "reduction": reduction}

    def run(module: Any) -> Callable[..., Any]:
        def outputs(**tensors: torch.Tensor) -> Any:
            loss, stats = getattr(module, op)(target=target, return_stats=True, **tensors, **further)
            return loss, stats.lse

        return outputs

    def native(**tensors: torch.Tensor) -> Any:
        return run(reference)(**{name: x.float() for name, x in tensors.items()})

    tensors = tensors_of(op, 30, dtype)
    compare(run(gf), run(reference), tensors, gradients=tuple(tensors), native=native, output_names=("loss", "lse"))


@both_losses
@reductions
def test_the_gradient_is_linear_in_the_upstream_gradient(op, reduction):
    """Powers of 2, as a GradScaler has them, change no bit; 0 gives 0; strided and expanded ones are read right."""
    tensors = {name: x.requires_grad_() for name, x in tensors_of(op, 6).items()}
    loss = getattr(gf, op)(target=make_labels(6, V, 0.3), **tensors, reduction=reduction)

    def gradients(upstream: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss, list(tensors.values()), upstream, retain_graph=True)

    once = gradients(torch.ones_like(loss))
    for factor in (65536.0, -0.5, 0.0):
        assert all(
            torch.equal(a, factor * b) for a, b in zip(gradients(torch.full_like(loss, factor)), once, strict=True)
        )
    expanded = torch.ones(()).expand(loss.shape)
    strided = torch.full((2 * max(loss.numel(), 1),), math.nan)[::2].fill_(1.0)[: loss.numel()].reshape(loss.shape)
    for upstream in (expanded, strided):
        assert all(torch.equal(a, b) for a, b in zip(gradients(upstream), once, strict=True))


@both_losses
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_accumulates_into_existing_gradients(op, dtype):
    """.grad before plus the gradient, in its own memory and layout; two backwards of one graph are the same."""
    leaves = {name: x.requires_grad_() for name, x in tensors_of(op, 6, dtype).items()}
    target = make_labels(6, V, 0.3)
    inputs = {name: x.detach().clone() for name, x in leaves.items()}
    once = dict(
        zip(leaves, torch.autograd.grad(getattr(gf, op)(target=target, **leaves), list(leaves.values())), strict=True)
    )
    before, memory = {}, {}
    for name, leaf in leaves.items():
        room = torch.full((*leaf.shape[:-1], 2 * leaf.shape[-1]), 7.0, dtype=dtype)
        leaf.grad = room[..., ::2].copy_(torch.randn(leaf.shape))
        before[name], memory[name] = leaf.grad.clone(), (leaf.grad.data_ptr(), room)
    loss = getattr(gf, op)(target=target, **leaves)
    loss.backward(retain_graph=True)
    loss.backward()
    for name, leaf in leaves.items():
        pointer, room = memory[name]
        assert torch.equal(leaf.grad, before[name] + once[name] + once[name]), name
        assert leaf.grad.data_ptr() == pointer and (room[..., 1::2] == 7.0).all()
        assert torch.equal(leaf.detach(), inputs[name])


@both_losses
def test_micro_batches_add_up(op):
    """The sum over the parts of a batch, each divided by the whole batch's tokens, is the batch's mean."""
    leaves = {name: x.requires_grad_() for name, x in tensors_of(op, 24).items()}
    target = make_labels(24, V, 0.3)
    whole = torch.autograd.grad(getattr(gf, op)(target=target, **leaves), list(leaves.values()))
    first = next(iter(leaves))
    for part in torch.arange(24).split(7):
        some = {**leaves, first: leaves[first][part]}
        loss = getattr(gf, op)(target=target[part], **some, reduction="sum") / (target != IGNORED).sum()
        loss.backward()
    for leaf, want in zip(leaves.values(), whole, strict=True):
        torch.testing.assert_close(leaf.grad, want, rtol=1e-5, atol=1e-7)


# Nothing to learn, one class, few tokens.


@both_losses
@reductions
@every_option
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("N", [0, 1, 7])
def test_nothing_counted_is_as_in_torch(op, reduction, options, backend, N):
    """Mean NaN, sum and none 0, gradients 0."""
    tensors = {name: x.requires_grad_() for name, x in tensors_of(op, N).items()}
    target = torch.full((N,), IGNORED)
    further = {**all_options(op, options), "reduction": reduction}
    with gf.force(backend=backend):
        loss, stats = getattr(gf, op)(target=target, **tensors, **further, return_stats=True)
        gradients = torch.autograd.grad(loss.sum() + stats.lse.sum(), list(tensors.values()))
    want = F.cross_entropy(torch.zeros(N, V), target, reduction=reduction)
    torch.testing.assert_close(loss.detach(), want, rtol=0, atol=0, equal_nan=True)
    assert all((x == 0).all() and x.shape == y.shape for x, y in zip(gradients, tensors.values(), strict=True))
    assert (stats.lse == 0).all() and (stats.argmax == -1).all() and not stats.correct.any()


@both_losses
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("N", [1, 5])
def test_one_class_has_no_loss(op, backend, N):
    """Its probability is 1: nll and every gradient through it are 0, lse is the logit."""
    logits, target = torch.randn(N, 1, requires_grad=True), torch.zeros(N, dtype=torch.int64)
    with gf.force(backend=backend):
        for smoothing in (0.0, 0.3):
            options = {"label_smoothing": smoothing, "return_stats": True, "reduction": "none"}
            if op == "cross_entropy":
                loss, stats = gf.cross_entropy(logits, target, **options)
            else:
                loss, stats = gf.linear_cross_entropy(logits, torch.ones(1, 1), target, **options)
            (gradient,) = torch.autograd.grad(loss.sum(), logits)
            assert (loss == 0).all() and (gradient == 0).all()
            assert torch.equal(stats.lse, logits.detach()[:, 0]) and stats.correct.all()


# Labels.


@both_losses
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_narrow_labels_are_compared_as_numbers(op, dtype):
    """Beside uint8, torch takes -100 for 156 and 300 for 44; beside int8, 300 for 44."""
    function, many = getattr(gf, op), 300
    logits = torch.randn(3, many)
    tensors = (
        {"logits": logits} if op == "cross_entropy" else {"hidden": torch.eye(3), "weight": logits.t().contiguous()}
    )
    target = torch.tensor([44, 127 if dtype == torch.int8 else 156, 0], dtype=dtype)
    for options in ({}, {"ignore_index": 300}, {"ignore_index": 44}):
        want = function(target=target.to(torch.int64), **tensors, **options)
        assert torch.equal(function(target=target, **tensors, **options), want)
    with pytest.raises(IndexError, match=r"in \[0, 40\) .* got 44 at target\[0\]"):
        gf.cross_entropy(logits[:, :40], target)


@both_losses
@pytest.mark.parametrize("label", [V, -1, -101, 2**40, -(2**40)])
def test_a_bad_label_leaves_everything_as_it_was(op, label):
    """On a CPU: no loss, no gradient, .grad as before; under torch.compile too."""
    leaves = {name: x.requires_grad_() for name, x in tensors_of(op, 6).items()}
    for leaf in leaves.values():
        leaf.grad = torch.full_like(leaf, 7.0)
    target = torch.tensor([0, IGNORED, 1, label, label, 2])

    def run() -> torch.Tensor:
        return getattr(gf, op)(target=target, **leaves)

    torch._dynamo.reset()
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        with pytest.raises(IndexError, match=rf"in \[0, {V}\) or ignore_index = -100, got {label} at target\[3\]"):
            function()
    assert all((leaf.grad == 7.0).all() for leaf in leaves.values())


def interpreted_bad_label(op: str, tensors: dict[str, torch.Tensor], target: torch.Tensor) -> Any:
    """(losses, gradients, what check_labels raised), for a worker with Triton's interpreter."""
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    with gf.force(backend="triton"):
        loss = getattr(gf, op)(target=target, **leaves, reduction="none")
        gradients = torch.autograd.grad(loss[target == 0].sum(), list(leaves.values()))
    try:
        gf.check_labels()
    except IndexError as error:
        return loss.detach(), gradients, str(error)
    return loss.detach(), gradients, ""


@both_losses
def test_a_bad_label_is_a_nan_of_its_row_where_nobody_waits(op):
    """As on a GPU, through the interpreter: the other rows' numbers are right, check_labels names the first."""
    tensors = tensors_of(op, 4)
    target = torch.tensor([0, 2**40, 0, -7])
    loss, gradients, error = call(interpreted_bad_label, op, tensors, target)
    good = torch.tensor([0, 2])
    rows = {**tensors, next(iter(tensors)): next(iter(tensors.values()))[good]}
    torch.testing.assert_close(loss[good], getattr(reference, op)(target=target[good], **rows, reduction="none"))
    assert loss[[1, 3]].isnan().all() and gradients[0][[1, 3]].isnan().all() and gradients[0][good].isfinite().all()
    assert f"in [0, {V})" in error and f"got {2**40} at place 1 of the flattened target" in error
