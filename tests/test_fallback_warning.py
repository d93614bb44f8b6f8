"""A call that falls back to the reference says so, once for each line that calls, where nobody asked for it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import gpt4v_fast as gf
from gpt4v_fast import backends

Q = torch.randn(1, 2, 5, 8)
PACKED, STARTS = torch.randn(5, 2, 8), torch.tensor([0, 2, 5], dtype=torch.int32)
TOKENS, CACHE, LENGTHS = torch.randn(2, 1, 4, 8), torch.randn(2, 8, 2, 8), torch.tensor([5, 6], dtype=torch.int32)
LOGITS, HIDDEN, WEIGHT, TARGET = torch.randn(6, 11), torch.randn(6, 8), torch.randn(11, 8), torch.randint(0, 11, (6,))
PIXELS, PATCHES = torch.rand(2, 3, 8, 8), torch.randn(5, 3, 4, 4)
CALLS: dict[str, Callable[[], Any]] = {
    "attention": lambda: gf.attention(Q, Q, Q),
    "attention_varlen": lambda: gf.attention_varlen(PACKED, PACKED, PACKED, STARTS, STARTS),
    "attention_kvcache": lambda: gf.attention_kvcache(TOKENS, CACHE, CACHE, LENGTHS),
    "cross_entropy": lambda: gf.cross_entropy(LOGITS, TARGET),
    "linear_cross_entropy": lambda: gf.linear_cross_entropy(HIDDEN, WEIGHT, TARGET),
    "patch_embed": lambda: gf.patch_embed(PIXELS, PATCHES),
}
every_op = pytest.mark.parametrize("op", CALLS)


@pytest.fixture
def only_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel takes any call, as on a device that has none."""
    monkeypatch.setattr(backends._settings, "cache", {})
    monkeypatch.setattr(backends, "_wrong_place", lambda backend, device: None if backend == "reference" else "a test")


def heard(call: Callable[[], Any], times: int = 1) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        for _ in range(times):
            call()
    return [warning for warning in found if warning.category is gf.FallbackWarning]


@every_op
def test_each_calling_line_is_told_once(op, only_the_reference):
    (warning,) = heard(CALLS[op], times=3)
    assert warning.filename == __file__ and warning.lineno == CALLS[op].__code__.co_firstlineno
    text = str(warning.message)
    assert text.startswith(f"gpt4v_fast.{op} runs on its slow reference: not ") and ": a test" in text
    assert "FallbackWarning" in text and "gpt4v_fast.strict()" in text


@every_op
def test_kernels_and_forced_references_say_nothing(op):
    assert not heard(CALLS[op])
    with gf.force(backend="reference"):
        assert not heard(CALLS[op])


def test_strict_mode_raises_and_filters_silence(only_the_reference):
    with gf.strict(), pytest.raises(gf.FallbackError):
        heard(CALLS["attention"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=gf.FallbackWarning)
        CALLS["attention"]()


def test_a_backward_pass_says_it_no_second_time(only_the_reference):
    def step() -> None:
        for function, *args in ((gf.cross_entropy, LOGITS, TARGET), (gf.linear_cross_entropy, HIDDEN, WEIGHT, TARGET)):
            leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in args]
            function(*leaves).backward()
        gf.attention(*(Q.clone().requires_grad_() for _ in "qkv")).sum().backward()
        gf.patch_embed(PIXELS, PATCHES.clone().requires_grad_()).sum().backward()

    assert len({str(w.message) for w in heard(step)}) == len(heard(step)) == 4


def test_modules_and_compiled_code_tell_their_callers_line(only_the_reference):
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: gf.attention(q, q, q), fullgraph=True, backend="aot_eager")
    module = gf.nn.Attention(8, 2)
    for call in (lambda: compiled(Q), lambda: module(torch.randn(2, 5, 8))):
        (warning,) = heard(call, times=2)
        assert warning.filename == __file__


def test_shapes_alone_say_nothing():
    meta = Q.to("meta")
    assert not heard(lambda: gf.attention(meta, meta, meta))
