"""What the machine can do at best, measured beside the kernels (csrc/probes/peak.h).

"fma" and "dot_bf16" are register-only loops of that instruction (GFLOP/s), "read" is a streaming read (GB/s). On an
ISA without bf16 products "dot_bf16" is the FMA peak: bf16 is widened there.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from gpt4v_fast._native import _C, view

from . import memory

UNITS = {"fma": "GFLOP/s", "dot_bf16": "GFLOP/s", "read": "GB/s"}
READ_BYTES = 256 * 2**20  # several times a last-level cache
HANDOFF_S = 5e-4


class Peaks:
    """The probes for a number of threads; each call of one takes about `seconds`. gpu.py has those of a GPU."""

    device = "cpu"

    def __init__(self, threads: int, seconds: float, read_bytes: int = READ_BYTES) -> None:
        self.threads, self.seconds, self.read_bytes = threads, seconds, read_bytes

    @functools.cached_property
    def _data(self) -> torch.Tensor:
        # Filled: untouched zeros would all be one page of memory.
        count = max(self.read_bytes // 4, self.threads * 2**18)
        return torch.full((count,), 1.0, dtype=torch.float32)

    def probe(self, bound: str) -> Callable[[], float]:
        """The probe of a `Case.bound`."""
        if bound == "read":
            return lambda: _C.peak_read(view(self._data), self.threads, self.seconds)
        if bound not in UNITS:
            raise ValueError(f"bound: expected one of {', '.join(UNITS)}, got {bound!r}")
        function = {"fma": _C.peak_fma, "dot_bf16": _C.peak_dot_bf16}[bound]
        return lambda: function(self.threads, self.seconds)

    def handoff_ns(self) -> float:
        """Nanoseconds until one of two threads sees what the other has written; 0 on one thread.

        Cores of one chiplet pass a line on in some 25 ns, cores of different chiplets or sockets in 200 and more, and a
        virtual machine's cores may be either from one second to the next.
        """
        return _C.handoff(min(self.seconds, HANDOFF_S)) if self.threads > 1 else 0.0

    @staticmethod
    def clock() -> float:
        return time.perf_counter()

    @staticmethod
    def available_bytes() -> int | None:
        """What new tensors can take; None where the system does not say."""
        return memory.available_bytes()

    @staticmethod
    def where() -> AbstractContextManager[object]:
        """Inputs and exact answers are made there."""
        return contextlib.nullcontext()

    def measure_all(self, repeats: int = 5) -> dict[str, float]:
        """The best of some repeats of every probe: what an undisturbed moment of this machine reaches."""
        return {bound: max(self.probe(bound)() for _ in range(repeats)) for bound in UNITS}
