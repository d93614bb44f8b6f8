"""The Triton attention kernels, under the interpreter, against the fp64 oracle: every output, every gradient."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from attention_cases import flash
from closeness import Spreads, assert_close, compare
from hypothesis import given, settings
from hypothesis import strategies as st
from random_rounding import BITS, RandomRounding
from triton_interpreter import call, interpreter_only, launch, launch_without_widening, launches

from gpt4v_fast import reference

pytest.importorskip("triton", reason="the Triton kernels need triton")


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    B: int
    H: int
    Hkv: int
    S: int
    T: int
    D: int
    Dv: int
    causal: bool = False
    dtype: torch.dtype = torch.float32
    top_left: bool = False
    scale: float | None = None
    softcap: float | None = None

    @property
    def options(self) -> dict[str, object]:
        return {
            "scale": self.D**-0.5 if self.scale is None else self.scale,
            "causal": self.causal,
            "offset": 0 if self.top_left else self.T - self.S,
            "softcap": self.softcap,
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = {"q": (self.H, self.S, self.D), "k": (self.Hkv, self.T, self.D), "v": (self.Hkv, self.T, self.Dv)}
        return {n: torch.randn(self.B, *s, generator=generator).to(self.dtype) for n, s in shapes.items()}


BF16, FP16 = torch.bfloat16, torch.float16
CASES = [
    Case("one", 1, 1, 1, 1, 1, 1, 1),
    Case("one-query", 1, 2, 1, 1, 67, 64, 64, dtype=FP16),
    Case("square", 1, 2, 2, 64, 64, 64, 64, dtype=BF16),
    Case("odd", 2, 1, 1, 33, 47, 17, 17),
    Case("causal", 1, 2, 2, 70, 70, 32, 32, causal=True),
    Case("causal-bf16-d72", 1, 2, 2, 65, 65, 72, 72, causal=True, dtype=BF16),
    Case("causal-fp16-d80", 1, 2, 1, 50, 97, 80, 80, causal=True, dtype=FP16),
    Case("more-queries-than-keys", 1, 2, 1, 97, 33, 16, 24, causal=True),
    Case("top-left", 1, 1, 1, 40, 70, 16, 16, causal=True, top_left=True),
    Case("top-left-long", 1, 1, 1, 70, 40, 16, 16, causal=True, top_left=True, dtype=BF16),
    Case("group-of-4", 2, 8, 2, 35, 35, 16, 16, causal=True),
    Case("group-of-3-bf16", 1, 3, 1, 33, 65, 40, 40, dtype=BF16),
    Case("wide-v", 1, 2, 2, 34, 34, 24, 96, causal=True),
    Case("narrow-v", 1, 2, 1, 34, 50, 96, 8, dtype=BF16),
    Case("narrow-v-odd", 2, 2, 1, 34, 50, 35, 21, dtype=BF16),
    Case("d256", 1, 1, 1, 33, 40, 256, 256, causal=True, dtype=BF16),
    # fp32 heads over 128 are taken in chunks (kernels/attention/chunks.py).
    Case("chunks-d256", 1, 2, 1, 37, 70, 256, 256),
    Case("chunks-causal-group", 2, 4, 2, 40, 50, 160, 160, causal=True),
    Case("chunks-narrow-v", 1, 3, 1, 70, 33, 192, 40, causal=True),
    Case("chunks-wide-v-softcap", 1, 2, 1, 33, 67, 24, 200, causal=True, softcap=5.0, scale=0.3),
    Case("chunks-odd", 1, 2, 2, 65, 129, 129, 131, causal=True, top_left=True),
    Case("vit", 1, 1, 1, 577, 577, 64, 64, dtype=BF16),
    Case("softcap", 1, 2, 1, 40, 50, 32, 32, causal=True, softcap=5.0, scale=0.7),
    Case("softcap-saturated", 1, 2, 1, 40, 2, 16, 16, softcap=0.5),
    Case("softcap-bf16", 1, 1, 1, 33, 33, 64, 64, softcap=20.0, dtype=BF16),
    Case("negative-scale", 1, 2, 2, 40, 40, 16, 16, causal=True, scale=-0.5),
    Case("zero-scale", 1, 1, 1, 20, 20, 16, 16, causal=True, scale=0.0),
    Case("large-scores", 1, 1, 1, 40, 40, 64, 64, scale=1.0),
    Case("huge-scores-bf16", 1, 1, 1, 40, 40, 64, 64, scale=5.0, dtype=BF16),
]


class _Interpreted(torch.autograd.Function):
    """The launchers as a differentiable function, the way the op wires them."""

    @staticmethod
    def forward(ctx, q, k, v, options):
        out, lse = call(launch, "attention.forward", "attention_forward", q.detach(), k.detach(), v.detach(), **options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = options
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        tensors = [x.detach() for x in ctx.saved_tensors]
        arguments = dict(ctx.options, dlse=dlse)
        return (*call(launch, "attention.forward", "attention_backward", dout, *tensors, **arguments), None)


def _compare(case: Case, tensors: dict[str, torch.Tensor]) -> None:
    """fp32 is multiplied as tf32x3; 16-bit weights and their gradients are rounded to 16 bits for their products."""
    operands = BITS["tf32x3" if case.dtype == torch.float32 else case.dtype]
    compare(
        lambda q, k, v: _Interpreted.apply(q, k, v, case.options),
        lambda q, k, v: flash(_oracle, BITS[case.dtype], q=q, k=k, v=v, **case.options),
        tensors,
        gradients=("q", "k", "v"),
        native_dtype=torch.float32,
        output_names=("out", "lse"),
        operands=operands,
        backward_operands=operands,
    )


def _oracle(**arguments: Any) -> Any:
    return reference.attention_core(**arguments, return_lse=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_outputs_and_gradients(case):
    _compare(case, case.tensors())


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    group=st.integers(1, 3),
    S=st.integers(1, 40),
    T=st.integers(1, 40),
    D=st.integers(1, 40),
    Dv=st.integers(1, 40),
    causal=st.booleans(),
    top_left=st.booleans(),
    dtype=st.sampled_from([torch.float32, BF16, FP16]),
)
def test_any_shape(group, S, T, D, Dv, causal, top_left, dtype):
    case = Case("drawn", 1, group, 1, S, T, D, Dv, causal, dtype, top_left)
    _compare(case, case.tensors())


def _heads_last(x: torch.Tensor) -> torch.Tensor:
    """The same values where (B, S, H, D) is what lies in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _misaligned(x: torch.Tensor) -> torch.Tensor:
    """The same values one element after a 16-byte boundary, rows 3 elements apart."""
    room = torch.full((*x.shape[:-1], x.shape[-1] + 3), float("nan"), dtype=x.dtype)
    room[..., 1 : 1 + x.shape[-1]] = x
    return room[..., 1 : 1 + x.shape[-1]]


