"""Attention over dense batches: the public function, its torch ops, and the ways to a kernel.

user -> attention -> gpt4v_fast::attention -> _C.attention_forward (csrc/attention/attention.h)
                                           or kernels/attention/forward.py (Triton)
                                           or reference.attention_core
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gpt4v_fast import backends, reference
from gpt4v_fast._native import _C, last_dim_contiguous
from gpt4v_fast.masks import Mask
from gpt4v_fast.ops import checks, library
from gpt4v_fast.ops.attention_arguments import (
    OPTIONS,
    AttentionOptions,
    call_native,
    check_alibi,
    check_bias,
    check_qkv,
    check_sinks,
    draw_seed,
)

TRITON_FEATURES = frozenset({"causal", "gqa", "softcap"})
TRITON_MAX_HEAD_DIM = 256

_NO_MASK = Mask()


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Exact softmax attention without the S x T matrix of scores.

        s_ij = c tanh(scale q_i.k_j / c) + bias_ij - slope |j - i - offset|, or -inf where the mask hides j from i
        lse_i = log(sum_j exp s_ij + exp sink),   out_i = sum_j exp(s_ij - lse_i) v_j

    A query that sees nothing gives out 0, lse -inf and zero gradients. Statistics and sums are fp32.

    Args:
        q: (B, H, S, D), fp32, bf16 or fp16, any strides.
        k: (B, Hkv, T, D) in q's dtype; H is a multiple of Hkv, and query heads h H/Hkv ... share a key head.
        v: (B, Hkv, T, Dv) in q's dtype.
        mask: who sees whom (see Mask); None: everybody sees everybody.
        scale: factor of the scores; None: D ** -0.5.
        softcap: c above; None: no cap.
        bias: added to the scores, any float dtype and differentiable, or boolean (True: may attend); broadcastable to
            (B, H, S, T).
        alibi_slopes: (H,) or (B, H), fp32, not differentiable; `offset` is the mask's (T - S, or 0 for "top_left").
        sinks: (H,), one more logit per head in the denominator, differentiable.
        dropout_p: probability of dropping an attention weight, in [0, 1); the seed comes from torch's CPU generator,
            the stream is the package's own (docs/math.md) and does not depend on device or threads.
        return_lse: also return lse.

    Returns:
        out (B, H, S, Dv) in q's dtype; with return_lse also lse (B, H, S), fp32, natural logarithm, differentiable.

    Raises:
        TypeError, ValueError: an argument of a wrong kind, dtype, shape or device; the message names it.
        FallbackError: in strict mode, when no fast kernel takes the call.

    Source: FlashAttention-2 (Dao 2023), algorithms 1 and 2; sinks and softcap as in gpt-oss and Gemma 2.
    """
    arguments = prepare(q, k, v, mask, scale, softcap, bias, alibi_slopes, sinks, dropout_p)
    out, lse = _attention_op(*arguments)
    return (out, lse) if return_lse else out


def prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> tuple[Any, ...]:
    """Checks `attention`'s arguments and returns those of the torch op, which always gives lse too."""
    if not library.attention_tensors_fit(q, k, v, ndim=4, heads=1) or q.shape[0] != k.shape[0]:
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            checks.check_tensor(name, tensor, ndim=4)
        q, k, v = library.autocast(q, k, v)
        check_qkv(q, k, v)
    B, H, S, D = q.shape
    T = k.shape[2]
    if mask is None:
        mask = _NO_MASK
    elif not isinstance(mask, Mask):
        raise TypeError(f"mask: expected a gpt4v_fast.Mask (dense masks go to bias), got {type(mask).__name__}")
    left, right = mask.window or (None, None)
    dropout_p = checks.check_probability("dropout_p", dropout_p)
    return (
        q,
        k,
        v,
        check_bias(bias, q, (B, H, S, T)),
        check_alibi(alibi_slopes, q, B, H),
        check_sinks(sinks, q, H),
        *mask.resolve(B, S, T, q.device),
        None,
        draw_seed(dropout_p),
        mask.causal,
        mask.align == "bottom_right",
        -1 if left is None else left,
        -1 if right is None else right,
        checks.check_scale(scale, D),
        checks.check_softcap(softcap),
        dropout_p,
    )


