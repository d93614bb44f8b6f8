"""Attention against a key/value cache: rotate, append, attend in one call; the public function and its call object.

user -> attention_kvcache -> KvCacheCall -> gpt4v_fast::attention_kvcache
                                 -> kvcache_cpu.py        _C.attention_kvcache (csrc/attention/kvcache.h)
                                 or kvcache_reference.py  the oracle
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, overload

import torch

from gpt4v_fast import backends
from gpt4v_fast._native import _C
from gpt4v_fast.masks import check_window
from gpt4v_fast.ops import checks, library
from gpt4v_fast.ops.attention import arguments, kvcache_cpu, kvcache_reference

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from gpt4v_fast.ops.attention.options import KvCacheOptions


class _KvCacheFields(NamedTuple):
    q: torch.Tensor  # (B, S, H, D)
    k_cache: torch.Tensor  # (B, Tmax, Hkv, D), or with block_table (pages, page, Hkv, D)
    v_cache: torch.Tensor
    cache_lengths: torch.Tensor  # (B,) int32 or int64
    k: torch.Tensor | None = None  # (B, Snew, Hkv, D)
    v: torch.Tensor | None = None
    block_table: torch.Tensor | None = None  # (B, pages of an entry) int32 or int64
    rotary_cos: torch.Tensor | None = None  # (positions, R / 2)
    rotary_sin: torch.Tensor | None = None
    sinks: torch.Tensor | None = None  # (H,)
    rotary_interleaved: bool = False
    causal: bool = False
    window_left: int = -1  # -1: unbounded
    window_right: int = -1
    scale: float = 1.0
    softcap: float = 0.0  # 0: none


class KvCacheCall(backends.Call, _KvCacheFields):
    """A call of `attention_kvcache`, checked but for the numbers in cache_lengths and block_table."""

    __slots__ = ()
    MAIN = "q"
    FEATURE_NAMES: ClassVar = {
        "block_table": "pages", "window_left": "window", "window_right": "window", "rotary_cos": "rotary",
        "rotary_sin": "rotary", "rotary_interleaved": "rotary", "k": "append", "v": "append", "scale": None,
    }  # fmt: skip
    EXTRAS = (kvcache_cpu.MANY_ROWS, kvcache_cpu.EMPTY_POOL, kvcache_cpu.APART, "gqa", "head size over 256")
    op = "attention_kvcache"

    @property
    def fresh(self) -> int:
        """How many tokens the call appends to each entry."""
        return 0 if self.k is None else self.k.shape[1]

    @property
    def writes(self) -> bool:
        """Whether it writes to the caches."""
        return self.k is not None

    def extras(self) -> tuple[bool, ...]:
        _, S, H, D = self.q.shape
        pages, page, Hkv, _ = self.k_cache.shape
        is_paged, Dv = self.block_table is not None, self.v_cache.shape[3]
        return (
            H // Hkv * S > _C.DECODE_ROWS,
            is_paged and pages * page == 0,
            is_paged and any(x.stride(3) != 1 and x.shape[3] > 1 for x in (self.k_cache, self.v_cache)),
            Hkv != H,
            D > 256 or Dv > 256,
        )


class KvCacheOutputs(NamedTuple):
    out: torch.Tensor  # (B, S, H, Dv)
    lse: torch.Tensor  # (B, H, S) fp32


@overload
def attention_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lengths: torch.Tensor,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[KvCacheOptions],
) -> torch.Tensor: ...
@overload
def attention_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lengths: torch.Tensor,
    *,
    return_lse: Literal[True],
    **options: Unpack[KvCacheOptions],
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def attention_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lengths: torch.Tensor,
    *,
    return_lse: bool,
    **options: Unpack[KvCacheOptions],
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...
@backends.explained
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
    tensors = (q, k_cache, v_cache, cache_lengths, k, v, block_table, rotary_cos, rotary_sin, sinks)
    if torch.compiler.is_compiling() or not _C.do_kvcache_tensors_fit(*tensors):
        _check_tensors(*tensors)
    if torch.is_grad_enabled():
        _check_no_gradient(q, k_cache, v_cache, k, v, sinks, rotary_cos, rotary_sin)
    check_window(window)
    left, right = window or (None, None)
    call = KvCacheCall(
        *tensors,
        rotary_interleaved=bool(rotary_interleaved),
        causal=bool(causal),
        window_left=-1 if left is None else int(left),
        window_right=-1 if right is None else int(right),
        scale=checks.check_scale(scale, q.shape[3]),
        softcap=checks.check_softcap(softcap),
    )
    out, lse = _attention_kvcache_op(call)
    return (out, lse) if return_lse else out


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
    arguments.check_heads("k_cache", H, Hkv)
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
    arguments.check_sinks(sinks, q, H)


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


def _fake(call: KvCacheCall) -> KvCacheOutputs:
    B, S, H, _ = call.q.shape
    return KvCacheOutputs(
        call.q.new_empty(B, S, H, call.v_cache.shape[3]), call.q.new_empty(B, H, S, dtype=torch.float32)
    )


backends.register(
    "attention_kvcache", kvcache_cpu.PagesInPlace(), kvcache_cpu.PagesGathered(), kvcache_reference.KvCache()
)
_C.read_attention_kvcache_calls(KvCacheCall._fields)
_attention_kvcache_op = library.define(
    "attention_kvcache",
    KvCacheCall,
    KvCacheOutputs,
    run=backends.forward,
    fake=_fake,
    mutates=("k_cache", "v_cache"),
)
