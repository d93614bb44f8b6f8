"""The mask of vision-language attention, as O(tokens) ids instead of an S x T tensor."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import NamedTuple

import torch

Ids = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class MaskTensors(NamedTuple):
    """A mask's ids, checked against the shapes of one call; None where the mask has no such part."""

    query_documents: torch.Tensor | None
    key_documents: torch.Tensor | None
    query_images: torch.Tensor | None
    key_images: torch.Tensor | None
    key_lengths: torch.Tensor | None


_NO_IDS = MaskTensors(None, None, None, None, None)


@dataclass(frozen=True, eq=False)
class Mask:
    """Who sees whom. Query i (of S) may see key j (of T) when all of these hold:

    - causal is off, or j <= i + offset, or both stand in the same image block;
    - i + offset - left <= j <= i + offset + right, for window = (left, right), None for unbounded;
    - both are in the same document, and its id is not negative;
    - j < key_lengths[b].

    Args:
        causal: order matters.
        align: "bottom_right" puts the diagonal at offset = T - S (FlashAttention, KV caches); "top_left" at 0 (the
            `is_causal` of F.scaled_dot_product_attention). It moves the window and ALiBi's distances too.
        window: (left, right), tokens seen on either side of the diagonal, or None.
        documents: int32 or int64 ids (B, S), where S == T, or a pair ((B, S), (B, T)); a negative id is padding that
            neither sees nor is seen.
        image_blocks: ids, likewise; tokens with the same id see each other whatever the order; a negative id is text.
        key_lengths: (B,) int32 or int64, the number of keys that count in each batch entry.

    int32 saves time on a CPU; ids of 64 bits are exact too. CPU kernels refuse key_lengths that are negative or that
    int32 does not hold; on a GPU, where looking would mean waiting, such a length means all keys, or none, as the last
    rule says.

    Raises:
        ValueError, TypeError: at construction for a bad align, window or dtype; at the call for ids of a wrong shape,
            or lengths as said above.
    """

    causal: bool = False
    align: str = "bottom_right"
    window: tuple[int | None, int | None] | None = None
    documents: Ids | None = None
    image_blocks: Ids | None = None
    key_lengths: torch.Tensor | None = None

    def __post_init__(self) -> None:
        check_align(self.align)
        check_window(self.window)
        for name in ("documents", "image_blocks", "key_lengths"):
            value = getattr(self, name)
            parts = value if isinstance(value, tuple) else (value,)
            if isinstance(value, tuple) and len(value) != 2:
                raise ValueError(f"{name}: expected ids or a pair (of queries, of keys), got {len(value)} tensors")
            for part in parts:
                if part is not None:
                    _check_ids(name, part)

    def offset(self, S: int, T: int) -> int:
        """How far the diagonal lies to the right of the top-left corner's."""
        return T - S if self.align == "bottom_right" else 0

    def resolve(self, B: int, S: int, T: int, device: torch.device) -> MaskTensors:
        """The mask's ids, checked against one call's sizes and device."""
        if self.documents is None and self.image_blocks is None and self.key_lengths is None:
            return _NO_IDS
        query_documents, key_documents = _pair("documents", self.documents, B, S, T, device)
        query_images, key_images = _pair("image_blocks", self.image_blocks, B, S, T, device)
        lengths = self.key_lengths
        if lengths is not None:
            lengths = _check_place("key_lengths", lengths, (B,), device)
        return MaskTensors(query_documents, key_documents, query_images, key_images, lengths)

    def dense(self, S: int, T: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """The boolean tensor, True where a query may see a key: (S, T), or (B, 1, S, T) where the mask has ids.

        It broadcasts against scores (B, H, S, T) and is meant for looking, for oracles and for other libraries.
        """
        device = torch.device(device)
        B = next((part.shape[0] for part in self._parts()), 1)
        return dense_mask(
            S,
            T,
            device,
            causal=self.causal,
            offset=self.offset(S, T),
            window=self.window or (None, None),
            ids=self.resolve(B, S, T, device),
        )

    def _parts(self) -> list[torch.Tensor]:
        values = (self.documents, self.image_blocks, self.key_lengths)
        return [v[0] if isinstance(v, tuple) else v for v in values if v is not None]


def dense_mask(
    S: int,
    T: int,
    device: torch.device,
    *,
    causal: bool,
    offset: int | torch.Tensor,
    window: tuple[int | None, int | None],
    ids: MaskTensors,
) -> torch.Tensor:
    """The definition of the mask, in plain PyTorch: (S, T), or (B, 1, S, T) where ids or offsets differ by entry.

    `offset` is a number or a (B,) tensor.
    """
    i = torch.arange(S, device=device)[:, None]
    j = torch.arange(T, device=device)[None, :]
    if isinstance(offset, torch.Tensor):
        offset = offset.to(torch.int64).view(-1, 1, 1, 1)
    distance = j - i - offset
    allowed = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        allowed = distance <= 0
        if ids.query_images is not None and ids.key_images is not None:
            query, key = ids.query_images[:, None, :, None], ids.key_images[:, None, None, :]
            allowed = allowed | ((query == key) & (query >= 0))
    left, right = window
    if left is not None:
        allowed = allowed & (distance >= -left)
    if right is not None:
        allowed = allowed & (distance <= right)
    if ids.query_documents is not None and ids.key_documents is not None:
        query, key = ids.query_documents[:, None, :, None], ids.key_documents[:, None, None, :]
        allowed = allowed & (query == key) & (query >= 0)
    if ids.key_lengths is not None:
        allowed = allowed & (j < ids.key_lengths.view(-1, 1, 1, 1))
    return allowed


def check_align(align: str) -> None:
    if align not in ("bottom_right", "top_left"):
        raise ValueError(f'align: expected "bottom_right" or "top_left", got {align!r}')


def check_window(window: tuple[int | None, int | None] | None) -> None:
    """Raises ValueError unless `window` is None or a pair of non-negative numbers or Nones."""
    if window is None:
        return
    good = isinstance(window, tuple | list) and len(window) == 2
    if not good or not all(side is None or (_is_integer(side) and 0 <= side < 2**63) for side in window):
        raise ValueError(
            "window: expected None or (left, right), each None or a number of tokens >= 0 that int64 holds, got "
            f"{window!r}"
        )


def _is_integer(x: object) -> bool:
    return isinstance(x, int | numbers.Integral)  # int: torch.compile knows the second of constants alone


def _check_ids(name: str, ids: torch.Tensor) -> None:
    if not isinstance(ids, torch.Tensor):
        raise TypeError(f"{name}: expected an int32 or int64 tensor, got {type(ids).__name__}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected an int32 or int64 tensor, got {ids.dtype}")


def _check_place(name: str, ids: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    if tuple(ids.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(ids.shape)}")
    if ids.device != device and ids.device.type != device.type:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {ids.device}")
    return ids


def _pair(
    name: str, ids: Ids | None, B: int, S: int, T: int, device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if ids is None:
        return None, None
    if isinstance(ids, tuple):
        query, key = ids
        return (
            _check_place(f"{name}[0] (of queries)", query, (B, S), device),
            _check_place(f"{name}[1] (of keys)", key, (B, T), device),
        )
    if S != T:
        raise ValueError(
            f"{name}: expected a pair ((B, S), (B, T)), since S = {S} and T = {T} differ, got one tensor of shape "
            f"{tuple(ids.shape)}"
        )
    ids = _check_place(name, ids, (B, S), device)
    return ids, ids
