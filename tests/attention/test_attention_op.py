"""The attention op as a citizen of PyTorch: registration, compilation, threads, NaN, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_cases import BF16, FP32, ISAS, Case, causal, everything
from attention_cases import poisoned as poisoned  # a fixture
from torch import library as torch_library

import gpt4v_fast as gf
from gpt4v_fast import reference
from gpt4v_fast.backends import call_of

OPS = torch.ops.gpt4v_fast

REGISTERED = [
    Case("plain", 5, 6, H=4, Hkv=2, D=8),
    Case("bf16-causal", 5, 6, D=8, Dv=12, dtype=BF16, mask=causal),
    Case("all", 9, 9, B=2, H=4, Hkv=2, D=8, bias=(4, 9, 9), alibi="H", sinks=True, softcap=3.0, mask=everything),
    Case("boolean-bias", 4, 7, bias=(4, 7), bias_dtype=torch.bool),
]


@pytest.mark.parametrize("case", REGISTERED, ids=lambda case: case.name)
def test_opcheck(case):
    tensors = {name: x.requires_grad_(name in case.gradients) for name, x in case.tensors().items()}
    options = case.options()
    options.pop("return_lse")
    torch_library.opcheck(OPS.attention.default, call_of(gf.attention, **tensors, **options))


@pytest.mark.parametrize("case", REGISTERED, ids=lambda case: case.name)
def test_opcheck_of_the_backward(case):
    options = case.options()
    options.pop("return_lse")
    call = call_of(gf.attention, **case.tensors(), **options)
    out, lse = OPS.attention(*call)
    wanted = (True, True, True, "bias" in case.gradients, "sinks" in case.gradients)
    for dlse in (None, torch.ones_like(lse)):
        arguments = (torch.ones_like(out), dlse, *call, out, lse, *wanted)
        torch_library.opcheck(OPS.attention_backward.default, arguments)


@pytest.mark.parametrize("case", REGISTERED, ids=lambda case: case.name)
def test_compiles_without_a_graph_break(case):
    tensors = {name: x.requires_grad_(name in case.gradients) for name, x in case.tensors().items()}
    options = case.options()

    def run(**tensors: torch.Tensor) -> torch.Tensor:
        out, lse = gf.attention(**tensors, **options)
        return out.float().square().sum() + torch.where(lse.isinf(), 0.0, lse).sum()

    leaves = [tensors[name] for name in case.gradients]
    eager = run(**tensors)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(**tensors)
    assert torch.equal(eager, compiled)
    for a, b in zip(torch.autograd.grad(eager, leaves), torch.autograd.grad(compiled, leaves), strict=True):
        assert torch.equal(a, b)


def test_dropout_under_compile_draws_a_new_seed_each_call():
    q, k, v = (torch.randn(1, 2, 20, 8) for _ in range(3))
    compiled = torch.compile(lambda: gf.attention(q, k, v, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    first, second = compiled(), compiled()
    torch.manual_seed(0)
    assert torch.equal(first, compiled()) and not torch.equal(first, second)


def test_the_backward_leaves_out_a_bias_gradient_that_nobody_needs():
    """A mask in the form of a bias: its gradient would cost two more products."""
    call = call_of(gf.attention, **Case("", 9, 9, bias=(9, 9)).tensors())
    out, lse = OPS.attention(*call)
    with_dbias, without = (
        OPS.attention_backward(torch.ones_like(out), None, *call, out, lse, True, True, True, needed, False)
        for needed in (True, False)
    )
    assert with_dbias[3].shape == (1, 1, 9, 9) and without[3].numel() == 0
    assert all(torch.equal(a, b) for a, b in zip(with_dbias[:3], without[:3], strict=True))


THREADED = [
    Case("few-heads", 300, 300, H=2, Hkv=1, D=24, mask=causal, bias=(300, 300), sinks=True),
    Case("many-heads", 70, 130, B=4, H=6, D=16, dtype=BF16, bias=(1, 6, 1, 1), sinks=True),
]
DECODED = Case("decoded", 1, 4000, B=2, H=8, Hkv=2, D=64, mask=causal, sinks=True)


def bits_of(case, isa, threads):
    """The outputs and gradients of one call."""
    torch.set_num_threads(threads)
    tensors = {name: x.requires_grad_(name in case.gradients) for name, x in case.tensors().items()}
    torch.manual_seed(0)
    with gf.force(isa=isa):
        out, lse = gf.attention(**tensors, **case.options(), dropout_p=0.2)
        leaves = [tensors[name] for name in case.gradients]
        upstream = [torch.ones_like(out), torch.where(lse.isinf(), 0.0, 1.0)]
        return [out, lse, *torch.autograd.grad([out, lse], leaves, upstream)]


@pytest.fixture
def any_number_of_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", THREADED, ids=lambda case: case.name)
def test_bitwise_the_same_for_any_number_of_threads(case, isa, poisoned, any_number_of_threads):
    first = bits_of(case, isa, 1)
    for threads in (1, 2, 3, 8):
        assert all(torch.equal(a, b) for a, b in zip(first, bits_of(case, isa, threads), strict=True)), threads


@pytest.mark.parametrize("case", [*THREADED, DECODED], ids=lambda case: case.name)
def test_bitwise_the_same_over_200_runs(case, poisoned, any_number_of_threads):
    first = bits_of(case, ISAS[-1], 1)
    for run in range(200):
        again = bits_of(case, ISAS[-1], (1, 2, 3, 8)[run % 4])
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), run


# NaN and infinity.


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_what_is_not_finite_shows_in_every_row_that_sees_it(name, value, isa):
    tensors = Case("", 70, 140).tensors()
    tensors[name][0, 1, 66, 3] = value
    with gf.force(isa=isa):
        out, lse = gf.attention(**tensors, return_lse=True)
    want, want_lse = reference.attention(**{n: x.double() for n, x in tensors.items()}, return_lse=True)
    native, native_lse = reference.attention(**tensors, return_lse=True)
    torch.testing.assert_close(out.isfinite(), want.isfinite() & native.isfinite())
    torch.testing.assert_close(lse.isfinite(), want_lse.isfinite() & native_lse.isfinite())
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("isa", ISAS)
def test_the_gradients_of_a_nan_are_those_of_the_oracle(isa):
    grads = []
    for run in (gf.attention, reference.attention):
        tensors = Case("", 70, 140).tensors()
        tensors["q"][0, 1, 66, 3] = math.nan
        leaves = [x.requires_grad_() for x in tensors.values()]
        with gf.force(isa=isa):
            grads.append(torch.autograd.grad(run(**tensors).sum(), leaves))
    for fast, want in zip(*grads, strict=True):
        torch.testing.assert_close(fast.isnan(), want.isnan())


@pytest.mark.parametrize("isa", ISAS)
def test_a_nan_query_leaves_the_other_rows_alone(isa):
    tensors = Case("", 70, 140, mask=causal).tensors()
    clean = gf.attention(**tensors)
    tensors["q"][0, 0, 5] = math.nan
    with gf.force(isa=isa):
        out = gf.attention(**tensors)
    assert out[0, 0, 5].isnan().all()
    out[0, 0, 5] = clean[0, 0, 5]
    torch.testing.assert_close(out, clean)


@pytest.mark.parametrize("run", [gf.attention, reference.attention], ids=["kernel", "oracle"])
def test_keys_past_their_length_are_not_read(run):
    case = Case("", 30, 100, B=2, H=4, Hkv=2)
    mask = gf.Mask(key_lengths=torch.tensor([37, 0]))
    tensors = case.tensors()
    clean = run(**tensors, mask=mask)
    for name in ("k", "v"):
        tensors[name][0, :, 37:] = math.nan
        tensors[name][1] = math.inf
    leaves = [x.requires_grad_() for x in tensors.values()]
    out = run(**tensors, mask=mask)
    assert torch.equal(out, clean)
    for gradient in torch.autograd.grad(out.square().sum(), leaves):
        assert torch.isfinite(gradient).all()


# Choice of kernel, dtypes around the op.


def test_explain_names_the_kernel_and_the_isa():
    tensors = Case("", 5, 5).tensors()
    for isa in ISAS:
        with gf.force(isa=isa):
            choice = gf.explain(gf.attention, **tensors, dropout_p=0.1, softcap=2.0)
            assert choice.backend == "cpu" and isa in choice.on and not choice.is_fallback
    with gf.force(backend="reference"):
        assert gf.explain(gf.attention, **tensors).backend == "reference"


def test_the_reference_backend_gives_the_same_numbers_and_gradients():
    case = REGISTERED[2]
    results = []
    for backend in ("cpu", "reference"):
        tensors = {name: x.requires_grad_(name in case.gradients) for name, x in case.tensors().items()}
        with gf.force(backend=backend):
            out = gf.attention(**tensors, mask=case.options()["mask"])
            results.append([out, *torch.autograd.grad(out.sum(), [tensors[name] for name in case.gradients])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_strict_mode_takes_every_feature_on_the_cpu():
    case = REGISTERED[2]
    with gf.strict():
        out, _ = gf.attention(**case.tensors(), **case.options(), dropout_p=0.1)
    assert torch.isfinite(out).all()


def test_autocast_computes_in_its_dtype():
    tensors = Case("", 9, 9).tensors()
    with torch.autocast("cpu", dtype=BF16):
        out = gf.attention(**tensors)
    assert out.dtype == BF16
    assert torch.equal(out, gf.attention(**{name: x.to(BF16) for name, x in tensors.items()}))


def test_the_default_scale_and_no_options():
    tensors = Case("", 9, 9, D=25).tensors()
    assert torch.equal(gf.attention(**tensors), gf.attention(**tensors, scale=0.2, mask=gf.Mask(), dropout_p=0.0))


# Refusals: the error names the argument, what was expected and what came.

Q, KV = (2, 4, 6, 8), (2, 2, 7, 8)


def ones(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


REFUSED: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("q-list", {"q": [1.0]}, TypeError, "q: expected a torch.Tensor, got list"),
    ("q-3d", {"q": ones(4, 6, 8)}, ValueError, r"q: expected 4 dimensions, got shape \(4, 6, 8\)"),
    ("q-int", {"q": ones(*Q, dtype=torch.int32)}, TypeError, "q: expected dtype float32, bfloat16, float16, got int32"),
    ("q-double", {"q": ones(*Q).double()}, TypeError, "q: expected dtype .*, got float64"),
    ("k-dtype", {"k": ones(*KV, dtype=BF16)}, TypeError, "k: expected q's dtype float32, got bfloat16"),
    ("k-device", {"k": torch.ones(KV, device="meta")}, ValueError, "k: expected q's device cpu, got meta"),
    ("k-heads", {"k": ones(2, 3, 7, 8)}, ValueError, "k: expected a number of heads that divides q's 4, got 3"),
    ("k-no-heads", {"k": ones(2, 0, 7, 8)}, ValueError, "k: expected a number of heads that divides q's 4, got 0"),
    ("k-size", {"k": ones(2, 2, 7, 9)}, ValueError, r"k: expected shape .* \(2, 2, 7, 8\), got \(2, 2, 7, 9\)"),
    ("k-batch", {"k": ones(1, 2, 7, 8)}, ValueError, r"k: expected shape .* \(2, 2, 7, 8\), got \(1, 2, 7, 8\)"),
    ("v-tokens", {"v": ones(2, 2, 8, 8)}, ValueError, r"v: expected shape .* \(2, 2, 7, 8\), got \(2, 2, 8, 8\)"),
    ("mask-tensor", {"mask": ones(6, 7) > 0}, TypeError, r"mask: expected a gpt4v_fast.Mask .*, got Tensor"),
    ("bias-shape", {"bias": ones(3, 6, 7)}, ValueError, r"bias: .* \(2, 4, 6, 7\), got \(3, 6, 7\)"),
    ("bias-5d", {"bias": ones(1, 1, 1, 6, 7)}, ValueError, "bias: expected a shape broadcastable"),
    ("bias-int", {"bias": ones(6, 7, dtype=torch.int64)}, TypeError, "bias: expected dtype .*, got int64"),
    (
        "alibi-shape",
        {"alibi_slopes": ones(2)},
        ValueError,
        r"alibi_slopes: expected shape \(4,\) or \(2, 4\), got \(2,\)",
    ),
    ("alibi-grad", {"alibi_slopes": ones(4).requires_grad_()}, ValueError, "alibi_slopes: .* needs no gradient"),
    ("sinks-shape", {"sinks": ones(2)}, ValueError, r"sinks: expected shape .*\(4,\), got \(2,\)"),
    (
        "softcap-0",
        {"softcap": 0.0},
        ValueError,
        "softcap: expected None or a finite number > 0 that fp32 holds, got 0.0",
    ),
    ("softcap-nan", {"softcap": math.nan}, ValueError, "softcap: .* got nan"),
    ("scale-inf", {"scale": math.inf}, ValueError, "scale: expected a finite number that fp32 holds, got inf"),
    (
        "dropout-1",
        {"dropout_p": 1.0},
        ValueError,
        r"dropout_p: expected a probability in \[0, 1\), in fp32 too, got 1.0",
    ),
    ("dropout-negative", {"dropout_p": -0.1}, ValueError, "dropout_p: .* got -0.1"),
    (
        "documents-one-for-both",
        {"mask": gf.Mask(documents=ones(2, 6, dtype=torch.int32))},
        ValueError,
        r"documents: expected a pair .* S = 6 and T = 7 differ",
    ),
    (
        "images-shape",
        {"mask": gf.Mask(image_blocks=(ones(2, 6, dtype=torch.int32), ones(2, 6, dtype=torch.int32)))},
        ValueError,
        r"image_blocks\[1\] \(of keys\): expected shape \(2, 7\), got \(2, 6\)",
    ),
    (
        "lengths-shape",
        {"mask": gf.Mask(key_lengths=ones(3, dtype=torch.int32))},
        ValueError,
        r"key_lengths: expected shape \(2,\), got \(3,\)",
    ),
]


@pytest.mark.parametrize(("bad", "error", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_bad_input_is_refused(bad, error, message):
    good = {"q": ones(*Q), "k": ones(*KV), "v": ones(*KV)}
    gf.attention(**good)
    with pytest.raises(error, match=message):
        gf.attention(**{**good, **bad})
    with pytest.raises(error, match=message):
        gf.explain(gf.attention, **{**good, **bad})
