"""The GPU ways of linear cross-entropy under Triton's interpreter: fused kernels, and products of small problems."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from closeness import compare
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import (
    BF16,
    EVERYTHING,
    FP16,
    FP32,
    IGNORED,
    LINEAR_ARGUMENTS,
    LINEAR_CASES,
    class_weights,
    interpreted_bad_labels,
    interpreted_linear_cross_entropy,
    make_labels,
    same_bits,
)
from loss_cases import LinearCase as Case
from random_rounding import BITS
from triton_interpreter import ON_GPU, call, launch, place

from gpt4v_fast import backends, reference
from gpt4v_fast.kernels.loss import plans

pytest.importorskip("triton", reason="the Triton kernels need triton")

PRODUCTS, FUSED = ({"PRODUCT_BYTES": n} for n in (plans.PRODUCT_BYTES, 0))
# Chunks of 32 tokens and 64 classes of 16 bits. Rooms for lower halves of sums: of all tokens, or of some.
CHUNKED = {**FUSED, "GRADIENT_BYTES": 32 * 64 * 2, "CHUNK_TOKENS": 32}
ONE_SWEEP, TWO_SWEEPS = {**CHUNKED, "SUMS_BYTES": 1 << 20}, {**CHUNKED, "SUMS_BYTES": 64 * 33 * 2}


class _Interpreted(torch.autograd.Function):
    """gf.linear_cross_entropy in the worker as a differentiable function here; forward runs there twice."""

    @staticmethod
    def forward(ctx, job, *leaves):
        kernel, outputs = call(interpreted_linear_cross_entropy, dict(zip(job[0], leaves, strict=True)), *job[1:4])
        assert kernel == job[4]
        ctx.save_for_backward(*leaves)
        ctx.job = job
        ctx.mark_non_differentiable(outputs[2])
        return tuple(outputs)

    @staticmethod
    def backward(ctx, grad_loss, grad_lse, grad_z_loss):
        job = ctx.job
        tensors = dict(zip(job[0], ctx.saved_tensors, strict=True))
        _, gradients = call(interpreted_linear_cross_entropy, tensors, *job[1:4], (grad_loss, grad_lse), job[0])
        return None, *gradients


def interpreted(
    target: torch.Tensor, options: dict[str, Any], constants: dict[str, int], kernel: str
) -> Callable[..., tuple[torch.Tensor, ...]]:
    """loss, lse and z_loss of named tensors in the worker, where `kernel` must serve the call; differentiable."""
    return lambda **tensors: _Interpreted.apply((list(tensors), target, options, constants, kernel), *tensors.values())


def check(case: Case, constants: dict[str, int] = FUSED, **further: object) -> None:
    """The rule of closeness.py for the loss, lse, z_loss and every gradient under random upstream gradients."""
    target, options = case.target(), {**case.options(), **further}
    kernel = "kernels.linear_cross_entropy"
    if constants is PRODUCTS:
        kernel = "kernels.linear_cross_entropy_products"
    elif case.dtype == BF16 and case.bias is None and options["softcap"] is None:
        kernel = "kernels.linear_cross_entropy (keeping logits)"
    fast = interpreted(target, options, constants, kernel)

    def oracle(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None):
        loss, stats = reference.linear_cross_entropy(hidden, weight, target, bias=bias, return_stats=True, **options)
        return loss, stats.lse, stats.z_loss

    def native(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None):
        return oracle(hidden.float(), weight.float(), None if bias is None else bias.float())

    tensors = case.tensors()
    # fp32 as three products of tf32 halves; the gradient of the logits is rounded to 16 bits, as in PyTorch.
    tf32 = case.dtype == FP32 and constants is not PRODUCTS
    bits = (BITS["tf32x3"],) * 2 if tf32 else (24, BITS[case.dtype])
    compare(
        fast, oracle, tensors, gradients=tuple(tensors), native=native, output_names=("loss", "lse", "z_loss"),
        operands=bits[0], backward_operands=bits[1],
    )  # fmt: skip


QUICK = ("one-by-one", "no-depth", "everything", "everything-bf16", "ninety-percent-ignored", "peaked-bf16")
CASES = [pytest.param(x, marks=() if x.name in QUICK else pytest.mark.slow, id=x.name) for x in LINEAR_CASES]


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(case):
    check(case)


CHUNKS = [
    Case("fp32", 100, 150, 33, bias=FP32),
    Case("bf16", 100, 150, 33, BF16, bias=FP32, **EVERYTHING),
    pytest.param(Case("fp16", 100, 150, 33, FP16), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("constants", [ONE_SWEEP, TWO_SWEEPS], ids=["one-sweep", "two-sweeps"])
@pytest.mark.parametrize("case", CHUNKS, ids=["fp32", "bf16", "fp16"])
def test_sums_over_several_chunks(case, constants):
    check(case, constants)


@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_products_of_a_small_problem(dtype, everything):
    check(Case("", 30, 90, 16, dtype, **({"bias": FP32, **EVERYTHING} if everything else {})), PRODUCTS)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    N=st.integers(1, 70),
    V=st.integers(1, 300),
    E=st.integers(1, 80),
    **LINEAR_ARGUMENTS,
    constants=st.sampled_from([FUSED, ONE_SWEEP, TWO_SWEEPS]),
)
def test_any_arguments(constants, **arguments):
    check(Case("drawn", **arguments), constants)


def test_shift():
    """Position t predicts label t + 1 of its row of labels: the numbers of slicing by hand."""
    hidden, weight = torch.randn(2, 6, 16), torch.randn(90, 16)
    target = make_labels(12, 90, 0.3).reshape(2, 6)
    options = {"reduction": "none", "ignore_index": IGNORED}
    _, shifted = call(
        interpreted_linear_cross_entropy,
        {"hidden": hidden, "weight": weight}, target, {**options, "shift": 1}, FUSED,
    )  # fmt: skip
    cut = {"hidden": hidden[:, :5].contiguous(), "weight": weight}
    _, sliced = call(interpreted_linear_cross_entropy, cut, target[:, 1:].contiguous(), options, FUSED)
    for got, want in zip(shifted[:2], sliced[:2], strict=True):
        assert torch.equal(got[:, :5], want) and (got[:, 5] == 0).all()


# The launchers, without the op around them.


def run(
    hidden, weight, target, bias=None, upstream=None, constants=FUSED, wanted=(True, True, True), **options
) -> list[torch.Tensor]:
    """nll, lse, argmax, and the wanted gradients; in the worker."""
    options = {"class_weight": None, "ignore_index": IGNORED, "label_smoothing": 0.0, "softcap": None, **options}
    return call(_run, hidden, weight, target, bias, upstream, constants, wanted, options)


def _run(hidden, weight, target, bias, upstream, constants, wanted, options):
    from unittest import mock

    tensors = (hidden, weight, bias, target)
    with mock.patch.multiple(plans, **constants):
        nll, lse, argmax = launch("loss.linear_cross_entropy", "linear_cross_entropy_forward", *tensors, **options)
        # Each in memory of its own: the worker watches what lies beside.
        upstream = [x.clone() for x in (torch.ones(2, target.shape[0]) if upstream is None else upstream)]
        gradients = launch(
            "loss.linear_cross_entropy_backward", "linear_cross_entropy_backward", *upstream, *tensors, lse,
            of_hidden=wanted[0], of_weight=wanted[1], of_bias=wanted[2], **options,
        )  # fmt: skip
    return [nll, lse, argmax, *gradients]


def example(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tensors = case.tensors()
    return tensors["hidden"], tensors["weight"], case.target()


@pytest.mark.parametrize("constants", [FUSED, ONE_SWEEP, TWO_SWEEPS], ids=["one-chunk", "one-sweep", "two-sweeps"])
def test_ignored_tokens_are_in_no_product(constants):
    """Wherever they stand and whatever their hidden states are, the bits are the same."""
    hidden, weight, target = example(Case("", 90, 150, 33, BF16, ignored=0.5))
    bias, upstream = torch.randn(150), torch.randn(2, 90)
    order = torch.argsort((target == IGNORED).int(), stable=True)
    count = int((target != IGNORED).sum())
    apart = run(hidden[order], weight, target[order], bias, upstream[:, order], constants)
    hidden[target == IGNORED] = math.nan
    among = run(hidden, weight, target, bias, upstream, constants)
    for name, got, want in zip(("nll", "lse", "argmax", "dh", "dw", "db"), among, apart, strict=True):
        got = got if name in ("dw", "db") else got[order]
        assert torch.isfinite(got).all() and torch.equal(got, want), name
        if name not in ("dw", "db"):
            assert (got[count:] == (-1 if name == "argmax" else 0)).all(), name


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("N, ignored", [(0, 0.0), (1, 0.0), (1, 1.0), (70, 1.0)])
def test_no_token_or_one(N, ignored, dtype):
    hidden, weight, target = example(Case("", N, 70, 24, dtype, ignored=ignored))
    nll, lse, argmax, *gradients = run(hidden, weight, target, torch.zeros(70))
    assert nll.shape == lse.shape == argmax.shape == (N,)
    if N == 0 or ignored:
        assert (nll == 0).all() and (lse == 0).all() and (argmax == -1).all()
        assert all((g == 0).all() for g in gradients)
    else:
        z = hidden.double() @ weight.double().t()
        assert argmax[0] == z.argmax() and abs(lse[0] - z.logsumexp(1)[0]) < 1e-5


@pytest.mark.parametrize("constants", [FUSED, ONE_SWEEP, TWO_SWEEPS], ids=["one-chunk", "one-sweep", "two-sweeps"])
def test_labels_that_are_none(constants):
    """NaN for their tokens, and for the sums over all tokens; memory they would point to is not touched."""
    hidden, weight, target = example(Case("", 80, 150, 33, BF16, ignored=0.3))
    bad = torch.arange(80) % 9 == 4
    target[bad] = torch.tensor([150, -1, 2**40, -(2**40)]).repeat(3)[: int(bad.sum())]
    counted = ~bad & (target != IGNORED)
    options = {"class_weight": class_weights(150), "label_smoothing": 0.1, "constants": constants}
    nll, lse, argmax, dh, dw, db = run(hidden, weight, target, torch.zeros(150), **options)
    for x in (nll, lse, dh):
        assert x[bad].isnan().all() and x[counted].isfinite().all() and (x[~bad & ~counted] == 0).all()
    assert (argmax[~counted] == -1).all() and (argmax[counted] >= 0).all()
    assert dw.isnan().all() and db.isnan().all()


@pytest.mark.parametrize("V", [5, 70, 300, 1000], ids=lambda V: f"V{V}")
@pytest.mark.parametrize("softcap", [None, 1.0], ids=["plain", "softcap"])
def test_argmax_is_the_lowest_of_equals(V, softcap):
    """In one tile, in two tiles of a split, and in two splits; a saturated softcap makes no new equals."""
    places = torch.randint(0, V, (40, 2), generator=torch.Generator().manual_seed(4))
    values = torch.zeros(40, V).scatter_(1, places, 8.0)
    values[0], values[1, 0], values[2, V - 1] = 1.0, 9.0, 9.0
    want = places.amin(1)
    want[:3] = torch.tensor([0, 0, V - 1])
    # One-hot hidden states pick a token's logits out of the weight.
    argmax = run(torch.eye(40), values.t().contiguous(), torch.zeros(40, dtype=torch.int64), softcap=softcap)[2]
    assert torch.equal(argmax, want)


def test_infinite_and_missing_logits():
    hidden, weight = torch.eye(4), torch.zeros(200, 4)
    target = torch.tensor([3, 3, 199, 3])
    bias = torch.zeros(200)
    weight[17, 0], weight[150, 3] = math.nan, 50.0
    bias[100:140] = -math.inf
    nll, lse, argmax, *_ = run(hidden, weight, target, bias)
    assert nll[0].isnan() and lse[0].isnan() and 0 <= argmax[0] < 200
    # NaN times 0 is NaN: what is not a number in the weight reaches every token.
    assert nll.isnan().all()
    weight[17, 0] = 0.0
    nll, lse, argmax, *_ = run(hidden, weight, target, bias)
    assert torch.allclose(lse, torch.tensor([math.log(160)] * 3 + [50.0]))
    assert argmax.tolist() == [0, 0, 0, 150]
    bias[:] = -math.inf
    nll, lse, argmax, *_ = run(hidden, weight, target, bias)
    assert (lse == -math.inf).all() and nll.isnan().all() and (argmax == 0).all()


@pytest.mark.parametrize("constants", [FUSED, ONE_SWEEP], ids=["one-chunk", "one-sweep"])
def test_an_infinite_logit_is_no_loss(constants):
    """Loss and gradients of its token alone are NaN, whichever class has the label."""
    hidden, weight, target = torch.eye(4), torch.zeros(200, 4), torch.tensor([17, 3, 199, 3])
    bias = torch.zeros(200)
    weight[17] = torch.tensor([3e38, 3e38, 1.0, 1.0])
    bias[17] = 3e38
    nll, lse, argmax, grad_hidden, *_ = run(hidden, weight, target, bias, constants=constants)
    assert nll[:2].isnan().all() and (lse[:2] == math.inf).all() and argmax[:2].tolist() == [17, 17]
    assert grad_hidden[:2].isnan().all()
    assert nll[2:].isfinite().all() and not grad_hidden[2:].isnan().any()


def test_any_strides():
    """Rows apart, columns apart, and tensors that begin off a 16-byte boundary: the bits of contiguous ones."""
    hidden, weight, target = example(Case("", 50, 90, 40, BF16))
    want = run(hidden, weight, target, torch.zeros(90))
    room = torch.full((3 + 50 * 47,), math.nan, dtype=BF16)
    apart = room.as_strided((50, 40), (47, 1), 3).copy_(hidden)
    for h, w in ((apart, weight), (hidden, weight.t().contiguous().t())):
        assert not (h.is_contiguous() and w.is_contiguous())
        for got, bits in zip(run(h, w, target, torch.zeros(90)), want, strict=True):
            assert torch.equal(got, bits)


def test_offsets_of_more_than_2_31_elements():
    """Tokens, and classes, 2^31 elements and more apart."""
    hidden, weight, target = example(Case("", 3, 3, 24, BF16, ignored=0.0))
    near, far = call(_near_and_far, hidden, weight, target)
    for got, want in zip(far, near, strict=True):
        assert torch.equal(got, want)


def _near_and_far(hidden, weight, target):
    torch.utils.deterministic.fill_uninitialized_memory = False  # what nobody touches is never there
    options = {"class_weight": None, "ignore_index": IGNORED, "label_smoothing": 0.0, "softcap": None}
    results = []
    for stride in (24, 2**31 + 8):
        tensors = []
        for x in (hidden, weight):
            tensors.append(torch.empty(2 * stride + 24, dtype=BF16).as_strided((3, 24), (stride, 1)).copy_(x))
        results.append(_run(*tensors, target, torch.zeros(3), None, FUSED, (True, True, True), options))
    torch.utils.deterministic.fill_uninitialized_memory = True
    return results


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_only_the_gradients_that_are_needed(wanted):
    """Each alone has the bits that it has among the others."""
    tensors = (*example(Case("", 60, 150, 40, BF16)), torch.zeros(150))
    every, alone = run(*tensors)[3:], run(*tensors, wanted=wanted)[3:]
    for want, got, is_wanted in zip(every, alone, wanted, strict=True):
        assert (got is not None) == is_wanted and (got is None or torch.equal(got, want))


@pytest.mark.parametrize("constants", [FUSED, TWO_SWEEPS], ids=["one-chunk", "two-sweeps"])
def test_same_bits_twice(constants):
    tensors = (*example(Case("", 60, 300, 33, BF16)), torch.zeros(300))
    for first, second in zip(run(*tensors, constants=constants), run(*tensors, constants=constants), strict=True):
        assert same_bits(first, second)


def test_the_lse_that_is_given_counts():
    """Backward of one shard of a vocabulary gets the lse of all of it."""
    hidden, weight, target = example(Case("", 20, 70, 16))
    dh, dw, _ = call(_with_another_lse, hidden, weight, target)
    logits, upstream = hidden.double() @ weight.double().t(), torch.ones(20, dtype=torch.float64)
    lse = logits.logsumexp(1).float() + 1.0
    options = (None, IGNORED, 0.0, 0.0)
    gradient = reference.cross_entropy_core_backward(upstream, upstream, logits, target, *options, lse.double())
    torch.testing.assert_close(dh.double(), gradient @ weight.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dw.double(), gradient.t() @ hidden.double(), rtol=1e-5, atol=1e-5)


def _with_another_lse(hidden, weight, target):
    lse = (hidden.double() @ weight.double().t()).logsumexp(1).float() + 1.0
    return launch(
        "loss.linear_cross_entropy_backward", "linear_cross_entropy_backward", torch.ones(20), torch.ones(20), hidden,
        weight, None, target, lse, of_hidden=True, of_weight=True, of_bias=False, class_weight=None,
        ignore_index=IGNORED, label_smoothing=0.0, softcap=None,
    )  # fmt: skip


def test_bad_labels_are_nan_and_remembered():
    loss, gradient, errors = call(interpreted_bad_labels)
    assert torch.equal(loss.isnan(), torch.tensor([[False, False, False], [False, True, True]]))
    assert loss[0, 2] == 0 and (gradient[0, 2] == 0).all()
    assert gradient[1, 1:].isnan().all() and gradient[0].isfinite().all() and gradient[1, 0].isfinite().all()
    first, none, shifted = errors
    assert first == (
        "target: expected labels in [0, 5) or ignore_index, got 55 at place 4 of the flattened target on "
        + ("cuda:0" if ON_GPU else "cpu")
    )
    assert none == ""
    assert "got 7 at place 1 of the flattened target" in shifted


def test_explain_names_the_way_and_why():
    small, large = call(_explained)
    where = call(place)
    assert small.startswith(f"linear_cross_entropy: kernels.linear_cross_entropy_products [triton] on {where}")
    assert large.startswith(f"linear_cross_entropy: kernels.linear_cross_entropy [triton] on {where}")
    why = "not kernels.linear_cross_entropy_products: the fp32 logits need more than 32 MiB"
    assert why in large and why not in small


def _explained():
    import gpt4v_fast as gf

    backends._settings.cache.clear()  # other tests have other limits
    with gf.force(backend="triton"):
        return [
            str(gf.explain(gf.linear_cross_entropy, torch.empty(N, 8), torch.empty(4096, 8), torch.zeros(N).long()))
            for N in (2048, 2049)
        ]
