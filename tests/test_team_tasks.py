"""Every task of csrc/kernels/team_tasks.h runs once, however far threads are ahead of each other."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    path = tmp_path_factory.mktemp("team_tasks") / "team_tasks"
    flags = ["-std=c++17", "-O2", "-fopenmp", "-DGPT4V_FAST_ISA=scalar", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *flags, str(ROOT / "tests" / "team_tasks.cpp"), "-o", str(path)], check=True)
    return path


@pytest.mark.parametrize(("threads", "told"), [(1, 1), (2, 2), (3, 3), (8, 8), (2, 5)])
def test_every_task_runs_once(program, threads, told):
    result = subprocess.run([program, str(threads), str(told)], check=True, capture_output=True, text=True)
    assert result.stdout.split() == [str(sum(r * 7919 % 41 for r in range(20000))), "0"]
