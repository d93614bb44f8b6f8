"""The image processor: sources, sizes, crops, and what it refuses."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from gpt4v_fast.models.gpt4v import GPT4VImageProcessor
from gpt4v_fast.models.gpt4v.images_gpt4v import open_image


def test_pixels_are_uint8_rgb_of_the_crop_size():
    image = Image.new("L", (40, 20), 200)
    out = GPT4VImageProcessor()(images=image, return_tensors="pt")["pixel_values"]
    assert out.shape == (1, 3, 32, 32)
    assert out.dtype == torch.uint8
    assert (out == 200).all()


def test_resize_keeps_the_aspect_and_the_crop_is_central():
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, 8:24] = 255  # the square in the middle is white
    out = GPT4VImageProcessor(resample=0)(images=pixels)["pixel_values"]
    assert out.shape == (1, 3, 32, 32)
    assert (out == 255).all()
    squeezed = GPT4VImageProcessor(size={"height": 32, "width": 32}, resample=0)(images=pixels)["pixel_values"]
    assert squeezed.float().mean() == 127.5


def png(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["array_hwc", "array_chw", "tensor", "grey", "floats", "bytes", "path", "file"])
def test_every_kind_of_source_gives_the_same_pixels(kind, tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    if kind == "grey":
        array[...] = array[..., :1]
    path = tmp_path / "image.png"
    path.write_bytes(png(Image.fromarray(array)))
    source = {
        "array_hwc": array,
        "array_chw": array.transpose(2, 0, 1),
        "tensor": torch.from_numpy(array.transpose(2, 0, 1).copy()),
        "grey": array[..., 0],
        "floats": array / 255,
        "bytes": path.read_bytes(),
        "path": str(path),
        "file": io.BytesIO(path.read_bytes()),
    }[kind]
    assert np.array_equal(np.asarray(open_image(source)), array)


def test_transparent_16_bit_and_turned_images():
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert np.asarray(open_image(clear)).min() == 255
    deep = Image.fromarray(np.full((2, 2), 0x8000, np.uint16))
    assert np.asarray(open_image(deep)).max() == 0x80
    turned, exif = Image.new("L", (4, 2)), Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    assert open_image(png(turned, exif=exif)).size == (2, 4)


def huge_png(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels: decoding it would fail, so refusing it must come first."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(10_001, 10_000), (100_000, 100_000)], ids=["100 MP", "10 GP"])
def test_huge_images_are_refused_before_decoding(size):
    with pytest.raises(ValueError, match="at most 100 megapixels"):
        open_image(huge_png(*size))


def test_bad_images_are_refused(tmp_path):
    good = png(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)))
    text = tmp_path / "notes.txt"
    text.write_text("not an image")
    cases = [
        (FileNotFoundError, "image file not found", tmp_path / "none.png"),
        (ValueError, "notes.txt must be in an image format", text),
        (ValueError, "cannot be decoded", good[: len(good) // 2]),
        (ValueError, "must be local", "https://example.org/image.png"),
        (TypeError, "got dict", {"image": 1}),
        (ValueError, r"got shape \(5, 5, 5\)", np.zeros((5, 5, 5), np.uint8)),
        (ValueError, r"got shape \(0, 5\)", np.zeros((0, 5), np.uint8)),
        (ValueError, r"\[0, 1\], got \[0, 255\]", np.array([[0.0, 255.0]])),
        (ValueError, r"must be in \[0, 1\]", np.array([[np.nan, 0.5]])),
        (TypeError, "got int64", np.zeros((4, 4), np.int64)),
    ]
    for kind, message, source in cases:
        with pytest.raises(kind, match=message):
            open_image(source)


def test_bad_settings_of_the_image_processor_are_refused():
    with pytest.raises(ValueError, match="size must have shortest_edge"):
        GPT4VImageProcessor(size={"longest_edge": 3})
    with pytest.raises(ValueError, match="crop_size must have height and width"):
        GPT4VImageProcessor(crop_size={"height": 3})
    with pytest.raises(ValueError, match="resample must be one of"):
        GPT4VImageProcessor(resample=9)
    with pytest.raises(ValueError, match="do_convert_rgb must be True"):
        GPT4VImageProcessor(do_convert_rgb=False)
    with pytest.raises(ValueError, match="at least one image"):
        GPT4VImageProcessor()(images=[])
    with pytest.raises(ValueError, match="one size after resize and crop"):
        GPT4VImageProcessor(do_center_crop=False)(images=[Image.new("L", (9, 5)), Image.new("L", (5, 5))])
    with pytest.raises(ValueError, match="over 100 megapixels"):
        GPT4VImageProcessor()(images=Image.new("L", (1, 4_000_000)))
