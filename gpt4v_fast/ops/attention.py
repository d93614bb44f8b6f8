"""Attention over dense batches: the public function, its torch ops, and the ways to a kernel.

user -> attention -> gpt4v_fast::attention -> _C.attention_forward (csrc/kernels/attention.h)
                                           or kernels/attention.py (Triton)
                                           or reference.attention_core
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from gpt4v_fast import backends, reference
from gpt4v_fast._native import _C, last_dim_contiguous, threads
from gpt4v_fast.masks import Mask, MaskTensors
from gpt4v_fast.ops import checks, library

TRITON_FEATURES = frozenset({"causal", "gqa", "softcap"})
TRITON_MAX_HEAD_DIM = 256

_OPTIONS = (
    "Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, Tensor? query_documents, Tensor? key_documents, "
    "Tensor? query_images, Tensor? key_images, Tensor? key_lengths, Tensor? offsets, Tensor? seed, bool causal, "
    "bool bottom_right, int window_left, int window_right, float scale, float softcap, float dropout_p"
)


_NO_MASK = Mask()


class AttentionOptions(NamedTuple):
    """The arguments of the ops behind q, k and v, in the schema's order; -1 is an unbounded side of the window."""

    bias: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    query_documents: torch.Tensor | None
    key_documents: torch.Tensor | None
    query_images: torch.Tensor | None
    key_images: torch.Tensor | None
    key_lengths: torch.Tensor | None
    offsets: torch.Tensor | None
    seed: torch.Tensor | None
    causal: bool
    bottom_right: bool
    window_left: int
    window_right: int
    scale: float
    softcap: float
    dropout_p: float

    @property
    def ids(self) -> MaskTensors:
        return MaskTensors(
            self.query_documents, self.key_documents, self.query_images, self.key_images, self.key_lengths
        )

    @property
    def window(self) -> tuple[int | None, int | None]:
        left, right = self.window_left, self.window_right
        return (None if left < 0 else left, None if right < 0 else right)

    @property
    def dropout_seed(self) -> int:
        return int(self.seed.item()) if self.seed is not None else 0

    def offset(self, S: int, T: int) -> int | torch.Tensor:
        if self.offsets is not None:
            return self.offsets
        return T - S if self.bottom_right else 0

    def kind(self) -> tuple[Any, ...]:
        """What decides `features`."""
        return (
            None if self.bias is None else self.bias.dtype,
            self.alibi_slopes is None,
            self.sinks is None,
            self.query_documents is None,
            self.query_images is None,
            self.key_lengths is None,
            self.offsets is None,
            self.causal,
            self.window_left >= 0 or self.window_right >= 0,
            self.softcap > 0,
            self.dropout_p > 0,
        )

    def features(self) -> set[str]:
        found = set()
        if self.bias is not None:
            found.add("boolean bias" if self.bias.dtype == torch.bool else "bias")
        if self.alibi_slopes is not None:
            found.add("alibi")
        if self.sinks is not None:
            found.add("sinks")
        if self.query_documents is not None:
            found.add("documents")
        if self.query_images is not None:
            found.add("image blocks")
        if self.key_lengths is not None:
            found.add("key lengths")
        if self.offsets is not None:
            found.add("offsets")
        if self.causal:
            found.add("causal")
        if self.window_left >= 0 or self.window_right >= 0:
            found.add("window")
        if self.softcap > 0:
            found.add("softcap")
        if self.dropout_p > 0:
            found.add("dropout")
        return found


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
    """Checks `attention`'s arguments and returns those of the torch op."""
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


def check_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Dtypes, devices and sizes of q (B, H, S, D), k (B, Hkv, T, D), v (B, Hkv, T, Dv)."""
    checks.check_like("k", k, "q", q)
    checks.check_like("v", v, "q", q)
    B, H, _, D = q.shape
    Hkv, T = k.shape[1], k.shape[2]
    if Hkv == 0 or H % Hkv:
        raise ValueError(f"k: expected a number of heads that divides q's {H}, got {Hkv}")
    checks.check_shape("k", k, (B, Hkv, T, D), "(B, Hkv, T, D)")
    checks.check_shape("v", v, (B, Hkv, T, v.shape[3]), "(B, Hkv, T, Dv)")


def check_bias(bias: torch.Tensor | None, q: torch.Tensor, shape: tuple[int, int, int, int]) -> torch.Tensor | None:
    """The bias with four dimensions, each 1 or the full size."""
    if bias is None:
        return None
    checks.check_tensor("bias", bias, dtypes=(*checks.FLOAT_DTYPES, torch.bool))
    checks.check_device("bias", bias, "q", q)
    padded = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    # Spelled with ==: under torch.compile, `in` does not compare a number with a symbolic size.
    if len(padded) != 4 or any(size != 1 and size != full for size, full in zip(padded, shape, strict=True)):
        raise ValueError(f"bias: expected a shape broadcastable to (B, H, S, T) = {shape}, got {tuple(bias.shape)}")
    return bias.reshape(padded) if bias.dim() < 4 else bias


def check_alibi(slopes: torch.Tensor | None, q: torch.Tensor, B: int, H: int) -> torch.Tensor | None:
    if slopes is None:
        return None
    checks.check_tensor("alibi_slopes", slopes, dtypes=(torch.float32,))
    checks.check_device("alibi_slopes", slopes, "q", q)
    if tuple(slopes.shape) != (H,) and tuple(slopes.shape) != (B, H):
        raise ValueError(f"alibi_slopes: expected shape {(H,)} or {(B, H)}, got {tuple(slopes.shape)}")
    if slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "alibi_slopes: expected a tensor that needs no gradient (use bias to learn one), got one that does"
        )
    return slopes


def check_sinks(sinks: torch.Tensor | None, q: torch.Tensor, H: int) -> torch.Tensor | None:
    if sinks is None:
        return None
    checks.check_tensor("sinks", sinks)
    checks.check_device("sinks", sinks, "q", q)
    checks.check_shape("sinks", sinks, (H,), "(H,)")
    return sinks


def draw_seed(dropout_p: float) -> torch.Tensor | None:
    """A seed of the dropout stream from torch's CPU generator (a CPU tensor: reading it never waits for a GPU)."""
    return torch.randint(2**62, (1,), dtype=torch.int64) if dropout_p > 0 else None


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
        from gpt4v_fast.kernels import attention as kernel

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
        from gpt4v_fast.kernels import attention as kernel

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


def call_native(
    function: Callable[..., None],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: AttentionOptions,
    out: torch.Tensor,
    lse: torch.Tensor,
    *gradients: torch.Tensor | None,
    cu_seqlens: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
) -> None:
    """Calls `_C.attention_forward` or `_C.attention_backward`; `gradients` are the latter's further tensors."""
    sinks = options.sinks
    if sinks is not None and sinks.dtype != torch.float32:
        sinks = sinks.float()
    function(
        q,
        k,
        v,
        options.bias,
        options.alibi_slopes,
        sinks,
        *options[3:9],  # ids, key lengths and offsets
        *cu_seqlens,
        *options[10:],  # numbers
        options.dropout_seed,
        out,
        lse,
        *gradients,
        threads(),
    )


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
    f"attention(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    _attention,
    _attention_fake,
    setup_context=_setup_context,
    backward=_autograd,
)
_attention_backward_op = library.define_op(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, "
    f"{_OPTIONS}, bool needs_dbias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _attention_backward,
    attention_backward_fake,
    gradient_of="attention",
)
