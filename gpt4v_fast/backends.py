"""Which kernel serves a call, and why: `pick`, `explain`, `strict`, and the ways to force a choice.

Every op registers its backends, objects that take or refuse a call by its traits. `pick` goes through them from the
fastest to the oracle and returns the one that runs; `explain` prints that same choice with the reasons, and strict mode
turns a fallback into an error. A backend sees a call's traits alone when it refuses, and they are the key under which
the choice is remembered: what is explained is what runs.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, cast

import torch

from gpt4v_fast._native import _C
from gpt4v_fast.ops import modes
from gpt4v_fast.ops.foreign_names import F, translated

BACKENDS = ("cpu", "cuda", "triton", "reference")
FORCEABLE = ("cpu", "triton", "reference")


class FallbackError(RuntimeError):
    """Raised in strict mode when only the oracle could serve a call."""


class FallbackWarning(UserWarning):
    """Given, once for each line that calls, where only the oracle can serve a call."""


class Traits(NamedTuple):
    """What decides which backend serves a call: the op, where its tensors are, their dtype, and what the call uses."""

    op: str
    device: str
    dtype: torch.dtype
    features: frozenset[str] = frozenset()


class Backend:
    """One way to serve an op: a kernel with what it takes. Subclasses live in gpt4v_fast/ops/<op>/<backend>.py.

    `forward(call)` gives the op's outputs, `backward(call, saved, upstream, wanted)` a gradient for each input that is
    wanted (ops/library.py says what these are).
    """

    backend = ""  # cpu, cuda, triton or reference
    kernel = ""  # what `explain` calls it

    def refuses(self, traits: Traits) -> str | None:
        """Why this kernel does not take a call with these traits, or None."""
        return None

    def forward(self, call: Any, *memory: Any) -> Any:
        raise NotImplementedError

    def backward(self, call: Any, saved: Any, upstream: Any, wanted: Any) -> dict[str, torch.Tensor | None]:
        raise NotImplementedError


@dataclass(frozen=True)
class Choice:
    """The answer of `explain`: which kernel serves a call, on what, why, and why not the others."""

    op: str
    backend: str
    kernel: str
    on: str
    reason: str
    rejected: tuple[tuple[str, str], ...] = ()
    runs: Backend | None = field(default=None, repr=False, compare=False)

    @property
    def is_fallback(self) -> bool:
        """True when the oracle serves a call that nobody asked it to serve."""
        return self.backend == "reference" and self.reason != "forced"

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.kernel} [{self.backend}] on {self.on} ({self.reason})"]
        lines += [f"  not {name}: {why}" for name, why in self.rejected]
        return "\n".join(lines)


@dataclass
class _Settings:
    backend: str | None = None
    cache: dict[Any, Choice] = field(default_factory=dict)


def _setting_from_environment(name: str, allowed: tuple[str, ...]) -> str | None:
    value = os.environ.get(name) or None
    if value is not None and value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
    return value


_setting_from_environment("GPT4V_FAST_ISA", tuple(_C.available_isas()))  # what C++ reads, named as people set it
_settings = _Settings(backend=_setting_from_environment("GPT4V_FAST_BACKEND", FORCEABLE))
_strict: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "gpt4v_fast_strict", default=os.environ.get("GPT4V_FAST_STRICT", "0") not in ("", "0")
)
_backends: dict[str, tuple[Backend, ...]] = {}
_public: list[Callable[..., Any]] = []


def triton_interpreted() -> bool:
    """True when Triton runs its kernels in its interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def register(op: str, *backends: Backend) -> None:
    """The backends of an op, the fastest first and the oracle last."""
    if any(backend.backend not in BACKENDS for backend in backends) or backends[-1].backend != "reference":
        raise ValueError(f"backends: expected backends of {', '.join(BACKENDS)}, and the reference last")
    _backends[op] = backends


def _wrong_place(backend: str, device: str) -> str | None:
    """Why a backend can't run where the tensors are, or None."""
    if backend == "cpu":
        return None if device == "cpu" else f"the tensors are on {device}"
    if backend == "cuda":
        if device != "cuda" or torch.version.hip is not None:
            return f"the tensors are on {device}, not on an NVIDIA GPU"
        return None
    if backend == "triton":
        if device != "cuda" and not (device == "cpu" and triton_interpreted()):
            return f"the tensors are on {device}, and TRITON_INTERPRET is not 1"
        if not _has_triton():
            return "triton is not installed"
    return None


