"""Runs Triton kernels under Triton's interpreter, in a process of its own.

`@triton.jit` decides when a kernel is defined whether it is compiled or interpreted, for triton's own library too, so
TRITON_INTERPRET must be set before triton is first imported. Under a plain `pytest` some other test has imported it
long before; the compile tests need the real compiler. Hence a worker: `call(function, ...)` runs a function of an
importable module there and hands back what it returns, or raises what it raised.

The worker differs from a plain interpreter in five ways, three to compute what a GPU would and two to see more:
  * `tl.dot` widens bf16 operands to fp32. The interpreter multiplies their raw bit patterns (triton#11584).
  * fp32 is rounded to the nearest bf16. The interpreter cuts the low bits off, which is twice as far away, always
    towards zero, and makes an infinity of some NaNs.
  * a dot with input_precision "tf32x3" multiplies as it does on NVIDIA: three products of tf32 halves, not one in fp32.
  * every element that a kernel reads or writes must lie inside one of the tensors that it was given.
  * `torch.empty` is filled with NaN, so that an output nobody wrote is seen.

GPT4V_FAST_TEST_DEVICE=cuda (`make test-gpu`) runs the same tests on a GPU: the worker moves the tensors there, strides
and all, compiles the kernels, and moves the results back. `interpreter_only` marks what only the interpreter can show.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import functools
import importlib
import multiprocessing
import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch

ON_GPU = os.environ.get("GPT4V_FAST_TEST_DEVICE", "cpu") == "cuda"
interpreter_only = pytest.mark.skipif(ON_GPU, reason="about Triton's interpreter, and this run is on a GPU")


@functools.cache
def _pool() -> concurrent.futures.ProcessPoolExecutor:
    """One worker for the session, started at the first call."""
    pool = concurrent.futures.ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn"), initializer=_start
    )
    atexit.register(pool.shutdown)
    return pool


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)` in the worker. Tensors travel as bytes, strides and all, so nothing is shared."""
    job = pickle.dumps((function, args, kwargs))
    return pickle.loads(_pool().submit(_run, job).result(timeout=250))


def launch(module: str, launcher: str, *args: Any, **kwargs: Any) -> Any:
    """A launcher of gpt4v_fast.kernels, now; for `call(launch, "attention.forward", "attention_forward", ...)`."""
    inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
    _inputs.update({x.untyped_storage().data_ptr(): _extent(x) for x in inputs})
    try:
        return getattr(importlib.import_module(f"gpt4v_fast.kernels.{module}"), launcher)(*args, **kwargs)
    finally:
        _inputs.clear()


def launch_without_widening(module: str, launcher: str, *args: Any, **kwargs: Any) -> Any:
    """`launch` with the interpreter's own `tl.dot`, to show what that does with bf16."""
    from triton.runtime import interpreter

    builder = type(interpreter.interpreter_builder)
    widening = builder.create_dot
    builder.create_dot = widening.__wrapped__
    try:
        return launch(module, launcher, *args, **kwargs)
    finally:
        builder.create_dot = widening


def _run(job: bytes) -> bytes:
    function, args, kwargs = pickle.loads(job)
    with warnings.catch_warnings():
        # NumPy remarks on log(0) and inf - inf, which kernels ask for and then select away.
        warnings.simplefilter("ignore", RuntimeWarning)
        if not ON_GPU:
            return pickle.dumps(function(*args, **kwargs))
        function, args, kwargs = _moved((function, args, kwargs), "cuda")
        with torch.device("cuda"):
            return pickle.dumps(_moved(function(*args, **kwargs), "cpu"))


