"""From a call object to a torch op: schema, fake kernel, autograd and the plain call, derived from the call's fields.

A call object is a NamedTuple that holds everything a call of an op has, checked, by name: its tensors first, then its
numbers. `define` makes `gpt4v_fast::<name>` of it, so that torch.compile, torch.export, torch.func and autocast see an
op, and returns a function from the call object to the op's outputs (a NamedTuple too).

    field's annotation    schema          field's annotation    schema
    torch.Tensor          Tensor          bool, float, str      the same
    torch.Tensor | None   Tensor?         int                   int
    torch.dtype           ScalarType      tuple[int, ...]       SymInt[]

A NamedTuple and no dataclass: it is frozen, named, and already the flat list of arguments that torch's dispatcher and
the C++ extension take. A frozen dataclass of as many fields takes 4.0 us to make and 0.5 us to flatten where a
NamedTuple takes 1.1 us to make (24 fields, Intel Xeon with AMX, 2026-11-30, the best of 9 rounds of timeit); SDPA's
smallest call takes 4.8 us in all.
"""

from __future__ import annotations

import inspect
import typing
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import library as torch_library

from gpt4v_fast.ops import modes

NAMESPACE = "gpt4v_fast"
_LIBRARY = torch_library.Library(NAMESPACE, "DEF")

# By name, since torch.compile can follow a global in a traced backward function, and no closure.
_BACKWARD_OPS: dict[str, Callable[..., Any]] = {}

_TYPES = {
    torch.Tensor: "Tensor",
    torch.Tensor | None: "Tensor?",
    torch.dtype: "ScalarType",
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
    tuple[int, ...]: "SymInt[]",
}


@dataclass(frozen=True)
class Gradient:
    """How an op is differentiated, once.

    Args:
        run: backward(call, saved, upstream, wanted) -> {input: gradient}, where `saved` holds the outputs that `saves`
            names and, as saved.left, what forward left; `upstream` the gradients of the outputs, None where nobody has
            one; `wanted` a bool per input in `of`. Inputs that are not wanted may be left out.
        of: the inputs that have a gradient, each of its input's shape and dtype.
        saves: the outputs that backward reads.
        constants: the outputs that have no gradient.
        function: the public function of which this is the gradient, for errors.
    """

    run: Callable[..., dict[str, torch.Tensor | None]]
    of: tuple[str, ...]
    saves: tuple[str, ...]
    constants: tuple[str, ...]
    function: str


class Left(NamedTuple):
    """Outputs, and what forward leaves for its own backward pass: anything at all, kept by the graph of a plain eager
    call, handed over once as saved.left. Elsewhere (compiled, under torch.func, in a second backward pass) it is None,
    and backward computes what it needs."""

    outputs: Any
    left: Any


def define(
    name: str,
    call_type: Any,
    output_type: Any,
    *,
    run: Callable[[Any], Any],
    fake: Callable[[Any], Any],
    gradient: Gradient | None = None,
    mutates: Sequence[str] = (),
) -> Callable[[Any], Any]:
    """Registers `gpt4v_fast::<name>`, and `<name>_backward` where it has a gradient.

    The function that it returns calls the op where somebody traces or watches. A plain call in eager mode goes to `run`
    at once, because the dispatcher would add nothing but its time, which is that of a small attention. Where a gradient
    is wanted `run`, or the op, is called within a torch.autograd.Function: under torch.func's transforms (grad, vjp,
    jacrev, vmap, ...), which ops of torch's `register_autograd` do not serve, and in eager mode, where that takes
    several times as long. vmap calls the op once per element.

    Args:
        name: the op's name.
        call_type, output_type: NamedTuples, see above; outputs are tensors.
        run: from the call object to the outputs (or Left), on real tensors of any device.
        fake: from a call object of meta tensors to empty outputs of the right shape, dtype and device.
        gradient: None for an op that has none.
        mutates: tensor fields that the op writes where `call.writes`.
    """
    schema = f"{name}({_parameters(call_type, mutates)}) -> {_returns(len(output_type._fields))}"
    op = _register(
        schema, lambda *fields: _outputs_of(run(call_type(*fields))), lambda *fields: fake(call_type(*fields))
    )
    if gradient is None:
        check = _each_writes_its_own(name, call_type, mutates) if mutates else None
        torch_library.register_vmap(f"{NAMESPACE}::{name}", _once_per_element(name, op, check), lib=_LIBRARY)
        return _plain_or(name, run, _refusing_negative(op, call_type, mutates) if mutates else op, output_type)
    save, backward = _Rule(name, call_type, output_type, gradient).functions()
    torch_library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=save, lib=_LIBRARY)
    watched = _with_function(name, op, save, backward, differentiable=True)
    return _plain_or(name, run, watched, output_type, _plain_function(name, call_type, run, save, backward))


def _refusing_negative(op: Any, call_type: Any, mutates: Sequence[str]) -> Callable[..., Any]:
    """`op` where a tensor negates what it views: torch's dispatcher resolves one that an op reads, and fails with an
    internal error for one that it writes."""

    def call(*fields: Any) -> Any:
        if not torch.compiler.is_compiling():
            for name, x in zip(call_type._fields, fields, strict=True):
                if name in mutates and x.is_neg():
                    raise ValueError(
                        f"{name}: expected a tensor that is written as it lies, got a negative view of one"
                    )
        return op(*fields)

    return call


