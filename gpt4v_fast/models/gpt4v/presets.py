"""Sizes of the family, from one that trains in minutes on two cores to the size of the largest open models.

OpenAI has not published the size of GPT-4V, so the largest presets follow the largest open vision-language
models: the encoders are ViT-L/14 (CLIP), SoViT-400m (SigLIP) and ViT-6B (InternVL), the decoders Llama 2
and 3.

| preset | parameters | image | tokens an image | encoder, width x layers | decoder, width x layers (heads) |
|---|---|---|---|---|---|
| tiny | 1,186,336 | 32 | 4 | 96 x 3 | 128 x 4 (4, 2) |
| small | 21,182,848 | 112 | 16 | 256 x 6 | 384 x 8 (6, 2) |
| base | 123,482,496 | 224 | 64 | 384 x 12 | 768 x 12 (12, 4) |
| 1b | 1,014,517,248 | 336 | 144 | 1024 x 24 | 1536 x 24 (12, 4) |
| 8b | 8,479,248,112 | 448 | 256 | 1152 x 27 | 4096 x 32 (32, 8) |
| 13b | 13,350,836,224 | 336 | 576 | 1024 x 24 | 5120 x 40 (40, 40) |
| 70b | 76,262,329,344 | 448 | 256 | 3200 x 45 | 8192 x 80 (64, 8) |
| 405b | 411,868,212,224 | 448 | 256 | 3200 x 45 | 16384 x 126 (128, 8) |

Heads are those of queries, and of keys and values; parameters count encoder, projector and decoder.
"""

from __future__ import annotations

from typing import Any


def _vision(hidden: int, layers: int, heads: int, image: int, patch: int, mlp: int | None = None) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": image,
        "patch_size": patch,
        "intermediate_size": 4 * hidden if mlp is None else mlp,
    }


def _text(
    vocab: int,
    hidden: int,
    mlp: int,
    layers: int,
    heads: int,
    kv: int,
    positions: int,
    theta: float = 10000.0,
) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": positions,
        "rope_theta": theta,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "vision_config": _vision(96, 3, 4, 32, 8, 288),
        "text_config": _text(640, 128, 352, 4, 4, 2, 512),
        "projector_merge": 2,
        "tie_word_embeddings": True,
    },
    "small": {
        "vision_config": _vision(256, 6, 4, 112, 14),
        "text_config": _text(8192, 384, 1024, 8, 6, 2, 2048),
        "projector_merge": 2,
        "tie_word_embeddings": True,
    },
    "base": {
        "vision_config": _vision(384, 12, 6, 224, 14),
        "text_config": _text(32000, 768, 2048, 12, 12, 4, 4096),
        "projector_merge": 2,
        "tie_word_embeddings": True,
    },
    "1b": {
        "vision_config": _vision(1024, 24, 16, 336, 14),
        "text_config": _text(64000, 1536, 4096, 24, 12, 4, 8192, 1e5),
        "projector_merge": 2,
        "tie_word_embeddings": True,
    },
    "8b": {
        "vision_config": _vision(1152, 27, 16, 448, 14, 4304),
        "text_config": _text(128256, 4096, 14336, 32, 32, 8, 16384, 5e5),
        "projector_merge": 2,
        "tie_word_embeddings": False,
    },
    "13b": {
        "vision_config": _vision(1024, 24, 16, 336, 14),
        "text_config": _text(32000, 5120, 13824, 40, 40, 40, 4096),
        "projector_merge": 1,
        "tie_word_embeddings": False,
    },
    "70b": {
        "vision_config": _vision(3200, 45, 25, 448, 14, 12800),
        "text_config": _text(128256, 8192, 28672, 80, 64, 8, 32768, 5e5),
        "projector_merge": 2,
        "tie_word_embeddings": False,
    },
    "405b": {
        "vision_config": _vision(3200, 45, 25, 448, 14, 12800),
        "text_config": _text(128256, 16384, 53248, 126, 128, 8, 131072, 5e5),
        "projector_merge": 2,
        "tie_word_embeddings": False,
    },
}


def parameter_count(preset: str) -> int:
    """Parameters of a preset, tied ones once; built on the meta device, so that 400 billion cost nothing."""
    import torch

    from .configuration_gpt4v import GPT4VConfig
    from .modeling_gpt4v import GPT4VForConditionalGeneration

    with torch.device("meta"):
        model = GPT4VForConditionalGeneration(GPT4VConfig.from_preset(preset))
    model.tie_weights()  # some versions of transformers leave it out on the meta device
    return sum(p.numel() for p in model.parameters())


__all__ = ["PRESETS", "parameter_count"]
