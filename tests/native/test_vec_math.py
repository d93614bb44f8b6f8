"""The vector functions of csrc/simd/vec_math.h keep to the errors that they state, on every ISA."""

from __future__ import annotations

import math
import subprocess

import cpp_program
import pytest
from attention_cases import ISAS

AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma"
BF16 = f"{AVX512} -mavx512bf16"
FLAGS = {
    "scalar": "",
    "avx2": "-mavx2 -mfma",
    "avx512": AVX512,
    "avx512_bf16": BF16,
    "amx_bf16": f"{BF16} -mamx-tile -mamx-bf16",
}


@pytest.fixture(scope="module", params=ISAS)
def measured(request, tmp_path_factory) -> dict[str, list[float]]:
    flags = ["-ffp-contract=off", "-fno-math-errno", *FLAGS[request.param].split()]
    program = cpp_program.build(
        "native/vec_math.cpp", request.param, flags, tmp_path_factory.mktemp("vec_math") / request.param
    )
    lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    return {name: [float(x) for x in rest] for name, *rest in (line.split() for line in lines)}


def test_errors_are_those_that_the_header_states(measured):
    assert 0 < measured["exp2"][0] < 1.9e-7
    assert 0 < measured["exp2_of_negative"][1] < 1.9e-7
    assert 0 < measured["log"][0] < 8e-8
    assert 0 < measured["log_near_1"][0] < 8e-8
    assert 0 < measured["tanh"][0] < 1.8e-7
    assert 0 < measured["tanh"][1] < 1.2e-7
    assert 0 < measured["tanh_slope"][0] < 5e-7


def test_edges(measured):
    nan, other_nan, *rest = measured["exp2_edges"]
    assert math.isnan(nan) and math.isnan(other_nan)
    assert rest == [0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 2.0, pytest.approx(2.0**127)]
    nan, *rest = measured["log_edges"]
    assert math.isnan(nan) and rest == [math.inf, 0.0]
    nan, other_nan, *rest = measured["tanh_edges"]
    assert math.isnan(nan) and math.isnan(other_nan)
    assert rest == [1.0, -1.0, 0.0, -0.0, 1.0, -1.0, -1.0, 1.0]
    assert math.copysign(1.0, rest[3]) == -1.0
