"""The options of attention's public functions as types, for their overloads by `return_lse`."""

from __future__ import annotations

from typing import TypedDict

import torch

from gpt4v_fast.masks import Mask


class AttentionOptions(TypedDict, total=False):
    mask: Mask | None
    scale: float | None
    softcap: float | None
    bias: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    dropout_p: float


class VarlenOptions(TypedDict, total=False):
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    causal: bool
    align: str
    window: tuple[int | None, int | None] | None
    scale: float | None
    softcap: float | None
    alibi_slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    dropout_p: float


class KvCacheOptions(TypedDict, total=False):
    k: torch.Tensor | None
    v: torch.Tensor | None
    block_table: torch.Tensor | None
    rotary_cos: torch.Tensor | None
    rotary_sin: torch.Tensor | None
    rotary_interleaved: bool
    causal: bool
    window: tuple[int | None, int | None] | None
    scale: float | None
    softcap: float | None
    sinks: torch.Tensor | None
