"""The assertion itself can fail: on NaN, on a wrong value, on a misplaced infinity, on a shape; on real defects."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_cases import flash
from closeness import assert_close, compare, spread_of
from random_rounding import BITS

import gpt4v_fast as gf
from gpt4v_fast import reference

BF16, FP32 = torch.bfloat16, torch.float32
EXACT = torch.tensor([[1.0, -2.0, 3.0], [0.0, 1e-3, 1e3]], dtype=torch.float64)


def test_the_exact_value_and_a_rounded_one_pass():
    assert_close(EXACT.float(), EXACT, EXACT.float())
    assert_close(EXACT.bfloat16(), EXACT, EXACT.bfloat16())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.01], ids=["nan", "inf", "one percent off"])
def test_a_wrong_element_fails_and_is_named(value):
    fast = EXACT.float()
    fast[0, 0] = value
    with pytest.raises(AssertionError, match=r"lse: 1 of 6 .* at \(0, 0\)"):
        assert_close(fast, EXACT, EXACT.float(), name="lse")


def test_nan_in_all_three_fails():
    nan = torch.full((2,), float("nan"))
    with pytest.raises(AssertionError):
        assert_close(nan, nan.double(), nan)


def test_infinities_must_agree():
    exact = torch.tensor([-torch.inf, 1.0], dtype=torch.float64)
    assert_close(exact.float(), exact, exact.float())
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([0.0, 1.0]), exact, exact.float())
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([torch.inf, 1.0]), exact, exact.float())


def test_twice_the_native_error_is_allowed_and_no_more():
    exact = torch.ones(1, dtype=torch.float64)
    assert_close(torch.tensor([1.019]), exact, torch.tensor([1.01]))
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([1.021]), exact, torch.tensor([1.01]))


@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float16], ids=str)
def test_one_unit_of_the_rows_scale_is_allowed_and_no_more(dtype):
    exact, eps = torch.tensor([[1.0, 0.25], [8.0, 1.0]], dtype=torch.float64), torch.finfo(dtype).eps
    off = torch.tensor([[0.0, eps], [0.0, 8 * eps]], dtype=torch.float64)
    assert_close((exact + off).to(dtype), exact, exact.to(dtype))
    for row in range(2):
        more = off.clone()
        more[row] *= 2
        with pytest.raises(AssertionError, match=rf"1 of 4 .* at \({row}, 1\)"):
            assert_close((exact + more).to(dtype), exact, exact.to(dtype))


def test_five_spreads_are_allowed_and_no_more_and_asked_for_only_where_they_decide():
    exact, asked = torch.ones(1, 2, dtype=torch.float64), []

    def spread(samples: int) -> torch.Tensor:
        asked.append(samples)
        return torch.full((1, 1), 1e-4, dtype=torch.float64)

    assert_close(exact.float(), exact, exact.float(), spread=spread)
    assert asked == []
    assert_close(exact.float() + 4.9e-4, exact, exact.float(), spread=spread)
    assert asked == [4]
    with pytest.raises(AssertionError):
        assert_close(exact.float() + 5.1e-4, exact, exact.float(), spread=spread)
    assert asked == [4, 4, 16]


def test_the_spread_of_a_small_difference_is_that_of_its_large_terms():
    """The first row holds numbers whose every step fp32 can do; in the second a third of 1e4 comes and goes."""
    a = torch.tensor([[1.0, 2.0], [1e4, 3e4]], dtype=torch.float64)

    def run() -> torch.Tensor:
        part = a / torch.tensor([[2.0], [3.0]], dtype=torch.float64)
        return (a + part) - part - a

    spread = spread_of(run, run())(16)
    assert spread[0] == 0 and 1e4 * 2**-24 < spread[1] < 1e5 * 2**-24


def test_shapes_must_agree():
    with pytest.raises(AssertionError, match="shapes differ"):
        assert_close(EXACT.float()[:1], EXACT, EXACT.float())


def test_compare_sees_a_wrong_gradient():
    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            return g * 2.1

    tensors = {"x": torch.randn(5)}
    compare(lambda x: x * 2, lambda x: x * 2, tensors, gradients=["x"])
    with pytest.raises(AssertionError, match="gradient of x"):
        compare(lambda x: WrongGradient.apply(x), lambda x: x * 2, tensors, gradients=["x"])


# A kernel in PyTorch, as flash attention computes, with a defect or without.


def to_bits(x: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest number of `bits` significant bits."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2.0**bits).round() * 2.0**-bits, exponent)


class Flash(torch.autograd.Function):
    SOFTCAP = 3.0

    @staticmethod
    def scores(q: Any, k: Any, defect: str) -> tuple[torch.Tensor, torch.Tensor]:
        t = torch.tanh(q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 / Flash.SOFTCAP))
        S, T = t.shape[-2:]
        keys = {"a key too many": 1, "a key too few": -1}.get(defect, 0)
        hidden = torch.ones(S, T, dtype=torch.bool).triu(T - S + 1 + keys)
        return (Flash.SOFTCAP * t).masked_fill(hidden, -math.inf), t

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, defect: str) -> Any:
        ctx.dtype = q.dtype
        q, k, v = q.float(), k.float(), v.float()
        if defect == "tf32 operands":
            q, k = to_bits(q, 11), to_bits(k, 11)
        scores, _ = Flash.scores(q, k, defect)
        lse = scores.logsumexp(-1)
        p = torch.exp(scores - lse[..., None])
        if ctx.dtype == BF16:
            p = p.bfloat16().float()
        if defect == "weights of 4 bits":
            p = to_bits(p, 4)
        if defect == "sums in bf16":
            out = torch.zeros_like(p[..., :1] * v[..., :1, :])
            for j in range(k.shape[-2]):
                out = (out + p[..., j : j + 1] * v[..., j : j + 1, :]).bfloat16().float()
        else:
            out = p @ v
        out = out.to(ctx.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.defect = defect
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        dout, out, defect = dout.float(), out.float(), ctx.defect
        scores, t = Flash.scores(q, k, defect)
        p = torch.exp(scores - (lse.bfloat16().float() if defect == "lse saved in bf16" else lse)[..., None])
        delta = (dout * out).sum(-1) - dlse
        if defect == "delta without the gradient of lse":
            delta = delta + dlse
        ds = p * (dout @ v.transpose(-1, -2) - delta[..., None])
        if defect != "no derivative of the softcap":
            ds = ds * (1 - t * t)
        if defect == "gradients of weights of 4 bits":
            ds = to_bits(ds, 4)
        if defect == "one query in 64 left out":
            ds, p = (torch.cat([x[..., :63, :], torch.zeros_like(x[..., 63:, :])], -2) for x in (ds, p))
        scale = q.shape[-1] ** -0.5
        dq, dk, dv = ds @ k * scale, ds.transpose(-1, -2) @ q * scale, p.transpose(-1, -2) @ dout
        if defect == "sums in bf16":
            dk = (dk * 0).bfloat16()
            for i in range(q.shape[-2]):
                dk = dk + (scale * ds[..., i : i + 1, :].transpose(-1, -2) * q[..., i : i + 1, :]).bfloat16()
        return dq.to(ctx.dtype), dk.to(ctx.dtype), dv.to(ctx.dtype), None


FLASH_DEFECTS = [
    "a key too many",
    "a key too few",
    "weights of 4 bits",
    "gradients of weights of 4 bits",
    "sums in bf16",
    "lse saved in bf16",
    "delta without the gradient of lse",
    "no derivative of the softcap",
    "one query in 64 left out",
]


def compare_flash(dtype: torch.dtype, defect: str, of: str) -> None:
    """64 queries and keys; `of`: whether outputs or gradients are compared."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(1, 2, 64, 32, generator=generator).to(dtype) for name in "qkv"}
    options = {"mask": None, "softcap": Flash.SOFTCAP, "return_lse": True}
    options["mask"] = gf.Mask(causal=True)

    def right(**tensors: torch.Tensor) -> Any:
        return flash(reference.attention, BITS[dtype], **tensors, **options)

    def fast(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return Flash.apply(q, k, v, defect)

    gradients = ("q", "k", "v") if of == "gradients" else ()
    bits = BITS[dtype]
    compare(fast, right, tensors, gradients=gradients, native_dtype=FP32, operands=bits, backward_operands=bits)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_flash_attention_without_a_defect_passes(dtype):
    compare_flash(dtype, "", "gradients")


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("defect", FLASH_DEFECTS)
def test_flash_attention_with_a_defect_is_refused(defect, dtype):
    with pytest.raises(AssertionError, match="too far off"):
        compare_flash(dtype, defect, "gradients")


def test_tf32_operands_in_fp32_are_refused():
    with pytest.raises(AssertionError, match=r"output 0: .* too far off"):
        compare_flash(FP32, "tf32 operands", "outputs")


# The same of the loss.


class Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, target: Any, defect: str) -> Any:
        ctx.dtype = hidden.dtype
        hidden, weight = hidden.float(), weight.float()
        target = target.clone()
        if defect == "one label off by one":
            target[3] = (target[3] + 1) % len(weight)
        z = hidden @ weight.T
        lse = (z[:, :-1] if defect == "a class left out" else z).logsumexp(1)
        ctx.save_for_backward(hidden, weight, target, lse)
        ctx.defect = defect
        return lse - z.gather(1, target[:, None])[:, 0], lse

    @staticmethod
    def backward(ctx: Any, dnll: Any, dlse: Any) -> Any:
        hidden, weight, target, lse = ctx.saved_tensors
        if ctx.defect == "lse saved in bf16":
            lse = lse.bfloat16().float()
        dz = (dnll + dlse)[:, None] * torch.exp(hidden @ weight.T - lse[:, None])
        dz = dz.scatter_add(1, target[:, None], -dnll[:, None])
        if ctx.defect == "one token in 64 left out":
            dz[63] = 0
        grad_weight = dz.T @ hidden
        if ctx.defect == "sums in bf16":
            grad_weight = torch.zeros_like(grad_weight)
            for i in range(len(hidden)):
                grad_weight = (grad_weight + dz[i][:, None] * hidden[i]).bfloat16().float()
        if ctx.defect == "no smallest probabilities":  # gradient filtering, as some kernels do to save time
            grad_weight = torch.where(dz.abs() < 2e-3, 0.0, dz).T @ hidden
        return (dz @ weight).to(ctx.dtype), grad_weight.to(ctx.dtype), None, None


def compare_loss(dtype: torch.dtype, defect: str) -> None:
    """64 tokens, 200 classes."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(200, (64,), generator=generator)
    tensors = {
        "hidden": torch.randn(64, 32, generator=generator).to(dtype),
        "weight": (torch.randn(200, 32, generator=generator) * 0.3).to(dtype),
    }

    def oracle(hidden: torch.Tensor, weight: torch.Tensor) -> Any:
        loss, stats = reference.linear_cross_entropy(hidden, weight, target, reduction="none", return_stats=True)
        return loss, stats.lse

    compare(
        lambda hidden, weight: Loss.apply(hidden, weight, target, defect),
        oracle,
        tensors,
        gradients=("hidden", "weight"),
        native_dtype=FP32,
    )


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_loss_without_a_defect_passes(dtype):
    compare_loss(dtype, "")


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize(
    "defect",
    [
        "one label off by one",
        "a class left out",
        "lse saved in bf16",
        "one token in 64 left out",
        "sums in bf16",
        "no smallest probabilities",
    ],
)
def test_a_loss_with_a_defect_is_refused(defect, dtype):
    with pytest.raises(AssertionError, match="too far off"):
        compare_loss(dtype, defect)
