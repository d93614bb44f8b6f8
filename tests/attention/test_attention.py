"""Dense attention: the numbers of the kernel of every ISA, and of the oracle itself."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    BF16,
    CASES,
    DTYPES,
    FP16,
    FP32,
    ISAS,
    Case,
    causal,
    check,
    everything,
    flash,
    key_lengths,
    operand_bits,
    saved_bits,
)
from attention_cases import poisoned as poisoned  # a fixture
from closeness import Spreads, assert_close, compare
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_rounding import RandomRounding

import gpt4v_fast as gf
from gpt4v_fast import reference
from gpt4v_fast.ops.attention.arguments import draw_seed

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_out_lse_and_gradients_match_the_oracle(case, isa):
    check(case, isa)


def test_case_names_differ():
    assert len({case.name for case in CASES}) == len(CASES)


# A Latin square: each ISA in each dtype meets every length and every head size once, all of them every pair.
LENGTHS, HEAD_SIZES = (1, 63, 64, 65, 127, 128, 129, 577, 1100), (1, 8, 63, 64, 65, 112, 128, 192, 256)
SWEEP = [
    (S, HEAD_SIZES[(place + shift) % len(HEAD_SIZES)], dtype, isa)
    for shift, (dtype, isa) in enumerate(itertools.product(DTYPES, ISAS))
    for place, S in enumerate(LENGTHS)
]


@pytest.mark.slow
@pytest.mark.parametrize("S, D, dtype, isa", SWEEP, ids=str)
def test_sweep_of_sizes(S, D, dtype, isa):
    check(Case("sweep", S, S + 13, H=2, Hkv=1, D=D, Dv=max(1, D - 3), dtype=dtype, mask=causal), isa)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_combinations_match_the_oracle(data):
    draw = data.draw
    B, Hkv, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    S, T = draw(st.integers(0, 140)), draw(st.integers(0, 140))
    seeds = st.integers(0, 2**20)

    def ids(groups: int, shape: tuple[int, int]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(draw(seeds))
        if draw(st.booleans()):
            return torch.randint(-1, groups, shape, generator=generator, dtype=torch.int32)
        step = draw(st.integers(1, 50))
        return (torch.arange(shape[1], dtype=torch.int32) // step - 1).expand(shape)

    side = st.none() | st.integers(0, 150)
    groups = draw(st.integers(1, 3))
    mask = gf.Mask(
        causal=draw(st.booleans()),
        align=draw(st.sampled_from(["bottom_right", "top_left"])),
        window=draw(st.none() | st.tuples(side, side)),
        documents=(ids(groups, (B, S)), ids(groups, (B, T))) if draw(st.booleans()) else None,
        image_blocks=(ids(groups, (B, S)), ids(groups, (B, T))) if draw(st.booleans()) else None,
        key_lengths=torch.tensor(draw(st.lists(st.integers(0, T), min_size=B, max_size=B)), dtype=torch.int32)
        if draw(st.booleans())
        else None,
    )
    full = (B, Hkv * group, S, T)
    bias = tuple(size if draw(st.booleans()) else 1 for size in full) if draw(st.booleans()) else None
    dtype = draw(st.sampled_from(DTYPES))
    case = Case(
        "drawn", S, T, B=B, H=Hkv * group, Hkv=Hkv, D=draw(st.integers(8, 40)), Dv=draw(st.integers(1, 40)),
        dtype=dtype,
        layout=draw(st.sampled_from(["contiguous", "tokens before heads", "slice of qkv", "misaligned"])),
        mask=lambda case: mask,
        bias=bias,
        bias_dtype=draw(st.sampled_from([FP32, BF16, FP16, torch.bool])),
        alibi=draw(st.sampled_from(["", "H", "BH"])),
        sinks=draw(st.booleans()),
        softcap=draw(st.none() | st.sampled_from([0.5, 4.0, 15.0])),
    )  # fmt: skip
    check(case, draw(st.sampled_from(ISAS)))


# What the reference of PyTorch can do too.


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=["mha", "gqa"])
@pytest.mark.parametrize("kind", ["plain", "causal", "bias", "boolean", "scale"])
def test_the_oracle_agrees_with_sdpa(kind, heads):
    torch.manual_seed(0)
    H, Hkv = heads
    q, k, v = (
        torch.randn(2, h, n, 8, dtype=torch.float64, requires_grad=True) for h, n in ((H, 9), (Hkv, 9), (Hkv, 9))
    )
    bias = torch.randn(2, H, 9, 9, dtype=torch.float64)
    ours, theirs = {
        "plain": ({}, {}),
        "causal": ({"mask": gf.Mask(causal=True, align="top_left")}, {"is_causal": True}),
        "bias": ({"bias": bias}, {"attn_mask": bias}),
        "boolean": ({"bias": bias > -1}, {"attn_mask": bias > -1}),
        "scale": ({"scale": 0.3}, {"scale": 0.3}),
    }[kind]
    got = reference.attention(q, k, v, **ours)
    want = F.scaled_dot_product_attention(q, k, v, enable_gqa=Hkv != H, **theirs)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad(x, (q, k, v), upstream) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


GRADCHECKS = [
    Case("plain", 4, 5, H=2, Hkv=1, D=3, mask=causal),
    Case("all", 5, 5, B=2, H=2, D=3, mask=everything, bias=(2, 5, 5), alibi="H", sinks=True, softcap=2.0),
    Case("rows-that-see-nothing", 5, 3, D=3, mask=causal),
    Case("key-lengths", 3, 4, B=4, H=1, D=2, mask=key_lengths, bias=(1, 4)),
]


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("case", GRADCHECKS, ids=lambda case: case.name)
def test_gradcheck_of_the_oracle(case, dropout_p):
    tensors = {name: x.double() for name, x in case.tensors().items()}
    leaves = [tensors.pop(name).requires_grad_() for name in case.gradients]

    def run(*values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        named = dict(zip(case.gradients, values, strict=True))
        out, lse = reference.attention(**named, **tensors, **case.options(), dropout_p=dropout_p, dropout_seed=7)
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    assert torch.autograd.gradcheck(run, leaves)


# Rows that see nothing, upstream gradients of several kinds.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_that_sees_nothing_gives_zero_and_minus_infinity(dtype):
    case = Case("", 70, 40, dtype=dtype, mask=causal, bias=(70, 40))  # the first 30 rows see nothing
    tensors = {name: x.requires_grad_(name in case.gradients) for name, x in case.tensors().items()}
    out, lse = gf.attention(**tensors, **case.options())
    assert (out[:, :, :30] == 0).all() and (lse[:, :, :30] == -math.inf).all()
    assert torch.isfinite(lse[:, :, 30:]).all()
    upstream = torch.full_like(lse, 2.0)
    upstream[:, :, :30] = math.inf  # must not matter: these rows have no gradient
    dq, dk, dv, dbias = torch.autograd.grad(
        [out, lse], [tensors[n] for n in case.gradients], [torch.ones_like(out), upstream]
    )
    assert (dq[:, :, :30] == 0).all() and (dbias[:30] == 0).all()
    assert all(torch.isfinite(x).all() for x in (dq, dk, dv, dbias))


@pytest.mark.parametrize("of", ["out", "lse"])
def test_the_gradient_of_one_output_alone(of):
    case = Case("", 50, 60, H=4, Hkv=2, sinks=True, mask=causal)
    tensors = case.tensors()

    def gradients(function, dtype: torch.dtype, mode: RandomRounding | None = None) -> list[torch.Tensor]:
        leaves = {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}
        out, lse = function(**leaves, **case.options())
        if mode is not None:
            mode.backward()
        # sum() sends an expanded gradient of stride 0 upstream
        inputs = list(leaves.values())
        return list(torch.autograd.grad((out if of == "out" else lse).sum(), inputs, materialize_grads=True))

    def oracle(mode: RandomRounding | None = None) -> list[torch.Tensor]:
        return gradients(lambda **x: flash(reference.attention, saved_bits(FP32), **x), torch.float64, mode)

    fast, exact, native = gradients(gf.attention, FP32), oracle(), gradients(reference.attention, FP32)
    spreads = Spreads(oracle, exact)
    for i, name in enumerate(tensors):
        assert_close(fast[i], exact[i], native[i], name=name, spread=spreads.of(i))
    assert of == "out" or (fast[list(tensors).index("v")] == 0).all()


def test_a_number_far_below_the_others_stays_a_plain_mask():
    """finfo.min as a mask, Hugging Face's way: a row that is masked throughout is uniform, as it is in PyTorch."""
    q, k, v = (torch.randn(1, 1, 20, 8) for _ in range(3))
    bias = torch.zeros(20, 20)
    bias[3] = torch.finfo(torch.float32).min
    bias[5, 1:] = torch.finfo(torch.float32).min
    out = gf.attention(q, k, v, bias=bias)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=bias))
    torch.testing.assert_close(out[0, 0, 3], v[0, 0].mean(0))
    torch.testing.assert_close(out[0, 0, 5], v[0, 0, 0])


