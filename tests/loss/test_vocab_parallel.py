"""The losses with the vocabulary split over 2 and 4 processes, against the oracle on the whole of it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import vocab_parallel_cases as cases
from closeness import compare
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import BF16, EVERYTHING, FP16, FP32, IGNORED, LINEAR_ARGUMENTS, class_weights, make_labels, same_bits
from loss_cases import LinearCase as Case
from process_group import results_of
from vocab_parallel_cases import both_sizes

import gpt4v_fast as gf
from gpt4v_fast import reference

ORACLES = {"linear_cross_entropy": reference.linear_cross_entropy, "cross_entropy": reference.cross_entropy}


class Split(torch.autograd.Function):
    """(loss, lse) of an op in a group of processes, differentiable by the tensors; the other outputs go to `seen`."""

    @staticmethod
    def forward(ctx, seen, ranks, op, names, sizes, backend, target, options, *tensors):
        named = {name: x.detach() for name, x in zip(names, tensors, strict=True)}
        results = results_of(ranks, cases.forward, op, named, sizes, backend, target, options)
        for other in results[1:]:
            assert all(same(a, b) for a, b in zip(results[0], other, strict=True)), "the processes differ"
        ctx.ranks, ctx.op, ctx.names = ranks, op, names
        seen.append(results[0])
        return results[0][:2]

    @staticmethod
    def backward(ctx, *upstream):
        results = results_of(ctx.ranks, cases.backward, list(upstream))
        gradients = []
        for name in ctx.names:
            parts = [result[name] for result in results]
            if name in cases.SPLIT[ctx.op]:
                gradients.append(torch.cat(parts, dim=cases.SPLIT[ctx.op][name]))
                continue
            assert all(same(parts[0], part) for part in parts), f"the gradients of {name} differ"
            gradients.append(parts[0])
        return *[None] * 8, *gradients


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and same_bits(a, b)


def check(
    op: str, tensors: dict[str, torch.Tensor], target: torch.Tensor, sizes: tuple[int, ...], options: dict[str, Any],
    backend: str | None = None,
) -> None:  # fmt: skip
    """Loss, lse and every gradient against the fp64 oracle; the statistics exactly; the processes to the bit."""
    seen: list[Any] = []

    def fast(**tensors: torch.Tensor) -> Any:
        return Split.apply(seen, len(sizes), op, tuple(tensors), sizes, backend, target, options, *tensors.values())

    def oracle(**tensors: torch.Tensor) -> Any:
        loss, stats = ORACLES[op](target=target, **tensors, **options, return_stats=True)
        return loss, stats.lse

    def native(**tensors: torch.Tensor) -> Any:
        return oracle(**{name: x.float() for name, x in tensors.items()})

    compare(fast, oracle, tensors, gradients=tuple(tensors), native=native, output_names=("loss", "lse"))
    exact = {name: x.double() for name, x in tensors.items()}
    _, stats = ORACLES[op](target=target, **exact, **options, return_stats=True)
    _, _, argmax, correct, part = seen[0]
    assert torch.equal(argmax, torch.where(argmax < 0, -1, stats.argmax)) and torch.equal(correct, stats.correct)
    torch.testing.assert_close(part.double(), stats.z_loss, rtol=1e-5, atol=1e-6, equal_nan=True)


LINEAR = [
    Case("plain", 21, 40, 12),
    Case("bf16", 21, 40, 12, BF16, bias=BF16),
    Case("fp16", 9, 24, 12, FP16, bias=FP32),
    Case("smoothing", 21, 40, 12, label_smoothing=0.1),
    Case("smoothing-1", 21, 40, 12, label_smoothing=1.0, weighted=True),
    Case("smoothing-bf16", 21, 40, 12, BF16, label_smoothing=0.3, weighted=True, ignored=0.5),
    Case("weighted-mean", 21, 40, 12, weighted=True, reduction="mean"),
    Case("z-loss-mean", 21, 40, 12, z_loss=0.1, reduction="mean", bias=FP32),
    Case("softcap-sum", 21, 40, 12, softcap=3.0, reduction="sum"),
    Case("all", 33, 48, 20, bias=FP32, **EVERYTHING),
    Case("all-mean", 33, 48, 20, bias=FP32, reduction="mean", ignore_index=3, **EVERYTHING),
    Case("all-sum", 33, 48, 20, bias=FP32, reduction="sum", ignore_index=-1, **EVERYTHING),
    Case("peaked", 20, 400, 64, planted=True, spread=1.0),
    Case("flat", 20, 400, 16, spread=0.0, label_smoothing=0.1),
    Case("plus-minus-1e4", 20, 400, 16, spread=1e4, bias=FP32),
    Case("nothing-counted", 5, 12, 8, ignored=1.0, reduction="sum", label_smoothing=0.1),
    Case("no-token", 0, 12, 8, reduction="sum"),
    Case("one-token", 1, 12, 8, ignored=0.0),
]


@both_sizes
@pytest.mark.parametrize("case", LINEAR, ids=lambda case: case.name)
def test_linear_cross_entropy(case, ranks):
    sizes = cases.even_sizes(case.V, ranks)
    check("linear_cross_entropy", case.tensors(), case.target(), sizes, case.options())


@both_sizes
@pytest.mark.parametrize("case", [*LINEAR[3:6], *LINEAR[9:11]], ids=lambda case: case.name)
def test_cross_entropy(case, ranks):
    """Of the logits themselves."""
    tensors = case.tensors()
    logits = torch.nn.functional.linear(tensors["hidden"].float(), tensors["weight"].float()).to(case.dtype)
    options = case.options()
    options["weight"] = options.pop("class_weight")
    check("cross_entropy", {"logits": logits}, case.target(), cases.even_sizes(case.V, ranks), options)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    ranks=st.sampled_from([2, 4]),
    N=st.integers(0, 40),
    V=st.integers(1, 90),
    E=st.integers(1, 40),
    cuts=st.lists(st.floats(0, 1), min_size=3, max_size=3),
    **LINEAR_ARGUMENTS,
)
def test_any_arguments(ranks, cuts, **arguments):
    """And any split, ranks without a class among them."""
    case = Case("drawn", **arguments)
    places = [0, *sorted(int(cut * case.V) for cut in cuts[: ranks - 1]), case.V]
    sizes = tuple(end - start for start, end in itertools.pairwise(places))
    check("linear_cross_entropy", case.tensors(), case.target(), sizes, case.options())


UNEVEN = {"two": (3, 38), "four": (1, 9, 30, 1), "an-empty-one": (14, 14, 0, 13), "as-torch-chunks": (2, 2, 1, 0)}


@pytest.mark.parametrize("sizes", UNEVEN.values(), ids=UNEVEN.keys())
@pytest.mark.parametrize("everything", [False, True])
def test_uneven_shards(everything, sizes):
    V = sum(sizes)
    case = Case("", 25, V, 12, bias=FP32, **EVERYTHING) if everything else Case("", 25, V, 12)
    check("linear_cross_entropy", case.tensors(), case.target(), sizes, case.options())
    options = {"label_smoothing": 0.1, "weight": class_weights(V)} if everything else {}
    check("cross_entropy", {"logits": torch.randn(25, V)}, case.target(), sizes, {**options, "reduction": "none"})


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("everything", [False, True])
def test_other_backends_serve_shards_too(everything, backend):
    """The reference and, through Triton's interpreter, the GPU kernels."""
    case = Case("", 25, 40, 12, bias=FP32, **(EVERYTHING if everything else {}))
    sizes, target, options = (9, 31), case.target(), case.options()
    check("linear_cross_entropy", case.tensors(), target, sizes, options, backend=backend)
    options["weight"] = options.pop("class_weight")
    check("cross_entropy", {"logits": torch.randn(25, 40)}, target, sizes, options, backend=backend)


