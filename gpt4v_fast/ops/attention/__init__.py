"""Attention: dense, packed (varlen), and against a key/value cache."""

from __future__ import annotations

from gpt4v_fast.ops.attention.api import attention, attention_varlen
from gpt4v_fast.ops.attention.kvcache import attention_kvcache

__all__ = ["attention", "attention_kvcache", "attention_varlen"]
