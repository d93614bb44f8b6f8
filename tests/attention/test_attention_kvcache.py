"""Attention against a key/value cache: against the oracle, against the dense op, in-place appends."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_cases import BF16, DTYPES, FP16, FP32, ISAS, operand_bits
from attention_cases import poisoned as poisoned  # a fixture
from closeness import compare
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kvcache_cases import Cached
from random_rounding import BITS, held
from torch import library as torch_library

import gpt4v_fast as gf
from gpt4v_fast import reference
from gpt4v_fast.backends import call_of

pytestmark = pytest.mark.usefixtures("poisoned")


CASES = [
    Cached("decode", (70, 1, 129)),
    Cached("decode-append", (70, 0, 129), new=1),
    Cached("decode-append-bf16-gqa", (70, 0, 129), new=1, H=8, Hkv=2, D=64, Dv=64, dtype=BF16),
    Cached("prefill", (0, 0), S=70, new=70),
    Cached("prefill-onto-a-prefix", (33, 5), S=20, new=20, dtype=FP16),
    Cached("empty-cache", (0, 3)),
    Cached("no-batch", ()),
    Cached("no-queries", (5,), S=0),
    Cached("full-cache", (149,), new=1),
    Cached("more-queries-than-tokens", (3, 40), S=10),
    Cached("more-queries-than-new", (40, 9), S=5, new=2),
    Cached("not-causal", (40, 9), S=5, causal=False),
    Cached("window", (140, 9), S=5, new=5, window=(20, None)),
    Cached("softcap-sinks", (40, 9), S=3, softcap=2.0, sinks=True),
    Cached("wide-v", (40, 70), D=8, Dv=72),
    Cached("rotary-half", (40, 9), S=4, new=4, rotary=8),
    Cached("rotary-all", (40, 9), S=4, new=4, rotary=16),
    Cached("rotary-queries-only", (40, 9), S=4, rotary=16),
    Cached("rotary-interleaved", (40, 9), S=4, new=4, rotary=16, interleaved=True),
    Cached("rotary-interleaved-part", (40, 0), S=2, new=2, D=17, rotary=10, interleaved=True, dtype=FP16),
    Cached("rotary-tables-bf16", (40, 9), S=4, new=4, rotary=14, tables=BF16),
    Cached("rotary-more-new-than-queries", (40, 9), S=2, new=5, rotary=16, dtype=BF16),
    Cached("paged", (70, 1, 129), page=16),
    Cached("paged-prefill", (0, 33, 7), S=40, new=40, H=6, page=7, rotary=16, sinks=True),
    Cached("paged-prefill-page-1", (5, 0), S=19, new=19, page=1, D=24, Dv=40, dtype=BF16),
    Cached(
        "paged-prefill-page-256", (250, 3), S=20, new=20, page=256, capacity=300, dtype=FP16, interleaved=True, rotary=8
    ),
    Cached("paged-prefill-window", (140, 90), S=20, page=16, capacity=150, window=(30, None), softcap=3.0),
    Cached("paged-prefill-not-causal", (140, 90), S=20, page=16, causal=False, window=(60, 10)),
    Cached("paged-append", (15, 16, 31), S=20, new=20, page=16, capacity=64),
    Cached("paged-odd-rotary-bf16", (15, 0), S=7, new=7, page=5, capacity=30, rotary=16, dtype=BF16),
]


def check(case: Cached, isa: str | None = None) -> None:
    def fast(**tensors: torch.Tensor) -> Any:
        tensors["k_cache"], tensors["v_cache"] = tensors["k_cache"].clone(), tensors["v_cache"].clone()
        return (*gf.attention_kvcache(**tensors, **case.options()), tensors["k_cache"], tensors["v_cache"])

    def oracle(**tensors: torch.Tensor) -> Any:
        tensors["k_cache"], tensors["v_cache"] = tensors["k_cache"].clone(), tensors["v_cache"].clone()
        results = reference.attention_kvcache(**rotated(case, **tensors), **case.options())
        return (*results, tensors["k_cache"], tensors["v_cache"])

    names = ("out", "lse", "k_cache", "v_cache")
    with gf.force(isa=isa, backend="cpu"):
        bits = operand_bits(case.dtype)
        compare(fast, oracle, case.tensors(), native_dtype=FP32, output_names=names, operands=bits)


def rotated(case: Cached, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    """The arguments with q and k rotated beforehand, and held, as the kernel holds them, in the case's dtype."""
    if not case.rotary:
        return tensors
    tables = tensors.pop("rotary_cos"), tensors.pop("rotary_sin")
    lengths = tensors["cache_lengths"].long()
    first = {"q": lengths + case.new - case.S, **({"k": lengths} if case.new else {})}
    for name, position in first.items():
        tensors[name] = held(reference.rotate(tensors[name], *tables, position, case.interleaved), BITS[case.dtype])
    return tensors


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_out_lse_and_caches_match_the_oracle(case, isa):
    check(case, isa)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_combinations_match_the_oracle(data):
    draw = data.draw
    new, rotary, dtype = draw(st.integers(0, 5)), 2 * draw(st.integers(0, 4)), draw(st.sampled_from(DTYPES))
    S = draw(st.integers(0, 6) | st.integers(7, 24))
    least = max(0, S - new) if rotary else 0
    Hkv, page = draw(st.integers(1, 2)), draw(st.sampled_from([0, 1, 7, 16]))
    side = st.none() | st.integers(0, 80)
    case = Cached(
        "drawn",
        tuple(draw(st.lists(st.integers(least, 90), max_size=3))),
        S=S,
        new=new,
        H=Hkv * draw(st.integers(1, 3)),
        Hkv=Hkv,
        D=draw(st.integers(8, 20)),
        Dv=draw(st.integers(1, 20)),
        capacity=96,
        page=page,
        rotary=rotary,
        interleaved=draw(st.booleans()),
        tables=draw(st.sampled_from(DTYPES)),
        sinks=draw(st.booleans()),
        dtype=dtype,
        causal=draw(st.booleans()),
        window=draw(st.none() | st.tuples(side, side)),
        softcap=draw(st.sampled_from([None, 3.0])),
    )
    check(case, draw(st.sampled_from(ISAS)))


