"""Checks of attention's arguments; each error names the argument, what was expected and what came."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gpt4v_fast._native import _C
from gpt4v_fast.ops import checks, modes

if TYPE_CHECKING:
    from gpt4v_fast.ops.attention.api import AttentionCall


def check_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dtypes, devices and sizes of q (B, H, S, D), k (B, Hkv, T, D), v (B, Hkv, T, Dv), in autocast's dtype where
    autocast is on."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        checks.check_tensor(name, tensor, ndim=4)
    q, k, v = modes.autocast(q, k, v)
    checks.check_like("k", k, "q", q)
    checks.check_like("v", v, "q", q)
    B, H, _, D = q.shape
    Hkv, T = k.shape[1], k.shape[2]
    check_heads("k", H, Hkv)
    checks.check_shape("k", k, (B, Hkv, T, D), "(B, Hkv, T, D)")
    checks.check_shape("v", v, (B, Hkv, T, v.shape[3]), "(B, Hkv, T, Dv)")
    return q, k, v


def check_heads(name: str, H: int, Hkv: int) -> None:
    if Hkv == 0 or H % Hkv:
        raise ValueError(f"{name}: expected a number of heads that divides q's {H}, got {Hkv}")


def check_packed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Kinds, dtypes, devices and shapes; q, k and v come back in autocast's dtype where autocast is on."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        checks.check_tensor(name, tensor, ndim=3)
    q, k, v = modes.autocast(q, k, v)
    checks.check_like("k", k, "q", q)
    checks.check_like("v", v, "q", q)
    _, H, D = q.shape
    Nk, Hkv, _ = k.shape
    check_heads("k", H, Hkv)
    checks.check_shape("k", k, (Nk, Hkv, D), "(Nk, Hkv, D)")
    checks.check_shape("v", v, (Nk, Hkv, v.shape[2]), "(Nk, Hkv, Dv)")
    for name, starts in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        checks.check_tensor(name, starts, ndim=1, dtypes=(torch.int32, torch.int64))
        checks.check_device(name, starts, "q", q)
        if starts.shape[0] < 1:
            raise ValueError(f"{name}: expected shape (sequences + 1,), got (0,)")
    checks.check_shape("cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens_q.shape), "of cu_seqlens_q")
    return q, k, v


def check_bias(bias: torch.Tensor | None, q: torch.Tensor, shape: tuple[int, int, int, int]) -> torch.Tensor | None:
    """The bias with four dimensions, each 1 or the full size."""
    if bias is None:
        return None
    checks.check_tensor("bias", bias, dtypes=(*checks.FLOAT_DTYPES, torch.bool))
    checks.check_device("bias", bias, "q", q)
    padded = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    # Spelled with ==: under torch.compile, `in` does not compare a number with a symbolic size.
    if len(padded) != 4 or any(size != 1 and size != full for size, full in zip(padded, shape, strict=True)):
        raise ValueError(f"bias: expected a shape broadcastable to (B, H, S, T) = {shape}, got {tuple(bias.shape)}")
    return bias.reshape(padded) if bias.dim() < 4 else bias


def check_alibi(slopes: torch.Tensor | None, q: torch.Tensor, B: int, H: int) -> torch.Tensor | None:
    if slopes is None:
        return None
    checks.check_tensor("alibi_slopes", slopes, dtypes=(torch.float32,))
    checks.check_device("alibi_slopes", slopes, "q", q)
    if tuple(slopes.shape) != (H,) and tuple(slopes.shape) != (B, H):
        raise ValueError(f"alibi_slopes: expected shape {(H,)} or {(B, H)}, got {tuple(slopes.shape)}")
    if slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "alibi_slopes: expected a tensor that needs no gradient (use bias to learn one), got one that does"
        )
    return slopes


def check_sinks(sinks: torch.Tensor | None, q: torch.Tensor, H: int) -> torch.Tensor | None:
    if sinks is None:
        return None
    checks.check_tensor("sinks", sinks)
    checks.check_device("sinks", sinks, "q", q)
    checks.check_shape("sinks", sinks, (H,), "(H,)")
    return sinks


def draw_seed(dropout_p: float) -> torch.Tensor | None:
    """A seed of the dropout stream from torch's CPU generator (a CPU tensor: reading it never waits for a GPU)."""
    return torch.randint(2**62, (1,), dtype=torch.int64) if dropout_p > 0 else None


def check_longest(name: str, longest: int | None) -> int:
    """The limit as the op takes it: -1 for none."""
    if longest is None:
        return -1
    return checks.check_int(name, longest, 0, checks.INT64_MAX, "None or a length >= 0")


def check_starts(call: AttentionCall) -> tuple[AttentionCall, int]:
    """The call with its starts in int32, and where the last sequence of queries ends."""
    assert call.cu_seqlens_q is not None and call.cu_seqlens_k is not None
    queries, end = _check_starts("cu_seqlens_q", call.cu_seqlens_q, call.q.shape[0], call.max_seqlen_q)
    keys, _ = _check_starts("cu_seqlens_k", call.cu_seqlens_k, call.k.shape[0], call.max_seqlen_k)
    if queries is call.cu_seqlens_q and keys is call.cu_seqlens_k:
        return call, end
    return call._replace(cu_seqlens_q=queries, cu_seqlens_k=keys), end


def _check_starts(name: str, starts: torch.Tensor, rows: int, longest: int) -> tuple[torch.Tensor, int]:
    """The starts in int32, and the last; raises unless they begin at 0, do not decrease and end within the rows."""
    narrow = checks.clamp_int32(starts)
    rows = min(rows, checks.INT32_MAX)
    # The largest number of all may be a larger one's clamped.
    if starts.is_cpu and 0 <= (end := _C.end_of_starts(narrow, rows, longest)) < checks.INT32_MAX:
        return narrow, end
    numbers = starts.tolist()
    if numbers[0] != 0:
        raise ValueError(f"{name}: expected the first element to be 0, got {numbers[0]}")
    for b in range(1, len(numbers)):
        length = numbers[b] - numbers[b - 1]
        if length < 0:
            raise ValueError(
                f"{name}: expected elements that do not decrease, got {numbers[b - 1]} then {numbers[b]} at {b}"
            )
        if 0 <= longest < length:
            raise ValueError(
                f"max_seqlen_{name[-1]}: expected at least {length}, sequence {b - 1}'s length, got {longest}"
            )
    if numbers[-1] > rows:
        raise ValueError(f"{name}: expected an end within the {rows} rows, got {numbers[-1]}")
    return narrow, numbers[-1]
