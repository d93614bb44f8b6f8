"""Numbers that ops take: NumPy's as Python's, and none that fp32 or int64 does not hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import gpt4v_fast as gf

Q = torch.randn(1, 2, 5, 8)
PACKED, STARTS = torch.randn(5, 2, 8), torch.tensor([0, 2, 5], dtype=torch.int32)
TOKENS, CACHE, LENGTHS = torch.randn(2, 1, 4, 8), torch.randn(2, 8, 2, 8), torch.tensor([5, 6], dtype=torch.int32)
LOGITS, HIDDEN, WEIGHT, TARGET = torch.randn(6, 11), torch.randn(6, 8), torch.randn(11, 8), torch.randint(0, 11, (6,))
PIXELS, PATCHES, TABLE = torch.rand(2, 3, 8, 8), torch.randn(5, 3, 4, 4), torch.randn(4, 5)

OPS: dict[str, Callable[..., Any]] = {
    "attention": lambda **o: gf.attention(Q, Q, Q, **o),
    "masked": lambda **o: gf.attention(Q, Q, Q, mask=gf.Mask(**o)),
    "varlen": lambda **o: gf.attention_varlen(PACKED, PACKED, PACKED, STARTS, STARTS, **o),
    "kvcache": lambda **o: gf.attention_kvcache(TOKENS, CACHE, CACHE, LENGTHS, **o),
    "cross_entropy": lambda **o: gf.cross_entropy(LOGITS, TARGET, **o),
    "linear_cross_entropy": lambda **o: gf.linear_cross_entropy(HIDDEN, WEIGHT, TARGET, **o),
    "patch_embed": lambda **o: gf.patch_embed(PIXELS, PATCHES, **o),
    "patch_embed_packed": lambda **o: gf.patch_embed_packed([PIXELS[0]], PATCHES, pos_embed=TABLE, **o)[0],
}
ATTENTIONS, LOSSES = ("attention", "varlen", "kvcache"), ("cross_entropy", "linear_cross_entropy")
PATCHERS = ("patch_embed", "patch_embed_packed")

# op, argument, a number that it takes
NUMBERS = [
    *((op, name, 0.5) for op in ATTENTIONS for name in ("scale", "softcap")),
    *((op, name, 0.5) for op in LOSSES for name in ("z_loss", "label_smoothing", "softcap")),
    *((op, name, 0.5) for op in PATCHERS for name in ("rescale", "mean", "std")),
]
INTEGERS = [
    ("varlen", "max_seqlen_q", 5), ("varlen", "max_seqlen_k", 5), ("linear_cross_entropy", "shift", 1),
    ("patch_embed_packed", "pos_grid", 2), *((op, "ignore_index", -100) for op in LOSSES),
]  # fmt: skip


@pytest.mark.parametrize("op, name, number", NUMBERS)
def test_numpy_numbers(op, name, number):
    want = OPS[op](**{name: number})
    for given in (np.float32(number), np.float64(number), np.float16(number)):
        assert torch.equal(OPS[op](**{name: given}), want)
    assert torch.equal(OPS[op](**{name: np.int64(1)}), OPS[op](**{name: 1.0}))


@pytest.mark.parametrize("op, name, number", INTEGERS)
def test_numpy_integers(op, name, number):
    for given in (np.int64(number), np.int32(number)):
        assert torch.equal(OPS[op](**{name: given}), OPS[op](**{name: number}))


@pytest.mark.parametrize("op", ["masked", "varlen", "kvcache"])
def test_numpy_masks(op):
    want = OPS[op](causal=True, window=(2, None))
    assert torch.equal(OPS[op](causal=np.bool_(True), window=(np.int64(2), None)), want)


def test_numpy_arrays_of_channels():
    mean, std = np.array([0.1, 0.2, 0.3], dtype=np.float32), np.array([1, 2, 3])
    want = gf.patch_embed(PIXELS, PATCHES, mean=mean.tolist(), std=std.tolist())
    assert torch.equal(gf.patch_embed(PIXELS, PATCHES, mean=mean, std=std), want)


@pytest.mark.parametrize("bad", [1e39, -1e39, 10**400, math.inf, math.nan, "0.1", True, 1j, None])
@pytest.mark.parametrize("op, name, number", NUMBERS)
def test_what_fp32_does_not_hold(op, name, number, bad):
    optional = ("scale", "softcap", "rescale", "mean", "std")
    if bad is None and name in optional:
        return
    kind = TypeError if isinstance(bad, str | bool | complex | None) else ValueError
    with pytest.raises(kind, match=rf"^{name}: expected .*number"):
        OPS[op](**{name: bad})


@pytest.mark.parametrize("bad", [0, 1e-46, 1e-320])
@pytest.mark.parametrize("op, name", [(op, name) for op, name, _ in NUMBERS if name in ("softcap", "std")])
def test_divisors_that_fp32_rounds_to_0(op, name, bad):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*number.*, got {bad}"):
        OPS[op](**{name: bad})


@pytest.mark.parametrize("bad", [[1.0, 1e-320, 1.0], torch.tensor([1.0, 1e-320, 1.0], dtype=torch.float64)])
def test_a_divisor_of_one_channel(bad):
    with pytest.raises(ValueError, match=r"std: expected finite numbers other than 0 that fp32 holds, got \[1.0, 1e-"):
        gf.patch_embed(PIXELS, PATCHES, std=bad)


def test_a_probability_that_fp32_rounds_to_1():
    with pytest.raises(ValueError, match="dropout_p: expected a probability"):
        gf.attention(Q, Q, Q, dropout_p=1 - 1e-12)


@pytest.mark.parametrize("op, name, number", INTEGERS)
def test_integers_that_int64_does_not_hold(op, name, number):
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got {2**63}"):
        OPS[op](**{name: 2**63})
    with pytest.raises(TypeError, match=f"^{name}: expected .*, got str"):
        OPS[op](**{name: "1"})


@pytest.mark.parametrize("window", [(2**63, None), (None, 2**63), (2**63, 2**63), (1.5, None), ("1", None)])
@pytest.mark.parametrize("op", ["masked", "varlen", "kvcache"])
def test_windows_that_int64_does_not_hold(op, window):
    with pytest.raises(ValueError, match=r"^window: expected None or \(left, right\)"):
        OPS[op](window=window)


@pytest.mark.parametrize("op", ["masked", "varlen", "kvcache"])
def test_the_widest_window(op):
    widest = 2**63 - 1
    assert torch.equal(OPS[op](window=(widest, widest)), OPS[op](window=None))