def test_decoding_token_by_token_is_causal_attention():
    B, S, H, Hkv, D = 2, 70, 4, 2, 16
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, S, h, D, generator=generator) for h in (H, Hkv, Hkv))
    want = gf.attention(*(x.transpose(1, 2) for x in (q, k, v)), mask=gf.Mask(causal=True)).transpose(1, 2)
    caches = [torch.full((B, S + 3, Hkv, D), math.nan) for _ in range(2)]
    for t in range(S):
        step = slice(t, t + 1)
        out = gf.attention_kvcache(q[:, step], *caches, torch.full((B,), t), k=k[:, step], v=v[:, step])
        torch.testing.assert_close(out, want[:, step], rtol=1e-5, atol=1e-5)
    assert torch.equal(caches[0][:, :S], k) and torch.equal(caches[1][:, :S], v)
    assert caches[0][:, S:].isnan().all() and caches[1][:, S:].isnan().all()


def spread(x: torch.Tensor, order: tuple[int, ...], step: int) -> torch.Tensor:
    """x with its dimensions in memory in `order`, and `step` elements from one to the next of the last."""
    buffer = torch.full([*(x.shape[i] for i in order), step], 77, dtype=x.dtype)
    y = buffer[..., 0].permute(*(order.index(i) for i in range(x.dim())))
    return y.copy_(x)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["decode-append-bf16-gqa", "rotary-half", "rotary-interleaved-part", "prefill",
                                  "paged-append", "paged-prefill", "paged-odd-rotary-bf16"])  # fmt: skip
