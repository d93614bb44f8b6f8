"""The oracle of attention against a key/value cache: rotary embedding, appending, and pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gpt4v_fast import backends
from gpt4v_fast.masks import MaskTensors
from gpt4v_fast.ops.attention.kvcache_cpu import check_values
from gpt4v_fast.ops.attention.reference import attention_core

if TYPE_CHECKING:
    from gpt4v_fast.ops.attention.kvcache import KvCacheCall


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
    """Append, rotate, attend; arguments as `gpt4v_fast.attention_kvcache`. The caches are written in place."""
    S = q.shape[1]
    lengths = cache_lengths.to(torch.int64)
    total = lengths if k is None else lengths + k.shape[1]
    if rotary_cos is not None and rotary_sin is not None:
        q = rotate(q, rotary_cos, rotary_sin, total - S, rotary_interleaved)
        if k is not None:
            k = rotate(k, rotary_cos, rotary_sin, lengths, rotary_interleaved)
    if k is not None and v is not None:
        append_to_cache(k_cache, k, lengths, block_table)
        append_to_cache(v_cache, v, lengths, block_table)
    if block_table is not None:
        k_cache, v_cache = gather_pages(k_cache, block_table), gather_pages(v_cache, block_table)
    out = attention_core(
        q.transpose(1, 2),
        k_cache.transpose(1, 2).to(q.dtype),
        v_cache.transpose(1, 2).to(q.dtype),
        ids=MaskTensors(None, None, None, None, total),
        causal=causal,
        offset=total - S,
        window=window or (None, None),
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        return_lse=True,
    )
    return (out[0].transpose(1, 2), out[1]) if return_lse else out[0].transpose(1, 2)


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, first: torch.Tensor, interleaved: bool = False
) -> torch.Tensor:
    """Rotary embedding of x (B, S, H, D) at positions first[b] + s.

    cos, sin: (positions, R / 2); the first R of D are rotated: x1 cos - x2 sin, x2 cos + x1 sin, where x1 and x2 are
    the halves of the R (GPT-NeoX, Llama) or, interleaved, its even and odd dimensions (GPT-J). Positions past the table
    are refused by the public function; here a negative one counts as 0.
    """
    half = cos.shape[-1]
    positions = (first[:, None] + torch.arange(x.shape[1], device=x.device)).clamp(min=0)  # (B, S)
    cos, sin = (table[positions][:, :, None].to(x.dtype) for table in (cos, sin))
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        x1, x2 = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).flatten(-2)
    else:
        x1, x2 = turned[..., :half], turned[..., half:]
        turned = torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)
    return torch.cat([turned, rest], dim=-1)


def append_to_cache(
    cache: torch.Tensor, new: torch.Tensor, lengths: torch.Tensor, block_table: torch.Tensor | None
) -> None:
    """Writes new (B, S, Hkv, D) behind the first lengths[b] tokens of each entry's cache, dense or paged."""
    B, S = new.shape[:2]
    positions = lengths[:, None] + torch.arange(S, device=new.device)  # (B, S)
    if block_table is None:
        cache[torch.arange(B, device=new.device)[:, None], positions] = new.to(cache.dtype)
        return
    page = cache.shape[1]
    pages = block_table.to(torch.int64).gather(1, positions // page)
    cache[pages, positions % page] = new.to(cache.dtype)


def gather_pages(cache: torch.Tensor, block_table: torch.Tensor) -> torch.Tensor:
    """The dense cache (B, pages per entry * page, Hkv, D) of a paged one; unused entries may be anything."""
    B, entries = block_table.shape
    if cache.shape[0] == 0:
        return cache.new_zeros(B, entries * cache.shape[1], *cache.shape[2:])
    gathered = cache[block_table.to(torch.int64).clamp(0, cache.shape[0] - 1)]  # (B, entries, page, Hkv, D)
    return gathered.reshape(B, entries * cache.shape[1], *cache.shape[2:])


class KvCache(backends.Backend):
    backend, kernel = "reference", "reference.attention_kvcache"

    def forward(self, call: KvCacheCall) -> tuple[torch.Tensor, torch.Tensor]:
        check_values(call)
        sides = (call.window_left, call.window_right)
        left, right = (None if side < 0 else side for side in sides)
        out_and_lse: Any = attention_kvcache(
            call.q.float(),
            call.k_cache,
            call.v_cache,
            call.cache_lengths,
            k=None if call.k is None else call.k.float(),
            v=call.v,
            block_table=call.block_table,
            rotary_cos=call.rotary_cos,
            rotary_sin=call.rotary_sin,
            rotary_interleaved=call.rotary_interleaved,
            causal=call.causal,
            window=(left, right),
            scale=call.scale,
            softcap=call.softcap or None,
            sinks=call.sinks,
            return_lse=True,
        )
        return out_and_lse[0].contiguous().to(call.q.dtype), out_and_lse[1]
