"""Attention against a key/value cache: rotate, append, attend in one call; the public function and its torch op."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from gpt4v_fast import backends, reference
from gpt4v_fast._native import _C, last_dim_contiguous
from gpt4v_fast.masks import check_window
from gpt4v_fast.ops import attention as dense
from gpt4v_fast.ops import checks, library


def attention_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lengths: torch.Tensor,
    *,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attends from the newest tokens to a cache, after appending their keys and values to it. Not differentiable.

    Entry b attends to its first L keys: L = cache_lengths[b] plus the length of k, if given. Its S queries are the
    last S of these L tokens: query i stands at position L - S + i.

    Args:
        q: (B, S, H, D), fp32, bf16 or fp16.
        k_cache: (B, Tmax, Hkv, D), or paged: (pages, page, Hkv, D). Written in place where k is given.
        v_cache: (B, Tmax, Hkv, Dv), or paged likewise.
        cache_lengths: (B,) int32, tokens in the cache before this call's k and v.
        k, v: (B, Snew, Hkv, D) and (B, Snew, Hkv, Dv), both or neither, to append at cache_lengths[b].
        block_table: (B, pages of an entry) int32; token t of entry b is in page block_table[b, t // page]. The
            CPU reads pages where they lie when H / Hkv * S, the rows that share a key, are at most 16; otherwise they
            are gathered into a dense copy first, as `explain` says.
        rotary_cos, rotary_sin: (positions, R / 2) tables, both or neither; the first R <= D dimensions of q and k are
            rotated at their positions in the halves convention of Llama and GPT-NeoX (x1 cos - x2 sin,
            x2 cos + x1 sin).
        causal: query i sees the keys up to its own position.
        window, scale, softcap, sinks: as for `attention`.
        return_lse: also return lse (B, H, S), fp32, natural logarithm.

    Returns:
        out (B, S, H, Dv) in q's dtype; with return_lse also lse.

    Raises:
        TypeError, ValueError: an argument of a wrong kind, dtype, shape or device, a length over the cache, a page out
            of range; the caches are untouched then.

    Source: the semantics of flash_attn_with_kvcache (FlashAttention 2.5).
    """
    arguments = prepare(
        q, k_cache, v_cache, cache_lengths, k, v, block_table, rotary_cos, rotary_sin, causal, window, scale, softcap,
        sinks,
    )  # fmt: skip
    out, lse = _attention_kvcache_op(*arguments)
    return (out, lse) if return_lse else out


def prepare(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lengths: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Any, ...]:
    """Checks shapes and dtypes and returns the arguments of the torch op; values are checked inside the op."""
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        checks.check_tensor(name, tensor, ndim=4)
    B, _, H, D = q.shape
    batch, length, Hkv, _ = k_cache.shape
    Dv = v_cache.shape[3]
    checks.check_like("k_cache", k_cache, "q", q)
    checks.check_like("v_cache", v_cache, "q", q)
    if Hkv == 0 or H % Hkv:
        raise ValueError(f"k_cache: expected a number of heads that divides q's {H}, got {Hkv}")
    if block_table is None:
        checks.check_shape("k_cache", k_cache, (B, length, Hkv, D), "(B, Tmax, Hkv, D)")
        checks.check_shape("v_cache", v_cache, (B, length, Hkv, Dv), "(B, Tmax, Hkv, Dv)")
    else:
        checks.check_shape("k_cache", k_cache, (batch, length, Hkv, D), "(pages, page, Hkv, D)")
        checks.check_shape("v_cache", v_cache, (batch, length, Hkv, Dv), "(pages, page, Hkv, Dv)")
        checks.check_tensor("block_table", block_table, ndim=2, dtypes=(torch.int32, torch.int64))
        checks.check_device("block_table", block_table, "q", q)
        checks.check_shape("block_table", block_table, (B, block_table.shape[1]), "(B, pages of an entry)")
    checks.check_tensor("cache_lengths", cache_lengths, ndim=1, dtypes=(torch.int32, torch.int64))
    checks.check_device("cache_lengths", cache_lengths, "q", q)
    checks.check_shape("cache_lengths", cache_lengths, (B,), "(B,)")
    if (k is None) != (v is None):
        given, missing = ("k", "v") if v is None else ("v", "k")
        raise ValueError(f"{missing}: expected a tensor, since {given} is given, got None")
    if k is not None and v is not None:
        for name, tensor, size in (("k", k, D), ("v", v, Dv)):
            checks.check_tensor(name, tensor, ndim=4)
            checks.check_like(name, tensor, "q", q)
            checks.check_shape(name, tensor, (B, k.shape[1], Hkv, size), "(B, Snew, Hkv, D)")
    if (rotary_cos is None) != (rotary_sin is None):
        given, missing = ("rotary_cos", "rotary_sin") if rotary_sin is None else ("rotary_sin", "rotary_cos")
        raise ValueError(f"{missing}: expected a tensor, since {given} is given, got None")
    if rotary_cos is not None and rotary_sin is not None:
        for name, table in (("rotary_cos", rotary_cos), ("rotary_sin", rotary_sin)):
            checks.check_tensor(name, table, ndim=2)
            checks.check_device(name, table, "q", q)
            checks.check_shape(name, table, tuple(rotary_cos.shape), "of rotary_cos")
        if 2 * rotary_cos.shape[1] > D:
            raise ValueError(f"rotary_cos: expected at most D / 2 = {D // 2} columns, got {rotary_cos.shape[1]}")
    if torch.is_grad_enabled():
        tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v, "sinks": sinks}
        tensors |= {"rotary_cos": rotary_cos, "rotary_sin": rotary_sin}
        for argument, value in tensors.items():
            if value is not None and value.requires_grad:
                raise ValueError(
                    f"{argument}: expected a tensor that needs no gradient (attention_kvcache has none; call it under "
                    "torch.no_grad()), got one that does"
                )
    check_window(window)
    left, right = window or (None, None)
    return (
        q,
        k_cache,
        v_cache,
        checks.as_int32(cache_lengths),
        k,
        v,
        block_table,
        rotary_cos,
        rotary_sin,
        dense.check_sinks(sinks, q, H),
        causal,
        -1 if left is None else left,
        -1 if right is None else right,
        checks.check_scale(scale, D),
        checks.check_softcap(softcap),
    )


