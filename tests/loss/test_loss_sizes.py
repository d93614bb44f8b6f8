"""The scratch of linear cross-entropy's backward pass stays within the memory that is promised, for every dtype."""

from __future__ import annotations

import subprocess

import cpp_program
import pytest
from attention_cases import ISAS
from test_vec_math import FLAGS


@pytest.mark.parametrize("isa", ISAS)
def test_scratch_is_within_what_is_promised(isa, tmp_path):
    flags = ["-fopenmp", "-ffp-contract=off", *FLAGS[isa].split()]
    if isa != "scalar":
        flags.append("-mf16c")
    program = cpp_program.build("loss/loss_sizes.cpp", isa, flags, tmp_path / isa)
    lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) == (1 if isa == "amx_bf16" else 3)
    for dtype, most, promised in (line.split() for line in lines):
        assert 0 < int(most) <= int(promised) < 64 << 20, dtype
