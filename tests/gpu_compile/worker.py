"""Compiles launches in processes of their own and hands back what the compiler made of them.

The stand-in driver takes the place of Triton's for the whole process, and the process must not interpret kernels, so
neither belongs into pytest's. `compiled(launch)` starts a compilation ahead of time or waits for it; what was compiled
once is in Triton's own cache on disk (TRITON_CACHE_DIR) the next time.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
from typing import Any

WORKERS = 2


@dataclasses.dataclass(frozen=True)
class AttentionLaunch:
    """Forward and backward of one shape, with small tensors: what is compiled depends on none of B, H, S and T."""

    arch: str
    dtype: str
    D: int
    Dv: int | None = None
    causal: bool = True
    softcap: float | None = None
    group: int = 1
    passes: tuple[str, ...] = ("forward", "backward")

    def __str__(self) -> str:
        name = f"{self.arch}-{self.dtype}-d{self.D}" + (f"-dv{self.Dv}" if self.Dv else "")
        name += ("-causal" if self.causal else "") + ("-softcap" if self.softcap else "")
        name += f"-group{self.group}" if self.group > 1 else ""
        return name if len(self.passes) == 2 else f"{name}-{self.passes[0]}"

    def run(self) -> None:
        import torch

        from gpt4v_fast.kernels import attention

        dtype = getattr(torch, self.dtype)
        q = torch.zeros(1, 2 * self.group, 256, self.D, dtype=dtype)
        k = torch.zeros(1, 2, 256, self.D, dtype=dtype)
        v = torch.zeros(1, 2, 256, self.Dv or self.D, dtype=dtype)
        options: dict[str, Any] = {"scale": 0.125, "causal": self.causal, "offset": 0, "softcap": self.softcap}
        if "forward" in self.passes:
            attention.attention_forward(q, k, v, **options)
        if "backward" in self.passes:
            out, lse = torch.zeros(*q.shape[:3], v.shape[3], dtype=dtype), torch.zeros(q.shape[:3])
            attention.attention_backward(out, q, k, v, out, lse, **options)

    @property
    def module(self) -> str:
        return "attention"


@dataclasses.dataclass(frozen=True)
class CrossEntropyLaunch:
    arch: str
    dtype: str
    V: int
    weighted: bool = False
    label_smoothing: float = 0.0
    softcap: float | None = None

    def __str__(self) -> str:
        extras = [n for n in ("weighted", "label_smoothing", "softcap") if getattr(self, n)]
        return "-".join([self.arch, self.dtype, f"v{self.V}", *extras])

    def run(self) -> None:
        import torch

        from gpt4v_fast.kernels import cross_entropy

        logits = torch.zeros(3, self.V, dtype=getattr(torch, self.dtype))
        target, row = torch.zeros(3, dtype=torch.int64), torch.zeros(3)
        options: dict[str, Any] = {
            "weight": torch.ones(self.V) if self.weighted else None,
            "ignore_index": -100,
            "label_smoothing": self.label_smoothing,
            "softcap": self.softcap,
        }
        cross_entropy.cross_entropy_forward(logits, target, **options)
        cross_entropy.cross_entropy_backward(row, row, logits, target, row, **options, out=logits)

    @property
    def module(self) -> str:
        return "cross_entropy"


Launch = AttentionLaunch | CrossEntropyLaunch


@functools.cache
def compiled(launch: Launch) -> concurrent.futures.Future[Any]:
    """A future of {kernel's name: readback.Facts}; "... again" for a second kernel of the same name, as dk's and dv's
    where heads are taken in chunks."""
    return _pool().submit(_compile, launch)


@functools.cache
def _pool() -> concurrent.futures.ProcessPoolExecutor:
    pool = concurrent.futures.ProcessPoolExecutor(
        WORKERS, mp_context=multiprocessing.get_context("spawn"), initializer=_start
    )
    atexit.register(pool.shutdown, cancel_futures=True)
    return pool


def _start() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def _compile(launch: Launch) -> dict[str, Any]:
    import importlib

    from gpu_compile.readback import facts
    from gpu_compile.stand_in import compiled_for

    module = importlib.import_module(f"gpt4v_fast.kernels.{launch.module}")
    with compiled_for(launch.arch, module) as kernels:
        launch.run()
    found: dict[str, Any] = {}
    for kernel in kernels:
        name = kernel.metadata.name
        found[f"{name} again" if name in found else name] = facts(kernel)
    return found
