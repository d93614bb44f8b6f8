"""The split losses' bad input: an error on every process, or NaN where nobody waits, and nobody hangs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import vocab_parallel_cases as cases
from loss_cases import IGNORED, same_bits
from process_group import call, results_of
from vocab_parallel_cases import both_sizes

import gpt4v_fast as gf


def arguments(**changes: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    plain = {"hidden": torch.randn(4, 6), "weight": torch.randn(8, 6), "target": torch.tensor([0, 15, 8, IGNORED])}
    return {**plain, **changes}


def assert_errors(outcomes: list[Any], error: type[Exception], *parts: str) -> None:
    for outcome, part in zip(outcomes, parts, strict=True):
        assert type(outcome) is error and part in str(outcome), outcome


def test_a_bad_label_is_named_on_every_process():
    by_rank = [arguments(target=torch.tensor([0, 15, 16, -3]))] * 2
    message = "in [0, 16) or ignore_index = -100, got 16 at target[2]"
    assert_errors(call(2, cases.loss, "linear_cross_entropy", by_rank), IndexError, message, message)
    by_rank = [arguments(target=torch.tensor([99, 15, 15, -3]), shift=1)] * 2
    message = "got -3 at target[3]"
    assert_errors(call(2, cases.loss, "linear_cross_entropy", by_rank), IndexError, message, message)


def test_a_bad_label_on_one_process_raises_on_all():
    outcomes = call(2, cases.loss, "linear_cross_entropy", [arguments(), arguments(target=torch.tensor([0, 16, 1, 1]))])
    assert_errors(outcomes, IndexError, "another process", "got 16 at target[1]")


def test_labels_that_differ_are_refused():
    outcomes = call(2, cases.loss, "linear_cross_entropy", [arguments(), arguments(target=torch.tensor([15, 0, 8, 1]))])
    assert_errors(outcomes, ValueError, *["target: expected the same labels on every process"] * 2)


@both_sizes
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_bad_label_is_a_nan_of_its_row_where_nobody_waits(smoothing, ranks):
    """As on a GPU, through Triton's interpreter; check_labels knows the label in the whole vocabulary."""
    target = torch.tensor([0, 16 * ranks, 8, IGNORED])
    by_rank = [arguments(target=target, label_smoothing=smoothing)] * ranks
    outcomes = results_of(ranks, cases.without_waiting, "linear_cross_entropy", by_rank)
    for losses, gradients, error in outcomes:
        assert losses.isnan().tolist() == [False, True, False, False] and same_bits(losses, outcomes[0][0])
        assert gradients[0].isnan().any(dim=1).tolist() == [False, True, False, False]
        assert f"in [0, {8 * ranks}) or ignore_index, got {16 * ranks} at place 1" in error


def test_labels_or_arguments_that_differ_are_nan_where_nobody_waits():
    others = [arguments(target=torch.tensor([15, 0, 8, 1])), arguments(label_smoothing=0.1)]
    for other in others:
        for losses, _, error in results_of(2, cases.without_waiting, "linear_cross_entropy", [arguments(), other]):
            assert losses[:3].isnan().all() and error == ""


DIFFERENT = {
    "vocabulary": {"weight": torch.randn(7, 6)},
    "smoothing": {"label_smoothing": 0.1},
    "softcap": {"softcap": 3.0},
    "ignore-index": {"ignore_index": 3},
    "dtype": {"hidden": torch.randn(4, 6).bfloat16(), "weight": torch.randn(8, 6).bfloat16()},
    "class-weight": {"class_weight": torch.ones(8)},
}


@pytest.mark.parametrize("change", DIFFERENT.values(), ids=DIFFERENT.keys())
def test_arguments_that_differ_are_refused(change):
    outcomes = call(2, cases.loss, "linear_cross_entropy", [arguments(), arguments(**change)])
    assert_errors(outcomes, ValueError, *["process_group: expected the same arguments and vocab_sizes"] * 2)


WRONG = {
    "vocab-sizes-count": ({"vocab_sizes": (8, 4, 4)}, ValueError, "vocab_sizes: expected one size for each of 2"),
    "vocab-sizes-own": ({"vocab_sizes": (7, 7)}, ValueError, "weight: expected the 7 classes that vocab_sizes has"),
    "bias-of-the-whole": ({"bias": torch.zeros(16)}, ValueError, "bias: expected shape (V,) (8,), got (16,)"),
    "class-weight-of-the-whole": ({"class_weight": torch.ones(16)}, ValueError, "class_weight: expected shape"),
}


@pytest.mark.parametrize("change, error, message", WRONG.values(), ids=WRONG.keys())
def test_refuses(change, error, message):
    outcomes = call(2, cases.loss, "linear_cross_entropy", [arguments(**change)] * 2)
    assert_errors(outcomes, error, message, message)


def test_refuses_what_is_no_group():
    with pytest.raises(TypeError, match=r"process_group: expected a torch.distributed.ProcessGroup, got str"):
        gf.linear_cross_entropy(**arguments(), process_group="world")
    with pytest.raises(ValueError, match="vocab_sizes: expected None without a process_group"):
        gf.cross_entropy(torch.randn(2, 5), torch.zeros(2, dtype=torch.int64), vocab_sizes=(5,))


def test_the_group_still_works_after_errors():
    outcomes = call(2, cases.loss, "linear_cross_entropy", [arguments()] * 2)
    assert torch.equal(*outcomes) and outcomes[0].isfinite()
