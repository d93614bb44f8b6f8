"""Attention over packed sequences: against the oracle, against the dense op, and refusals."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from attention_cases import BF16, DTYPES, FP16, FP32, ISAS, flash, operand_bits, saved_bits
from attention_cases import poisoned as poisoned  # a fixture
from closeness import compare
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import library as torch_library

import gpt4v_fast as gf
from gpt4v_fast import reference
from gpt4v_fast.backends import call_of
from gpt4v_fast.ops.attention.arguments import draw_seed

pytestmark = pytest.mark.usefixtures("poisoned")


@dataclasses.dataclass(frozen=True)
class Packed:
    """Sequences of `lengths_q` queries and `lengths_k` keys, and `rest` rows behind the last that are in none."""

    name: str
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...] = ()
    H: int = 2
    Hkv: int = 2
    D: int = 16
    Dv: int = 16
    dtype: torch.dtype = FP32
    rest: int = 0
    strided: bool = False
    alibi: str = ""
    sinks: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    def starts(self) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(
            torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).to(torch.int32)
            for lengths in (self.lengths_q, self.lengths_k or self.lengths_q)
        )  # type: ignore[return-value]

    def tensors(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(2)

        def random(*shape: int) -> torch.Tensor:
            x = torch.randn(shape, generator=generator).to(self.dtype)
            return x.transpose(0, 1).contiguous().transpose(0, 1) if self.strided else x

        starts_q, starts_k = self.starts()
        Nq, Nk = int(starts_q[-1]) + self.rest, int(starts_k[-1]) + self.rest
        tensors = {
            "q": random(Nq, self.H, self.D),
            "k": random(Nk, self.Hkv, self.D),
            "v": random(Nk, self.Hkv, self.Dv),
        }
        if self.alibi:
            shape = (len(self.lengths_q), self.H) if self.alibi == "BH" else (self.H,)
            tensors["alibi_slopes"] = torch.rand(shape, generator=generator)
        if self.sinks:
            tensors["sinks"] = torch.randn(self.H, generator=generator)
        return tensors


def packed(name: str, *lengths: tuple[int, ...], causal: bool = False, **fields: Any) -> Packed:
    options = tuple((key, fields.pop(key)) for key in ("align", "window", "softcap", "scale") if key in fields)
    return Packed(name, *lengths, options=(("causal", causal), *options), **fields)


CASES = [
    packed("one-sequence", (17,)),
    packed("no-sequence", ()),
    packed("no-sequence-but-rows", (), rest=3),
    packed("an-empty-one-between", (5, 0, 9), causal=True),
    packed("only-empty-ones", (0, 0)),
    packed("queries-without-keys", (5, 4, 3), (7, 0, 3)),
    packed("keys-without-queries", (5, 0, 3), (7, 70, 3), sinks=True),
    packed("ones", (1,) * 20, causal=True),
    packed("decode", (1, 1, 1), (70, 1, 129), causal=True, H=8, Hkv=2, D=64, Dv=64),
    packed("long-and-short", (3, 200, 65, 1), causal=True, D=24),
    packed("more-keys", (10, 40), (90, 41), causal=True, dtype=BF16),
    packed("more-queries", (90, 41), (10, 40), causal=True),
    packed("top-left", (40, 70), (70, 40), causal=True, align="top_left"),
    packed("window", (150, 70), window=(20, 10)),
    packed("window-causal-fp16", (150, 70), window=(20, None), causal=True, dtype=FP16),
    packed("gqa-3", (33, 70), H=6, Hkv=2, D=40, causal=True),
    packed("wide-v-strided", (33, 70), D=8, Dv=100, strided=True),
    packed("strided-bf16", (33, 70), strided=True, dtype=BF16, H=4, causal=True),
    packed("rows-in-no-sequence", (33, 5), rest=7, sinks=True, causal=True),
    packed("alibi", (70, 20), alibi="H", causal=True),
    packed("alibi-by-sequence", (20, 70), (33, 40), alibi="BH"),
    packed("all", (70, 20, 90), (90, 33, 60), causal=True, window=(80, None), softcap=3.0, scale=0.4, alibi="BH",
           sinks=True, H=4, Hkv=2, dtype=BF16),
    packed("many-heads", (40, 50, 60), H=12, Hkv=12, D=8, Dv=8),
]  # fmt: skip


def check(case: Packed, isa: str | None = None, **more: Any) -> None:
    starts = case.starts()
    options = {**dict(case.options), "return_lse": True}

    def fast(**tensors: torch.Tensor) -> Any:
        torch.manual_seed(11)
        return gf.attention_varlen(cu_seqlens_q=starts[0], cu_seqlens_k=starts[1], **tensors, **options, **more)

    torch.manual_seed(11)
    dropout = {**more, "dropout_seed": int(draw_seed(more["dropout_p"]))} if more else {}

    def oracle(**tensors: torch.Tensor) -> Any:
        starts_q_and_k = {"cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1]}
        return flash(
            reference.attention_varlen, saved_bits(case.dtype), **starts_q_and_k, **tensors, **options, **dropout
        )

    with gf.force(isa=isa, backend="cpu"):  # around the gradients too
        compare(
            fast,
            oracle,
            case.tensors(),
            gradients=["q", "k", "v", *(["sinks"] if case.sinks else [])],
            native_dtype=FP32,
            output_names=("out", "lse"),
            operands=operand_bits(case.dtype),
            backward_operands=operand_bits(case.dtype),
        )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_out_lse_and_gradients_match_the_oracle(case, isa):
    check(case, isa)


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("all", "decode", "more-keys")], ids=lambda c: c.name)
def test_dropout_matches_the_oracle(case):
    check(case, dropout_p=0.3)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_combinations_match_the_oracle(data):
    draw = data.draw
    lengths = draw(st.lists(st.tuples(st.integers(0, 80), st.integers(0, 80)), min_size=0, max_size=6))
    Hkv, dtype = draw(st.integers(1, 3)), draw(st.sampled_from(DTYPES))
    side = st.none() | st.integers(0, 90)
    case = packed(
        "drawn",
        tuple(q for q, _ in lengths),
        tuple(k for _, k in lengths),
        H=Hkv * draw(st.integers(1, 3)),
        Hkv=Hkv,
        D=draw(st.integers(8, 24)),
        Dv=draw(st.integers(1, 24)),
        dtype=dtype,
        rest=draw(st.integers(0, 2)),
        strided=draw(st.booleans()),
        alibi=draw(st.sampled_from(["", "H", "BH"])),
        sinks=draw(st.booleans()),
        causal=draw(st.booleans()),
        align=draw(st.sampled_from(["bottom_right", "top_left"])),
        window=draw(st.none() | st.tuples(side, side)),
        softcap=draw(st.sampled_from([None, 0.5, 4.0])),
    )
    check(case, draw(st.sampled_from(ISAS)))


def test_each_sequence_is_the_dense_op_bit_for_bit():
    case = next(case for case in CASES if case.name == "long-and-short")
    tensors, (starts, _) = case.tensors(), case.starts()
    out, lse = gf.attention_varlen(**tensors, cu_seqlens_q=starts, cu_seqlens_k=starts, causal=True, return_lse=True)
    for b in range(len(starts) - 1):
        rows = slice(int(starts[b]), int(starts[b + 1]))
        dense = {name: x[rows].transpose(0, 1)[None] for name, x in tensors.items()}
        want, want_lse = gf.attention(**dense, mask=gf.Mask(causal=True), return_lse=True)
        assert torch.equal(out[rows], want[0].transpose(0, 1)) and torch.equal(lse[:, rows], want_lse[0])


def test_rows_in_no_sequence_give_zero():
    case = next(case for case in CASES if case.name == "rows-in-no-sequence")
    leaves = {name: x.requires_grad_() for name, x in case.tensors().items()}
    starts_q, starts_k = case.starts()
    out, lse = gf.attention_varlen(**leaves, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, return_lse=True)
    assert (out[-7:] == 0).all() and (lse[:, -7:] == -math.inf).all()
    for gradient in torch.autograd.grad(out.sum(), [leaves[name] for name in "qkv"]):
        assert (gradient[-7:] == 0).all() and (gradient[:-7] != 0).any()


@pytest.mark.parametrize("isa", ISAS)
def test_bitwise_the_same_for_any_number_of_threads(isa):
    case = next(case for case in CASES if case.name == "all")
    starts_q, starts_k = case.starts()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2, 3, 8):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            leaves = {name: x.requires_grad_(name != "alibi_slopes") for name, x in case.tensors().items()}
            with gf.force(isa=isa):
                out = gf.attention_varlen(
                    **leaves, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, **dict(case.options), dropout_p=0.1
                )
                results.append([out, *torch.autograd.grad(out.sum(), [x for x in leaves.values() if x.requires_grad])])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


OPCHECKED = [case for case in CASES if case.name in ("an-empty-one-between", "decode", "all")]


@pytest.mark.parametrize("case", OPCHECKED, ids=lambda case: case.name)
def test_opcheck(case):
    tensors = {name: x.requires_grad_(name != "alibi_slopes") for name, x in case.tensors().items()}
    starts_q, starts_k = case.starts()
    call = call_of(gf.attention_varlen, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, **tensors, **dict(case.options))
    torch_library.opcheck(torch.ops.gpt4v_fast.attention_varlen.default, call)


@pytest.mark.parametrize("case", OPCHECKED, ids=lambda case: case.name)
def test_opcheck_of_the_backward(case):
    starts_q, starts_k = case.starts()
    starts = {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k}
    call = call_of(gf.attention_varlen, **starts, **case.tensors(), **dict(case.options))
    out, lse = torch.ops.gpt4v_fast.attention_varlen(*call)
    wanted = (True, True, True, False, call.sinks is not None)
    arguments = (torch.ones_like(out), None, *call, out, lse, *wanted)
    torch_library.opcheck(torch.ops.gpt4v_fast.attention_varlen_backward.default, arguments)


def test_compiles_without_a_graph_break():
    case = next(case for case in CASES if case.name == "all")
    tensors = {name: x.requires_grad_(name != "alibi_slopes") for name, x in case.tensors().items()}
    starts_q, starts_k = case.starts()

    def run(**tensors: torch.Tensor) -> torch.Tensor:
        return gf.attention_varlen(**tensors, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, **dict(case.options))

    eager, compiled = run(**tensors), torch.compile(run, fullgraph=True, backend="aot_eager")(**tensors)
    assert torch.equal(eager, compiled)
    leaves = [tensors[name] for name in ("q", "k", "v", "sinks")]
    grads = [torch.autograd.grad(x.float().square().sum(), leaves) for x in (eager, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_explain_and_the_reference_backend():
    case = next(case for case in CASES if case.name == "all")
    starts_q, starts_k = case.starts()
    call = {**case.tensors(), "cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k, **dict(case.options)}
    assert gf.explain(gf.attention_varlen, **call).backend == "cpu"
    with gf.force(backend="reference"):
        slow = gf.attention_varlen(**call)
    torch.testing.assert_close(gf.attention_varlen(**call).float(), slow.float(), rtol=2e-2, atol=1e-2)


def int32(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


REFUSED: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("q-4d", {"q": torch.ones(1, 9, 2, 4)}, ValueError, "q: expected 3 dimensions"),
    ("k-heads", {"k": torch.ones(9, 3, 4)}, ValueError, "k: expected a number of heads that divides q's 2, got 3"),
    ("k-size", {"k": torch.ones(9, 2, 5)}, ValueError, r"k: expected shape .*\(9, 2, 4\), got \(9, 2, 5\)"),
    ("v-rows", {"v": torch.ones(8, 2, 4)}, ValueError, r"v: expected shape .*\(9, 2, 4\), got \(8, 2, 4\)"),
    ("v-dtype", {"v": torch.ones(9, 2, 4).half()}, TypeError, "v: expected q's dtype float32, got float16"),
    ("starts-float", {"cu_seqlens_q": torch.ones(3)}, TypeError,
     "cu_seqlens_q: expected dtype int32, int64, got float32"),
    ("starts-none", {"cu_seqlens_q": int32()}, ValueError,
     r"cu_seqlens_q: expected shape \(sequences \+ 1,\), got \(0,\)"),
    ("starts-2d", {"cu_seqlens_k": int32(0, 9)[None]}, ValueError, "cu_seqlens_k: expected 1 dimensions"),
    ("starts-differ", {"cu_seqlens_k": int32(0, 9)}, ValueError, r"cu_seqlens_k: expected shape .*\(3,\), got \(2,\)"),
    ("starts-decrease", {"cu_seqlens_q": int32(0, 6, 5)}, ValueError,
     "cu_seqlens_q: .* do not decrease, got 6 then 5 at 2"),
    ("starts-past-the-end", {"cu_seqlens_k": int32(0, 4, 10)}, ValueError,
     "cu_seqlens_k: .* within the 9 rows, got 10"),
    ("starts-from-1", {"cu_seqlens_q": int32(1, 4, 9)}, ValueError, "cu_seqlens_q: .* first element to be 0, got 1"),
    ("starts-negative", {"cu_seqlens_q": int32(0, -4, 9)}, ValueError, "cu_seqlens_q: .* got 0 then -4 at 1"),
    ("max-too-small", {"max_seqlen_q": 4}, ValueError, "max_seqlen_q: expected at least 5, .* got 4"),
    ("max-negative", {"max_seqlen_k": -2}, ValueError, "max_seqlen_k: expected None or a length >= 0, got -2"),
    ("align", {"align": "left"}, ValueError, "align: .* got 'left'"),
    ("window", {"window": (-1, 0)}, ValueError, r"window: .* got \(-1, 0\)"),
    ("alibi", {"alibi_slopes": torch.ones(3, 2)}, ValueError,
     r"alibi_slopes: expected shape \(2,\) or \(2, 2\), got \(3, 2\)"),
    ("sinks", {"sinks": torch.ones(3)}, ValueError, r"sinks: expected shape .*\(2,\), got \(3,\)"),
    ("dropout", {"dropout_p": 1.5}, ValueError, "dropout_p: .* got 1.5"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "error", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_bad_input_is_refused(bad, error, message):
    good = {name: torch.ones(9, 2, 4) for name in "qkv"} | {
        "cu_seqlens_q": int32(0, 4, 9),
        "cu_seqlens_k": int32(0, 4, 9),
    }
    gf.attention_varlen(**good)
    with pytest.raises(error, match=message):
        gf.attention_varlen(**{**good, **bad})
