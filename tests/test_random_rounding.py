"""Random rounding: what it leaves alone, that it rounds right on average, and that sums get the errors they have."""

from __future__ import annotations

import math

import pytest
import torch
from random_rounding import BITS, TINY, RandomRounding, held, suspended

FP64 = torch.float64


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FP64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_numbers_that_the_format_holds_stay(dtype):
    x = torch.cat([random(1000).to(dtype).double(), torch.tensor([0.0, -0.0, 1.0, math.inf, -math.inf, TINY])])
    rounded = RandomRounding(0).rounded(x, BITS[dtype])
    assert torch.equal(rounded, x)
    assert RandomRounding(0).rounded(torch.tensor([math.nan], dtype=FP64)).isnan().all()


@pytest.mark.parametrize("bits", [24, 11, 8])
def test_others_go_to_a_neighbour_and_are_right_on_average(bits):
    x = random(4).repeat(50_000)
    rounded = RandomRounding(0).rounded(x, bits)
    step = 2.0 ** (x.abs().log2().floor() + 1 - bits)
    assert ((rounded - x).abs() < step).all() and torch.equal(rounded / step, (rounded / step).round())
    mean = ((rounded - x) / step).view(-1, 4).mean(0)
    assert (mean.abs() < 5 * 0.5 / math.sqrt(50_000)).all()


def test_numbers_too_small_for_fp32_are_flushed_or_not():
    rounded = RandomRounding(0).rounded(torch.full((1000,), TINY / 3, dtype=FP64))
    assert ((rounded == 0) | (rounded == TINY)).all() and 200 < (rounded == TINY).sum() < 470


def in_fp32(terms: torch.Tensor) -> torch.Tensor:
    """Row sums of fp32 terms, one after the other."""
    total = torch.zeros(len(terms), dtype=torch.float32)
    for column in terms.float().unbind(1):
        total = total + column
    return total.double()


@pytest.mark.parametrize("n", [4, 64, 1000])
@pytest.mark.parametrize("mean", [0.0, 0.3, 3.0], ids=["cancelling", "mixed", "one-sign"])
def test_sums_are_off_by_what_sums_one_by_one_are_off(mean, n):
    """The constant of the model is that of errors as large as they can be, u |s|; on average they are 0.4 of it."""
    terms = (mean + random(4000, n)).float().double()
    exact = terms.sum(1)
    with RandomRounding(0):
        modelled = terms.sum(1)
        product = (terms @ torch.ones(n, 1, dtype=FP64)).squeeze(1)
    real = (in_fp32(terms) - exact).square().mean().sqrt()
    for model in (modelled, product):
        assert real < (model - exact).square().mean().sqrt() < 5 * real


def test_operands_of_products_take_fewer_bits_and_the_backward_ones_their_own():
    a, b = random(30, 40).bfloat16().double(), random(40, 20)
    with RandomRounding(0, operands=8, backward_operands=24) as mode:
        coarse = a @ b
        mode.backward()
        fine = a @ b
    errors = [(x - a @ b).abs().mean() for x in (coarse, fine)]
    assert 2**-11 < errors[0] < 2**-5 and errors[1] < 2**-18


def test_views_in_place_changes_and_gradients_pass():
    x = random(3, 4).requires_grad_()
    with RandomRounding(0):
        y = x.t().clone()
        y.mul_(1 / 3)
        (gradient,) = torch.autograd.grad((y * held(y, 8)).sum(), x)
    assert y.t().shape == x.shape and torch.equal(y.detach(), y.detach().float().double())
    torch.testing.assert_close(gradient, (2 / 9 * x).detach(), rtol=2**-6, atol=0)


def test_held_is_the_number_itself_without_the_mode_and_suspended_is_exact():
    x = random(1000).requires_grad_()
    assert held(x, 8) is x
    with RandomRounding(0):
        kept = held(x, 8).detach()
        with suspended():
            product = x * x
    assert torch.equal(product, x * x)
    assert torch.equal(kept, kept.bfloat16().double()) and 2**-10 < ((kept - x) / x).detach().abs().mean() < 2**-8


@pytest.mark.parametrize(
    "function", [lambda x: x.log_softmax(1), lambda x: x.logsumexp(1), lambda x: x.softmax(1), torch.tanh], ids=str
)
def test_operations_of_several_steps_are_rounded_in_each(function):
    """Off by about what fp32 is off, forward and backward."""
    x, upstream = (random(50, 60) * 5).float(), random(50, 60, seed=1).float()

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        leaf = x.to(dtype).requires_grad_()
        y = function(leaf)
        given = upstream if y.dim() == 2 else upstream[:, 0]
        return [y.detach(), *torch.autograd.grad(y, leaf, given.to(dtype))]

    exact, native = run(FP64), run(torch.float32)
    with RandomRounding(0):
        moved = run(FP64)
    for a, b, c in zip(exact, native, moved, strict=True):
        real, modelled = ((y - a).square().mean().sqrt() for y in (b, c))
        assert real / 2 < modelled < 20 * real
