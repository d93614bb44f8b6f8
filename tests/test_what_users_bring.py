"""Errors that know what people bring from other libraries, and say what to write instead."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

import gpt4v_fast as gf
from gpt4v_fast.ops.foreign_names import NAMES

Q = torch.randn(1, 2, 5, 8)
PACKED, STARTS = torch.randn(5, 2, 8), torch.tensor([0, 2, 5], dtype=torch.int32)
TOKENS, CACHE, LENGTHS = torch.randn(2, 1, 4, 8), torch.randn(2, 8, 2, 8), torch.tensor([5, 6], dtype=torch.int32)
LOGITS, HIDDEN, WEIGHT, TARGET = torch.randn(6, 11), torch.randn(6, 8), torch.randn(11, 8), torch.randint(0, 11, (6,))
PIXELS, PATCHES = torch.rand(2, 3, 8, 16), torch.randn(5, 3, 4, 4)
ARGS: dict[str, tuple[Any, ...]] = {
    "attention": (Q, Q, Q),
    "attention_varlen": (PACKED, PACKED, PACKED, STARTS, STARTS),
    "attention_kvcache": (TOKENS, CACHE, CACHE, LENGTHS),
    "cross_entropy": (LOGITS, TARGET),
    "linear_cross_entropy": (HIDDEN, WEIGHT, TARGET),
    "patch_embed": (PIXELS, PATCHES),
    "patch_embed_packed": ([PIXELS[0]], PATCHES),
}


@pytest.mark.parametrize("op, theirs, ours", [(op, *pair) for op, names in NAMES.items() for pair in names.items()])
def test_names_of_other_libraries(op, theirs, ours):
    with pytest.raises(TypeError) as error:
        getattr(gf, op)(*ARGS[op], **{theirs: None})
    assert str(error.value).startswith(f"{op}() got an unexpected keyword argument '{theirs}'")
    assert str(error.value).endswith(f": here it is {ours}")


@pytest.mark.parametrize("op", ARGS)
def test_other_names_keep_pythons_error(op):
    with pytest.raises(TypeError, match=rf"^{op}\(\) got an unexpected keyword argument 'nonsense'"):
        getattr(gf, op)(*ARGS[op], nonsense=1)


def test_compiled_code_names_them_too():
    compiled = torch.compile(lambda q: gf.attention(q, q, q, is_causal=True), backend="aot_eager")
    with pytest.raises(Exception, match="is_causal"):
        compiled(Q)


def test_class_weights_of_the_fused_loss():
    with pytest.raises(TypeError, match="weights of the classes are class_weight"):
        gf.linear_cross_entropy(HIDDEN, WEIGHT, TARGET, weight=torch.ones(11))


@pytest.mark.parametrize("shape", [(2, 11, 6), (2, 11, 3, 4)])
def test_classes_second(shape):
    logits, target = torch.randn(shape), torch.zeros(shape[0], *shape[2:], dtype=torch.int64)
    with pytest.raises(ValueError, match=r"logits: expected shape \(\.\.\., V\), the classes last.*movedim\(1, -1\)"):
        gf.cross_entropy(logits, target)
    want = torch.nn.functional.cross_entropy(logits, target)
    torch.testing.assert_close(gf.cross_entropy(logits.movedim(1, -1), target), want)


@pytest.mark.parametrize(
    "pixels, weight",
    [(PIXELS.permute(0, 2, 3, 1), PATCHES), (torch.rand(2, 4, 8, 16, 3), torch.randn(5, 3, 2, 4, 4))],
    ids=["image", "video"],
)
def test_channels_last(pixels, weight):
    with pytest.raises(ValueError, match=r"pixels: expected .* got shape .*, which looks channels last"):
        gf.patch_embed(pixels, weight)


def test_packed_channels_last():
    with pytest.raises(ValueError, match=r"images\[1\]: expected .* got shape \(8, 16, 3\), which looks channels last"):
        gf.patch_embed_packed([PIXELS[0], PIXELS[1].permute(1, 2, 0)], PATCHES)


def test_explain_without_arguments():
    with pytest.raises(TypeError, match=r"explain: expected attention's arguments .* as explain\(attention, \.\.\.\)"):
        gf.explain(gf.attention)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_negative_key_lengths(dtype):
    with pytest.raises(ValueError, match="key_lengths: expected numbers of 0 or more, got -2"):
        gf.attention(Q, Q, Q, mask=gf.Mask(key_lengths=torch.tensor([-2], dtype=dtype)))


def test_a_shift_beyond_the_end():
    with pytest.raises(ValueError, match=r"shift: expected at most the 6 positions of target .*, got 7"):
        gf.linear_cross_entropy(HIDDEN, WEIGHT, TARGET, shift=7)


@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_a_negative_z_loss(op):
    with pytest.raises(ValueError, match=r"z_loss: expected a finite number of 0 or more .*, got -1.0"):
        getattr(gf, op)(*ARGS[op], z_loss=-1.0)


@pytest.mark.parametrize(
    "name, allowed", [("GPT4V_FAST_BACKEND", "cpu, triton, reference"), ("GPT4V_FAST_ISA", "scalar")]
)
def test_environment_variables(name, allowed):
    found = subprocess.run(
        [sys.executable, "-c", "import gpt4v_fast"], env=os.environ | {name: "foo"}, capture_output=True, text=True
    )
    assert found.returncode and f"ValueError: {name}: expected one of {allowed}" in found.stderr
    assert "got 'foo'" in found.stderr
