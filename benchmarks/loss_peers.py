"""The ways to both losses that are timed side by side: ours, PyTorch's own, compiled ones, cut-cross-entropy's.

Apple's cut-cross-entropy has one backend that runs on a CPU, "torch_compile": it drops ignored rows, then compiles the
product and F.cross_entropy of its fp32 result. On a GPU it is "cce", in Triton, which leaves out small gradients (its
default) or, with filter_eps=None, none. Liger's fused loss runs on a GPU alone; its loss of given logits is not here,
for it overwrites them and could not be called twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import gpt4v_fast as gf

from .registry import Case, Contender, Inputs, Run, Unavailable, by, import_peers

IGNORE = -100
# PyTorch's chunked form is 10 to 25 times slower than the plain way in bf16: one call says so, more only take time.
CHUNKED_BUDGET_SHARE = 0.2

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]  # of hidden, weight and target


def _linear(function: Loss) -> Callable[[Case, Inputs], Run]:
    return by(lambda x: function(x["hidden"], x["weight"], x["target"]))


def _compiled(get: Callable[[], Loss]) -> Callable[[Case, Inputs], Run]:
    """torch.compile for one size, which is its fastest setting."""
    return lambda case, inputs: _linear(torch.compile(get(), dynamic=False))(case, inputs)


def _plain(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def _torch_linear() -> Loss:
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise Unavailable(f"torch {torch.__version__} has no F.linear_cross_entropy")
    return lambda hidden, weight, target: function(hidden, weight, target, ignore_index=IGNORE)


def _torch_linear_chunked(case: Case, inputs: Inputs) -> Run:
    function = getattr(F, "linear_cross_entropy", None)
    make_options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or make_options is None:
        raise Unavailable(f"torch {torch.__version__} has no torch.nn.LinearCrossEntropyOptions")
    options = make_options()
    return _linear(lambda *given: function(*given, ignore_index=IGNORE, options=options))(case, inputs)


def _cut_cross_entropy(case: Case, inputs: Inputs) -> Run:
    (peer,) = import_peers("cut_cross_entropy.torch_compile")
    return _linear(peer.torch_compile_linear_cross_entropy)(case, inputs)


def _cut_cross_entropy_triton(**options: Any) -> Callable[[Case, Inputs], Run]:
    def make(case: Case, inputs: Inputs) -> Run:
        (peer,) = import_peers("cut_cross_entropy")
        if case.dtype == torch.float32:
            raise Unavailable("cut-cross-entropy's Triton kernels take bf16 and fp16")
        return _linear(lambda h, w, y: peer.linear_cross_entropy(h, w, y, impl="cce", **options))(case, inputs)

    return make


def _liger(case: Case, inputs: Inputs) -> Run:
    (peer,) = import_peers("liger_kernel.transformers.functional", how="")
    return _linear(lambda h, w, y: peer.liger_fused_linear_cross_entropy(h, w, y))(case, inputs)


def _logits_bytes(per_logit: Callable[[bool, int], float], rows: str = "N") -> Callable[[Case], float]:
    """An estimate for `Contender.extra_bytes` from bytes per logit, given whether it is the forward pass alone and the
    dtype's bytes."""
    return lambda case: (
        float(case.shape[rows] * case.shape["V"]) * per_logit(case.direction == "forward", case.dtype.itemsize)
    )


# fp32 logits and their log-softmax; with gradients that, the gradient of it and the gradient of the logits. Compiled,
# the product's result is all that is written (memory.py found both so, N 8192, V 32,000).
_of_plain = _logits_bytes(lambda forward, itemsize: 8 if forward else 12)
_of_torch_linear = _logits_bytes(lambda forward, itemsize: (2 if forward else 3) * itemsize)
_of_compiled = _logits_bytes(lambda forward, itemsize: itemsize)
_of_counted = _logits_bytes(lambda forward, itemsize: itemsize, "counted")


def linear_contenders(direction: str) -> tuple[Contender, ...]:
    """Ours and every peer; the chunked form saves memory for the gradients, and is of no use without them."""
    plain = "F.cross_entropy(F.linear().float())"
    found = [
        Contender("gpt4v_fast", _linear(gf.linear_cross_entropy), ours=True),
        Contender(plain, _linear(_plain), extra_bytes=_of_plain),
        Contender(
            "F.linear_cross_entropy",
            lambda case, inputs: _linear(_torch_linear())(case, inputs),
            extra_bytes=_of_torch_linear,
        ),
    ]
    if direction != "forward":
        found.append(
            Contender("F.linear_cross_entropy, chunked", _torch_linear_chunked, budget_share=CHUNKED_BUDGET_SHARE)
        )
    return (
        *found,
        Contender(f"{plain}, compiled", _compiled(lambda: _plain), compiled=True, extra_bytes=_of_compiled),
        Contender(
            "F.linear_cross_entropy, compiled", _compiled(_torch_linear), compiled=True, extra_bytes=_of_compiled
        ),
        Contender("cut-cross-entropy, torch_compile", _cut_cross_entropy, compiled=True, extra_bytes=_of_counted),
        Contender("cut-cross-entropy, cce", _cut_cross_entropy_triton(), compiled=True, devices=("cuda",)),
        Contender(
            "cut-cross-entropy, cce, exact",
            _cut_cross_entropy_triton(filter_eps=None),
            compiled=True,
            devices=("cuda",),
        ),
        Contender("Liger, fused linear", _liger, compiled=True, devices=("cuda",)),
    )


def _logits(function: Callable[[torch.Tensor, torch.Tensor], Any]) -> Callable[[Case, Inputs], Run]:
    return by(lambda x: function(x["logits"], x["target"]))


def _of_float(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), target)


LOGITS_CONTENDERS = (
    Contender("gpt4v_fast", _logits(gf.cross_entropy), ours=True),
    Contender("F.cross_entropy", _logits(F.cross_entropy)),
    Contender("F.cross_entropy(logits.float())", _logits(_of_float)),
    Contender(
        "F.cross_entropy(logits.float()), compiled",
        lambda case, inputs: _logits(torch.compile(_of_float, dynamic=False))(case, inputs),
        compiled=True,
        devices=("cuda",),
    ),
)
