"""Logits that forward keeps for backward: which they are, that they give the same gradients, and what they cost."""

from __future__ import annotations

import math

import pytest
import torch
from loss_cases import (
    BF16,
    BF16_ISAS,
    EVERYTHING,
    FP16,
    FP32,
    ISAS,
    at_thread_counts,
    measured_memory,
    memory_is_measured,
    same_bits,
)
from loss_cases import LinearCase as Case
from loss_cases import poisoned as poisoned  # a fixture
from test_linear_cross_entropy import check

import gpt4v_fast as gf
from gpt4v_fast import backends
from gpt4v_fast.ops.loss import cpu
from gpt4v_fast.ops.loss.linear_cross_entropy import AHEAD, LATER, NEVER, LinearCrossEntropyCall

OPS = torch.ops.gpt4v_fast

CASES = [
    Case("odd", 130, 301, 34, FP32, bias=FP32),
    Case("odd-bf16", 130, 301, 34, BF16, bias=BF16),
    Case("fp32-bias-bf16", 70, 301, 34, BF16, bias=FP32),
    Case("fp16-bias-bf16", 70, 301, 34, BF16, bias=FP16),
    Case("odd-depth-bf16", 50, 150, 33, BF16),
    Case("fp16", 70, 150, 20, FP16),
    Case("one-token-bf16", 1, 150, 16, BF16, ignored=0.0),
    Case("narrow-strips-bf16", 64, 150, 16, BF16, ignored=0.0),
    Case("half-ignored-bf16", 150, 220, 16, BF16, ignored=0.5, reduction="mean"),
    Case("weighted-bf16", 70, 220, 16, BF16, weighted=True, label_smoothing=0.2, z_loss=1e-2),
    Case("everything", 61, 301, 32, bias=FP32, **EVERYTHING),
    Case("everything-bf16", 61, 301, 32, BF16, bias=FP32, **EVERYTHING),
    Case("peaked-bf16", 60, 1000, 64, BF16, planted=True, spread=1.0),
    Case("flat-bf16", 60, 1000, 16, BF16, spread=0.0),
    Case("wide-bf16", 60, 500, 16, BF16, spread=30.0),  # most classes are 2^-100 and less
    Case("plus-minus-1e4-bf16", 60, 1000, 16, BF16, spread=1e4, bias=BF16),
    Case("plus-minus-1e4", 60, 1000, 16, spread=1e4, bias=FP32),
]
# Bytes that there are for them: none, the header alone, a few tiles, and what the call asks for.
ROOMS = {"none": 0, "header": 64, "some": 60_000, "all": cpu.KEPT_BYTES}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("room", ROOMS.values(), ids=ROOMS.keys())
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients(case, room, isa, poisoned, monkeypatch):
    monkeypatch.setattr(cpu, "KEPT_BYTES", room)
    with gf.force(isa=isa):
        check(case)


def call(case: Case) -> tuple[LinearCrossEntropyCall, tuple[torch.Tensor, ...]]:
    tensors = {name: x.requires_grad_() for name, x in case.tensors().items()}
    made = backends.call_of(gf.linear_cross_entropy, target=case.target(), **tensors, **case.options())
    detached = LinearCrossEntropyCall(*(x.detach() if isinstance(x, torch.Tensor) else x for x in made))
    return detached, OPS.linear_cross_entropy(*detached)


