"""Runs attention on tensors beside pages that must not be touched, for tests/attention/test_attention_memory.py.

python guarded_attention.py ISA end|begin      prints "ok" for each case
python guarded_attention.py touch              touches a guard, and dies
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch

import gpt4v_fast as gf
from gpt4v_fast import _C, _native
from gpt4v_fast.ops.attention.api import AttentionCall

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PAGE = mmap.PAGESIZE


def guarded(x: torch.Tensor, side: str) -> torch.Tensor:
    """A copy of x between two guard pages, which it touches on one side. Its memory is never given back."""
    size = x.numel() * x.element_size()
    pages = -(-size // PAGE) * PAGE
    start = _LIBC.mmap(
        None, pages + 2 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
    )
    assert start not in (None, ctypes.c_void_p(-1).value), "mmap failed"
    for guard in (start, start + PAGE + pages):
        assert _LIBC.mprotect(guard, PAGE, 0) == 0, "mprotect failed"
    begin = start + PAGE + (pages - size if side == "end" else 0)
    memory = (ctypes.c_char * size).from_address(begin)
    return torch.frombuffer(memory, dtype=x.dtype).view(x.shape).copy_(x)


def run(side: str, dtype: torch.dtype, S: int, T: int, D: int, Dv: int, **options: object) -> None:
    generator = torch.Generator().manual_seed(S + T + D)
    shapes = [(1, 4, S, D), (1, 2, T, D), (1, 2, T, Dv)]
    near = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    upstream = torch.randn(1, 4, S, Dv, generator=generator).to(dtype)
    results = []
    for place in (lambda x: x, lambda x: guarded(x, side)):
        leaves = [place(x).requires_grad_() for x in near]
        out = gf.attention(*leaves, mask=gf.Mask(causal=True), **options)
        results.append([out, *torch.autograd.grad(out, leaves, place(upstream))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    # The outputs too, which only the binding lets us place.
    out, lse = guarded(torch.zeros(1, 4, S, Dv, dtype=dtype), side), guarded(torch.zeros(1, 4, S), side)
    views = [_native.view(guarded(x, side)) for x in near]
    call = AttentionCall(*views, causal=True, scale=D**-0.5)
    _C.attention_forward(call, _native.view(out), _native.view(lse), 1)
    if not options:
        assert torch.equal(out, results[0][0])
    print("ok")


def run_cache(side: str, dtype: torch.dtype, S: int, page: int, D: int = 17, Dv: int = 33) -> None:
    """attention_kvcache that rotates and appends up to the cache's last token; every tensor is beside a guard."""
    generator = torch.Generator().manual_seed(S + page)
    new, capacity = S + 1, 70
    rows = (2, capacity) if page == 0 else (2 * capacity // page, page)
    shapes = {"q": (2, S, 4, D), "k_cache": (*rows, 2, D), "v_cache": (*rows, 2, Dv), "k": (2, new, 2, D),
              "v": (2, new, 2, Dv)}  # fmt: skip
    near = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    angles = torch.rand(capacity, 8, generator=generator)
    near |= {"rotary_cos": angles.cos().to(dtype), "rotary_sin": angles.sin().to(dtype)}
    near["cache_lengths"] = torch.tensor([capacity - new, 1], dtype=torch.int32)
    if page:
        near["block_table"] = torch.randperm(rows[0], generator=generator).view(2, -1).int()
    results = []
    for place in (torch.clone, lambda x: guarded(x, side)):
        tensors = {name: place(x) for name, x in near.items()}
        out, lse = gf.attention_kvcache(**tensors, rotary_interleaved=S % 2 == 0, return_lse=True)
        results.append((out, lse, tensors["k_cache"], tensors["v_cache"]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    print("ok")


def main(arguments: list[str]) -> None:
    if arguments == ["touch"]:
        x = guarded(torch.zeros(3), "end")
        print(ctypes.c_char.from_address(x.data_ptr() + 12).value)
        return
    isa, side = arguments
    with gf.force(isa=isa, backend="cpu"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for S, T, D, Dv in [(1, 700, 64, 64), (3, 65, 5, 7), (49, 49, 17, 17), (70, 133, 64, 80), (97, 97, 72, 1)]:
                for softcap in (None, 5.0):
                    run(side, dtype, S, T, D, Dv, **({} if softcap is None else {"softcap": softcap}))
            for S in (1, 20):
                for page in (0, 1, 5):
                    run_cache(side, dtype, S, page)


if __name__ == "__main__":
    main(sys.argv[1:])
