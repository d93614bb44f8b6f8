"""Images to uint8 pixels: RGB, resize, centre crop, all by PIL. `gf.patch_embed` normalises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from ..checkpoint import check_folder
from .images_gpt4v import MAX_PIXELS, flatten_images, open_image

RESAMPLINGS = {int(kind): kind for kind in Image.Resampling}
# What transformers writes into a processor's file, or its Auto classes hand on, beside the settings
TRANSFORMERS_OWN = (
    "image_processor_type",
    "processor_class",
    "feature_extractor_type",
    "backend",
    "use_fast",
    "auto_map",
)


def _sides(size: Any) -> Any:
    """A size as a plain dictionary: a whole number is the shortest edge."""
    return {"shortest_edge": size} if isinstance(size, int) else dict(size) if isinstance(size, Mapping) else size


def _crop_sides(size: Any) -> Any:
    return {"height": size, "width": size} if isinstance(size, int) else _sides(size)


class GPT4VImageProcessor(BaseImageProcessor):
    """Images -> `pixel_values` (images, 3, crop height, crop width), uint8.

    Args:
        size: s or {"shortest_edge": s} keeps the aspect ratio, {"height": h, "width": w} does not.
        crop_size: s or {"height": h, "width": w} of the centre crop; smaller images are padded with black.
        resample: a PIL resampling number (3: bicubic).
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values"]

    def __init__(
        self,
        do_convert_rgb: bool = True,
        do_resize: bool = True,
        size: int | dict[str, int] | None = None,
        resample: int = int(Image.Resampling.BICUBIC),
        do_center_crop: bool = True,
        crop_size: int | dict[str, int] | None = None,
        **kwargs: Any,
    ):
        for name in [name for name in kwargs if name in TRANSFORMERS_OWN or name.startswith("_")]:
            del kwargs[name]
        self._refuse(kwargs)
        super().__init__()
        if not do_convert_rgb:
            raise ValueError("do_convert_rgb must be True: the model takes three channels, got False")
        self.do_convert_rgb, self.do_resize, self.do_center_crop = do_convert_rgb, do_resize, do_center_crop
        self.size = _sides(32 if size is None else size)
        self.crop_size = _crop_sides(32 if crop_size is None else crop_size)
        self.resample = int(resample)
        self._check(self.size, self.crop_size, self.resample)

    @staticmethod
    def _check(size: Any, crop_size: Any, resample: int) -> None:
        def positive(sides: Any, *kinds: set[str]) -> bool:
            values = sides.values() if isinstance(sides, dict) and set(sides) in kinds else ["none of them"]
            return all(isinstance(value, int) and not isinstance(value, bool) and value > 0 for value in values)

        if not positive(size, {"shortest_edge"}, {"height", "width"}):
            raise ValueError(f"size must have shortest_edge, or height and width, all positive, got {size}")
        if not positive(crop_size, {"height", "width"}):
            raise ValueError(f"crop_size must have height and width, both positive, got {crop_size}")
        if resample not in RESAMPLINGS:
            raise ValueError(f"resample must be one of {sorted(RESAMPLINGS)}, got {resample}")

    @staticmethod
    def _refuse(options: dict[str, Any]) -> None:
        """Raises for options that change nothing here; those of other processors may say that they change nothing."""
        for name in ("do_rescale", "do_normalize"):
            if options.pop(name, None):
                raise ValueError(
                    f"{name} must be False: the model's patch embedding normalises the uint8 pixels, got True"
                )
        if options.pop("do_convert_rgb", None) is False:
            raise ValueError("do_convert_rgb must be True: the model takes three channels, got False")
        unknown = sorted(name for name, value in options.items() if value is not None)
        if unknown:
            raise TypeError(f"GPT4VImageProcessor has no option {', '.join(unknown)}")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> GPT4VImageProcessor:
        """transformers' `from_pretrained`; raises FileNotFoundError for a folder without the processor's
        file."""
        check_folder(pretrained_model_name_or_path, ("preprocessor_config.json", "processor_config.json"))
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Images as they came: `preprocess` opens paths and bytes itself, after checking their size."""
        return image_url_or_urls

    def to_dict(self) -> dict[str, Any]:
        names = ("do_convert_rgb", "do_resize", "size", "resample", "do_center_crop", "crop_size")
        return {**{name: getattr(self, name) for name in names}, "image_processor_type": type(self).__name__}

    def preprocess(
        self,
        images: Any,
        return_tensors: str | None = "pt",
        do_resize: bool | None = None,
        size: int | dict[str, int] | None = None,
        resample: int | None = None,
        do_center_crop: bool | None = None,
        crop_size: int | dict[str, int] | None = None,
        input_data_format: str | None = None,
        data_format: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """One image or (nested) lists of what `open_image` takes -> {"pixel_values": (images, 3, H, W)
        uint8}.

        Args:
            size, crop_size, ...: in the place of the processor's own.
            input_data_format: "channels_first" or "channels_last", of arrays; None finds it (see `open_image`).
            data_format: "channels_first" (what the model takes) or "channels_last", of pixel_values.
        Raises:
            ValueError, TypeError: values or options that do not exist, and what `open_image` refuses.
        """
        self._refuse(kwargs)
        if data_format not in (None, "channels_first", "channels_last"):
            raise ValueError(f"data_format must be channels_first or channels_last, got {data_format!r}")
        size = self.size if size is None else _sides(size)
        crop_size = self.crop_size if crop_size is None else _crop_sides(crop_size)
        sides: Any = size
        crop: Any = crop_size
        resample = self.resample if resample is None else int(resample)
        self._check(size, crop_size, resample)
        sources: Sequence[Any] = flatten_images(images)
        if not sources:
            raise ValueError("images must hold at least one image, got an empty list")
        pixels = []
        for source in sources:
            image = open_image(source, input_data_format)
            if self.do_resize if do_resize is None else do_resize:
                image = _resize(image, sides, RESAMPLINGS[resample])
            if self.do_center_crop if do_center_crop is None else do_center_crop:
                image = _center_crop(image, crop["height"], crop["width"])
            array = np.asarray(image)
            pixels.append(array if data_format == "channels_last" else array.transpose(2, 0, 1))
        shapes = sorted({array.shape for array in pixels})
        if len(shapes) > 1:
            raise ValueError(f"images must have one size after resize and crop, got shapes {shapes}")
        return BatchFeature({"pixel_values": np.stack(pixels)}, tensor_type=return_tensors)


def _resize(image: Image.Image, size: dict[str, int], resample: Image.Resampling) -> Image.Image:
    width, height = image.size
    if "shortest_edge" in size:
        scale = size["shortest_edge"] / min(width, height)
        target = (max(1, round(width * scale)), max(1, round(height * scale)))
        if target[0] * target[1] > MAX_PIXELS:
            raise ValueError(
                f"an image of {width} x {height} would be resized to {target[0]} x {target[1]}, "
                f"over {MAX_PIXELS // 10**6} megapixels"
            )
    else:
        target = (size["width"], size["height"])
    return image if target == image.size else image.resize(target, resample)


def _center_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


__all__ = ["GPT4VImageProcessor", "open_image"]
