"""Runs linear_cross_entropy on tensors beside pages that must not be touched, for tests/native/test_tiles.py.

python guarded_loss.py ISA end|begin      prints "ok" for each case
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from guarded_attention import guarded

import gpt4v_fast as gf

sys.path.append(str(Path(__file__).parents[1] / "loss"))  # a program of its own knows its own folder alone
from loss_cases import BF16, FP32, make_labels

# (N, V, E): one over and one under the 16 rows and 32 terms of a tile, and rows and terms that are less than one.
SIZES = [(1, 1, 1), (5, 7, 3), (15, 17, 31), (16, 16, 32), (17, 97, 33), (49, 191, 34), (50, 209, 64), (64, 300, 70)]


def run(side: str, dtype: torch.dtype, N: int, V: int, E: int, reduction: str) -> None:
    generator = torch.Generator().manual_seed(N + V + E)
    near = [torch.randn(shape, generator=generator).to(dtype) for shape in ((N, E), (V, E))]
    target = make_labels(N, V, 0.1)
    results = []
    for place in (lambda x: x, lambda x: guarded(x, side)):
        leaves = [place(x).requires_grad_() for x in near]
        loss = gf.linear_cross_entropy(*leaves, place(target), reduction=reduction)
        results.append([loss, *torch.autograd.grad(loss.sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    print("ok")


def main(isa: str, side: str) -> None:
    with gf.force(isa=isa, backend="cpu"):
        for dtype in (FP32, BF16):
            for sizes in SIZES:
                for reduction in ("mean", "none"):
                    run(side, dtype, *sizes, reduction)


if __name__ == "__main__":
    main(*sys.argv[1:])
