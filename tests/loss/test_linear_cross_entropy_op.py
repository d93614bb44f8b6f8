"""gf.linear_cross_entropy as a citizen of PyTorch: refusals, registration, compilation, autocast, the module."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from loss_cases import BF16, EVERYTHING, FP32, IGNORED, class_weights, make_labels
from loss_cases import LinearCase as Case
from torch import library as torch_library

import gpt4v_fast as gf
from gpt4v_fast import backends, reference

OPS = torch.ops.gpt4v_fast

HIDDEN, WEIGHT, TARGET = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3, dtype=torch.int64)
REFUSED = {
    "hidden-not-a-tensor": ({"hidden": [[0.0]]}, TypeError, "hidden: expected a torch.Tensor"),
    "hidden-fp64": ({"hidden": HIDDEN.double()}, TypeError, "hidden: expected dtype .* got float64"),
    "hidden-depth": ({"hidden": torch.zeros(2, 3, 5)}, ValueError, r"hidden: .* E = 4, got \(2, 3, 5\)"),
    "weight-ndim": ({"weight": torch.zeros(5)}, ValueError, "weight: expected 2 dimensions"),
    "weight-dtype": ({"weight": WEIGHT.bfloat16()}, TypeError, "weight: expected hidden's dtype float32, got bfloat16"),
    "weight-device": ({"weight": WEIGHT.to("meta")}, ValueError, "weight: expected hidden's device cpu, got meta"),
    "no-class": ({"weight": torch.zeros(0, 4)}, ValueError, "V at least 1"),
    "bias-length": ({"bias": torch.zeros(4)}, ValueError, r"bias: expected shape \(V,\) \(5,\), got \(4,\)"),
    "bias-integers": ({"bias": torch.zeros(5).int()}, TypeError, "bias: expected dtype"),
    "bias-device": ({"bias": torch.zeros(5, device="meta")}, ValueError, "bias: .* got meta"),
    "target-shape": ({"target": TARGET[:1]}, ValueError, r"target: expected shape \(2, 3\).* got \(1, 3\)"),
    "target-probabilities": ({"target": torch.zeros(2, 3)}, TypeError, "class probabilities are not supported"),
    "target-device": ({"target": TARGET.to("meta")}, ValueError, "target: expected the device cpu, got meta"),
    "target-list": ({"target": [[0] * 3] * 2}, TypeError, "target: expected a torch.Tensor of labels, got list"),
    "target-bool": ({"target": TARGET.bool()}, TypeError, "target: expected an integer dtype, got torch.bool"),
    "bias-ndim": ({"bias": torch.zeros(5, 1)}, ValueError, r"bias: expected shape \(V,\) \(5,\), got \(5, 1\)"),
    "class-weight-device": ({"class_weight": torch.ones(5, device="meta")}, ValueError, "class_weight: .* got meta"),
    "class-weight-integers": ({"class_weight": torch.ones(5).int()}, TypeError, "class_weight: expected dtype"),
    "ignore-index": ({"ignore_index": 1.0}, TypeError, "ignore_index: expected an int .*, got float"),
    "class-weight-length": ({"class_weight": torch.ones(4)}, ValueError, r"class_weight: expected .* got \(4,\)"),
    "class-weight-gradient": ({"class_weight": torch.ones(5, requires_grad=True)}, ValueError, "class_weight: "),
    "reduction": ({"reduction": "average"}, ValueError, "reduction: expected one of"),
    "label-smoothing": ({"label_smoothing": -0.1}, ValueError, "label_smoothing: "),
    "z-loss": ({"z_loss": math.nan}, ValueError, "z_loss: "),
    "softcap": ({"softcap": 0.0}, ValueError, "softcap: "),
    "shift-negative": ({"shift": -1}, ValueError, "shift: expected an int of 0 or more, got -1"),
    "shift-bool": ({"shift": True}, TypeError, "shift: expected an int .*, got bool"),
    "shift-single": ({"hidden": HIDDEN[0, 0], "target": TARGET[0, 0], "shift": 1}, ValueError, "0 for a single token"),
}


@pytest.mark.parametrize("change, error, message", REFUSED.values(), ids=REFUSED.keys())
def test_refuses(change, error, message):
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "target": TARGET, **change}
    with pytest.raises(error, match=message):
        gf.linear_cross_entropy(**arguments)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_bad_label_is_named_with_its_place(backend, shift):
    """In the target that was given, shifted or not; a label that shift leaves out does not count."""
    leaves = [torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)]
    target = torch.tensor([[0, 4, IGNORED], [1, 0, 77]])
    target[0, 0] = 99 if shift else 0
    with gf.force(backend=backend), pytest.raises(IndexError, match=r"in \[0, 5\) .* got 77 at target\[1, 2\]"):
        gf.linear_cross_entropy(*leaves, target, shift=shift)
    assert all(leaf.grad is None for leaf in leaves)


def test_explain():
    choice = gf.explain(gf.linear_cross_entropy, HIDDEN, WEIGHT, TARGET, shift=1)
    assert (choice.backend, choice.kernel) == ("cpu", "_C.linear_cross_entropy")


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("everything", [False, True])
def test_opcheck(everything, shift):
    case = Case("", 6, 11, 8, bias=FP32, **EVERYTHING) if everything else Case("", 6, 11, 8, BF16)
    tensors = {name: x.requires_grad_() for name, x in case.tensors().items()}
    call = backends.call_of(gf.linear_cross_entropy, target=case.target(), shift=shift, **tensors, **case.options())
    torch_library.opcheck(OPS.linear_cross_entropy.default, tuple(call))
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in call]
    loss, lse, _, _, *saved = OPS.linear_cross_entropy(*detached)
    upstream, wanted = (torch.ones_like(loss), torch.ones_like(lse)), (True, True, call.bias is not None)
    torch_library.opcheck(OPS.linear_cross_entropy_backward.default, (*upstream, *detached, lse, *saved, *wanted))


def test_gradcheck_of_the_oracle():
    tensors = {name: x.double().requires_grad_() for name, x in Case("", 5, 6, 4, bias=FP32).tensors().items()}
    options = {"class_weight": class_weights(6).double(), "label_smoothing": 0.2, "z_loss": 0.1, "softcap": 3.0}
    target = torch.tensor([0, IGNORED, 5, 2, 1])

    def function(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
        return reference.linear_cross_entropy(hidden, weight, target, bias=bias, shift=1, reduction="none", **options)

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))


def test_compiles_without_a_graph_break_and_once_for_every_length():
    weight = torch.randn(11, 8, requires_grad=True)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def run(hidden: torch.Tensor, target: torch.Tensor) -> Any:
        return gf.linear_cross_entropy(hidden, weight, target, shift=1, z_loss=0.1, softcap=3.0, return_stats=True)

    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for T in (5, 6, 9, 14, 30):
        hidden, target = torch.randn(2, T, 8, requires_grad=True), make_labels(2 * T, 11, 0.3).reshape(2, T)
        results = [function(hidden, target) for function in (compiled, run)]
        assert torch.equal(results[0][0], results[1][0])
        gradients = [torch.autograd.grad(loss, (hidden, weight)) for loss, _ in results]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert counter.frame_count <= 2  # the first length, then any


def test_double_backward_is_refused():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = gf.linear_cross_entropy(hidden, weight, torch.tensor([0, 1, 2]))
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient.sum().backward()


def test_autocast():
    case = Case("", 20, 30, 10, bias=FP32)
    leaves = {name: x.requires_grad_() for name, x in case.tensors().items()}
    with torch.autocast("cpu", dtype=BF16):
        loss = gf.linear_cross_entropy(target=case.target(), **leaves)
    want = gf.linear_cross_entropy(target=case.target(), **{name: x.bfloat16() for name, x in leaves.items()})
    assert loss.dtype == FP32 and torch.equal(loss, want)
    assert all(x.dtype == FP32 for x in torch.autograd.grad(loss, leaves.values()))


def test_module():
    module = gf.nn.LinearCrossEntropyLoss(8, 11, bias=True, weight=class_weights(11), shift=1, softcap=5.0)
    assert list(module.state_dict()) == ["weight", "linear.weight", "linear.bias"] and "shift=1" in repr(module)
    module.load_state_dict(torch.nn.LinearCrossEntropyLoss(8, 11, bias=True, weight=class_weights(11)).state_dict())
    hidden, target = torch.randn(2, 6, 8), torch.randint(0, 11, (2, 6))
    weight, bias = module.linear.weight, module.linear.bias
    want = gf.linear_cross_entropy(
        hidden, weight, target, bias=bias, class_weight=class_weights(11), shift=1, softcap=5.0
    )
    assert torch.equal(module(hidden, target), want)