def _has_triton() -> bool:
    import importlib.util

    return importlib.util.find_spec("triton") is not None


def _where(backend: str, device: str) -> str:
    if backend == "cpu":
        return f"CPU ({_C.isa()})"
    if device == "cuda":
        return torch.cuda.get_device_name()
    return "CPU (Triton interpreter)" if backend == "triton" else device.upper()


def choose(traits: Traits, forced: str | None = None) -> Choice:
    """The first backend of the op that takes a call with these traits, and why the ones before it do not."""
    rejected = []
    for candidate in _backends[traits.op]:
        is_oracle = candidate.backend == "reference"
        if forced is not None and candidate.backend != forced and not is_oracle:
            rejected.append((candidate.kernel, f"the backend {forced} is forced"))
            continue
        why = _wrong_place(candidate.backend, traits.device) or candidate.refuses(traits)
        if why is not None:
            rejected.append((candidate.kernel, why))
            continue
        reason = "the fastest kernel that takes this call" if forced is None else "forced"
        if is_oracle and forced != "reference":
            reason = "no faster kernel takes this call"
        where = _where(candidate.backend, traits.device)
        return Choice(traits.op, candidate.backend, candidate.kernel, where, reason, tuple(rejected), candidate)
    raise RuntimeError(f"{traits.op}: no backend is registered that takes every call")


class Call:
    """What every call object has, beside its fields: it is a NamedTuple that also derives from this class, by
    `class AttentionCall(Call, _AttentionFields)`.

    A feature is a field that differs from its default, by its own name with spaces; `FEATURE_NAMES` renames some (None:
    no feature), and `extras` adds features that several fields make together, in the order of `EXTRAS`.
    """

    MAIN: ClassVar[str] = ""  # the tensor whose device and dtype decide
    FEATURE_NAMES: ClassVar[Mapping[str, str | None]] = {}
    EXTRAS: ClassVar[tuple[str, ...]] = ()
    DEFAULTS: ClassVar[tuple[Any, ...]] = ()

    __slots__ = ()

    def __init_subclass__(cls) -> None:
        if not hasattr(cls, "_fields"):  # between this class and a call object
            return
        fields: Any = cls
        cls.DEFAULTS = tuple(fields._field_defaults.get(name) for name in fields._fields)
        fields._main = fields._fields.index(cls.MAIN)

    @property
    def op(self) -> str:
        raise NotImplementedError

    def extras(self) -> tuple[bool, ...]:
        return ()

    @classmethod
    def features(cls, used: int, extras: tuple[bool, ...]) -> frozenset[str]:
        """The names of the used fields (a bit each) and of the extras."""
        of: Any = cls
        required = len(of._fields) - len(of._field_defaults)
        fields = [name for i, name in enumerate(of._fields) if i >= required and used >> i & 1]
        named = {cls.FEATURE_NAMES.get(name, name.replace("_", " ")) for name in fields}
        return frozenset(name for name in named if name) | frozenset(
            name for name, is_used in zip(cls.EXTRAS, extras, strict=True) if is_used
        )


def explain_call(call: Any) -> Choice:
    """Which backend serves `call`. It is looked up by what decides it: a small call has no time to go through all."""
    tensor = call[call._main]
    used, extras = _C.used_fields(call, call.DEFAULTS), call.extras()
    key = (call.op, tensor.device, tensor.dtype, used, extras, _settings.backend, _C.isa())
    choice = _settings.cache.get(key)
    if choice is None:
        traits = Traits(call.op, tensor.device.type, tensor.dtype, call.features(used, extras))
        choice = _settings.cache[key] = choose(traits, _settings.backend)
    return choice


def pick(call: Any, *, again: bool = False) -> Backend:
    """The backend that serves `call`. Where that is the oracle, unasked, it warns, and in strict mode raises
    FallbackError.

    Args:
        again: for the backward pass, whose forward pass has warned.
    """
    choice = explain_call(call)
    if choice.is_fallback:
        _tell_fallback(choice, call[call._main].is_meta or again)
    return cast(Backend, choice.runs)


