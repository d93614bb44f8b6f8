"""Linear cross-entropy on a GPU that keeps logits in the memory of weight's gradient: under Triton's interpreter."""

from __future__ import annotations

import importlib
import inspect
import itertools
import math

import pytest
import torch
from closeness import compare
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import BF16, IGNORED, LINEAR_ARGUMENTS, class_weights, interpreted_linear_cross_entropy
from loss_cases import LinearCase as Case
from random_rounding import BITS
from test_triton_linear_cross_entropy import interpreted
from triton_interpreter import ON_GPU, call, launch, launches

from gpt4v_fast import reference
from gpt4v_fast.kernels import configs
from gpt4v_fast.kernels.loss import plans

pytest.importorskip("triton", reason="the Triton kernels need triton")

# A block of tokens and a unit of classes of the launch table; room for a unit of 160 tokens or 384, with room for
# lower halves of sums too, or none: then grad_hidden of the tokens that are not kept has a sweep of its own.
BLOCK, UNIT, N_MORE = (128, 256, 384) if ON_GPU else (32, 64, 160)
FUSED = {"PRODUCT_BYTES": 0}
SMALL = {**FUSED, "KEPT_BYTES": 2 * N_MORE * UNIT + 2 * N_MORE * 80}
NO_ROOM = {**FUSED, "KEPT_BYTES": 2 * N_MORE * UNIT, "SUMS_BYTES": 64 * 33 * 2}

CASES = [
    Case("all-tokens", 60, 200, 64, BF16),
    Case("more-tokens-than-features", 150, 200, 70, BF16, reduction="mean"),
    Case("rows-of-odd-width", 90, 203, 33, BF16, ignored=0.5),
    Case("smoothed", 100, 150, 48, BF16, label_smoothing=0.2, z_loss=1e-2, reduction="sum"),
    Case("weighted", 100, 150, 48, BF16, weighted=True, label_smoothing=0.1),
    Case("peaked", 60, 1000, 64, BF16, planted=True, spread=1.0),
    Case("plus-minus-1e4", 60, 300, 64, BF16, spread=1e4),
    Case("flat", 40, 100, 32, BF16, spread=0.0),
    Case("fewer-classes-than-a-chunk", 40, 7, 32, BF16),
    Case("all-ignored", 70, 90, 64, BF16, ignored=1.0),
]


def check(case: Case, constants: dict[str, int]) -> None:
    target, options = case.target(), case.options()

    def oracle(hidden, weight):
        loss, stats = reference.linear_cross_entropy(hidden, weight, target, return_stats=True, **options)
        return loss, stats.lse, stats.z_loss

    run = interpreted(target, options, constants, "kernels.linear_cross_entropy (keeping logits)")
    compare(
        run, oracle, case.tensors(),
        gradients=("hidden", "weight"), native=lambda hidden, weight: oracle(hidden.float(), weight.float()),
        output_names=("loss", "lse", "z_loss"), backward_operands=BITS[BF16],
    )  # fmt: skip


