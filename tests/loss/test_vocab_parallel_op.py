"""The split losses as ops: what goes over the wire, DTensors, compilation, transforms, registration."""

from __future__ import annotations

import pytest
import torch
import vocab_parallel_cases as cases
from loss_cases import BF16, FP32, class_weights, make_labels
from process_group import call, results_of
from vocab_parallel_cases import both_sizes

import gpt4v_fast as gf


@both_sizes
def test_two_all_reduces_of_numbers_per_token(ranks):
    N, V, E = 50, 64, 24
    target = make_labels(N, V, 0.3)
    linear = {"hidden": torch.randn(N, E), "weight": torch.randn(V, E), "target": target}
    forward = [("MAX", N + 5), ("SUM", 2 * N + 1)]
    for gradients, backward in ((("hidden", "weight"), [("SUM", N * E)]), (("weight",), [])):
        seen = results_of(ranks, cases.collectives, "linear_cross_entropy", linear, gradients, {})
        assert seen == [forward + backward] * ranks
    logits = {"logits": torch.randn(N, V), "target": target}
    assert results_of(ranks, cases.collectives, "cross_entropy", logits, ("logits",), {}) == [forward] * ranks


def test_nothing_more_for_statistics_than_a_number_per_token():
    N = 20
    logits = {"logits": torch.randn(N, 8), "target": make_labels(N, 8), "weight": class_weights(8)}
    options = {"return_stats": True, "label_smoothing": 0.1}
    seen = results_of(2, cases.collectives, "cross_entropy", logits, ("logits",), options)
    assert seen == [[("MAX", 2 * N + 5), ("SUM", 3 * N + 1)]] * 2


@both_sizes
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_partial_gradients_of_hidden(dtype, ranks):
    hidden, weight, target = torch.randn(12, 8).to(dtype), torch.randn(16, 8).to(dtype), make_labels(12, 16, 0.2)
    results = results_of(ranks, cases.partial_gradients, hidden, weight, target)
    total = torch.stack([partial.double() for partial, _ in results]).sum(dim=0)
    for partial, whole in results:
        assert partial.dtype == whole.dtype == dtype and not torch.equal(partial, whole)
        torch.testing.assert_close(whole.double(), total, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


# DTensors.


@both_sizes
@pytest.mark.parametrize("placement", ["plain", "replicate", "shard"])
@pytest.mark.parametrize("V", [16, 13, 5])
def test_dtensor_weight(V, placement, ranks):
    hidden, weight, bias = torch.randn(8, 12), torch.randn(V, 12), torch.randn(V)
    target = make_labels(8, V, 0.2)
    results = results_of(ranks, cases.with_dtensors, hidden, weight, bias, target, placement)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    want = gf.linear_cross_entropy(
        hidden, weight, target, bias=bias, class_weight=torch.linspace(0.5, 1.5, V), label_smoothing=0.1
    )
    exact = torch.autograd.grad(want, leaves)
    hidden_placement = {"plain": "plain", "replicate": "(Replicate(),)", "shard": "(Shard(dim=0),)"}[placement]
    for loss, gradients, placements in results:
        torch.testing.assert_close(loss, want.detach(), rtol=2e-6, atol=0)
        for got, wanted in zip(gradients, exact, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)
        assert placements == [hidden_placement, "(Shard(dim=0),)", "(Shard(dim=0),)"]


@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "sequence-parallel"])
def test_a_module_after_parallelize_module(sharded):
    for one, parallel, compiled in results_of(2, cases.parallel_module, torch.randn(6, 8), make_labels(6, 14), sharded):
        for want, got, fast in zip(one, parallel, compiled, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
            assert torch.equal(got, fast)


@both_sizes
def test_dtensor_logits(ranks):
    logits, target = torch.randn(2, 5, 13), make_labels(10, 13, 0.2).reshape(2, 5)
    leaf = logits.clone().requires_grad_()
    want = gf.cross_entropy(leaf, target, z_loss=0.1)
    (exact,) = torch.autograd.grad(want, leaf)
    for loss, gradient in results_of(ranks, cases.logits_as_dtensor, logits, target):
        torch.testing.assert_close(loss, want.detach(), rtol=2e-6, atol=0)
        torch.testing.assert_close(gradient, exact, rtol=1e-5, atol=1e-7)


def test_a_dtensor_of_another_placement_is_refused():
    for error in call(2, cases.wrong_dtensor, torch.randn(6, 8)):
        assert isinstance(error, ValueError) and "weight: expected a DTensor of one Shard(0) placement" in str(error)


# Compilation, registration.


def test_compiles_without_a_graph_break_and_once_for_every_length():
    for compilations, difference in results_of(2, cases.compiled, [5, 6, 9, 14]):
        assert compilations == 2 and difference == 0


@both_sizes
def test_autocast_and_torch_func(ranks):
    hidden, weight, target = torch.randn(12, 8), torch.randn(16, 8), make_labels(12, 16)
    results = results_of(ranks, cases.under_autocast_and_transforms, hidden, weight, target)
    for i, dtype in enumerate((FP32, BF16)):
        leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
        loss = gf.linear_cross_entropy(leaves[0].to(dtype), leaves[1].to(dtype), target)
        wanted = torch.autograd.grad(loss, leaves)
        for how in (2 * i, 2 * i + 1):
            got = results[0][how][0], torch.cat([result[how][1] for result in results])
            for x, want in zip(got, wanted, strict=True):
                assert x.dtype == FP32
                torch.testing.assert_close(x, want, rtol=0, atol=4 * torch.finfo(dtype).eps * want.abs().max().item())


def test_opcheck():
    results_of(2, cases.registered)
