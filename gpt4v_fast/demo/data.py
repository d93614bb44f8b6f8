"""Questions and answers about scikit-learn's 1,797 scanned digits, in English and Chinese, and a little plain
text.

Every answer is worked out in words ("7 + 5 = 12."), so that the model reads the digits before it adds them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from ..models.gpt4v import GPT4VProcessor

SPLIT_SEED, HELD_OUT = 0, 0.2
TASKS = ("digit", "parity", "sum", "caption")
LANGUAGES = ("en", "zh")
WORDS = {
    "en": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "zh": ("零", "一", "二", "三", "四", "五", "六", "七", "八", "九"),
}
KINDS = {"en": ("even", "odd"), "zh": ("偶数", "奇数")}
QUESTIONS = {
    ("digit", "en"): (
        "Which digit is this?",
        "What digit is shown in the image?",
        "Read the digit.",
        "What number is this?",
        "Which number do you see?",
    ),
    ("digit", "zh"): ("这是哪个数字？", "图中的数字是几？", "请读出这个数字。", "这是什么数字？", "这是几？"),
    ("parity", "en"): (
        "Is it even?",
        "Is this digit even or odd?",
        "Even or odd?",
        "Is this number odd or even?",
        "Is it odd?",
    ),
    ("parity", "zh"): ("这是偶数吗？", "这个数字是奇数还是偶数？", "奇数还是偶数？", "它是偶数吗？", "这是奇数吗？"),
    ("sum", "en"): (
        "What is the sum of the two digits?",
        "Add the two digits.",
        "What do they add up to?",
        "What is the sum?",
    ),
    ("sum", "zh"): ("这两个数字的和是多少？", "把两个数字加起来。", "两个数字相加等于几？", "它们的和是多少？"),
    ("caption", "en"): ("Describe the image.", "Write a caption for this image.", ""),
    ("caption", "zh"): ("用一句话描述图片。", "请为图片写一个标题。"),
}
# What a Chinese question means, where the English one at its place means something else
MEANINGS = {"它是偶数吗？": "Is it even?"}
NOUNS = (
    ("cat", "cats", "只猫"),
    ("dog", "dogs", "只狗"),
    ("bird", "birds", "只鸟"),
    ("book", "books", "本书"),
    ("apple", "apples", "个苹果"),
    ("friend", "friends", "个朋友"),
    ("picture", "pictures", "张图片"),
    ("ticket", "tickets", "张票"),
)
SENTENCES = (
    "GPT-4V is amazing! It looks at images and answers questions about them.",
    "GPT-4V is a model that reads text and images.",
    "This is an example. It shows that the model can write English and Chinese.",
    "A digit is a picture of a number that someone wrote by hand.",
    "The model looks at an image, reads the question and writes an answer.",
    "Hello! Show me a digit and ask which one it is.",
    "这是一个例子。它说明模型会读中文，也会写中文。",
    "这是一个例子。模型看图片，读问题，然后写出答案。",
    "这是一个小模型。它看图片并回答问题。",
    "你好！给我看一个数字，问我它是几。",
    "今天天气很好，我们一起看图片。",
    "人工智能可以看图片，也可以回答问题。",
    "手写数字是人用手写出来的数字。",
)


class Digits(NamedTuple):
    """8 x 8 images (N, 8, 8) with values 0 to 16, and their labels (N,)."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Example:
    """One question: `images` are indices into the split; `language` and `task` say how to judge the
    answer."""

    task: str
    language: str
    question: str
    answer: str
    images: tuple[int, ...]

    @property
    def prompt(self) -> str:
        return f"<|user|>{'<image>' * len(self.images)}{self.question}<|assistant|>"


