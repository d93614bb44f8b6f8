"""Attention over packed sequences of different lengths: the public function and its torch ops."""

from __future__ import annotations

from typing import Any

import torch

from gpt4v_fast import backends, reference
from gpt4v_fast._native import _C, last_dim_contiguous
from gpt4v_fast.masks import check_window
from gpt4v_fast.ops import checks, library
from gpt4v_fast.ops.attention import attention_backward_fake, describe, pick_backend, reference_backward
from gpt4v_fast.ops.attention_arguments import (
    OPTIONS,
    AttentionOptions,
    call_native,
    check_alibi,
    check_sinks,
    draw_seed,
)


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    align: str = "bottom_right",
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`attention` over sequences laid end to end: sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1].

    Args:
        q: (Nq, H, D), fp32, bf16 or fp16, any strides.
        k: (Nk, Hkv, D) in q's dtype.
        v: (Nk, Hkv, Dv) in q's dtype.
        cu_seqlens_q, cu_seqlens_k: (sequences + 1,), int32 or int64, from 0, not decreasing; rows behind the last are
            in no sequence and give 0.
        max_seqlen_q, max_seqlen_k: taken for compatibility with FlashAttention; a value below the longest sequence is
            refused.
        causal, align, window, scale, softcap, sinks, dropout_p: as for `attention`, within each sequence.
        alibi_slopes: (H,) or (sequences, H), fp32.
        return_lse: also return the log-sum-exp.

    Returns:
        out (Nq, H, Dv) in q's dtype; with return_lse also lse (H, Nq), fp32, natural logarithm.

    Raises:
        TypeError, ValueError: as for `attention`, and for cu_seqlens that decrease or pass the end.

    Source: FlashAttention-2 (Dao 2023); the layout is that of flash_attn_varlen_func.
    """
    arguments = prepare(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, align, window, scale, softcap,
        alibi_slopes, sinks, dropout_p,
    )  # fmt: skip
    out, lse = _attention_varlen_op(*arguments)
    return (out, lse) if return_lse else out


def prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    align: str = "bottom_right",
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> tuple[Any, ...]:
    """Checks `attention_varlen`'s arguments and returns those of the torch op, which always gives lse too."""
    if not (library.attention_tensors_fit(q, k, v, ndim=3, heads=1) and _C.do_starts_fit(cu_seqlens_q, cu_seqlens_k)):
        q, k, v = _check_tensors(q, k, v, cu_seqlens_q, cu_seqlens_k)
    _, H, D = q.shape
    limit_q, limit_k = _check_longest("max_seqlen_q", max_seqlen_q), _check_longest("max_seqlen_k", max_seqlen_k)
    if align not in ("bottom_right", "top_left"):
        raise ValueError(f'align: expected "bottom_right" or "top_left", got {align!r}')
    check_window(window)
    left, right = window or (None, None)
    dropout_p = checks.check_probability("dropout_p", dropout_p)
    options = AttentionOptions(
        bias=None,
        alibi_slopes=check_alibi(alibi_slopes, q, cu_seqlens_q.shape[0] - 1, H),
        sinks=check_sinks(sinks, q, H),
        query_documents=None,
        key_documents=None,
        query_images=None,
        key_images=None,
        key_lengths=None,
        offsets=None,
        seed=draw_seed(dropout_p),
        causal=causal,
        bottom_right=align == "bottom_right",
        window_left=-1 if left is None else left,
        window_right=-1 if right is None else right,
        scale=checks.check_scale(scale, D),
        softcap=checks.check_softcap(softcap),
        dropout_p=dropout_p,
    )
    return (q, k, v, cu_seqlens_q, cu_seqlens_k, limit_q, limit_k, *options)


def _check_longest(name: str, longest: int | None) -> int:
    """The limit as the op takes it: -1 for none."""
    if longest is None:
        return -1
    if longest < 0:
        raise ValueError(f"{name}: expected None or a length >= 0, got {longest}")
    return longest


