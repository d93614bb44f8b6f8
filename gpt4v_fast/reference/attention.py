"""Attention over dense batches, every score at once."""

from __future__ import annotations

import math

import torch

from gpt4v_fast.masks import Mask, MaskTensors, dense_mask
from gpt4v_fast.reference.dropout import dropout_keep
from gpt4v_fast.reference.softcap import cap

_NO_IDS = MaskTensors(None, None, None, None, None)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(mask(softcap(scale * q k^T) + bias + alibi), sinks) v; arguments as `gpt4v_fast.attention`."""
    S, T = q.shape[2], k.shape[2]
    mask = mask if mask is not None else Mask()
    ids = mask.resolve(q.shape[0], S, T, q.device)
    return attention_core(
        q,
        k,
        v,
        ids=ids,
        causal=mask.causal,
        offset=mask.offset(S, T),
        window=mask.window or (None, None),
        scale=scale,
        softcap=softcap,
        bias=bias,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        return_lse=return_lse,
    )


def attention_core(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    ids: MaskTensors = _NO_IDS,
    causal: bool = False,
    offset: int | torch.Tensor = 0,
    window: tuple[int | None, int | None] = (None, None),
    scale: float | None = None,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
    sequence: int = 0,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`attention` after the mask is taken apart; `offset` may differ by batch entry; `sequence` is the index of the
    first batch entry in the dropout generator's counter."""
    B, H, S, D = q.shape
    Hkv, T = k.shape[1], k.shape[2]
    scale = D**-0.5 if scale is None else scale
    if ids.key_lengths is not None:
        # Past its length a cache holds anything, NaN too, and 0 * NaN would reach the sums.
        past = torch.arange(T, device=q.device) >= ids.key_lengths[:, None]
        k, v = (x.masked_fill(past[:, None, :, None], 0.0) for x in (k, v))
    k = k.repeat_interleave(H // Hkv, dim=1)
    v = v.repeat_interleave(H // Hkv, dim=1)

    scores = (q @ k.transpose(-1, -2)) * scale  # (B, H, S, T)
    if softcap:
        scores = cap(scores, softcap)
    if bias is not None and bias.dtype != torch.bool:
        scores = scores + bias.to(scores.dtype)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(scores.dtype).expand(B, H)[:, :, None, None]
        step = offset.view(-1, 1, 1, 1) if isinstance(offset, torch.Tensor) else offset
        i = torch.arange(S, device=q.device)[:, None]
        j = torch.arange(T, device=q.device)[None, :]
        scores = scores - slopes * (j - i - step).abs().to(scores.dtype)
    allowed = dense_mask(S, T, q.device, causal=causal, offset=offset, window=window, ids=ids)
    if bias is not None and bias.dtype == torch.bool:
        allowed = allowed & bias
    scores = scores.masked_fill(~allowed, -math.inf)

    logits = scores
    if sinks is not None:
        extra = sinks.to(scores.dtype).view(1, H, 1, 1).expand(B, H, S, 1)
        logits = torch.cat([scores, extra], dim=-1)
    lse = torch.logsumexp(logits, dim=-1) if logits.shape[-1] else scores.new_full((B, H, S), -math.inf)
    seen = lse != -math.inf  # a NaN row counts as seen, so that it stays NaN
    # A row that sees nothing: subtracting 0 instead of -inf leaves exp(-inf) = 0, with zero gradients.
    probabilities = torch.exp(scores - torch.where(seen, lse, torch.zeros_like(lse))[..., None])
    if dropout_p:
        keep = dropout_keep(dropout_seed, dropout_p, B, H, S, T, q.device, sequence)
        probabilities = probabilities * keep / (1.0 - dropout_p)
    out = probabilities @ v
    return (out, lse) if return_lse else out
