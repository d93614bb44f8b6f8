"""Attention over dense batches and over packed sequences: the public functions, and the call object of both.

user -> attention, attention_varlen -> AttentionCall -> gpt4v_fast::attention
                                           -> cpu.py        _C.attention_forward (csrc/attention/)
                                           or triton.py     kernels/attention/
                                           or reference.py  the oracle
docs/design.md draws the trip of a call and says what a new option touches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, overload

import torch

from gpt4v_fast import backends
from gpt4v_fast._native import _C
from gpt4v_fast.masks import Mask, check_align, check_window
from gpt4v_fast.ops import checks, library, modes
from gpt4v_fast.ops.attention import arguments, cpu, reference, triton

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from gpt4v_fast.ops.attention.options import AttentionOptions, VarlenOptions


class _AttentionFields(NamedTuple):
    """Dense: q (B, H, S, D), k (B, Hkv, T, D), v (B, Hkv, T, Dv). Packed, where cu_seqlens are given: q (Nq, H, D),
    k (Nk, Hkv, D), v (Nk, Hkv, Dv)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor | None = None  # four dimensions, each 1 or that of (B, H, S, T); float or bool
    alibi_slopes: torch.Tensor | None = None  # (H,) or (B, H) fp32
    sinks: torch.Tensor | None = None  # (H,)
    query_documents: torch.Tensor | None = None  # (B, S); the mask's ids are int32 or int64
    key_documents: torch.Tensor | None = None  # (B, T)
    query_images: torch.Tensor | None = None
    key_images: torch.Tensor | None = None
    key_lengths: torch.Tensor | None = None  # (B,)
    offsets: torch.Tensor | None = None  # (B,) int32: the diagonal of each batch entry, in place of bottom_right's
    cu_seqlens_q: torch.Tensor | None = None  # (sequences + 1,)
    cu_seqlens_k: torch.Tensor | None = None
    seed: torch.Tensor | None = None  # of dropout, one int64 on the CPU
    causal: bool = False
    bottom_right: bool = True
    window_left: int = -1  # -1: unbounded
    window_right: int = -1
    max_seqlen_q: int = -1  # -1: no limit
    max_seqlen_k: int = -1
    scale: float = 1.0
    softcap: float = 0.0  # 0: none
    dropout_p: float = 0.0


class AttentionCall(backends.Call, _AttentionFields):
    """A checked call of `attention` or `attention_varlen`."""

    __slots__ = ()
    MAIN = "q"
    FEATURE_NAMES: ClassVar = {
        "bias": None, "alibi_slopes": "alibi", "query_documents": "documents", "key_documents": "documents",
        "query_images": "image blocks", "key_images": "image blocks", "window_left": "window", "window_right": "window",
        "dropout_p": "dropout", "seed": "dropout", "cu_seqlens_q": "packed sequences",
        "cu_seqlens_k": "packed sequences", "scale": None, "bottom_right": None,
        "max_seqlen_q": None, "max_seqlen_k": None,
    }  # fmt: skip
    EXTRAS = ("gqa", "bias", "boolean bias", "head size over 256")

    @property
    def op(self) -> str:
        return "attention" if self.cu_seqlens_q is None else "attention_varlen"

    def extras(self) -> tuple[bool, ...]:
        shape, bias = self.q.shape, self.bias
        is_boolean = bias is not None and bias.dtype == torch.bool
        is_large = shape[-1] > 256 or self.v.shape[-1] > 256
        return shape[1] != self.k.shape[1], bias is not None and not is_boolean, is_boolean, is_large