@pytest.mark.parametrize(("order", "step"), [((0, 2, 1, 3), 1), ((3, 1, 0, 2), 1), ((0, 1, 2, 3), 3)], ids=str)
def test_any_strides(order, step, name, isa):
    case = next(case for case in CASES if case.name == name)
    tensors, strided = case.tensors(), case.tensors()
    for x in ("q", "k", "v", "k_cache", "v_cache"):
        strided[x] = spread(strided[x], order, step)
    for x in ("rotary_cos", "rotary_sin"):
        if x in strided:
            strided[x] = spread(strided[x], (1, 0), step)
    strided["cache_lengths"] = spread(strided["cache_lengths"], (0,), 2)
    with gf.force(isa=isa):
        want, got = (gf.attention_kvcache(**t, **case.options()) for t in (tensors, strided))
    tolerance = {FP32: 1e-6, BF16: 2**-7, FP16: 2**-10}[case.dtype]
    torch.testing.assert_close(got[0], want[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=1e-5)
    assert torch.equal(strided["k_cache"], tensors["k_cache"]) and torch.equal(strided["v_cache"], tensors["v_cache"])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_new_keys_are_rounded_once(dtype, interleaved, isa):
    case = Cached("", (3, 60), S=9, new=9, D=70, rotary=66, dtype=dtype, interleaved=interleaved)
    tensors = case.tensors()
    lengths = tensors["cache_lengths"].long()
    tables = [tensors[name].double() for name in ("rotary_cos", "rotary_sin")]
    exact = reference.rotate(tensors["k"].double(), *tables, lengths, interleaved)
    with gf.force(isa=isa):
        gf.attention_kvcache(**tensors, **case.options())
    half_ulp = {FP32: 2**-23, BF16: 2**-8, FP16: 2**-11}[dtype]  # fp32: of the sum and of each product
    for b, length in enumerate(case.lengths):
        got = tensors["k_cache"][b, length : length + 9].double()
        assert ((got - exact[b]).abs() <= 1.001 * half_ulp * exact[b].abs() + 2**-22).all()
        assert torch.equal(got[..., 66:], tensors["k"][b, ..., 66:].double())
        assert torch.equal(tensors["v_cache"][b, length : length + 9], tensors["v"][b])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("page", [0, 16])
@pytest.mark.parametrize("S", [2, 150])
def test_bitwise_the_same_for_any_number_of_threads(S, page, isa):
    """Few rows and many, with enough to rotate and write for a team."""
    before, results = torch.get_num_threads(), []
    case = Cached("", (300, 0, 77), S=S, new=150, D=64, Dv=72, capacity=450, page=page, rotary=64, dtype=BF16)
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            tensors = case.tensors()
            with gf.force(isa=isa):
                out, lse = gf.attention_kvcache(**tensors, **case.options())
            results.append((out, lse, tensors["k_cache"], tensors["v_cache"]))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_written_cache_counts_as_changed():
    tensors = Cached("", (5,), new=1).tensors()
    versions = [tensors[name]._version for name in ("k_cache", "v_cache", "q")]
    gf.attention_kvcache(**tensors)
    assert [tensors[name]._version for name in ("k_cache", "v_cache", "q")] == [
        versions[0] + 1,
        versions[1] + 1,
        versions[2],
    ]


def test_pages_are_the_dense_cache_in_another_order():
    case = next(case for case in CASES if case.name == "paged")
    paged = case.tensors()
    dense = dict(paged)
    table = dense.pop("block_table")
    for name in ("k_cache", "v_cache"):
        dense[name] = paged[name][table.long()].flatten(1, 2)
    assert torch.equal(gf.attention_kvcache(**paged), gf.attention_kvcache(**dense))


def test_pages_behind_the_last_token_may_be_anything():
    case = next(case for case in CASES if case.name == "paged")
    tensors = case.tensors()
    want = gf.attention_kvcache(**tensors)
    for b, length in enumerate(case.lengths):
        used = -(-length // case.page)
        tensors["block_table"][b, used:] = torch.tensor([-1, 10**6]).repeat(99)[
            : tensors["block_table"].shape[1] - used
        ]
    assert torch.equal(gf.attention_kvcache(**tensors), want)
    assert torch.equal(reference.attention_kvcache(**tensors), reference.attention_kvcache(**case.tensors()))


@pytest.mark.parametrize("run", [gf.attention_kvcache, reference.attention_kvcache], ids=["kernel", "oracle"])
def test_what_lies_behind_the_last_token_is_not_read(run):
    tensors = Cached("", (70, 0), S=3).tensors()
    want = run(**tensors)
    for name in ("k_cache", "v_cache"):
        tensors[name][0, 70:] = math.nan
        tensors[name][1] = math.inf
    assert torch.equal(run(**tensors), want)
    assert (want[1] == 0).all()


@pytest.mark.parametrize("name", ["decode-append", "paged-append", "rotary-all"])
def test_opcheck(name):
    case = next(case for case in CASES if case.name == name)
    tensors = case.tensors()
    arguments = call_of(gf.attention_kvcache, **tensors, causal=True)
    torch_library.opcheck(
        torch.ops.gpt4v_fast.attention_kvcache.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_compiles_without_a_graph_break_and_still_writes_the_cache():
    case = next(case for case in CASES if case.name == "decode-append")

    def run(**tensors: torch.Tensor) -> torch.Tensor:
        return gf.attention_kvcache(**tensors, causal=True)

    one, other = case.tensors(), case.tensors()
    assert torch.equal(run(**one), torch.compile(run, fullgraph=True, backend="aot_eager")(**other))
    assert torch.equal(one["k_cache"], other["k_cache"]) and torch.equal(one["v_cache"], other["v_cache"])
    assert not torch.equal(one["k_cache"], case.tensors()["k_cache"])


def test_explain_names_the_kernel():
    tensors = next(case for case in CASES if case.name == "decode").tensors()
    assert gf.explain(gf.attention_kvcache, **tensors).backend == "cpu"


def test_a_call_that_needs_gradients_is_refused():
    tensors = Cached("", (5,)).tensors()
    tensors["q"].requires_grad_()
    with pytest.raises(ValueError, match="q: expected a tensor that needs no gradient"):
        gf.attention_kvcache(**tensors)
    with torch.no_grad():
        assert torch.isfinite(gf.attention_kvcache(**tensors)).all()


@pytest.mark.parametrize("name", ["rotary-interleaved-part", "paged-odd-rotary-bf16", "window", "softcap-sinks"])
def test_the_reference_backend_gives_the_same(name):
    case = next(case for case in CASES if case.name == name)
    tensors, forced = case.tensors(), case.tensors()
    out, lse = gf.attention_kvcache(**tensors, **case.options())
    with gf.force(backend="reference"):
        want, want_lse = gf.attention_kvcache(**forced, **case.options())
    tolerance = {FP32: 1e-5, BF16: 2**-6, FP16: 2**-9}[case.dtype]
    torch.testing.assert_close(out, want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, want_lse, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(tensors["k_cache"], forced["k_cache"], rtol=tolerance, atol=1e-6)
    assert torch.equal(tensors["v_cache"], forced["v_cache"]) and out.stride() == want.stride()
