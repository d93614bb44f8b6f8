"""gf.linear_cross_entropy with all gradients computed in the forward pass, some tokens at a time."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from closeness import compare
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import (
    BF16,
    BF16_ISAS,
    EVERYTHING,
    FP16,
    FP32,
    IGNORED,
    ISAS,
    at_thread_counts,
    measured_memory,
    memory_is_measured,
    same_bits,
)
from loss_cases import LinearCase as Case
from loss_cases import poisoned as poisoned  # a fixture
from random_rounding import BITS
from test_linear_cross_entropy import as_torch

import gpt4v_fast as gf
from gpt4v_fast import backends, reference
from gpt4v_fast._native import _C
from gpt4v_fast.ops.loss import cpu
from gpt4v_fast.ops.loss.linear_cross_entropy import LinearCrossEntropyCall

# 4.3 MB of it are scratch. Of most cases the rest holds the logits of some 100 tokens, which make a part; of the widest
# it holds too few for that, and some logits are computed twice.
ROOM = 6_000_000

CASES = [
    Case("odd", 130, 301, 34, bias=FP32, reduction="sum"),
    Case("one-token", 1, 150, 16, ignored=0.0, reduction="sum"),
    Case("parts", 400, 6001, 17, reduction="mean"),
    Case("parts-of-a-vector", 70, 80_000, 3, reduction="sum", ignored=0.4),
    Case("most-ignored", 700, 3001, 20, ignored=0.9, reduction="mean"),
    Case("all-ignored", 70, 301, 20, ignored=1.0, bias=FP32, reduction="sum"),
    Case("bf16-bias", 130, 3001, 20, bias=BF16, z_loss=1e-2, reduction="mean"),
    Case("fp16-bias", 130, 3001, 20, bias=FP16, label_smoothing=0.1, reduction="sum"),
    Case("weighted-mean", 300, 3001, 20, weighted=True, reduction="mean"),
    Case("everything-mean", 300, 3001, 20, bias=FP32, **EVERYTHING, reduction="mean"),
    Case("everything-sum", 300, 3001, 20, bias=FP32, **EVERYTHING, reduction="sum"),
    Case("peaked", 300, 3001, 64, planted=True, spread=1.0, reduction="sum"),
    Case("plus-minus-1e4", 300, 3001, 16, spread=1e4, bias=FP32, reduction="sum"),
    Case("flat", 300, 3001, 16, spread=0.0, reduction="mean"),
    Case("kept-in-gradient", 200, 3001, 210, reduction="mean"),
    Case("some-kept-in-gradient", 200, 6001, 70, reduction="sum"),
    Case("chunks-kept-in-gradient", 140, 97, 4111, reduction="sum"),
]

# Sums of 16-bit gradients stand in fp32, half of each in the gradient. Where products are not of bf16, a copy of some
# rows of the weight takes 8 MiB of the room.
HALF_ROOMS = {"parts": 6_000_000, "parts-and-copied-rows": 15_000_000, "computed-twice": 4_600_000}
HALF_CASES = [
    Case("bf16", 500, 3001, 17, dtype=BF16, reduction="mean"),
    Case("bf16-even", 500, 3001, 18, dtype=BF16, bias=BF16, ignored=0.0, reduction="sum"),
    Case("bf16-kept-in-gradient", 250, 3001, 400, dtype=BF16, ignored=0.0, reduction="sum"),
    Case("bf16-chunks-kept-in-gradient", 140, 97, 8200, dtype=BF16, reduction="sum"),
    Case("bf16-one-token", 1, 150, 16, dtype=BF16, ignored=0.0, reduction="sum"),
    Case("bf16-all-ignored", 70, 301, 20, dtype=BF16, ignored=1.0, bias=FP32, reduction="sum"),
    Case("bf16-everything", 500, 3001, 20, dtype=BF16, bias=FP32, **EVERYTHING, reduction="mean"),
    Case("bf16-peaked", 500, 3001, 64, dtype=BF16, planted=True, spread=1.0, reduction="sum"),
    Case("fp16", 500, 3001, 17, dtype=FP16, reduction="mean"),
    Case("fp16-everything", 500, 3001, 20, dtype=FP16, bias=FP16, **EVERYTHING, reduction="sum"),
]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Small problems take this way too, in several parts; the tokens of each computation."""
    monkeypatch.setattr(cpu, "EXTRA_BYTES", ROOM)
    monkeypatch.setattr(cpu, "KEPT_BY_OP", -1)
    found: list[int] = []
    compute = cpu.LinearWithGradients._compute

    def counting(backend: Any, call: LinearCrossEntropyCall, wanted: Any) -> Any:
        found.append(len(call.hidden))
        return compute(backend, call, wanted)

    monkeypatch.setattr(cpu.LinearWithGradients, "_compute", counting)
    yield found


