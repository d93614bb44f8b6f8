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

        from gpt4v_fast.kernels.attention import forward as attention

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
    def modules(self) -> tuple[str, ...]:
        return ("attention.forward",)


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

        from gpt4v_fast.kernels.loss import cross_entropy

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
    def modules(self) -> tuple[str, ...]:
        return ("loss.cross_entropy",)


@dataclasses.dataclass(frozen=True)
class LinearCrossEntropyLaunch:
    """Forward and backward, all gradients; `chunked`: with sums that go on from chunk to chunk; `kept`: with logits in
    the memory of weight's gradient, of which further tokens have none; `few`: with the tile for few tokens; `ragged`:
    classes in no whole blocks."""

    arch: str
    dtype: str
    E: int = 576
    bias: bool = False
    weighted: bool = False
    label_smoothing: float = 0.0
    softcap: float | None = None
    chunked: bool = False
    kept: bool = False
    few: bool = False
    ragged: bool = False
    passes: tuple[str, ...] = ("forward", "backward")

    def __str__(self) -> str:
        known = ("bias", "weighted", "label_smoothing", "softcap", "chunked", "kept", "few", "ragged")
        extras = [name for name in known if getattr(self, name)]
        passes = self.passes if len(self.passes) == 1 else ()
        return "-".join([self.arch, self.dtype, f"e{self.E}", *extras, *passes])

    @property
    def V(self) -> int:
        return 3000 if self.ragged else 3072

    def run(self) -> None:
        import unittest.mock

        from gpt4v_fast.kernels import configs

        def of_hidden(config: configs.LinearCrossEntropyConfig, tokens: int, E: int) -> configs.ProductTile:
            return config.few if self.few and config.few is not None else config.grad_hidden

        with unittest.mock.patch.object(configs.LinearCrossEntropyConfig, "of_hidden", of_hidden):
            self._run_kept() if self.kept else self._run_plain()

    def _run_plain(self) -> None:
        import unittest.mock

        import torch

        from gpt4v_fast.kernels.loss import linear_cross_entropy, linear_cross_entropy_backward, plans

        dtype = getattr(torch, self.dtype)
        hidden, weight = torch.zeros(384, self.E, dtype=dtype), torch.zeros(self.V, self.E, dtype=dtype)
        target, row = torch.zeros(384, dtype=torch.int64), torch.zeros(384)
        bias = torch.zeros(self.V) if self.bias else None
        options: dict[str, Any] = {
            "class_weight": torch.ones(self.V) if self.weighted else None,
            "ignore_index": -100,
            "label_smoothing": self.label_smoothing,
            "softcap": self.softcap,
        }
        if "forward" in self.passes:
            linear_cross_entropy.linear_cross_entropy_forward(hidden, weight, bias, target, **options)
        if "backward" in self.passes:
            tokens, classes = (128, 1024) if self.chunked else (plans.CHUNK_TOKENS, 3072)
            sizes = {"CHUNK_TOKENS": tokens, "GRADIENT_BYTES": tokens * classes * dtype.itemsize}
            with unittest.mock.patch.multiple(plans, **sizes):
                linear_cross_entropy_backward.linear_cross_entropy_backward(
                    row, row, hidden, weight, bias, target, row, of_hidden=True, of_weight=True, of_bias=True, **options
                )

    def _run_kept(self) -> None:
        import unittest.mock

        import torch

        from gpt4v_fast.kernels.loss import linear_cross_entropy, linear_cross_entropy_kept, plans

        N, V = self.E // 128 * 128 + 256, self.V
        hidden, weight = (torch.zeros(n, self.E, dtype=torch.bfloat16) for n in (N, V))
        target, row = torch.zeros(N, dtype=torch.int64), torch.zeros(N)
        options: dict[str, Any] = {
            "class_weight": torch.ones(V) if self.weighted else None,
            "ignore_index": -100,
            "label_smoothing": self.label_smoothing,
        }
        room = 2 * N * 1024 + 2 * 256 * self.E  # chunks of 1,024 classes
        with unittest.mock.patch.multiple(plans, KEPT_BYTES=room):
            forward = linear_cross_entropy.linear_cross_entropy_forward_keeping
            *_, kept = forward(hidden, weight, None, target, **options)
            assert kept is not None and kept.plan.classes < V and kept.plan.tokens < N
            linear_cross_entropy_kept.linear_cross_entropy_backward_of_kept(
                row, row, hidden, weight, target, row, kept, of_hidden=True, **options
            )

    @property
    def modules(self) -> tuple[str, ...]:
        modules = ("loss.linear_cross_entropy_tiles", "loss.linear_cross_entropy", "loss.linear_cross_entropy_backward")
        return (*modules, "loss.linear_cross_entropy_kept") if self.kept else modules


def linear_cross_entropy_memory(arch: str, N: int, V: int, E: int, bias: bool) -> concurrent.futures.Future[Any]:
    """A future of (forward's, backward's) most bytes of tensors at a time, results among them, at sizes that only exist
    as addresses: kernels are compiled and not run. Raises where a launcher reads a number of the device."""
    return _pool().submit(_linear_cross_entropy_memory, arch, N, V, E, bias)


