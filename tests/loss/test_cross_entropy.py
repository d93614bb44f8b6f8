"""gf.cross_entropy on the CPU: its numbers against the fp64 oracle, PyTorch's own function, and its refusals."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close, compare, spread_of
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import (
    BF16,
    FP16,
    FP32,
    IGNORED,
    ISAS,
    LOSS_ARGUMENTS,
    at_thread_counts,
    class_weights,
    make_labels,
    same_bits,
)
from loss_cases import poisoned as poisoned  # a fixture

import gpt4v_fast as gf
from gpt4v_fast import reference
from gpt4v_fast._native import _C
from gpt4v_fast.ops.loss.cross_entropy import CrossEntropyCall

OPS = torch.ops.gpt4v_fast


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    N: int
    V: int
    dtype: torch.dtype = FP32
    spread: float = 2.0  # standard deviation of the logits
    centre: float = 0.0
    ignored: float = 0.2
    ignore_index: int = IGNORED
    weighted: bool = False
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    reduction: str = "none"

    def logits(self) -> torch.Tensor:
        random = torch.randn(self.N, self.V, generator=torch.Generator().manual_seed(0))
        return (self.centre + self.spread * random).to(self.dtype)

    def target(self) -> torch.Tensor:
        return make_labels(self.N, self.V, self.ignored, self.ignore_index)

    def options(self) -> dict[str, Any]:
        names = ("ignore_index", "label_smoothing", "z_loss", "softcap", "reduction")
        options = {name: getattr(self, name) for name in names}
        return {**options, "weight": class_weights(self.V) if self.weighted else None}


CASES = [
    Case("one-by-one", 1, 1, ignored=0.0),
    Case("one-class", 7, 1, weighted=True, label_smoothing=0.3, z_loss=0.01),
    Case("two-classes", 9, 2, BF16),
    Case("fewer-than-lanes", 8, 13, FP16, softcap=5.0),
    Case("one-block", 3, 1024),
    Case("one-over", 3, 1025, BF16, label_smoothing=0.1),
    Case("several-blocks", 5, 5003, weighted=True, label_smoothing=0.1),
    Case("mean", 33, 101, FP16, reduction="mean", weighted=True),
    Case("sum", 33, 101, BF16, reduction="sum", z_loss=1e-3),
    Case("everything", 40, 777, weighted=True, label_smoothing=0.2, z_loss=1e-2, softcap=4.0, reduction="mean"),
    Case("everything-fp16", 40, 777, FP16, weighted=True, label_smoothing=0.2, z_loss=1e-2, softcap=4.0),
    Case("ignored-in-range", 30, 7, ignore_index=3, ignored=0.0),
    Case("ignore-index-minus-one", 30, 7, ignore_index=-1),
    Case("ninety-percent-ignored", 50, 99, ignored=0.9, reduction="mean"),
    Case("peaked", 20, 2001, spread=60.0),
    Case("flat", 20, 2001, spread=0.0, label_smoothing=0.1),
    Case("far-up", 20, 2001, centre=1e4, spread=1.0, label_smoothing=0.1, weighted=True),
    Case("far-down", 20, 2001, centre=-1e4, spread=1.0, z_loss=1e-6),
    Case("plus-minus-1e4", 20, 2001, spread=1e4),
    Case("capped-1e4", 20, 2001, spread=1e4, softcap=30.0),
]


def as_torch(logits: torch.Tensor, target: torch.Tensor, **options: Any) -> Any:
    """What a user of PyTorch would write: the loss of the fp32 logits."""
    return reference.cross_entropy(logits.float(), target, **options)


def check(case: Case, logits: torch.Tensor | None = None) -> None:
    target, options = case.target(), case.options()

    def run(function: Any) -> Any:
        def outputs(logits: torch.Tensor) -> Any:
            loss, stats = function(logits, target, **options, return_stats=True)
            return loss, stats.lse, stats.z_loss

        return outputs

    compare(
        run(gf.cross_entropy),
        run(reference.cross_entropy),
        {"logits": case.logits() if logits is None else logits},
        gradients=("logits",),
        native=run(as_torch),
        output_names=("loss", "lse", "z_loss"),
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_outputs_and_gradient(case, isa, poisoned):
    with gf.force(isa=isa):
        check(case)


def test_the_oracle_serves_every_argument_too():
    with gf.force(backend="reference"):
        check(Case("", 12, 30, weighted=True, label_smoothing=0.2, z_loss=0.01, softcap=3.0))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    N=st.integers(0, 40),
    V=st.integers(1, 2100),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
    **LOSS_ARGUMENTS,
)
def test_any_arguments(**arguments):
    check(Case("drawn", **arguments))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [IGNORED, 2, -1])
def test_the_numbers_of_torch(reduction, ignore_index):
    """Every combination of F.cross_entropy's arguments, with gradients, without our oracle in between."""
    logits = torch.randn(24, 9, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for weighted, smoothing, ignored in itertools.product((False, True), (0.0, 0.3, 1.0), (0.0, 0.5, 0.9)):
        options = {
            "weight": class_weights(9) if weighted else None,
            "ignore_index": ignore_index,
            "reduction": reduction,
            "label_smoothing": smoothing,
        }
        target = make_labels(24, 9, ignored, ignore_index)
        got, want = gf.cross_entropy(logits, target, **options), F.cross_entropy(logits, target, **options)
        torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-6)
        gradients = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (got, want)]
        torch.testing.assert_close(*gradients, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("layout", ["columns-first", "every-other", "misaligned", "batch", "expanded"])
def test_any_strides(layout, dtype):
    case = Case("", 12, 70, dtype)
    plain = case.logits()
    room = torch.full((3 * plain.numel(),), math.nan, dtype=dtype)
    laid_out = {
        "columns-first": lambda: plain.t().contiguous().t(),
        "every-other": lambda: room.as_strided((12, 70), (160, 2), 5).copy_(plain),
        "misaligned": lambda: room.as_strided((12, 70), (71, 1), 1).copy_(plain),
        "batch": lambda: plain.reshape(3, 4, 70).transpose(0, 1).contiguous().transpose(0, 1),
        "expanded": lambda: plain[:1].expand(12, 70),
    }[layout]()
    target = case.target().reshape(laid_out.shape[:-1])
    expected = gf.cross_entropy(laid_out.contiguous(), target, reduction="none")
    assert torch.equal(gf.cross_entropy(laid_out, target, reduction="none"), expected)
    gradients = [
        torch.autograd.grad(gf.cross_entropy(leaf, target), leaf)[0]
        for leaf in (laid_out.detach().requires_grad_(), laid_out.contiguous().requires_grad_())
    ]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_integer_labels_of_any_width(dtype):
    logits, target = torch.randn(10, 20), torch.arange(10)
    assert torch.equal(gf.cross_entropy(logits, target.to(dtype)), gf.cross_entropy(logits, target))
    wide = torch.arange(20)[::2]  # strided
    assert torch.equal(gf.cross_entropy(logits, wide), gf.cross_entropy(logits, wide.clone()))


@pytest.mark.parametrize("isa", ISAS)
def test_equal_logits_far_from_zero_share_the_probability(isa):
    """At 1e4 an fp32 lse is off by up to 5e-4; the probabilities must not be (lse_low in csrc/loss/loss.h)."""
    logits = torch.full((1, 3), 1e4, requires_grad=True)
    with gf.force(isa=isa):
        loss = gf.cross_entropy(logits, torch.tensor([0]))
        (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, torch.tensor(math.log(3.0)), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, torch.tensor([[-2 / 3, 1 / 3, 1 / 3]]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("isa", ISAS)
def test_infinities_and_nan(isa):
    """Logits of -inf (a masked vocabulary) are no class; a NaN, or nothing but -inf, is a NaN of that row alone."""
    logits = torch.randn(4, 1500)
    logits[0, 7:] = -math.inf
    logits[1, :1100] = -math.inf
    logits[2] = -math.inf
    logits[3, 1234] = math.nan
    target = torch.tensor([3, 1400, 0, 0])
    logits.requires_grad_()
    with gf.force(isa=isa):
        loss, stats = gf.cross_entropy(logits, target, reduction="none", return_stats=True)
        (gradient,) = torch.autograd.grad(loss[:2].sum(), logits)
    want = F.cross_entropy(logits[:2], target[:2], reduction="none")
    torch.testing.assert_close(loss[:2], want, rtol=1e-6, atol=0)
    assert loss[2:].isnan().all() and stats.lse[2] == -math.inf and stats.lse[3].isnan()
    torch.testing.assert_close(gradient[:2], torch.autograd.grad(want.sum(), logits)[0][:2], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_nothing_counted(z_loss):
    for N in (0, 1, 5):
        logits = torch.randn(N, 7, requires_grad=True)
        target = torch.full((N,), IGNORED)
        for reduction, want in (("mean", math.nan), ("sum", 0.0)):
            loss = gf.cross_entropy(logits, target, reduction=reduction, z_loss=z_loss)
            torch.testing.assert_close(loss, F.cross_entropy(logits, target, reduction=reduction), equal_nan=True)
            assert loss.isnan() if math.isnan(want) else loss == want
            (gradient,) = torch.autograd.grad(loss, logits)
            assert gradient.shape == (N, 7) and (gradient == 0).all()


def test_a_single_token_and_a_batch():
    logits = torch.randn(7)
    assert gf.cross_entropy(logits, torch.tensor(2)).shape == ()
    torch.testing.assert_close(gf.cross_entropy(logits, torch.tensor(2)), F.cross_entropy(logits, torch.tensor(2)))
    batch, target = torch.randn(2, 3, 4, 7), make_labels(24, 7, 0.3).reshape(2, 3, 4)
    loss, stats = gf.cross_entropy(batch, target, reduction="none", return_stats=True)
    assert loss.shape == stats.lse.shape == stats.argmax.shape == stats.correct.shape == stats.z_loss.shape == (2, 3, 4)
    torch.testing.assert_close(loss, F.cross_entropy(batch.movedim(-1, 1), target, reduction="none"))


@pytest.mark.parametrize("isa", ISAS)
def test_stats(isa):
    logits = torch.randn(30, 3000).bfloat16().float()
    logits[:, [5, 2500]] = 9.0  # the lowest index of equals, in blocks apart
    logits[3, 1024] = 10.0
    logits[4, 2999] = logits[4, 1023] = 11.0
    target = make_labels(30, 3000, 0.3)
    target[:6] = torch.tensor([5, 2500, IGNORED, 1024, 1023, 6])
    with gf.force(isa=isa):
        _, stats = gf.cross_entropy(logits, target, ignore_index=IGNORED, return_stats=True)
    counted = target != IGNORED
    want = torch.where(counted, 5, -1)
    want[3], want[4] = 1024, 1023
    assert torch.equal(stats.argmax, want)
    assert torch.equal(stats.correct, counted & (want == target))
    assert (stats.lse[~counted] == 0).all() and stats.z_loss == 0
    # Capped, the logits 9, 10 and 11 are all equal in fp32; the argmax is the logits'.
    _, capped = gf.cross_entropy(100 * logits, target, softcap=1.0, return_stats=True)
    assert torch.equal(capped.argmax, want)
    # An ignored token is never correct, even where ignore_index is the argmax of an ignored row, -1.
    minus_one = gf.cross_entropy(logits, torch.where(counted, target, -1), ignore_index=-1, return_stats=True)[1]
    assert torch.equal(minus_one.correct, stats.correct)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_z_loss_is_the_part_that_it_adds(reduction):
    logits, target = torch.randn(20, 30), make_labels(20, 30, 0.4)
    options = {"reduction": reduction, "weight": class_weights(30)}
    loss, stats = gf.cross_entropy(logits, target, z_loss=0.05, **options, return_stats=True)
    part = 0.05 * torch.where(target != IGNORED, logits.logsumexp(1) ** 2, 0.0)
    part = {"none": part, "sum": part.sum(), "mean": part.sum() / (target != IGNORED).sum()}[reduction]
    torch.testing.assert_close(stats.z_loss, part, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(loss - stats.z_loss, gf.cross_entropy(logits, target, **options), rtol=1e-5, atol=1e-6)
    assert not stats.z_loss.requires_grad


def test_lse_is_differentiable():
    logits = torch.randn(6, 50)
    target, upstream = make_labels(6, 50, 0.3), torch.randn(6)

    def gradient(function: Any, dtype: torch.dtype) -> torch.Tensor:
        x = logits.to(dtype).requires_grad_()
        loss, stats = function(x, target, return_stats=True)
        return torch.autograd.grad(loss + (stats.lse.sin() * upstream).sum(), x)[0]

    def oracle() -> torch.Tensor:
        return gradient(reference.cross_entropy, torch.float64)

    exact, native = oracle(), gradient(reference.cross_entropy, FP32)
    fast, spread = gradient(gf.cross_entropy, FP32), spread_of(oracle, exact)
    assert_close(fast, exact, native, name="gradient", spread=spread)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_same_bits_at_any_number_of_threads(dtype, isa):
    case = Case("", 37, 3001, dtype, weighted=True, label_smoothing=0.1, z_loss=0.01, softcap=20.0, reduction="mean")
    logits, target, options = case.logits().requires_grad_(), case.target(), case.options()

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        loss = gf.cross_entropy(logits, target, **options)
        return loss, torch.autograd.grad(loss, logits)[0]

    with gf.force(isa=isa):
        first, *others = at_thread_counts(run)
    for other in others:
        assert all(same_bits(a, b) for a, b in zip(first, other, strict=True))


def test_a_large_mean_has_the_same_bits_at_any_number_of_threads():
    """More rows than torch sums in one thread."""
    logits, target = torch.randn(70_000, 3), make_labels(70_000, 3, 0.1)
    first, *others = at_thread_counts(lambda: gf.cross_entropy(logits, target, z_loss=0.1, weight=class_weights(3)))
    assert all(torch.equal(first, other) for other in others)


def test_accumulates_into_an_existing_gradient():
    logits, target = torch.randn(5, 40, requires_grad=True), make_labels(5, 40)
    gf.cross_entropy(logits, target).backward()
    once = logits.grad.clone()
    gf.cross_entropy(logits, target).backward()
    assert torch.equal(logits.grad, once + once)


# The extension itself: memory it must not touch.


def native_call(logits: torch.Tensor, target: torch.Tensor) -> CrossEntropyCall:
    return CrossEntropyCall(logits, target, label_smoothing=0.1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_gradient_in_place(dtype, isa):
    case = Case("", 6, 2050, dtype)
    logits, target = case.logits(), case.target()
    rows = [torch.empty(6), torch.empty(6), torch.empty(6), torch.empty(6, dtype=torch.int64)]
    upstream = torch.randn(6), torch.randn(6)
    with gf.force(isa=isa):
        _C.cross_entropy_forward(native_call(logits, target), *rows, 2)
        _, lse, lse_low, _ = rows
        apart = torch.full_like(logits, math.nan)
        for out in (apart, logits):
            tensors = (lse, lse_low, *upstream, out)
            _C.cross_entropy_backward(native_call(logits, target), *tensors, 2)
    assert torch.equal(apart, logits)


@pytest.mark.parametrize("isa", ISAS)
def test_a_bad_label_that_reaches_the_kernel_is_not_followed(isa):
    """Its row is NaN; the others are as ever. The ops check labels before; the kernel does not rely on it."""
    logits, good = torch.randn(4, 9), torch.tensor([1, 2, 3, 4])
    bad = torch.tensor([1, 2**62, -7, 4])
    results = []
    with gf.force(isa=isa):
        for target in (good, bad):
            nll, lse, low, argmax = torch.empty(4), torch.empty(4), torch.empty(4), torch.empty(4, dtype=torch.int64)
            _C.cross_entropy_forward(native_call(logits, target), nll, lse, low, argmax, 1)
            gradient = torch.empty(4, 9)
            tensors = (lse, low, torch.ones(4), torch.ones(4), gradient)
            _C.cross_entropy_backward(native_call(logits, target), *tensors, 1)
            results.append((nll, lse, argmax, gradient))
    for want, got in zip(*results, strict=True):
        assert torch.equal(got[[0, 3]], want[[0, 3]])
        assert (got[1:3] == -1).all() if got.dtype == torch.int64 else got[1:3].isnan().all()
