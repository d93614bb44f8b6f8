"""The ops under torch.func (grad, vmap, jacrev, functional_call), and what they say to a second derivative."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from loss_cases import IGNORED, class_weights, make_labels
from torch.func import functional_call, grad, grad_and_value, jacrev, jvp, vmap

import gpt4v_fast as gf
from gpt4v_fast import reference

TARGET, WEIGHTS = make_labels(6, 11, 0.3), class_weights(11)
CU_SEQLENS = torch.tensor([0, 2, 5], dtype=torch.int32)
LOSS_OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.05, "softcap": 3.0}


def linear_loss(module: Any, hidden: Any, weight: Any, bias: Any, target: torch.Tensor = TARGET) -> Any:
    options = {"bias": bias, "class_weight": WEIGHTS, **LOSS_OPTIONS}
    return module.linear_cross_entropy(hidden, weight, target, **options)


def loss(module: Any, logits: Any, target: torch.Tensor = TARGET) -> Any:
    return module.cross_entropy(logits, target, weight=WEIGHTS, **LOSS_OPTIONS)


def attention(module: Any, q: Any, k: Any, v: Any, bias: Any) -> Any:
    out, lse = module.attention(q, k, v, bias=bias, mask=gf.Mask(causal=True), return_lse=True)
    return out.square().sum() + lse.sum()


def varlen(module: Any, q: Any, k: Any, v: Any) -> Any:
    return module.attention_varlen(q, k, v, CU_SEQLENS, CU_SEQLENS, causal=True).square().sum()


def patches(module: Any, pixels: Any, weight: Any, bias: Any) -> Any:
    return module.patch_embed(pixels, weight, bias=bias, mean=0.5, std=0.25).square().sum()


# A scalar function of the op (of gpt4v_fast or of its reference), and the shapes of what it is differentiated by.
FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "linear_cross_entropy": (linear_loss, ((6, 8), (11, 8), (11,))),
    "cross_entropy": (loss, ((6, 11),)),
    "attention": (attention, ((1, 4, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8), (5, 5))),
    "attention_varlen": (varlen, ((5, 4, 8), (5, 2, 8), (5, 2, 8))),
    "patch_embed": (patches, ((2, 3, 8, 8), (5, 3, 4, 4), (5,))),
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


every_op = pytest.mark.parametrize("name", FUNCTIONS)


def case(name: str) -> tuple[Callable[..., Any], list[torch.Tensor], tuple[int, ...]]:
    function, shapes = FUNCTIONS[name]
    generator = torch.Generator().manual_seed(0)
    return function, [torch.randn(shape, generator=generator) for shape in shapes], tuple(range(1, 1 + len(shapes)))


def same(got: Iterable[torch.Tensor], want: Iterable[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@every_op
def test_grad(name):
    function, tensors, argnums = case(name)
    gradients = grad(function, argnums=argnums)(gf, *tensors)
    leaves = [x.requires_grad_() for x in tensors]
    assert same(gradients, torch.autograd.grad(function(gf, *leaves), leaves))


@every_op
def test_grad_and_value_and_a_single_argument(name):
    function, tensors, argnums = case(name)
    for argnum in argnums:
        gradient, value = grad_and_value(function, argnums=argnum)(gf, *tensors)
        assert torch.equal(gradient, grad(function, argnums=argnums)(gf, *tensors)[argnum - 1])
        assert torch.equal(value, function(gf, *tensors))


@every_op
def test_compiled_grad(name):
    function, tensors, argnums = case(name)
    transform = grad(lambda *tensors: function(gf, *tensors), argnums=tuple(i - 1 for i in argnums))
    compiled = torch.compile(transform, fullgraph=True, backend="aot_eager")(*tensors)
    assert same(compiled, transform(*tensors))


@every_op
def test_compiled_code_serves_both_sides_of_a_transform(name):
    """One compiled function, called plainly, under grad, and plainly again."""
    function, tensors, argnums = case(name)
    compiled = torch.compile(lambda *tensors: function(gf, *tensors), backend="aot_eager")
    transform = grad(compiled, argnums=tuple(i - 1 for i in argnums))
    for _ in range(2):
        assert torch.equal(compiled(*tensors), function(gf, *tensors))
        assert same(transform(*tensors), grad(function, argnums=argnums)(gf, *tensors))


@every_op
def test_the_graph_holds_the_op_and_no_questions(name):
    """A call of torch's internals in it, which cannot be serialized, would keep compiled code out of its caches."""
    function, tensors, _ = case(name)
    calls = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        calls.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch.compile(lambda *tensors: function(gf, *tensors), fullgraph=True, backend=backend)(*tensors)
    assert f"gpt4v_fast.{name}" in calls
    assert not [call for call in calls if "active" in call or "autocast" in call or "pybind" in call]


