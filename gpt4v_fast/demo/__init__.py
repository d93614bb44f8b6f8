"""The main job: a small GPT-4V learns to answer questions about scanned digits. See `gpt4v-fast demo
--help`."""

from .run import run_demo
from .scoring import ask, evaluate

__all__ = ["ask", "evaluate", "run_demo"]
