"""Text and images to model inputs: each `<image>` in the text becomes the image's tokens."""

from __future__ import annotations

from typing import Any

from transformers import BatchFeature, ProcessorMixin

from ..checkpoint import atomic_folder, check_folder
from .image_processing_gpt4v import flatten_images
from .tokenization_gpt4v import CHAT_TEMPLATE, IMAGE


class GPT4VProcessor(ProcessorMixin):
    """`GPT4VImageProcessor` and `GPT4VTokenizer` in one.

    Args:
        image_seq_length: tokens an image takes in the text, `config.image_seq_length` of the model.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_length: int = 16,
        chat_template: str | None = None,
        **kwargs: Any,
    ):
        if image_seq_length < 1:
            raise ValueError(f"image_seq_length must be positive, got {image_seq_length}")
        self.image_seq_length = image_seq_length
        self.image_token = getattr(tokenizer, "image_token", IMAGE)
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> GPT4VProcessor:
        """transformers' `from_pretrained`; raises FileNotFoundError naming the file that a folder lacks."""
        check_folder(
            pretrained_model_name_or_path,
            ("tokenizer.json",),
            ("preprocessor_config.json", "processor_config.json"),
        )
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """transformers' `save_pretrained`, through a temporary folder."""
        if push_to_hub:
            return super().save_pretrained(save_directory, push_to_hub=True, **kwargs)
        with atomic_folder(save_directory) as folder:
            return super().save_pretrained(folder, **kwargs)

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Model inputs.

        Args:
            images: one image or (nested) lists of what `open_image` takes; in the order of the `<image>`
                marks.
            text: one prompt or a list. Each may hold any number of `<image>` marks, none too. Without text
                only `pixel_values` come back.
            kwargs: of the tokenizer (padding, max_length, ...). A batch is padded unless told otherwise.
        Raises:
            ValueError: neither text nor images, or a count of marks that is not that of the images.
        """
        kwargs = {**kwargs.pop("text_kwargs", {}), **kwargs}
        image_kwargs = kwargs.pop("images_kwargs", {})
        unused = [name for name in ("videos", "audio") if kwargs.pop(name, None) is not None]
        if unused:
            raise ValueError(f"{unused[0]} must be None: the model takes text and images")
        if images is None and text is None:
            raise ValueError("text, images or both must be given, got neither")
        data: dict[str, Any] = {}
        flat = [] if images is None else flatten_images(images)
        if flat:
            data.update(self.image_processor(flat, return_tensors=return_tensors, **image_kwargs))
        if text is not None:
            prompts = [text] if isinstance(text, str) else list(text)
            if not all(isinstance(prompt, str) for prompt in prompts):
                raise TypeError(f"text must be a string or a list of strings, got {type(text).__name__}")
            self._check_marks(prompts, images, len(flat))
            kwargs.setdefault("padding", len(prompts) > 1)
            expanded = [p.replace(self.image_token, self.image_token * self.image_seq_length) for p in prompts]
            data.update(self.tokenizer(expanded, return_tensors=return_tensors, **kwargs))
        return BatchFeature(data, tensor_type=return_tensors)

    def _check_marks(self, prompts: list[str], images: Any, count: int) -> None:
        marks = [prompt.count(self.image_token) for prompt in prompts]
        nested = isinstance(images, list | tuple) and any(isinstance(item, list | tuple) for item in images)
        if nested and len(images) == len(prompts):
            for row, (found, own) in enumerate(zip(marks, images, strict=True)):
                if found != len(flatten_images(own)):
                    raise ValueError(
                        f"text {row} must have one {self.image_token} mark for each of its "
                        f"{len(flatten_images(own))} images, got {found}"
                    )
        if sum(marks) != count:
            raise ValueError(
                f"text must have one {self.image_token} mark for each of the {count} images, got {sum(marks)}"
            )

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]


__all__ = ["GPT4VProcessor"]
