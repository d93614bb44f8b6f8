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
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

import gpt4v_fast as gf

from ..checkpoint import CheckedModel
from .attention_gpt4v import dense_mask
from .configuration_gpt4v import GPT4VConfig
from .generation_gpt4v import CACHE, GPT4VGenerationMixin
from .layers_gpt4v import GPT4VDecoder, GPT4VProjector, GPT4VVisionTower, is_plain, rotary_tables

logger = logging.get_logger(__name__)


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

    def image_places(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """True (B, S) where an image's token stands; inputs_embeds go before input_ids. See `forward`."""
        image = self.config.image_token_id
        if inputs_embeds is None:
            assert input_ids is not None, "one of both is given"
            return input_ids == image
        if mm_token_type_ids is None:
            embedding = self.get_input_embeddings()(torch.tensor([image], device=inputs_embeds.device))
            return (inputs_embeds == embedding).all(-1)
        expected, got = tuple(inputs_embeds.shape[:2]), tuple(mm_token_type_ids.shape)
        if got != expected:
            raise ValueError(f"mm_token_type_ids must have shape {expected}, got {got}")
        return mm_token_type_ids == 1

    def _embed(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        mm_token_type_ids: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (B, S, hidden_size), and where images stand (B, S)."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        where = self.image_places(input_ids, inputs_embeds, mm_token_type_ids)
        if inputs_embeds is not None:
            return inputs_embeds, where
        assert input_ids is not None
        table = self.get_input_embeddings()
        if input_ids.device.type == "cpu" and input_ids.numel():
            low, high = (int(bound) for bound in input_ids.aminmax())
            size = getattr(table, "num_embeddings", self.config.text_config.vocab_size)
            if low < 0 or high >= size:
                raise IndexError(f"input_ids must be in [0, {size}), got values in [{low}, {high}]")
        return table(input_ids), where

    def _place_images(
        self, embeds: torch.Tensor, is_image: torch.Tensor, features: torch.Tensor | None, expected: bool
    ) -> torch.Tensor:
        """`embeds` with the features in the images' places; `expected` says that an image needs features."""
        found = None if is_image.is_meta else int(is_image.sum())
        if features is None:
            if found and expected:
                raise ValueError(f"input_ids has {found} <image> tokens, but no pixel_values came")
            return embeds
        images, each = features.shape[:2]
        if found not in (None, images * each):
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
        if attention_mask is not None and (attention_mask.is_meta or not bool((attention_mask == 1).all())):
            keys = attention_mask.to(torch.int32) - 1  # 0 is padding; 1, 2, ... number the packed documents
            documents = (keys[:, past:].contiguous(), keys) if past else keys
        if is_image is not None and self.config.image_bidirectional:
            ids = (is_image.int().cumsum(1, dtype=torch.int32) - 1) // each
            queries = torch.where(is_image, ids, -1).to(torch.int32)
            blocks = (queries, F.pad(queries, (past, 0), value=-1)) if past else queries
        return gf.Mask(causal=True, documents=documents, image_blocks=blocks)

    def _cache(self, cache: Cache | None, use_cache: bool | None) -> Cache | None:
        """The cache of this call: the one that came, a new one, or none."""
        if use_cache is None:
            use_cache = self.config.text_config.use_cache and not self.training
        recomputes = self.training and torch.is_grad_enabled()
        if recomputes and any(layer.gradient_checkpointing for layer in self.language_model.layers):
            if cache is not None and int(cache.get_seq_length()):
                raise ValueError(
                    "past_key_values must be empty or None in training with gradient checkpointing, whose backward "
                    f"pass would add to it once more, got {int(cache.get_seq_length())} tokens"
                )
            if use_cache or cache is not None:
                logger.warning_once("gradient checkpointing computes layers twice: no cache is kept")
            return None
        if cache is None:
            return DynamicCache(config=self.config) if use_cache else None
        if any(cache.is_sliding):
            raise ValueError("past_key_values must keep all tokens, got a cache of sliding windows")
        return cache

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
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
            mm_token_type_ids (B, S): 1 where inputs_embeds holds an image, `config.image_seq_length` rows each, whose
                features the caller has put there or which pixel_values bring. Image features that nothing marks
                are seen as text is: causally.
            cache: past_key_values, as transformers calls it from 5.24 on; any that keeps all tokens.
        Raises:
            ValueError: shapes that do not fit, or a count of `<image>` tokens that is not that of the images.
        """
        merged = inputs_embeds is not None and mm_token_type_ids is not None and pixel_values is None
        inputs_embeds, is_image = self._embed(input_ids, inputs_embeds, mm_token_type_ids)
        batch, length = inputs_embeds.shape[:2]
        cache = self._cache(past_key_values if cache is None else cache, use_cache)
        past = 0 if cache is None else int(cache.get_seq_length())
        if attention_mask is not None and tuple(attention_mask.shape) != (batch, past + length):
            raise ValueError(
                f"attention_mask must have shape (batch, past + new tokens) = {(batch, past + length)}, "
                f"got {tuple(attention_mask.shape)}"
            )
        features = None if pixel_values is None else self.get_image_features(pixel_values)
        embeds = self._place_images(inputs_embeds, is_image, features, expected=past == 0 and not merged)
        each = self.config.image_seq_length if features is None else features.shape[1]
        if merged and not is_image.is_meta and bool((is_image.sum(1) % each).any()):
            raise ValueError(
                f"mm_token_type_ids must mark image_seq_length = {each} tokens for each image, "
                f"got {is_image.sum(1).tolist()} in the rows"
            )
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=embeds.device).expand(batch, -1)
            if attention_mask is not None:
                position_ids = ((attention_mask != 0).long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        text = self.config.text_config
        rotary = rotary_tables(position_ids, text.head_dim, text.rope_theta, embeds.dtype)
        blocks = is_image if merged or features is not None else None
        mask: Any = self._mask(attention_mask, blocks, each, past)
        implementation = text._attn_implementation
        if output_attentions is None:
            output_attentions = getattr(self.config, "output_attentions", False)
        if output_hidden_states is None:
            output_hidden_states = getattr(self.config, "output_hidden_states", False)
        if output_attentions and implementation != "eager":
            raise ValueError(f"output_attentions needs attn_implementation='eager', got {implementation!r}")
        if implementation != "gpt4v_fast":
            mask = dense_mask(mask, length, past + length, embeds.device)
        places = (past, past + length) if cache is not None and cache.is_compileable else None
        hidden_states, states, weights = self.language_model(embeds, mask, rotary, cache, places)
        return GPT4VModelOutput(
            last_hidden_state=hidden_states,
            **{CACHE: None if use_cache is False else cache},
            hidden_states=(*states, hidden_states) if output_hidden_states else None,
            attentions=weights if output_attentions else None,
            image_hidden_states=features,
        )


class GPT4VForConditionalGeneration(GPT4VPreTrainedModel, GPT4VGenerationMixin):
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
        head, ours = self.lm_head, self.config.loss_implementation == "gpt4v_fast"
        if ours and is_plain(head, nn.Linear):
            hidden = hidden.to(head.weight.dtype)
            loss = gf.linear_cross_entropy(hidden, head.weight, labels, bias=head.bias, shift=1, reduction=reduction)
        else:
            logits, target = head(hidden[:, :-1]).flatten(0, 1), labels[:, 1:].flatten()
            loss = (
                gf.cross_entropy(logits, target, reduction=reduction)
                if ours
                else F.cross_entropy(logits.float(), target, reduction=reduction)
            )
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
        mm_token_type_ids: torch.Tensor | None = None,
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
                sum divided by num_items_in_batch.
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
            mm_token_type_ids=mm_token_type_ids,
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


__all__ = ["GPT4VForConditionalGeneration", "GPT4VModel", "GPT4VPreTrainedModel"]
