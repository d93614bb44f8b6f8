"""Modules over the ops, for people who build models from torch.nn."""

from __future__ import annotations

import torch
from torch import nn

from gpt4v_fast.masks import Mask
from gpt4v_fast.ops.attention import attention


class Attention(nn.Module):
    """Multi-head attention with its projections: x (B, S, E) -> (B, S, E).

    Args:
        embed_dim: E.
        num_heads: H query heads.
        num_kv_heads: Hkv key and value heads, H % Hkv == 0; None: H.
        head_dim: D; None: E / H.
        bias: give the projections a bias.
        dropout_p: attention dropout while training.
        softcap: cap of the scores, or None.

    Raises:
        ValueError: sizes that do not divide.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        bias: bool = True,
        dropout_p: float = 0.0,
        softcap: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads = {num_heads}, got {num_kv_heads}")
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(f"num_heads: expected a divisor of embed_dim = {embed_dim}, got {num_heads}")
            head_dim = embed_dim // num_heads
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.dropout_p, self.softcap = dropout_p, softcap
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, **options)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, **options)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, **options)
        self.out_proj = nn.Linear(num_heads * head_dim, embed_dim, **options)

    def forward(self, x: torch.Tensor, mask: Mask | None = None) -> torch.Tensor:
        """Attends from x (B, S, E) to itself under `mask`."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout_p = self.dropout_p if self.training else 0.0
        out = attention(q, k, v, mask=mask, dropout_p=dropout_p, softcap=self.softcap)
        assert isinstance(out, torch.Tensor)  # for the type checker: no lse was asked for
        return self.out_proj(out.transpose(1, 2).flatten(2))