def _moved(value: Any, device: str, storages: dict[int, torch.UntypedStorage] | None = None) -> Any:
    """`value` with its tensors on a device; views of one storage are views of one, strides and offsets as they are."""
    storages = {} if storages is None else storages
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        copy = storages.setdefault(storage._cdata, storage.to(device=torch.device(device)))
        moved = torch.empty(0, dtype=value.dtype, device=device)
        moved.set_(copy, value.storage_offset(), value.shape, value.stride())
        return moved.requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {name: _moved(x, device, storages) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        moved_items = [_moved(x, device, storages) for x in value]
        return type(value)(*moved_items) if hasattr(value, "_fields") else type(value)(moved_items)
    return value


def place() -> str:
    """What `explain` says of where the kernels of the worker run."""
    return torch.cuda.get_device_name() if ON_GPU else "CPU (Triton interpreter)"


def _start() -> None:
    os.environ["GPT4V_FAST_BACKEND"] = "triton"
    torch.set_num_threads(1)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if ON_GPU:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what cuBLAS asks for where results must repeat
        torch.use_deterministic_algorithms(True, warn_only=True)
        return
    os.environ["TRITON_INTERPRET"] = "1"
    torch.use_deterministic_algorithms(True)
    _repair_dot()
    _round_to_bf16()
    _guard_memory()


def _repair_dot() -> None:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder = type(interpreter.interpreter_builder)
    plain = builder.create_dot

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        bits = operand.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def halves(operand: Any) -> tuple[Any, Any]:
        """The nearest tf32 (10 bits after the point, ties away from 0) and the nearest tf32 to what that leaves."""
        rounded = []
        rest = operand.data
        for _ in range(2):
            near = ((rest.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
            near = np.where(np.isfinite(rest), near, rest)
            rounded.append(interpreter.TensorHandle(near, tl.float32))
            rest = rest - near
        return rounded[0], rounded[1]

    @functools.wraps(plain)
    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, *rest: Any) -> Any:
        a, b = widened(a), widened(b)
        if a.dtype.scalar != tl.float32 or not str(precision).endswith("TF32x3"):
            return plain(self, a, b, d, precision, *rest)
        (a_high, a_low), (b_high, b_low) = halves(a), halves(b)
        small = interpreter.TensorHandle(np.zeros_like(d.data), tl.float32)
        small = plain(self, a_low, b_high, small, precision, *rest)
        small = plain(self, a_high, b_low, small, precision, *rest)
        # As the compiler has it: infinity minus infinity in the low halves must not spoil the product of the high ones.
        small = interpreter.TensorHandle(np.where(np.isnan(small.data), 0.0, small.data) + d.data, tl.float32)
        return plain(self, a_high, b_high, small, precision, *rest)

    builder.create_dot = create_dot


def _round_to_bf16() -> None:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder = type(interpreter.interpreter_builder)
    plain = builder.create_fp_trunc

    def create_fp_trunc(self: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return plain(self, source, to)
        rounded = torch.from_numpy(np.array(source.data, dtype=np.float32)).bfloat16()
        return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)

    builder.create_fp_trunc = create_fp_trunc


# Of the tensors that a launcher was given: start of the storage -> extent. A launcher may hand its kernel another view
# of the same storage; what the kernel may touch is still what the launcher was given.
_inputs: dict[int, tuple[int, int]] = {}


def _guard_memory() -> None:
    """Raises IndexError for a load or store, not masked off, outside the extents of the kernel's tensor arguments."""
    import numpy as np
    from triton.runtime import interpreter

    extents: list[tuple[int, int]] = []
    builder = type(interpreter.interpreter_builder)
    executor = interpreter.GridExecutor
    plain_call = executor.__call__

    @functools.wraps(plain_call)
    def guarded_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = list(_tensors((*args, *kwargs.values())))
        extents[:] = [_inputs.get(x.untyped_storage().data_ptr()) or _extent(x) for x in tensors]
        return plain_call(self, *args, **kwargs)

    def check(pointers: Any, mask: Any, action: str) -> None:
        shape = pointers.data.shape
        active = pointers.data[np.broadcast_to(np.asarray(mask.data, dtype=bool), shape)].astype(np.int64)
        size = pointers.dtype.element_ty.primitive_bitwidth // 8
        inside = np.zeros(active.shape, dtype=bool)
        for first, last in extents:
            inside |= (active >= first) & (active + size <= last)
        if not inside.all():
            raise IndexError(f"{action} of {(~inside).sum()} elements outside every tensor of the launch")

    def guard(method: str, mask_argument: int, action: str) -> None:
        plain = getattr(builder, method)

        @functools.wraps(plain)
        def guarded(self: Any, pointers: Any, *rest: Any) -> Any:
            check(pointers, rest[mask_argument], action)
            return plain(self, pointers, *rest)

        setattr(builder, method, guarded)

    executor.__call__ = guarded_call
    # Unmasked loads and stores come here too, with a mask of ones.
    guard("create_masked_load", 0, "load")
    guard("create_masked_store", 1, "store")


def _tensors(arguments: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Tensors among a kernel's arguments, in NamedTuples too."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from _tensors(argument)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte and the one after the last, over all strides."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


@contextlib.contextmanager
def launches() -> Iterator[list[str]]:
    """In the worker: the names of the kernels that are launched in the block."""
    from triton.runtime import interpreter, jit

    from gpt4v_fast.kernels.common import Relaunch

    names: list[str] = []
    launcher, method = (jit.JITFunction, "run") if ON_GPU else (interpreter.GridExecutor, "__call__")
    plain = getattr(launcher, method)

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.fn.__name__)
        return plain(self, *args, **kwargs)

    def relaunched(self: Any, function: Any, programs: int, *args: Any, **named: Any) -> None:
        function[(programs,)](*args, **named)

    with mock.patch.object(launcher, method, recorded), mock.patch.object(Relaunch, "__call__", relaunched):
        yield names
