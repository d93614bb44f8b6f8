"""What attention_kvcache refuses, by name and before it writes anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import poisoned as poisoned  # a fixture
from kvcache_cases import Cached

import gpt4v_fast as gf
from gpt4v_fast._native import _C
from gpt4v_fast.ops.attention.kvcache import KvCacheCall

pytestmark = pytest.mark.usefixtures("poisoned")

GOOD = Cached("good", (5, 9), S=2, new=2, capacity=16, rotary=8)
PAGED = Cached("paged", (5, 9), S=2, new=2, capacity=16, rotary=8, page=4)

REFUSED: list[tuple[str, Cached, dict[str, Any], type[Exception], str]] = [
    ("q-3d", GOOD, {"q": torch.ones(2, 4, 16)}, ValueError, "q: expected 4 dimensions"),
    ("cache-dtype", GOOD, {"k_cache": torch.ones(2, 16, 2, 16).half()}, TypeError, "k_cache: expected q's dtype"),
    ("cache-heads", GOOD, {"k_cache": torch.ones(2, 16, 3, 16)}, ValueError, "k_cache: .* divides q's 4, got 3"),
    ("cache-size", GOOD, {"k_cache": torch.ones(2, 16, 2, 15)}, ValueError, r"k_cache: expected shape .* got"),
    ("caches-differ", GOOD, {"v_cache": torch.ones(2, 17, 2, 16)}, ValueError, "v_cache: expected shape .* got"),
    ("lengths-float", GOOD, {"cache_lengths": torch.ones(2)}, TypeError, "cache_lengths: expected dtype int32"),
    ("lengths-shape", GOOD, {"cache_lengths": torch.ones(3).int()}, ValueError, r"cache_lengths: .*\(2,\), got \(3,\)"),
    ("length-over", GOOD, {"cache_lengths": torch.tensor([5, 15])}, ValueError,
     r"cache_lengths: .* 1 in \[0, 14\].*got 15"),
    ("length-negative", GOOD, {"cache_lengths": torch.tensor([-1, 3])}, ValueError, r"cache_lengths: .* got -1"),
    ("k-without-v", GOOD, {"v": None}, ValueError, "v: expected a tensor, since k is given, got None"),
    ("k-shape", GOOD, {"k": torch.ones(2, 2, 2, 15)}, ValueError, "k: expected shape"),
    ("v-tokens", GOOD, {"v": torch.ones(2, 3, 2, 16)}, ValueError, r"v: expected shape .* got \(2, 3, 2, 16\)"),
    ("cos-without-sin", GOOD, {"rotary_sin": None}, ValueError, "rotary_sin: expected a tensor"),
    ("cos-too-wide", GOOD, {"rotary_cos": torch.ones(16, 9), "rotary_sin": torch.ones(16, 9)}, ValueError,
     "rotary_cos: expected at most D / 2 = 8 columns, got 9"),
    ("cos-too-short", GOOD, {"rotary_cos": torch.ones(10, 4), "rotary_sin": torch.ones(10, 4)}, ValueError,
     "rotary_cos: expected at least 11 positions for entry 1, got 10"),
    ("window", GOOD, {"window": (-2, 0)}, ValueError, "window: .* got"),
    ("softcap", GOOD, {"softcap": -1.0}, ValueError, "softcap: .* got -1.0"),
    ("sinks", GOOD, {"sinks": torch.ones(3)}, ValueError, r"sinks: .*\(4,\), got \(3,\)"),
    ("table-float", PAGED, {"block_table": torch.ones(2, 4)}, TypeError, "block_table: expected dtype int32"),
    ("table-rows", PAGED, {"block_table": torch.ones(3, 4).int()}, ValueError, "block_table: expected shape"),
    ("table-past-the-pool", PAGED, {"block_table": torch.full((2, 4), 99).int()}, ValueError,
     r"block_table: expected pages in \[0, 11\), got 99 at \(0, 0\)"),
    ("table-negative", PAGED, {"block_table": torch.full((2, 4), -1).int()}, ValueError, "block_table: .* got -1"),
    ("table-64-bit", PAGED, {"block_table": torch.full((2, 4), 2**32)}, ValueError, "block_table: expected pages in"),
    ("tables-float64", GOOD, {"rotary_cos": torch.ones(16, 4).double(), "rotary_sin": torch.ones(16, 4).double()},
     TypeError, "rotary_cos: expected dtype"),
    ("lengths-under-queries", GOOD, {"cache_lengths": torch.tensor([5, 0]), "q": torch.ones(2, 3, 4, 16)}, ValueError,
     "cache_lengths: expected at least 3 tokens in entry 1 to rotate q, got 2"),
    ("table-too-short", PAGED, {"block_table": torch.zeros(2, 2).int()}, ValueError,
     "cache_lengths: .* holds 8 tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "bad", "error", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_bad_input_is_refused_and_the_caches_are_untouched(case, bad, error, message):
    gf.attention_kvcache(**case.tensors())
    call = {**case.tensors(), **bad}
    before = {name: call[name].clone() for name in ("k_cache", "v_cache")}
    with pytest.raises(error, match=message):
        gf.attention_kvcache(**call)
    assert all(torch.equal(call[name], cache) for name, cache in before.items())


def test_a_cache_whose_elements_share_memory_is_refused():
    tensors = Cached("", (5, 9), new=1).tensors()
    tensors["k_cache"] = tensors["k_cache"][:1].expand(2, -1, -1, -1)
    before = tensors["k_cache"].clone()
    with pytest.raises(ValueError, match="k_cache and v_cache: expected a place of its own for every element"):
        gf.attention_kvcache(**tensors)
    assert torch.equal(tensors["k_cache"], before)
    del tensors["k"], tensors["v"]
    assert torch.isfinite(gf.attention_kvcache(**tensors)).all()


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("cache_lengths", torch.tensor([5, 16], dtype=torch.int32)),
        ("block_table", torch.full((2, 4), 11, dtype=torch.int32)),
        ("rotary_cos", torch.ones(9, 4)),
        ("k", torch.ones(2, 1, 2, 15)),
        ("sinks", torch.ones(5)),
        ("q", torch.ones(2, 4, 16)),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_the_binding_refuses_what_would_leave_the_tensors(name, bad):
    tensors = {"sinks": None, **Cached("", (5, 9), new=1, page=4, capacity=16, rotary=8).tensors(), name: bad}
    if name == "rotary_cos":
        tensors["rotary_sin"] = bad
    before = tensors["k_cache"].clone()
    outputs = torch.empty(2, 1, 4, 16), torch.empty(2, 4, 1)
    with pytest.raises(ValueError, match="expected"):
        _C.attention_kvcache(KvCacheCall(**tensors, causal=True), *outputs, 1)
    assert torch.equal(tensors["k_cache"], before)
