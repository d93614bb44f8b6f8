"""What goes wrong with AMX's tiles if anything does: sums and rows that are no whole tiles, reads past a tensor (which
no sanitizer sees), and others who use tiles on the same threads. Every ISA takes the same tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import attention_cases
import pytest
import torch
from attention_cases import causal
from loss_cases import BF16, ISAS, LinearCase, at_thread_counts, make_labels
from test_linear_cross_entropy import check

import gpt4v_fast as gf

GUARDED = Path(__file__).parent / "guarded_loss.py"

# A tile holds 16 rows and 32 terms; products take 32 rows and 48 columns, and 96 rows of the weight.
LOSSES = [
    LinearCase("less-than-a-tile", 3, 5, 7, BF16),
    LinearCase("one-under", 15, 95, 31, BF16),
    LinearCase("whole", 48, 96, 64, BF16),
    LinearCase("one-over", 17, 97, 33, BF16),
    LinearCase("an-odd-number-of-terms", 33, 113, 95, BF16),
    LinearCase("half-a-tile-of-terms", 80, 208, 48, BF16),
    LinearCase("half-a-tile-of-tokens", 16, 500, 96, BF16, ignored=0.0),
    LinearCase("several-blocks-of-classes", 60, 1700, 40, BF16),
]
ATTENTIONS = [
    attention_cases.Case(f"{S}-queries-{T}-keys-{D}-{Dv}", S, T, D=D, Dv=Dv, dtype=BF16, mask=mask)
    for S, T, D, Dv in [(20, 15, 15, 17), (33, 17, 31, 31), (49, 65, 33, 48), (97, 129, 72, 80), (50, 257, 96, 33)]
    for mask in (None, causal)
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", LOSSES, ids=lambda case: case.name)
def test_losses_of_no_whole_tiles(case, isa):
    with gf.force(isa=isa):
        check(case)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", ATTENTIONS, ids=lambda case: f"{case.name}{'-causal' * (case.mask is causal)}")
def test_attention_of_no_whole_tiles(case, isa):
    attention_cases.check(case, isa)


@pytest.mark.skipif(sys.platform != "linux", reason="guard pages are made by Linux's mmap and mprotect")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("side", ["end", "begin"])
def test_no_byte_outside_is_touched(isa, side):
    """In a process of its own, which a touch would end."""
    done = subprocess.run([sys.executable, GUARDED, isa, side], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["ok"] * 32


@pytest.mark.parametrize("isa", ISAS)
def test_products_of_torch_before_between_and_after(isa):
    """oneDNN configures the tiles of the same threads for its own products."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(300, 300, generator=generator).bfloat16() for _ in "ab")
    hidden, weight = (torch.randn(n, 72, generator=generator).bfloat16() for n in (100, 700))
    q, k, v = (torch.randn(1, 2, 150, 72, generator=generator).bfloat16() for _ in "qkv")
    target = make_labels(100, 700, 0.1)

    def of_torch() -> list[torch.Tensor]:
        return [a @ b, a[:17, :33] @ b[:33, :19], torch.nn.functional.linear(a, b[:7])]

    def of_ours() -> list[torch.Tensor]:
        results = []
        for function, inputs in (
            (lambda *x: gf.linear_cross_entropy(*x, target), (hidden, weight)),
            (lambda *x: gf.attention(*x, mask=gf.Mask(causal=True)), (q, k, v)),
        ):
            leaves = [x.clone().requires_grad_() for x in inputs]
            out = function(*leaves)
            results += [out.detach(), *torch.autograd.grad(out.float().sum(), leaves)]
        return results

    def alternating() -> list[torch.Tensor]:
        return [*of_torch(), *of_ours(), *of_torch(), *of_ours(), *of_torch()]

    with gf.force(isa=isa):
        for results in at_thread_counts(alternating, (1, 2, 3)):
            torch_first, ours_first, torch_second, ours_second, torch_third = (
                results[:3], results[3:10], results[10:13], results[13:20], results[20:],
            )  # fmt: skip
            for first, others in ((torch_first, (torch_second, torch_third)), (ours_first, (ours_second,))):
                for other in others:
                    assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))
            exact = [a.double() @ b.double(), a[:17, :33].double() @ b[:33, :19].double()]
            for got, want in zip(torch_first, exact, strict=False):
                assert (got.double() - want).abs().max() < 0.01 * want.abs().max()
