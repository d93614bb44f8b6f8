"""What the tests of both losses share: labels, memory poisoning, and calls of a function at several thread counts."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from gpt4v_fast import backends

IGNORED = -100
ISAS = backends.available_isas()
BF16_ISAS = ("avx512_bf16", "amx_bf16")  # those that multiply bf16; the others widen it to fp32
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


memory_is_measured = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists() or "asan" in os.environ.get("LD_PRELOAD", ""),
    reason="the peak of memory is read from Linux's /proc, and a sanitizer's allocator keeps what is freed",
)


_MEMORY = """
import sys, torch, gpt4v_fast as gf
dtype, (N, V, E) = getattr(torch, sys.argv[1]), map(int, sys.argv[2:])
def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024
hidden, weight = (torch.randn(rows, E).to(dtype).requires_grad_() for rows in (N, V))
target = torch.randint(0, V, (N,))
gf.linear_cross_entropy(hidden[:50], weight[:50], target[:50] % 50, label_smoothing=0.1).backward()
hidden.grad, weight.grad = torch.empty_like(hidden).fill_(0), torch.empty_like(weight).fill_(0)
gradients = sum(x.numel() * x.element_size() for x in (hidden, weight))
def peak(f):
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
    before = status("VmRSS")
    result = f()
    return status("VmHWM") - before, status("VmRSS") - before, result
"""


def measured_memory(script: str, dtype: str, N: int, V: int, E: int) -> list[int]:
    """The numbers that `script` prints in a process of its own, where the tensors of a loss are made and warm.

    peak(f) there gives (the peak over what was resident before f, what is left of that behind it, f()).
    """
    arguments = [sys.executable, "-c", _MEMORY + script, dtype, str(N), str(V), str(E)]
    run = subprocess.run(arguments, capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stderr
    return [int(x) for x in run.stdout.split()]


def make_labels(N: int, V: int, ignored: float = 0.0, ignore_index: int = IGNORED, seed: int = 1) -> torch.Tensor:
    """N labels, of which about the fraction `ignored` (exactly none or all for 0 and 1) is ignore_index."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, V, (N,), generator=generator)
    return torch.where(torch.rand(N, generator=generator) < ignored, ignore_index, labels)


