"""What the attention ops take: their options, the checks of single arguments, and how the extension gets them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from gpt4v_fast._native import threads
from gpt4v_fast.masks import MaskTensors
from gpt4v_fast.ops import checks

# AttentionOptions in torch's schema language.
OPTIONS = (
    "Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, Tensor? query_documents, Tensor? key_documents, "
    "Tensor? query_images, Tensor? key_images, Tensor? key_lengths, Tensor? offsets, Tensor? seed, bool causal, "
    "bool bottom_right, int window_left, int window_right, float scale, float softcap, float dropout_p"
)

# What a call may have that not every kernel takes.
FEATURES = (
    "bias", "boolean bias", "alibi", "sinks", "documents", "image blocks", "key lengths", "offsets", "causal", "window",
    "softcap", "dropout",
)  # fmt: skip


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

    def kind(self) -> tuple[bool, ...]:
        """Which of FEATURES the call has."""
        has_bias, is_boolean = self.bias is not None, self.bias is not None and self.bias.dtype == torch.bool
        return (
            has_bias and not is_boolean,
            is_boolean,
            self.alibi_slopes is not None,
            self.sinks is not None,
            self.query_documents is not None,
            self.query_images is not None,
            self.key_lengths is not None,
            self.offsets is not None,
            self.causal,
            self.window_left >= 0 or self.window_right >= 0,
            self.softcap > 0,
            self.dropout_p > 0,
        )

    def features(self) -> set[str]:
        return {name for name, is_there in zip(FEATURES, self.kind(), strict=True) if is_there}


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
    """Calls `_C.attention_forward` or `_C.attention_backward`; `gradients` are the latter's further tensors.

    `cu_seqlens` are int32. Raises ValueError for key lengths that int32 does not hold.
    """
    ids: tuple[torch.Tensor | None, ...] = options[3:8]
    if ids[0] is not None or ids[2] is not None or ids[4] is not None:
        ids = _native_ids(*ids)
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
        *ids,
        options.offsets,
        *cu_seqlens,
        *options[10:],  # numbers
        options.dropout_seed,
        out,
        lse,
        *gradients,
        threads(),
    )


def _native_ids(
    query_documents: torch.Tensor | None,
    key_documents: torch.Tensor | None,
    query_images: torch.Tensor | None,
    key_images: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    """MaskTensors in int32, as the extension takes them."""
    return (
        *_int32_ids(query_documents, key_documents),
        *_int32_ids(query_images, key_images),
        None if key_lengths is None else checks.check_int32("key_lengths", key_lengths),
    )


def _int32_ids(
    queries: torch.Tensor | None, keys: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Ids in int32. Where it does not hold them: their ranks in the call, negative where they are; order stays."""
    if queries is None or keys is None or queries.dtype == keys.dtype == torch.int32:
        return queries, keys
    if checks.fits_int32(queries) and (keys is queries or checks.fits_int32(keys)):
        narrow = queries.to(torch.int32)
        return narrow, narrow if keys is queries else keys.to(torch.int32)
    distinct, ranks = torch.cat([queries.reshape(-1), keys.reshape(-1)]).unique(return_inverse=True)
    ranks = (ranks - (distinct < 0).sum()).to(torch.int32)
    return ranks[: queries.numel()].view(queries.shape), ranks[queries.numel() :].view(keys.shape)