def test_the_bias_may_be_minus_infinity():
    case = Case("", 30, 40, bias=(30, 40))
    tensors = case.tensors()
    hidden = torch.rand(30, 40) < 0.5
    hidden[7] = True
    tensors["bias"] = tensors["bias"].masked_fill(hidden, -math.inf)
    out, lse = gf.attention(**tensors, return_lse=True)
    other = tensors | {"bias": tensors["bias"].masked_fill(hidden, 0.0)}

    def oracle(mode: RandomRounding | None = None) -> list[torch.Tensor]:
        return list(reference.attention(**{n: x.double() for n, x in tensors.items()}, return_lse=True))

    exact, native = oracle(), reference.attention(**tensors, return_lse=True)
    spreads = Spreads(oracle, exact)
    assert_close(out, exact[0], native[0], spread=spreads.of(0))
    assert_close(lse, exact[1], native[1], spread=spreads.of(1))
    assert (out[:, :, 7] == 0).all() and not torch.equal(out, gf.attention(**other))


# Dropout.


PHILOX = [  # the known answers of Random123 1.09, kat_vectors
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), PHILOX, ids=["zeros", "ones", "pi"])
def test_philox_gives_the_published_numbers(counter, key, words):
    got = reference.philox4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in got) == words


DROPOUTS = [
    Case("square", 70, 70, B=2, H=4, Hkv=2),
    Case("causal-bf16", 65, 130, dtype=BF16, mask=causal),
    Case("odd-keys", 9, 67, H=3, mask=causal, softcap=3.0),
    Case("bias-sinks", 40, 41, B=2, bias=(40, 41), sinks=True),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.93])
