"""Who watches a call: torch.compile and other tracers, transforms of torch.func, dispatch modes, the profiler.

Plain eager calls go straight to a kernel (ops/library.py); a watched call goes through torch's dispatcher.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

import torch

from gpt4v_fast._native import _C

NOT_PLAIN, PLAIN, PLAIN_WITH_GRADIENT = range(3)  # as in csrc/bindings.cpp


class _Asked(threading.local):
    on = False
    compiled = False  # what would be called under torch.compile


# Set while `backends.call_of` wants the call object of a public function, and no kernel.
ASKED = _Asked()


class CallMade(Exception):
    """Carries the call object to `backends.call_of`."""

    def __init__(self, call: Any):
        self.call = call


def plainness(fields: tuple[Any, ...]) -> int:
    """Whether these are plain tensors of one device and numbers in eager mode, and whether one wants a gradient."""
    return NOT_PLAIN if torch.compiler.is_compiling() else kind_of(fields)


def may_leave(fields: tuple[Any, ...]) -> bool:
    """Whether what forward leaves for its own backward pass reaches it: in a plain eager call that wants gradients."""
    if torch.compiler.is_compiling() or ASKED.compiled:
        return False
    return kind_of(fields, asked=False) == PLAIN_WITH_GRADIENT


def kind_of(fields: tuple[Any, ...], asked: bool = True) -> int:
    """`plainness` outside of torch.compile. If `asked`, a public function's call object goes to `call_of`."""
    if asked and ASKED.on:
        raise CallMade(fields)
    if is_watched():
        return NOT_PLAIN
    kind = _C.plain_arguments(fields)
    if kind == NOT_PLAIN and torch.cuda.is_initialized():
        kind = plain_arguments_like(plain_tensor("cuda"), fields)
    return PLAIN if kind == PLAIN_WITH_GRADIENT and not torch.is_grad_enabled() else kind


@functools.cache
def plain_tensor(device: str) -> torch.Tensor:
    with torch.inference_mode(False):  # in which the first call may be made
        return torch.empty(0, device=device)


def plain_arguments_like(tensor: torch.Tensor, fields: Sequence[Any]) -> int:
    """As _C.plain_arguments, of tensors that the dispatcher treats as this one: a plain one on a GPU. Whatever else it
    would do something about (views that negate, wrappers of transforms, inference mode) has other dispatch keys."""
    keys, kind = torch._C._dispatch_keys(tensor), PLAIN
    for x in fields:
        if isinstance(x, torch.Tensor):
            if type(x) not in (torch.Tensor, torch.nn.Parameter) or torch._C._dispatch_keys(x) != keys:
                return NOT_PLAIN
            if x.requires_grad:
                kind = PLAIN_WITH_GRADIENT
        elif x is not None and type(x) not in (bool, int, float, str, torch.dtype):
            return NOT_PLAIN
    return kind


def is_watched() -> bool:
    """Whether somebody traces, transforms or watches calls, in ways that the dispatcher serves."""
    return bool(
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


# A constant to torch.compile, which guards the stack of transforms anyway: a call in the graph would only keep compiled
# code out of its caches.
@torch.compiler.assume_constant_result
def are_transforms_active() -> bool:
    return torch._C._are_functorch_transforms_active()


@torch.compiler.assume_constant_result
def is_mapped() -> bool:
    """Whether torch.func.vmap is on."""
    interpreters = torch._C._functorch.get_interpreter_stack() or []
    return any(x.key() == torch._C._functorch.TransformType.Vmap for x in interpreters)


def is_traced_or_transformed() -> bool:
    """Whether torch.compile, another tracer or a transform of torch.func is at work, which know of no side effects."""
    return torch.compiler.is_compiling() or is_traced() or torch._C._are_functorch_transforms_active()


def is_traced() -> bool:
    return torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack() > 0


def needs_gradient(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.requires_grad


def autocast(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """The floating tensors in autocast's dtype where autocast is on for their device, else as they are."""
    device = next(t.device.type for t in tensors if t is not None)
    if device == "meta" or not torch.is_autocast_enabled(device):  # torch raises for meta
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors)


def attention_tensors_fit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ndim: int, heads: int) -> bool:
    """A quick yes for what is right, and usual: plain CPU tensors of one float dtype, outside of autocast and tracing.

    q and k have the same last dimension, k and v all but the last; k's number of heads, dimension `heads`, divides q's.
    After a no the caller's own checks find what is wrong, if anything is, and the words for it.
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return _C.do_attention_tensors_fit(q, k, v, ndim, heads)
