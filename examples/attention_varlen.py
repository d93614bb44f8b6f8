"""Attention over sequences of different lengths, laid end to end instead of padded to the longest."""

import time

import torch
import torch.nn.functional as F

import gpt4v_fast as gf

torch.manual_seed(0)
H, D = 8, 64
lengths = torch.tensor([700, 60, 250, 30])
starts = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)  # 0, 700, 760, 1010, 1040
q, k, v = torch.randn(3, int(lengths.sum()), H, D)  # each (N, H, D)


def packed() -> torch.Tensor:
    return gf.attention_varlen(q, k, v, starts, starts, causal=True)


def one_by_one() -> torch.Tensor:
    """PyTorch's causal attention, a call for each sequence."""
    heads_first = [x.transpose(0, 1).split(lengths.tolist(), dim=1) for x in (q, k, v)]
    parts = [F.scaled_dot_product_attention(*qkv, is_causal=True) for qkv in zip(*heads_first, strict=True)]
    return torch.cat(parts, dim=1).transpose(0, 1)


def milliseconds(attend) -> float:
    """The fastest of five calls."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        attend()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


print(f"largest difference: {(packed() - one_by_one()).abs().max():.1e}")
print(f"rows: {len(q)} packed, {len(lengths) * max(lengths)} if every sequence were padded")
print(f"forward: {milliseconds(packed):.2f} ms, PyTorch sequence by sequence {milliseconds(one_by_one):.2f} ms")