def _columns_strided(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize("layout", [_heads_last, _misaligned, _columns_strided], ids=lambda f: f.__name__[1:])
def test_strides_change_nothing(layout):
    case = Case("strided", 2, 4, 2, 37, 41, 72, 40, causal=True, dtype=BF16)
    tensors = case.tensors()
    dout = torch.randn(2, 4, 37, 40).to(BF16)
    plain = _forward_and_backward(case, dout, **tensors)
    strided = _forward_and_backward(case, layout(dout), **{n: layout(x) for n, x in tensors.items()})
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), plain, strided, strict=True):
        assert torch.equal(a, b), f"{name} depends on the strides of the inputs"


def test_expanded_heads_and_upstream_gradient():
    case = Case("expanded", 2, 3, 3, 20, 21, 16, 16, causal=True)
    tensors = {n: x[:, :1].expand(-1, 3, -1, -1) for n, x in case.tensors().items()}
    dout = torch.ones(1).expand(2, 3, 20, 16)  # what `out.sum().backward()` hands over
    strided = _forward_and_backward(case, dout, **tensors)
    plain = _forward_and_backward(case, dout.contiguous(), **{n: x.contiguous() for n, x in tensors.items()})
    assert all(torch.equal(a, b) for a, b in zip(plain, strided, strict=True))


def _forward_and_backward(case, dout, q, k, v):
    out, lse = call(launch, "attention.forward", "attention_forward", q, k, v, **case.options)
    return (out, lse, *call(launch, "attention.forward", "attention_backward", dout, q, k, v, out, lse, **case.options))


def test_queries_that_see_nothing():
    case = Case("blind", 1, 1, 1, 50, 12, 16, 16, causal=True)
    q, k, v = case.tensors().values()
    out, lse = call(launch, "attention.forward", "attention_forward", q, k, v, **case.options)
    blind = torch.arange(50) < 38
    assert (out[0, 0, blind] == 0).all() and (lse[0, 0, blind] == -math.inf).all()
    assert torch.isfinite(lse[0, 0, ~blind]).all()
    # Not even a NaN that comes back for their lse reaches anything.
    dlse = torch.where(blind, float("nan"), 0.5)[None, None]
    arguments = dict(case.options, dlse=dlse)
    dq, dk, dv = call(
        launch, "attention.forward", "attention_backward", torch.ones_like(out), q, k, v, out, lse, **arguments
    )
    assert (dq[0, 0, blind] == 0).all()
    assert all(torch.isfinite(g).all() for g in (dq, dk, dv))


@pytest.mark.parametrize("B, S, T", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=["no-batch", "no-queries", "no-keys"])
def test_empty(B, S, T):
    case = Case("empty", B, 2, 1, S, T, 8, 16)
    q, k, v = case.tensors().values()
    out, lse, dq, dk, dv = _forward_and_backward(case, torch.zeros(B, 2, S, 16), q, k, v)
    assert out.shape == (B, 2, S, 16) and (out == 0).all()
    assert lse.shape == (B, 2, S) and (lse == -math.inf).all()
    for gradient, x in ((dq, q), (dk, k), (dv, v)):
        assert gradient.shape == x.shape and (gradient == 0).all()