class AttentionOutputs(NamedTuple):
    out: torch.Tensor  # (B, H, S, Dv), packed (Nq, H, Dv)
    lse: torch.Tensor  # (B, H, S) fp32, packed (H, Nq)


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[AttentionOptions],
) -> torch.Tensor: ...
@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, return_lse: Literal[True], **options: Unpack[AttentionOptions]
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, return_lse: bool, **options: Unpack[AttentionOptions]
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...
@backends.explained
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
    if not modes.attention_tensors_fit(q, k, v, ndim=4, heads=1) or q.shape[0] != k.shape[0]:
        q, k, v = arguments.check_qkv(q, k, v)
    B, H, S, D = q.shape
    T = k.shape[2]
    if mask is None:
        mask = _NO_MASK
    elif not isinstance(mask, Mask):
        raise TypeError(f"mask: expected a gpt4v_fast.Mask (dense masks go to bias), got {type(mask).__name__}")
    ids = mask.resolve(B, S, T, q.device)
    left, right = mask.window or (None, None)
    dropout_p = checks.check_probability("dropout_p", dropout_p)
    call = AttentionCall(
        q,
        k,
        v,
        bias=arguments.check_bias(bias, q, (B, H, S, T)),
        alibi_slopes=arguments.check_alibi(alibi_slopes, q, B, H),
        sinks=arguments.check_sinks(sinks, q, H),
        query_documents=ids.query_documents,
        key_documents=ids.key_documents,
        query_images=ids.query_images,
        key_images=ids.key_images,
        key_lengths=ids.key_lengths,
        seed=arguments.draw_seed(dropout_p),
        causal=bool(mask.causal),
        bottom_right=mask.align == "bottom_right",
        window_left=-1 if left is None else int(left),
        window_right=-1 if right is None else int(right),
        scale=checks.check_scale(scale, D),
        softcap=checks.check_softcap(softcap),
        dropout_p=dropout_p,
    )
    out, lse = _attention_op(call)
    return (out, lse) if return_lse else out


@overload
def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[VarlenOptions],
) -> torch.Tensor: ...
@overload
def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    return_lse: Literal[True],
    **options: Unpack[VarlenOptions],
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    return_lse: bool,
    **options: Unpack[VarlenOptions],
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...
@backends.explained
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
    if not (modes.attention_tensors_fit(q, k, v, ndim=3, heads=1) and _C.do_starts_fit(cu_seqlens_q, cu_seqlens_k)):
        q, k, v = arguments.check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k)
    _, H, D = q.shape
    check_align(align)
    check_window(window)
    left, right = window or (None, None)
    dropout_p = checks.check_probability("dropout_p", dropout_p)
    call = AttentionCall(
        q,
        k,
        v,
        alibi_slopes=arguments.check_alibi(alibi_slopes, q, cu_seqlens_q.shape[0] - 1, H),
        sinks=arguments.check_sinks(sinks, q, H),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seed=arguments.draw_seed(dropout_p),
        causal=bool(causal),
        bottom_right=align == "bottom_right",
        window_left=-1 if left is None else int(left),
        window_right=-1 if right is None else int(right),
        max_seqlen_q=arguments.check_longest("max_seqlen_q", max_seqlen_q),
        max_seqlen_k=arguments.check_longest("max_seqlen_k", max_seqlen_k),
        scale=checks.check_scale(scale, D),
        softcap=checks.check_softcap(softcap),
        dropout_p=dropout_p,
    )
    out, lse = _attention_varlen_op(call)
    return (out, lse) if return_lse else out


_NO_MASK = Mask()

backends.register("attention", cpu.Attention(), triton.Attention(), reference.Attention())
backends.register("attention_varlen", cpu.Attention("_C.attention (varlen)"), reference.Attention())
_C.read_attention_calls(AttentionCall._fields)


def _fake(call: AttentionCall) -> AttentionOutputs:
    q, Dv = call.q, call.v.shape[-1]
    statistics = q.shape[:3] if call.cu_seqlens_q is None else (q.shape[1], q.shape[0])
    return AttentionOutputs(q.new_empty(*q.shape[:-1], Dv), q.new_empty(statistics, dtype=torch.float32))


def _define(name: str) -> Callable[[AttentionCall], AttentionOutputs]:
    gradient = library.Gradient(
        run=backends.backward,
        of=("q", "k", "v", "bias", "sinks"),
        saves=("out", "lse"),
        constants=(),
        function=name,
    )
    return library.define(name, AttentionCall, AttentionOutputs, run=backends.forward, fake=_fake, gradient=gradient)


_attention_op, _attention_varlen_op = _define("attention"), _define("attention_varlen")
