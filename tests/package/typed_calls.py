"""Calls as users write them, for mypy: what `return_lse` and `return_stats` leave out needs no cast."""

from __future__ import annotations

import torch

import gpt4v_fast as gf
from gpt4v_fast import nn


def attends(q: torch.Tensor, lengths: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    out, lse = gf.attention(q, q, q, mask=gf.Mask(causal=True), return_lse=True)
    packed = gf.attention_varlen(q, q, q, starts, starts, causal=True).transpose(0, 1)
    cached = gf.attention_kvcache(q, q, q, lengths, window=(2, 0)).transpose(1, 2)
    return gf.attention(q, q, q, scale=0.1).transpose(1, 2) + out.flatten() + lse.sum() + packed + cached


def loses(logits: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    gf.cross_entropy(logits, target, label_smoothing=0.1).backward()
    gf.linear_cross_entropy(logits, weight, target, shift=1).backward()
    loss, stats = gf.linear_cross_entropy(logits, weight, target, return_stats=True)
    return loss + stats.lse.sum() + gf.cross_entropy(logits, target, return_stats=True)[1].lse.sum()


def embeds(pixels: torch.Tensor) -> torch.Tensor:
    tokens = nn.PatchEmbed(3, 8, 4)(pixels)
    nn.CrossEntropyLoss()(tokens, pixels).backward()
    return nn.Attention(8, 2)(tokens, mask=gf.Mask(causal=True)).flatten(1)


def either(q: torch.Tensor, flag: bool) -> torch.Tensor:
    found = gf.attention(q, q, q, return_lse=flag)
    return found if isinstance(found, torch.Tensor) else found[0]
