"""Attention by Triton kernels (kernels/attention/)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gpt4v_fast import backends

if TYPE_CHECKING:
    from gpt4v_fast.ops.attention.api import AttentionCall

TAKES = frozenset({"causal", "gqa", "softcap"})


class Attention(backends.Backend):
    backend, kernel = "triton", "kernels.attention"

    def refuses(self, traits: backends.Traits) -> str | None:
        missing = sorted(traits.features - TAKES)
        return f"it does not take {', '.join(missing)} yet" if missing else None

    def forward(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        from gpt4v_fast.kernels.attention import forward

        return forward.attention_forward(call.q, call.k, call.v, **_options(call))

    def backward(self, call: AttentionCall, saved: Any, upstream: Any, wanted: Any) -> dict[str, torch.Tensor | None]:
        from gpt4v_fast.kernels.attention import forward

        dout = torch.zeros_like(saved.out) if upstream.out is None else upstream.out
        tensors = (dout, call.q, call.k, call.v, saved.out, saved.lse)
        dq, dk, dv = forward.attention_backward(*tensors, dlse=upstream.lse, **_options(call))
        return {"q": dq, "k": dk, "v": dv}


def _options(call: AttentionCall) -> dict[str, Any]:
    offset = call.k.shape[2] - call.q.shape[2] if call.bottom_right else 0
    return {"scale": call.scale, "causal": call.causal, "offset": offset, "softcap": call.softcap or None}
