"""The GPT-4V family: ViT blocks over `gf.patch_embed`, a projector, a Llama-style decoder, and the loss
through `gf.linear_cross_entropy`. Generation, caches, saving and loading come from transformers.

One `gf.Mask` describes who sees whom in the decoder (causal, padding as documents, image blocks); the
implementation "gpt4v_fast" takes it as it is, "sdpa" and "eager" get its dense form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.generation.utils import ALL_CACHE_NAMES
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

import gpt4v_fast as gf

from ..checkpoint import CheckedModel
from .configuration_gpt4v import GPT4VConfig
from .layers_gpt4v import GPT4VDecoder, GPT4VProjector, GPT4VVisionTower, dense_mask, rotary_tables


class GPT4VPreTrainedModel(CheckedModel, PreTrainedModel):
    """What both models share: flags, the choice of the attention implementation, initial weights."""

    config: GPT4VConfig
    config_class = GPT4VConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["GPT4VBlock"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn = False  # a flash-attn call takes no image blocks
    _supports_flex_attn = False
    _supports_attention_backend = True

    def __init__(self, config: GPT4VConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        for part in (config.vision_config, config.text_config):
            if part._attn_implementation is None:
                part._attn_implementation = config._attn_implementation

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        requested = "gpt4v_fast" if requested_attention is None else requested_attention
        if requested not in ("gpt4v_fast", "sdpa", "eager"):
            raise ValueError(f"attn_implementation must be 'gpt4v_fast', 'sdpa' or 'eager', got {requested!r}")
        return requested

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], *args: Any, **kwargs: Any) -> None:
        """For the whole model, or for its parts: {"vision_config": "sdpa", "text_config": "gpt4v_fast"}."""
        values = attn_implementation.values() if isinstance(attn_implementation, dict) else [attn_implementation]
        for value in values:
            self.get_correct_attn_implementation(value)
        self.config._attn_implementation = attn_implementation

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GPT4VVisionTower):
            init.normal_(module.position_embedding, mean=0.0, std=self.config.vision_config.initializer_range)


# From transformers 5.24 on `generate` and outputs call past_key_values cache.
CACHE = "cache" if "cache" in ALL_CACHE_NAMES else "past_key_values"


@dataclass
class GPT4VModelOutput(BaseModelOutputWithPast):
    """BaseModelOutputWithPast and `image_hidden_states` (images, tokens, hidden_size) of the projector."""

    image_hidden_states: torch.Tensor | None = None


@dataclass
class GPT4VCausalLMOutput(CausalLMOutputWithPast):
    """CausalLMOutputWithPast and `image_hidden_states` (images, tokens, hidden_size) of the projector."""

    image_hidden_states: torch.Tensor | None = None


class GPT4VModel(GPT4VPreTrainedModel):
    """The model without its head. Image features take the place of the `<image>` tokens of the text, in
    order."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^lm_head\."]

    def __init__(self, config: GPT4VConfig):
        super().__init__(config)
        self.vision_tower = GPT4VVisionTower(config.vision_config)
        self.projector = GPT4VProjector(config)
        self.language_model = GPT4VDecoder(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.language_model.embed_tokens = value

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """pixel_values (images, C, H, W), uint8 or float in [0, 1] -> (images, tokens, hidden_size).

        H and W are `image_size`, or any multiple of `patch_size * projector_merge`; the position embedding is
        then interpolated."""
        config = self.config.vision_config
        unit = config.patch_size * self.config.projector_merge
        shape = tuple(pixel_values.shape)
        if (
            len(shape) != 4
            or shape[1] != config.num_channels
            or min(shape[2:]) < unit
            or any(s % unit for s in shape[2:])
        ):
            raise ValueError(
                f"pixel_values must have shape (images, {config.num_channels}, H, W) with H and W multiples "
                f"of {unit}, got {shape}"
            )
        rows, columns = (side // config.patch_size for side in shape[2:])
        return self.projector(self.vision_tower(pixel_values), rows, columns)

    def _embed(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (B, S, hidden_size), and where `<image>` stands (B, S)."""
        table = self.get_input_embeddings()
        if input_ids is not None and inputs_embeds is None:
            if input_ids.device.type == "cpu" and input_ids.numel():
                low, high = (int(bound) for bound in input_ids.aminmax())
                if low < 0 or high >= table.num_embeddings:
                    raise IndexError(f"input_ids must be in [0, {table.num_embeddings}), got values in [{low}, {high}]")
            return table(input_ids), input_ids == self.config.image_token_id
        if input_ids is None and inputs_embeds is not None:
            return inputs_embeds, (inputs_embeds == table.weight[self.config.image_token_id]).all(-1)
        raise ValueError("exactly one of input_ids and inputs_embeds must be given")

    def _place_images(
        self, embeds: torch.Tensor, is_image: torch.Tensor, features: torch.Tensor | None, past: int
    ) -> torch.Tensor:
        found = int(is_image.sum())
        if features is None:
            if found and past == 0:
                raise ValueError(f"input_ids has {found} <image> tokens, but no pixel_values came")
            return embeds
        images, each = features.shape[:2]
        if found != images * each:
            raise ValueError(
                f"input_ids must have {each} <image> tokens for each of the {images} images of pixel_values "
                f"({images * each} in all), got {found}"
            )
        return embeds.masked_scatter(is_image[..., None], features.to(embeds.dtype))

    def _mask(
        self, attention_mask: torch.Tensor | None, is_image: torch.Tensor | None, each: int, past: int
    ) -> gf.Mask:
        """Who sees whom: causal, the same document (padding is none), and the whole of one's own image."""
        documents = blocks = None
        if attention_mask is not None and not bool((attention_mask == 1).all()):
            keys = attention_mask.to(torch.int32) - 1  # 0 is padding; 1, 2, ... number the packed documents
            documents = (keys[:, past:].contiguous(), keys) if past else keys
        if is_image is not None and each and self.config.image_bidirectional:
            ids = (is_image.int().cumsum(1, dtype=torch.int32) - 1) // each
            queries = torch.where(is_image, ids, -1).to(torch.int32)
            blocks = (queries, F.pad(queries, (past, 0), value=-1)) if past else queries
        return gf.Mask(causal=True, documents=documents, image_blocks=blocks)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> GPT4VModelOutput:
        """Hidden states of the text.

        Args:
            input_ids (B, S), or inputs_embeds (B, S, hidden_size): exactly one. `<image>` tokens are found in
                input_ids, and in inputs_embeds as the rows that equal their embedding.
            pixel_values (images, C, H, W): the images of all rows, in order; any number for a row, none too.
            attention_mask (B, past + S): 1 for text, 0 for padding, on either side; 2, 3, ... number further
                documents packed into the same row (give position_ids then).
            cache: past_key_values, as transformers calls it from 5.24 on.
        Raises:
            ValueError: shapes that do not fit, or a count of `<image>` tokens that is not that of the images.
        """
        past_key_values = past_key_values if cache is None else cache
        inputs_embeds, is_image = self._embed(input_ids, inputs_embeds)
        batch, length = inputs_embeds.shape[:2]
        if use_cache is None:
            use_cache = self.config.text_config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None and past_key_values.is_compileable:
            kind = type(past_key_values).__name__
            raise ValueError(f"past_key_values must be a cache that grows, such as DynamicCache, got {kind}")
        past = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        if attention_mask is not None and tuple(attention_mask.shape) != (batch, past + length):
            raise ValueError(
                f"attention_mask must have shape (batch, past + new tokens) = {(batch, past + length)}, "
                f"got {tuple(attention_mask.shape)}"
            )
        features = None if pixel_values is None else self.get_image_features(pixel_values)
        hidden_states = self.language_model.dropout(self._place_images(inputs_embeds, is_image, features, past))
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=hidden_states.device).expand(batch, -1)
            if attention_mask is not None:
                position_ids = ((attention_mask != 0).long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        text = self.config.text_config
        rotary = rotary_tables(position_ids, text.head_dim, text.rope_theta, hidden_states.dtype)
        mask: Any = self._mask(
            attention_mask,
            is_image if features is not None else None,
            0 if features is None else features.shape[1],
            past,
        )
        implementation = text._attn_implementation
        if output_attentions and implementation != "eager":
            raise ValueError(f"output_attentions needs attn_implementation='eager', got {implementation!r}")
        if implementation != "gpt4v_fast":
            mask = dense_mask(mask, length, past + length, hidden_states.device)
        all_states, all_weights = [], []
        for layer in self.language_model.layers:
            all_states.append(hidden_states)
            hidden_states, weights = layer(hidden_states, mask, rotary, past_key_values=past_key_values)
            all_weights.append(weights)
        hidden_states = self.language_model.norm(hidden_states)
        return GPT4VModelOutput(
            last_hidden_state=hidden_states,
            **{CACHE: past_key_values if use_cache else None},
            hidden_states=(*all_states, hidden_states) if output_hidden_states else None,
            attentions=tuple(all_weights) if output_attentions else None,
            image_hidden_states=features,
        )


class GPT4VForConditionalGeneration(GPT4VPreTrainedModel, GenerationMixin):
    """The model with its head: losses, `generate`."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: GPT4VConfig):
        super().__init__(config)
        self.model = GPT4VModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
        if self.generation_config.suppress_tokens is None:  # a generated <image> would have no pixels
            self.generation_config.suppress_tokens = [config.image_token_id]

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.model.get_image_features(pixel_values, **kwargs)

    def _loss(self, hidden: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | int | None) -> torch.Tensor:
        if labels.shape != hidden.shape[:2]:
            raise ValueError(f"labels must have shape {tuple(hidden.shape[:2])}, got {tuple(labels.shape)}")
        reduction = "mean" if num_items is None else "sum"
        loss: Any
        if self.config.loss_implementation == "gpt4v_fast":
            weight = self.lm_head.weight
            loss = gf.linear_cross_entropy(hidden.to(weight.dtype), weight, labels, shift=1, reduction=reduction)
        else:
            logits = self.lm_head(hidden[:, :-1]).float()
            loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction=reduction)
        return loss if num_items is None else loss / num_items

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_logits: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> GPT4VCausalLMOutput:
        """Loss, logits or both; the arguments of `GPT4VModel.forward`, and:

        Args:
            labels (B, S): the ids of the text itself (position t predicts t + 1), -100 where nothing is
                asked: on prompts, images and padding. The loss is the mean over the counted tokens, or their
                    sum divided by
                num_items_in_batch.
            return_logits: None computes the logits where there are no labels, and in eval mode; a training
                step never stores them. True and False decide it.
            logits_to_keep: the last so many positions (0: all), or their indices.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss = None if labels is None else self._loss(hidden, labels, num_items_in_batch)
        logits = None
        if return_logits or (return_logits is None and (labels is None or not self.training)):
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, keep] if logits_to_keep is not None else hidden)
        return GPT4VCausalLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def caption_prompt(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The ids (images, S) that ask for a caption of each image: `config.caption_prompt_ids`, its one
        image token repeated for the image's features; without it the image alone."""
        unit = self.config.vision_config.patch_size * self.config.projector_merge
        tokens = (pixel_values.shape[-2] // unit) * (pixel_values.shape[-1] // unit)
        image = self.config.image_token_id
        prompt = self.config.caption_prompt_ids or [image]
        if prompt.count(image) != 1:
            raise ValueError(f"caption_prompt_ids must have one image token ({image}), got {prompt}")
        at = prompt.index(image)
        ids = prompt[:at] + [image] * tokens + prompt[at + 1 :]
        return torch.tensor(ids, device=self.device).expand(len(pixel_values), -1)

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`; with `pixel_values` and no text it captions each image."""
        pixels = kwargs.get("pixel_values")
        if inputs is None and pixels is not None and kwargs.get("input_ids") is None and "inputs_embeds" not in kwargs:
            kwargs["input_ids"] = self.caption_prompt(pixels)
        return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        cache = inputs.get(CACHE)
        if cache is not None and cache.get_seq_length() and not kwargs.get("is_first_iteration"):
            inputs["pixel_values"] = None  # the features are in the cache
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Rows are repeated one by one, so the images of a row must be repeated as a group."""
        pixels = kwargs.pop("pixel_values", None)
        if pixels is not None and expand_size > 1 and input_ids is not None:
            counts = (input_ids == self.config.image_token_id).sum(1)
            each = int(counts.sum()) // max(len(pixels), 1)
            groups = pixels.split((counts // max(each, 1)).tolist())
            pixels = torch.cat([group for group in groups for _ in range(expand_size)])
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return input_ids, kwargs if pixels is None else {**kwargs, "pixel_values": pixels}


__all__ = ["GPT4VForConditionalGeneration", "GPT4VModel", "GPT4VPreTrainedModel"]
