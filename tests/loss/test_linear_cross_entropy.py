"""gf.linear_cross_entropy on the CPU: its numbers against the fp64 oracle, its memory, and its refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from closeness import compare
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import (
    BF16,
    EVERYTHING,
    FP16,
    FP32,
    IGNORED,
    ISAS,
    LINEAR_ARGUMENTS,
    at_thread_counts,
    class_weights,
    make_labels,
    measured_memory,
    memory_is_measured,
    same_bits,
)
from loss_cases import LINEAR_CASES as CASES
from loss_cases import LinearCase as Case
from loss_cases import poisoned as poisoned  # a fixture

import gpt4v_fast as gf
from gpt4v_fast import reference
from gpt4v_fast._native import _C
from gpt4v_fast.ops.loss.linear_cross_entropy import LinearCrossEntropyCall

OPS = torch.ops.gpt4v_fast


# Larger than one chunk of tokens, classes or depth, or of fp32 sums of grad_hidden (linear_cross_entropy_backward.h).
LARGE = [
    Case("chunks", 1100, 1100, 24, bias=FP32, label_smoothing=0.1),
    Case("chunks-bf16", 1100, 1100, 24, BF16),
    Case("deep", 60, 300, 5000),
    Case("deep-bf16", 60, 300, 5000, BF16, bias=BF16),
    Case("groups-of-tokens-bf16", 1150, 70, 4096, BF16, ignored=0.0),
    # Where there are tiles, rows of grad_weight of over 16 MiB go past the caches: whole lines of it (loss_stream.h),
    # of one chunk of tokens or the last of several, or none.
    Case("large-rows-bf16", 100, 4100, 2080, BF16, bias=BF16),
    Case("large-rows-chunks-bf16", 1300, 2048, 4096, BF16, ignored=0.0),
    Case("large-rows-half-lines-bf16", 70, 8200, 1040, BF16),
]


def as_torch(hidden: torch.Tensor, weight: torch.Tensor, *rest: Any, bias: Any = None, **options: Any) -> Any:
    """The oracle in fp32, whatever the dtype of the tensors: what the fused loss promises at the least."""
    bias = None if bias is None else bias.float()
    return reference.linear_cross_entropy(hidden.float(), weight.float(), *rest, bias=bias, **options)


def check(case: Case) -> None:
    target, options, tensors = case.target(), case.options(), case.tensors()

    def run(function: Any) -> Any:
        def outputs(**tensors: torch.Tensor) -> Any:
            loss, stats = function(target=target, **tensors, **options, return_stats=True)
            return loss, stats.lse, stats.z_loss

        return outputs

    def native(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, **options: Any) -> Any:
        return as_torch(hidden, weight, target, **options)

    compare(
        run(gf.linear_cross_entropy),
        run(reference.linear_cross_entropy),
        tensors,
        gradients=tuple(tensors),
        native=run(native),
        output_names=("loss", "lse", "z_loss"),
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_outputs_and_gradients(case, isa, poisoned):
    with gf.force(isa=isa):
        check(case)


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_more_than_one_chunk(case, poisoned):
    check(case)


def test_the_oracle_serves_every_argument_too():
    with gf.force(backend="reference"):
        check(Case("", 12, 30, 9, bias=FP32, **EVERYTHING))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    N=st.integers(0, 70),
    V=st.integers(1, 600),
    E=st.integers(1, 150),
    **LINEAR_ARGUMENTS,
)
def test_any_arguments(**arguments):
    check(Case("drawn", **arguments))


@pytest.mark.parametrize("shift", [0, 1, 3, 9])
def test_shift(shift):
    """Position t predicts label t + shift: the numbers of slicing hidden and target by hand."""
    hidden, weight = torch.randn(2, 3, 9, 8), torch.randn(20, 8)
    target = make_labels(54, 20, 0.3).reshape(2, 3, 9)
    cut, labels = hidden[..., : 9 - shift, :], target[..., shift:]
    hidden.requires_grad_(), weight.requires_grad_()
    for reduction in ("sum", "none"):
        loss, stats = gf.linear_cross_entropy(
            hidden, weight, target, shift=shift, reduction=reduction, z_loss=0.1, return_stats=True
        )
        want, want_stats = gf.linear_cross_entropy(
            cut.contiguous(), weight, labels.contiguous(), reduction=reduction, z_loss=0.1, return_stats=True
        )
        if reduction == "sum":
            torch.testing.assert_close(loss, want)
            continue
        for got, expected, filler in [(loss, want, 0), *zip(stats, want_stats, (0, -1, 0, 0), strict=True)]:
            assert got.shape == target.shape
            assert torch.equal(got[..., : 9 - shift], expected) and (got[..., 9 - shift :] == filler).all()
        gradients = [torch.autograd.grad(x.sum(), weight, retain_graph=True)[0] for x in (loss, want)]
        torch.testing.assert_close(*gradients)
    oracle = reference.linear_cross_entropy(hidden, weight, target, shift=shift, reduction="none", z_loss=0.1)
    torch.testing.assert_close(loss, oracle)


def test_the_numbers_of_torch():
    hidden, weight, bias = torch.randn(30, 16), torch.randn(50, 16), torch.randn(50)
    target = make_labels(30, 50, 0.3)
    for reduction in ("mean", "sum", "none"):
        for options in ({}, {"label_smoothing": 0.1}):
            want = F.linear_cross_entropy(
                hidden, weight, target, linear_bias=bias, weight=class_weights(50), ignore_index=IGNORED,
                reduction=reduction, **options,
            )  # fmt: skip
            got = gf.linear_cross_entropy(
                hidden, weight, target, bias=bias, class_weight=class_weights(50), reduction=reduction, **options
            )
            torch.testing.assert_close(got, want, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
def test_ignored_tokens_are_dropped_before_any_product(isa):
    """NaN in their hidden states reaches nothing, and their gradients are zero."""
    case = Case("", 100, 70, 30, bias=FP32, ignored=0.5, reduction="mean")
    tensors, target = case.tensors(), case.target()
    tensors["hidden"][target == IGNORED] = math.nan
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    with gf.force(isa=isa):
        loss = gf.linear_cross_entropy(target=target, **leaves)
        grad_hidden, grad_weight, grad_bias = torch.autograd.grad(loss, leaves.values())
    assert loss.isfinite() and grad_weight.isfinite().all() and grad_bias.isfinite().all()
    assert (grad_hidden[target == IGNORED] == 0).all() and grad_hidden.isfinite().all()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("wanted", [("hidden",), ("weight",), ("bias",), ("hidden", "bias")], ids=str)
def test_only_the_gradients_that_are_needed(wanted, dtype):
    """Each alone has the bits that it has among the others."""
    case = Case("", 60, 90, 40, dtype, bias=FP32)
    gradients = []
    for names in (wanted, ("hidden", "weight", "bias")):
        tensors = {name: x.requires_grad_(name in names) for name, x in case.tensors().items()}
        gf.linear_cross_entropy(target=case.target(), **tensors).backward()
        gradients.append({name: x.grad for name, x in tensors.items()})
    some, everything = gradients
    for name, gradient in some.items():
        assert gradient is None if name not in wanted else torch.equal(gradient, everything[name])


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_any_strides(dtype):
    tensors = Case("", 24, 50, 30, dtype).tensors()
    target = make_labels(24, 50, 0.2)
    want = gf.linear_cross_entropy(target=target, **tensors, reduction="none")
    hidden, weight = tensors["hidden"], tensors["weight"]
    room = torch.full((5000,), math.nan, dtype=dtype)
    columns_first = {"hidden": hidden.t().contiguous().t(), "weight": weight.t().contiguous().t()}
    spaced = {
        "hidden": room.as_strided((24, 30), (67, 2), 3).copy_(hidden),
        "weight": room.as_strided((50, 30), (31, 1), 3001).copy_(weight),
    }
    for laid_out in (columns_first, spaced):
        assert torch.equal(gf.linear_cross_entropy(target=target, **laid_out, reduction="none"), want)
        gradients = []
        for chosen in (laid_out, tensors):
            leaves = [x.detach().requires_grad_() for x in chosen.values()]
            gradients.append(torch.autograd.grad(gf.linear_cross_entropy(*leaves, target), leaves))
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_gradients_into_any_strides():
    """The kernel itself writes gradients of any layout, fp32 too, and no element beside them."""
    N, V, E = 60, 70, 33
    for dtype in (FP32, BF16):
        tensors = Case("", N, V, E, dtype).tensors()
        hidden, weight, target = tensors["hidden"], tensors["weight"], make_labels(N, V, 0.3)
        nll, lse, low, argmax = torch.empty(N), torch.empty(N), torch.empty(N), torch.empty(N, dtype=torch.int64)
        call = LinearCrossEntropyCall(hidden, weight, None, target)
        _C.linear_cross_entropy_forward(call, nll, lse, low, argmax, None, 2)
        results = []
        for spaced in (False, True):
            rooms = [torch.full((5 * rows * E,), 7.0, dtype=dtype) for rows in (N, V)]
            strides = (2 * E + 1, 2) if spaced else (E, 1)
            views = [room.as_strided((rows, E), strides, 3) for room, rows in zip(rooms, (N, V), strict=True)]
            further = (lse, low, None, torch.ones(N), torch.zeros(N), *views, None)
            _C.linear_cross_entropy_backward(call, *further, 2)
            results.append([x.clone() for x in views])
            for room, x in zip(rooms, views, strict=True):
                x.fill_(7.0)
                assert (room == 7.0).all()
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_same_bits_at_any_number_of_threads(dtype, isa):
    case = Case("", 130, 1200, 70, dtype, bias=FP32, **EVERYTHING)
    tensors, target, options = case.tensors(), case.target(), case.options()
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}

    def run() -> list[torch.Tensor]:
        loss = gf.linear_cross_entropy(target=target, **leaves, **options)
        return [loss, *torch.autograd.grad(loss.sum(), leaves.values())]

    with gf.force(isa=isa):
        first, *others = at_thread_counts(run)
    for other in others:
        assert all(same_bits(a, b) for a, b in zip(first, other, strict=True))


def test_same_bits_again_of_the_gradient_of_weight_alone():
    """No thread writes the gradient of logits that another still multiplies."""
    case = Case("", 300, 20_000, 16, BF16)
    (hidden, weight), target = case.tensors().values(), case.target()
    weight.requires_grad_()

    def run() -> list[torch.Tensor]:
        loss = gf.linear_cross_entropy(hidden, weight, target, reduction="sum")
        return [x for _ in range(30) for x in torch.autograd.grad(loss, weight, retain_graph=True)]

    runs = [gradient for gradients in at_thread_counts(run) for gradient in gradients]
    assert all(same_bits(gradient, runs[0]) for gradient in runs)


def test_accumulates_into_existing_gradients():
    case = Case("", 20, 30, 10, bias=FP32)
    leaves = {name: x.requires_grad_() for name, x in case.tensors().items()}
    for _ in range(2):
        gf.linear_cross_entropy(target=case.target(), **leaves).backward()
    for name, leaf in leaves.items():
        once = torch.autograd.grad(gf.linear_cross_entropy(target=case.target(), **leaves), leaf)[0]
        assert torch.equal(leaf.grad, once + once), name


def test_a_tied_embedding_gets_both_gradients():
    table, ids = torch.randn(30, 12, requires_grad=True), torch.randint(0, 30, (2, 9))
    results = [
        torch.autograd.grad(function(F.embedding(ids, table), table, ids, shift=1), table)[0]
        for function in (gf.linear_cross_entropy, reference.linear_cross_entropy)
    ]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_nothing_counted(z_loss):
    for N in (0, 1, 50):
        hidden, weight = torch.randn(N, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
        for reduction in ("mean", "sum"):
            target = torch.full((N,), IGNORED)
            loss = gf.linear_cross_entropy(hidden, weight, target, reduction=reduction, z_loss=z_loss)
            assert loss.isnan() if reduction == "mean" else loss == 0
            assert all((x == 0).all() for x in torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize("isa", ISAS)
def test_stats(isa):
    hidden = torch.eye(40, 64)
    weight = torch.randn(900, 64).bfloat16().float()
    weight[[130, 700], :40] = 9.0  # the lowest index of equals, in ranges apart
    weight[699, 3] = 10.0
    target = make_labels(40, 900, 0.3)
    target[:4] = torch.tensor([130, 700, IGNORED, 699])
    with gf.force(isa=isa):
        _, stats = gf.linear_cross_entropy(hidden, weight, target, softcap=1.0, return_stats=True)
    counted = target != IGNORED
    want = torch.where(counted, 130, -1)
    want[3] = 699
    assert torch.equal(stats.argmax, want) and torch.equal(stats.correct, counted & (want == target))
    assert (stats.lse[~counted] == 0).all()


@pytest.mark.parametrize("isa", ISAS)
def test_a_bad_label_that_reaches_the_kernel_is_not_followed(isa):
    hidden, weight = torch.randn(4, 8), torch.randn(9, 8)
    target = torch.tensor([1, 2**62, -7, 4])
    nll, lse, low, argmax = torch.empty(4), torch.empty(4), torch.empty(4), torch.empty(4, dtype=torch.int64)
    grad_hidden, grad_weight = torch.empty(4, 8), torch.empty(9, 8)
    call = LinearCrossEntropyCall(hidden, weight, None, target)
    with gf.force(isa=isa):
        _C.linear_cross_entropy_forward(call, nll, lse, low, argmax, None, 1)
        further = (lse, low, None, torch.ones(4), torch.zeros(4), grad_hidden, grad_weight, None)
        _C.linear_cross_entropy_backward(call, *further, 1)
    assert nll[1:3].isnan().all() and lse[1:3].isnan().all() and grad_hidden[1:3].isnan().all()
    assert nll[[0, 3]].isfinite().all() and grad_hidden[[0, 3]].isfinite().all()


MEMORY = """
most, _, _ = peak(lambda: gf.linear_cross_entropy(hidden, weight, target, label_smoothing=0.1).backward())
print(most - gradients)
"""


@memory_is_measured
@pytest.mark.parametrize(
    "dtype, N, V, E", [("float32", 1536, 40_000, 48), ("bfloat16", 4200, 4500, 1024), ("bfloat16", 3000, 8000, 4096)]
)
def test_extra_memory_is_bounded(dtype, N, V, E):
    """Forward and backward, as the process sees it: at most 64 MiB beside the gradients.

    The second case has more fp32 sums of grad_hidden than are kept at a time.
    """
    (extra,) = measured_memory(MEMORY, dtype, N, V, E)
    assert extra <= 64 << 20 < 4 * N * V, f"{extra / 2**20:.1f} MiB beside the gradients"
