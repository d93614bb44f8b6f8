"""Numbers that change from call to call: compiled code without graph breaks, exported lengths, mapped caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.func import vmap

import gpt4v_fast as gf

Q = torch.randn(1, 2, 5, 8)
PACKED, STARTS = torch.randn(5, 2, 8), torch.tensor([0, 2, 5], dtype=torch.int32)
TOKENS, CACHE, LENGTHS = torch.randn(2, 1, 4, 8), torch.randn(2, 8, 2, 8), torch.tensor([5, 6], dtype=torch.int32)
LOGITS, HIDDEN, WEIGHT, TARGET = torch.randn(6, 11), torch.randn(6, 8), torch.randn(11, 8), torch.randint(0, 11, (6,))
PIXELS, PATCHES = torch.rand(2, 3, 8, 8), torch.randn(5, 3, 4, 4)


def module_with(module: torch.nn.Module, name: str, *args: torch.Tensor) -> Callable[[float], Any]:
    def call(x: float) -> Any:
        setattr(module, name, x)
        return module(*args)

    return call


def loss_module_with(module: Any, name: str, *args: torch.Tensor) -> Callable[[float], Any]:
    def call(x: float) -> Any:
        module.options[name] = x
        return module(*args)

    return call


CALLS: dict[str, Callable[[float], Any]] = {
    "attention-scale": lambda x: gf.attention(Q, Q, Q, scale=x),
    "attention-softcap": lambda x: gf.attention(Q, Q, Q, softcap=x),
    "varlen": lambda x: gf.attention_varlen(PACKED, PACKED, PACKED, STARTS, STARTS, scale=x, softcap=x),
    "kvcache": lambda x: gf.attention_kvcache(TOKENS, CACHE, CACHE, LENGTHS, scale=x, softcap=x),
    "cross-entropy": lambda x: gf.cross_entropy(LOGITS, TARGET) * x,
    "cross-entropy-z-loss": lambda x: gf.cross_entropy(LOGITS, TARGET, z_loss=x),
    "cross-entropy-smoothing": lambda x: gf.cross_entropy(LOGITS, TARGET, label_smoothing=x),
    "cross-entropy-softcap": lambda x: gf.cross_entropy(LOGITS, TARGET, softcap=x),
    "linear": lambda x: gf.linear_cross_entropy(HIDDEN, WEIGHT, TARGET) * x,
    "linear-options": lambda x: gf.linear_cross_entropy(
        HIDDEN, WEIGHT, TARGET, z_loss=x, label_smoothing=x, softcap=x, shift=1
    ),
    "patches-rescale": lambda x: gf.patch_embed(PIXELS, PATCHES, rescale=x),
    "patches-number": lambda x: gf.patch_embed(PIXELS, PATCHES, mean=x, std=x),
    "patches-sequence": lambda x: gf.patch_embed(PIXELS, PATCHES, mean=(x, 0.5, x), std=[x, x, 1.0]),
    "packed-images": lambda x: gf.patch_embed_packed([PIXELS[0]], PATCHES, mean=x, std=(x, x, x), rescale=x)[0],
    "module-attention": module_with(gf.nn.Attention(8, 2), "softcap", torch.randn(2, 5, 8)),
    "module-patches": module_with(gf.nn.PatchEmbed(3, 5, 4), "rescale", PIXELS),
    "module-loss": loss_module_with(gf.nn.CrossEntropyLoss(), "z_loss", LOGITS, TARGET),
    "module-linear-loss": loss_module_with(gf.nn.LinearCrossEntropyLoss(8, 11), "label_smoothing", HIDDEN, TARGET),
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CALLS)
def test_compiled_code_follows_a_number(name):
    compiled = torch.compile(CALLS[name], fullgraph=True, dynamic=True, backend="aot_eager")
    for x in (0.25, 0.5, 0.75):
        assert torch.equal(compiled(x), CALLS[name](x))


@pytest.mark.parametrize("op", ["attention", "varlen", "kvcache"])
def test_compiled_code_follows_a_window(op):
    def call(left: int) -> Any:
        if op == "attention":
            return gf.attention(Q, Q, Q, mask=gf.Mask(window=(left, 1)))
        if op == "varlen":
            return gf.attention_varlen(
                PACKED, PACKED, PACKED, STARTS, STARTS, window=(left, None), max_seqlen_q=left + 3
            )
        return gf.attention_kvcache(TOKENS, CACHE, CACHE, LENGTHS, window=(left, None))

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for left in (1, 2, 3):
        assert torch.equal(compiled(left), call(left))


def test_compiled_code_refuses_a_bad_number():
    compiled = torch.compile(CALLS["attention-softcap"], dynamic=True, backend="aot_eager")
    compiled(0.5)
    with pytest.raises(ValueError, match=r"softcap: expected None or a finite number > 0 .*, got -1.0"):
        compiled(-1.0)


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"return_stats": True}], ids=str)
def test_exported_shift_of_any_length(options):
    class Loss(torch.nn.Module):
        def forward(self, hidden: torch.Tensor, target: torch.Tensor) -> Any:
            return gf.linear_cross_entropy(hidden, WEIGHT, target, shift=1, **options)

    length = torch.export.Dim("length", min=2, max=100)
    example = torch.randn(2, 6, 8), torch.randint(0, 11, (2, 6))
    exported = torch.export.export(Loss(), example, dynamic_shapes=({1: length}, {1: length})).module()
    for T in (2, 9):
        args = torch.randn(2, T, 8), torch.randint(0, 11, (2, T))
        torch.testing.assert_close(exported(*args), Loss()(*args), rtol=0, atol=0, equal_nan=True)


def test_vmap_over_caches_appends_to_each():
    queries, fresh = torch.randn(3, 2, 1, 4, 8), torch.randn(3, 2, 1, 2, 8)
    mapped, single = (torch.zeros(3, 2, 8, 2, 8) for _ in range(2))
    got = vmap(lambda q, cache, k: gf.attention_kvcache(q, cache, cache, LENGTHS, k=k, v=k))(queries, mapped, fresh)
    each = zip(queries, single, fresh, strict=True)
    want = torch.stack([gf.attention_kvcache(q, cache, cache, LENGTHS, k=k, v=k) for q, cache, k in each])
    assert torch.equal(got, want) and torch.equal(mapped, single) and mapped.any()


def test_vmap_over_queries_of_one_cache():
    queries = torch.randn(3, 2, 1, 4, 8)
    got = vmap(lambda q: gf.attention_kvcache(q, CACHE, CACHE, LENGTHS, return_lse=True))(queries)
    for i, q in enumerate(queries):
        for part, want in zip(got, gf.attention_kvcache(q, CACHE, CACHE, LENGTHS, return_lse=True), strict=True):
            assert torch.equal(part[i], want)


def test_vmap_appends_nothing_to_a_shared_cache():
    fresh = torch.randn(3, 2, 1, 2, 8)
    with pytest.raises(ValueError, match=r"attention_kvcache: expected k_cache to be mapped"):
        vmap(lambda k: gf.attention_kvcache(TOKENS, CACHE, CACHE, LENGTHS, k=k, v=k))(fresh)
