"""Calls on plain CPU tensors skip the dispatcher: what may not change by that, and how the extension reads tensors."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from attention_cases import BF16, FP16, FP32, ISAS
from torch.utils._python_dispatch import TorchDispatchMode

import gpt4v_fast as gf
from gpt4v_fast import _native
from gpt4v_fast._native import _C
from gpt4v_fast.backends import call_of
from gpt4v_fast.ops import modes
from gpt4v_fast.ops.attention import reference as oracle


def small(dtype: torch.dtype = FP32, gradient: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(1, 4, 16, 32, generator=generator).to(dtype).requires_grad_(gradient) for _ in "qkv"]


def test_what_is_forced_later_is_honoured(monkeypatch):
    calls = []
    core = oracle.attention_core
    monkeypatch.setattr(oracle, "attention_core", lambda *a, **k: calls.append(1) or core(*a, **k))
    q, k, v = small()
    fast = gf.attention(q, k, v)
    assert not calls
    with gf.force(backend="reference"):
        gf.attention(q, k, v)
    assert len(calls) == 1
    assert torch.equal(gf.attention(q, k, v), fast) and len(calls) == 1


@pytest.mark.parametrize("gradient", [False, True])
def test_a_profiler_still_sees_the_op(gradient):
    tensors = small(gradient=gradient)
    with torch.autograd.profiler.profile() as profile:
        gf.attention(*tensors)
    assert "gpt4v_fast::attention" in {event.name for event in profile.function_events}


def test_a_dispatch_mode_still_sees_the_op():
    seen = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Log():
        gf.attention(*small())
    assert torch.ops.gpt4v_fast.attention.default in seen


def test_a_subclass_is_served_by_the_op():
    class Named(torch.Tensor):
        pass

    q, k, v = small()
    out = gf.attention(*(x.as_subclass(Named) for x in (q, k, v)))
    assert torch.equal(out.as_subclass(torch.Tensor), gf.attention(q, k, v))


def test_parameters_are_plain_and_get_gradients():
    leaves = [torch.nn.Parameter(x) for x in small()]
    assert _C.plain_arguments(tuple(leaves)) == modes.PLAIN_WITH_GRADIENT
    grads = torch.autograd.grad(gf.attention(*leaves).sum(), leaves)
    out, _ = torch.ops.gpt4v_fast.attention(*call_of(gf.attention, *leaves))
    assert all(torch.equal(a, b) for a, b in zip(grads, torch.autograd.grad(out.sum(), leaves), strict=True))


def test_an_input_changed_before_the_backward_is_refused():
    q, k, v = small(gradient=True)
    out = gf.attention(q, k, v)
    with torch.no_grad():
        k.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_what_is_not_plain():
    x = torch.ones(2)
    assert _C.plain_arguments((x, None, 1, 2.0, True, "name")) == modes.PLAIN
    assert _C.plain_arguments((x, x.clone().requires_grad_())) == modes.PLAIN_WITH_GRADIENT
    for other in (
        x.to("meta"),
        x.to_sparse(),
        x.to(torch.complex64),
        x.as_subclass(type("Own", (torch.Tensor,), {})),
        [x],
    ):
        assert _C.plain_arguments((x, other)) == modes.NOT_PLAIN


CACHES = torch.rand(2, 1, 8, 2, 8, generator=torch.Generator().manual_seed(1))
NEGATED = {
    "attention": (
        lambda q, k, v, bias, sinks: gf.attention(q, k, v, bias=bias, sinks=sinks),
        [(1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8), (5, 7), (2,)],
    ),
    "kvcache": (
        lambda q, k, v: gf.attention_kvcache(q, *CACHES, torch.tensor([6], dtype=torch.int32), k=k, v=v),
        [(1, 1, 2, 8), (1, 1, 2, 8), (1, 1, 2, 8)],
    ),
    "cross_entropy": (lambda x, w: gf.cross_entropy(x, torch.tensor([0, 3]), weight=w), [(2, 5), (5,)]),
    "linear": (
        lambda h, w, b: gf.linear_cross_entropy(h, w, torch.tensor([0, 3]), bias=b),
        [(2, 4), (5, 4), (5,)],
    ),
    "patch_embed": (lambda x, w, b: gf.patch_embed(x, w, bias=b), [(1, 3, 4, 4), (5, 3, 2, 2), (5,)]),
}


@pytest.mark.parametrize("function, shapes", NEGATED.values(), ids=NEGATED.keys())
def test_views_that_negate_are_read_as_what_they_mean(function, shapes):
    """torch resolves them in its dispatcher (z.conj().imag is such a view): one input at a time."""
    generator = torch.Generator().manual_seed(0)
    near = [torch.rand(shape, generator=generator) + 0.1 for shape in shapes]
    for i in range(len(near)):
        views = [torch._neg_view(x) if i == j else x for j, x in enumerate(near)]
        meant = [x.neg() if i == j else x for j, x in enumerate(near)]
        results = [function(*tensors) for tensors in (views, meant)]
        torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("place", [0, 1])
def test_a_cache_that_negates_is_refused(place):
    caches = [torch._neg_view(x) if i == place else x for i, x in enumerate(CACHES)]
    name = ("k_cache", "v_cache")[place]
    with pytest.raises(ValueError, match=f"{name}: expected a tensor that is written as it lies"):
        gf.attention_kvcache(torch.rand(1, 1, 2, 8), *caches, torch.tensor([6], dtype=torch.int32))


def test_an_upstream_gradient_that_negates():
    leaves = small(gradient=True)
    out = gf.attention(*leaves)
    upstream = torch.randn(out.shape)
    found = torch.autograd.grad(out, leaves, torch._neg_view(upstream), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(found, torch.autograd.grad(out, leaves, upstream.neg()), strict=True))


@pytest.mark.parametrize("function, shapes", NEGATED.values(), ids=NEGATED.keys())
def test_freed_storage_is_refused(function, shapes):
    """As FSDP leaves it between uses; the process lives on."""
    for i in range(len(shapes)):
        tensors = [torch.rand(shape) for shape in shapes]
        tensors[i].untyped_storage().resize_(0)
        with pytest.raises((ValueError, RuntimeError), match="storage"):
            function(*tensors)


def test_what_is_plain_by_dispatch_keys():
    """How tensors on a GPU are told, here with those of a CPU."""
    x = torch.ones(2)

    modes.plain_tensor.cache_clear()
    with torch.inference_mode():
        modes.plain_tensor("cpu")

    def kind(*args: Any) -> int:
        return modes.plain_arguments_like(modes.plain_tensor("cpu"), args)

    assert kind(x, None, 1, 2.0, True, "name") == modes.PLAIN
    assert kind(x[::2], torch.nn.Parameter(x), x.double()) == modes.PLAIN_WITH_GRADIENT
    with torch.inference_mode():
        others = [torch.ones(2)]
    others += [x.to("meta"), x.to_sparse(), x.as_subclass(type("Own", (torch.Tensor,), {})), torch._neg_view(x)]
    for other in (*others, torch.ones(2, dtype=torch.complex64).conj(), [x]):
        assert kind(x, other) == modes.NOT_PLAIN
    seen = []
    torch.func.vmap(lambda row: (seen.append(kind(row)), row)[1])(torch.ones(2, 2))
    assert seen == [modes.NOT_PLAIN]


def test_plain_tensors_on_a_gpu_skip_the_dispatcher(monkeypatch):
    """As on a GPU, with a CPU's in its place: the same bits, and no op is dispatched."""
    x, target = torch.randn(5, 7, requires_grad=True), torch.tensor([0, 6, -100, 3, 1])
    leaves = small(gradient=True)

    def results() -> list[torch.Tensor]:
        loss, out = gf.cross_entropy(x, target), gf.attention(*leaves)
        with torch.no_grad():
            alone = gf.cross_entropy(x, target, reduction="none")
        return [loss, out, alone, *torch.autograd.grad(loss, x), *torch.autograd.grad(out.sum(), leaves)]

    want = results()
    fit = _C.do_attention_tensors_fit
    not_plain = types.SimpleNamespace(plain_arguments=lambda args: modes.NOT_PLAIN, do_attention_tensors_fit=fit)
    monkeypatch.setattr(modes, "_C", not_plain)
    monkeypatch.setattr(modes, "plain_tensor", lambda device: torch.empty(0))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.autograd, "_profiler_enabled", lambda: False)  # or calls would be for it to see
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        got = results()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not [event.name for event in profile.events() if event.name.startswith("gpt4v_fast::")]


