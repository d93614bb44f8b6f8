"""Attention over packed sequences, one after the other."""

from __future__ import annotations

import math

import torch

from gpt4v_fast.reference.attention import attention_core


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    align: str = "bottom_right",
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`attention` sequence by sequence; arguments as `gpt4v_fast.attention_varlen`. lse is (H, Nq)."""
    outs, lses = [], []
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(starts_q) - 1):
        rows = slice(starts_q[b], starts_q[b + 1])
        keys = slice(starts_k[b], starts_k[b + 1])
        S, T = rows.stop - rows.start, keys.stop - keys.start
        slopes = alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[b : b + 1]
        out, lse = attention_core(
            q[rows].transpose(0, 1)[None],
            k[keys].transpose(0, 1)[None],
            v[keys].transpose(0, 1)[None],
            causal=causal,
            offset=T - S if align == "bottom_right" else 0,
            window=window or (None, None),
            scale=scale,
            softcap=softcap,
            alibi_slopes=slopes,
            sinks=sinks,
            dropout_p=dropout_p,
            dropout_seed=dropout_seed,
            sequence=b,
            return_lse=True,
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    Nq, H = q.shape[:2]
    covered = starts_q[-1] - starts_q[0] if starts_q else 0
    if not outs or covered != Nq:
        outs.append(q.new_zeros(Nq - covered, H, v.shape[-1]))
        lses.append(q.new_full((H, Nq - covered), -math.inf))
    out, lse = torch.cat(outs), torch.cat(lses, dim=1)
    return (out, lse) if return_lse else out
