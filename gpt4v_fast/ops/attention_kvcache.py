"""Attention against a key/value cache: rotate, append, attend in one call; the public function and its torch op."""

from __future__ import annotations

from typing import Any

import torch

from gpt4v_fast import backends, reference
from gpt4v_fast._native import _C, threads
from gpt4v_fast.masks import check_window
from gpt4v_fast.ops import checks, library
from gpt4v_fast.ops.attention_arguments import check_sinks

_MANY_ROWS = "more rows per key head than a decoding step's"
_APART = "pages whose last dimension is not contiguous"


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
    rotary_interleaved: bool = False,
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
        cache_lengths: (B,) int32 or int64, tokens in the cache before this call's k and v.
        k, v: (B, Snew, Hkv, D) and (B, Snew, Hkv, Dv), both or neither, to append at cache_lengths[b].
        block_table: (B, pages of an entry) int32 or int64; token t of entry b is in page block_table[b, t // page], and
            what stands behind the last token's page is not read. The CPU reads pages where they lie when H / Hkv * S,
            the rows that share a key, are at most 16; otherwise the keys that a few entries or heads see are gathered
            at a time, as `explain` says.
        rotary_cos, rotary_sin: (positions, R / 2) tables, any float dtype, both or neither; the first R <= D dimensions
            of q and k are rotated at their positions, (x1 cos - x2 sin, x2 cos + x1 sin), in fp32 with one rounding.
        rotary_interleaved: x1 and x2 are dimensions 2 i and 2 i + 1 (GPT-J), not i and R / 2 + i (Llama, GPT-NeoX).
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
        q, k_cache, v_cache, cache_lengths, k, v, block_table, rotary_cos, rotary_sin, rotary_interleaved, causal,
        window, scale, softcap, sinks,
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
    rotary_interleaved: bool = False,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Any, ...]:
    """Checks shapes and dtypes and returns the arguments of the torch op; values are checked inside the op."""
    tensors = (q, k_cache, v_cache, cache_lengths, k, v, block_table, rotary_cos, rotary_sin, sinks)
    if torch.compiler.is_compiling() or not _C.do_kvcache_tensors_fit(*tensors):
        _check_tensors(*tensors)
    if torch.is_grad_enabled():
        _check_no_gradient(q, k_cache, v_cache, k, v, sinks, rotary_cos, rotary_sin)
    check_window(window)
    left, right = window or (None, None)
    return (
        q,
        k_cache,
        v_cache,
        cache_lengths,
        k,
        v,
        block_table,
        rotary_cos,
        rotary_sin,
        sinks,
        bool(rotary_interleaved),
        causal,
        -1 if left is None else left,
        -1 if right is None else right,
        checks.check_scale(scale, q.shape[3]),
        checks.check_softcap(softcap),
    )


def _check_tensors(
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
) -> None:
    """Kinds, dtypes, devices and shapes."""
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
    check_sinks(sinks, q, H)


def _check_no_gradient(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *others: torch.Tensor | None
) -> None:
    names = ("q", "k_cache", "v_cache", "k", "v", "sinks", "rotary_cos", "rotary_sin")
    for name, tensor in zip(names, (q, k_cache, v_cache, *others), strict=True):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name}: expected a tensor that needs no gradient (attention_kvcache has none; call it under "
                "torch.no_grad()), got one that does"
            )