@every_op
def test_vmap_is_the_op_once_per_element(name):
    """Gradients per sample (vmap over grad), and the gradient of a mapped function (grad over vmap)."""
    function, tensors, argnums = case(name)
    first, *others = tensors
    batch = torch.stack([first, 2 * first, -first])
    in_dims = (0, *[None] * len(others))
    mapped = vmap(lambda *tensors: grad(function, argnums=argnums)(gf, *tensors), in_dims=in_dims)(batch, *others)
    each = [grad(function, argnums=argnums)(gf, x, *others) for x in batch]
    for got, want in zip(mapped, zip(*each, strict=True), strict=True):
        assert torch.equal(got, torch.stack(want))
    values = vmap(lambda *tensors: function(gf, *tensors), in_dims=in_dims)
    assert torch.equal(values(batch, *others), torch.stack([function(gf, x, *others) for x in batch]))
    whole = grad(lambda batch: values(batch, *others).sum())(batch)
    leaf = batch.clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(values(leaf, *others).sum(), leaf)
    assert torch.equal(whole, mapped[0]) and torch.equal(by_autograd, mapped[0])


def test_vmap_over_labels_and_weights():
    hidden, weight, target = torch.randn(3, 6, 8), torch.randn(3, 11, 8), make_labels(18, 11, 0.3).reshape(3, 6)
    got = vmap(gf.linear_cross_entropy)(hidden, weight, target)
    each = zip(hidden, weight, target, strict=True)
    assert torch.equal(got, torch.stack([gf.linear_cross_entropy(*one) for one in each]))
    with pytest.raises(IndexError, match=r"got 11 at target\[1\]"):
        vmap(gf.linear_cross_entropy)(hidden, weight, torch.where(torch.arange(6) == 1, 11, target))


def test_vmap_over_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one element to map over"):
        vmap(gf.cross_entropy)(torch.randn(0, 6, 11), torch.zeros(0, 6, dtype=torch.int64))


def test_jacobian_of_the_loss_of_each_token():
    logits = torch.randn(6, 11)
    jacobian = jacrev(lambda x: gf.cross_entropy(x, TARGET, reduction="none"))(logits)
    leaf = logits.clone().requires_grad_()
    losses = gf.cross_entropy(leaf, TARGET, reduction="none")
    assert same(jacobian, [torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in losses])


def test_functional_call():
    module = gf.nn.LinearCrossEntropyLoss(8, 11, bias=True, label_smoothing=0.1)
    hidden, parameters = torch.randn(6, 8), {name: x.detach() for name, x in module.named_parameters()}
    gradients = grad(lambda parameters: functional_call(module, parameters, (hidden, TARGET)))(parameters)
    module(hidden, TARGET).backward()
    for name, parameter in module.named_parameters():
        assert torch.equal(gradients[name], parameter.grad), name


def test_autocast_inside_a_transform():
    hidden, weight = torch.randn(6, 8), torch.randn(11, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradient = grad(gf.linear_cross_entropy)(hidden, weight, TARGET)
        leaf = hidden.clone().requires_grad_()
        want = torch.autograd.grad(gf.linear_cross_entropy(leaf, weight, TARGET), leaf)[0]
    assert gradient.dtype == torch.float32 and torch.equal(gradient, want)


@every_op
def test_a_second_derivative_is_refused_by_name(name):
    """By autograd and by torch.func; the first one is right also with create_graph, and the oracle has the second."""
    function, tensors, _ = case(name)
    leaves = [x.requires_grad_() for x in tensors]
    plain = torch.autograd.grad(function(gf, *leaves), leaves)
    gradients = torch.autograd.grad(function(gf, *leaves), leaves, create_graph=True)
    assert same(plain, gradients)
    message = rf"gpt4v_fast\.{name} can be differentiated once.*create_graph.*gpt4v_fast\.reference\.{name}"
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(sum(x.square().sum() for x in gradients), leaves)
    tensors = [x.detach() for x in tensors]
    with pytest.raises(RuntimeError, match=message):
        grad(lambda x, *others: grad(function, argnums=1)(gf, x, *others).square().sum())(*tensors)
    second = grad(lambda x, *others: grad(function, argnums=1)(reference, x, *others).square().sum())(*tensors)
    assert second.isfinite().all() and (second != 0).any()


def test_forward_mode_is_refused():
    logits = torch.randn(6, 11)
    with pytest.raises(NotImplementedError, match="jvp"):
        jvp(lambda x: gf.cross_entropy(x, TARGET), (logits,), (logits,))


def test_the_upstream_gradient_gets_no_gradient():
    """A graph through the gradient of the loss with respect to what comes after it is refused too."""
    logits, scale = torch.randn(6, 11, requires_grad=True), torch.ones((), requires_grad=True)
    value = gf.cross_entropy(logits, TARGET, ignore_index=IGNORED) * scale
    (gradient,) = torch.autograd.grad(value, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(gradient.sum(), scale)