@pytest.mark.parametrize("case", DROPOUTS, ids=lambda case: case.name)
def test_dropout_matches_the_oracle(case, p, isa):
    torch.manual_seed(5)
    seed = int(draw_seed(p))

    def fast(**tensors: torch.Tensor):
        torch.manual_seed(5)
        return gf.attention(**tensors, **case.options(), dropout_p=p)

    def oracle(**tensors: torch.Tensor):
        dropout = {"dropout_p": p, "dropout_seed": seed}
        return flash(reference.attention, saved_bits(case.dtype), **tensors, **case.options(), **dropout)

    with gf.force(isa=isa):  # around the gradients too
        bits = operand_bits(case.dtype)
        compare(fast, oracle, case.tensors(), gradients=case.gradients, operands=bits, backward_operands=bits)


def test_dropout_follows_the_seed_and_drops_the_right_share():
    n, p = 256, 0.3
    q = k = torch.zeros(1, 2, n, 4)
    v = torch.eye(n).expand(1, 2, n, n)  # out is the matrix of weights

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return gf.attention(q, k, v, dropout_p=p)

    first = run(1)
    assert torch.equal(first, run(1)) and not torch.equal(first, run(2))
    kept = first > 0
    torch.testing.assert_close(first[kept], torch.full_like(first[kept], 1 / n / (1 - p)))
    deviation = math.sqrt(p * (1 - p) / kept.numel())
    assert abs(kept.float().mean().item() - (1 - p)) < 5 * deviation
    assert not torch.equal(kept[0, 0], kept[0, 1])
    torch.testing.assert_close(gf.attention(q, k, v, dropout_p=0.0), torch.full_like(first, 1 / n))
