"""The loss of a language model's head, without ever holding the logits: memory and time beside PyTorch."""

import resource
import time

import torch
import torch.nn.functional as F

import gpt4v_fast as gf

torch.manual_seed(0)
N, V, E = 1024, 32000, 256
hidden = torch.randn(N, E, dtype=torch.bfloat16, requires_grad=True)
weight = (torch.randn(V, E) * E**-0.5).to(torch.bfloat16).requires_grad_()
target = torch.randint(V, (N,))


def ours() -> torch.Tensor:
    return gf.linear_cross_entropy(hidden, weight, target)


def pytorch() -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def measure(loss) -> tuple[float, float]:
    """By how many MiB the process's peak memory grows, and the milliseconds of the fastest of three steps."""
    before, times = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(3):
        start = time.perf_counter()
        torch.autograd.grad(loss(), (hidden, weight))
        times.append(time.perf_counter() - start)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, 1e3 * min(times)


(mib, ms), (pytorch_mib, pytorch_ms) = measure(ours), measure(pytorch)  # in this order: a peak only grows
print(f"loss: {ours().item():.5f}, PyTorch {pytorch().item():.5f}")
print(f"fp32 logits that are never written: {4 * N * V / 2**20:.0f} MiB; gradients {2 * (N + V) * E / 2**20:.0f} MiB")
print(f"peak memory grows by {mib:.0f} MiB, with PyTorch by {pytorch_mib:.0f} MiB more")
print(f"loss and gradients: {ms:.0f} ms, PyTorch {pytorch_ms:.0f} ms")
