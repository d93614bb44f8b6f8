"""The ways to attention that are timed side by side: ours, PyTorch's own, and two inference engines (engines.py)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import gpt4v_fast as gf

from . import engines
from .registry import Case, Contender, Inputs, Outputs, Run, Unavailable, by

if TYPE_CHECKING:
    from .attention import Shape

LEAVES = ("q", "k", "v")


def _ours(case: Case, inputs: Inputs) -> Run:
    mask = inputs["shape"].gf_mask
    return by(lambda x: gf.attention(x["q"], x["k"], x["v"], mask=mask))(case, inputs)


def _sdpa(case: Case, inputs: Inputs) -> Run:
    """SDPA with is_causal or, where it has no such flag, a boolean mask made beforehand."""
    shape: Shape = inputs["shape"]
    # Its is_causal stands at the top left: the same for as many queries as keys, which is all that is timed here.
    causal = shape.mask == "causal"
    dense = _dense(shape)
    gqa = {"enable_gqa": True} if shape.groups > 1 else {}
    return by(
        lambda x: F.scaled_dot_product_attention(x["q"], x["k"], x["v"], attn_mask=dense, is_causal=causal, **gqa)
    )(case, inputs)


def _sdpa_by(backend: SDPBackend) -> Callable[[Case, Inputs], Run]:
    """SDPA by one of its GPU backends; where that does not take the call torch says so."""

    def make(case: Case, inputs: Inputs) -> Run:
        run = _sdpa(case, inputs)

        def of_backend() -> Outputs:
            with sdpa_kernel(backend):
                return run()

        return of_backend

    return make


def _dense(shape: Shape) -> torch.Tensor | None:
    return None if shape.mask in ("none", "causal") else shape.gf_mask.dense(shape.S, shape.keys)


def _sdpa_repeated(case: Case, inputs: Inputs) -> Run:
    """SDPA on keys and values repeated for every query head, which is what models did before enable_gqa."""
    shape: Shape = inputs["shape"]

    def function(x: Inputs) -> torch.Tensor:
        k, v = (x[name].repeat_interleave(shape.groups, dim=1) for name in ("k", "v"))
        return F.scaled_dot_product_attention(x["q"], k, v, is_causal=shape.mask == "causal")

    return by(function)(case, inputs)


def _sdpa_folded(case: Case, inputs: Inputs) -> Run:
    """SDPA with the queries of a group as rows of one key head: its best setting for decoding."""
    shape: Shape = inputs["shape"]

    def function(x: Inputs) -> torch.Tensor:
        folded = x["q"].view(shape.B, -1, shape.groups, shape.D)
        return F.scaled_dot_product_attention(folded, x["k"], x["v"]).view(x["q"].shape)

    return by(function)(case, inputs)


def _flex(case: Case, inputs: Inputs) -> Run:
    """FlexAttention compiled for this size, its block mask made beforehand."""
    if not inputs["q"].is_cuda:
        _inference_only("FlexAttention", case)
    shape: Shape = inputs["shape"]
    rule = _mask_rule(shape)
    blocks = None
    if rule is not None:
        blocks = create_block_mask(rule, shape.B, None, shape.S, shape.keys, device=inputs["q"].device.type)
    with warnings.catch_warnings():  # torch's own, of its own parts
        warnings.simplefilter("ignore", DeprecationWarning)
        compiled = torch.compile(flex_attention, dynamic=False)
    gqa = shape.groups > 1
    return by(lambda x: compiled(x["q"], x["k"], x["v"], block_mask=blocks, enable_gqa=gqa))(case, inputs)


def _mask_rule(shape: Shape) -> Callable[..., torch.Tensor] | None:
    """The shape's mask as FlexAttention's mask_mod(b, h, i, j)."""
    mask = shape.gf_mask
    if shape.mask == "none":
        return None
    if mask.window is not None:
        left = mask.window[0]
        return lambda b, h, i, j: (j <= i) & (i - j <= left)
    if isinstance(documents := mask.documents, torch.Tensor):
        return lambda b, h, i, j: (j <= i) & (documents[b, i] == documents[b, j])
    if isinstance(images := mask.image_blocks, torch.Tensor):
        return lambda b, h, i, j: (j <= i) | ((images[b, i] == images[b, j]) & (images[b, i] >= 0))
    return lambda b, h, i, j: j <= i


def _engine(name: str, run: Callable[[engines.Problem], Run]) -> Callable[[Case, Inputs], Run]:
    def make(case: Case, inputs: Inputs) -> Run:
        _inference_only(name, case)
        shape: Shape = inputs["shape"]
        dense = _dense(shape)
        allowed = None if dense is None else dense.view(-1, 1, shape.S, shape.keys)
        q, k, v = (inputs[leaf] for leaf in LEAVES)
        return run(engines.Problem(case.name, q, k, v, shape.mask == "causal", allowed))

    return make


def _inference_only(name: str, case: Case) -> None:
    if case.direction != "forward":
        raise Unavailable(f"{name} has no gradients on a CPU")


def contenders(shape: Shape) -> tuple[Contender, ...]:
    """Ours and every peer, those that can't take this shape with the reason."""
    found = [Contender("gpt4v_fast", _ours, ours=True), Contender("SDPA", _sdpa)]
    if shape.groups > 1:
        found.append(Contender("SDPA, repeated keys", _sdpa_repeated))
        if shape.S == 1:
            found.append(Contender("SDPA, folded groups", _sdpa_folded))
    return (
        *found,
        Contender("FlexAttention, compiled", _flex, compiled=True),
        Contender("OpenVINO", _engine("OpenVINO", engines.openvino), devices=("cpu",)),
        Contender("ONNX Runtime", _engine("ONNX Runtime", engines.onnxruntime), devices=("cpu",)),
        Contender("SDPA, flash", _sdpa_by(SDPBackend.FLASH_ATTENTION), devices=("cuda",)),
        Contender("SDPA, cuDNN", _sdpa_by(SDPBackend.CUDNN_ATTENTION), devices=("cuda",)),
    )
