"""The models. Importing this package registers them with transformers' Auto classes."""

from __future__ import annotations

from pathlib import Path

try:
    from . import gpt4v
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] not in ("transformers", "tokenizers", "safetensors", "PIL"):
        raise
    message = f'gpt4v_fast.models needs {error.name}: pip install "gpt4v_fast[model]"'
    raise ModuleNotFoundError(message, name=error.name) from error


def digits_checkpoint() -> str:
    """The folder of the checkpoint that `gpt4v-fast demo` made, shipped with the package."""
    return str(Path(__file__).parent / "digits")


__all__ = ["digits_checkpoint", "gpt4v"]
