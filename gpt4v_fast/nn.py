"""Modules over the ops, for people who build models from torch.nn."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gpt4v_fast.masks import Mask
from gpt4v_fast.ops.attention import attention
from gpt4v_fast.ops.loss import cross_entropy, linear_cross_entropy
from gpt4v_fast.ops.patch_embed import patch_embed
from gpt4v_fast.reference import LossStats


class Attention(nn.Module):
    """Multi-head attention with its projections: x (B, S, E) -> (B, S, E).

    Args:
        embed_dim: E.
        num_heads: H query heads.
        num_kv_heads: Hkv key and value heads, H % Hkv == 0; None: H.
        head_dim: D; None: E / H.
        bias: give the projections a bias.
        dropout_p: attention dropout while training.
        softcap: cap of the scores, or None.

    Raises:
        ValueError: sizes that do not divide.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        bias: bool = True,
        dropout_p: float = 0.0,
        softcap: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads = {num_heads}, got {num_kv_heads}")
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(f"num_heads: expected a divisor of embed_dim = {embed_dim}, got {num_heads}")
            head_dim = embed_dim // num_heads
        options: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.dropout_p, self.softcap = dropout_p, softcap
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, **options)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, **options)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, **options)
        self.out_proj = nn.Linear(num_heads * head_dim, embed_dim, **options)

    if TYPE_CHECKING:  # of nn.Module it would be Any

        def __call__(self, x: torch.Tensor, mask: Mask | None = None) -> torch.Tensor: ...

    def forward(self, x: torch.Tensor, mask: Mask | None = None) -> torch.Tensor:
        """Attends from x (B, S, E) to itself under `mask`."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout_p = self.dropout_p if self.training else 0.0
        out = attention(q, k, v, mask=mask, dropout_p=dropout_p, softcap=self.softcap)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class PatchEmbed(nn.Module):
    """Images (B, C, H, W), or video (B, C, frames, H, W), to tokens (B, N, E), normalisation and positions included.

    weight and bias have the names, shapes and initial values of nn.Conv2d's (nn.Conv3d's), so its checkpoints load.

    Args:
        in_channels: C.
        embed_dim: E.
        patch_size: P, (Ph, Pw), or (Pt, Ph, Pw) for video.
        grid: (rows, columns), or (frames, rows, columns), of patches, for a learned pos_embed (N, E); None: none.
        bias: give the projection a bias.
        mean, std, rescale: as for `gpt4v_fast.patch_embed`; uint8 images need no other preparation.

    Raises:
        ValueError: a patch_size or grid of a wrong length, or not positive.
    """

    def __init__(
        self,
        in_channels: int,
        embed_dim: int,
        patch_size: int | tuple[int, ...],
        grid: tuple[int, ...] | None = None,
        *,
        bias: bool = True,
        mean: float | tuple[float, ...] | None = None,
        std: float | tuple[float, ...] | None = None,
        rescale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        patch = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
        if len(patch) not in (2, 3) or min(patch) < 1:
            raise ValueError(f"patch_size: expected P, (Ph, Pw) or (Pt, Ph, Pw), each at least 1, got {patch_size}")
        if grid is not None and (len(grid) != len(patch) or min(grid) < 1):
            raise ValueError(f"grid: expected {len(patch)} numbers, each at least 1, got {grid}")
        self.patch_size, self.mean, self.std, self.rescale = patch, mean, std, rescale
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(embed_dim, in_channels, *patch, **options))
        self.bias = nn.Parameter(torch.empty(embed_dim, **options)) if bias else None
        table = None if grid is None else torch.empty(math.prod(grid), embed_dim, **options)
        self.pos_embed = None if table is None else nn.Parameter(table)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Convolution weights as torch does, positions from a normal distribution of standard deviation 0.02."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = self.weight[0].numel() ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def extra_repr(self) -> str:
        embed_dim, in_channels = self.weight.shape[:2]
        return f"{in_channels}, {embed_dim}, patch_size={self.patch_size}, mean={self.mean}, std={self.std}"

    if TYPE_CHECKING:

        def __call__(self, pixels: torch.Tensor) -> torch.Tensor: ...

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return patch_embed(
            pixels,
            self.weight,
            bias=self.bias,
            mean=self.mean,
            std=self.std,
            rescale=self.rescale,
            pos_embed=self.pos_embed,
        )


class CrossEntropyLoss(nn.Module):
    """`gpt4v_fast.cross_entropy` as a module: logits (..., V), target (...) -> loss.

    Takes the place of torch.nn.CrossEntropyLoss, with the classes last (torch has them second) and an fp32
    loss.

    Args:
        weight: (V,), class weights, or None; kept as a buffer.
        ignore_index, reduction, label_smoothing, z_loss, softcap, return_stats,
            inplace_backward: as for `gpt4v_fast.cross_entropy`.
    """

    weight: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        return_stats: bool = False,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.options: dict[str, Any] = {
            "ignore_index": ignore_index,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "softcap": softcap,
            "return_stats": return_stats,
            "inplace_backward": inplace_backward,
        }

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, LossStats]:
        return cross_entropy(logits, target, weight=self.weight, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class LinearCrossEntropyLoss(nn.Module):
    """A linear layer to V classes and its `gpt4v_fast.linear_cross_entropy`: hidden (..., E), target (...).

    Parameters have the names of torch.nn.LinearCrossEntropyLoss (linear.weight, linear.bias). To tie the
    layer to an embedding, assign it: `loss.linear.weight = embedding.weight`.

    Args:
        in_features: E.
        num_classes: V.
        bias: give the layer a bias.
        weight: (V,), class weights, or None; kept as a buffer.
        ignore_index, reduction, label_smoothing, z_loss, softcap, shift, return_stats: as for
            `gpt4v_fast.linear_cross_entropy`.
    """

    weight: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        reduction: str = "mean",
        weight: torch.Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        shift: int = 0,
        return_stats: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", weight)
        self.options: dict[str, Any] = {
            "ignore_index": ignore_index,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "softcap": softcap,
            "shift": shift,
            "return_stats": return_stats,
        }

    def forward(self, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, LossStats]:
        weight, bias = self.linear.weight, self.linear.bias
        return linear_cross_entropy(hidden, weight, target, bias=bias, class_weight=self.weight, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
