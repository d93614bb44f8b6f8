"""The named cases of the attention tests, and how one is run: every output and gradient against the fp64 oracle."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from closeness import compare
from random_rounding import BITS, held, is_active, suspended

import gpt4v_fast as gf
from gpt4v_fast import backends, reference
from gpt4v_fast._native import _C

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (FP32, BF16, FP16)
ISAS = backends.available_isas()
BF16_ISAS = ("avx512_bf16", "amx_bf16")  # those that multiply bf16; the others widen it to fp32


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN here, so an element that a kernel leaves out is seen."""
    was_on, was_warning = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(was_on, warn_only=was_warning)


MakeMask = Callable[["Case"], gf.Mask]


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of attention; a size that is left out follows from the others."""

    name: str
    S: int
    T: int
    B: int = 1
    H: int = 2
    Hkv: int = 0
    D: int = 16
    Dv: int = 0
    dtype: torch.dtype = FP32
    layout: str = "contiguous"
    mask: MakeMask | None = None
    bias: tuple[int, ...] | None = None
    bias_dtype: torch.dtype = FP32
    alibi: str = ""
    sinks: bool = False
    softcap: float | None = None
    scale: float | None = None
    amplitude: float = 1.0

    def tensors(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        H, Hkv, Dv = self.H, self.Hkv or self.H, self.D if not self.Dv else self.Dv

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator) * self.amplitude

        shapes = {"q": (self.B, H, self.S, self.D), "k": (self.B, Hkv, self.T, self.D), "v": (self.B, Hkv, self.T, Dv)}
        tensors = {name: lay_out(random(*shape).to(self.dtype), self.layout) for name, shape in shapes.items()}
        if self.bias is not None:
            bias = torch.randn(self.bias, generator=generator)
            tensors["bias"] = bias > -0.3 if self.bias_dtype == torch.bool else bias.to(self.bias_dtype)
        if self.alibi:
            tensors["alibi_slopes"] = torch.rand((self.B, H) if self.alibi == "BH" else (H,), generator=generator)
        if self.sinks:
            tensors["sinks"] = torch.randn(H, generator=generator)
        return tensors

    def options(self) -> dict[str, Any]:
        mask = None if self.mask is None else self.mask(self)
        return {"mask": mask, "softcap": self.softcap, "scale": self.scale, "return_lse": True}

    @property
    def gradients(self) -> list[str]:
        extra = ["bias"] if self.bias is not None and self.bias_dtype != torch.bool else []
        return ["q", "k", "v", *extra, *(["sinks"] if self.sinks else [])]


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers in other strides; x is (B, heads, tokens, size)."""
    if layout == "contiguous":
        return x
    if layout == "tokens before heads":  # a projection's output, viewed
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "slice of qkv":  # rows and heads of a wider tensor
        wide = torch.full((*x.shape[:2], x.shape[2] + 3, 3 * x.shape[3]), float("nan"), dtype=x.dtype)
        view = wide[:, :, 2 : 2 + x.shape[2], x.shape[3] : 2 * x.shape[3]]
    elif layout == "misaligned":  # one element behind an aligned address
        view = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    elif layout == "last dimension strided":
        view = torch.full((*x.shape[:3], 2 * x.shape[3]), float("nan"), dtype=x.dtype)[..., ::2]
    elif layout == "transposed matrix":
        view = torch.empty(x.transpose(2, 3).shape, dtype=x.dtype).transpose(2, 3)
    else:
        raise ValueError(f"layout: got {layout!r}")
    view.copy_(x)
    return view


