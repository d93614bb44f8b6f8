"""What a GPU can do at best, how its calls are timed and what memory they take: `--device cuda` of the benchmarks.

The probes take the place of those of peaks.py: "fma" and "dot_bf16" are cuBLAS's product of random square matrices,
fp32 without tf32 and bf16 (a register-only loop says little of a chip that slows down under load), "read" is a copy
within the device, bytes read and written (GB/s).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from .memory import results_bytes
from .peaks import UNITS
from .registry import Outputs

SIDES = {"fma": (4096, torch.float32), "dot_bf16": (8192, torch.bfloat16)}
COPY_BYTES = 2**30  # many times the second-level cache


class GpuPeaks:
    """The probes of the current GPU, in place of `peaks.Peaks`; each call of one takes some milliseconds."""

    device = "cuda"

    def __init__(self) -> None:
        self._operands: dict[str, torch.Tensor] = {}

    def probe(self, bound: str) -> Callable[[], float]:
        if bound not in UNITS:
            raise ValueError(f"bound: expected one of {', '.join(UNITS)}, got {bound!r}")
        if bound == "read":
            return self._copy_gbps
        return functools.partial(self._product_gflops, bound)

    def _product_gflops(self, bound: str) -> float:
        side, dtype = SIDES[bound]
        if bound not in self._operands:
            self._operands[bound] = torch.randn(side, side, device="cuda").to(dtype)
        a = self._operands[bound]
        return 2e-9 * side**3 / self._seconds(lambda: a @ a)

    def _copy_gbps(self) -> float:
        if "read" not in self._operands:
            self._operands["read"] = torch.ones(2, COPY_BYTES // 8, device="cuda")
        to, source = self._operands["read"]
        return 1e-9 * COPY_BYTES / self._seconds(lambda: to.copy_(source))

    def _seconds(self, run: Callable[[], object], calls: int = 4) -> float:
        run()
        start = self.clock()
        for _ in range(calls):
            run()
        return (self.clock() - start) / calls

    def handoff_ns(self) -> float:
        return 0.0

    def measure_all(self, repeats: int = 5) -> dict[str, float]:
        return {bound: max(self.probe(bound)() for _ in range(repeats)) for bound in UNITS}

    @staticmethod
    def clock() -> float:
        """Seconds, once the device has done all that it was told."""
        torch.cuda.synchronize()
        return time.perf_counter()

    @staticmethod
    def available_bytes() -> int:
        """Free for tensors: what the driver has and what torch's allocator holds without need."""
        held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(torch.cuda.mem_get_info()[0]) + held

    @staticmethod
    def where() -> AbstractContextManager[object]:
        """Inputs and exact answers are made there."""
        return torch.device("cuda")


def extra_bytes(run: Callable[[], Outputs]) -> int:
    """The most that torch's allocator has given out during a call, beside what it had and the results."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = run()
    torch.cuda.synchronize()
    return max(0, torch.cuda.max_memory_allocated() - before - results_bytes(outputs))