def check(case: Case, factor: float = 1.0) -> None:
    tensors, target, options = case.tensors(), case.target(), case.options()

    def run(function: Any) -> Any:
        return lambda **tensors: (function(target=target, **tensors, **options) * factor,)

    def native(**tensors: Any) -> Any:
        return (as_torch(target=target, **tensors, **options) * factor,)

    of_op, of_oracle = run(gf.linear_cross_entropy), run(reference.linear_cross_entropy)
    # Where there are products of bf16, the gradient of logits is rounded for them.
    bits = BITS[BF16 if case.dtype == BF16 and _C.isa() in BF16_ISAS else FP32]
    compare(
        of_op, of_oracle, tensors,
        gradients=tuple(tensors), native=native, output_names=("loss",), backward_operands=bits,
    )  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loss_and_gradients(case, isa, calls, poisoned):
    with gf.force(isa=isa):
        check(case)
    assert calls


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("room", HALF_ROOMS)
@pytest.mark.parametrize("case", HALF_CASES, ids=lambda case: case.name)
def test_16_bits(case, room, isa, calls, poisoned, monkeypatch):
    monkeypatch.setattr(cpu, "EXTRA_BYTES", HALF_ROOMS[room])
    with gf.force(isa=isa):
        check(case)
    assert calls


@pytest.mark.parametrize("room", [52_000_000, 60 << 20], ids=["two-parts", "one-part"])
def test_large_rows(room, calls, poisoned, monkeypatch):
    """Rows of grad_weight of over 16 MiB, which go past the caches where there are tiles, in the last part."""
    monkeypatch.setattr(cpu, "EXTRA_BYTES", room)
    check(Case("", 2600, 8000, 1056, BF16, ignored=0.0, reduction="mean"))
    assert calls


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    room=st.sampled_from([ROOM, *HALF_ROOMS.values()]),
    dtype=st.sampled_from([FP32, BF16, FP16]),
    N=st.integers(1, 300),
    V=st.integers(1, 6000),
    E=st.integers(1, 70),
    spread=st.sampled_from([0.0, 1.0, 8.0]),
    planted=st.booleans(),
    bias=st.sampled_from([None, FP32, BF16, FP16]),
    ignored=st.sampled_from([0.0, 0.5, 0.9]),
    ignore_index=st.sampled_from([IGNORED, 0, -1]),
    weighted=st.booleans(),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    z_loss=st.sampled_from([0.0, 1e-3]),
    softcap=st.sampled_from([None, 2.0, 50.0]),
    factor=st.sampled_from([1.0, 0.25, -3.0]),
)
def test_any_arguments(room, factor, **arguments):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("EXTRA_BYTES", room), ("KEPT_BY_OP", -1)):
            patch.setattr(cpu, name, value)
        check(Case("drawn", **arguments, reduction="sum"), factor)


@pytest.mark.parametrize("factor", [0.25, -3.0, 1e-3, 0.0])
def test_scaled_by_what_arrives(factor, calls):
    case = Case("", 300, 3001, 20, bias=BF16, **EVERYTHING, reduction="mean")
    check(case, factor)
    assert len(calls) == 1


def leaves_of(case: Case) -> dict[str, torch.Tensor]:
    return {name: x.requires_grad_() for name, x in case.tensors().items()}


@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias"])
def test_only_the_gradients_that_are_wanted(wanted, calls):
    case = Case("", 300, 3001, 20, bias=FP32, reduction="sum")
    all_of_them, one = leaves_of(case), case.tensors()
    one[wanted].requires_grad_()
    want = torch.autograd.grad(gf.linear_cross_entropy(target=case.target(), **all_of_them), all_of_them[wanted])
    found = torch.autograd.grad(gf.linear_cross_entropy(target=case.target(), **one), one[wanted])
    assert torch.equal(found[0], want[0]) and len(calls) == 2


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_same_bits_at_any_number_of_threads_and_again(dtype, calls):
    case = Case("", 500, 3001, 17, dtype, bias=FP32, label_smoothing=0.1, reduction="mean")
    leaves = leaves_of(case)

    def run() -> list[torch.Tensor]:
        loss = gf.linear_cross_entropy(target=case.target(), **leaves)
        first = torch.autograd.grad(loss, leaves.values(), retain_graph=True)
        again = torch.autograd.grad(loss, leaves.values())
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        return [loss.detach(), *first]

    first, *others = at_thread_counts(run)
    assert len(calls) == 2 * (1 + len(others))
    for other in others:
        assert all(same_bits(a, b) for a, b in zip(first, other, strict=True))


