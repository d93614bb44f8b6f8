"""Small C++ programs of the tests, on headers of csrc/ that need no Python."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def build(source: str, isa: str, flags: Sequence[str], program: Path) -> Path:
    """Compiles tests/`source` for the namespace of an ISA into `program`."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler: the package's own build needs one, the tests of an installed wheel do not")
    options = ["-std=c++17", "-O2", f"-DGPT4V_FAST_ISA={isa}", f"-I{ROOT / 'csrc'}", *flags]
    subprocess.run([compiler, *options, str(ROOT / "tests" / source), "-o", str(program)], check=True)
    return program
