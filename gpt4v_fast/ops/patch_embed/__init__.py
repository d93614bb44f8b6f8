"""From pixels to patch tokens: images and videos of one size, and packed images of different sizes."""

from __future__ import annotations

from gpt4v_fast.ops.patch_embed.api import patch_embed
from gpt4v_fast.ops.patch_embed.packed import patch_embed_packed

__all__ = ["patch_embed", "patch_embed_packed"]