def _parameters(call_type: Any, mutates: Sequence[str] = ()) -> str:
    hints = typing.get_type_hints(call_type)
    marks = {field: f"Tensor({chr(ord('a') + i)}!)" for i, field in enumerate(mutates)}
    return ", ".join(f"{marks.get(field, _TYPES[hints[field]])} {field}" for field in call_type._fields)


def _returns(count: int) -> str:
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"


def _register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, lambda *fields: _single(run(*fields)), "CompositeExplicitAutograd")
    torch_library.register_fake(f"{NAMESPACE}::{name}", lambda *fields: _single(fake(*fields)), lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name)


def _single(outputs: tuple[torch.Tensor, ...]) -> Any:
    """An op of one output returns the tensor itself."""
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _several(outputs: Any) -> tuple[torch.Tensor, ...]:
    return (outputs,) if isinstance(outputs, torch.Tensor) else outputs


def _outputs_of(result: Any) -> Any:
    return result.outputs if type(result) is Left else result


class _Rule:
    """The autograd rule of an op: what is saved, and the op `<name>_backward`, whose arguments are the upstream
    gradients, the call's fields, the saved outputs and what is wanted."""

    def __init__(self, name: str, call_type: Any, output_type: Any, gradient: Gradient):
        hints = typing.get_type_hints(call_type)
        is_tensor = [_TYPES[hints[field]].startswith("Tensor") for field in call_type._fields]
        self.tensors = sum(is_tensor)
        if not all(is_tensor[: self.tensors]):
            raise TypeError(f"{call_type.__name__}: expected the tensors before the numbers")
        self.call_type, self.gradient = call_type, gradient
        self.fields = len(call_type._fields)
        self.places = tuple(call_type._fields.index(field) for field in gradient.of)
        outputs = output_type._fields
        self.saved_places = tuple(outputs.index(output) for output in gradient.saves)
        self.constant_places = tuple(outputs.index(output) for output in gradient.constants)
        through = [output for output in outputs if output not in gradient.constants]
        self.through_places = tuple(outputs.index(output) for output in through)
        saved_type = namedtuple("Saved", (*gradient.saves, "left"), defaults=(None,))  # type: ignore[misc]
        upstream_type = namedtuple("Upstream", through)  # type: ignore[misc]
        wanted_type = namedtuple("Wanted", gradient.of)  # type: ignore[misc]

        def run(through: Any, call: Any, saved: Any, wanted: Any) -> dict[str, torch.Tensor | None]:
            return gradient.run(call_type(*call), saved_type(*saved), upstream_type(*through), wanted_type(*wanted))

        self.run = run  # no method: torch.compile meets it in `functions`
        parameters = (
            *(f"Tensor? grad_{output}" for output in through),
            _parameters(call_type),
            *(f"Tensor {output}" for output in gradient.saves),
            *(f"bool of_{field}" for field in gradient.of),
        )
        schema = f"{name}_backward({', '.join(parameters)}) -> {_returns(len(gradient.of))}"
        op = _register(schema, self.run_flat, self.fake)
        self.name = name
        refuse = _refusal(gradient.function)
        _BACKWARD_OPS[name] = _with_function(f"{name}_backward", op, _save_nothing, refuse, differentiable=False)

    def functions(self) -> tuple[Callable[..., None], Callable[..., Any]]:
        """setup_context and backward for torch: plain functions over plain values, which torch.compile can trace."""
        count, fields, places = self.tensors, self.fields, self.places
        saved_places, constants, through_places = self.saved_places, self.constant_places, self.through_places
        run, of, name = self.run, self.gradient.of, self.name

        def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            outputs = _several(output)
            # Or zeros would be made for every output that nobody differentiates.
            ctx.set_materialize_grads(False)
            if constants:
                ctx.mark_non_differentiable(*[outputs[i] for i in constants])
            ctx.save_for_backward(*inputs[:count], *[outputs[i] for i in saved_places])
            ctx.numbers, ctx.left = inputs[count:], None

        def backward(ctx: Any, *upstream: torch.Tensor | None) -> tuple[Any, ...]:
            tensors, left = ctx.saved_tensors, ctx.left
            ctx.left = None
            call, saved = (*tensors[:count], *ctx.numbers), tensors[count:]
            needed = ctx.needs_input_grad  # a tuple that torch makes anew each time
            wanted = tuple([needed[i] for i in places])
            through = tuple([upstream[i] for i in through_places])
            flat = (*through, *call, *saved, *wanted)
            if modes.plainness(flat) == modes.PLAIN:
                found = run(through, call, (*saved, left), wanted)
                gradients = tuple([found.get(field) for field in of])
            else:
                gradients = _several(_BACKWARD_OPS[name](*flat))
            result: list[Any] = [None] * fields
            for place, gradient, want in zip(places, gradients, wanted, strict=True):
                if want:
                    result[place] = gradient
            return tuple(result)

        return save, backward

    def split(self, flat: tuple[Any, ...]) -> tuple[Any, Any, Any, Any]:
        first, second = len(self.through_places), len(self.through_places) + self.fields
        third = second + len(self.saved_places)
        return flat[:first], flat[first:second], flat[second:third], flat[third:]

    def run_flat(self, *flat: Any) -> tuple[torch.Tensor, ...]:
        through, call, saved, wanted = self.split(flat)
        found = self.run(through, call, saved, wanted)
        # An empty tensor each, not one for all: the outputs of an op must not alias.
        gradients = (found.get(field) if want else None for field, want in zip(self.gradient.of, wanted, strict=True))
        return tuple(call[0].new_empty(0) if gradient is None else gradient for gradient in gradients)

    def fake(self, *flat: Any) -> tuple[torch.Tensor, ...]:
        _, call, _, wanted = self.split(flat)
        inputs = (call[place] for place in self.places)
        pairs = zip(inputs, wanted, strict=True)
        return tuple(x.new_empty(x.shape) if want and x is not None else call[0].new_empty(0) for x, want in pairs)