@pytest.mark.parametrize("constants", [FUSED, SMALL, NO_ROOM], ids=["one-chunk", "chunks", "two-sweeps"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_outputs_and_gradients(case, constants):
    check(case, constants)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    N=st.integers(1, 160),
    V=st.integers(1, 300),
    E=st.integers(32, 80),
    constants=st.sampled_from([FUSED, SMALL, NO_ROOM]),
    **{**LINEAR_ARGUMENTS, "dtype": st.just(BF16), "bias": st.none(), "softcap": st.none()},
)
def test_any_arguments(constants, **arguments):
    check(Case("drawn", **arguments), constants)


def _launched(tensors, target, options, constants, wanted):
    upstream = [torch.ones(len(target)) for _ in range(2)]
    with launches() as names:
        interpreted_linear_cross_entropy(tensors, target, options, constants, upstream, wanted)
    return [name.removeprefix("_linear_cross_entropy_").removesuffix("_kernel") for name in names]


def launched(N, V, E, constants, wanted=("hidden", "weight")):
    case = Case("", N, V, E, BF16)
    return call(_launched, case.tensors(), case.target(), case.options(), constants, wanted)


def test_what_is_launched():
    """Kept logits are not computed again; those of further tokens are; without weight's gradient nothing is kept."""
    of_chunk = ["kept_copy", "grad_weight"]
    start = ["_remember_bad_label", "rows", "forward", "merge", "kept_gradient", "kept_grad_hidden"]
    few, V, E = BLOCK, 2 * UNIT, BLOCK
    assert launched(few, V, E, FUSED) == [*start, *of_chunk]
    assert launched(few, V, E, {**SMALL, "KEPT_BYTES": 2 * few * UNIT}) == [*start, *of_chunk, *of_chunk]
    # Lower halves of sums stand in the last rows of weight's gradient: the last chunk's logits are not kept.
    start.insert(-1, "gradient")
    further = ["gradient", "grad_hidden", "grad_weight"]
    room = 2 * N_MORE * UNIT + 2 * E * max(0, N_MORE - BLOCK - UNIT)
    assert launched(N_MORE, V, E, {**SMALL, "KEPT_BYTES": room}) == [*start, "kept_copy", *further, *further]
    names = launched(N_MORE, V, E, NO_ROOM)
    start.remove("gradient")
    assert names[:6] == start and names[-6:] == ["kept_copy", "gradient", "grad_weight"] * 2
    assert names[6:-6] == ["gradient", "grad_hidden"] * (len(names[6:-6]) // 2)
    assert "kept_gradient" not in launched(few, V, E, FUSED, ("hidden",))


def _arguments() -> dict[str, list[set[str]]]:
    modules = ["linear_cross_entropy", "linear_cross_entropy_kept", "linear_cross_entropy_products"]
    found = {}
    for name in ("forward", "backward"):
        ways = [importlib.import_module(f"gpt4v_fast.kernels.loss.{module}") for module in modules]
        signatures = [inspect.signature(getattr(way, f"linear_cross_entropy_{name}")) for way in ways]
        found[name] = [
            {p.name for p in signature.parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD}
            for signature in signatures
        ]
    return found


def test_three_ways_have_one_interface():
    """Forward and backward of the fused, the kept and the product way take the same tensors under the same names."""
    for launcher, arguments in call(_arguments).items():
        assert arguments[0] == arguments[1] == arguments[2], launcher


@pytest.mark.parametrize(
    "with_bias, of_hidden, of_weight", [(False, True, True), (False, True, False), (True, True, True)]
)
def test_the_kept_way_runs_by_the_common_interface(with_bias, of_hidden, of_weight):
    """Its backward is that of kept logits where there are some and weight's gradient is wanted, else the fused one."""
    case = Case("", 2 * BLOCK, UNIT, BLOCK, BF16)
    tensors = case.tensors()
    arguments = (tensors["hidden"], tensors["weight"], torch.ones(UNIT) if with_bias else None, case.target())
    found, expected = call(_common_and_own, arguments, of_hidden, of_weight)
    for mine, its in zip(found, expected, strict=True):
        assert (mine is None) == (its is None)
        assert mine is None or torch.equal(mine, its)


def _common_and_own(arguments, of_hidden, of_weight):
    hidden, weight, bias, target = arguments
    rows, forward, backward = torch.ones(len(target)), "linear_cross_entropy_forward", "linear_cross_entropy_backward"
    options = {"class_weight": None, "ignore_index": -100, "label_smoothing": 0.0}
    wanted = {"of_hidden": of_hidden, "of_weight": of_weight, "of_bias": True}
    way = "loss.linear_cross_entropy_kept"
    _, lse, _, kept = launch(way, forward, *arguments, **options)
    found = launch(way, backward, rows, rows, *arguments, lse, kept=kept, **wanted, **options)
    assert (kept is None) == (bias is not None)
    if kept is not None and of_weight:
        _, lse, _, kept = launch("loss.linear_cross_entropy", f"{forward}_keeping", *arguments, **options)
        own = launch(
            way, f"{backward}_of_kept", rows, rows, hidden, weight, target, lse, kept, of_hidden=of_hidden, **options
        )
        return found, (*own, None)
    return found, launch("loss.linear_cross_entropy", backward, rows, rows, *arguments, lse, **wanted, **options)


def _twice(leaves, target, constants):
    """Gradients of two backward passes over one graph, and what a third under create_graph raises."""
    from unittest import mock

    import gpt4v_fast as gf

    leaves = [x.requires_grad_() for x in leaves]
    with gf.force(backend="triton"), mock.patch.multiple(plans, **constants):
        loss = gf.linear_cross_entropy(*leaves, target, ignore_index=IGNORED)
        first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
        again = gf.linear_cross_entropy(*leaves, target, ignore_index=IGNORED)
        try:
            torch.autograd.grad(torch.autograd.grad(again, leaves, create_graph=True)[0].sum(), leaves)
        except RuntimeError as error:
            return first, second, str(error)
    return first, second, ""


def test_a_second_backward_pass():
    case = Case("", N_MORE, 150, BLOCK, BF16)
    first, second, refused = call(_twice, list(case.tensors().values()), case.target(), SMALL)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7 * float(b.abs().max()))
    assert "linear_cross_entropy" in refused


# The launchers.


def run(hidden, weight, target, constants=SMALL, **options):
    """nll, lse, argmax and both gradients."""
    options = {"class_weight": None, "ignore_index": IGNORED, "label_smoothing": 0.0, **options}
    return call(_run, hidden, weight, target, constants, options)


def _run(hidden, weight, target, constants, options):
    from unittest import mock

    with mock.patch.multiple(plans, **constants):
        module = "loss.linear_cross_entropy"
        *rows, kept = launch(module, "linear_cross_entropy_forward_keeping", hidden, weight, None, target, **options)
        assert kept is not None
        upstream = [torch.ones(target.shape[0]) for _ in range(2)]
        arguments = (*upstream, hidden, weight, target, rows[1], kept)
        gradients = launch(
            f"{module}_kept", "linear_cross_entropy_backward_of_kept", *arguments, of_hidden=True, **options
        )
    return [*rows, *gradients]


@pytest.mark.parametrize("constants", [FUSED, SMALL, NO_ROOM], ids=["one-chunk", "chunks", "two-sweeps"])
def test_ignored_tokens_are_in_no_product(constants):
    """Wherever they stand and whatever their hidden states are, the bits are the same."""
    case = Case("", N_MORE - 10, 203, BLOCK + 32, BF16, ignored=0.4)
    hidden, weight, target = *case.tensors().values(), case.target()
    order = torch.argsort((target == IGNORED).int(), stable=True)
    apart = run(hidden[order], weight, target[order], constants)
    hidden[target == IGNORED] = math.nan
    among = run(hidden, weight, target, constants)
    for name, got, want in zip(("nll", "lse", "argmax", "dh", "dw"), among, apart, strict=True):
        got = got if name == "dw" else got[order]
        assert torch.isfinite(got).all() and torch.equal(got, want), name


@pytest.mark.parametrize("constants", [SMALL, NO_ROOM], ids=["chunks", "two-sweeps"])
def test_labels_that_are_none(constants):
    case = Case("", N_MORE - 10, 203, BLOCK + 32, BF16, ignored=0.3)
    hidden, weight, target = *case.tensors().values(), case.target()
    bad = torch.arange(case.N) % 13 == 4
    target[bad] = torch.tensor([203, -1, 2**40, -(2**40)]).repeat(8)[: int(bad.sum())]
    counted = ~bad & (target != IGNORED)
    options = {"class_weight": class_weights(203), "label_smoothing": 0.1}
    nll, lse, argmax, dh, dw = run(hidden, weight, target, constants, **options)
    for x in (nll, lse, dh):
        assert x[bad].isnan().all() and x[counted].isfinite().all() and (x[~bad & ~counted] == 0).all()
    assert (argmax[~counted] == -1).all() and dw.isnan().all()


def test_the_gradient_takes_the_memory_of_the_logits():
    case = Case("", 60, 203, 2 * BLOCK, BF16)
    place, size, gradient, shape = call(_places, *case.tensors().values(), case.target())
    assert place == gradient and shape == (203, case.E) and 203 * case.E <= size <= (203 + 15) * case.E


def _places(hidden, weight, target):
    options = {"class_weight": None, "ignore_index": IGNORED, "label_smoothing": 0.0}
    module = "loss.linear_cross_entropy"
    _, lse, _, kept = launch(module, "linear_cross_entropy_forward_keeping", hidden, weight, None, target, **options)
    ones = torch.ones(target.shape[0])
    arguments = (ones, ones.clone(), hidden, weight, target, lse, kept)
    _, gradient = launch(
        f"{module}_kept", "linear_cross_entropy_backward_of_kept", *arguments, of_hidden=False, **options
    )
    return kept.memory.data_ptr(), kept.memory.numel(), gradient.data_ptr(), tuple(gradient.shape)


# The plan: pure functions.

SIZES = (1, 100, 3000, 8192, 40_000), (1, 1000, 50_257, 262_144), (128, 576, 4096, 16_384)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_the_plan_keeps_to_its_memory(arch):
    planned = lent = 0
    for N, V, E in itertools.product(*SIZES):
        config = configs.linear_cross_entropy(arch, BF16, E, False)
        plan = plans.kept(N, V, E, BF16, True, config)
        if plan is None:
            continue
        planned += 1
        block = config.gradient.block_m
        assert plan.tokens % block == 0 and plan.tokens <= E and plan.tokens * plans.KEPT_SHARE >= N
        assert plan.classes % config.unit == 0 and plan.classes % plan.tile == 0
        # Every chunk's logits lie within its own rows of grad_weight; the last one's may reach a little beyond.
        assert plan.tokens * plan.classes <= plan.classes * E
        rest = plan.stop - plan.whole * plan.classes
        assert 0 <= rest < plan.classes and plan.whole * plan.classes * E + plan.tokens * rest <= plan.elements
        assert plan.elements - V * E <= 15 * E
        others = max(0, N - plan.tokens)
        if plan.stop < V:  # the rows of grad_weight behind hold lower halves, in whole blocks of tokens or all of them
            assert plan.stop % plan.classes == 0 and V - plan.stop <= plan.classes and plan.near <= V - plan.stop
            assert plan.near % block == 0 or plan.near == others
            lent += 1
        origins = -(-V // plan.tile) * plan.tokens * 4  # until grad_weight's chunks begin
        gradient = 2 * (plan.tokens + -(-others // block) * block) * plan.classes
        halves = 2 * (others - plan.near) * E if plan.classes < V else 0
        if 2 * others * E > plans.SUMS_BYTES:
            sweeps = plans.sweeps(others, V, E, 2, True, False, False, config, first=plan.tokens)
            (sweep,) = sweeps
            alone = sweep.tokens * sweep.classes * 2 + sum(sweep.lower_halves) * E * 2
            assert alone <= 64 << 20 and sweep.chunks[0][0] == plan.tokens
            assert plan.stop == V
            halves = 0
        assert max(origins, gradient + halves) <= 62 << 20, (N, V, E, plan)
    assert planned > 10 and lent > 3


def test_nothing_is_kept_where_rounding_would_show():
    for dtype, plain, E in ((torch.float16, True, 4096), (BF16, False, 4096), (BF16, True, 64)):
        config = configs.linear_cross_entropy("sm_90", dtype, E, not plain)
        assert plans.kept(8192, 32_000, E, dtype, plain, config) is None


def test_chunks_fill_the_multiprocessors():
    """128 classes of 256 features are a tile: 24 x 16 in three waves of 132 multiprocessors, not 26 x 16."""
    config = configs.linear_cross_entropy("sm_90", BF16, 4096, False)
    plan = plans.kept(8192, 128_256, 4096, BF16, True, config)
    assert plan is not None and (plan.tokens, plan.classes) == (4096, 3072)
