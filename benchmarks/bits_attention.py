"""Attention cases of bits.py: dense, sequences laid end to end, key/value caches."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

import gpt4v_fast as gf

from .bits_inputs import DTYPES, BitsCase, Draw, Tensors, with_gradients

# B, H, Hkv, S, T, D, Dv
ATTENTION_SHAPES = {
    "one": (1, 1, 1, 1, 1, 1, 1),
    "tiny": (1, 2, 2, 3, 5, 8, 8),
    "odd": (2, 3, 1, 37, 61, 40, 24),
    "square": (2, 4, 2, 67, 67, 64, 64),
    "long": (1, 2, 2, 200, 330, 64, 64),
    "wide": (1, 2, 1, 20, 29, 256, 128),
    "huge head": (1, 1, 1, 9, 17, 320, 264),
    "decode": (2, 4, 2, 1, 177, 64, 64),
    "few queries": (1, 8, 2, 5, 203, 96, 96),
    "many queries": (1, 1, 1, 150, 7, 32, 48),
}
ATTENTION_OPTIONS = (
    "plain", "causal", "top left", "window", "one-sided window", "documents", "padded documents", "image blocks",
    "key lengths", "blocks, documents, window", "softcap", "scale", "bias", "broadcast bias", "constant bias",
    "boolean bias", "alibi", "alibi by entry", "sinks", "dropout", "lse", "everything", "strided", "forward only",
)  # fmt: skip
_CAUSAL = {"top left", "window", "image blocks", "blocks, documents, window", "alibi", "everything", "lse"}
_NO_BIAS_GRADIENT = {"constant bias", "boolean bias"}


def _pair(draw: Draw, B: int, S: int, T: int, low: int, high: int, ordered: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 ids of queries and keys."""
    ids = [draw.whole(low, high, B, size, dtype=torch.int32) for size in (S, T)]
    queries, keys = (x.sort(dim=1).values if ordered else x for x in ids)
    return queries, keys