def describe(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions, op: str = "attention"
) -> backends.Request:
    """What `backends.pick` needs to know of a call of `attention`."""
    features = options.features()
    if q.shape[1] != k.shape[1]:
        features.add("gqa")
    if max(q.shape[3], v.shape[3]) > TRITON_MAX_HEAD_DIM:
        features.add(f"head size over {TRITON_MAX_HEAD_DIM}")
    return backends.Request(op, q.device.type, q.dtype, frozenset(features))


def pick_backend(
    q: torch.Tensor,
    options: AttentionOptions,
    sizes: tuple[int, int, int],
    describe: Callable[[], backends.Request],
    op: str = "attention",
) -> str:
    """The backend that `backends.pick(describe())` chooses; `sizes` are Hkv, D and Dv, and q's heads come second."""
    Hkv, D, Dv = sizes
    is_large = D > TRITON_MAX_HEAD_DIM or Dv > TRITON_MAX_HEAD_DIM
    key = (op, q.device, q.dtype, q.shape[1] == Hkv, is_large, options.kind())
    return backends.pick_by(key, describe).backend


def _request(*args: Any, **kwargs: Any) -> backends.Request:
    q, k, v, *options = prepare(*args, **kwargs)
    return describe(q, k, v, AttentionOptions(*options))


def _triton_unsupported(request: backends.Request) -> str | None:
    missing = sorted(request.features - TRITON_FEATURES)
    return f"it does not take {', '.join(missing)} yet" if missing else None


backends.register_kernel("attention", "cpu", "_C.attention")
backends.register_kernel("attention", "triton", "kernels.attention", _triton_unsupported)
backends.register_explainer(attention, _request)


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    options = AttentionOptions(*rest)
    B, H, S, D = q.shape
    Dv = v.shape[3]
    backend = pick_backend(q, options, (k.shape[1], D, Dv), lambda: describe(q, k, v, options))
    if backend == "cpu":
        out = q.new_empty((B, H, S, Dv))
        lse = q.new_empty((B, H, S), dtype=torch.float32)
        q, k, v = last_dim_contiguous(q), last_dim_contiguous(k), last_dim_contiguous(v)
        call_native(_C.attention_forward, q, k, v, options, out, lse)
        return out, lse
    if backend == "triton":
        from gpt4v_fast.kernels.attention import forward as kernel

        return kernel.attention_forward(q, k, v, **_triton_arguments(q, k, options))
    out, lse = _run_reference(q.float(), k.float(), v.float(), options)
    return out.to(q.dtype), lse


def _attention_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    *values, needs_dbias = rest
    options = AttentionOptions(*values)
    bias, sinks = options.bias, options.sinks
    sizes = k.shape[1], q.shape[3], v.shape[3]
    backend = pick_backend(q, options, sizes, lambda: describe(q, k, v, options))
    if backend == "cpu":
        q, k, v, dout = (last_dim_contiguous(x) for x in (q, k, v, dout))
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        dbias = torch.zeros(bias.shape, dtype=torch.float32) if needs_dbias and bias is not None else None
        dsinks = torch.zeros(sinks.shape, dtype=torch.float32) if sinks is not None else None
        call_native(_C.attention_backward, q, k, v, options, out, lse, dout, dlse, dq, dk, dv, dbias, dsinks)
        # Two empty tensors, not one twice: the outputs of an op must not alias.
        dbias = dbias.to(bias.dtype) if dbias is not None and bias is not None else q.new_empty(0)
        dsinks = dsinks.to(sinks.dtype) if dsinks is not None and sinks is not None else q.new_empty(0)
        return dq, dk, dv, dbias, dsinks
    if backend == "triton":
        from gpt4v_fast.kernels.attention import forward as kernel

        arguments = _triton_arguments(q, k, options)
        gradients = kernel.attention_backward(dout, q, k, v, out, lse, dlse=dlse, **arguments)
        return (*gradients, q.new_empty(0), q.new_empty(0))
    return reference_backward(_run_reference, (q, k, v), options, dout, dlse, needs_dbias)


