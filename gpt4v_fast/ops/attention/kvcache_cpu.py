"""Attention against a key/value cache by the C++ kernels (csrc/attention/kvcache.h)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gpt4v_fast import backends
from gpt4v_fast._native import _C, threads
from gpt4v_fast.ops import checks

if TYPE_CHECKING:
    from gpt4v_fast.ops.attention.kvcache import KvCacheCall

MANY_ROWS = "more rows per key head than a decoding step's"
APART = "pages whose last dimension is not contiguous"
EMPTY_POOL = "an empty pool"


class PagesGathered(backends.Backend):
    """Dense caches where they lie; of a paged one, the keys that a few entries or heads see are gathered at a time."""

    backend, kernel = "cpu", "_C.attention_kvcache (pages gathered, if there are any)"

    def forward(self, call: KvCacheCall) -> tuple[torch.Tensor, torch.Tensor]:
        B, S, H, _ = call.q.shape
        out = call.q.new_empty((B, S, H, call.v_cache.shape[3]))
        lse = call.q.new_empty((B, H, S), dtype=torch.float32)
        try:
            _C.attention_kvcache(_native(call), out, lse, threads())
        except ValueError:
            check_values(call)
            raise
        if call.k is not None:
            torch.autograd.graph.increment_version((call.k_cache, call.v_cache))
        return out, lse


class PagesInPlace(PagesGathered):
    """Pages are read where they lie, for as few rows as a decoding step has."""

    kernel = "_C.attention_kvcache (pages read in place)"

    def refuses(self, traits: backends.Traits) -> str | None:
        if "pages" not in traits.features:
            return "there is no block_table"
        if MANY_ROWS in traits.features:
            return f"H / Hkv * S is over {_C.DECODE_ROWS}"
        if APART in traits.features:
            return "the last dimension of the pages is not contiguous"
        return "the pool is empty" if EMPTY_POOL in traits.features else None


def _native(call: KvCacheCall) -> KvCacheCall:
    """The call as the extension takes it: numbers in int32 (only what is not read is clamped), sinks in fp32."""
    changed: dict[str, Any] = {}
    lengths, table, sinks = call.cache_lengths, call.block_table, call.sinks
    if not (checks.fits_int32(lengths) and (table is None or checks.fits_int32(table))):
        check_values(call)
    if lengths.dtype != torch.int32:
        changed["cache_lengths"] = checks.clamp_int32(lengths)
    if table is not None and table.dtype != torch.int32:
        changed["block_table"] = checks.clamp_int32(table)
    if sinks is not None and sinks.dtype != torch.float32:
        changed["sinks"] = sinks.float()
    return call._replace(**changed) if changed else call


def check_values(call: KvCacheCall) -> None:
    """Lengths within the cache, the rotary tables and int32, pages within the pool and int32."""
    lengths, block_table, rotary_cos = call.cache_lengths, call.block_table, call.rotary_cos
    S, (pool, page), fresh = call.q.shape[1], call.k_cache.shape[:2], call.fresh
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
    starts = torch.arange(block_table.shape[1], device=lengths.device) * page
    used = starts < lengths[:, None].long() + fresh  # (B, pages of an entry)
    bad = used & ((block_table < 0) | (block_table >= pool))
    if bad.any():
        b, entry = (int(x) for x in bad.nonzero()[0])
        raise ValueError(
            f"block_table: expected pages in [0, {pool}), got {int(block_table[b, entry])} at {(b, entry)}"
        )