@pytest.mark.parametrize("dtype", [*_native.DTYPE_CODES])
def test_a_tensor_is_read_as_what_its_attributes_say(dtype):
    """The binding's error quotes what it read."""
    x = torch.zeros(3, 10, dtype=dtype)[1:, 2::3]
    messages = []
    for argument in (x, _native.view(x)):
        with pytest.raises(ValueError, match="data: expected 1 dimensions, got \\(2, 3\\)") as error:
            _C.peak_read(argument, 1, 0.001)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    flat = x[:, 1]
    for argument in (flat, _native.view(flat)):
        expected = "data: expected at least" if dtype == FP32 else "data: unexpected dtype code"
        with pytest.raises(ValueError, match=expected) as error:
            _C.peak_read(argument, 1, 0.001)
        messages.append(str(error.value))
    assert messages[2] == messages[3]


def test_a_tensor_that_the_extension_cannot_read_is_refused():
    for x in (torch.ones(2, device="meta"), torch.ones(2, dtype=torch.complex64), torch.ones(1, 1, 1, 1, 1, 1, 1)):
        with pytest.raises((TypeError, RuntimeError)):
            _C.peak_read(x, 1, 0.001)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_calls_too_small_for_a_team_have_the_same_bits_for_any_number_of_threads(dtype, isa):
    """Work that one thread does alone, on either side of the limit, forward and backward."""
    before, results = torch.get_num_threads(), []
    generator = torch.Generator().manual_seed(2)
    shapes = [(1, 4, S, 32) for S in (1, 16, 17, 40)]
    tensors = [[torch.randn(shape, generator=generator).to(dtype) for _ in "qkv"] for shape in shapes]
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            with gf.force(isa=isa):
                found = []
                for qkv in tensors:
                    leaves = [x.clone().requires_grad_() for x in qkv]
                    out = gf.attention(*leaves, mask=gf.Mask(causal=True))
                    found += [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]
            results.append(found)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
