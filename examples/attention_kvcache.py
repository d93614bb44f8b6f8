"""Decoding: each step rotates the new query and key, appends key and value to the cache and attends, in one call."""

import time

import torch
import torch.nn.functional as F

import gpt4v_fast as gf

torch.manual_seed(0)
B, H, Hkv, D, room, prompt, steps = 1, 16, 4, 64, 4096, 4000, 8
k_cache, v_cache = torch.randn(2, B, room, Hkv, D)  # each (B, Tmax, Hkv, D); the first `prompt` rows are in use
new_q, (new_k, new_v) = torch.randn(steps, B, 1, H, D), torch.randn(2, steps, B, 1, Hkv, D)
angles = torch.arange(room)[:, None] / 10000 ** (torch.arange(D // 2) / (D // 2))  # (positions, D / 2)
cos, sin = angles.cos(), angles.sin()


def ours(step: int, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    new = {"k": new_k[step], "v": new_v[step], "rotary_cos": cos, "rotary_sin": sin}
    return gf.attention_kvcache(new_q[step], keys, values, torch.tensor([prompt + step]), **new)


def rotate(x: torch.Tensor, position: int) -> torch.Tensor:
    (a, b), c, s = x.chunk(2, dim=-1), cos[position], sin[position]
    return torch.cat([a * c - b * s, b * c + a * s], dim=-1)


def pytorch(step: int, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    end = prompt + step + 1
    keys[:, end - 1 : end], values[:, end - 1 : end] = rotate(new_k[step], end - 1), new_v[step]
    q, k, v = (x.transpose(1, 2) for x in (rotate(new_q[step], end - 1), keys[:, :end], values[:, :end]))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


def decode(attend) -> tuple[torch.Tensor, float]:
    keys, values, start = k_cache.clone(), v_cache.clone(), time.perf_counter()
    outputs = [attend(step, keys, values) for step in range(steps)]
    return torch.cat(outputs), 1e3 * (time.perf_counter() - start) / steps  # a step's milliseconds


decode(ours), decode(pytorch)  # the first run warms up
(out, ms), (expected, pytorch_ms) = decode(ours), decode(pytorch)
print(f"largest difference over {steps} steps: {(out - expected).abs().max():.1e}")
print(f"a step against {prompt} cached tokens: {ms:.2f} ms, PyTorch {pytorch_ms:.2f} ms")
