"""Ids, lengths, starts and pages in int64, beyond what int32 holds: exact or refused, never wrapped."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gpt4v_fast as gf

WIDE = [2**32, 2**31, -(2**31) - 1, -(2**32) + 1, 2**63 - 1, -(2**63)]  # the first and the fourth wrap to 0 and 1
BACKENDS = ["cpu", "reference"]


def qkv(S: int, T: int, *, requires_grad: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(2, 2, n, 8, generator=generator).requires_grad_(requires_grad) for n in (S, T, T)]


def narrow(ids: torch.Tensor) -> torch.Tensor:
    """The same ids by small numbers: negative ones stay negative, equal ones equal."""
    numbers = {number: place for place, number in enumerate(sorted(set(ids.flatten().tolist()) | {0}))}
    below = numbers[0]
    return torch.tensor([[numbers[x] - below for x in row] for row in ids.tolist()], dtype=torch.int32)


def wide_ids(wide: int, n: int) -> torch.Tensor:
    """Rows of ids, the wide one beside those that it would wrap to."""
    ids = torch.tensor([[0, 1, wide, wide, 1, 0, wide], [wide, 0, 0, 7, wide, -1, 1]])
    return ids[:, :n]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("argument", ["documents", "image_blocks"])
@pytest.mark.parametrize("wide", WIDE)
def test_ids_are_exact_forward_and_backward(argument, wide, backend):
    ids = wide_ids(wide, 7)
    leaves = qkv(7, 7, requires_grad=True)
    found = []
    with gf.force(backend=backend):
        for tensor in (ids, narrow(ids)):
            out = gf.attention(*leaves, mask=gf.Mask(causal=argument == "image_blocks", **{argument: tensor}))
            found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("argument", ["documents", "image_blocks"])
@pytest.mark.parametrize("wide", WIDE)
def test_ids_of_queries_and_of_keys_are_told_apart_together(argument, wide):
    """Wide on one side only, of two dtypes, strided; against the definition."""
    queries = wide_ids(wide, 4)
    keys = torch.tensor([[1, 0, 0, 1, 7, -1], [7, 1, 0, -1, 0, 1]], dtype=torch.int32)
    keys = torch.stack([keys, keys], dim=-1)[..., 0]
    mask = gf.Mask(causal=argument == "image_blocks", **{argument: (queries, keys)})
    q, k, v = qkv(4, 6)
    got = gf.attention(q, k, v, mask=mask)
    with gf.force(backend="reference"):
        want = gf.attention(q, k, v, bias=mask.dense(4, 6))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert mask.dense(4, 6).any()


@pytest.mark.parametrize("wide", WIDE)
def test_key_lengths_are_refused(wide):
    q, k, v = qkv(3, 5)
    mask = gf.Mask(key_lengths=torch.tensor([5, wide]))
    with pytest.raises(ValueError, match=rf"key_lengths: expected numbers that int32 holds, got {wide} at \(1,\)"):
        gf.attention(q, k, v, mask=mask)
    assert torch.equal(mask.dense(3, 5)[1, 0], torch.full((3, 5), wide > 0))


def test_key_lengths_at_the_end_of_int32_count_all_keys():
    q, k, v = qkv(3, 5)
    out = gf.attention(q, k, v, mask=gf.Mask(key_lengths=torch.tensor([2**31 - 1, 0])))
    assert torch.equal(out[:1], gf.attention(q[:1], k[:1], v[:1])) and not out[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wide", WIDE)
@pytest.mark.parametrize("argument", ["cu_seqlens_q", "cu_seqlens_k"])
def test_starts_are_refused(argument, wide, backend):
    q = torch.randn(3, 1, 8)
    starts = {name: torch.tensor([0, 2, 3]) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    last = f"an end within the 3 rows, got {wide}" if wide > 0 else f"elements that do not decrease, got 2 then {wide}"
    pair = f"{wide} then 3 at 2" if wide > 0 else f"0 then {wide} at 1"
    for bad, message in (
        ([0, 2, wide], last),
        ([0, wide, 3], f"elements that do not decrease, got {pair}"),
        ([wide, 2, 3], f"the first element to be 0, got {wide}"),
    ):
        with gf.force(backend=backend), pytest.raises(ValueError, match=f"{argument}: expected {message}"):
            gf.attention_varlen(q, q, q, **{**starts, argument: torch.tensor(bad)})


def test_starts_are_refused_where_there_are_more_rows_than_int32_counts():
    rows = torch.zeros(1, 1, 1).expand(2**31 + 8, 1, 1)
    starts = torch.tensor([0, 2**31 + 4])
    with pytest.raises(ValueError, match=f"cu_seqlens_k: expected an end within the {2**31 - 1} rows, got {2**31 + 4}"):
        gf.attention_varlen(torch.zeros(3, 1, 1), rows, rows, torch.tensor([0, 3]), starts)


def test_starts_of_64_bits_have_the_bits_of_narrow_ones_forward_and_backward():
    leaves = [torch.randn(9, 2, 8).requires_grad_() for _ in "qkv"]
    found = []
    for dtype in (torch.int32, torch.int64):
        starts = torch.tensor([0, 4, 4, 7], dtype=dtype)
        out = gf.attention_varlen(*leaves, starts, starts, causal=True)
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def cached(**more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(6)
    tensors = {
        "q": torch.randn(2, 1, 2, 8, generator=generator),
        "k_cache": torch.randn(4, 4, 1, 8, generator=generator),
        "v_cache": torch.randn(4, 4, 1, 8, generator=generator),
        "cache_lengths": torch.tensor([3, 5]),
        "k": torch.randn(2, 1, 1, 8, generator=generator),
        "v": torch.randn(2, 1, 1, 8, generator=generator),
        "block_table": torch.tensor([[2, 0], [1, 3]]),
    }
    return {**tensors, **more}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wide", WIDE)
def test_cache_lengths_are_refused_and_the_caches_untouched(wide, backend):
    call = cached(cache_lengths=torch.tensor([3, wide]))
    before = [call[name].clone() for name in ("k_cache", "v_cache")]
    message = rf"cache_lengths: expected entry 1 in \[0, 7\] \(.* 8 tokens and 1 are appended\), got {wide}"
    with gf.force(backend=backend), pytest.raises(ValueError, match=message):
        gf.attention_kvcache(**call)
    assert torch.equal(call["k_cache"], before[0]) and torch.equal(call["v_cache"], before[1])


def test_cache_lengths_are_refused_where_the_cache_is_longer_than_int32_counts():
    cache = torch.zeros(1, 1, 1, 1).expand(1, 2**31 + 8, 1, 1)
    with pytest.raises(ValueError, match=rf"cache_lengths: expected entry 0 in \[0, {2**31 - 1}\] .* got {2**31 + 4}"):
        gf.attention_kvcache(torch.zeros(1, 1, 1, 1), cache, cache, torch.tensor([2**31 + 4]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wide", WIDE)
def test_pages_are_refused_where_they_are_read_and_nowhere_else(wide, backend):
    with gf.force(backend=backend):
        with pytest.raises(ValueError, match=rf"block_table: expected pages in \[0, 4\), got {wide} at \(1, 1\)"):
            gf.attention_kvcache(**cached(block_table=torch.tensor([[2, 0], [1, wide]])))
        got = gf.attention_kvcache(**cached(block_table=torch.tensor([[2, wide], [1, 3]])))
        assert torch.equal(got, gf.attention_kvcache(**cached()))


@pytest.mark.slow
def test_compiled_calls_are_exact_or_refused_too():
    q, k, v = qkv(7, 7)
    ids = wide_ids(2**32, 7)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def masked(documents: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        out = gf.attention(q, k, v, mask=gf.Mask(documents=documents, key_lengths=lengths))
        assert isinstance(out, torch.Tensor)
        return out

    lengths = torch.tensor([6, 7])
    want = gf.attention(q, k, v, mask=gf.Mask(documents=narrow(ids), key_lengths=lengths))
    assert torch.equal(masked(ids, lengths), want)
    with pytest.raises(ValueError, match="key_lengths: expected numbers that int32 holds, got 4294967296"):
        masked(ids, torch.tensor([6, 2**32]))