def _mask(draw: Draw, option: str, sizes: tuple[int, ...]) -> gf.Mask | None:
    B, _, _, S, T, *_ = sizes
    fields: dict[str, Any] = {"causal": option in _CAUSAL or option == "causal"}
    if option == "top left":
        fields["align"] = "top_left"
    if option in ("window", "blocks, documents, window", "everything"):
        fields["window"] = (max(T // 3, 1), 2)
    if option == "one-sided window":
        fields["window"] = (None, T // 4)
    if option in ("documents", "padded documents", "blocks, documents, window", "everything"):
        fields["documents"] = _pair(draw, B, S, T, -1 if option == "padded documents" else 0, 3, True)
    if option in ("image blocks", "blocks, documents, window", "everything"):
        fields["image_blocks"] = _pair(draw, B, S, T, -2, 2, True)
    if option in ("key lengths", "everything"):
        fields["key_lengths"] = draw.whole(0, T + 1, B, dtype=torch.int32)
    return gf.Mask(**fields) if fields != {"causal": False} else None


def _attention_options(draw: Draw, option: str, sizes: tuple[int, ...]) -> tuple[dict[str, Any], Tensors]:
    """Keyword arguments without a gradient, and those with one."""
    B, H, _, S, T, D, _ = sizes
    fixed: dict[str, Any] = {}
    leaves: Tensors = {}
    if option in ("softcap", "everything"):
        fixed["softcap"] = 3.0
    if option == "scale":
        fixed["scale"] = 1.7 * D**-0.5
    if option in ("bias", "everything"):
        leaves["bias"] = draw.normal(B, H, S, T)
    if option == "broadcast bias":
        leaves["bias"] = draw.normal(1, H, 1, T, dtype=torch.float32)
    if option == "constant bias":
        fixed["bias"] = draw.normal(B, 1, S, T)
    if option == "boolean bias":
        fixed["bias"] = draw.whole(0, 3, B, 1, S, T) > 0
    if option in ("alibi", "everything"):
        fixed["alibi_slopes"] = draw.normal(H, dtype=torch.float32).abs() * 0.1
    if option == "alibi by entry":
        fixed["alibi_slopes"] = draw.normal(B, H, dtype=torch.float32).abs() * 0.1
    if option in ("sinks", "everything"):
        leaves["sinks"] = draw.normal(H)
    if option in ("dropout", "everything"):
        fixed["dropout_p"] = 0.3
    return fixed, leaves


def _attention(shape: str, option: str, draw: Draw) -> Tensors:
    sizes = ATTENTION_SHAPES[shape]
    B, H, Hkv, S, T, D, Dv = sizes
    q, k, v = draw.normal(B, H, S, D), draw.normal(B, Hkv, T, D), draw.normal(B, Hkv, T, Dv)
    if option == "strided":  # heads behind positions, and a base that is not aligned
        q = draw.normal(B * S * H * D + 1)[1:].view(B, S, H, D).transpose(1, 2)
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    fixed, leaves = _attention_options(draw, option, sizes)
    fixed["mask"] = _mask(draw, option, sizes)
    with_lse = option in ("lse", "everything")

    def call(**tensors: Any) -> Tensors:
        q, k, v = (tensors.pop(name) for name in "qkv")
        result: Any = gf.attention(q, k, v, **tensors, **fixed, return_lse=with_lse)
        return {"out": result[0], "lse": result[1]} if with_lse else {"out": result}

    if option == "forward only":
        with torch.no_grad():
            return call(q=q, k=k, v=v)
    return with_gradients(draw, {"q": q, "k": k, "v": v, **leaves}, call)


VARLEN_LENGTHS = {"three": ((17, 1, 40), (17, 5, 70)), "with empty": ((0, 33, 3, 0), (4, 33, 0, 9))}
VARLEN_OPTIONS = (
    "plain",
    "causal",
    "top left",
    "window",
    "softcap",
    "alibi by entry",
    "sinks",
    "dropout",
    "everything",
)


def _varlen(lengths: str, option: str, draw: Draw) -> Tensors:
    of_queries, of_keys = VARLEN_LENGTHS[lengths]
    H, Hkv, D, Dv = 4, 2, 48, 40
    starts = [torch.tensor([0, *x]).cumsum(0).to(torch.int32) for x in (of_queries, of_keys)]
    Nq, Nk = sum(of_queries) + 2, sum(of_keys) + 1  # rows behind the last sequence
    tensors = {"q": draw.normal(Nq, H, D), "k": draw.normal(Nk, Hkv, D), "v": draw.normal(Nk, Hkv, Dv)}
    fixed, leaves = _attention_options(draw, option, (len(of_queries), H, Hkv, Nq, Nk, D, Dv))
    leaves.pop("bias", None)
    fixed |= {"causal": option in _CAUSAL or option == "causal", "align": "bottom_right"}
    if option == "top left":
        fixed["align"] = "top_left"
    if option in ("window", "everything"):
        fixed["window"] = (9, 3)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **more: Any) -> Tensors:
        out, lse = gf.attention_varlen(q, k, v, starts[0], starts[1], **more, **fixed, return_lse=True)
        return {"out": out, "lse": lse}

    return with_gradients(draw, {**tensors, **leaves}, call)


KVCACHE_OPTIONS = (
    "read", "append", "paged", "paged append", "rotary", "interleaved rotary", "part rotary", "window", "softcap",
    "sinks", "not causal", "many rows", "paged many rows", "long", "everything",
)  # fmt: skip


def _kvcache(option: str, draw: Draw) -> Tensors:
    B, Hkv, D, Dv, page = 2, 2, 64, 48, 16
    H, S, length = (8, 21, 96) if "many rows" in option else (6, 3, 640 if option == "long" else 96)
    q = draw.normal(B, S, H, D)
    paged = "paged" in option or option == "everything"
    slots = (B * length // page, page) if paged else (B, length)
    caches = {"k_cache": draw.normal(*slots, Hkv, D), "v_cache": draw.normal(*slots, Hkv, Dv)}
    options: dict[str, Any] = {}
    if paged:
        pages = torch.rand(slots[0], generator=draw.generator).argsort()
        options["block_table"] = pages.view(B, -1).to(torch.int32)
    if option != "read":
        options |= {"k": draw.normal(B, S, Hkv, D), "v": draw.normal(B, S, Hkv, Dv)}
    if "rotary" in option or option == "everything":
        half = 12 if option == "part rotary" else D // 2
        options |= {name: draw.normal(length, half, dtype=torch.float32) for name in ("rotary_cos", "rotary_sin")}
        options["rotary_interleaved"] = option == "interleaved rotary"
    if option in ("window", "everything"):
        options["window"] = (19, 0)
    if option in ("softcap", "everything"):
        options["softcap"] = 2.5
    if option in ("sinks", "everything"):
        options["sinks"] = draw.normal(H)
    if option == "not causal":
        options["causal"] = False
    used = torch.tensor([length // 3, length - S], dtype=torch.int32)
    out, lse = gf.attention_kvcache(q, caches["k_cache"], caches["v_cache"], used, **options, return_lse=True)
    return {"out": out, "lse": lse, **caches}


def cases() -> Iterator[BitsCase]:
    for dtype in DTYPES:
        for shape in ATTENTION_SHAPES:
            options = ATTENTION_OPTIONS if shape == "odd" else ("plain", "everything")
            for option in options:
                quick = shape == "tiny" or option == "dropout"
                yield BitsCase("attention", f"{shape}, {option}", dtype, partial(_attention, shape, option), quick)
        for option in ATTENTION_OPTIONS[1:10]:
            yield BitsCase("attention", f"square, {option}", dtype, partial(_attention, "square", option))
        for option in VARLEN_OPTIONS:
            for lengths in VARLEN_LENGTHS:
                name, make = f"{lengths}, {option}", partial(_varlen, lengths, option)
                yield BitsCase("attention_varlen", name, dtype, make, option == "plain")
        for option in KVCACHE_OPTIONS:
            yield BitsCase("attention_kvcache", option, dtype, partial(_kvcache, option), option == "append")
