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
from loss_cases import BF16, EVERYTHING, FP16, FP32, IGNORED, LINEAR_ARGUMENTS, class_weights, make_labels
from loss_cases import LinearCase as Case
from process_group import call, results_of

import gpt4v_fast as gf
from gpt4v_fast import reference

both_sizes = pytest.mark.parametrize("ranks", [2, 4])
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
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


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


# What goes over the wire.


@both_sizes
def test_two_all_reduces_of_numbers_per_token(ranks):
    N, V, E = 50, 64, 24
    target = make_labels(N, V, 0.3)
    linear = {"hidden": torch.randn(N, E), "weight": torch.randn(V, E), "target": target}
    forward = [("MAX", N + 5), ("SUM", 2 * N + 1)]
    for gradients, backward in ((("hidden", "weight"), [("SUM", N * E)]), (("weight",), [])):
        seen = results_of(ranks, cases.collectives, "linear_cross_entropy", linear, gradients, {})
        assert seen == [forward + backward] * ranks
    logits = {"logits": torch.randn(N, V), "target": target}
    assert results_of(ranks, cases.collectives, "cross_entropy", logits, ("logits",), {}) == [forward] * ranks


def test_nothing_more_for_statistics_than_a_number_per_token():
    N = 20
    logits = {"logits": torch.randn(N, 8), "target": make_labels(N, 8), "weight": class_weights(8)}
    options = {"return_stats": True, "label_smoothing": 0.1}
    seen = results_of(2, cases.collectives, "cross_entropy", logits, ("logits",), options)
    assert seen == [[("MAX", 2 * N + 5), ("SUM", 3 * N + 1)]] * 2


@both_sizes
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_partial_gradients_of_hidden(dtype, ranks):
    hidden, weight, target = torch.randn(12, 8).to(dtype), torch.randn(16, 8).to(dtype), make_labels(12, 16, 0.2)
    results = results_of(ranks, cases.partial_gradients, hidden, weight, target)
    total = torch.stack([partial.double() for partial, _ in results]).sum(dim=0)
    for partial, whole in results:
        assert partial.dtype == whole.dtype == dtype and not torch.equal(partial, whole)
        torch.testing.assert_close(whole.double(), total, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


# DTensors.


@both_sizes
@pytest.mark.parametrize("placement", ["plain", "replicate", "shard"])
@pytest.mark.parametrize("V", [16, 13, 5])
def test_dtensor_weight(V, placement, ranks):
    hidden, weight, bias = torch.randn(8, 12), torch.randn(V, 12), torch.randn(V)
    target = make_labels(8, V, 0.2)
    results = results_of(ranks, cases.with_dtensors, hidden, weight, bias, target, placement)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    want = gf.linear_cross_entropy(
        hidden, weight, target, bias=bias, class_weight=torch.linspace(0.5, 1.5, V), label_smoothing=0.1
    )
    exact = torch.autograd.grad(want, leaves)
    hidden_placement = {"plain": "plain", "replicate": "(Replicate(),)", "shard": "(Shard(dim=0),)"}[placement]
    for loss, gradients, placements in results:
        torch.testing.assert_close(loss, want.detach(), rtol=2e-6, atol=0)
        for got, wanted in zip(gradients, exact, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)
        assert placements == [hidden_placement, "(Shard(dim=0),)", "(Shard(dim=0),)"]


@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "sequence-parallel"])
def test_a_module_after_parallelize_module(sharded):
    for one, parallel, compiled in results_of(2, cases.parallel_module, torch.randn(6, 8), make_labels(6, 14), sharded):
        for want, got, fast in zip(one, parallel, compiled, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
            assert torch.equal(got, fast)


@both_sizes
def test_dtensor_logits(ranks):
    logits, target = torch.randn(2, 5, 13), make_labels(10, 13, 0.2).reshape(2, 5)
    leaf = logits.clone().requires_grad_()
    want = gf.cross_entropy(leaf, target, z_loss=0.1)
    (exact,) = torch.autograd.grad(want, leaf)
    for loss, gradient in results_of(ranks, cases.logits_as_dtensor, logits, target):
        torch.testing.assert_close(loss, want.detach(), rtol=2e-6, atol=0)
        torch.testing.assert_close(gradient, exact, rtol=1e-5, atol=1e-7)


def test_a_dtensor_of_another_placement_is_refused():
    for error in call(2, cases.wrong_dtensor, torch.randn(6, 8)):
        assert isinstance(error, ValueError) and "weight: expected a DTensor of one Shard(0) placement" in str(error)


# Compilation, registration.


def test_compiles_without_a_graph_break_and_once_for_every_length():
    for compilations, difference in results_of(2, cases.compiled, [5, 6, 9, 14]):
        assert compilations == 2 and difference == 0


@both_sizes
def test_autocast_and_torch_func(ranks):
    hidden, weight, target = torch.randn(12, 8), torch.randn(16, 8), make_labels(12, 16)
    results = results_of(ranks, cases.under_autocast_and_transforms, hidden, weight, target)
    for i, dtype in enumerate((FP32, BF16)):
        leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
        loss = gf.linear_cross_entropy(leaves[0].to(dtype), leaves[1].to(dtype), target)
        wanted = torch.autograd.grad(loss, leaves)
        for how in (2 * i, 2 * i + 1):
            got = results[0][how][0], torch.cat([result[how][1] for result in results])
            for x, want in zip(got, wanted, strict=True):
                assert x.dtype == FP32
                torch.testing.assert_close(x, want, rtol=0, atol=4 * torch.finfo(dtype).eps * want.abs().max().item())


def test_opcheck():
    results_of(2, cases.registered)


# Bad input: an error on every process, and nobody waits.


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
        assert losses.isnan().tolist() == [False, True, False, False] and same(losses, outcomes[0][0])
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