def _check_values(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    lengths: torch.Tensor,
    total: torch.Tensor,
    block_table: torch.Tensor | None,
    rotary_cos: torch.Tensor | None,
) -> None:
    """Lengths within the cache and the rotary tables, pages within the pool."""
    S, page = q.shape[1], k_cache.shape[1]
    capacity = page if block_table is None else page * block_table.shape[1]
    for b, (before, after) in enumerate(zip(lengths.tolist(), total.tolist(), strict=True)):
        if before < 0 or after > capacity:
            raise ValueError(
                f"cache_lengths: expected entry {b} in [0, {capacity - (after - before)}] (the cache holds {capacity} "
                f"tokens and {after - before} are appended), got {before}"
            )
        if rotary_cos is not None and after > rotary_cos.shape[0]:
            raise ValueError(
                f"rotary_cos: expected at least {after} positions for entry {b}, got {rotary_cos.shape[0]}"
            )
        if rotary_cos is not None and after < S:
            raise ValueError(f"cache_lengths: expected at least {S} tokens in entry {b} to rotate q, got {after}")
    if block_table is None:
        return
    used = torch.arange(block_table.shape[1], device=q.device) * page < total[:, None]  # (B, pages of an entry)
    bad = used & ((block_table < 0) | (block_table >= k_cache.shape[0]))
    if bad.any():
        b, entry = (int(x) for x in bad.nonzero()[0])
        raise ValueError(
            f"block_table: expected pages in [0, {k_cache.shape[0]}), got {int(block_table[b, entry])} at {(b, entry)}"
        )


def _attention_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lengths: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    block_table: torch.Tensor | None,
    rotary_cos: torch.Tensor | None,
    rotary_sin: torch.Tensor | None,
    sinks: torch.Tensor | None,
    causal: bool,
    window_left: int,
    window_right: int,
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    S = q.shape[1]
    lengths = cache_lengths.to(torch.int64)
    total = lengths if k is None else lengths + k.shape[1]
    _check_values(q, k_cache, lengths, total, block_table, rotary_cos)
    if rotary_cos is not None and rotary_sin is not None:
        # In fp32, whatever the cache's dtype: one rounding instead of three.
        q = reference.rotate(q.float(), rotary_cos, rotary_sin, total - S).to(q.dtype)
        if k is not None:
            k = reference.rotate(k.float(), rotary_cos, rotary_sin, lengths).to(k.dtype)
    if k is not None and v is not None:
        reference.append_to_cache(k_cache, k, lengths, block_table)
        reference.append_to_cache(v_cache, v, lengths, block_table)
    options = _options(sinks, total, S, causal, window_left, window_right, scale, softcap)
    q = q.transpose(1, 2)
    if block_table is not None:
        if backends.pick(_describe(q, k_cache, v_cache, options, block_table)).kernel == _PAGED_KERNEL:
            return _attend_to_pages(q, k_cache, v_cache, block_table, options)
        k_cache = reference.gather_pages(k_cache, block_table)
        v_cache = reference.gather_pages(v_cache, block_table)
    out, lse = dense.run_forward(q, k_cache.transpose(1, 2), v_cache.transpose(1, 2), options, op="attention_kvcache")
    return out.transpose(1, 2), lse


