"""Compile Triton kernels through their real launchers for a GPU that is not there.

`compiled_for(arch)` puts a driver object in Triton's place for the time of a `with` block. The driver knows nothing but
the name of the target and the shared memory a program may have there; a "launch" compiles and does nothing else. Inside
the block, launchers are called with ordinary CPU tensors, whose strides and (aligned) addresses are specialised on just
as those of GPU tensors would be.

Needs the compiler, so the process must not have set TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel


@dataclasses.dataclass(frozen=True)
class Chip:
    target: GPUTarget
    shared_bytes: int  # what one program may have, opt-in included
    registers: int  # what one thread may have before it spills


# Shared memory: CUDA C++ programming guide, "Technical specifications per compute capability"; AMD CDNA3 ISA, LDS size.
CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 163 * 1024, 255),
    "sm_86": Chip(GPUTarget("cuda", 86, 32), 99 * 1024, 255),
    "sm_89": Chip(GPUTarget("cuda", 89, 32), 99 * 1024, 255),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 227 * 1024, 255),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 227 * 1024, 255),
    "sm_120": Chip(GPUTarget("cuda", 120, 32), 99 * 1024, 255),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 * 1024, 512),
}


class _Utils:
    def __init__(self, chip: Chip) -> None:
        self._chip = chip

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self._chip.shared_bytes, "multiprocessor_count": 1, "warpSize": 32}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return None, name, 0, 0, 1024  # module (None: nothing to unload), function, registers, spills, most threads

    def unload_module(self, module: str) -> None:
        return None


class StandInDriver:
    """Only names the target. Nothing is loaded and nothing runs."""

    def __init__(self, arch: str) -> None:
        self._chip = CHIPS[arch]
        # A number of its own for every chip: Triton remembers a device's shared memory by its number.
        self._device = list(CHIPS).index(arch)
        self.utils = _Utils(self._chip)

    def get_current_target(self) -> GPUTarget:
        return self._chip.target

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0

    @staticmethod
    def launcher_cls(src: Any, metadata: Any) -> Any:
        return lambda *args, **kwargs: None


@contextlib.contextmanager
def compiled_for(arch: str, *modules: Any) -> Iterator[list[CompiledKernel]]:
    """A list that holds, after the block, every kernel of `modules` that a launch in the block asked for.

    Raises RuntimeError if one was compiled for another target: Triton keeps compiled kernels by device number, not by
    target, and hands the old one out unless its cache is emptied, as is done here.
    """
    chip = CHIPS[arch]
    every = (f for module in modules for f in vars(module).values() if isinstance(f, triton.runtime.JITFunction))
    functions = list({id(f): f for f in every}.values())  # a module may import another's
    kernels: list[CompiledKernel] = []
    config = triton.runtime.driver
    before = config._active
    for function in functions:
        function.device_caches.clear()
    config.set_active(StandInDriver(arch))
    try:
        yield kernels
        for function in functions:
            for caches in function.device_caches.values():
                kernels.extend(caches[0].values())
        for kernel in kernels:
            target = kernel.metadata.target
            if (target.backend, target.arch) != (chip.target.backend, chip.target.arch):
                raise RuntimeError(f"{kernel.name} was compiled for {target}, expected {chip.target}")
    finally:
        for function in functions:
            function.device_caches.clear()
        config._active = before


class DeviceMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that are made in its block, and refuses what would wait for a device."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self._now = self.peak_bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in self.WAITS:
            raise RuntimeError(f"{name} waits for the device")
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not any(r.alias_info for r in function._schema.returns):
            size = result.untyped_storage().nbytes()
            self._now += size
            self.peak_bytes = max(self.peak_bytes, self._now)
            weakref.finalize(result.untyped_storage(), self._freed, size)
        return result

    def _freed(self, size: int) -> None:
        self._now -= size
