"""Answers by `generate`, and how good they are: accuracy, macro precision, recall and F1, BLEU and
ROUGE-L."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from ..models import digits_checkpoint
from ..models.gpt4v import GPT4VForConditionalGeneration, GPT4VProcessor
from . import data

PAIR_SEED = 1
MOST_IMAGES = 2  # of a question that the demo trains on
Loaded = tuple[GPT4VForConditionalGeneration, GPT4VProcessor]


def load(checkpoint: str | None = None) -> Loaded:
    """The model in fp32 and eval mode, and its processor; None loads the shipped checkpoint."""
    folder = digits_checkpoint() if checkpoint is None else str(checkpoint)
    weights = Path(folder) / "model.safetensors"
    return _load(folder, weights.stat().st_mtime_ns if weights.is_file() else 0)


@lru_cache(maxsize=2)
def _load(folder: str, written_ns: int) -> Loaded:
    """`load`, remembered for as long as the folder holds the same weights."""
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = GPT4VForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    finally:
        if bars:
            logging.enable_progress_bar()
    return model, GPT4VProcessor.from_pretrained(folder)


def generate_answers(
    loaded: Loaded, prompts: Sequence[str], images: Sequence[Sequence[Any]], max_new_tokens: int = 32
) -> list[str]:
    """The greedy answer to each prompt; `images` are those of each prompt."""
    model, processor = loaded
    flat = [image for own in images for image in own]
    inputs = processor(images=flat or None, text=list(prompts), padding=True)
    out = model.generate(**inputs.to(model.device), max_new_tokens=max_new_tokens, do_sample=False)
    texts = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def ask(image: Any, question: str = "", checkpoint: str | None = None, max_new_tokens: int = 32) -> str:
    """The model's answer to a question about an image.

    Args:
        image: a path, PIL image or array, a list of one or two of them, or None for a question without one.
        question: in English or Chinese; empty for a caption. `<image>` marks say where the images stand;
            without them they come first.
        checkpoint: a folder that `gpt4v-fast demo` made; None takes the shipped one.
    Raises:
        ValueError, FileNotFoundError: an unreadable image or checkpoint, more than two images (the model has seen no
            more in one question, and would answer about some of them), or marks that do not match the images.
    """
    images = [] if image is None else list(image) if isinstance(image, list | tuple) else [image]
    if len(images) > MOST_IMAGES:
        raise ValueError(f"a question must be about at most {MOST_IMAGES} images, got {len(images)}")
    if "<image>" not in question:
        question = "<image>" * len(images) + question
    return generate_answers(load(checkpoint), [f"<|user|>{question}<|assistant|>"], [images], max_new_tokens)[0]


def verdict(task: str, text: str) -> int:
    """What a generated answer says: the last number in it, or for parity 0 (even) and 1 (odd); -1 for
    nothing."""
    if task == "parity":
        found = re.findall(r"even|odd|偶|奇", text)
        return -1 if not found else int(found[-1] in ("odd", "奇"))
    numbers = re.findall(r"\d{1,3}", text)
    return int(numbers[-1]) if numbers else -1


def truth(item: data.Example, split: data.Digits) -> int:
    """The right verdict."""
    digits = [int(split.labels[i]) for i in item.images]
    return digits[0] % 2 if item.task == "parity" else sum(digits)


def exam(split: data.Digits) -> Iterator[data.Example]:
    """Every digit of the split in every task and language; for a sum each meets another one, by a fixed
    draw."""
    partners = np.random.default_rng(PAIR_SEED).permutation(len(split.labels))
    for task in data.TASKS:
        for language in data.LANGUAGES:
            wordings = data.QUESTIONS[task, language]
            for i, partner in enumerate(partners):
                images = (i, int(partner)) if task == "sum" else (i,)
                yield data.example(task, language, split, images, wordings[i % len(wordings)])


class _ChineseTokenizer:
    """Words of Latin letters and digits, and Chinese characters one by one (rouge-score's own drops the
    latter)."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[a-z0-9]+|[\u4e00-\u9fff]", text.lower())


