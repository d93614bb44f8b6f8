"""Few queries against many keys: the kernel that reads the cache in place, split over the keys."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import BF16, DTYPES, FP16, FP32, ISAS, Case, causal, check
from attention_cases import poisoned as poisoned  # a fixture

import gpt4v_fast as gf
from gpt4v_fast import reference
from gpt4v_fast._native import _C

pytestmark = pytest.mark.usefixtures("poisoned")

# (H, Hkv, S): 1 to 17 rows for each key head. The last is one more than the kernel takes.
ROWS = [(1, 1, 1), (2, 1, 1), (3, 1, 1), (4, 2, 2), (5, 1, 1), (7, 1, 1), (2, 1, 4), (3, 1, 3), (16, 1, 1), (1, 1, 16),
        (17, 1, 1)]  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_every_number_of_rows(rows, dtype, isa):
    H, Hkv, S = rows
    for T, D, Dv in ((0, 8, 8), (1, 8, 8), (67, 33, 70), (130, 64, 128)):
        check(Case("", S, T, H=H, Hkv=Hkv, D=D, Dv=Dv, dtype=dtype, mask=causal), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("D", [1, 2, 15, 16, 17, 31, 32, 63, 72, 80, 96, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_sizes(D, dtype, isa):
    check(Case("", 1, 70, H=3, Hkv=1, D=D, Dv=D, dtype=dtype), isa)


def long_call(dtype: torch.dtype, T: int = 4099) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"q": (2, 6, 2, 72), "k": (2, 2, T, 72), "v": (2, 2, T, 40)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


LONG = {
    "plain": {},
    "window": {"mask": gf.Mask(causal=True, window=(700, None))},
    "key-lengths": {"mask": gf.Mask(key_lengths=torch.tensor([4099, 513]))},
    "documents": {
        "mask": gf.Mask(
            documents=(torch.tensor([[5, 6], [-1, 2]]), (torch.arange(4099) // 500).expand(2, -1).contiguous())
        )
    },
    "images": {
        "mask": gf.Mask(
            causal=True,
            align="top_left",
            image_blocks=(torch.tensor([[5, -1], [1, 7]]), (torch.arange(4099) // 500).expand(2, -1).contiguous()),
        )
    },
    "softcap-alibi-sinks": {"softcap": 3.0, "alibi_slopes": torch.linspace(0.001, 0.1, 6), "sinks": torch.arange(6.0)},
    "bias": {"bias": torch.linspace(-1, 1, 4099)},
    "boolean-bias": {"bias": torch.arange(4099) % 3 != 1},
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("name", LONG)
def test_many_keys_match_the_oracle(name, dtype, isa):
    tensors = long_call(dtype)
    with gf.force(isa=isa):
        out, lse = gf.attention(**tensors, **LONG[name], return_lse=True)
    want, want_lse = reference.attention(**{n: x.double() for n, x in tensors.items()}, **LONG[name], return_lse=True)
    tolerance = {FP32: 2e-6, FP16: 1e-3, BF16: 8e-3}[dtype]
    torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance * float(want.abs().max()))
    torch.testing.assert_close(lse.double(), want_lse.double(), rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_bitwise_the_same_for_any_number_of_threads(isa):
    before = torch.get_num_threads()
    tensors, results = long_call(BF16), []
    try:
        for threads in (1, 1, 2, 3, 8):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            with gf.force(isa=isa):
                results.append(gf.attention(**tensors, dropout_p=0.2, return_lse=True))
    finally:
        torch.set_num_threads(before)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page", [1, 7, 16, 256])
@pytest.mark.parametrize(("S", "window"), [(2, None), (7, None), (7, (100, None)), (70, (300, 0))], ids=str)
def test_pages_give_the_bits_of_the_dense_cache(S, window, page, dtype, isa):
    """With 6, 21 and 210 rows to a key head: read in place, and gathered."""
    generator = torch.Generator().manual_seed(1)
    B, T, Hkv, D = 3, 700, 2, 40
    entries = -(-T // page)
    table = torch.randperm(B * entries + 2, generator=generator)[: B * entries].view(B, entries).int()
    q = torch.randn(B, S, 6, D, generator=generator).to(dtype)
    k, v = (torch.randn(B * entries + 2, page, Hkv, D, generator=generator).to(dtype) for _ in range(2))
    lengths = torch.tensor([T, 0, 129], dtype=torch.int32)
    dense_k, dense_v = (x[table.long()].flatten(1, 2) for x in (k, v))
    with gf.force(isa=isa), gf.strict():
        paged = gf.attention_kvcache(q, k, v, lengths, block_table=table, window=window, return_lse=True)
        dense = gf.attention_kvcache(q, dense_k, dense_v, lengths, window=window, return_lse=True)
    assert torch.equal(paged[0], dense[0]) and torch.equal(paged[1], dense[1])
    assert (paged[0][1] == 0).all() and (paged[1][1] == -math.inf).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_pages_of_more_keys_than_are_gathered_at_once(threads):
    """A head of keys and values is over the 4 MB of scratch: heads are gathered one by one."""
    before = torch.get_num_threads()
    generator = torch.Generator().manual_seed(1)
    B, T, page, Hkv, D = 2, 4300, 60, 2, 128
    entries = -(-T // page)
    table = torch.randperm(B * entries, generator=generator).view(B, entries).int()
    q = torch.randn(B, 9, 4, D, generator=generator)
    k, v = (torch.randn(B * entries, page, Hkv, D, generator=generator) for _ in range(2))
    lengths, sinks = torch.tensor([T, 4200], dtype=torch.int32), torch.linspace(-1, 3, 4)
    dense_k, dense_v = (x[table.long()].flatten(1, 2) for x in (k, v))
    try:
        torch.set_num_threads(threads)
        paged = gf.attention_kvcache(q, k, v, lengths, block_table=table, sinks=sinks, return_lse=True)
        dense = gf.attention_kvcache(q, dense_k, dense_v, lengths, sinks=sinks, return_lse=True)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(paged[0], dense[0]) and torch.equal(paged[1], dense[1])


def test_explain_says_whether_pages_are_gathered():
    lengths, table = torch.tensor([5]), torch.zeros(1, 1, dtype=torch.int32)
    cache = torch.zeros(2, 8, 1, 8)
    few, many = (torch.zeros(1, S, 1, 8) for S in (_C.DECODE_ROWS, _C.DECODE_ROWS + 1))
    assert "read in place" in gf.explain(gf.attention_kvcache, few, cache, cache, lengths, block_table=table).kernel
    choice = gf.explain(gf.attention_kvcache, many, cache, cache, lengths, block_table=table)
    assert "gathered" in choice.kernel and "over 16" in str(choice)
    apart = torch.zeros(2, 8, 1, 16)[..., ::2]
    choice = gf.explain(gf.attention_kvcache, few, cache, apart, lengths, block_table=table)
    assert "gathered" in choice.kernel and "is not contiguous" in str(choice)
