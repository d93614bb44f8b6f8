"""Memory that csrc/simd/pages.h gets is there, all of it and no more, in large pages or without."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cpp_program
import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere pages come as they are written")


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    return cpp_program.build("native/pages.cpp", "scalar", ["-fopenmp"], tmp_path_factory.mktemp("pages") / "pages")


@pytest.mark.parametrize("left_out", [0, 1, 5])
def test_pages_are_there(program, left_out):
    result = subprocess.run([program, str(left_out)], check=True, capture_output=True, text=True).stdout.split()
    if result == ["unknown"]:
        pytest.skip("this system does not get pages before they are written (Linux 5.14 does)")
    wanted, got, outside, changed, left = map(int, result)
    assert wanted >= 5 * 512  # of 13 MiB
    assert (got, outside, changed) == (wanted, 0, 0)
    if left_out > 0:
        assert left == left_out - 1