def reference_backward(
    run: Any,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    options: AttentionOptions,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    needs_dbias: bool = False,
) -> tuple[torch.Tensor, ...]:
    """The gradients by autograd over the oracle, in fp32, each in its input's dtype; empty where there is none."""
    bias, sinks = options.bias, options.sinks
    with torch.enable_grad():
        leaves = [x.detach().float().requires_grad_() for x in qkv]
        extra: dict[str, Any] = {}
        if needs_dbias and bias is not None:
            extra["bias"] = bias.detach().float().requires_grad_()
        if sinks is not None:
            extra["sinks"] = sinks.detach().float().requires_grad_()
        out, lse = run(*leaves, options._replace(**extra))
        upstream = [dout.float(), torch.zeros_like(lse) if dlse is None else dlse]
        inputs = [*leaves, *extra.values()]
        gradients = list(torch.autograd.grad([out, lse], inputs, upstream, allow_unused=True, materialize_grads=True))
    dq, dk, dv = (g.to(x.dtype) for g, x in zip(gradients[:3], qkv, strict=True))
    dbias = gradients[3].to(bias.dtype) if needs_dbias and bias is not None else dout.new_empty(0)
    dsinks = gradients[-1].to(sinks.dtype) if sinks is not None else dout.new_empty(0)
    return dq, dk, dv, dbias, dsinks


def _triton_arguments(q: torch.Tensor, k: torch.Tensor, options: AttentionOptions) -> dict[str, Any]:
    return {
        "scale": options.scale,
        "causal": options.causal,
        "offset": options.offset(q.shape[2], k.shape[2]),
        "softcap": options.softcap or None,
    }


def _run_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    out_and_lse: Any = reference.attention_core(
        q,
        k,
        v,
        ids=options.ids,
        causal=options.causal,
        offset=options.offset(q.shape[2], k.shape[2]),
        window=options.window,
        scale=options.scale,
        softcap=options.softcap,
        bias=options.bias,
        alibi_slopes=options.alibi_slopes,
        sinks=options.sinks,
        dropout_p=options.dropout_p,
        dropout_seed=options.dropout_seed,
        return_lse=True,
    )
    return out_and_lse


def _attention_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    B, H, S, _ = q.shape
    return q.new_empty(B, H, S, v.shape[3]), q.new_empty(B, H, S, dtype=torch.float32)


def attention_backward_fake(
    dout: torch.Tensor, dlse: Any, out: Any, lse: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, ...]:
    bias, sinks, needs_dbias = rest[0], rest[2], rest[-1]
    dbias = bias.new_empty(bias.shape) if needs_dbias else q.new_empty(0)
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias, dsinks


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs[:13])
    ctx.scalars = inputs[13:]


def _autograd(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[Any, ...]:
    out, lse, q, k, v, *options = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    # A mask in the form of a bias is common and needs none: its gradient would cost two more products.
    needs_dbias = ctx.needs_input_grad[3]
    dq, dk, dv, dbias, dsinks = _attention_backward_op(
        dout, dlse, out, lse, q, k, v, *options, *ctx.scalars, needs_dbias
    )
    sinks = options[2]
    head = (dq, dk, dv, dbias if needs_dbias else None, None, dsinks if sinks is not None else None)
    return (*head, *[None] * 14)


_attention_op = library.define_op(
    f"attention(Tensor q, Tensor k, Tensor v, {OPTIONS}) -> (Tensor, Tensor)",
    _attention,
    _attention_fake,
    setup_context=_setup_context,
    backward=_autograd,
)
_attention_backward_op = library.define_op(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, "
    f"{OPTIONS}, bool needs_dbias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _attention_backward,
    attention_backward_fake,
    gradient_of="attention",
)