def _check_values(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    lengths: torch.Tensor,
    fresh: int,
    block_table: torch.Tensor | None,
    rotary_cos: torch.Tensor | None,
) -> None:
    """Lengths within the cache, the rotary tables and int32, pages within the pool and int32."""
    S, (pool, page) = q.shape[1], k_cache.shape[:2]
    pool = min(pool, checks.INT32_MAX + 1)
    capacity = min(page if block_table is None else page * block_table.shape[1], checks.INT32_MAX)
    for b, before in enumerate(lengths.tolist()):
        after = before + fresh
        if before < 0 or after > capacity:
            raise ValueError(
                f"cache_lengths: expected entry {b} in [0, {capacity - fresh}] (the cache holds {capacity} tokens and "
                f"{fresh} are appended), got {before}"
            )
        if rotary_cos is not None and after > rotary_cos.shape[0]:
            raise ValueError(
                f"rotary_cos: expected at least {after} positions for entry {b}, got {rotary_cos.shape[0]}"
            )
        if rotary_cos is not None and after < S:
            raise ValueError(f"cache_lengths: expected at least {S} tokens in entry {b} to rotate q, got {after}")
    if block_table is None:
        return
    starts = torch.arange(block_table.shape[1], device=q.device) * page
    used = starts < lengths[:, None].long() + fresh  # (B, pages of an entry)
    bad = used & ((block_table < 0) | (block_table >= pool))
    if bad.any():
        b, entry = (int(x) for x in bad.nonzero()[0])
        raise ValueError(
            f"block_table: expected pages in [0, {pool}), got {int(block_table[b, entry])} at {(b, entry)}"
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
    rotary_interleaved: bool,
    causal: bool,
    window_left: int,
    window_right: int,
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    B, S, H, _ = q.shape
    fresh = 0 if k is None else k.shape[1]
    used = _features(q, k_cache, v_cache, block_table, sinks, causal, window_left, window_right, softcap)
    key = ("attention_kvcache", q.device, q.dtype, used)
    if backends.pick_by(key, lambda: _describe(q, used)).backend == "cpu":
        out = q.new_empty((B, S, H, v_cache.shape[3]))
        lse = q.new_empty((B, H, S), dtype=torch.float32)
        sinks = None if sinks is None else sinks.float()
        scalars = (rotary_interleaved, causal, window_left, window_right, scale, softcap)
        if not (checks.fits_int32(cache_lengths) and (block_table is None or checks.fits_int32(block_table))):
            _check_values(q, k_cache, cache_lengths, fresh, block_table, rotary_cos)
        lengths = checks.clamp_int32(cache_lengths)
        table = None if block_table is None else checks.clamp_int32(block_table)  # only what is not read is clamped
        try:
            _C.attention_kvcache(
                q, k_cache, v_cache, lengths, k, v, table, rotary_cos, rotary_sin, sinks, *scalars, out, lse, threads()
            )
        except ValueError:
            _check_values(q, k_cache, cache_lengths, fresh, block_table, rotary_cos)
            raise
        if k is not None:
            torch.autograd.graph.increment_version((k_cache, v_cache))
        return out, lse
    _check_values(q, k_cache, cache_lengths, fresh, block_table, rotary_cos)
    out_and_lse: Any = reference.attention_kvcache(
        q.float(),
        k_cache,
        v_cache,
        cache_lengths,
        k=None if k is None else k.float(),
        v=v,
        block_table=block_table,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved,
        causal=causal,
        window=(None if window_left < 0 else window_left, None if window_right < 0 else window_right),
        scale=scale,
        softcap=softcap or None,
        sinks=sinks,
        return_lse=True,
    )
    return out_and_lse[0].contiguous().to(q.dtype), out_and_lse[1]


_FEATURES = (
    "pages", _MANY_ROWS, "an empty pool", _APART, "gqa", "head size over 256", "sinks", "causal", "window", "softcap",
)  # fmt: skip


def _features(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    sinks: torch.Tensor | None,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
) -> tuple[bool, ...]:
    """Which of _FEATURES a call uses."""
    _, S, H, D = q.shape
    pages, page, Hkv, _ = k_cache.shape
    return (
        block_table is not None,
        H // Hkv * S > _C.DECODE_ROWS,
        block_table is not None and pages * page == 0,
        block_table is not None and any(x.stride(3) != 1 and x.shape[3] > 1 for x in (k_cache, v_cache)),
        Hkv != H,
        D > 256 or v_cache.shape[3] > 256,
        sinks is not None,
        causal,
        window_left >= 0 or window_right >= 0,
        softcap > 0,
    )


def _describe(q: torch.Tensor, used: tuple[bool, ...]) -> backends.Request:
    features = frozenset(name for name, is_used in zip(_FEATURES, used, strict=True) if is_used)
    return backends.Request("attention_kvcache", q.device.type, q.dtype, features | {"key lengths", "offsets"})


def _unsupported_by_paged(request: backends.Request) -> str | None:
    if "pages" not in request.features:
        return "there is no block_table"
    if _MANY_ROWS in request.features:
        return f"H / Hkv * S is over {_C.DECODE_ROWS}"
    if _APART in request.features:
        return "the last dimension of the pages is not contiguous"
    return "the pool is empty" if "an empty pool" in request.features else None


def _request(*args: Any, **kwargs: Any) -> backends.Request:
    q, k_cache, v_cache, _, _, _, block_table, _, _, sinks, _, causal, left, right, _, softcap = prepare(
        *args, **kwargs
    )
    return _describe(q, _features(q, k_cache, v_cache, block_table, sinks, causal, left, right, softcap))


def _fake(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    B, S, H, _ = q.shape
    return q.new_empty(B, S, H, v_cache.shape[3]), q.new_empty(B, H, S, dtype=torch.float32)


backends.register_kernel(
    "attention_kvcache", "cpu", "_C.attention_kvcache (pages read in place)", _unsupported_by_paged
)
backends.register_kernel("attention_kvcache", "cpu", "_C.attention_kvcache (pages gathered, if there are any)")
backends.register_explainer(attention_kvcache, _request)

_attention_kvcache_op = library.define_op(
    "attention_kvcache(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_lengths, Tensor? k, Tensor? v, "
    "Tensor? block_table, Tensor? rotary_cos, Tensor? rotary_sin, Tensor? sinks, bool rotary_interleaved, bool causal, "
    "int window_left, int window_right, float scale, float softcap) -> (Tensor, Tensor)",
    _attention_kvcache,
    _fake,
)
