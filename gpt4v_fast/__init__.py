"""Fast attention, softmax cross-entropy and patch embedding for vision-language models in PyTorch.

    import gpt4v_fast as gf
    out = gf.attention(q, k, v, mask=gf.Mask(causal=True))
    loss = gf.linear_cross_entropy(hidden, weight, target)
    tokens = gf.patch_embed(pixels, weight)

Each op runs on C++ SIMD kernels on a CPU and on Triton or CUDA kernels on a GPU; `explain` says which one.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

# A wheel has kernels/ and benchmarks/ in this package. In a source tree, which an editable install runs from, they lie
# beside it, and setuptools' finder for editable installs does not serve kernels/, a folder without __init__.py.
__path__ = [*__path__, *(str(Path(p).parent) for p in __path__ if not Path(p, "kernels").is_dir())]

from gpt4v_fast.backends import FallbackError, explain, force, strict
from gpt4v_fast.masks import Mask
from gpt4v_fast.ops.attention import attention
from gpt4v_fast.ops.attention_kvcache import attention_kvcache
from gpt4v_fast.ops.attention_varlen import attention_varlen
from gpt4v_fast.ops.cross_entropy import cross_entropy
from gpt4v_fast.ops.labels import check_labels
from gpt4v_fast.ops.linear_cross_entropy import linear_cross_entropy
from gpt4v_fast.ops.patch_embed import patch_embed
from gpt4v_fast.ops.patch_embed_packed import patch_embed_packed
from gpt4v_fast.reference import LossStats

__version__ = "0.1.0"

# The model needs transformers; it is imported when one of its names is first used.
_MODEL_NAMES = (
    "GPT4VConfig",
    "GPT4VForConditionalGeneration",
    "GPT4VImageProcessor",
    "GPT4VModel",
    "GPT4VProcessor",
    "GPT4VTokenizer",
)
_SUBMODULES = ("models", "nn", "reference")

__all__ = [
    "FallbackError",
    "LossStats",
    "Mask",
    "attention",
    "attention_kvcache",
    "attention_varlen",
    "check_labels",
    "cross_entropy",
    "explain",
    "force",
    "linear_cross_entropy",
    "patch_embed",
    "patch_embed_packed",
    "strict",
    *_MODEL_NAMES,
]


def __getattr__(name: str) -> Any:
    if name in _MODEL_NAMES:
        return getattr(importlib.import_module("gpt4v_fast.models.gpt4v"), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"gpt4v_fast.{name}")
    raise AttributeError(f"module 'gpt4v_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODEL_NAMES, *_SUBMODULES])
