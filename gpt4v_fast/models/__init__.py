"""The models. Importing this package registers them with transformers' Auto classes."""

from __future__ import annotations

from pathlib import Path

from . import gpt4v


def digits_checkpoint() -> str:
    """The folder of the checkpoint that `gpt4v-fast demo` made, shipped with the package."""
    return str(Path(__file__).parent / "digits")


__all__ = ["digits_checkpoint", "gpt4v"]
