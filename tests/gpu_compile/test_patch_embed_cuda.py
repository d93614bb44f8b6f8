"""What nvcc made of csrc/cuda/patch_embed.cu, read back from the object that the build made for each architecture.

No GPU is needed. Times are not measured here or anywhere; registers, spills and instructions are facts of the code.
"""

from __future__ import annotations

import functools
import re
import subprocess

import pytest

from gpt4v_fast.ops.patch_embed import cuda

ARCHES = ("sm_80", "sm_90", "sm_100")
KERNELS = {"bf16": "MatrixUnitsI13__nv_bfloat16E", "fp16": "MatrixUnitsI6__halfE", "fp32": "FmaUnitsE"}
# Two blocks of 256 threads share a multiprocessor's 65,536 registers.
MOST_REGISTERS = 128

pytestmark = pytest.mark.skipif(
    not cuda.OBJECT.exists(), reason="there was no nvcc when the package was built, so no CUDA object"
)


@functools.cache
def cuobjdump(*arguments: str) -> str:
    triton = pytest.importorskip("triton", reason="cuobjdump comes inside the triton package")
    command = [triton.knobs.nvidia.cuobjdump.path, *arguments, str(cuda.OBJECT)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def usage(arch: str, kernel: str) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL ... of one kernel."""
    parts = cuobjdump("-res-usage").split("arch = ")  # one part of the object for each compiled file and architecture
    text = "".join(part for part in parts if part.startswith(f"{arch}\n"))
    line = re.search(rf"Function \w*patch_embed_kernel\w*{KERNELS[kernel]}\w*:\n(.*)", text)
    assert line is not None, f"the object has no kernel for {kernel} weights on {arch}"
    return {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", line.group(1))}


def instructions(arch: str, kernel: str) -> list[str]:
    """The mnemonics of one kernel."""
    text = cuobjdump("-sass", "-arch", arch)
    functions = re.split(r"Function : ", text)
    found = [part for part in functions if re.match(rf"\w*patch_embed_kernel\w*{KERNELS[kernel]}", part)]
    assert len(found) == 1, f"expected one kernel for {kernel} weights on {arch}, found {len(found)}"
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", found[0])


def count(names: list[str], pattern: str) -> int:
    return sum(1 for name in names if re.match(pattern, name))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("arch", ARCHES)
def test_no_spills_and_room_for_two_blocks(arch: str, kernel: str) -> None:
    found = usage(arch, kernel)
    assert found["STACK"] == 0 and found["LOCAL"] == 0, found
    assert 0 < found["REG"] <= MOST_REGISTERS, found
    names = instructions(arch, kernel)
    assert count(names, r"LDL|STL") == 0


@pytest.mark.parametrize("kernel", ["bf16", "fp16"])
@pytest.mark.parametrize("arch", ARCHES)
def test_16_bit_weights_use_the_tensor_cores(arch: str, kernel: str) -> None:
    names = instructions(arch, kernel)
    # A warp's 64 x 32 tile, a step of 32: 4 x 4 x 2 instructions of 16 x 8 x 16, (4 + 2) x 2 loads of four matrices.
    assert count(names, r"HMMA\.16816\.F32") == 32
    assert count(names, r"LDSM\.16\.M88\.4") == 12
    assert count(names, r"LDGSTS\.E\.(\w+\.)*128") > 0, "the widest copies of the weight bypass the registers"


@pytest.mark.parametrize("arch", ARCHES)
def test_fp32_weights_use_the_fma_units(arch: str) -> None:
    names = instructions(arch, "fp32")
    # 8 x 8 sums, 16 steps; sm_100 multiplies two at a time where it can.
    assert count(names, r"FFMA2") * 2 + count(names, r"FFMA(\.|$)") >= 8 * 8 * 16
    assert count(names, r"HMMA") == 0
    assert count(names, r"LDS\.128") == 4 * 16