def test_nan_and_infinity_stay_in_their_rows():
    case = Case("nan", 1, 1, 1, 40, 40, 16, 16, causal=True)
    q, k, v = case.tensors().values()
    q[0, 0, 5] = float("nan")
    k[0, 0, 30] = float("inf")
    out, lse = call(launch, "attention.forward", "attention_forward", q, k, v, **case.options)
    touched = (torch.arange(40) == 5) | (torch.arange(40) >= 30)
    assert torch.isnan(out[0, 0, 5]).all() and torch.isnan(lse[0, 0, 5])
    assert torch.isfinite(out[0, 0, ~touched]).all() and torch.isfinite(lse[0, 0, ~touched]).all()


def test_head_size_over_256_is_refused():
    case = Case("too-wide", 1, 1, 1, 4, 4, 257, 16)
    with pytest.raises(ValueError, match="expected 1 to 256, got 257"):
        call(launch, "attention.forward", "attention_forward", *case.tensors().values(), **case.options)


def test_same_bits_twice():
    case = Case("twice", 1, 4, 2, 50, 50, 32, 32, causal=True, dtype=BF16)
    dout = torch.randn(1, 4, 50, 32).to(BF16)
    first, second = (_forward_and_backward(case, dout, **case.tensors()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@interpreter_only
@pytest.mark.parametrize("dtype", [torch.float32, FP16, BF16], ids=["fp32", "fp16", "bf16"])
def test_what_the_interpreter_does_without_a_widening_dot(dtype):
    """triton#11584: right in fp32 and fp16; bf16 is multiplied as the integers that its bits spell.

    When the bf16 case fails, the interpreter is repaired and `_repair_dot` need not widen.
    """
    case = Case("plain-dot", 1, 1, 1, 33, 33, 32, 32, dtype=dtype)
    q, k, v = case.tensors().values()
    out, _ = call(launch_without_widening, "attention.forward", "attention_forward", q, k, v, **case.options)

    def oracle(mode: RandomRounding | None = None) -> list[torch.Tensor]:
        return list(_oracle(q=q.double(), k=k.double(), v=v.double(), **case.options))

    exact, (native, _) = oracle(), _oracle(q=q, k=k, v=v, **case.options)
    spread = Spreads(oracle, exact, operands=BITS[dtype]).of(0)
    if dtype == BF16:
        with pytest.raises(AssertionError, match="too far off"):
            assert_close(out, exact[0], native, spread=spread)
    else:
        assert_close(out, exact[0], native, spread=spread)


@interpreter_only
def test_the_guard_sees_a_read_outside():
    """A launcher lied to about its strides reads past k's end; the worker must say so."""
    with pytest.raises(Exception, match="outside every tensor of the launch"):
        call(_launch_past_the_end)


def _launch_past_the_end():
    from gpt4v_fast.kernels.attention import forward as kernels

    honest = kernels.strides_in_units

    def lying(*tensors):
        unit, strides = honest(*tensors)
        return unit, [strides[0], *((b, h, 3 * s) for b, h, s in strides[1:])]

    kernels.strides_in_units = lying
    try:
        kernels.attention_forward(*(torch.zeros(1, 1, 40, 16) for _ in range(3)), scale=1.0, causal=False, offset=0)
    finally:
        kernels.strides_in_units = honest


def test_through_the_public_function():
    """gf.attention on CPU tensors with TRITON_INTERPRET=1 and GPT4V_FAST_BACKEND=triton runs these kernels."""
    case = Case("public", 1, 4, 2, 20, 33, 24, 24, causal=True)
    tensors = case.tensors()
    dout, dlse = torch.randn(1, 4, 20, 24), torch.randn(1, 4, 20)
    names, results = call(_public_attention, dout, dlse, **tensors)
    assert names == [
        "_attention_forward_kernel", "_attention_backward_dq_kernel", "_attention_backward_dkdv_kernel"
    ]  # fmt: skip
    out, lse = call(launch, "attention.forward", "attention_forward", *tensors.values(), **case.options)
    arguments = dict(case.options, dlse=dlse)
    gradients = call(launch, "attention.forward", "attention_backward", dout, *tensors.values(), out, lse, **arguments)
    for got, want in zip(results, (out, lse, *gradients), strict=True):
        assert torch.equal(got, want)


def _public_attention(dout, dlse, q, k, v):
    import gpt4v_fast as gf

    leaves = [x.requires_grad_() for x in (q, k, v)]
    with launches() as names:
        out, lse = gf.attention(*leaves, mask=gf.Mask(causal=True), return_lse=True)
        gradients = torch.autograd.grad([out, lse], leaves, [dout, dlse])
    return names, [x.detach() for x in (out, lse, *gradients)]
