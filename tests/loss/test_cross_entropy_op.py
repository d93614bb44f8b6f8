"""gf.cross_entropy as a citizen of PyTorch: refusals, registration, compilation, autocast, the module."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from loss_cases import BF16, FP32, IGNORED, class_weights, make_labels
from torch import library as torch_library

import gpt4v_fast as gf
from gpt4v_fast import backends, reference

OPS = torch.ops.gpt4v_fast

LOGITS, TARGET = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
REFUSED = {
    "logits-not-a-tensor": ({"logits": [[0.0]]}, TypeError, "logits: expected a torch.Tensor, got list"),
    "logits-fp64": ({"logits": LOGITS.double()}, TypeError, "logits: expected dtype .* got float64"),
    "logits-scalar": ({"logits": torch.tensor(0.0)}, ValueError, "logits: expected shape"),
    "no-class": ({"logits": torch.zeros(2, 3, 0)}, ValueError, r"V at least 1, got \(2, 3, 0\)"),
    "target-shape": ({"target": TARGET[:1]}, ValueError, r"target: expected shape \(2, 3\).* got \(1, 3\)"),
    "target-probabilities": ({"target": LOGITS}, TypeError, "target: .* class probabilities are not supported"),
    "target-bool": ({"target": TARGET.bool()}, TypeError, "target: expected an integer dtype"),
    "target-list": ({"target": [1, 2]}, TypeError, "target: expected a torch.Tensor"),
    "target-device": ({"target": TARGET.to("meta")}, ValueError, "target: expected the device cpu, got meta"),
    "weight-length": ({"weight": torch.ones(4)}, ValueError, r"weight: expected shape \(V,\) \(5,\), got \(4,\)"),
    "weight-integers": ({"weight": torch.ones(5).int()}, TypeError, "weight: expected dtype"),
    "weight-device": ({"weight": torch.ones(5, device="meta")}, ValueError, "weight: .* got meta"),
    "weight-gradient": ({"weight": torch.ones(5, requires_grad=True)}, ValueError, "weight: .* no gradient"),
    "reduction": ({"reduction": "average"}, ValueError, "reduction: expected one of mean, sum, none, got 'average'"),
    "label-smoothing": ({"label_smoothing": 1.5}, ValueError, r"label_smoothing: expected .* \[0, 1\], got 1.5"),
    "z-loss": ({"z_loss": math.inf}, ValueError, "z_loss: expected a finite number of 0 or more .*, got inf"),
    "softcap": (
        {"softcap": -1.0},
        ValueError,
        "softcap: expected None or a finite number > 0 that fp32 holds, got -1.0",
    ),
    "ignore-index": ({"ignore_index": None}, TypeError, "ignore_index: expected an int .*, got NoneType"),
}


@pytest.mark.parametrize("change, error, message", REFUSED.values(), ids=REFUSED.keys())
def test_refuses(change, error, message):
    arguments = {"logits": LOGITS, "target": TARGET, **change}
    with pytest.raises(error, match=message):
        gf.cross_entropy(**arguments)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("label", [5, -1, -101, 2**40])
def test_a_bad_label_is_named_with_its_place(label, backend):
    logits = torch.randn(2, 3, 5, requires_grad=True)
    target = torch.tensor([[0, 4, IGNORED], [1, 0, 0]])
    target[1, 1] = target[1, 2] = label
    with gf.force(backend=backend), pytest.raises(IndexError, match=rf"in \[0, 5\) .* got {label} at target\[1, 1\]"):
        gf.cross_entropy(logits, target)
    assert logits.grad is None


def test_explain_and_strict():
    logits, target = torch.randn(2, 5), torch.tensor([0, 1])
    choice = gf.explain(gf.cross_entropy, logits, target, reduction="sum")
    assert (choice.backend, choice.kernel) == ("cpu", "_C.cross_entropy")
    with gf.strict():
        gf.cross_entropy(logits, target)
    with pytest.raises(ValueError, match="reduction"):
        gf.explain(gf.cross_entropy, logits, target, reduction="average")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype, reduction, z_loss", [(FP32, "mean", 0.1), (BF16, "none", 0.0), (FP32, "sum", 0.1)])
def test_opcheck(dtype, reduction, z_loss, weighted):
    logits, target = torch.randn(6, 11, dtype=dtype, requires_grad=True), make_labels(6, 11, 0.3)
    weight = class_weights(11) if weighted else None
    options = {"weight": weight, "reduction": reduction, "label_smoothing": 0.1, "z_loss": z_loss, "softcap": 3.0}
    call = backends.call_of(gf.cross_entropy, logits, target, **options)
    torch_library.opcheck(OPS.cross_entropy.default, tuple(call))
    call = call._replace(logits=logits.detach())
    loss, lse, _, _, *saved = OPS.cross_entropy(*call)
    arguments = (torch.ones_like(loss), torch.ones_like(lse), *call, lse, *saved, True)
    torch_library.opcheck(OPS.cross_entropy_backward.default, arguments)


def test_gradcheck_of_the_oracle():
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, IGNORED, 5, 2])
    options = {"weight": class_weights(6).double(), "label_smoothing": 0.2, "z_loss": 0.1, "softcap": 3.0}

    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss, stats = reference.cross_entropy(x, target, reduction="none", return_stats=True, **options)
        return loss, stats.lse

    assert torch.autograd.gradcheck(function, logits)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_compiles_without_a_graph_break(reduction):
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0, "weight": class_weights(11)}

    def run(logits: torch.Tensor, target: torch.Tensor) -> Any:
        return gf.cross_entropy(logits, target, reduction=reduction, return_stats=True, **options)

    logits, target = torch.randn(6, 11, requires_grad=True), make_labels(6, 11, 0.3)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    (loss, stats), (eager, eager_stats) = compiled(logits, target), run(logits, target)
    assert torch.equal(loss, eager) and torch.equal(stats.argmax, eager_stats.argmax)
    gradients = [torch.autograd.grad(x.sum(), logits)[0] for x in (loss, eager)]
    assert torch.equal(*gradients)
    with pytest.raises(IndexError, match=r"got 11 at target\[2\]"):
        compiled(logits, torch.tensor([0, 0, 11, 0, 0, 0]))


def test_double_backward_is_refused():
    logits = torch.randn(3, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(gf.cross_entropy(logits, torch.tensor([0, 1, 2])), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient.sum().backward()


def test_autocast_changes_nothing():
    logits, target = torch.randn(3, 5), torch.tensor([0, 1, 2])
    with torch.autocast("cpu", dtype=BF16):
        loss = gf.cross_entropy(logits, target)
    assert loss.dtype == FP32 and torch.equal(loss, gf.cross_entropy(logits, target))


def test_module():
    logits, target = torch.randn(4, 6), make_labels(4, 6, 0.3)
    module = gf.nn.CrossEntropyLoss(class_weights(6), label_smoothing=0.1, z_loss=0.01, softcap=5.0)
    want = gf.cross_entropy(logits, target, weight=class_weights(6), label_smoothing=0.1, z_loss=0.01, softcap=5.0)
    assert torch.equal(module(logits, target), want)
    assert list(module.state_dict()) == ["weight"] and "z_loss=0.01" in repr(module)
    assert torch.equal(gf.nn.CrossEntropyLoss()(logits, target), gf.cross_entropy(logits, target))
