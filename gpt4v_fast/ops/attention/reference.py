"""The oracle of attention, every score at once, and the backend that runs it where no kernel takes a call."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from gpt4v_fast import backends
from gpt4v_fast.masks import Mask, MaskTensors, dense_mask
from gpt4v_fast.ops.attention import arguments
from gpt4v_fast.ops.attention.dropout import dropout_keep
from gpt4v_fast.ops.softcap import cap

if TYPE_CHECKING:
    from gpt4v_fast.ops.attention.api import AttentionCall

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


class Attention(backends.Backend):
    backend, kernel = "reference", "reference.attention"

    def forward(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = _run(call._replace(q=call.q.float(), k=call.k.float(), v=call.v.float()))
        return out.to(call.q.dtype), lse

    def backward(self, call: AttentionCall, saved: Any, upstream: Any, wanted: Any) -> dict[str, torch.Tensor | None]:
        """By autograd over the oracle, in fp32, each gradient in its input's dtype."""
        differentiable = (name for name, want in wanted._asdict().items() if want or name in ("q", "k", "v"))
        inputs = {name: getattr(call, name) for name in differentiable}
        with torch.enable_grad():
            leaves = {name: x.detach().float().requires_grad_() for name, x in inputs.items()}
            out, lse = _run(call._replace(**leaves))
            dout = torch.zeros_like(out) if upstream.out is None else upstream.out.float()
            dlse = torch.zeros_like(lse) if upstream.lse is None else upstream.lse
            found = torch.autograd.grad(
                [out, lse], list(leaves.values()), [dout, dlse], allow_unused=True, materialize_grads=True
            )
        return {name: g.to(x.dtype) for (name, x), g in zip(inputs.items(), found, strict=True)}


def _run(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    sides = (call.window_left, call.window_right)
    options: dict[str, Any] = {
        "causal": call.causal,
        "window": tuple(None if side < 0 else side for side in sides),
        "scale": call.scale,
        "softcap": call.softcap,
        "alibi_slopes": call.alibi_slopes,
        "sinks": call.sinks,
        "dropout_p": call.dropout_p,
        "dropout_seed": 0 if call.seed is None else int(call.seed.item()),
        "return_lse": True,
    }
    result: Any
    if call.cu_seqlens_q is not None and call.cu_seqlens_k is not None:
        align = "bottom_right" if call.bottom_right else "top_left"
        starts = (call.cu_seqlens_q, call.cu_seqlens_k)
        arguments.check_starts(call)
        result = attention_varlen(call.q, call.k, call.v, *starts, align=align, **options)
    else:
        ids = (call.query_documents, call.key_documents, call.query_images, call.key_images, call.key_lengths)
        offset = call.k.shape[2] - call.q.shape[2] if call.bottom_right else 0
        result = attention_core(
            call.q, call.k, call.v, ids=MaskTensors(*ids), bias=call.bias,
            offset=offset if call.offsets is None else call.offsets, **options,
        )  # fmt: skip
    return result
