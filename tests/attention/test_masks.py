"""The Mask: its definition in loops, its tensor, what the kernel makes visible, and refusals."""

from __future__ import annotations

import pytest
import torch
from attention_cases import ISAS, MASKS
from hypothesis import given, settings
from hypothesis import strategies as st

import gpt4v_fast as gf


def allowed(mask: gf.Mask, b: int, i: int, j: int, S: int, T: int) -> bool:
    """The sentence in API.md, word for word."""
    offset = T - S if mask.align == "bottom_right" else 0

    def same(ids: object) -> bool:
        query, key = ids if isinstance(ids, tuple) else (ids, ids)
        return bool(query[b, i] == key[b, j] and query[b, i] >= 0)

    same_image = mask.image_blocks is not None and same(mask.image_blocks)
    left, right = mask.window or (None, None)
    return (
        (not mask.causal or j <= i + offset or same_image)
        and (left is None or j >= i + offset - left)
        and (right is None or j <= i + offset + right)
        and (mask.documents is None or same(mask.documents))
        and (mask.key_lengths is None or j < mask.key_lengths[b])
    )


def by_loops(mask: gf.Mask, B: int, S: int, T: int) -> torch.Tensor:
    entries = [[[allowed(mask, b, i, j, S, T) for j in range(T)] for i in range(S)] for b in range(B)]
    return torch.tensor(entries, dtype=torch.bool).reshape(B, 1, S, T)


def seen_by_the_kernel(mask: gf.Mask, B: int, S: int, T: int, isa: str | None = None) -> torch.Tensor:
    """Equal scores and the identity as values: the output is the matrix of weights."""
    q, k = torch.zeros(B, 1, S, 4), torch.zeros(B, 1, T, 4)
    with gf.force(isa=isa, backend="cpu"):
        out = gf.attention(q, k, torch.eye(T).expand(B, 1, T, T), mask=mask)
    return out > 0


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", MASKS, ids=lambda case: case.name)
def test_the_kernel_sees_what_the_dense_mask_says(case, isa):
    assert case.mask is not None
    mask = case.mask(case)
    dense = mask.dense(case.S, case.T)
    assert torch.equal(seen_by_the_kernel(mask, case.B, case.S, case.T, isa), dense.expand(case.B, 1, case.S, case.T))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_dense_mask_is_its_definition(data):
    draw = data.draw
    B, S, T = draw(st.integers(1, 2)), draw(st.integers(0, 9)), draw(st.integers(0, 9))

    def ids(n: int) -> torch.Tensor:
        return torch.tensor(draw(st.lists(st.integers(-1, 2), min_size=B * n, max_size=B * n)), dtype=torch.int32).view(
            B, n
        )

    side = st.none() | st.integers(0, 10)
    lengths = draw(st.none() | st.lists(st.integers(0, T), min_size=B, max_size=B))
    mask = gf.Mask(
        causal=draw(st.booleans()),
        align=draw(st.sampled_from(["bottom_right", "top_left"])),
        window=draw(st.none() | st.tuples(side, side)),
        documents=(ids(S), ids(T)) if draw(st.booleans()) else None,
        image_blocks=(ids(S), ids(T)) if draw(st.booleans()) else None,
        key_lengths=None if lengths is None else torch.tensor(lengths, dtype=torch.int32),
    )
    want = by_loops(mask, B, S, T)
    assert torch.equal(mask.dense(S, T).expand(B, 1, S, T), want)
    assert torch.equal(seen_by_the_kernel(mask, B, S, T), want)


def test_dense_shapes():
    assert gf.Mask(causal=True).dense(3, 5).shape == (3, 5)
    assert gf.Mask(key_lengths=torch.tensor([1, 2])).dense(3, 5).shape == (2, 1, 3, 5)


def test_one_tensor_of_ids_serves_queries_and_keys():
    ids = torch.tensor([[0, 0, 1, -1]], dtype=torch.int32)
    one, pair = gf.Mask(documents=ids), gf.Mask(documents=(ids, ids))
    assert torch.equal(one.dense(4, 4), pair.dense(4, 4))
    assert not one.dense(4, 4)[0, 0, 3].any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_either_integer_dtype_and_any_stride(dtype):
    ids = torch.tensor([[0, 1, 1, 2, 2, 2, -1]], dtype=dtype)
    strided = torch.stack([ids, ids + 5], dim=-1)[..., 0]
    assert strided.stride(-1) == 2
    want = by_loops(gf.Mask(documents=ids), 1, 7, 7)
    assert torch.equal(seen_by_the_kernel(gf.Mask(documents=strided), 1, 7, 7), want)


def test_image_blocks_change_nothing_without_causal():
    ids = torch.tensor([[0, 0, -1, 1]], dtype=torch.int32)
    assert gf.Mask(image_blocks=ids).dense(4, 4).all()
    assert seen_by_the_kernel(gf.Mask(image_blocks=ids), 1, 4, 4).all()


def test_a_far_image_block_is_found_across_blocks_of_keys():
    ids = torch.full((1, 400), -1, dtype=torch.int32)
    ids[0, 3] = ids[0, 390] = 7
    mask = gf.Mask(causal=True, image_blocks=ids)
    seen = seen_by_the_kernel(mask, 1, 400, 400)[0, 0]
    assert seen[3, 390] and not seen[3, 389] and not seen[4, 390]
    assert torch.equal(seen, mask.dense(400, 400)[0, 0])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"align": "middle"}, ValueError, 'align: expected "bottom_right" or "top_left", got \'middle\''),
        ({"window": (1, 2, 3)}, ValueError, r"window: expected None or \(left, right\).*got \(1, 2, 3\)"),
        ({"window": (-1, 0)}, ValueError, r"window: .* got \(-1, 0\)"),
        ({"window": 5}, ValueError, "window: .* got 5"),
        ({"window": (1.5, None)}, ValueError, r"window: .* got \(1.5, None\)"),
        (
            {"documents": torch.zeros(1, 4)},
            TypeError,
            "documents: expected an int32 or int64 tensor, got torch.float32",
        ),
        ({"documents": [0, 1]}, TypeError, "documents: expected an int32 or int64 tensor, got list"),
        (
            {"image_blocks": (torch.zeros(1, 4).int(),)},
            ValueError,
            "image_blocks: expected ids or a pair .* got 1 tensors",
        ),
        ({"key_lengths": 3}, TypeError, "key_lengths: expected an int32 or int64 tensor, got int"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else None,
)
def test_bad_masks_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        gf.Mask(**arguments)