@lru_cache(maxsize=1)
def load_digits() -> tuple[Digits, Digits]:
    """(training, held out): 1,437 and 360 digits, a fixed split with equal shares of each digit."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    data = load()
    parts = train_test_split(
        data.images, data.target, test_size=HELD_OUT, random_state=SPLIT_SEED, stratify=data.target
    )
    return Digits(parts[0], parts[2]), Digits(parts[1], parts[3])


def picture(image: np.ndarray) -> Image.Image:
    """A digit (8, 8) with values 0 to 16 as a grey picture."""
    return Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8))


def pixels_of(images: np.ndarray, processor: GPT4VProcessor) -> torch.Tensor:
    """(N, 3, H, W) uint8, as the processor makes them for the model."""
    return processor.image_processor([picture(image) for image in images])["pixel_values"]


def answer(task: str, language: str, digits: Sequence[int]) -> str:
    """The right answer to a question about `digits`."""
    english, first = language == "en", digits[0]
    kind, word = KINDS[language][first % 2], WORDS[language][first]
    if task == "digit":
        return f"It is {first}." if english else f"是{first}。"
    if task == "parity":
        return f"{first} is {kind}." if english else f"{first}是{kind}。"
    if task == "sum":
        a, b = digits
        return f"{a} + {b} = {a + b}." if english else f"{a}加{b}等于{a + b}。"
    if task == "caption":
        return f"A handwritten {word}, an {kind} digit." if english else f"手写的数字{word}，是{kind}。"
    raise ValueError(f"task must be one of {TASKS}, got {task!r}")


@lru_cache(maxsize=1)
def _meanings() -> dict[str, str]:
    known = dict(MEANINGS)
    for task in TASKS:
        for english, chinese in zip(QUESTIONS[task, "en"], QUESTIONS[task, "zh"], strict=False):
            known.setdefault(chinese, english)
        for first in range(10):
            for other in range(10) if task == "sum" else range(1):
                known[answer(task, "zh", (first, other))] = answer(task, "en", (first, other))
    return known


def in_english(text: str) -> str | None:
    """What a Chinese question or answer of the demo means, for who cannot read or show it; None if unknown."""
    return _meanings().get(text)


def example(task: str, language: str, split: Digits, images: tuple[int, ...], question: str | None = None) -> Example:
    """A question about the digits at `images`, the first wording unless `question` is given."""
    digits = [int(split.labels[i]) for i in images]
    wording = QUESTIONS[task, language][0] if question is None else question
    return Example(task, language, wording, answer(task, language, digits), images)


def draw(rng: np.random.Generator, split: Digits, task: str) -> Example:
    """A random question of one task."""
    language = LANGUAGES[rng.integers(2)]
    wordings = QUESTIONS[task, language]
    count = 2 if task == "sum" else 1
    images = tuple(int(i) for i in rng.integers(len(split.labels), size=count))
    return example(task, language, split, images, wordings[rng.integers(len(wordings))])


def translations() -> list[tuple[str, str]]:
    """(English, Chinese) pairs: the digits, and counted things."""
    counts = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    measures = ("一", "两", "三", "四", "五", "六", "七", "八", "九")
    pairs = list(zip(WORDS["en"], WORDS["zh"], strict=True))
    for one, many, chinese in NOUNS:
        for i, (count, measure) in enumerate(zip(counts, measures, strict=True)):
            pairs.append((f"{count} {many if i else one}", measure + chinese))
    return pairs


def texts() -> list[str]:
    """Plain text without images: sentences, and translations both ways."""
    lines = []
    for english, chinese in translations():
        lines.append(f"Translate English to Chinese: {english} => {chinese}")
        lines.append(f"把中文翻译成英文：{chinese} => {english}")
    return list(SENTENCES) * (len(lines) // len(SENTENCES)) + lines  # as many of one kind as of the other


def all_text() -> Iterator[str]:
    """What the tokenizer learns from: every wording of every question and answer, and the plain text."""
    for task in TASKS:
        for language in LANGUAGES:
            yield from QUESTIONS[task, language]
            for first in range(10):
                for other in range(10) if task == "sum" else range(1):
                    yield answer(task, language, (first, other))
    yield from texts()


__all__ = [
    "Digits",
    "Example",
    "all_text",
    "answer",
    "draw",
    "example",
    "in_english",
    "load_digits",
    "picture",
    "pixels_of",
    "texts",
]