def _plain_function(
    name: str, call_type: Any, run: Callable[[Any], Any], save: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """`run` as an autograd.Function, for plain calls."""

    # Not by a setup_context of the Function's own: torch would inspect the signature of forward in every call.
    def forward(ctx: Any, *fields: Any) -> Any:
        result = run(call_type(*fields))
        outputs = _outputs_of(result)
        save(ctx, fields, outputs)
        if result is not outputs:
            ctx.left = result.left
        return tuple(outputs)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(name, (torch.autograd.Function,), methods)
    # What Function.apply goes on to once it has looked for transforms, of which there are none here.
    apply: Any = super(torch.autograd.Function, function).apply
    return apply


def _plain_or(
    name: str,
    run: Callable[[Any], Any],
    watched: Callable[..., Any],
    output_type: Any,
    apply: Callable[..., Any] | None = None,
) -> Callable[[Any], Any]:
    """`run`, as an autograd.Function (`apply`) where a gradient is wanted, and `watched` where either won't do."""
    is_compiling, autograd, kind_of = torch.compiler.is_compiling, torch.autograd, modes.kind_of

    def call(fields: Any) -> Any:
        if is_compiling():
            return output_type(*_several(watched(*fields)))
        if autograd._profiler_enabled():
            with torch.profiler.record_function(f"{NAMESPACE}::{name}"):
                return serve(fields)
        return serve(fields)

    def serve(fields: Any) -> Any:
        kind = kind_of(fields)
        if kind == modes.PLAIN:
            result = run(fields)
            return result.outputs if type(result) is Left else result
        if kind == modes.PLAIN_WITH_GRADIENT and apply is not None:
            return output_type(*apply(*fields))
        return output_type(*_several(watched(*fields)))

    return call


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

    vmap = _once_per_element(name, lambda *args: as_function.apply(*args))
    methods = {"forward": forward, "setup_context": setup_context, "backward": backward, "vmap": vmap}
    functions = {key: staticmethod(f) for key, f in methods.items()}
    as_function: Any = type(name, (torch.autograd.Function,), functions)

    def call(*args: Any) -> Any:
        if not modes.are_transforms_active():
            if not torch.is_grad_enabled() or not any(map(modes.needs_gradient, args)):
                return op(*args)
            # Only who traces needs what a registered op would record, in several times the time of a Function.
            if differentiable and (torch.compiler.is_compiling() or modes.is_traced()):
                return op(*args)
        elif torch.compiler.is_compiling():
            # torch.compile knows from a tensor's making whether it needs a gradient; torch.func marks its arguments
            # later, and ctx.needs_input_grad would be False for them. Of a view it knows the truth.
            args = tuple(x.view_as(x) if isinstance(x, torch.Tensor) else x for x in args)
        return as_function.apply(*args)

    return call


def _each_writes_its_own(name: str, call_type: Any, mutates: Sequence[str]) -> Callable[..., None]:
    """Of elements that all write to one tensor the last would win."""

    def check(in_dims: tuple[int | None, ...], fields: tuple[Any, ...]) -> None:
        if call_type(*fields).writes:
            for field, dim in zip(call_type._fields, in_dims, strict=True):
                if field in mutates and dim is None:
                    raise ValueError(
                        f"gpt4v_fast.{name}: expected {field} to be mapped over, since each element writes to it, got "
                        "one for all"
                    )

    return check


def _once_per_element(
    name: str, run: Callable[..., Any], check: Callable[..., None] | None = None
) -> Callable[..., Any]:
    """The rule of torch.func.vmap that calls `run` for each element."""

    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        def element(i: int) -> list[Any]:
            return [x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True)]

        if info.batch_size == 0:
            raise ValueError(f"gpt4v_fast.{name}: expected at least one element to map over, got none")
        if check is not None:
            check(in_dims, args)
        results = [run(*element(i)) for i in range(info.batch_size)]
        if isinstance(results[0], tuple):
            return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])
        return torch.stack(results), 0

    return vmap


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
