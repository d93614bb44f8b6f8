"""The assertion itself can fail: on NaN, on a wrong value, on a misplaced infinity, on a shape."""

import pytest
import torch
from closeness import assert_close, compare

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
