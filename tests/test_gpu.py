"""The public ops on CUDA tensors: `make test-gpu`, where there is a GPU. Kernels alone: test_triton_*.py, which the
same command runs on the device; without a GPU those run under Triton's interpreter, and CUDA's source on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import patch_cases
import pytest
import torch
from attention_cases import flash
from closeness import compare
from loss_cases import BF16, EVERYTHING, FP16, FP32, IGNORED, LinearCase, class_weights, make_labels, same_bits
from random_rounding import BITS

import gpt4v_fast as gf
from gpt4v_fast import backends, reference
from gpt4v_fast.kernels.loss import plans

pytestmark = pytest.mark.skipif(
    os.environ.get("GPT4V_FAST_TEST_DEVICE") != "cuda" or not torch.cuda.is_available(),
    reason="needs a GPU and GPT4V_FAST_TEST_DEVICE=cuda",
)


@pytest.fixture(autouse=True)
def no_fallback():
    with gf.strict():
        yield


def on_gpu(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`function` of CPU tensors, computed on the GPU; gradients come back the same way."""
    moved = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()}

    def run(**tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = function(**{name: x.cuda() for name, x in tensors.items()}, **moved)
        return tuple(x.cpu() for x in (results if isinstance(results, tuple) else (results,)))

    return run


LINEAR = [
    LinearCase("fused", 300, 1003, 136, BF16, bias=FP32, ignored=0.5, reduction="mean"),
    LinearCase("fused-everything", 300, 1003, 136, FP16, **EVERYTHING),
    LinearCase("fused-fp32", 300, 1003, 64, FP32, reduction="sum"),
    LinearCase("fused-kept", 200, 1003, 256, BF16, reduction="mean"),
    LinearCase("fused-kept-in-chunks", 700, 1900, 256, BF16, ignored=0.1),
    LinearCase("fused-kept-peaked", 400, 1003, 128, BF16, planted=True, spread=1.0),
    LinearCase("fused-kept-many-tokens", 9000, 700, 1152, BF16),
    LinearCase("products", 300, 503, 136, BF16, bias=BF16, reduction="mean"),
    LinearCase("products-many-classes", 200, 25_000, 256, BF16, reduction="mean"),
    LinearCase("products-fp32", 300, 503, 40, FP32, **EVERYTHING),
]


@pytest.mark.parametrize("case", LINEAR, ids=lambda case: case.name)
def test_linear_cross_entropy(case, monkeypatch):
    options, target = case.options(), case.target()
    is_fused = case.name.startswith("fused")
    monkeypatch.setattr(plans, "PRODUCT_BYTES", 0 if is_fused else 32 << 20)
    monkeypatch.setattr(backends._settings, "cache", {})
    if case.name.endswith("in-chunks"):  # of 512 classes, and in the memory of the last ones half of the lower halves
        monkeypatch.setattr(plans, "KEPT_BYTES", 2 * 768 * 512 + 2 * 256 * 188)

    def oracle(hidden, weight, bias=None):
        loss, stats = reference.linear_cross_entropy(hidden, weight, target, bias=bias, return_stats=True, **options)
        return loss, stats.lse, stats.z_loss

    def native(hidden, weight, bias=None):
        return oracle(hidden.float(), weight.float(), None if bias is None else bias.float())

    moved = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    labels = target.cuda()

    def ours(**tensors):
        tensors = {name: x.cuda() for name, x in tensors.items()}
        loss, stats = gf.linear_cross_entropy(**tensors, target=labels, return_stats=True, **moved)
        return tuple(x.cpu() for x in (loss, stats.lse, stats.z_loss))

    tensors = case.tensors()
    tf32 = case.dtype == FP32 and is_fused
    bits = (BITS["tf32x3"],) * 2 if tf32 else (24, BITS[case.dtype])
    compare(
        ours, oracle, tensors, gradients=tuple(tensors), native=native, output_names=("loss", "lse", "z_loss"),
        operands=bits[0], backward_operands=bits[1],
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("V", [1, 1000, 50_257])
def test_cross_entropy(V, dtype):
    logits, target = 3 * torch.randn(37, V), make_labels(37, V, 0.2)
    options = {"weight": class_weights(V), "label_smoothing": 0.1, "z_loss": 1e-3}
    compare(
        on_gpu(gf.cross_entropy, target=target, **options),
        lambda logits: reference.cross_entropy(logits, target, **options),
        {"logits": logits.to(dtype)},
        gradients=("logits",),
    )


def _causal(**tensors: torch.Tensor) -> Any:
    return reference.attention(**tensors, mask=gf.Mask(causal=True), return_lse=True)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("D", [64, 80, 128])
def test_attention(D, dtype):
    tensors = {name: torch.randn(2, h, 300, D).to(dtype) for name, h in (("q", 4), ("k", 2), ("v", 2))}
    mask = gf.Mask(causal=True)
    operands = BITS["tf32x3" if dtype == FP32 else dtype]
    compare(
        on_gpu(gf.attention, mask=mask, return_lse=True),
        lambda q, k, v: flash(_causal, BITS[dtype], q=q, k=k, v=v),
        tensors,
        gradients=("q", "k", "v"),
        native_dtype=FP32,
        operands=operands,
        backward_operands=operands,
    )


@pytest.mark.parametrize("case", patch_cases.CASES, ids=lambda case: case.name)
def test_patch_embed(case):
    """The CUDA kernel against the oracle; 16-bit weights: pixels are normalised to 16 bits, as PyTorch does."""
    tensors, options = case.tensors(), {**case.options(), "out_dtype": case.out_dtype}
    on_device = {name: x.cuda() if case.layout == "contiguous" else _as_laid_out(x) for name, x in tensors.items()}
    assert gf.explain(gf.patch_embed, **on_device, **options).backend == "cuda"
    got = gf.patch_embed(**on_device, **options)
    exact = reference.patch_embed(
        **{n: x.double() if n != "pixels" else x for n, x in tensors.items()}, **case.options()
    )
    eps = max(torch.finfo(case.weight).eps, torch.finfo(got.dtype).eps)
    torch.testing.assert_close(got.cpu().double(), exact, rtol=4 * eps, atol=4 * eps * float(exact.abs().max()))


def _as_laid_out(x: torch.Tensor) -> torch.Tensor:
    room = x.untyped_storage().cuda()
    return torch.empty(0, dtype=x.dtype, device="cuda").set_(room, x.storage_offset(), x.shape, x.stride())


def _loss(N=2048, V=20_000, E=256, dtype=BF16):
    hidden = torch.randn(N, E, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(V, E, device="cuda") * E**-0.5).to(dtype).requires_grad_()
    target = torch.randint(V, (N,), device="cuda")
    target[: N // 3] = IGNORED
    return hidden, weight, target


def _step(hidden, weight, target, **options):
    loss = gf.linear_cross_entropy(hidden, weight, target, **options)
    return [loss.detach(), *torch.autograd.grad(loss, [hidden, weight])]


def test_no_synchronisation():
    """Neither the losses nor attention wait for the device, forward or backward."""
    hidden, weight, target = _loss()
    logits = torch.randn(64, 5000, device="cuda", requires_grad=True)
    q = torch.randn(1, 2, 256, 64, device="cuda", dtype=BF16, requires_grad=True)

    def everything():
        _step(hidden, weight, target, shift=1, label_smoothing=0.1, z_loss=1e-4)
        _step(hidden[:256], weight[:2000], target[:256] % 2000)
        torch.autograd.grad(gf.cross_entropy(logits, target[:64] % 5000), logits)
        torch.autograd.grad(gf.attention(q, q, q).sum(), q)

    everything()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_same_bits_twice(dtype):
    tensors = _loss(dtype=dtype)
    want = _step(*tensors)
    for _ in range(10):
        assert all(same_bits(a.cpu(), b.cpu()) for a, b in zip(_step(*tensors), want, strict=True))


@pytest.mark.parametrize("N, V, E", [(8192, 128_256, 1024), (4096, 50_257, 4096), (20_000, 32_000, 576)])
def test_extra_memory_is_at_most_64_mib(N, V, E):
    tensors = _loss(N, V, E)
    _step(*tensors)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = _step(*tensors)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - sum(x.numel() * x.element_size() for x in results)
    assert extra <= 64 << 20, f"{extra / 2**20:.1f} MiB"


def test_bad_labels_raise_when_asked():
    hidden, weight, target = _loss()
    target[700] = 20_000
    loss, grad_hidden, grad_weight = _step(hidden, weight, target)
    assert loss.isnan() and grad_hidden[700].isnan().all() and grad_weight.isnan().all()
    with pytest.raises(IndexError, match=r"expected labels in \[0, 20000\) .* got 20000 at place 700 .* on cuda:0"):
        gf.check_labels()
    gf.check_labels()


@pytest.mark.parametrize("N", [2048, 200], ids=["fused", "products"])
def test_compiled_without_a_graph_break(N):
    torch._dynamo.reset()
    hidden, weight, target = _loss(N)
    compiled = torch.compile(lambda h, w, y: gf.linear_cross_entropy(h, w, y, shift=0) * 2.0, fullgraph=True)
    want = [2.0 * x for x in _step(hidden, weight, target)]
    loss = compiled(hidden, weight, target)
    got = [loss.detach(), *torch.autograd.grad(loss, [hidden, weight])]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_captured_in_a_graph():
    """A training step replays from a CUDA graph with new labels."""
    hidden, weight, target = _loss()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            _step(hidden, weight, target)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = _step(hidden, weight, target)
    target.copy_(torch.randint(20_000, (2048,), device="cuda"))
    graph.replay()
    for got, want in zip(results, _step(hidden, weight, target), strict=True):
        assert same_bits(got.cpu(), want.cpu())


def test_autocast():
    hidden, weight, target = _loss(dtype=FP32)
    with torch.autocast("cuda", dtype=BF16):
        loss = gf.linear_cross_entropy(hidden, weight, target)
    want = gf.linear_cross_entropy(hidden.to(BF16), weight.to(BF16), target)
    assert same_bits(loss.detach().cpu(), want.detach().cpu())
