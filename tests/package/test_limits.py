"""What docs/limits.md says of NaN and infinity."""

import pytest
import torch
import torch.nn.functional as F

import gpt4v_fast as gf


@pytest.fixture
def with_a_nan():
    """q, and k and v whose last token is NaN."""
    q, k, v = torch.randn(3, 1, 1, 4, 16, generator=torch.Generator().manual_seed(0))
    for x in (k, v):
        x[:, :, 3] = torch.nan
    return q, k, v


def test_key_lengths_hide_nan(with_a_nan):
    q, k, v = with_a_nan
    out = gf.attention(q, k, v, mask=gf.Mask(key_lengths=torch.tensor([3], dtype=torch.int32)))
    expected = gf.attention(q, k[:, :, :3], v[:, :, :3])
    torch.testing.assert_close(out, expected)


def test_documents_and_a_boolean_bias_do_not_as_sdpa_does_not(with_a_nan):
    q, k, v = with_a_nan
    hidden = torch.tensor([True, True, True, False]).expand(4, 4)
    documents = torch.tensor([[0, 0, 0, 1]], dtype=torch.int32)
    for out in (
        gf.attention(q, k, v, mask=gf.Mask(documents=documents)),
        gf.attention(q, k, v, bias=hidden[None, None]),
        F.scaled_dot_product_attention(q, k, v, attn_mask=hidden),
    ):
        assert out.isnan().any()
