"""Nothing is read or written outside of the tensors, and offsets of more than 2^31 elements are right.

The sanitizer build sees heap blocks that torch made; here tensors end, or begin, exactly where a page begins that must
not be touched.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_cases import ISAS

import gpt4v_fast as gf

GUARDED = Path(__file__).parents[1] / "native" / "guarded_attention.py"


@pytest.mark.skipif(sys.platform != "linux", reason="guard pages are made by Linux's mmap and mprotect")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("side", ["end", "begin"])
def test_no_byte_outside_is_touched(isa, side):
    """In a process of its own, which a touch would end."""
    done = subprocess.run([sys.executable, GUARDED, isa, side], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["ok"] * 48


@pytest.mark.skipif(sys.platform != "linux", reason="guard pages are made by Linux's mmap and mprotect")
def test_the_guards_guard():
    done = subprocess.run([sys.executable, GUARDED, "touch"], capture_output=True, text=True, timeout=60)
    assert done.returncode < 0 and done.stdout == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offsets_of_more_than_2_31_elements(dtype):
    """The second head lies 2^31 elements behind the first; what is in between is never touched, and so never there."""
    far, shape = 2**31, (1, 2, 70, 16)
    generator = torch.Generator().manual_seed(0)
    near = [torch.randn(shape, generator=generator).to(dtype) for _ in "qkv"]
    spread = []
    for x in near:
        buffer = torch.empty(far + 2 * x[0, 0].numel(), dtype=dtype)
        spread.append(buffer.as_strided(shape, (0, far, 16, 1)).copy_(x))
    upstream = torch.randn(shape, generator=generator).to(dtype)
    results = []
    for tensors in (near, spread):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = gf.attention(*leaves, mask=gf.Mask(causal=True))
        results.append([out, *torch.autograd.grad(out, leaves, upstream)])
    for got, want in zip(results[1], results[0], strict=True):
        assert torch.equal(got, want)
