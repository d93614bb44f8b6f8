"""Both losses at the ends of what floats hold: one answer on every instruction set, in shards and in Triton."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import vocab_parallel_cases as cases
from loss_cases import ISAS
from process_group import results_of
from triton_interpreter import call, launch

import gpt4v_fast as gf

INF = math.inf
by_isa = pytest.mark.parametrize("isa", ISAS)
LOSSES = ("cross_entropy", "linear_cross_entropy")
by_loss = pytest.mark.parametrize("op", LOSSES)


def loss_of_bias(op: str, row: torch.Tensor, target: torch.Tensor, **options):
    """The op on equal rows of logits, (V,): as they are, or as the bias of hidden states of zeros."""
    N, V = target.numel(), row.numel()
    if op == "cross_entropy":
        return gf.cross_entropy(row.expand(N, V), target, **options)
    return gf.linear_cross_entropy(torch.zeros(N, 3), torch.zeros(V, 3), target, bias=row, **options)


@by_isa
@by_loss
@pytest.mark.parametrize("softcap", [50.0, 89.0, 1000.0, 1e30])
@pytest.mark.parametrize("V", [8, 5000])
def test_softcap_with_all_logits_far_below_zero(op, isa, softcap, V):
    """An empty sum stays empty, however far below zero the first logits take its origin."""
    row, target = torch.full((V,), -3e4).add(torch.randn(V)), torch.tensor([0, V - 1])
    row.requires_grad_()
    with gf.force(isa=isa):
        loss, stats = loss_of_bias(op, row, target, softcap=softcap, reduction="none", return_stats=True)
        (gradient,) = torch.autograd.grad(loss.sum(), row)
    exact = row.detach().double().requires_grad_()
    capped = softcap * torch.tanh(exact / softcap)
    want = F.cross_entropy(capped.expand(2, V), target, reduction="none")
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=4e-3 if softcap > 100 else 1e-5)
    torch.testing.assert_close(stats.lse.double(), capped.logsumexp(0).expand(2), rtol=1e-6, atol=0)
    (want_gradient,) = torch.autograd.grad(want.sum(), exact)
    torch.testing.assert_close(gradient.double(), want_gradient, rtol=2e-2, atol=1e-6)


@by_isa
@by_loss
@pytest.mark.parametrize("V", [6, 2100])
@pytest.mark.parametrize("label", [3, 4])
def test_an_infinite_logit_is_no_loss(op, isa, V, label):
    """As F.cross_entropy, whichever column it is in: loss and gradient are NaN; lse is infinite, as torch.logsumexp."""
    row, target = torch.randn(V), torch.tensor([label])
    row[3] = INF
    row.requires_grad_()
    with gf.force(isa=isa):
        loss, stats = loss_of_bias(op, row, target, reduction="none", return_stats=True)
        (gradient,) = torch.autograd.grad(loss.sum(), row)
        capped = loss_of_bias(op, row.detach(), target, softcap=5.0)
    want = F.cross_entropy(row[None], target)
    assert want.isnan() and torch.autograd.grad(want, row)[0].isnan().all()
    assert loss.isnan() and stats.lse == INF and stats.argmax == 3 and gradient.isnan().all()
    torch.testing.assert_close(capped, F.cross_entropy(5 * torch.tanh(row.detach()[None] / 5), target))


@by_isa
@pytest.mark.parametrize("size", [1e4, 1e8, 1e15, 1e20, -1e20, 3e38])
@pytest.mark.parametrize("V", [7, 1031])
def test_equal_logits_of_any_size_share_the_probability(isa, size, V):
    """lse is kept in two parts, since log(V) is below the last digit of their sum, in fp64 too."""
    logits, target = torch.full((2, V), size), torch.tensor([0, 5])
    logits.requires_grad_()
    with gf.force(isa=isa):
        loss = gf.cross_entropy(logits, target, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, torch.tensor(2 * math.log(V)), rtol=1e-6, atol=0)
    want = torch.full((2, V), 1 / V) - F.one_hot(target, V)
    torch.testing.assert_close(gradient, want, rtol=1e-5, atol=0)
    hidden, weight = torch.ones(2, 4, requires_grad=True), torch.full((V, 4), size / 4)
    bias = torch.zeros(V, requires_grad=True)
    with gf.force(isa=isa):
        loss = gf.linear_cross_entropy(hidden, weight, target, bias=bias, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, bias)
    torch.testing.assert_close(loss, torch.tensor(2 * math.log(V)), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, want.sum(0), rtol=1e-5, atol=0)


def test_in_shards():
    """An infinity in one shard and logits of 1e15 in both, as in one process."""
    logits = torch.randn(3, 14)
    logits[0, 3] = INF
    logits[1] = 1e15
    target, options = torch.tensor([12, 12, 2]), {"reduction": "none"}
    results = results_of(2, cases.forward, "cross_entropy", {"logits": logits}, (7, 7), None, target, options)
    loss, lse = results[0][:2]
    assert loss[0].isnan() and lse[0] == INF
    torch.testing.assert_close(loss[1], torch.tensor(math.log(14)), rtol=1e-6, atol=0)
    gradients = results_of(2, cases.backward, [torch.ones(3), torch.zeros(3)])
    gradient = torch.cat([x["logits"] for x in gradients], dim=1)
    assert gradient[0].isnan().all()
    torch.testing.assert_close(gradient[1], 1 / 14 - F.one_hot(target[1], 14).float(), rtol=1e-5, atol=0)
    assert gradient[2].isfinite().all()


def test_in_triton():
    pytest.importorskip("triton", reason="the Triton kernels need triton")
    logits, target = torch.randn(2, 40), torch.tensor([4, 4])
    logits[0, 3] = INF
    options = {"ignore_index": -100, "label_smoothing": 0.0}
    nll, lse, _ = call(launch, "loss.cross_entropy", "cross_entropy_forward", logits, target, **options)
    assert nll[0].isnan() and lse[0] == INF and nll[1].isfinite()
    slopes = (torch.ones(2), torch.zeros(2))
    gradient = call(launch, "loss.cross_entropy", "cross_entropy_backward", *slopes, logits, target, lse, **options)
    assert gradient[0].isnan().all() and gradient[1].isfinite().all()
    capped, *_ = call(launch, "loss.cross_entropy", "cross_entropy_forward", logits, target, softcap=5.0, **options)
    assert capped.isfinite().all()