@both_sizes
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_shift_and_batches(reduction, ranks):
    hidden, weight = torch.randn(2, 9, 12), torch.randn(24, 12)
    target = make_labels(18, 24, 0.3).reshape(2, 9)
    options = {"shift": 1, "reduction": reduction, "label_smoothing": 0.1}
    check("linear_cross_entropy", {"hidden": hidden, "weight": weight}, target, (24 // ranks,) * ranks, options)


@both_sizes
def test_agrees_with_one_process(ranks):
    """With no smoothing a token's loss is off by at most a rounding of one number, whatever the split."""
    case = Case("", 60, 400, 32, bias=FP32, softcap=5.0, z_loss=0.01)
    target, options = case.target(), case.options()
    results = results_of(
        ranks,
        cases.forward,
        "linear_cross_entropy",
        case.tensors(),
        cases.even_sizes(400, ranks),
        None,
        target,
        options,
    )
    loss, stats = gf.linear_cross_entropy(target=target, **case.tensors(), **options, return_stats=True)
    torch.testing.assert_close(results[0][0], loss, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(results[0][1], stats.lse, rtol=3e-7, atol=0)
    assert torch.equal(results[0][2], stats.argmax)


@both_sizes
@pytest.mark.parametrize("op", cases.OPS)
def test_the_lowest_of_equal_logits_is_the_argmax(op, ranks):
    """Equal within a shard, in two shards, and 0 beside -0."""
    logits = torch.full((4, 16), -1.0)
    logits[0, [5, 9, 13]] = 2.0
    logits[1, [2, 3]] = 2.0
    logits[2, 1], logits[2, 14] = -0.0, 0.0
    logits[3, 15] = 2.0
    target = torch.tensor([9, 2, 1, IGNORED])
    tensors = {"logits": logits}
    if op == "linear_cross_entropy":
        tensors = {"hidden": torch.eye(4), "weight": logits.t().contiguous()}
    for result in results_of(ranks, cases.forward, op, tensors, (16 // ranks,) * ranks, None, target, {}):
        assert result[2].tolist() == [5, 2, 1, -1] and result[3].tolist() == [False, True, True, False]


@both_sizes
def test_minus_infinity_and_nan(ranks):
    """A shard of nothing but -inf is no class; a NaN anywhere is a NaN of its row on every process."""
    logits = torch.randn(5, 16)
    logits[0, :4] = -math.inf  # a shard of four processes, half of one of two
    logits[1, 8:] = -math.inf  # the second of two processes
    logits[2] = -math.inf
    logits[3, 11] = math.nan
    target = torch.tensor([7, 2, 0, 0, 12])
    split = (16 // ranks,) * ranks
    options = {"reduction": "none"}
    loss = results_of(ranks, cases.forward, "cross_entropy", {"logits": logits}, split, None, target, options)[0][0]
    want = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(loss[[0, 1, 4]], want[[0, 1, 4]], rtol=1e-6, atol=0)
    assert loss[2:4].isnan().all()
    gradients = results_of(ranks, cases.backward, [torch.tensor([1.0, 1, 0, 0, 1]), torch.zeros(5)])
    gradient = torch.cat([x["logits"] for x in gradients], dim=1)[[0, 1, 4]]
    leaf = logits.clone().requires_grad_()
    (exact,) = torch.autograd.grad(
        torch.nn.functional.cross_entropy(leaf, target, reduction="none")[[0, 1, 4]].sum(), leaf
    )
    torch.testing.assert_close(gradient, exact[[0, 1, 4]], rtol=1e-5, atol=1e-7)
    # A label in a shard of nothing but -inf has no probability.
    dead = results_of(
        ranks, cases.forward, "cross_entropy", {"logits": logits[1:2]}, split, None, torch.tensor([14]), options
    )
    assert all(result[0] == math.inf for result in dead)


@pytest.mark.parametrize("sizes", [(1, 2), (1, 2, 3, 1)], ids=str)
def test_equal_logits_far_from_zero_share_the_probability(sizes):
    """At 1e4 an fp32 lse is off by up to 5e-4, that of a shard too; the probabilities must not be."""
    V = sum(sizes)
    logits, target = {"logits": torch.full((1, V), 1e4)}, torch.tensor([0])
    results = results_of(len(sizes), cases.forward, "cross_entropy", logits, sizes, None, target, {})
    torch.testing.assert_close(results[0][0], torch.tensor(math.log(V)), rtol=1e-6, atol=0)
    gradients = results_of(len(sizes), cases.backward, [torch.ones(()), torch.zeros(1)])
    want = torch.full((1, V), 1 / V)
    want[0, 0] -= 1
    torch.testing.assert_close(torch.cat([x["logits"] for x in gradients], dim=1), want, rtol=1e-6, atol=0)


@both_sizes
def test_nothing_counted(ranks):
    tensors = {"hidden": torch.randn(5, 8), "weight": torch.randn(16, 8)}
    target = torch.full((5,), IGNORED)
    for z_loss in (0.0, 0.1):
        options = {"z_loss": z_loss, "label_smoothing": 0.1}
        split = (16 // ranks,) * ranks
        results = results_of(ranks, cases.forward, "linear_cross_entropy", tensors, split, None, target, options)
        assert all(result[0].isnan() for result in results)
        for gradients in results_of(ranks, cases.backward, [torch.ones(()), torch.zeros(5)]):
            assert all((x == 0).all() for x in gradients.values())
