"""Configuration of the GPT-4V family: a ViT encoder, a projector and a decoder."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

IMPLEMENTATIONS = {
    "patch_embed_implementation": ("gpt4v_fast", "conv"),
    "loss_implementation": ("gpt4v_fast", "torch"),
}


def _require(holds: bool, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{expected}, got {got}")


def _check_choice(config: PreTrainedConfig, name: str) -> None:
    value = getattr(config, name)
    if value not in IMPLEMENTATIONS[name]:
        raise ValueError(f"{type(config).__name__}: {name} must be one of {IMPLEMENTATIONS[name]}, got {value!r}")


class GPT4VVisionConfig(PreTrainedConfig):
    """The vision tower: patches of `patch_size`, a learned 2-D position embedding, pre-norm ViT blocks.

    `image_mean` and `image_std` stand here and not in the image processor, since the patch embedding
    normalises (`(x / 255 - mean) / std` for uint8 pixels). `patch_embed_implementation` is "gpt4v_fast" or,
    for comparison, "conv" (the same parameters through `F.conv2d`).
    """

    model_type = "gpt4v_vision"
    base_config_key = "vision_config"

    def __init__(
        self,
        hidden_size: int = 64,
        intermediate_size: int | None = None,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 4,
        num_channels: int = 3,
        image_size: int = 32,
        patch_size: int = 8,
        hidden_act: str = "gelu_pytorch_tanh",
        layer_norm_eps: float = 1e-6,
        attention_dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        image_mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        image_std: tuple[float, ...] = (0.5, 0.5, 0.5),
        initializer_range: float = 0.02,
        patch_embed_implementation: str = "gpt4v_fast",
        **kwargs: Any,
    ):
        self.hidden_size = hidden_size
        self.intermediate_size = 4 * hidden_size if intermediate_size is None else intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads
        self.head_dim = hidden_size // max(num_attention_heads, 1)
        self.num_channels = num_channels
        self.image_size = image_size
        self.patch_size = patch_size
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.attention_bias = True
        self.attention_dropout = attention_dropout
        self.hidden_dropout = hidden_dropout
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.initializer_range = initializer_range
        self.patch_embed_implementation = patch_embed_implementation
        _check_choice(self, "patch_embed_implementation")
        _require(
            num_attention_heads > 0 and hidden_size > 0 and hidden_size % num_attention_heads == 0,
            "vision hidden_size must be a positive multiple of num_attention_heads",
            (hidden_size, num_attention_heads),
        )
        _require(
            patch_size > 0 and image_size > 0 and image_size % patch_size == 0,
            "image_size must be a positive multiple of patch_size",
            (image_size, patch_size),
        )
        _require(
            len(self.image_mean) == len(self.image_std) == num_channels,
            f"image_mean and image_std must have num_channels={num_channels} values",
            (self.image_mean, self.image_std),
        )
        for name in ("num_key_value_heads", "head_dim", "attention_bias"):  # derived here, stored by to_dict
            kwargs.pop(name, None)
        super().__init__(**kwargs)

    @property
    def grid(self) -> int:
        """Patches along one side of an image."""
        return self.image_size // self.patch_size


class GPT4VTextConfig(PreTrainedConfig):
    """The decoder: RMSNorm, rotary position embedding, grouped-query attention, SwiGLU."""

    model_type = "gpt4v_text"
    base_config_key = "text_config"

    def __init__(
        self,
        vocab_size: int = 512,
        hidden_size: int = 128,
        intermediate_size: int | None = None,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        hidden_act: str = "silu",
        max_position_embeddings: int = 1024,
        rope_theta: float = 10000.0,
        rms_norm_eps: float = 1e-6,
        attention_bias: bool = False,
        attention_dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        # 8/3 of the width, as SwiGLU has three matrices where an MLP has two, rounded up to whole cache lines
        self.intermediate_size = -(-hidden_size * 8 // 3 // 32) * 32 if intermediate_size is None else intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = hidden_size // max(num_attention_heads, 1) if head_dim is None else head_dim
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        # rope_theta also travels inside rope_parameters, the place where transformers 5 writes it
        rope = kwargs.pop("rope_parameters", None) or {}
        self.rope_theta = float(rope.get("rope_theta", rope_theta))
        self.rms_norm_eps = rms_norm_eps
        self.attention_bias = attention_bias
        self.attention_dropout = attention_dropout
        self.hidden_dropout = hidden_dropout
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        _require(vocab_size > 0, "vocab_size must be positive", vocab_size)
        _require(
            self.num_key_value_heads > 0
            and num_attention_heads > 0
            and num_attention_heads % self.num_key_value_heads == 0,
            "num_attention_heads must be a positive multiple of num_key_value_heads",
            (num_attention_heads, self.num_key_value_heads),
        )
        _require(self.head_dim > 0 and self.head_dim % 2 == 0, "head_dim must be positive and even", self.head_dim)
        window, kinds = kwargs.get("sliding_window"), set(kwargs.get("layer_types") or ())
        _require(
            window is None and kinds <= {"full_attention"},
            "the decoder sees all earlier tokens: sliding_window must be None and layer_types full_attention",
            (window, sorted(kinds)),
        )
        super().__init__(**kwargs)


class GPT4VConfig(PreTrainedConfig):
    """A whole model.

    Args:
        vision_config, text_config: `GPT4VVisionConfig` and `GPT4VTextConfig`, or dictionaries of their
            arguments.
        image_token_id: the id of `<image>`; each image takes `image_seq_length` of them.
        projector_merge: side m of the square of patches that becomes one token (1 keeps every patch, 2 merges
            2x2).
        image_bidirectional: image tokens see the whole of their own image, not only what came before.
        caption_prompt_ids: the prompt, with one `image_token_id` in it, that `generate(pixel_values=...)`
            uses when it gets no text.
        loss_implementation: "gpt4v_fast" (`linear_cross_entropy`, logits never stored) or "torch"
            (`F.cross_entropy`).
    """

    model_type = "gpt4v"
    sub_configs: ClassVar[dict[str, Any]] = {
        "vision_config": GPT4VVisionConfig,
        "text_config": GPT4VTextConfig,
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache", "image_hidden_states"]

    def __init__(
        self,
        vision_config: GPT4VVisionConfig | dict | None = None,
        text_config: GPT4VTextConfig | dict | None = None,
        image_token_id: int = 3,
        projector_merge: int = 1,
        projector_hidden_act: str = "gelu",
        image_bidirectional: bool = True,
        caption_prompt_ids: list[int] | None = None,
        loss_implementation: str = "gpt4v_fast",
        tie_word_embeddings: bool = True,
        pad_token_id: int | None = 0,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 1,
        **kwargs: Any,
    ):
        self.vision_config = self._sub_config("vision_config", vision_config)
        self.text_config = self._sub_config("text_config", text_config)
        self.image_token_id = image_token_id
        self.projector_merge = projector_merge
        self.projector_hidden_act = projector_hidden_act
        self.image_bidirectional = image_bidirectional
        self.caption_prompt_ids = None if caption_prompt_ids is None else list(caption_prompt_ids)
        self.loss_implementation = loss_implementation
        _check_choice(self, "loss_implementation")
        grid, vocab_size = self.vision_config.grid, self.text_config.vocab_size
        _require(
            projector_merge >= 1 and grid % projector_merge == 0,
            f"projector_merge must divide the {grid} patches of an image's side",
            projector_merge,
        )
        _require(0 <= image_token_id < vocab_size, f"image_token_id must be in [0, {vocab_size})", image_token_id)
        kwargs.pop("image_seq_length", None)
        super().__init__(**kwargs)
        self.tie_word_embeddings = tie_word_embeddings
        self.pad_token_id, self.bos_token_id, self.eos_token_id = pad_token_id, bos_token_id, eos_token_id

    @classmethod
    def _sub_config(cls, name: str, value: Any) -> PreTrainedConfig:
        kind = cls.sub_configs[name]
        if value is None:
            return kind()
        if isinstance(value, dict):
            return kind(**value)
        if isinstance(value, kind):
            return value
        raise TypeError(f"GPT4VConfig: {name} must be a {kind.__name__} or a dict, got {type(value).__name__}")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.to_dict() == other.to_dict()

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> GPT4VConfig:
        """The configuration of a preset (see `presets.PRESETS`); `overrides` are arguments of `GPT4VConfig`,
        in which `vision_config` and `text_config` are dictionaries merged into the preset's."""
        from .presets import PRESETS

        if name not in PRESETS:
            raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {name!r}")
        preset = PRESETS[name]
        parts: dict[str, Any] = {
            key: {**preset[key], **overrides.pop(key, {})} for key in ("vision_config", "text_config")
        }
        return cls(**parts, **{**{k: v for k, v in preset.items() if k not in parts}, **overrides})

    @property
    def image_seq_length(self) -> int:
        """Tokens that one image of `vision_config.image_size` takes in the text."""
        return (self.vision_config.grid // self.projector_merge) ** 2


__all__ = ["GPT4VConfig", "GPT4VTextConfig", "GPT4VVisionConfig"]