def test_a_loss_of_the_statistics_takes_the_other_way(calls):
    case = Case("", 300, 3001, 20, z_loss=0.01, reduction="mean")

    def gradients(function: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = {name: x.to(dtype).requires_grad_() for name, x in case.tensors().items()}
        loss, stats = function(target=case.target(), **leaves, **case.options(), return_stats=True)
        return list(torch.autograd.grad(loss + stats.lse[::2].sum(), leaves.values()))

    found, want = gradients(gf.linear_cross_entropy, FP32), gradients(reference.linear_cross_entropy, torch.float64)
    assert calls == [300]
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


def test_accumulates_into_an_existing_gradient(calls):
    case = Case("", 300, 3001, 20, bias=FP32, reduction="mean")
    leaves = leaves_of(case)
    for _ in range(2):
        gf.linear_cross_entropy(target=case.target(), **leaves).backward()
    twice = [x.grad for x in leaves.values()]
    once = torch.autograd.grad(gf.linear_cross_entropy(target=case.target(), **leaves), leaves.values())
    assert all(torch.equal(a, 2 * b) for a, b in zip(twice, once, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_shift(reduction, calls):
    hidden, weight = torch.randn(3, 50, 8, requires_grad=True), torch.randn(2000, 8, requires_grad=True)
    target = torch.randint(0, 2000, (3, 50))
    loss = gf.linear_cross_entropy(hidden, weight, target, shift=1, reduction=reduction)
    want = gf.linear_cross_entropy(hidden[:, :-1].contiguous(), weight, target[:, 1:].contiguous(), reduction=reduction)
    pairs = zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (loss, want)), strict=True)
    assert loss == want and all(torch.equal(a, b) for a, b in pairs) and len(calls) == 2


@pytest.mark.parametrize("layout", ["columns-first", "every-other", "expanded"])
def test_any_strides(layout, calls):
    def lay_out(x: torch.Tensor) -> torch.Tensor:
        if layout == "columns-first":
            return x.t().contiguous().t()
        if layout == "every-other":
            return x.repeat_interleave(2, dim=1)[:, ::2]
        return x[:1].expand(x.shape)

    case = Case("", 100, 3001, 20, reduction="mean")
    strided = {name: lay_out(x) for name, x in case.tensors().items()}
    results = []
    for tensors in (strided, {name: x.contiguous() for name, x in strided.items()}):
        leaves = [x.detach().requires_grad_() for x in tensors.values()]
        results.append(torch.autograd.grad(gf.linear_cross_entropy(*leaves, case.target()), leaves))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert len(calls) == 2


def test_a_bad_label_and_a_second_derivative_are_refused(calls):
    case = Case("", 100, 3001, 20, ignored=0.0, reduction="mean")
    leaves, target = leaves_of(case), case.target()
    target[7] = 3001
    with pytest.raises(IndexError, match=r"got 3001 at target\[7\]"):
        gf.linear_cross_entropy(target=target, **leaves)
    loss = gf.linear_cross_entropy(target=case.target(), **leaves)
    (gradient,) = torch.autograd.grad(loss, leaves["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient.sum().backward()


def test_not_taken_where_it_does_not_serve(calls):
    case = Case("", 100, 3001, 20, reduction="mean")

    def taken(case: Case = case, **options: Any) -> bool:
        before = len(calls)
        loss = gf.linear_cross_entropy(target=case.target(), **leaves_of(case), **{**case.options(), **options})
        loss.sum().backward()
        return len(calls) > before

    assert taken() and taken(dataclasses.replace(case, dtype=BF16)) and not taken(reduction="none")
    assert not taken(dataclasses.replace(case, ignored=1.0))
    with gf.force(backend="reference"):
        assert not taken()
    with torch.no_grad():
        gf.linear_cross_entropy(target=case.target(), **leaves_of(case))
    assert len(calls) == 2
    hidden, weight = case.tensors().values()
    torch.func.grad(lambda w: gf.linear_cross_entropy(hidden, w, case.target()))(weight)
    compiled = torch.compile(gf.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    compiled(hidden, weight.requires_grad_(), case.target()).backward()
    assert len(calls) == 2


def test_large_problems_take_it_by_themselves():
    def is_taken(*tensors: torch.Tensor, **options: Any) -> bool:
        kernel = gf.explain(gf.linear_cross_entropy, *tensors, **options).kernel
        return kernel == "_C.linear_cross_entropy_gradients"

    for dtype, N, taken in ((FP32, 300, True), (FP32, 200, False), (BF16, 600, True), (BF16, 400, False)):
        V = 60_000
        hidden, weight = torch.randn(N, 1, requires_grad=True), torch.randn(V, 1, requires_grad=True)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        target = torch.zeros(N, dtype=torch.int64)
        assert is_taken(hidden, weight, target) == taken and not is_taken(hidden, weight, target, reduction="none")
        assert is_taken(hidden, weight.detach(), target) == (taken and dtype == FP32)


def test_the_kernel_refuses_a_gradient_with_gaps():
    hidden, weight, rows = torch.zeros(2, 4, dtype=BF16), torch.zeros(3, 4, dtype=BF16), torch.zeros(2)
    labels = torch.zeros(2, dtype=torch.int64)
    call = LinearCrossEntropyCall(hidden, weight, None, labels)
    for gradient in (torch.zeros(3, 8, dtype=BF16)[:, ::2], torch.zeros(3, 8, dtype=BF16)[:, :4]):
        with pytest.raises(ValueError, match="grad_weight: expected a contiguous tensor"):
            _C.linear_cross_entropy_gradients(call, rows, rows, rows, labels, 1.0, 0.0, None, gradient, None, ROOM, 1)


MEMORY = """
most, _, _ = peak(lambda: gf.linear_cross_entropy(hidden, weight, target).backward())
print(most - gradients)
"""


@memory_is_measured
@pytest.mark.parametrize(
    "N, V, E", [(1800, 40_000, 200), (700, 120_000, 256), (700, 50_000, 900), (3000, 12_000, 4096)]
)
def test_extra_memory_is_bounded(N, V, E):
    """As the process sees it: with halves of sums, with logits computed twice, with all logits in the gradient."""
    (extra,) = measured_memory(MEMORY, "bfloat16", N, V, E)
    assert extra <= 64 << 20 < 2 * N * V, f"{extra / 2**20:.1f} MiB beside the gradients"


def test_memory_of_an_earlier_call_is_not_read(calls, monkeypatch):
    """No logits are kept on this way. What memory for them held before is not taken for this call's, where a gradient
    of the statistics beside the loss has them computed again."""
    case = Case("", 130, 301, 34, bias=FP32, reduction="mean")
    stale: list[torch.Tensor] = []
    op = importlib.import_module("gpt4v_fast.ops.loss.linear_cross_entropy")  # the package has a function of this name
    empty = op._kept
    monkeypatch.setattr(op, "_kept", lambda call: stale[0] if stale else empty(call))

    def run(scale: float) -> list[torch.Tensor]:
        leaves = {name: (scale * x).requires_grad_() for name, x in case.tensors().items()}
        loss, stats = gf.linear_cross_entropy(target=case.target(), **leaves, **case.options(), return_stats=True)
        return list(torch.autograd.grad(loss + stats.lse.sum(), leaves.values()))

    want = run(1.0)
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "KEPT_BY_OP", 1 << 40)
        leaves = {name: (2.0 * x).requires_grad_() for name, x in case.tensors().items()}
        call = backends.call_of(gf.linear_cross_entropy, target=case.target(), **leaves, **case.options())
        stale.append(torch.ops.gpt4v_fast.linear_cross_entropy(*call)[-1])
    assert stale[0].numel() > 4 * 130 * 301 and stale[0][:8].any()
    assert all(torch.equal(a, b) for a, b in zip(run(1.0), want, strict=True)) and calls == [130, 130]


def test_a_loss_that_is_not_finite_is_as_ever(calls, monkeypatch):
    hidden, weight = torch.randn(20, 4), torch.randn(500, 4, requires_grad=True)
    hidden[3, 0] = math.inf
    results = []
    for kept_by_op in (-1, 1 << 40):
        monkeypatch.setattr(cpu, "KEPT_BY_OP", kept_by_op)
        loss = gf.linear_cross_entropy(hidden, weight, torch.zeros(20, dtype=torch.int64), z_loss=0.1)
        results.append((loss, *torch.autograd.grad(loss, weight)))
    assert calls == [20] and not results[0][0].isfinite()
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_large_gradients_are_the_same_bits_however_their_pages_come():
    """33 calls with 16 MiB of gradient: large pages are tried, and left out for 16 calls or more after slow ones."""
    hidden, weight = torch.randn(8, 128), torch.randn(32_768, 128, requires_grad=True)
    target = torch.randint(32_768, (8,))
    first, *others = [
        torch.autograd.grad(gf.linear_cross_entropy(hidden, weight, target), weight)[0] for _ in range(33)
    ]
    assert all(same_bits(first, other) for other in others)
