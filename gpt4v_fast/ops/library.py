"""How an op is registered with torch: schema, implementation, fake kernel, autograd, so torch.compile sees it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import library as torch_library

from gpt4v_fast._native import _C

NAMESPACE = "gpt4v_fast"
_LIBRARY = torch_library.Library(NAMESPACE, "DEF")


def define_op(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    gradient_of: str | None = None,
) -> Callable[..., Any]:
    """Registers `gpt4v_fast::<schema>` and returns the callable op.

    What it returns calls the op where somebody traces or watches. Plain tensors in eager mode go to `implementation` at
    once, because the dispatcher would add nothing but its time, which is that of a small attention.
    Where a gradient is wanted that, or the op, is called within a torch.autograd.Function: under torch.func's
    transforms (grad, vjp, jacrev, vmap, ...), which ops of torch's `register_autograd` do not serve, and in eager
    mode, where that takes several times as long. vmap calls the op once per element.

    Args:
        schema: the op's name and signature in torch's schema language.
        implementation: runs on real tensors of any device; it asks `backends.pick` which kernel serves the call.
        fake: returns empty outputs of the right shape, dtype and device for meta tensors.
        setup_context, backward: as for torch's `register_autograd`; an op without them is not differentiable.
        gradient_of: this op computes the gradient of the public function of that name, and has none itself:
            differentiating it is refused by a RuntimeError that says so.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    qualified = f"{NAMESPACE}::{name}"
    torch_library.register_fake(qualified, fake, lib=_LIBRARY)
    op = getattr(getattr(torch.ops, NAMESPACE), name)
    if gradient_of is not None:
        refuse = _refusal(gradient_of)
        watched = _with_function(name, op, _save_nothing, refuse, differentiable=False)
        return _plain_first(name, implementation, watched, _save_nothing, refuse)
    if backward is None:
        return _plain_first(name, implementation, op, None, None)
    setup_context = setup_context or _save_nothing
    torch_library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)
    watched = _with_function(name, op, setup_context, backward, differentiable=True)
    return _plain_first(name, implementation, watched, setup_context, backward)


_NOT_PLAIN, _PLAIN, _PLAIN_WITH_GRADIENT = range(3)  # as in csrc/bindings.cpp


