"""gf.cross_entropy(..., inplace_backward=True): the gradient takes the logits' memory, and nobody is misled by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_cases import BF16, FP16, FP32, ISAS, class_weights, make_labels

import gpt4v_fast as gf

OPTIONS: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0, "weight": class_weights(2050)}


def step(logits: torch.Tensor, target: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(the logits as they are after backward, what arrived as their gradient)."""
    leaf = logits.clone().requires_grad_()
    computed = leaf * 1.0
    arrived: list[torch.Tensor] = []
    computed.register_hook(arrived.append)
    gf.cross_entropy(computed, target, **options).backward()
    assert leaf.grad is not None and torch.equal(leaf.grad, arrived[0])
    return computed.detach(), arrived[0]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "every-option"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_the_same_gradient_in_the_memory_of_the_logits(dtype, options, isa):
    logits, target = torch.randn(7, 2050).to(dtype), make_labels(7, 2050, 0.3)
    with gf.force(isa=isa):
        kept, want = step(logits, target, **options)
        overwritten, gradient = step(logits, target, **options, inplace_backward=True)
    assert torch.equal(kept, logits) and torch.equal(gradient, want)
    assert gradient.data_ptr() == overwritten.data_ptr() and torch.equal(overwritten, want)


def test_by_the_reference_too():
    logits, target = torch.randn(7, 2050), make_labels(7, 2050, 0.3)
    with gf.force(backend="reference"):
        _, want = step(logits, target, **OPTIONS)
        overwritten, gradient = step(logits, target, **OPTIONS, inplace_backward=True)
    assert torch.equal(gradient, want) and gradient.data_ptr() == overwritten.data_ptr()


def test_through_a_linear_layer_into_its_parameters():
    hidden, weight, target = torch.randn(2, 5, 8), torch.randn(33, 8, requires_grad=True), make_labels(10, 33, 0.3)
    for_weight = []
    for inplace in (False, True):
        logits = torch.nn.functional.linear(hidden, weight)
        loss = gf.cross_entropy(logits, target.reshape(2, 5), inplace_backward=inplace)
        for_weight += torch.autograd.grad(loss, weight)
    assert torch.equal(*for_weight)


@pytest.mark.parametrize("layout", ["expanded", "columns-first"])
def test_memory_that_cannot_hold_it_is_left_alone(layout):
    leaf = torch.randn((1, 9) if layout == "expanded" else (9, 4), requires_grad=True)
    logits = (leaf * 1.0).expand(4, 9) if layout == "expanded" else (leaf * 1.0).t()
    before, target = logits.detach().clone(), make_labels(4, 9, 0.3)
    losses = [gf.cross_entropy(logits, target, inplace_backward=inplace) for inplace in (True, False)]
    (got,), (want,) = (torch.autograd.grad(loss, leaf, retain_graph=True) for loss in losses)
    assert torch.equal(logits, before) and torch.equal(got, want)


def test_whoever_else_needs_the_logits_is_told():
    leaf, target = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 1, 2])
    logits = leaf * 1.0
    loss = gf.cross_entropy(logits, target, inplace_backward=True)
    square = logits.square().sum()  # saves logits
    loss.backward(retain_graph=True)
    for second in (square, loss):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            second.backward()


def test_a_leaf_and_a_process_group_are_refused():
    target = torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"inplace_backward: .* got a leaf"):
        gf.cross_entropy(torch.randn(3, 5, requires_grad=True), target, inplace_backward=True)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="inplace_backward: expected False with a process_group"):
            gf.cross_entropy(
                torch.randn(3, 5), target, inplace_backward=True, process_group=torch.distributed.group.WORLD
            )
    finally:
        torch.distributed.destroy_process_group()


def test_compiled_code_and_transforms_keep_the_logits():
    leaf, target = torch.randn(6, 11, requires_grad=True), make_labels(6, 11, 0.3)

    def run(x: torch.Tensor) -> torch.Tensor:
        return gf.cross_entropy(x * 1.0, target, inplace_backward=True)

    (want,) = torch.autograd.grad(run(leaf), leaf)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(leaf), leaf)[0], want)
    assert torch.equal(torch.func.grad(run)(leaf.detach()), want)


def test_a_second_derivative_is_refused():
    leaf = torch.randn(3, 5, requires_grad=True)
    loss = gf.cross_entropy(leaf * 1.0, torch.tensor([0, 1, 2]), inplace_backward=True)
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient.sum().backward()


def test_the_module_has_it_too():
    logits, target = torch.randn(7, 11, requires_grad=True) * 1.0, make_labels(7, 11, 0.3)
    before = logits.detach().clone()
    gf.nn.CrossEntropyLoss(inplace_backward=True)(logits, target).backward()
    assert not torch.equal(logits, before)