def _check_tensors(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Kinds, dtypes, devices and shapes; q, k and v come back in autocast's dtype where autocast is on."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        checks.check_tensor(name, tensor, ndim=3)
    q, k, v = library.autocast(q, k, v)
    checks.check_like("k", k, "q", q)
    checks.check_like("v", v, "q", q)
    _, H, D = q.shape
    Nk, Hkv, _ = k.shape
    if Hkv == 0 or H % Hkv:
        raise ValueError(f"k: expected a number of heads that divides q's {H}, got {Hkv}")
    checks.check_shape("k", k, (Nk, Hkv, D), "(Nk, Hkv, D)")
    checks.check_shape("v", v, (Nk, Hkv, v.shape[2]), "(Nk, Hkv, Dv)")
    for name, starts in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        checks.check_tensor(name, starts, ndim=1, dtypes=(torch.int32, torch.int64))
        checks.check_device(name, starts, "q", q)
        if starts.shape[0] < 1:
            raise ValueError(f"{name}: expected shape (sequences + 1,), got (0,)")
    checks.check_shape("cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens_q.shape), "of cu_seqlens_q")
    return q, k, v


def _check_starts(name: str, starts: torch.Tensor, rows: int, longest: int) -> tuple[torch.Tensor, int]:
    """The starts in int32, and the last; raises unless they begin at 0, do not decrease and end within the rows."""
    narrow = checks.clamp_int32(starts)
    rows = min(rows, checks.INT32_MAX)
    # The largest number of all may be a larger one's clamped.
    if starts.is_cpu and 0 <= (end := _C.end_of_starts(narrow, rows, longest)) < checks.INT32_MAX:
        return narrow, end
    numbers = starts.tolist()
    if numbers[0] != 0:
        raise ValueError(f"{name}: expected the first element to be 0, got {numbers[0]}")
    for b in range(1, len(numbers)):
        length = numbers[b] - numbers[b - 1]
        if length < 0:
            raise ValueError(
                f"{name}: expected elements that do not decrease, got {numbers[b - 1]} then {numbers[b]} at {b}"
            )
        if 0 <= longest < length:
            raise ValueError(
                f"max_seqlen_{name[-1]}: expected at least {length}, sequence {b - 1}'s length, got {longest}"
            )
    if numbers[-1] > rows:
        raise ValueError(f"{name}: expected an end within the {rows} rows, got {numbers[-1]}")
    return narrow, numbers[-1]


def _pick_backend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions) -> str:
    sizes = k.shape[1], q.shape[2], v.shape[2]
    return pick_backend(q, options, sizes, lambda: _describe(q, k, v, options), op="attention_varlen")


def _describe(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions) -> backends.Request:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return describe(q, k, v, options, op="attention_varlen")


def _request(*args: Any, **kwargs: Any) -> backends.Request:
    q, k, v, _, _, _, _, *options = prepare(*args, **kwargs)
    return _describe(q, k, v, AttentionOptions(*options))


backends.register_kernel("attention_varlen", "cpu", "_C.attention (varlen)")
backends.register_explainer(attention_varlen, _request)


def _attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    options = AttentionOptions(*rest)
    Nq, H, _ = q.shape
    cu_seqlens_q, end = _check_starts("cu_seqlens_q", cu_seqlens_q, Nq, max_seqlen_q)
    cu_seqlens_k, _ = _check_starts("cu_seqlens_k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    if _pick_backend(q, k, v, options) == "cpu":
        out = q.new_empty((Nq, H, v.shape[2]))
        lse = q.new_empty((H, Nq), dtype=torch.float32)
        if end < Nq:
            out[end:] = 0
            lse[:, end:] = -torch.inf
        q, k, v = last_dim_contiguous(q), last_dim_contiguous(k), last_dim_contiguous(v)
        call_native(_C.attention_forward, q, k, v, options, out, lse, cu_seqlens=(cu_seqlens_q, cu_seqlens_k))
        return out, lse
    out, lse = _run_reference(q.float(), k.float(), v.float(), options, cu_seqlens_q, cu_seqlens_k)
    return out.to(q.dtype), lse


def _attention_varlen_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    options = AttentionOptions(*rest)
    if _pick_backend(q, k, v, options) == "cpu":
        # Zeros, not empty: rows in no sequence are not written.
        dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype) for x in (q, k, v))
        sinks = options.sinks
        dsinks = torch.zeros(sinks.shape, dtype=torch.float32) if sinks is not None else None
        q, k, v, dout, out = (last_dim_contiguous(x) for x in (q, k, v, dout, out))
        call_native(
            _C.attention_backward, q, k, v, options, out, lse, dout, dlse, dq, dk, dv, None, dsinks,
            cu_seqlens=(cu_seqlens_q.to(torch.int32), cu_seqlens_k.to(torch.int32)),
        )  # fmt: skip
        dsinks = dsinks.to(sinks.dtype) if dsinks is not None and sinks is not None else dq.new_empty(0)
        return dq, dk, dv, dq.new_empty(0), dsinks

    def run(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _run_reference(q, k, v, options, cu_seqlens_q, cu_seqlens_k)

    return reference_backward(run, (q, k, v), options, dout, dlse)


def _run_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: AttentionOptions,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    out_and_lse: Any = reference.attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        causal=options.causal,
        align="bottom_right" if options.bottom_right else "top_left",
        window=options.window,
        scale=options.scale,
        softcap=options.softcap,
        alibi_slopes=options.alibi_slopes,
        sinks=options.sinks,
        dropout_p=options.dropout_p,
        dropout_seed=options.dropout_seed,
        return_lse=True,
    )
    return out_and_lse


def _fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    Nq, H, _ = q.shape
    return q.new_empty(Nq, H, v.shape[2]), q.new_empty(H, Nq, dtype=torch.float32)


def _backward_fake(
    dout: Any, dlse: Any, out: Any, lse: Any, q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, *rest: Any
) -> tuple[torch.Tensor, ...]:
    return attention_backward_fake(dout, dlse, out, lse, q, k, v, *rest, False)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs[:5], *inputs[7:17])
    ctx.scalars = inputs[17:]


def _autograd(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[Any, ...]:
    out, lse, *inputs = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv, _, dsinks = _attention_varlen_backward_op(dout, dlse, out, lse, *inputs, *ctx.scalars)
    has_sinks = inputs[7] is not None
    return (dq, dk, dv, *[None] * 6, dsinks if has_sinks else None, *[None] * 14)


_attention_varlen_op = library.define_op(
    "attention_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, "
    f"int max_seqlen_k, {OPTIONS}) -> (Tensor, Tensor)",
    _attention_varlen,
    _fake,
    setup_context=_setup_context,
    backward=_autograd,
)
_attention_varlen_backward_op = library.define_op(
    "attention_varlen_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, "
    f"Tensor cu_seqlens_q, Tensor cu_seqlens_k, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _attention_varlen_backward,
    _backward_fake,
    gradient_of="attention_varlen",
)
