"""What is timed: named cases, each with its cost, its inputs, its exact answer and its contenders.

A new peer is one `Contender` in the list of its op's module; where it can't run, its `make` raises `Unavailable`
with the reason, which is printed in place of a time.
"""

from __future__ import annotations

import difflib
import importlib
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

# Where an op's cases are: `cases()` of the modules of this package.
MODULES = {
    "attention": ("attention", "curves"),
    "cross_entropy": ("loss",),
    "linear_cross_entropy": ("loss",),
    "patch_embed": ("patch_embed",),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DIRECTIONS = ("forward", "backward", "forward+backward")
# What one run takes: tiny cases for tests and a first look, the usual record, that and the rest of the grid, series of
# cases that make curves, or the usual record of a GPU.
PARTS = {
    "quick": ("quick",),
    "default": ("default",),
    "all": ("default", "all"),
    "curves": ("curves",),
    "gpu": ("gpu",),
}
DEVICES = ("cpu", "cuda")

TRIALS = 3  # calls of each setting of a contender that has several

Inputs = dict[str, Any]
Outputs = dict[str, torch.Tensor]
Run = Callable[[], Outputs]
Function = Callable[[Inputs], Any]  # a forward pass: returns a tensor


class Unavailable(RuntimeError):
    """Raised by a contender that can't run here; the message is the reason that is printed."""


class NotInstalled(Unavailable):
    """It could run here if it were installed."""


class Expected(NamedTuple):
    """A part of an output: outputs[name][index] should be `exact` (fp64), and may be off by about `scale` units
    roundoff of the case's dtype (scales.py)."""

    name: str
    index: Any
    exact: torch.Tensor
    scale: torch.Tensor


@dataclass(frozen=True)
class Contender:
    """One way to compute a case. `make(case, inputs)` does what need not be timed and returns one timed call.

    Args:
        compiled: its first call on new inputs compiles.
        extra_bytes: an estimate of what a call takes beside inputs and results; where that is not there it is not run.
        budget_share: of the seconds that the run grants a single call, beyond which it is not timed again.
        devices: where it can run at all.
    """

    name: str
    make: Callable[[Case, Inputs], Run]
    ours: bool = False
    compiled: bool = False
    extra_bytes: Callable[[Case], float] = lambda case: 0.0
    budget_share: float = 1.0
    devices: tuple[str, ...] = DEVICES


class Point(NamedTuple):
    """Where a case stands on a curve: the curve's name, the quantity it is drawn over, and its value. proportional:
    the time should be x times the time at x = 1."""

    curve: str
    x_name: str
    x: float
    proportional: bool = False


@dataclass(frozen=True)
class Case:
    """One row of the report.

    Args:
        name: unique within op, dtype and direction.
        shape: sizes by the letters of the shape alphabet, for people.
        flops, bytes: what the mathematics needs, whatever a contender does.
        bound: the probe of peaks.py that limits it: "fma", "dot_bf16" or "read".
        make_inputs: the same inputs at every call (seeded).
        expected: exact values of (parts of) the outputs for these inputs.
        check_inputs: smaller inputs to check on where the exact answer of the real ones would take too long.
        copies: how many copies of the inputs the calls take in turn, so that they come from memory, not from a cache.
        part: one of "quick", "default", "all", "curves" and "gpu" (PARTS).
        point: of a curve.
        warm_up_inputs: tiny inputs of the same kind.
        measures_memory: a call's extra memory is measured too (memory.py).
        resident_bytes: inputs and results.
        leaves: the inputs whose gradients the backward pass gives.
    """

    op: str
    name: str
    dtype: torch.dtype
    direction: str
    shape: Mapping[str, int]
    flops: float
    bytes: float
    bound: str
    make_inputs: Callable[[], Inputs]
    expected: Callable[[Inputs], list[Expected]]
    contenders: tuple[Contender, ...]
    check_inputs: Callable[[Inputs], Inputs] | None = None
    copies: int = 1
    part: str = "default"
    warm_up_inputs: Callable[[], Inputs] | None = None
    measures_memory: bool = False
    resident_bytes: float = 0.0
    point: Point | None = None
    leaves: tuple[str, ...] = ()

    @property
    def dtype_name(self) -> str:
        return dtype_name(self.dtype)

    @property
    def id(self) -> str:
        return f"{self.op}/{self.name}/{self.dtype_name}/{self.direction}"

    @property
    def work(self) -> float:
        """What is divided by time and compared with the peak: GFLOP, or GB where memory is the bound."""
        return 1e-9 * (self.bytes if self.bound == "read" else self.flops)

    def contenders_on(self, device: str) -> tuple[Contender, ...]:
        return tuple(contender for contender in self.contenders if device in contender.devices)

    def __str__(self) -> str:
        return self.id


def dtype_name(dtype: torch.dtype) -> str:
    return next((name for name, value in DTYPES.items() if value == dtype), str(dtype))


def compute_bound(dtype: torch.dtype) -> str:
    """The instruction that matrix products of this dtype run on."""
    return "dot_bf16" if dtype == torch.bfloat16 else "fma"


def cases(
    *,
    ops: Iterable[str] | None = None,
    dtypes: Iterable[str] | None = None,
    names: Iterable[str] | None = None,
    directions: Iterable[str] | None = None,
    part: str = "default",
) -> list[Case]:
    """The registered cases of a part (PARTS) that fit every filter; `names` are whole names or, where no case has that
    name, parts of them.

    Raises:
        ValueError: an unknown op, dtype, direction or name, or filters that leave nothing.
    """
    wanted_ops = _known("op", ops, MODULES)
    wanted_dtypes = _known("dtype", dtypes, DTYPES)
    wanted_directions = _known("direction", directions, DIRECTIONS)
    found: list[Case] = []
    for module in dict.fromkeys(module for op in wanted_ops for module in MODULES[op]):
        found += importlib.import_module(f".{module}", __package__).cases()
    of_part = [case for case in found if case.part in PARTS[part] and case.op in wanted_ops]
    whole = {case.name for case in of_part}
    fitting = [case for case in of_part if case.dtype_name in wanted_dtypes and case.direction in wanted_directions]
    wanted = None if names is None else [(name, _named(name, whole)) for name in names]
    for name, named in wanted or [("any", whole)]:
        if not any(case.name in named for case in fitting):
            here = ", ".join(dict.fromkeys(f"{x.dtype_name} {x.direction}" for x in of_part if x.name in named))
            asked = f"{', '.join(wanted_dtypes)} {', '.join(wanted_directions)}"
            raise ValueError(f"case {name}: expected a dtype and direction that it has ({here or 'none'}), got {asked}")
    chosen = fitting if wanted is None else [x for x in fitting if any(x.name in named for _, named in wanted)]
    return chosen


def _named(name: str, known: set[str]) -> set[str]:
    """The cases of this name or, where none has it, those with it in their name."""
    found = {name} if name in known else {other for other in known if name in other}
    if not name or not found:
        close = difflib.get_close_matches(name, sorted(known), n=5, cutoff=0.4)
        hint = f"; close: {', '.join(close)}" if close else ""
        raise ValueError(f"case: expected a part of a name that --list shows, got {name!r}{hint}")
    return found


def expanded(shapes: Iterable[Any], case: Callable[[Any, str, str], Case]) -> list[Case]:
    """A case for each dtype and direction of each shape."""
    return [
        case(shape, dtype, direction) for shape in shapes for dtype in shape.dtypes for direction in shape.directions
    ]


def find(case_id: str) -> Case:
    """The case of this id, whatever its part."""
    modules = [importlib.import_module(f".{name}", __package__) for name in MODULES[case_id.split("/")[0]]]
    return next(case for module in modules for case in module.cases() if case.id == case_id)


def _known(what: str, given: Iterable[str] | None, allowed: Iterable[str]) -> list[str]:
    allowed = list(allowed)
    given = allowed if given is None else list(given)
    for name in given:
        if name not in allowed:
            raise ValueError(f"{what}: expected one of {', '.join(allowed)}, got {name!r}")
    return given


def import_peers(*names: str, how: str = ' (pip install "gpt4v_fast[bench-peers]")') -> list[Any]:
    """The modules of a peer that is no dependency.

    Raises:
        NotInstalled: one is not; `how` says how to get it.
    """
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        missing = (error.name or names[0]).split(".")[0]
        raise NotInstalled(f"{missing} is not installed{how}") from None


@dataclass(frozen=True)
class Chosen:
    """A run that was the fastest of several settings."""

    run: Run
    setting: str

    def __call__(self) -> Outputs:
        return self.run()


_fastest: dict[Hashable, str] = {}


def fastest(key: Hashable, candidates: Mapping[str, Callable[[], Run]]) -> Run:
    """The fastest of a contender's settings: at the first call with this key each is made, called and timed; later ones
    make the same choice.

    Raises:
        RuntimeError: none of them works; the message is the first one's.
    """
    if key in _fastest:
        return Chosen(candidates[_fastest[key]](), _fastest[key])
    errors, runs = [], {}
    for name, make in candidates.items():
        try:
            runs[name] = make()
            runs[name]()
        except RuntimeError as error:
            runs.pop(name, None)
            errors.append(error)
    if not runs:
        raise errors[0]
    best = min(runs, key=lambda name: min(_seconds(runs[name]) for _ in range(TRIALS)))
    _fastest[key] = best
    return Chosen(runs[best], best)


def _seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def by(function: Function) -> Callable[[Case, Inputs], Run]:
    """`Contender.make` of a forward function."""
    return lambda case, inputs: timed(case.direction, function, inputs, case.leaves, inputs["upstream"])


def timed(
    direction: str,
    function: Function,
    inputs: Inputs,
    leaves: Sequence[str],
    upstream: torch.Tensor,
) -> Run:
    """A contender's call from its forward function.

    "forward" runs it without gradients; "forward+backward" also takes the gradients of `leaves` under `upstream`;
    "backward" takes them from a graph made beforehand.
    """
    if direction == "forward":

        def forward() -> Outputs:
            with torch.no_grad():
                return {"out": function(inputs)}

        return forward

    needed = {name: inputs[name].detach().requires_grad_() for name in leaves}
    differentiable = {**inputs, **needed}

    def gradients(out: torch.Tensor, keep: bool) -> Outputs:
        values = torch.autograd.grad(out, list(needed.values()), upstream.to(out.dtype), retain_graph=keep)
        return {f"grad {name}": value for name, value in zip(leaves, values, strict=True)}

    if direction == "backward":
        out = function(differentiable)
        return lambda: gradients(out, True)

    def forward_backward() -> Outputs:
        out = function(differentiable)
        return {"out": out.detach(), **gradients(out, False)}

    return forward_backward
