"""A caption of an image, without any text prompt. The image may be given as an argument."""

import sys

import numpy as np
from PIL import Image

from gpt4v_fast import GPT4VForConditionalGeneration, GPT4VImageProcessor, GPT4VTokenizer
from gpt4v_fast.models import digits_checkpoint

# A handwritten seven of the held-out digits: eight rows of eight shades from 0 (a dot) to 16 (g).
SEVEN = "..2dg9.. ..cc7g3. .1e3.g4. ...4ag6. ...dgg9. ...5d1.. ...b9... ..1g4..."


def example_image() -> Image.Image:
    shades = ".123456789abcdefg"
    rows = [[shades.index(shade) for shade in row] for row in SEVEN.split()]
    return Image.fromarray(np.rint(np.array(rows) * (255 / 16)).astype(np.uint8))


image = Image.open(sys.argv[1]) if len(sys.argv) > 1 else example_image()
checkpoint = digits_checkpoint()
tokenizer = GPT4VTokenizer.from_pretrained(checkpoint)
model = GPT4VForConditionalGeneration.from_pretrained(checkpoint)
image_processor = GPT4VImageProcessor.from_pretrained(checkpoint)
pixel_values = image_processor(images=image, return_tensors="pt").pixel_values
outputs = model.generate(pixel_values=pixel_values, max_new_tokens=30)
print(tokenizer.decode(outputs[0], skip_special_tokens=True))
