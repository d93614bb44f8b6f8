"""Pictures of every mode, layout and source; what has no known range or is damaged is refused by name."""

from __future__ import annotations

import base64
import io
import os
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from gpt4v_fast.models.gpt4v import GPT4VImageProcessor
from gpt4v_fast.models.gpt4v.images_gpt4v import open_image

RAMP = np.linspace(0, 1, 12).reshape(3, 4)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pgm(values: np.ndarray, top: int) -> bytes:
    height, width = values.shape
    return f"P5 {width} {height} {top}\n".encode() + values.astype(">u2" if top > 255 else np.uint8).tobytes()


def pfm(values: np.ndarray) -> bytes:
    height, width = values.shape
    return f"Pf\n{width} {height}\n-1.0\n".encode() + values[::-1].astype("<f4").tobytes()


DEEP = np.rint(RAMP * 65535).astype(np.uint16)
RIGHT = {
    "png16": saved(Image.fromarray(DEEP), "PNG"),
    "tiff16": saved(Image.fromarray(DEEP), "TIFF"),
    "pgm16": pgm(DEEP, 65535),
    "pgm10": pgm(np.rint(RAMP * 1023), 1023),
    "pgm8": pgm(np.rint(RAMP * 255), 255),
    "pfm": pfm(RAMP),
    "tiff_float": saved(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
    "cmyk": saved(Image.fromarray(np.rint(RAMP * 255).astype(np.uint8)).convert("CMYK"), "TIFF"),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_every_depth_keeps_its_greys(kind):
    got = np.asarray(open_image(RIGHT[kind])).astype(int)
    assert got.shape == (3, 4, 3)
    assert np.abs(got[..., 0] - RAMP * 255).max() <= 1.0  # 16 bits become 8 by leaving the low ones out


@pytest.mark.parametrize("values", [np.int32([[0, 255]]), np.int32([[0, 2**20]]), np.float32([[0, 255]])], ids=str)
@pytest.mark.parametrize("source", ["image", "tiff"])
def test_numbers_of_no_known_range_are_refused(values, source):
    image = Image.fromarray(values)
    with pytest.raises(ValueError, match=r"no known range|must be in \[0, 1\]"):
        open_image(image if source == "image" else saved(image, "TIFF"))


@pytest.mark.parametrize("wrap", [lambda x: x, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("side", [1, 3, 4, 5])
def test_layouts_are_obeyed(side, wrap):
    pixels = np.random.default_rng(0).integers(0, 256, (side, 4, 3), dtype=np.uint8)
    want = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]
    processor = GPT4VImageProcessor(do_resize=False, do_center_crop=False)
    last = processor(wrap(pixels), input_data_format="channels_last")["pixel_values"]
    first = processor(wrap(pixels.transpose(2, 0, 1).copy()), input_data_format="channels_first")["pixel_values"]
    assert torch.equal(last, want) and torch.equal(first, want)
    out = processor(wrap(pixels), input_data_format="channels_last", data_format="channels_last")["pixel_values"]
    assert torch.equal(out, want.movedim(1, -1))


def test_a_layout_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"got shape \(5, 6, 3\) \(channels_first\)"):
        open_image(np.zeros((5, 6, 3), np.uint8), "channels_first")
    with pytest.raises(ValueError, match="input_data_format must be one of"):
        open_image(np.zeros((5, 6, 3), np.uint8), "HWC")
    with pytest.raises(ValueError, match="data_format must be channels_first or channels_last, got 'HWC'"):
        GPT4VImageProcessor()(np.zeros((5, 6, 3), np.uint8), data_format="HWC")


def test_whole_numbers_are_sizes():
    processor = GPT4VImageProcessor(size=16, crop_size=12)
    assert (processor.size, processor.crop_size) == ({"shortest_edge": 16}, {"height": 12, "width": 12})
    image = Image.new("L", (20, 20))
    assert processor(image)["pixel_values"].shape == (1, 3, 12, 12)
    assert processor(image, size=8, crop_size=8)["pixel_values"].shape == (1, 3, 8, 8)
    for bad in (0, -3, {}, {"shortest_edge": 2.5}, "32"):
        with pytest.raises(ValueError, match="size must have shortest_edge"):
            processor(image, size=bad)


@pytest.mark.parametrize("options", [{"sise": 8}, {"antialias": True, "size": 8}])
def test_unknown_options_are_refused(options):
    with pytest.raises(TypeError, match=r"GPT4VImageProcessor has no option (sise|antialias)"):
        GPT4VImageProcessor()(Image.new("L", (8, 8)), **options)
    with pytest.raises(TypeError, match=r"GPT4VImageProcessor has no option (sise|antialias)"):
        GPT4VImageProcessor(**options)


def test_options_of_other_processors_may_change_nothing():
    image, processor = Image.new("L", (8, 8)), GPT4VImageProcessor()
    processor(image, do_rescale=False, do_normalize=False, do_convert_rgb=True)
    for name in ("do_rescale", "do_normalize"):
        with pytest.raises(ValueError, match=f"{name} must be False: the model's patch embedding normalises"):
            processor(image, **{name: True})


def test_bf16_tensors_are_floats():
    pixels = torch.tensor([[0.0, 0.5], [0.25, 1.0]], dtype=torch.bfloat16)
    assert np.asarray(open_image(pixels))[..., 0].tolist() == [[0, 128], [64, 255]]


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["data_url", "base64", "pipe", "no_seek"])
def test_every_source_gives_the_same_pixels(kind, tmp_path):
    data = saved(PICTURE, "PNG")
    text = base64.b64encode(data).decode()
    if kind == "pipe":
        source = tmp_path / "pipe"
        os.mkfifo(source)
        threading.Thread(target=source.write_bytes, args=(data,), daemon=True).start()
    elif kind == "no_seek":
        source = io.BufferedReader(io.BytesIO(data))
        source.seekable = lambda: False
    else:
        source = text if kind == "base64" else f"data:image/png;base64,{text}"
    assert np.array_equal(np.asarray(open_image(source)), np.asarray(PICTURE))


def test_bad_sources_are_named(tmp_path):
    with pytest.raises(IsADirectoryError, match="an image must be a file, got the directory"):
        open_image(tmp_path)
    with pytest.raises(ValueError, match=r"the data URL .* must hold base64 text"):
        open_image("data:image/png;base64,@@@")
    with pytest.raises(ValueError, match=r"image file not found: aaa.*\(300 characters\), which must hold base64"):
        open_image("a" * 299 + "?")
    with pytest.raises(TypeError, match="must be open in binary mode"):
        open_image(io.StringIO("text"))
    with pytest.raises(ValueError, match=r"image .*empty.png must be in an image format"):
        (tmp_path / "empty.png").touch()
        open_image(tmp_path / "empty.png")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "GIF", "BMP", "WEBP"])
def test_damaged_files_are_named_wherever_they_end(kind, tmp_path):
    path = tmp_path / "cut.img"
    data = saved(PICTURE, kind)
    for end in (*range(0, 40, 3), *range(40, len(data) - 60, max(1, len(data) // 40))):
        path.write_bytes(data[:end])
        try:
            open_image(path)
        except ValueError as error:
            assert "cut.img" in str(error), end
