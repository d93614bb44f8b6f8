"""Every task of csrc/product/team_tasks.h runs once, however far threads are ahead of each other."""

from __future__ import annotations

import subprocess
from pathlib import Path

import cpp_program
import pytest


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("team_tasks")
    return cpp_program.build("native/team_tasks.cpp", "scalar", ["-fopenmp"], folder / "team_tasks")


@pytest.mark.parametrize(("threads", "told"), [(1, 1), (2, 2), (3, 3), (8, 8), (2, 5)])
def test_every_task_runs_once(program, threads, told):
    result = subprocess.run([program, str(threads), str(told)], check=True, capture_output=True, text=True)
    assert result.stdout.split() == [str(sum(r * 7919 % 41 for r in range(20000))), "0"]