def class_weights(V: int) -> torch.Tensor:
    return torch.rand(V, generator=torch.Generator().manual_seed(2)) + 0.5


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN here, so an element that a kernel leaves out is seen."""
    on, warning = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(on, warn_only=warning)


def at_thread_counts(function: Callable[[], Any], counts: tuple[int, ...] = (1, 2, 3, 7)) -> list[Any]:
    """What `function` returns with each number of threads, and once more with the last."""
    before = torch.get_num_threads()
    results = []
    try:
        for count in (*counts, counts[-1]):
            torch.set_num_threads(count)
            results.append(function())
    finally:
        torch.set_num_threads(before)
    return results


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@dataclasses.dataclass(frozen=True)
class LinearCase:
    """One call of linear_cross_entropy."""

    name: str
    N: int
    V: int
    E: int
    dtype: torch.dtype = FP32
    spread: float = 2.0  # standard deviation of the logits
    planted: bool = False  # rows of the weight equal to hidden's: the label of a token is then nearly certain
    bias: torch.dtype | None = None
    ignored: float = 0.2
    ignore_index: int = IGNORED
    weighted: bool = False
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    reduction: str = "none"

    def tensors(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(self.N, self.E, generator=generator)
        weight = torch.randn(self.V, self.E, generator=generator) * (self.spread / math.sqrt(max(self.E, 1)))
        if self.planted:
            counted = self.target().clamp(min=0)
            weight[counted] = self.spread * hidden
        tensors = {"hidden": hidden.to(self.dtype), "weight": weight.to(self.dtype)}
        if self.bias is not None:
            tensors["bias"] = torch.randn(self.V, generator=generator).to(self.bias)
        return tensors

    def target(self) -> torch.Tensor:
        return make_labels(self.N, self.V, self.ignored, self.ignore_index)

    def options(self) -> dict[str, Any]:
        names = ("ignore_index", "label_smoothing", "z_loss", "softcap", "reduction")
        options = {name: getattr(self, name) for name in names}
        return {**options, "class_weight": class_weights(self.V) if self.weighted else None}


# What Hypothesis draws for a test of a loss, and of the linear loss.
LOSS_ARGUMENTS: dict[str, st.SearchStrategy[Any]] = {
    "dtype": st.sampled_from([FP32, BF16, FP16]),
    "ignored": st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    "ignore_index": st.sampled_from([IGNORED, 0, -1]),
    "weighted": st.booleans(),
    "label_smoothing": st.sampled_from([0.0, 0.1, 1.0]),
    "z_loss": st.sampled_from([0.0, 1e-3]),
    "softcap": st.sampled_from([None, 2.0, 50.0]),
    "reduction": st.sampled_from(["sum", "none"]),
}
LINEAR_ARGUMENTS: dict[str, st.SearchStrategy[Any]] = {
    **LOSS_ARGUMENTS,
    "spread": st.sampled_from([0.0, 1.0, 8.0]),
    "planted": st.booleans(),
    "bias": st.sampled_from([None, FP32, BF16, FP16]),
}

EVERYTHING = {"weighted": True, "label_smoothing": 0.2, "z_loss": 1e-2, "softcap": 4.0}

LINEAR_CASES = [
    LinearCase("one-by-one", 1, 1, 1, ignored=0.0),
    LinearCase("one-class", 5, 1, 9, weighted=True, label_smoothing=0.3, z_loss=0.01),
    LinearCase("no-depth", 6, 11, 0, bias=FP32),
    LinearCase("small", 9, 7, 5, BF16, bias=BF16),
    LinearCase("one-tile", 48, 64, 128),
    LinearCase("one-over", 49, 65, 129, FP16, bias=FP32),
    LinearCase("several-ranges", 50, 1031, 70, BF16, label_smoothing=0.1),
    LinearCase("everything", 61, 301, 33, bias=FP32, **EVERYTHING),
    LinearCase("everything-bf16", 61, 301, 33, BF16, bias=FP32, **EVERYTHING),
    LinearCase("everything-fp16", 61, 301, 33, FP16, bias=FP16, reduction="mean", **EVERYTHING),
    LinearCase("mean", 30, 77, 20, reduction="mean", weighted=True, ignored=0.5),
    LinearCase("ignored-in-range", 30, 7, 20, ignore_index=3, ignored=0.0, reduction="sum"),
    LinearCase("ninety-percent-ignored", 200, 99, 20, ignored=0.9, reduction="mean"),
    LinearCase("peaked", 20, 1000, 64, planted=True, spread=1.0),
    LinearCase("peaked-bf16", 20, 1000, 64, BF16, planted=True, spread=1.0),
    LinearCase("flat", 20, 1000, 16, spread=0.0, label_smoothing=0.1),
    LinearCase("plus-minus-1e4", 20, 1000, 16, spread=1e4, bias=FP32),
    LinearCase("capped-100", 20, 1000, 16, spread=100.0, softcap=30.0),
    LinearCase("capped-1e4", 20, 1000, 16, spread=1e4, softcap=30.0),
]


# For a worker with Triton's interpreter (triton_interpreter.py).


def interpreted_linear_cross_entropy(
    tensors: dict[str, torch.Tensor],
    target: torch.Tensor,
    options: dict[str, Any],
    constants: dict[str, int],
    upstream: Sequence[torch.Tensor] | None = None,
    wanted: Sequence[str] = ("hidden", "weight", "bias"),
) -> tuple[str, list[torch.Tensor]]:
    """(the kernel, [loss, lse, z_loss] or, with gradients of the first two, those of the wanted tensors) of
    gf.linear_cross_entropy on the Triton kernels, with other constants of kernels/loss/plans.py."""
    from unittest import mock

    import gpt4v_fast as gf
    from gpt4v_fast.kernels.loss import plans

    leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in tensors.items()}
    with gf.force(backend="triton"), mock.patch.multiple(plans, **constants):
        choice = gf.explain(gf.linear_cross_entropy, target=target, **leaves, **options)
        assert choice.backend == "triton"
        loss, stats = gf.linear_cross_entropy(target=target, **leaves, return_stats=True, **options)
        if upstream is None:
            return choice.kernel, [x.detach() for x in (loss, stats.lse, stats.z_loss)]
        inputs = [leaves[name] for name in wanted if name in leaves]
        return choice.kernel, list(torch.autograd.grad([loss, stats.lse], inputs, list(upstream)))


def interpreted_bad_labels() -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """(loss, gradient, what each of three calls of check_labels raised) of losses with bad labels and without."""
    import gpt4v_fast as gf

    logits = torch.randn(2, 3, 5, requires_grad=True)
    errors = []

    def check_labels() -> None:
        try:
            gf.check_labels()
            errors.append("")
        except IndexError as error:
            errors.append(str(error))

    with gf.force(backend="triton"):
        loss = gf.cross_entropy(logits, torch.tensor([[0, 1, IGNORED], [4, 55, -7]]), reduction="none")
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        gf.cross_entropy(logits, torch.tensor([[66, 0, 0], [0, 0, 0]]))
        check_labels()
        gf.cross_entropy(logits, torch.zeros(2, 3, dtype=torch.int64))
        check_labels()
        gf.linear_cross_entropy(torch.randn(4, 8), torch.randn(5, 8), torch.tensor([9, 0, 7, 0]), shift=1)
        check_labels()
    return loss.detach(), gradient, errors
