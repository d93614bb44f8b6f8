"""Fast attention, softmax cross-entropy and patch embedding for vision-language models in PyTorch.

    import gpt4v_fast as gf
    out = gf.attention(q, k, v, mask=gf.Mask(causal=True))
    loss = gf.linear_cross_entropy(hidden, weight, target)
    tokens = gf.patch_embed(pixels, weight)

Each op runs on C++ SIMD kernels on a CPU and on Triton or CUDA kernels on a GPU; `explain` says which one.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

# A wheel has kernels/ and benchmarks/ in this package. In a source tree, which an editable install runs from, they lie
# beside it, and setuptools' finder for editable installs does not serve kernels/, a folder without __init__.py.
__path__ = [*__path__, *(str(Path(p).parent) for p in __path__ if not Path(p, "kernels").is_dir())]

from gpt4v_fast import _command_environment

_command_environment.prepare()  # before anything imports torch

from gpt4v_fast.backends import FallbackError, FallbackWarning, explain, force, strict
from gpt4v_fast.masks import Mask
from gpt4v_fast.ops.attention import attention, attention_kvcache, attention_varlen
from gpt4v_fast.ops.loss import LossStats, check_labels, cross_entropy, linear_cross_entropy
from gpt4v_fast.ops.patch_embed import patch_embed, patch_embed_packed

__version__ = "0.1.0"

# The model needs transformers; it is imported when one of its names is first used. Without transformers these names do
# not exist: `from gpt4v_fast import *`, dir, hasattr and help work, and using one says what to install.
_MODEL_NAMES = (
    "GPT4VConfig",
    "GPT4VForConditionalGeneration",
    "GPT4VImageProcessor",
    "GPT4VModel",
    "GPT4VProcessor",
    "GPT4VTokenizer",
)
_MODEL_NEEDS = ("transformers", "tokenizers", "safetensors", "PIL")
_SUBMODULES = ("models", "nn", "reference")


def _has_model() -> bool:
    return all(importlib.util.find_spec(name) for name in _MODEL_NEEDS)


__all__ = [
    "FallbackError",
    "FallbackWarning",
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
]
if _has_model():
    __all__ += _MODEL_NAMES


def __getattr__(name: str) -> Any:
    if name not in (*_MODEL_NAMES, *_SUBMODULES):
        raise AttributeError(f"module 'gpt4v_fast' has no attribute {name!r}")
    try:
        if name in _SUBMODULES:
            return importlib.import_module(f"gpt4v_fast.{name}")
        return getattr(importlib.import_module("gpt4v_fast.models.gpt4v"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _MODEL_NEEDS:
            raise
        message = f'gpt4v_fast.{name} needs {error.name}: pip install "gpt4v_fast[model]"'
        raise AttributeError(message, name=name) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "nn", "reference", *(("models",) if _has_model() else ())})
