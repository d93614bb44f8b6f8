"""Patch embedding by the C++ kernels (csrc/patch_embed/)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gpt4v_fast import backends
from gpt4v_fast._native import _C, threads

if TYPE_CHECKING:
    from gpt4v_fast.ops.patch_embed.api import PatchEmbedCall


class PatchEmbed(backends.Backend):
    backend, kernel = "cpu", "_C.patch_embed"

    def forward(self, call: PatchEmbedCall) -> torch.Tensor:
        tokens = torch.empty(call.pixels.shape[0], call.N, call.weight.shape[0], dtype=call.out_dtype)
        _C.patch_embed_forward(call, tokens, threads())
        return tokens

    def backward(self, call: PatchEmbedCall, saved: Any, upstream: Any, wanted: Any) -> dict[str, torch.Tensor | None]:
        grad_weight = torch.empty(call.weight.shape, dtype=torch.float32) if wanted.weight else None
        grad_pixels = torch.empty(call.pixels.shape, dtype=call.pixels.dtype) if wanted.pixels else None
        _C.patch_embed_backward(call, upstream.tokens, grad_weight, grad_pixels, threads())
        grad_weight = None if grad_weight is None else grad_weight.to(call.weight.dtype)
        return {"weight": grad_weight, "pixels": grad_pixels}
