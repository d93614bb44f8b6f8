"""The oracle of every op under the op's own name: plain PyTorch, every argument, in the dtype of its inputs.

Give it float64 tensors and it is the exact answer that tests compare with; give it the tested dtype and it is what
PyTorch itself would compute. Everything is differentiable by autograd. Nothing here is fast, and nothing picks it
silently (see backends.py).
"""

from __future__ import annotations

from gpt4v_fast.ops.attention.dropout import dropout_keep, philox4x32
from gpt4v_fast.ops.attention.kvcache_reference import append_to_cache, attention_kvcache, gather_pages, rotate
from gpt4v_fast.ops.attention.reference import attention, attention_core, attention_varlen
from gpt4v_fast.ops.loss.reference import (
    LossStats,
    cross_entropy,
    cross_entropy_core,
    cross_entropy_core_backward,
    linear_cross_entropy,
)
from gpt4v_fast.ops.patch_embed.packed_reference import patch_embed_packed, resize_positions
from gpt4v_fast.ops.patch_embed.reference import patch_embed, patch_tokens, unfold_patches
from gpt4v_fast.ops.softcap import cap

__all__ = [
    "LossStats",
    "append_to_cache",
    "attention",
    "attention_core",
    "attention_kvcache",
    "attention_varlen",
    "cap",
    "cross_entropy",
    "cross_entropy_core",
    "cross_entropy_core_backward",
    "dropout_keep",
    "gather_pages",
    "linear_cross_entropy",
    "patch_embed",
    "patch_embed_packed",
    "patch_tokens",
    "philox4x32",
    "resize_positions",
    "rotate",
    "unfold_patches",
]
