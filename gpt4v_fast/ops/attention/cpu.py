"""Attention by the C++ kernels (csrc/attention/), which take every call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gpt4v_fast import backends
from gpt4v_fast._native import _C, last_dim_contiguous, threads
from gpt4v_fast.ops import checks
from gpt4v_fast.ops.attention import arguments

if TYPE_CHECKING:
    from gpt4v_fast.ops.attention.api import AttentionCall


class Attention(backends.Backend):
    backend = "cpu"

    def __init__(self, kernel: str = "_C.attention"):
        self.kernel = kernel

    def forward(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        q, Dv = call.q, call.v.shape[-1]
        if call.cu_seqlens_q is None:
            B, H, S, _ = q.shape
            out, lse = q.new_empty((B, H, S, Dv)), q.new_empty((B, H, S), dtype=torch.float32)
        else:
            call, end = arguments.check_starts(call)
            Nq, H, _ = q.shape
            out, lse = q.new_empty((Nq, H, Dv)), q.new_empty((H, Nq), dtype=torch.float32)
            if end < Nq:
                out[end:] = 0
                lse[:, end:] = -torch.inf
        _C.attention_forward(_native(call), out, lse, threads())
        return out, lse

    def backward(self, call: AttentionCall, saved: Any, upstream: Any, wanted: Any) -> dict[str, torch.Tensor | None]:
        out, bias, sinks = saved.out, call.bias, call.sinks
        dout = torch.zeros_like(out) if upstream.out is None else upstream.out
        if call.cu_seqlens_q is None:
            dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (call.q, call.k, call.v))
        else:  # zeros, not empty: rows in no sequence are not written
            dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype) for x in (call.q, call.k, call.v))
        # A mask in the form of a bias is common and needs none: its gradient would cost two more products.
        dbias = torch.zeros(bias.shape, dtype=torch.float32) if wanted.bias and bias is not None else None
        dsinks = torch.zeros(sinks.shape, dtype=torch.float32) if sinks is not None else None
        upstreams = (last_dim_contiguous(dout), upstream.lse)
        out = out if call.cu_seqlens_q is None else last_dim_contiguous(out)
        _C.attention_backward(_native(call), out, saved.lse, *upstreams, dq, dk, dv, dbias, dsinks, threads())
        gradients: dict[str, torch.Tensor | None] = {"q": dq, "k": dk, "v": dv}
        if dbias is not None and bias is not None:
            gradients["bias"] = dbias.to(bias.dtype)
        if dsinks is not None and sinks is not None:
            gradients["sinks"] = dsinks.to(sinks.dtype)
        return gradients


def _native(call: AttentionCall) -> AttentionCall:
    """The call as the extension takes it: rows contiguous, ids in int32, sinks in fp32."""
    changed: dict[str, Any] = {}
    for name, x in (("q", call.q), ("k", call.k), ("v", call.v)):
        rows = last_dim_contiguous(x)
        if rows is not x:
            changed[name] = rows
    if call.query_documents is not None or call.query_images is not None or call.key_lengths is not None:
        changed.update(_int32_ids(call))
    if call.sinks is not None and call.sinks.dtype != torch.float32:
        changed["sinks"] = call.sinks.float()
    if call.cu_seqlens_q is not None and call.cu_seqlens_k is not None:
        for name, starts in (("cu_seqlens_q", call.cu_seqlens_q), ("cu_seqlens_k", call.cu_seqlens_k)):
            if starts.dtype != torch.int32:
                changed[name] = starts.to(torch.int32)
    return call._replace(**changed) if changed else call


def _int32_ids(call: AttentionCall) -> dict[str, torch.Tensor | None]:
    """The mask's ids in int32. Raises ValueError for key lengths that are negative or that int32 does not hold."""
    query_documents, key_documents = _narrow(call.query_documents, call.key_documents)
    query_images, key_images = _narrow(call.query_images, call.key_images)
    lengths = call.key_lengths
    if lengths is not None:
        lengths = checks.check_int32("key_lengths", lengths)
        if (lowest := min(lengths.tolist(), default=0)) < 0:
            raise ValueError(f"key_lengths: expected numbers of 0 or more, got {lowest}")
    return {
        "query_documents": query_documents,
        "key_documents": key_documents,
        "query_images": query_images,
        "key_images": key_images,
        "key_lengths": lengths,
    }


def _narrow(queries: torch.Tensor | None, keys: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Ids in int32. Where it does not hold them: their ranks in the call, negative where they are; order stays."""
    if queries is None or keys is None or queries.dtype == keys.dtype == torch.int32:
        return queries, keys
    if checks.fits_int32(queries) and (keys is queries or checks.fits_int32(keys)):
        narrow = queries.to(torch.int32)
        return narrow, narrow if keys is queries else keys.to(torch.int32)
    distinct, ranks = torch.cat([queries.reshape(-1), keys.reshape(-1)]).unique(return_inverse=True)
    ranks = (ranks - (distinct < 0).sum()).to(torch.int32)
    return ranks[: queries.numel()].view(queries.shape), ranks[queries.numel() :].view(keys.shape)