def _attend_to_pages(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    options: dense.AttentionOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel on the pages themselves; q is (B, H, S, D)."""
    B, H, S, _ = q.shape
    q, k_cache, v_cache = (last_dim_contiguous(x) for x in (q, k_cache, v_cache))
    out = q.new_empty(B, S, H, v_cache.shape[3])
    lse = q.new_empty(B, H, S, dtype=torch.float32)
    dense.call_native(
        _C.attention_forward, q, k_cache.transpose(1, 2), v_cache.transpose(1, 2), options, out.transpose(1, 2), lse,
        block_table=block_table.to(torch.int32),
    )  # fmt: skip
    return out, lse


def _describe(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    options: dense.AttentionOptions,
    block_table: torch.Tensor | None,
) -> backends.Request:
    """What `backends.pick` needs to know; q is (B, H, S, D), the caches are as the caller gave them."""
    k_cache, v_cache = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    request = dense.describe(q, k_cache, v_cache, options, op="attention_kvcache")
    if block_table is None:
        return request
    features = {"pages"}
    if q.shape[1] // k_cache.shape[1] * q.shape[2] > _C.DECODE_ROWS:
        features.add("more rows per key head than a decoding step's")
    if block_table.shape[1] > 0 and k_cache.shape[0] * k_cache.shape[2] == 0:
        features.add("an empty pool")
    return dataclasses.replace(request, features=request.features | features)


def _unsupported_by_paged(request: backends.Request) -> str | None:
    if "pages" not in request.features:
        return "there is no block_table"
    if "more rows per key head than a decoding step's" in request.features:
        return f"H / Hkv * S is over {_C.DECODE_ROWS}"
    return "the pool is empty" if "an empty pool" in request.features else None


def _options(
    sinks: torch.Tensor | None,
    total: torch.Tensor,
    S: int,
    causal: bool,
    window_left: int,
    window_right: int,
    scale: float,
    softcap: float,
) -> dense.AttentionOptions:
    return dense.AttentionOptions(
        bias=None,
        alibi_slopes=None,
        sinks=sinks,
        query_documents=None,
        key_documents=None,
        query_images=None,
        key_images=None,
        key_lengths=total.to(torch.int32),
        offsets=(total - S).to(torch.int32),
        seed=None,
        causal=causal,
        bottom_right=True,
        window_left=window_left,
        window_right=window_right,
        scale=scale,
        softcap=softcap,
        dropout_p=0.0,
    )


def _request(*args: Any, **kwargs: Any) -> backends.Request:
    q, k_cache, v_cache, lengths, _, _, table, _, _, sinks, causal, left, right, scale, softcap = prepare(
        *args, **kwargs
    )
    options = _options(sinks, lengths, q.shape[1], causal, left, right, scale, softcap)
    return _describe(q.transpose(1, 2), k_cache, v_cache, options, table)


def _fake(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    B, S, H, _ = q.shape
    out = q.new_empty(B, H, S, v_cache.shape[3]).transpose(1, 2)
    return out, q.new_empty(B, H, S, dtype=torch.float32)


_PAGED_KERNEL = "_C.attention (pages read in place)"

backends.register_kernel("attention_kvcache", "cpu", _PAGED_KERNEL, _unsupported_by_paged)
backends.register_kernel("attention_kvcache", "cpu", "_C.attention (with key lengths; pages gathered first)")
backends.register_explainer(attention_kvcache, _request)

_attention_kvcache_op = library.define_op(
    "attention_kvcache(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_lengths, Tensor? k, Tensor? v, "
    "Tensor? block_table, Tensor? rotary_cos, Tensor? rotary_sin, Tensor? sinks, bool causal, int window_left, "
    "int window_right, float scale, float softcap) -> (Tensor, Tensor)",
    _attention_kvcache,
    _fake,
)
