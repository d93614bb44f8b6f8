"""Text and images to model inputs: each `<image>` in the text becomes the image's tokens."""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import Any

from transformers import BatchFeature, ProcessorMixin

from ..checkpoint import atomic_folder, check_folder
from .images_gpt4v import flatten_images
from .tokenization_gpt4v import CHAT_TEMPLATE, IMAGE

TYPED = (
    "\U000f0000"  # what apply_chat_template(sanitize_control_tokens=True) puts before a special token that a user typed
)
IMAGE_OPTIONS = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "input_data_format", "data_format",
    "do_rescale", "do_normalize", "do_convert_rgb",
)  # fmt: skip


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
                marks. Nested lists are those of each text.
            text: one prompt or a list. Each may hold any number of `<image>` marks, none too. Without text
                only `pixel_values` come back.
            kwargs: of the tokenizer (padding, max_length, ...) and of the image processor (size, ...). A batch is
                padded unless told otherwise. return_mm_token_type_ids adds (B, S), 1 for image tokens.
                return_offsets_mapping counts the characters of the texts as they came, an image token's those of its
                `<image>` mark.
        Raises:
            ValueError: neither text nor images, a count of marks that is not that of the images, or truncation that
                would cut an image.
        """
        kwargs = {**kwargs.pop("common_kwargs", {}), **kwargs.pop("text_kwargs", {}), **kwargs}
        image_kwargs = {name: kwargs.pop(name) for name in IMAGE_OPTIONS if name in kwargs}
        image_kwargs |= kwargs.pop("images_kwargs", {})
        unused = [name for name in ("videos", "audio") if kwargs.pop(name, None) is not None]
        if unused:
            raise ValueError(f"{unused[0]} must be None: the model takes text and images")
        if images is None and text is None:
            raise ValueError("text, images or both must be given, got neither")
        data: dict[str, Any] = {}
        flat = [] if images is None else flatten_images(images)
        if flat:
            data.update(self.image_processor(flat, **{"return_tensors": return_tensors, **image_kwargs}))
        if text is not None:
            prompts = [text] if isinstance(text, str) else list(text)
            if not all(isinstance(prompt, str) for prompt in prompts):
                raise TypeError(f"text must be a string or a list of strings, got {type(text).__name__}")
            self._check_marks(prompts, images, len(flat))
            data.update(self._tokenize(prompts, kwargs))
        return BatchFeature(data, tensor_type=return_tensors)

    def _marks(self, prompt: str) -> list[re.Match[str]]:
        """The `<image>` marks of a text, but for those that transformers has marked as what a user typed."""
        return list(re.finditer(f"(?<!{TYPED}){re.escape(self.image_token)}", prompt))

    def _tokenize(self, prompts: list[str], options: dict[str, Any]) -> dict[str, Any]:
        """The tokenizer's lists, each mark being `image_seq_length` tokens."""
        options.setdefault("padding", len(prompts) > 1)
        types = options.pop("return_mm_token_type_ids", False)
        options.pop("return_text_replacement_offsets", None)  # our offsets are already those of the texts that came
        marks = [[mark.span() for mark in self._marks(prompt)] for prompt in prompts]
        image = self.image_token * self.image_seq_length
        expanded = []
        for prompt, spans in zip(prompts, marks, strict=True):
            edges = [0, *(edge for span in spans for edge in span), len(prompt)]
            expanded.append(image.join(prompt[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)))
        out = dict(self.tokenizer(expanded, **options))
        if len(out["input_ids"]) != len(prompts):
            raise ValueError("return_overflowing_tokens must be False: a text in parts would part its images")
        for row, (ids, spans) in enumerate(zip(out["input_ids"], marks, strict=True)):
            expected, found = len(spans) * self.image_seq_length, list(ids).count(self.image_token_id)
            if found != expected:
                raise ValueError(
                    f"text {row} must keep all {expected} tokens of its images, got {found}: "
                    "truncation cut into them, give a larger max_length or shorter text"
                )
        if "offset_mapping" in out:
            rows = zip(out["offset_mapping"], marks, strict=True)
            out["offset_mapping"] = [self._unexpanded(offsets, spans) for offsets, spans in rows]
        if types:
            out["mm_token_type_ids"] = [[int(i == self.image_token_id) for i in ids] for ids in out["input_ids"]]
        return out

    def _unexpanded(self, offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Characters of the expanded text as those of the text with the marks at `spans`."""
        mark = len(self.image_token)
        gained = mark * (self.image_seq_length - 1)
        starts = [start + i * gained for i, (start, _) in enumerate(spans)]  # of the images, in the expanded text

        def place(start: int, end: int) -> tuple[int, int]:
            before = bisect_right(starts, start)  # images that begin at or before this token
            if before and start < starts[before - 1] + mark + gained and end > start:
                return spans[before - 1]
            return start - before * gained, end - before * gained

        return [place(start, end) if end > start else (start, end) for start, end in offsets]

    def _check_marks(self, prompts: list[str], images: Any, count: int) -> None:
        marks = [len(self._marks(prompt)) for prompt in prompts]
        if isinstance(images, list | tuple) and any(isinstance(item, list | tuple) for item in images):
            if len(images) != len(prompts):
                raise ValueError(f"images must have one list for each of the {len(prompts)} texts, got {len(images)}")
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