def _tell_fallback(choice: Choice, is_quiet: bool) -> None:
    reasons = "; ".join(f"not {name}: {why}" for name, why in choice.rejected) or "no kernel is registered"
    if _strict.get():
        raise FallbackError(f"{choice.op} would run on its slow reference, and strict mode is on: {reasons}")
    if is_quiet:
        return
    message = (
        f"gpt4v_fast.{choice.op} runs on its slow reference: {reasons}. To silence this: warnings.filterwarnings("
        '"ignore", category=gpt4v_fast.FallbackWarning) or gpt4v_fast.force(backend="reference"); to get an error '
        "instead: gpt4v_fast.strict()"
    )
    warnings.warn(message, FallbackWarning, stacklevel=_frames_below_the_user())


_NOT_USERS = ("gpt4v_fast", "torch", "")  # "": graphs of torch.fx have no name


def _frames_below_the_user() -> int:
    """The stacklevel of the first frame that is neither this package's nor torch's nor of code that torch made, so that
    each line of the user's warns once; of the outermost frame where there is no other."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _NOT_USERS:
        frame, level = frame.f_back, level + 1
    return level


def forward(call: Any) -> Any:
    """The outputs of `call`, by the backend that serves it."""
    return pick(call).forward(call)


def backward(call: Any, saved: Any, upstream: Any, wanted: Any) -> dict[str, torch.Tensor | None]:
    """The gradients of `call`'s inputs, by the backend that serves it."""
    return pick(call, again=True).backward(call, saved, upstream, wanted)


def explained(function: F) -> F:
    """Marks a public function whose calls `explain` takes, and makes its errors know other libraries' arguments."""
    public = translated(function)
    _public.append(public)
    return public


def call_of(function: Callable[..., Any], *args: Any, compiled: bool = False, **kwargs: Any) -> Any:
    """The call object that `function(*args, **kwargs)` makes: the function runs as far as its op, and no further.
    `compiled`: the one that it makes under torch.compile."""
    if function not in _public:
        known = ", ".join(sorted(f.__name__ for f in _public))
        raise TypeError(f"function: expected one of {known}, got {getattr(function, '__name__', function)!r}")
    if not args and not kwargs:
        name = function.__name__
        raise TypeError(f"explain: expected {name}'s arguments behind the function, as explain({name}, ...), got none")
    modes.ASKED.on, modes.ASKED.compiled = True, compiled
    try:
        function(*args, **kwargs)
    except modes.CallMade as made:
        return made.call
    finally:
        modes.ASKED.on = modes.ASKED.compiled = False
    raise RuntimeError(f"gpt4v_fast.{function.__name__}: expected a call of an op")


def explain(function: Callable[..., Any], *args: Any, compiled: bool = False, **kwargs: Any) -> Choice:
    """Says which kernel `function(*args, **kwargs)` would run, on what, why, and why not the faster ones.

    The arguments are validated as in the call itself; no kernel runs. `print(explain(...))` is for reading, the fields
    of the returned `Choice` are for programs.

    Args:
        function: one of the package's ops.
        compiled: as torch.compile and torch.func run the call, where forward can leave nothing for backward.

    Raises:
        TypeError: `function` is not one of the package's ops.
        What the call itself raises for its arguments.
    """
    call = call_of(function, *args, compiled=compiled, **kwargs)
    return explain_call(getattr(call, "explained", call))  # of a sharded call, the call on this process's shard


@contextlib.contextmanager
def strict(enabled: bool = True) -> Iterator[None]:
    """Inside this context a call that no fast kernel takes raises FallbackError (GPT4V_FAST_STRICT=1: everywhere)."""
    token = _strict.set(enabled)
    try:
        yield
    finally:
        _strict.reset(token)


@contextlib.contextmanager
def force(*, isa: str | None = None, backend: str | None = None) -> Iterator[None]:
    """Inside this context the CPU kernels use `isa` and every op uses `backend` (process-wide, for tests and timing).

    Raises:
        ValueError: this build or processor lacks `isa`, or `backend` is not one of cpu, triton, reference.
    """
    if backend is not None and backend not in FORCEABLE:
        raise ValueError(f"backend: expected one of {', '.join(FORCEABLE)}, got {backend!r}")
    previous_isa, previous_backend = _C.isa(), _settings.backend
    if isa is not None:
        _C.select_isa(isa)
    if backend is not None:
        _settings.backend = backend
    try:
        yield
    finally:
        _C.select_isa(previous_isa)
        _settings.backend = previous_backend


def available_isas() -> list[str]:
    """The ISAs that this build holds and this processor runs, slowest first."""
    return list(_C.available_isas())