def _linear_cross_entropy_memory(arch: str, N: int, V: int, E: int, bias: bool) -> tuple[int, int]:
    import torch
    from gpu_compile.stand_in import DeviceMemory, compiled_for

    from gpt4v_fast.kernels.loss import linear_cross_entropy, linear_cross_entropy_backward

    hidden, weight = (torch.empty(n, E, dtype=torch.bfloat16) for n in (N, V))
    target, row, biases = torch.empty(N, dtype=torch.int64), torch.empty(N), torch.empty(V) if bias else None
    options: dict[str, Any] = {"class_weight": None, "ignore_index": -100, "label_smoothing": 0.0, "softcap": None}
    with compiled_for(arch, linear_cross_entropy, linear_cross_entropy_backward):
        with DeviceMemory() as forward:
            linear_cross_entropy.linear_cross_entropy_forward(hidden, weight, biases, target, **options)
        with DeviceMemory() as backward:
            linear_cross_entropy_backward.linear_cross_entropy_backward(
                row, row, hidden, weight, biases, target, row, of_hidden=True, of_weight=True, of_bias=bias, **options
            )
    return forward.peak_bytes, backward.peak_bytes


def kept_memory(arch: str, N: int, V: int, E: int) -> concurrent.futures.Future[Any]:
    """As `linear_cross_entropy_memory`, of forward and backward together where logits are kept."""
    return _pool().submit(_kept_memory, arch, N, V, E)


def _kept_memory(arch: str, N: int, V: int, E: int) -> int:
    import torch
    from gpu_compile.stand_in import DeviceMemory, compiled_for

    from gpt4v_fast.kernels.loss import linear_cross_entropy, linear_cross_entropy_backward, linear_cross_entropy_kept

    hidden, weight = (torch.empty(n, E, dtype=torch.bfloat16) for n in (N, V))
    target, row = torch.empty(N, dtype=torch.int64), torch.empty(N)
    options: dict[str, Any] = {"class_weight": None, "ignore_index": -100, "label_smoothing": 0.0}
    with (
        compiled_for(arch, linear_cross_entropy, linear_cross_entropy_backward, linear_cross_entropy_kept),
        DeviceMemory() as memory,
    ):
        forward = linear_cross_entropy.linear_cross_entropy_forward_keeping
        _, lse, _, kept = forward(hidden, weight, None, target, **options)
        assert kept is not None
        linear_cross_entropy_kept.linear_cross_entropy_backward_of_kept(
            row, row, hidden, weight, target, lse, kept, of_hidden=True, **options
        )
    return memory.peak_bytes


def relaunched(arch: str) -> concurrent.futures.Future[Any]:
    """A future of what every launch of a backward pass in chunks told the driver, by Relaunch and by Triton's own way:
    two lists of (grid, arguments), tensors by their dtype, size and alignment."""
    return _pool().submit(_relaunched, arch)


def _relaunched(arch: str) -> tuple[list[Any], list[Any]]:
    import unittest.mock

    import torch
    from gpu_compile.stand_in import StandInDriver, compiled_for

    from gpt4v_fast.kernels import common
    from gpt4v_fast.kernels.loss import linear_cross_entropy, linear_cross_entropy_backward, linear_cross_entropy_kept

    told: list[Any] = []

    def plain(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(plain, x))
        return (str(x.dtype), x.numel(), x.data_ptr() % 16) if isinstance(x, torch.Tensor) else x

    def launcher(src: Any, metadata: Any) -> Any:
        def launch(*args: Any) -> None:
            told.append(
                (metadata["name"] if isinstance(metadata, dict) else metadata.name, args[:3], *map(plain, args[9:]))
            )

        return launch

    def through_triton(self: Any, function: Any, programs: int, *args: Any, **named: Any) -> None:
        function[(programs,)](*args, **named)

    found = []
    launches = (
        LinearCrossEntropyLaunch(arch, "bfloat16", 576, chunked=True, bias=True),
        LinearCrossEntropyLaunch(arch, "bfloat16", 576, kept=True),
    )
    modules = (linear_cross_entropy, linear_cross_entropy_backward, linear_cross_entropy_kept)
    for way in (common.Relaunch.__call__, through_triton):
        with (
            unittest.mock.patch.object(StandInDriver, "launcher_cls", staticmethod(launcher)),
            unittest.mock.patch.object(common.Relaunch, "__call__", way),
            compiled_for(arch, *modules),
        ):
            for launch in launches:
                launch.run()
        found.append(list(told))
        told.clear()
    return found[0], found[1]


Launch = AttentionLaunch | CrossEntropyLaunch | LinearCrossEntropyLaunch


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

    modules = [importlib.import_module(f"gpt4v_fast.kernels.{name}") for name in launch.modules]
    with compiled_for(launch.arch, *modules) as kernels:
        launch.run()
    found: dict[str, Any] = {}
    for kernel in kernels:
        name = kernel.metadata.name
        found[f"{name} again" if name in found else name] = facts(kernel)
    return found
