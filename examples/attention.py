"""Attention over a text with two images, whose patches see each other in both directions, beside PyTorch's SDPA."""

import time

import torch
import torch.nn.functional as F

import gpt4v_fast as gf

torch.manual_seed(0)
B, H, Hkv, S, D = 1, 8, 2, 1024, 64
q, k, v = (torch.randn(B, heads, S, D, requires_grad=True) for heads in (H, Hkv, Hkv))
image_blocks = torch.full((B, S), -1, dtype=torch.int32)  # a negative id is text
image_blocks[:, 16:272], image_blocks[:, 400:656] = 0, 1  # two images of 256 patches
mask = gf.Mask(causal=True, image_blocks=image_blocks)
dense = mask.dense(S, S)  # the same mask for PyTorch, one boolean per query and key


def ours() -> torch.Tensor:
    return gf.attention(q, k, v, mask=mask)


def pytorch() -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=dense, enable_gqa=True)


def milliseconds(attend) -> float:
    """The fastest of five calls, forward and backward."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        torch.autograd.grad(attend().sum(), (q, k, v))
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


print(gf.explain(gf.attention, q, k, v, mask=mask))
print(f"largest difference: {(ours() - pytorch()).abs().max():.1e}")
print(f"mask: {image_blocks.nbytes / 1024:.0f} KiB of ids, {dense.nbytes / 1024:.0f} KiB of booleans for PyTorch")
print(f"forward and backward: {milliseconds(ours):.1f} ms, PyTorch {milliseconds(pytorch):.1f} ms")