def _plain_first(
    name: str,
    implementation: Callable[..., Any],
    watched: Callable[..., Any],
    setup_context: Callable[..., None] | None,
    backward: Callable[..., Any] | None,
) -> Callable[..., Any]:
    """`implementation`, as an autograd.Function where a gradient is wanted, and `watched` where either won't do."""
    apply: Any = None
    if setup_context is not None and backward is not None:
        save = setup_context

        # Not by a setup_context of the Function's own: torch would inspect the signature of forward in every call.
        def forward(ctx: Any, *args: Any) -> Any:
            output = implementation(*args)
            save(ctx, args, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        function: Any = type(name, (torch.autograd.Function,), methods)
        # What Function.apply goes on to once it has looked for transforms, of which there are none here.
        apply = super(torch.autograd.Function, function).apply

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or _is_watched():
            return watched(*args)
        kind = _C.plain_arguments(args)
        if kind == _NOT_PLAIN and torch.cuda.is_initialized():
            kind = plain_arguments_like(plain_tensor("cuda"), args)
        if kind == _PLAIN or (kind == _PLAIN_WITH_GRADIENT and not torch.is_grad_enabled()):
            return implementation(*args)
        if kind == _PLAIN_WITH_GRADIENT and apply is not None:
            return apply(*args)
        return watched(*args)

    return call


@functools.cache
def plain_tensor(device: str) -> torch.Tensor:
    with torch.inference_mode(False):  # in which the first call may be made
        return torch.empty(0, device=device)


def plain_arguments_like(tensor: torch.Tensor, args: Sequence[Any]) -> int:
    """As _C.plain_arguments, of tensors that the dispatcher treats as this one: a plain one on a GPU. Whatever else it
    would do something about (views that negate, wrappers of transforms, inference mode) has other dispatch keys."""
    keys, kind = torch._C._dispatch_keys(tensor), _PLAIN
    for x in args:
        if isinstance(x, torch.Tensor):
            if type(x) not in (torch.Tensor, torch.nn.Parameter) or torch._C._dispatch_keys(x) != keys:
                return _NOT_PLAIN
            if x.requires_grad:
                kind = _PLAIN_WITH_GRADIENT
        elif x is not None and type(x) not in (bool, int, float, str):
            return _NOT_PLAIN
    return kind


def is_plain_with_gradient(args: Sequence[Any]) -> bool:
    """Whether these are plain CPU tensors in eager mode, of which a gradient is wanted."""
    if torch.compiler.is_compiling() or _is_watched() or not torch.is_grad_enabled():
        return False
    return bool(_C.plain_arguments(tuple(args)) == _PLAIN_WITH_GRADIENT)


def _is_watched() -> bool:
    """Whether somebody traces, transforms or watches calls, in ways that the dispatcher serves."""
    return bool(
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch.autograd._profiler_enabled()
    )


def _with_function(
    name: str, op: Any, setup_context: Callable[..., None], backward: Callable[..., Any], *, differentiable: bool
) -> Callable[..., Any]:
    """`op`, or the same op as an autograd.Function: under transforms of torch.func, and for whoever means to
    differentiate it, unless it is traced and itself `differentiable`."""

    def forward(*args: Any) -> Any:
        return op(*args)

    # torch.compile tells forward(*args) from forward(ctx, *args) by how many parameters it declares.
    names = [argument.name for argument in op.default._schema.arguments]
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in names]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]

    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        def element(i: int) -> list[Any]:
            return [x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True)]

        if info.batch_size == 0:
            raise ValueError(f"gpt4v_fast.{name}: expected at least one element to map over, got none")
        results = [as_function.apply(*element(i)) for i in range(info.batch_size)]
        if isinstance(results[0], tuple):
            return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])
        return torch.stack(results), 0

    methods = {"forward": forward, "setup_context": setup_context, "backward": backward, "vmap": vmap}
    functions = {key: staticmethod(f) for key, f in methods.items()}
    as_function: Any = type(name, (torch.autograd.Function,), functions)

    def call(*args: Any) -> Any:
        if not _transforms_active():
            if not torch.is_grad_enabled() or not any(map(_needs_gradient, args)):
                return op(*args)
            # Only who traces needs what a registered op would record, in several times the time of a Function.
            if differentiable and (torch.compiler.is_compiling() or _is_traced()):
                return op(*args)
        elif torch.compiler.is_compiling():
            # torch.compile knows from a tensor's making whether it needs a gradient; torch.func marks its arguments
            # later, and ctx.needs_input_grad would be False for them. Of a view it knows the truth.
            args = tuple(x.view_as(x) if isinstance(x, torch.Tensor) else x for x in args)
        return as_function.apply(*args)

    return call


# A constant to torch.compile, which guards the stack of transforms anyway: a call in the graph would only keep compiled
# code out of its caches.
@torch.compiler.assume_constant_result
def _transforms_active() -> bool:
    return torch._C._are_functorch_transforms_active()


@torch.compiler.assume_constant_result
def is_mapped() -> bool:
    """Whether torch.func.vmap is on."""
    interpreters = torch._C._functorch.get_interpreter_stack() or []
    return any(x.key() == torch._C._functorch.TransformType.Vmap for x in interpreters)


def is_traced_or_transformed() -> bool:
    """Whether torch.compile, another tracer or a transform of torch.func is at work, which know of no side effects."""
    return torch.compiler.is_compiling() or _is_traced() or torch._C._are_functorch_transforms_active()


def _is_traced() -> bool:
    return torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack() > 0


def attention_tensors_fit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ndim: int, heads: int) -> bool:
    """A quick yes for what is right, and usual: plain CPU tensors of one float dtype, outside of autocast and tracing.

    q and k have the same last dimension, k and v all but the last; k's number of heads, dimension `heads`, divides q's.
    After a no the caller's own checks find what is wrong, if anything is, and the words for it.
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return _C.do_attention_tensors_fit(q, k, v, ndim, heads)


def _needs_gradient(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.requires_grad


def _save_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def _refusal(function: str) -> Callable[..., Any]:
    def refuse(ctx: Any, *unused: Any) -> Any:
        raise RuntimeError(
            f"gpt4v_fast.{function} can be differentiated once: its gradients have no gradients. Leave out "
            f"create_graph=True (or the second transform of torch.func), or use gpt4v_fast.reference.{function}, which "
            "can be differentiated any number of times"
        )

    return refuse


def autocast(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """The floating tensors in autocast's dtype where autocast is on for their device, else as they are."""
    device = next(t.device.type for t in tensors if t is not None)
    if device == "meta" or not torch.is_autocast_enabled(device):  # torch raises for meta
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors)