def gradients(
    arguments: LinearCrossEntropyCall, outputs: tuple[torch.Tensor, ...], kept: torch.Tensor
) -> list[torch.Tensor]:
    """Of hidden and weight, from the op's backward with this memory."""
    loss, lse, _, _, *saved, _ = outputs
    wanted = (True, True, False)
    found = OPS.linear_cross_entropy_backward(torch.ones_like(loss), None, *arguments, lse, *saved, kept, *wanted)
    return list(found)[:2]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_backward_reads_what_forward_kept(dtype, isa):
    """In fp32 its gradients are those of logits computed again, to the bit; and other logits give others."""
    with gf.force(isa=isa):
        arguments, outputs = call(Case("", 130, 301, 34, dtype))
        kept = outputs[-1]
        read, computed = (gradients(arguments, outputs, memory) for memory in (kept, kept[:0]))
        short = dtype == BF16 and isa in BF16_ISAS
        assert short or all(torch.equal(a, b) for a, b in zip(read, computed, strict=True))
        assert not short or not torch.equal(read[0], computed[0])
        changed = kept.clone()
        changed[len(kept) // 4 :] = 0
        assert not torch.equal(gradients(arguments, outputs, changed)[0], read[0])


@pytest.mark.parametrize("isa", ISAS)
def test_memory_that_this_call_did_not_fill_is_not_read(isa):
    """That of another ISA or call, or anything at all: logits are computed again."""
    case = Case("", 130, 301, 34, BF16)
    others = [torch.randint(0, 256, (200_000,), dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8)]
    for other in ISAS:
        with gf.force(isa=other):
            others += [call(Case("", *sizes, BF16))[1][-1] for sizes in ((130, 302, 34), (131, 301, 34))]
            others += [call(case)[1][-1]] if other != isa else []
    with gf.force(isa=isa):
        arguments, outputs = call(case)
        computed = gradients(arguments, outputs, outputs[-1][:0])
        cut = outputs[-1][: len(outputs[-1]) // 2].clone()
        for kept in [*others, cut]:
            found = gradients(arguments, outputs, kept)
            assert all(torch.equal(a, b) for a, b in zip(found, computed, strict=True))


def test_kept_only_where_a_gradient_is_wanted():
    case = Case("", 20, 90, 16)
    tensors = case.tensors()

    def when_gradients() -> str:
        return backends.call_of(gf.linear_cross_entropy, target=case.target(), **tensors).gradients

    assert when_gradients() == NEVER
    tensors["weight"].requires_grad_()
    assert when_gradients() == AHEAD
    with torch.no_grad():
        assert when_gradients() == NEVER
    for gradients, keeps in ((NEVER, False), (LATER, True), (AHEAD, True)):
        kept = OPS.linear_cross_entropy(*call(case)[0]._replace(gradients=gradients))[-1]
        assert len(kept) > 4 * 90 * 16 if keeps else len(kept) == 0
    torch.func.grad(lambda w: gf.linear_cross_entropy(tensors["hidden"], w, case.target()))(tensors["weight"].detach())


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("room", [60_000, cpu.KEPT_BYTES])
def test_same_bits_at_any_number_of_threads_and_again(dtype, room, monkeypatch):
    monkeypatch.setattr(cpu, "KEPT_BYTES", room)
    case = Case("", 130, 1200, 70, dtype, bias=FP32, label_smoothing=0.1)
    leaves = {name: x.requires_grad_() for name, x in case.tensors().items()}

    def run() -> list[torch.Tensor]:
        loss = gf.linear_cross_entropy(target=case.target(), **leaves)
        first = torch.autograd.grad(loss, leaves.values(), retain_graph=True)
        again = torch.autograd.grad(loss, leaves.values())
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        return [loss.detach(), *first]

    first, *others = at_thread_counts(run)
    for other in others:
        assert all(same_bits(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("room", [0, cpu.KEPT_BYTES])
def test_lanes_without_a_token_add_nothing(dtype, isa, room, monkeypatch):
    """Even where exp(bias) alone, which is the logit there, is infinite."""
    monkeypatch.setattr(cpu, "KEPT_BYTES", room)
    tensors = Case("", 5, 40, 16, dtype).tensors()
    bias = torch.full((40,), 1e4, requires_grad=True)
    leaves = [x.requires_grad_() for x in (*tensors.values(), bias)]
    with gf.force(isa=isa):
        loss = gf.linear_cross_entropy(*leaves[:2], torch.arange(5), bias=bias)
        found = torch.autograd.grad(loss, leaves)
    want = torch.autograd.grad(gf.linear_cross_entropy(*leaves[:2], torch.arange(5)), leaves[:2])
    for a, b in zip(found[:2], want, strict=True):
        torch.testing.assert_close(a, b, atol=5e-3, rtol=2e-2)
    assert math.isclose(found[2].sum().item(), 0.0, abs_tol=1e-3)


MEMORY = """
without, _, _ = peak(lambda: gf.linear_cross_entropy(hidden.detach(), weight.detach(), target))
forward, held, loss = peak(lambda: gf.linear_cross_entropy(hidden, weight, target))
before = status("VmRSS") - held
backward, _, _ = peak(lambda: loss.backward())
print(without, max(forward, held + backward) - gradients, status("VmRSS") - before)
"""


@memory_is_measured
@pytest.mark.parametrize(
    "dtype, N, V, E",
    [("float32", 600, 60_000, 48), ("bfloat16", 1200, 50_000, 64), ("bfloat16", 100, 700, 32_768)],
)
def test_extra_memory(dtype, N, V, E):
    """As the process sees it: little without a gradient, at most 64 MiB with one, and given back by backward."""
    without, extra, after = (x / 2**20 for x in measured_memory(MEMORY, dtype, N, V, E))
    # The allocator keeps some of the scratch.
    assert without < 20 and extra < 64 and after < 32, (without, extra, after)
    assert extra > 30 or E > 10_000