def caption_scores(answers: Sequence[str], references: Sequence[str], language: str) -> dict[str, float]:
    """Corpus BLEU (sacrebleu, 0 to 100, characters for Chinese) and mean ROUGE-L F1 (0 to 100)."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu

    bleu = corpus_bleu(list(answers), [list(references)], tokenize="zh" if language == "zh" else "13a")
    scorer = RougeScorer(["rougeL"], tokenizer=_ChineseTokenizer())
    rouge = [scorer.score(r, a)["rougeL"].fmeasure for r, a in zip(references, answers, strict=True)]
    return {"bleu": round(bleu.score, 2), "rouge_l": round(100 * float(np.mean(rouge)), 2)}


def class_scores(wanted: Sequence[int], got: Sequence[int]) -> dict[str, float]:
    """Accuracy and macro precision, recall and F1 over the classes that occur, 0 to 1; -1 is never right."""
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    classes = sorted(set(wanted))
    scores = precision_recall_fscore_support(wanted, got, labels=classes, average="macro", zero_division=0)
    names = ("macro_precision", "macro_recall", "macro_f1")
    rounded = {name: round(float(value), 4) for name, value in zip(names, scores, strict=False)}
    return {"accuracy": round(float(accuracy_score(wanted, got)), 4), **rounded}


def evaluate(
    checkpoint: str | None = None, batch: int = 180, limit: int | None = None, progress: bool = False
) -> dict[str, Any]:
    """Answers every question about the held-out digits by greedy `generate` and scores the answers.

    Args:
        checkpoint: a folder; None takes the shipped one.
        batch: questions answered together.
        limit: only the first so many held-out digits.
        progress: show a progress bar.
    Returns:
        {"accuracy": {task: share}, "tasks": {task: {"en": scores, "zh": scores, "all": their mean}},
        "confusion": 10 x 10 counts (row: the digit, column: the answer), "questions": how many,
        "items": each question with its answer}.
    """
    from tqdm import tqdm

    split = data.load_digits()[1]
    if limit is not None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        split = data.Digits(split.images[:limit], split.labels[:limit])
    loaded, questions = load(checkpoint), list(exam(split))
    pictures = [data.picture(image) for image in split.images]
    answers: list[str] = []
    for start in tqdm(range(0, len(questions), batch), desc="evaluate", disable=not progress):
        part = questions[start : start + batch]
        own = [[pictures[i] for i in item.images] for item in part]
        answers += generate_answers(loaded, [item.prompt for item in part], own)
    return score(questions, answers, split)


def score(questions: Sequence[data.Example], answers: Sequence[str], split: data.Digits) -> dict[str, Any]:
    """What `evaluate` returns, of answers that are already there."""
    rows = list(zip(questions, answers, strict=True))
    tasks = {
        task: {
            language: _score_task(task, [r for r in rows if r[0].task == task and r[0].language == language], split)
            for language in data.LANGUAGES
        }
        for task in data.TASKS
    }
    for parts in tasks.values():
        parts["all"] = {name: round(float(np.mean([p[name] for p in parts.values()])), 4) for name in parts["en"]}
    confusion = np.zeros((10, 10), int)
    for item, text in rows:
        if item.task == "digit" and 0 <= (said := verdict("digit", text)) <= 9:
            confusion[truth(item, split), said] += 1
    return {
        "accuracy": {task: parts["all"]["accuracy"] for task, parts in tasks.items()},
        "tasks": tasks,
        "confusion": confusion.tolist(),
        "questions": len(rows),
        "items": [
            {
                "task": item.task,
                "language": item.language,
                "question": item.question,
                "images": list(item.images),
                "expected": item.answer,
                "answer": text,
                "right": is_right(item, text, split),
            }
            for item, text in rows
        ],
    }


def is_right(item: data.Example, text: str, split: data.Digits) -> bool:
    """Captions must be the expected words; of other answers only the verdict counts."""
    return text == item.answer if item.task == "caption" else verdict(item.task, text) == truth(item, split)


def _score_task(task: str, rows: Sequence[tuple[data.Example, str]], split: data.Digits) -> dict[str, float]:
    items, answers = [item for item, _ in rows], [text for _, text in rows]
    if task == "caption":
        exact = float(np.mean([is_right(item, text, split) for item, text in rows]))
        scores = caption_scores(answers, [item.answer for item in items], items[0].language)
        return {"accuracy": round(exact, 4), **scores}
    return class_scores([truth(item, split) for item in items], [verdict(task, text) for text in answers])


__all__ = ["ask", "evaluate", "exam", "generate_answers", "load", "score", "verdict"]
