"""Images to uint8 pixels: RGB, resize, centre crop, all by PIL. `gf.patch_embed` normalises."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from ..checkpoint import check_folder

MAX_PIXELS = 100_000_000
RESAMPLINGS = {int(kind): kind for kind in Image.Resampling}


def open_image(source: Any) -> Image.Image:
    """An RGB PIL image from a path, bytes, a binary file, a PIL image, a numpy array or a torch tensor.

    Arrays are (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels (where both would fit, numpy is taken as
    channels last and torch as channels first), uint8, bool, or floats in [0, 1]. Transparent images are laid
    on white; the camera's orientation is applied.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an image, damaged, or over 100 megapixels (known, and refused, before a pixel is
            decoded).
        TypeError: another kind of object.
    """
    if isinstance(source, np.ndarray | torch.Tensor):
        return _to_rgb(_from_array(source))
    if isinstance(source, Image.Image):
        return _decode(source, "the image")
    file: Any = source
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise ValueError(f"images must be local: download {source} first")
    if isinstance(source, str | os.PathLike):
        name = f"image {source}"
        if not os.path.isfile(source):
            raise FileNotFoundError(f"image file not found: {source}")
    elif isinstance(source, bytes | bytearray | memoryview):
        name, file = "the image's bytes", io.BytesIO(source)
    elif hasattr(source, "read"):
        name = "the image file"
    else:
        raise TypeError(f"an image must be a path, bytes, PIL image, array or tensor, got {type(source).__name__}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                return _decode(image, name)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} must have at most {MAX_PIXELS // 10**6} megapixels: {error}") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} must be in an image format that PIL reads, got something else") from error


def _decode(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{name} must have at most {MAX_PIXELS // 10**6} megapixels, got {width} x {height} = "
            f"{width * height / 1e6:.1f} megapixels"
        )
    if min(width, height) < 1:
        raise ValueError(f"{name} must have at least one pixel, got {width} x {height}")
    try:
        return _to_rgb(ImageOps.exif_transpose(image))
    except (OSError, SyntaxError, ValueError) as error:  # what PIL's decoders raise for damaged files
        raise ValueError(f"{name} cannot be decoded: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image, dtype=np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _from_array(array: np.ndarray | torch.Tensor) -> Image.Image:
    channels_first = isinstance(array, torch.Tensor)
    data = array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else array
    shape, counts = data.shape, (1, 3, 4)
    if data.ndim == 3:
        first, last = shape[0] in counts, shape[2] in counts
        if first and (channels_first or not last):
            data = np.moveaxis(data, 0, -1)
        elif not last:
            data = data[..., 0:0]
    if data.ndim not in (2, 3) or data.size == 0:
        raise ValueError(f"an image array must be (H, W), (H, W, C) or (C, H, W) with C 1, 3 or 4, got shape {shape}")
    if data.shape[0] * data.shape[1] > MAX_PIXELS:
        raise ValueError(f"an image must have at most {MAX_PIXELS // 10**6} megapixels, got shape {shape}")
    if data.ndim == 3 and data.shape[-1] == 1:
        data = data[..., 0]
    if data.dtype == np.bool_:
        data = data.astype(np.uint8) * 255
    elif np.issubdtype(data.dtype, np.floating):
        if not (data.min() >= 0 and data.max() <= 1):  # also refuses NaN
            raise ValueError(f"float image arrays must be in [0, 1], got [{data.min():g}, {data.max():g}]")
        data = np.rint(data.astype(np.float64) * 255).astype(np.uint8)
    elif data.dtype != np.uint8:
        raise TypeError(f"image arrays must be uint8, bool or floating point, got {data.dtype}")
    return Image.fromarray(np.ascontiguousarray(data))


def flatten_images(images: Any) -> list[Any]:
    """One image, a list, or lists of lists -> a flat list; a 4-D array counts as a list."""
    if isinstance(images, list | tuple):
        return [image for item in images for image in flatten_images(item)]
    if isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4:
        return list(images)
    return [images]


class GPT4VImageProcessor(BaseImageProcessor):
    """Images -> `pixel_values` (images, 3, crop height, crop width), uint8.

    Args:
        size: {"shortest_edge": s} keeps the aspect ratio, {"height": h, "width": w} does not.
        crop_size: {"height": h, "width": w} of the centre crop; smaller images are padded with black.
        resample: a PIL resampling number (3: bicubic).
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values"]

    def __init__(
        self,
        do_convert_rgb: bool = True,
        do_resize: bool = True,
        size: dict[str, int] | None = None,
        resample: int = int(Image.Resampling.BICUBIC),
        do_center_crop: bool = True,
        crop_size: dict[str, int] | None = None,
        **kwargs: Any,
    ):
        for name in ("image_processor_type", "processor_class", "backend"):
            kwargs.pop(name, None)
        super().__init__(**kwargs)
        if not do_convert_rgb:
            raise ValueError("do_convert_rgb must be True: the model takes three channels, got False")
        self.do_convert_rgb, self.do_resize, self.do_center_crop = do_convert_rgb, do_resize, do_center_crop
        self.size = dict(size) if size else {"shortest_edge": 32}
        self.crop_size = dict(crop_size) if crop_size else {"height": 32, "width": 32}
        self.resample = int(resample)
        self._check(self.size, self.crop_size, self.resample)

    @staticmethod
    def _check(size: dict[str, int], crop_size: dict[str, int], resample: int) -> None:
        if set(size) not in ({"shortest_edge"}, {"height", "width"}) or min(size.values()) < 1:
            raise ValueError(f"size must have shortest_edge, or height and width, all positive, got {size}")
        if set(crop_size) != {"height", "width"} or min(crop_size.values()) < 1:
            raise ValueError(f"crop_size must have height and width, both positive, got {crop_size}")
        if resample not in RESAMPLINGS:
            raise ValueError(f"resample must be one of {sorted(RESAMPLINGS)}, got {resample}")

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
        size: dict[str, int] | None = None,
        resample: int | None = None,
        do_center_crop: bool | None = None,
        crop_size: dict[str, int] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """One image or (nested) lists of what `open_image` takes -> {"pixel_values": (images, 3, H, W)
        uint8}."""
        size, crop_size = size or self.size, crop_size or self.crop_size
        resample = self.resample if resample is None else int(resample)
        self._check(size, crop_size, resample)
        sources: Sequence[Any] = flatten_images(images)
        if not sources:
            raise ValueError("images must hold at least one image, got an empty list")
        pixels = []
        for source in sources:
            image = open_image(source)
            if self.do_resize if do_resize is None else do_resize:
                image = _resize(image, size, RESAMPLINGS[resample])
            if self.do_center_crop if do_center_crop is None else do_center_crop:
                image = _center_crop(image, crop_size["height"], crop_size["width"])
            pixels.append(np.asarray(image).transpose(2, 0, 1))
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
