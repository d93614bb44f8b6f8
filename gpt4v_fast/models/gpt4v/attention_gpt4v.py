"""Attention for transformers: the implementation "gpt4v_fast" over `gf.attention`, and a plain one with weights.

Importing this module makes "gpt4v_fast" an `attn_implementation` of every transformers model. This family hands over a
`gf.Mask`; other models get the masks of transformers' "sdpa" and the same rules for what they leave out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

import gpt4v_fast as gf

NAME = "gpt4v_fast"


def gpt4v_fast_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: gf.Mask | torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface over `gf.attention`: query (B, H, S, D) -> (B, S, H, D).

    Args:
        attention_mask: a `gf.Mask`; a boolean (True = attend) or additive tensor that broadcasts to (B, H, S, T); or
            None: several queries see the past only where is_causal (of the call, else of the module) holds.
        s_aux: one extra logit per head in the denominator (attention sinks).
        position_bias: added to the scores.
    """
    mask: Any = attention_mask
    bias = position_bias
    if isinstance(mask, torch.Tensor):
        mask, bias = None, mask if bias is None else _joined(mask, bias)
    elif mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        # sdpa's diagonal: a prefill into a static cache brings more keys than queries, the first of them filled
        mask = gf.Mask(causal=True, align="top_left") if causal and query.shape[2] > 1 else None
    out = gf.attention(
        query, key, value, mask=mask, bias=bias, scale=scaling, softcap=softcap, sinks=s_aux, dropout_p=dropout
    )
    return out.transpose(1, 2).contiguous(), None


def _joined(mask: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A mask and a bias as one additive tensor."""
    return torch.where(mask, bias, torch.finfo(bias.dtype).min) if mask.dtype == torch.bool else mask + bias


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention that also returns the weights; `attention_mask` is boolean (True = attend)."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling  # (B, H, S, T)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


def dense_mask(mask: gf.Mask, queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """`mask` as a boolean tensor (B or 1, 1, S, T) for sdpa and eager. A row that sees nothing (padding) sees
    all, so that softmax stays finite; no real token sees what it computes."""
    dense = mask.dense(queries, keys, device)
    dense = dense if dense.dim() == 4 else dense.view(-1, 1, queries, keys)
    return dense | ~dense.any(-1, keepdim=True)


AttentionInterface.register(NAME, gpt4v_fast_attention)
# Without a mask function transformers hands out no mask at all: other models would see the future and the padding.
AttentionMaskInterface.register(NAME, sdpa_mask)
