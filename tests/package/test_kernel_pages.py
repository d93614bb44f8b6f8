"""docs/kernels: the listings run, and compute what the kernels compute; what the pages name is there."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from closeness import compare

import gpt4v_fast as gf

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "docs" / "kernels"
PAGES = sorted(path.name for path in KERNELS.glob("*.md"))
FIGURES = sorted(path.name for path in (KERNELS / "figures").glob("*.svg"))


def listings(name: str) -> dict:
    """The names that a page's Python blocks define, one after the other."""
    names: dict = {}
    blocks = re.findall(r"^( *)```python\n(.*?)^ *```", (KERNELS / name).read_text(), flags=re.DOTALL | re.MULTILINE)
    assert blocks
    for _, block in blocks:
        exec(compile(textwrap.dedent(block), name, "exec"), names)
    return names


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class TestAttention:
    def test_plain(self):
        plain = listings("attention.md")["plain_attention"]
        mask = gf.Mask(causal=True, window=(9, None), documents=(torch.arange(40) // 25).to(torch.int32).view(1, 40))
        seen = mask.dense(40, 40)
        tensors = {"q": torch.randn(1, 4, 40, 24), "k": torch.randn(1, 2, 40, 24), "v": torch.randn(1, 2, 40, 8)}
        compare(
            lambda q, k, v: gf.attention(q, k, v, mask=mask, softcap=20.0, return_lse=True),
            lambda q, k, v: plain(q, k, v, seen, softcap=20.0),
            tensors,
            gradients=("q", "k", "v"),
        )

    def test_blocked(self):
        blocked = listings("attention.md")["blocked_attention"]
        q, k, v = torch.randn(3, 2, 3, 300, 16)
        compare(lambda **x: gf.attention(**x, return_lse=True), blocked, {"q": q, "k": k, "v": v}, gradients="qkv")


class TestAttentionKvcache:
    def test_plain(self):
        plain = listings("attention_kvcache.md")["plain_kvcache"]
        lengths, (k_cache, v_cache) = torch.tensor([20, 5]), torch.randn(2, 2, 30, 2, 16)
        tensors = {"q": torch.randn(2, 3, 4, 16), "k": torch.randn(2, 3, 2, 16), "v": torch.randn(2, 3, 2, 16)}

        def on_copies(function):
            def run(q, k, v):
                caches = [cache.to(q.dtype, copy=True) for cache in (k_cache, v_cache)]
                return function(q, *caches, lengths, k=k, v=v), *caches

            return run

        compare(on_copies(gf.attention_kvcache), on_copies(plain), tensors)

    def test_merged(self):
        merged = listings("attention_kvcache.md")["merged"]
        scores, values = torch.randn(5, 1100).double(), torch.randn(1100, 8).double()
        parts = []
        for s, v in zip(scores.split(512, dim=1), values.split(512), strict=True):
            largest = s.amax(dim=-1, keepdim=True)
            weights = (s - largest).exp()
            parts.append((largest, weights.sum(dim=-1, keepdim=True), weights @ v))
        torch.testing.assert_close(merged(parts), scores.softmax(dim=-1) @ values)


class TestLosses:
    def test_cross_entropy(self):
        names, target = listings("cross_entropy.md"), torch.randint(0, 3000, (7,))
        target[2] = -100
        options = {"label_smoothing": 0.1, "z_loss": 1e-3}
        compare(
            lambda logits: gf.cross_entropy(logits, target, **options),
            lambda logits: names["plain_cross_entropy"](logits, target, **options),
            {"logits": torch.randn(7, 3000)},
            gradients=("logits",),
        )
        row = torch.randn(5000).double()
        torch.testing.assert_close(names["online_lse"](row), row.logsumexp(dim=0))

    def test_linear_cross_entropy(self):
        names, target = listings("linear_cross_entropy.md"), torch.randint(0, 2500, (20,))
        tensors = {"hidden": torch.randn(20, 32), "weight": torch.randn(2500, 32) / 6}

        def loss_and_gradients(hidden, weight):
            leaves = [hidden.requires_grad_(), weight.requires_grad_()]
            loss = gf.linear_cross_entropy(*leaves, target)
            return loss.detach(), *torch.autograd.grad(loss, leaves)

        compare(loss_and_gradients, lambda hidden, weight: names["blocked_gradients"](hidden, weight, target), tensors)

        target[3] = -100
        plain = names["plain_linear_cross_entropy"](**tensors, target=target)
        torch.testing.assert_close(gf.linear_cross_entropy(**tensors, target=target), plain)


def test_patch_embed():
    plain = listings("patch_embed.md")["plain_patch_embed"]
    pixels = torch.randint(0, 256, (2, 3, 28, 42), dtype=torch.uint8)
    mean, std = torch.tensor([0.48, 0.46, 0.41]), torch.tensor([0.27, 0.26, 0.28])
    tensors = {"weight": torch.randn(20, 3, 7, 7) / 12, "bias": torch.randn(20), "pos_embed": torch.randn(24, 20)}
    compare(
        lambda **x: gf.patch_embed(pixels, mean=mean, std=std, **x),
        lambda weight, **x: plain(pixels, weight, mean=mean.to(weight.dtype), std=std.to(weight.dtype), **x),
        tensors,
        gradients=tuple(tensors),
    )


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_names_is_there(name):
    text = (KERNELS / name).read_text()
    for figure in re.findall(r"\]\((figures/[^)]+)\)", text):
        assert (KERNELS / figure).is_file(), figure
    for page in re.findall(r"\]\((\w+\.md)\)", text):
        assert (KERNELS / page).is_file(), page
    for path in re.findall(r"`((?:csrc|kernels|gpt4v_fast)/[\w/.]*)`", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_shown_and_follows_the_readers_colours(name):
    text = (KERNELS / "figures" / name).read_text()
    assert ElementTree.fromstring(text).tag.endswith("svg")
    assert "prefers-color-scheme: dark" in text
    assert any(f"figures/{name}" in (KERNELS / page).read_text() for page in PAGES)
