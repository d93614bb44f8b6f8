"""The layers of the GPT-4V family: attention, ViT blocks over `gf.patch_embed`, the projector, the decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import gpt4v_fast as gf

from .attention_gpt4v import eager_attention_forward
from .configuration_gpt4v import GPT4VConfig, GPT4VTextConfig, GPT4VVisionConfig


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """True where a kernel that reads weight and bias computes what a call of `module` does. Adapters, quantized layers,
    offloading and hooks change the class, the weight's class, the forward method or the call."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return (
        type(module) is kind
        and type(module.weight) in (nn.Parameter, torch.Tensor)
        and "forward" not in module.__dict__
        and not any(hooks)
    )


def rotary_tables(
    position_ids: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (B, 1, S, D) of RoFormer's rotary embedding (arXiv:2104.09864, eq. 34), angles in fp32."""
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    angles = position_ids[:, None, :, None].float() * theta**-exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (B, H, S, D) turned by the angles; the two halves of the head are the pairs, as in Llama."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class GPT4VAttention(nn.Module):
    """Grouped-query attention of both towers; the decoder's rotates queries and keys and may use a cache.

    `places` (first, end) are those of the new tokens in a static cache, one of fixed length (transformers 5.0 asks for
    them); None for caches that grow.
    """

    is_causal = False  # the mask says everything

    def __init__(self, config: GPT4VVisionConfig | GPT4VTextConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim, self.scaling = config.head_dim, config.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        width, kv_width = (
            config.num_attention_heads * self.head_dim,
            config.num_key_value_heads * self.head_dim,
        )
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        places: tuple[int, int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, H or Hkv, S, D)
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        if past_key_values is not None:
            options = [] if places is None else [{"cache_position": torch.arange(*places, device=key.device)}]
            key, value = past_key_values.update(key, value, self.layer_idx, *options)
            if places is not None:
                key, value = key[:, :, : places[1]], value[:, :, : places[1]]  # without the rows that are free yet
        implementation = self.config._attn_implementation
        attend: Callable = (
            eager_attention_forward if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
        )
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
        )
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights


class GPT4VVisionMLP(nn.Module):
    def __init__(self, config: GPT4VVisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class GPT4VSwiGLU(nn.Module):
    """down(silu(gate x) * up x): arXiv:2002.05202, eq. 6."""

    def __init__(self, config: GPT4VTextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.act = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class GPT4VBlock(GradientCheckpointingLayer):
    """Pre-norm residual block of either tower."""

    def __init__(self, config: GPT4VVisionConfig | GPT4VTextConfig, layer_idx: int):
        super().__init__()
        vision = isinstance(config, GPT4VVisionConfig)
        norm, eps = (
            (nn.LayerNorm, config.layer_norm_eps)
            if isinstance(config, GPT4VVisionConfig)
            else (nn.RMSNorm, config.rms_norm_eps)
        )
        self.norm1 = norm(config.hidden_size, eps=eps)
        self.self_attn = GPT4VAttention(config, layer_idx)
        self.norm2 = norm(config.hidden_size, eps=eps)
        self.mlp = GPT4VVisionMLP(config) if vision else GPT4VSwiGLU(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        places: tuple[int, int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        out, weights = self.self_attn(self.norm1(hidden_states), attention_mask, rotary, past_key_values, places)
        hidden_states = hidden_states + self.dropout(out)
        return hidden_states + self.dropout(self.mlp(self.norm2(hidden_states))), weights


class GPT4VVisionTower(nn.Module):
    """pixels (N, C, H, W) -> features (N, rows * columns, E): patch embedding, position embedding, ViT
    blocks."""

    def __init__(self, config: GPT4VVisionConfig):
        super().__init__()
        self.config = config
        size = config.patch_size
        self.patch_embedding = nn.Conv2d(config.num_channels, config.hidden_size, size, stride=size)
        self.position_embedding = nn.Parameter(torch.zeros(config.grid, config.grid, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList([GPT4VBlock(config, i) for i in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def positions(self, rows: int, columns: int) -> torch.Tensor:
        """The position table (rows * columns, E), interpolated bicubically for images of another size."""
        table: torch.Tensor = self.position_embedding
        if (rows, columns) != tuple(table.shape[:2]):
            grid = table.permute(2, 0, 1)[None].float()
            grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
            table = grid[0].permute(1, 2, 0).to(table.dtype)
        return table.flatten(0, 1)

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        config, conv = self.config, self.patch_embedding
        rows, columns = (side // config.patch_size for side in pixels.shape[-2:])
        mean = torch.tensor(config.image_mean, device=pixels.device)
        std = torch.tensor(config.image_std, device=pixels.device)
        positions = self.positions(rows, columns)
        if config.patch_embed_implementation == "gpt4v_fast" and is_plain(conv, nn.Conv2d):
            return gf.patch_embed(pixels, conv.weight, bias=conv.bias, mean=mean, std=std, pos_embed=positions)
        scaled = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
        normal = (scaled - mean[:, None, None]) / std[:, None, None]
        return conv(normal.to(positions.dtype)).flatten(2).transpose(1, 2) + positions

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        hidden_states = self.dropout(self.embed(pixels))
        for layer in self.layers:
            hidden_states, _ = layer(hidden_states)
        return self.norm(hidden_states)


class GPT4VProjector(nn.Module):
    """Joins squares of m x m patches side by side, then a 2-layer MLP into the decoder's width."""

    def __init__(self, config: GPT4VConfig):
        super().__init__()
        self.merge = config.projector_merge
        width = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_size * self.merge**2, width)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        m = self.merge
        if m > 1:
            squares = features.view(len(features), rows // m, m, columns // m, m, -1).transpose(2, 3)
            features = squares.flatten(3).flatten(1, 2)  # (N, tokens, m * m * E)
        return self.linear_2(self.act(self.linear_1(features)))


class GPT4VDecoder(nn.Module):
    """The text's blocks and the last norm; `embed_tokens` is called by the model, which puts images among the text."""

    def __init__(self, config: GPT4VTextConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList([GPT4VBlock(config, i) for i in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        embeds: torch.Tensor,
        mask: Any,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cache: Cache | None = None,
        places: tuple[int, int] | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], tuple[torch.Tensor | None, ...]]:
        """The last hidden states; those that each block got; each block's attention weights (None but for eager)."""
        hidden_states = self.dropout(embeds)
        states, weights = [], []
        for layer in self.layers:
            states.append(hidden_states)
            # by position: some versions of transformers drop a cache passed by name, even where nothing is recomputed
            hidden_states, layer_weights = layer(hidden_states, mask, rotary, cache, places)
            weights.append(layer_weights)
        return self.norm(hidden_states), tuple(states), tuple(weights)
