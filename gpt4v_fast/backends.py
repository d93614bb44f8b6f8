"""Which kernel serves a call, and why: `pick`, `explain`, `strict`, and the ways to force a choice.

Every op registers what each of its backends takes. `pick` goes through them from the fastest to the oracle and keeps
the reasons; nothing falls back silently: `explain` prints the reasons, strict mode turns a fallback into an error.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from gpt4v_fast._native import _C

BACKENDS = ("cpu", "cuda", "triton", "reference")
FORCEABLE = ("cpu", "triton", "reference")


class FallbackError(RuntimeError):
    """Raised in strict mode when only the oracle could serve a call."""


@dataclass(frozen=True)
class Request:
    """What a call asks of a kernel: the op, where its tensors are, their dtype, and the features it uses."""

    op: str
    device: str
    dtype: torch.dtype
    features: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Choice:
    """The answer of `pick` and `explain`: which kernel, on what, why, and why not the others."""

    op: str
    backend: str
    kernel: str
    on: str
    reason: str
    rejected: tuple[tuple[str, str], ...] = ()

    @property
    def is_fallback(self) -> bool:
        """True when the oracle serves a call that nobody asked it to serve."""
        return self.backend == "reference" and self.reason != "forced"

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.kernel} [{self.backend}] on {self.on} ({self.reason})"]
        lines += [f"  not {name}: {why}" for name, why in self.rejected]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Kernel:
    backend: str
    kernel: str
    unsupported: Callable[[Request], str | None]


@dataclass
class _Settings:
    backend: str | None = None
    strict: bool = False
    cache: dict[tuple[Any, str | None, str], Choice] = field(default_factory=dict)


def _setting_from_environment(name: str, allowed: tuple[str, ...]) -> str | None:
    value = os.environ.get(name) or None
    if value is not None and value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
    return value


_settings = _Settings(
    backend=_setting_from_environment("GPT4V_FAST_BACKEND", FORCEABLE),
    strict=os.environ.get("GPT4V_FAST_STRICT", "0") not in ("", "0"),
)
_strict: contextvars.ContextVar[bool] = contextvars.ContextVar("gpt4v_fast_strict", default=_settings.strict)
_kernels: dict[str, list[_Kernel]] = {}
_explainers: dict[Callable[..., Any], Callable[..., Request]] = {}


def triton_interpreted() -> bool:
    """True when Triton runs its kernels in its interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def register_kernel(
    op: str, backend: str, kernel: str, unsupported: Callable[[Request], str | None] = lambda request: None
) -> None:
    """Adds a kernel for `op`; earlier ones are preferred. `unsupported` says why it can't take a request, or None."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    _kernels.setdefault(op, []).append(_Kernel(backend, kernel, unsupported))


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


def _pick(request: Request, forced: str | None) -> Choice:
    rejected = []
    for candidate in _kernels.get(request.op, []):
        if forced is not None and candidate.backend != forced:
            rejected.append((candidate.kernel, f"the backend {forced} is forced"))
            continue
        why = _wrong_place(candidate.backend, request.device) or candidate.unsupported(request)
        if why is not None:
            rejected.append((candidate.kernel, why))
            continue
        reason = "forced" if forced is not None else "the fastest kernel that takes this call"
        where = _where(candidate.backend, request.device)
        return Choice(request.op, candidate.backend, candidate.kernel, where, reason, tuple(rejected))
    reason = "forced" if forced == "reference" else "no faster kernel takes this call"
    where = _where("reference", request.device)
    return Choice(request.op, "reference", f"reference.{request.op}", where, reason, tuple(rejected))


def pick(request: Request) -> Choice:
    """The kernel that serves `request`; in strict mode raises FallbackError where that would be the oracle."""
    return pick_by(request, lambda: request)


def pick_by(key: Any, describe: Callable[[], Request]) -> Choice:
    """`pick(describe())` for calls so small that describing each would take long: `key` determines the request."""
    settled = (key, _settings.backend, _C.isa())
    choice = _settings.cache.get(settled)
    if choice is None:
        choice = _settings.cache[settled] = _pick(describe(), _settings.backend)
    if choice.is_fallback and _strict.get():
        reasons = "; ".join(f"not {name}: {why}" for name, why in choice.rejected) or "no kernel is registered"
        raise FallbackError(f"{choice.op} would run on its slow reference, and strict mode is on: {reasons}")
    return choice


def register_explainer(function: Callable[..., Any], to_request: Callable[..., Request]) -> None:
    """Makes `explain(function, ...)` work: `to_request` validates the same arguments and describes the call."""
    _explainers[function] = to_request


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Choice:
    """Says which kernel `function(*args, **kwargs)` would run, on what, why, and why not the faster ones.

    The arguments are validated as in the call itself; nothing is computed. `print(explain(...))` is for reading,
    the fields of the returned `Choice` are for programs.

    Raises:
        TypeError: `function` is not one of the package's ops.
    """
    if function not in _explainers:
        known = ", ".join(sorted(f.__name__ for f in _explainers))
        raise TypeError(f"function: expected one of {known}, got {getattr(function, '__name__', function)!r}")
    token = _strict.set(False)
    try:
        return pick(_explainers[function](*args, **kwargs))
    finally:
        _strict.reset(token)


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