def check(case: Case, isa: str | None = None, **options: Any) -> None:
    """Asserts that out, lse and every gradient of the case are as close as closeness.py asks.

    Native is PyTorch in fp32 also where the tensors are bf16 or fp16: in these dtypes it is off by many times the one
    unit that the kernels keep to.
    """
    settings = {**case.options(), **options}

    def fast(**tensors: torch.Tensor) -> Any:
        return gf.attention(**tensors, **settings)

    def oracle(**tensors: torch.Tensor) -> Any:
        return flash(reference.attention, saved_bits(case.dtype), **tensors, **settings)

    with gf.force(isa=isa, backend="cpu"):  # around the gradients too
        compare(
            fast,
            oracle,
            case.tensors(),
            gradients=case.gradients,
            native_dtype=FP32,
            output_names=("out", "lse"),
            operands=operand_bits(case.dtype),
            backward_operands=operand_bits(case.dtype),
        )


def flash(oracle: Callable[..., Any], saved_bits: int, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of an oracle that under random rounding is rounded as flash attention is (FlashAttention-2, 3.1).

    Autograd keeps the weights P of the forward pass and takes delta = rowsum(P * dP). The kernels compute the scores
    again, whose errors the saved lse then does not share, and take delta = rowsum(dout * out), of the output that was
    saved with `saved_bits` bits. So there are two runs here, one for what is saved, one for the gradients, with

        P = exp(scores - saved lse) = exp(lse - saved lse) * (the P of the second run)
        dS = P (dP - rowsum(dout * saved out) + dlse)

    which is the second run's own backward with dout and dlse times the first factor, and with what its delta is off by
    as one more gradient of lse.
    """
    out, lse = oracle(**arguments)
    if not is_active():
        return out, lse
    with torch.no_grad():
        saved_out, saved_lse = oracle(**arguments)
    return _Saved.apply(out, lse, saved_out, saved_lse, saved_bits)


class _Saved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Any, lse: Any, saved_out: torch.Tensor, saved_lse: torch.Tensor, saved_bits: int) -> Any:
        ctx.save_for_backward(out, lse, saved_out, saved_lse)
        ctx.saved_bits = saved_bits
        return saved_out, saved_lse

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor, dlse: torch.Tensor) -> Any:
        out, lse, saved_out, saved_lse = ctx.saved_tensors
        delta = (dout * held(saved_out, ctx.saved_bits)).sum(-1)
        with suspended():
            packed = out.dim() == 3  # (N, H, Dv), and lse (H, N)
            excess = delta - (dout * out).sum(-1)
            seen = lse != -math.inf
            factor = torch.where(seen, lse - saved_lse, 0.0).exp()
            dlse = factor * (dlse - (excess.transpose(0, 1) if packed else excess).masked_fill(~seen, 0.0))
            dout = dout * (factor.transpose(0, 1) if packed else factor)[..., None]
        return dout, dlse, None, None, None


def operand_bits(dtype: torch.dtype) -> int:
    """How many bits the weights have that the CPU kernel multiplies with v (csrc/attention/forward.h)."""
    return BITS[BF16] if dtype == BF16 and _C.isa() in BF16_ISAS else BITS[FP32]


def saved_bits(dtype: torch.dtype) -> int:
    """How many bits of out the CPU kernels keep for the backward pass. Of dtype alone: Spreads, which remembers what it
    measured for the other ISAs of a case, does not see it."""
    return BITS[dtype]


def random_ids(*shape: int, groups: int, seed: int = 3) -> torch.Tensor:
    """int32 ids from -1 (padding, or text) to groups - 1, in no order."""
    return torch.randint(-1, groups, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def runs(B: int, tokens: int, length: int, every: int = 1) -> torch.Tensor:
    """int32 ids of consecutive runs of `length` tokens; with every = n only each n-th run has an id, others have -1."""
    ids = torch.arange(tokens, dtype=torch.int32) // length
    ids = torch.where(ids % every == every - 1, ids, -1) if every > 1 else ids
    return ids.expand(B, tokens)


def _ids_pair(case: Case, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    return random_ids(case.B, case.S, groups=groups), random_ids(case.B, case.T, groups=groups, seed=4)


def causal(case: Case) -> gf.Mask:
    return gf.Mask(causal=True)


def top_left(case: Case) -> gf.Mask:
    return gf.Mask(causal=True, align="top_left")


def window(left: int | None, right: int | None, **kwargs: Any) -> MakeMask:
    return lambda case: gf.Mask(window=(left, right), **kwargs)


def documents(case: Case) -> gf.Mask:
    return gf.Mask(documents=_ids_pair(case, 2))


def packed_documents(case: Case) -> gf.Mask:
    return gf.Mask(causal=True, documents=runs(case.B, case.S, 50))


def images(case: Case) -> gf.Mask:
    return gf.Mask(causal=True, image_blocks=runs(case.B, case.S, 30, every=2))


def scattered_images(case: Case) -> gf.Mask:
    return gf.Mask(causal=True, image_blocks=_ids_pair(case, 3))


def key_lengths(case: Case) -> gf.Mask:
    lengths = [0, 1, case.T, case.T // 2 + 1]
    return gf.Mask(key_lengths=torch.tensor([lengths[b % 4] for b in range(case.B)], dtype=torch.int32))


def everything(case: Case) -> gf.Mask:
    lengths = torch.full((case.B,), max(case.T - 5, 0), dtype=torch.int32)
    return gf.Mask(
        causal=True,
        window=(70, 40),
        documents=runs(case.B, case.S, 90),
        image_blocks=runs(case.B, case.S, 20, every=2),
        key_lengths=lengths,
    )


SIZES = [
    Case("one", 1, 1, H=1, D=1),
    Case("no-queries", 0, 5),
    Case("no-keys", 5, 0),
    Case("no-keys-sinks", 5, 0, sinks=True),
    Case("no-batch", 5, 6, B=0),
    Case("17x17", 17, 17, D=17),
    Case("129x129", 129, 129, D=64),
    Case("64x64-exact-blocks", 64, 64, D=64),
    Case("65x63-block-edges", 65, 63, D=32),
    Case("vit-577-bf16", 577, 577, H=1, D=64, dtype=BF16),
    Case("one-query-of-200", 1, 200, B=2, H=4, Hkv=2, D=64, mask=causal),
    Case("one-key", 70, 1),
    Case("d1", 20, 30, D=1),
    Case("d72-bf16", 40, 50, D=72, dtype=BF16),
    Case("d80-fp16", 40, 50, D=80, dtype=FP16),
    Case("d96", 40, 50, D=96),
    Case("d128-bf16", 70, 90, H=1, D=128, dtype=BF16, mask=causal),
    Case("d256", 70, 40, H=1, D=256),
    Case("wide-v", 33, 47, D=24, Dv=100),
    Case("narrow-v-fp16", 33, 47, D=72, Dv=5, dtype=FP16),
    Case("gqa-4", 35, 70, B=2, H=8, Hkv=2, mask=causal),
    Case("gqa-3-bf16", 45, 45, H=3, Hkv=1, D=40, dtype=BF16, mask=causal),
    Case("mqa-many-heads", 3, 40, B=2, H=24, Hkv=1),
]
LAYOUTS = [
    Case(f"{layout.replace(' ', '-')}-{str(dtype)[6:]}", 37, 70, B=2, H=4, Hkv=2, D=24, Dv=20,
         dtype=dtype, layout=layout)
    for layout in (
        "tokens before heads", "slice of qkv", "misaligned", "last dimension strided", "transposed matrix",
    )
    for dtype in (FP32, BF16)
]  # fmt: skip
MASKS = [
    Case("causal", 129, 129, mask=causal),
    Case("causal-more-keys", 50, 130, mask=causal, dtype=BF16),
    Case("causal-more-queries-first-rows-see-nothing", 100, 33, mask=causal),
    Case("top-left", 70, 40, mask=top_left),
    Case("top-left-more-keys", 40, 150, mask=top_left, dtype=FP16),
    Case("window", 150, 150, mask=window(20, 5)),
    Case("window-0-0", 70, 70, mask=window(0, 0)),
    Case("window-left-only", 140, 140, mask=window(65, None)),
    Case("window-right-only-decode", 3, 140, mask=window(None, 0)),
    Case("causal-window-bf16", 200, 200, mask=window(64, 64, causal=True), dtype=BF16),
    Case("window-top-left", 100, 30, mask=window(10, 10, align="top_left")),
    Case("documents-scattered", 60, 80, B=2, mask=documents),
    Case("documents-packed", 150, 150, B=2, mask=packed_documents, dtype=BF16),
    Case("images", 150, 150, B=2, mask=images),
    Case("images-scattered", 70, 90, B=2, mask=scattered_images),
    Case("key-lengths", 40, 100, B=4, mask=key_lengths),
    Case("key-lengths-gqa-fp16", 10, 70, B=4, H=4, Hkv=2, mask=key_lengths, dtype=FP16),
    Case("everything", 200, 200, B=2, mask=everything),
    Case("everything-bf16-sinks-softcap", 200, 200, B=2, mask=everything, dtype=BF16, sinks=True, softcap=8.0),
]
SCORES = [
    Case("bias-full", 40, 70, B=2, bias=(2, 2, 40, 70)),
    Case("bias-head", 40, 70, B=2, bias=(1, 2, 40, 70), bias_dtype=BF16, dtype=BF16),
    Case("bias-one-matrix", 70, 70, B=2, bias=(70, 70), mask=causal),
    Case("bias-keys-only", 130, 70, B=2, bias=(2, 1, 1, 70)),
    Case("bias-queries-only", 70, 130, B=2, bias=(2, 70, 1)),
    Case("bias-number", 70, 70, bias=(1,)),
    Case("bias-per-head-fp16", 70, 130, H=4, Hkv=2, B=2, bias=(4, 1, 1), bias_dtype=FP16),
    Case("bias-fp32-with-bf16", 65, 65, H=4, Hkv=1, bias=(65, 65), dtype=BF16),
    Case("bias-one-token", 1, 1, bias=(1, 2, 1, 1)),
    Case("boolean-bias", 50, 90, B=2, bias=(2, 1, 50, 90), bias_dtype=torch.bool),
    Case("boolean-bias-keys", 50, 90, B=2, bias=(90,), bias_dtype=torch.bool, dtype=BF16, mask=causal),
    Case("softcap", 70, 80, softcap=2.0, amplitude=2.0),
    Case("softcap-bf16", 70, 80, softcap=20.0, amplitude=3.0, dtype=BF16),
    Case("softcap-saturated", 70, 2, softcap=0.5),
    Case("alibi", 70, 90, alibi="H", mask=causal),
    Case("alibi-batch-top-left", 90, 70, B=3, alibi="BH", mask=top_left),
    Case("sinks", 70, 90, B=2, H=4, Hkv=2, sinks=True, mask=causal),
    Case("sinks-where-nothing-is-seen", 90, 40, sinks=True, mask=causal),
    Case("all-of-them", 75, 75, B=2, H=4, Hkv=2, bias=(4, 75, 75), alibi="BH", sinks=True, softcap=5.0,
         mask=everything),
    Case("scale-0", 30, 40, scale=0.0),
    Case("scale-negative", 30, 40, scale=-0.7, mask=causal),
    # fp32 scores around 250 have units of 1.5e-5, which is the relative error that they pass on.
    Case("large-scores", 60, 90, D=64, scale=1.0, amplitude=3.0),
    # Weights near 1: dS = P (dP - delta) is a small difference, and delta comes from out as rounded to bf16.
    Case("huge-scores-bf16", 60, 90, D=64, scale=3.0, amplitude=3.0, dtype=BF16),
]  # fmt: skip
CASES = [*SIZES, *LAYOUTS, *MASKS, *SCORES]
