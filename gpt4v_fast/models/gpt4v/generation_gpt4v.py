"""`generate` for the GPT-4V family: images for each row, captions without text, prompts as embeddings."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import GenerationMixin
from transformers.generation.utils import ALL_CACHE_NAMES

# From transformers 5.24 on `generate` and outputs call past_key_values cache.
CACHE = "cache" if "cache" in ALL_CACHE_NAMES else "past_key_values"


class GPT4VGenerationMixin(GenerationMixin):
    """What transformers' generation asks of the model."""

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
        if (
            inputs is None
            and pixels is not None
            and kwargs.get("input_ids") is None
            and kwargs.get("inputs_embeds") is None
        ):
            kwargs["input_ids"] = self.caption_prompt(pixels)
        return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, inputs_embeds: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """transformers' own, and: a prompt of embeddings stays in front where no cache holds it; images go in once."""
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        cache, embeds, types = inputs.get(CACHE), inputs.get("inputs_embeds"), kwargs.get("mm_token_type_ids")
        if inputs_embeds is not None and embeds is None and cache is None:
            lengths = (kwargs.get(name) for name in ("attention_mask", "position_ids"))
            total = next(tensor.shape[-1] for tensor in lengths if tensor is not None)
            new = self.get_input_embeddings()(input_ids[:, inputs_embeds.shape[1] - total :])
            embeds = torch.cat([inputs_embeds, new], dim=1)
            inputs |= {"input_ids": None, "inputs_embeds": embeds, "position_ids": None}
        if types is not None and embeds is not None:
            types = F.pad(types, (0, embeds.shape[1] - types.shape[1]))
        inputs["mm_token_type_ids"] = None if embeds is None else types  # ids say it themselves
        holds_none = cache is None or not int(cache.get_seq_length())
        # A first pass over a filled cache is another turn, with its own images; an assistant's first is not called one.
        inputs["pixel_values"] = kwargs.get("pixel_values") if holds_none or kwargs.get("is_first_iteration") else None
        return inputs

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
        """Static caches too get the mask (B, keys): the model knows who sees whom, transformers' 4-D masks do not."""
        return attention_mask

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Rows are repeated one by one, so the images of a row must be repeated as a group."""
        pixels = kwargs.pop("pixel_values", None)
        if pixels is not None and expand_size > 1:
            embeds, types = kwargs.get("inputs_embeds"), kwargs.get("mm_token_type_ids")
            counts = self.base_model.image_places(input_ids, embeds, types).sum(1)
            each = int(counts.sum()) // max(len(pixels), 1)
            groups = pixels.split((counts // max(each, 1)).tolist())
            pixels = torch.cat([group for group in groups for _ in range(expand_size)])
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return input_ids, kwargs if pixels is None else {**kwargs, "pixel_values": pixels}


__all__ = ["CACHE", "GPT4VGenerationMixin"]
