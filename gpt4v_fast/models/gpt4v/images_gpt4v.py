"""Any picture as an RGB PIL image: files, pipes, bytes, data URLs, PIL images of every mode, arrays and tensors."""

from __future__ import annotations

import base64
import binascii
import io
import os
import warnings
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 100_000_000
LAYOUTS = (None, "channels_first", "channels_last", "none")


def open_image(source: Any, layout: str | None = None) -> Image.Image:
    """An RGB PIL image from a path (of a file or a pipe), base64 text, a data URL, bytes, a binary file, a PIL image, a
    numpy array or a torch tensor.

    Arrays are (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels, uint8, bool, or floats in [0, 1]. `layout` says
    which of the last two ("channels_last", "channels_first"); without it, where both would fit, numpy is taken as
    channels last and torch as channels first. Transparency is laid on white; the camera's orientation is applied;
    16 bits a channel become 8.

    Raises:
        FileNotFoundError, IsADirectoryError: no such file, or a folder.
        ValueError: not an image, damaged, over 100 megapixels (known, and refused, before a pixel is decoded), or
            numbers of an unknown range (32-bit integers, floats beyond [0, 1]).
        TypeError: another kind of object.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"input_data_format must be one of {LAYOUTS}, got {layout!r}")
    if isinstance(source, np.ndarray | torch.Tensor):
        return _to_rgb(_from_array(source, layout), None)
    if isinstance(source, Image.Image):
        return _decode(source, "the image")
    name, file = _file_of(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(file)
        except Image.DecompressionBombError as error:
            raise ValueError(f"{name} must have at most {MAX_PIXELS // 10**6} megapixels: {error}") from error
        except UnidentifiedImageError as error:
            raise ValueError(f"{name} must be in an image format that PIL reads, got something else") from error
        except Exception as error:  # PIL's readers raise many kinds for headers that end early
            raise ValueError(f"{name} cannot be decoded: {error}") from error
    with image:
        return _decode(image, name)


def _file_of(source: Any) -> tuple[str, Any]:
    """What to call it in errors, and a path or a binary file that PIL can seek in."""
    if isinstance(source, bytes | bytearray | memoryview):
        return "the image's bytes", io.BytesIO(source)
    if isinstance(source, io.TextIOBase):
        raise TypeError("an image file must be open in binary mode, got a text file")
    if hasattr(source, "read"):
        if getattr(source, "seekable", lambda: False)():
            return "the image file", source
        return "the image file", io.BytesIO(source.read())
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"an image must be a path, bytes, PIL image, array or tensor, got {type(source).__name__}")
    text = os.fspath(source)
    short = text if len(text) <= 100 else f"{text[:40]}... ({len(text)} characters)"
    if isinstance(source, str) and text.startswith(("http://", "https://")):
        raise ValueError(f"images must be local: download {text} first")
    if isinstance(source, str) and text.startswith("data:"):
        return f"the data URL {short}", io.BytesIO(_from_base64(text.partition(",")[2], f"the data URL {short}"))
    if os.path.isdir(text):
        raise IsADirectoryError(f"an image must be a file, got the directory {short}")
    if os.path.isfile(text):
        return f"image {short}", text
    if os.path.exists(text):  # a pipe, or a device such as /dev/stdin: read once, PIL seeks
        with open(text, "rb") as pipe:
            return f"image {short}", io.BytesIO(pipe.read())
    if isinstance(source, str) and len(text) > 100:  # longer than the names that people mistype
        return f"the base64 text {short}", io.BytesIO(_from_base64(text, f"image file not found: {short}, which"))
    raise FileNotFoundError(f"image file not found: {short}")


def _from_base64(text: str, name: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"{name} must hold base64 text: {error}") from error


def _decode(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{name} must have at most {MAX_PIXELS // 10**6} megapixels, got {width} x {height} = "
            f"{width * height / 1e6:.1f} megapixels"
        )
    if min(width, height) < 1:
        raise ValueError(f"{name} must have at least one pixel, got {width} x {height}")
    kind = image.format
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # PIL's decoders raise many kinds for damaged files
        raise ValueError(f"{name} cannot be decoded: {error}") from error
    try:
        return _to_rgb(image, kind)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _to_rgb(image: Image.Image, kind: str | None) -> Image.Image:
    """`image` in RGB; `kind` is the file's format, which says what the integers of mode I mean."""
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PPM"):  # PPM: PIL stretches them to 16 bits
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    elif image.mode == "I":
        raise ValueError("32-bit integers have no known range: convert the image to 8 or 16 bits first")
    elif image.mode == "F":
        image = Image.fromarray(_to_bytes(np.asarray(image)))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _to_bytes(data: np.ndarray) -> np.ndarray:
    """uint8 from floats in [0, 1]."""
    if not (data.min() >= 0 and data.max() <= 1):  # also refuses NaN
        raise ValueError(f"float images must be in [0, 1], got [{data.min():g}, {data.max():g}]")
    return np.rint(data.astype(np.float64) * 255).astype(np.uint8)


def _from_array(array: np.ndarray | torch.Tensor, layout: str | None) -> Image.Image:
    tensor = isinstance(array, torch.Tensor)
    data: np.ndarray
    if isinstance(array, torch.Tensor):
        data = (array.float() if array.is_floating_point() else array).detach().cpu().numpy()
    else:
        data = array
    shape, counts = data.shape, (1, 3, 4)
    if data.ndim == 3:
        first, last = shape[0] in counts, shape[2] in counts
        if layout is None:
            layout = "channels_first" if first and (tensor or not last) else "channels_last"
        if not (first if layout == "channels_first" else last and layout == "channels_last"):
            data = data[..., 0:0]
        elif layout == "channels_first":
            data = np.moveaxis(data, 0, -1)
    if data.ndim not in (2, 3) or data.size == 0:
        asked = "" if layout is None or len(shape) != 3 else f" ({layout})"
        raise ValueError(
            f"an image array must be (H, W), (H, W, C) or (C, H, W) with C 1, 3 or 4, got shape {tuple(shape)}{asked}"
        )
    if data.shape[0] * data.shape[1] > MAX_PIXELS:
        raise ValueError(f"an image must have at most {MAX_PIXELS // 10**6} megapixels, got shape {tuple(shape)}")
    if data.ndim == 3 and data.shape[-1] == 1:
        data = data[..., 0]
    if data.dtype == np.bool_:
        data = data.astype(np.uint8) * 255
    elif np.issubdtype(data.dtype, np.floating):
        data = _to_bytes(data)
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


__all__ = ["MAX_PIXELS", "flatten_images", "open_image"]
