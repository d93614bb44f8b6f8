"""Training of the demo: batches, augmentation, the schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from ..models.gpt4v import (
    GPT4VConfig,
    GPT4VForConditionalGeneration,
    GPT4VImageProcessor,
    GPT4VProcessor,
    GPT4VTokenizer,
)
from . import data

# Shares of a batch. Sums are the hardest and see two images; captions and text need little.
MIXTURE = {"digit": 0.2, "parity": 0.2, "sum": 0.36, "caption": 0.14, "text": 0.1}
IGNORE = -100


@dataclass(frozen=True)
class Plan:
    """What the demo trains. `steps` of `batch` questions; the learning rate warms up, then follows a
    cosine."""

    preset: str = "tiny"
    vocab: int = 640
    steps: int = 700
    batch: int = 64
    learning_rate: float = 2e-3
    warmup: int = 60
    weight_decay: float = 0.05
    seed: int = 0

    def rate(self, step: int) -> float:
        """The share of `learning_rate` at `step`."""
        progress = max(0.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return min(1.0, (step + 1) / self.warmup) * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)


class Batch(NamedTuple):
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    pixel_values: torch.Tensor


def make_processor(plan: Plan, config: GPT4VConfig) -> GPT4VProcessor:
    """The tokenizer learnt from the demo's text, and the image processor of the model's image size."""
    side = config.vision_config.image_size
    images = GPT4VImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    tokenizer = GPT4VTokenizer.train_from_iterator(data.all_text(), plan.vocab)
    return GPT4VProcessor(images, tokenizer, image_seq_length=config.image_seq_length)


def make_model(plan: Plan, **overrides: object) -> tuple[GPT4VForConditionalGeneration, GPT4VProcessor]:
    """The untrained model from `plan.seed`, and its processor; `overrides` are arguments of `GPT4VConfig`."""
    attention = overrides.pop("attn_implementation", None)
    text = {"vocab_size": plan.vocab}
    config = GPT4VConfig.from_preset(plan.preset, text_config=text, attn_implementation=attention, **overrides)
    processor = make_processor(plan, config)
    ids = processor.tokenizer.convert_tokens_to_ids
    config.image_token_id, config.pad_token_id = processor.image_token_id, processor.tokenizer.pad_token_id
    config.bos_token_id = config.eos_token_id = processor.tokenizer.eos_token_id
    config.caption_prompt_ids = [ids("<|user|>"), config.image_token_id, ids("<|assistant|>")]
    torch.manual_seed(plan.seed)
    return GPT4VForConditionalGeneration(config), processor


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """uint8 images (N, 3, H, W), each turned by up to 12 degrees, scaled by 0.9 to 1.1 and moved by up to
    1/16."""
    count = len(pixels)
    angle, scale, right, down = (torch.rand(4, count, generator=generator) * 2 - 1) * torch.tensor(
        [[math.radians(12)], [0.1], [0.125], [0.125]]  # affine_grid's unit is half an image
    )
    scale = 1 + scale
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack([torch.stack([cos, -sin, right], 1), torch.stack([sin, cos, down], 1)], 1)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels.float(), grid, align_corners=False).round().clamp(0, 255).to(torch.uint8)


class Batches:
    """Endless batches, a function of the seed alone."""

    def __init__(self, plan: Plan, processor: GPT4VProcessor, split: data.Digits):
        self.plan, self.processor, self.split = plan, processor, split
        self.pixels = data.pixels_of(split.images, processor)
        self.texts = data.texts()
        self.ids = lru_cache(maxsize=None)(self._ids)

    def _ids(self, text: str) -> list[int]:
        image = self.processor.image_token
        expanded = text.replace(image, image * self.processor.image_seq_length)
        return self.processor.tokenizer(expanded, add_special_tokens=False)["input_ids"]

    def __iter__(self) -> Iterator[Batch]:
        plan = self.plan
        rng = np.random.default_rng(plan.seed)
        generator = torch.Generator().manual_seed(plan.seed)
        tasks, shares = list(MIXTURE), list(MIXTURE.values())
        while True:
            rows: list[tuple[str, str]] = []
            images: list[int] = []
            for task in rng.choice(tasks, size=plan.batch, p=shares):
                if task == "text":
                    rows.append(("", self.texts[rng.integers(len(self.texts))]))
                else:
                    question = data.draw(rng, self.split, str(task))
                    rows.append((question.prompt, question.answer))
                    images.extend(question.images)
            yield self.collate(rows, augment(self.pixels[images], generator))

    def collate(self, rows: Sequence[tuple[str, str]], pixels: torch.Tensor) -> Batch:
        """(prompt, answer) pairs, padded on the right; only answers and their end carry labels."""
        end = self.processor.tokenizer.eos_token_id
        prompts = [self.ids(prompt) for prompt, _ in rows]
        answers = [[*self.ids(text), end] for _, text in rows]
        length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        ids = torch.full((len(rows), length), self.processor.tokenizer.pad_token_id)
        labels, mask = torch.full_like(ids, IGNORE), torch.zeros_like(ids)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            stop = len(prompt) + len(answer)
            ids[row, :stop] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : stop] = torch.tensor(answer)
            mask[row, :stop] = 1
        return Batch(ids, mask, labels, pixels)


def make_optimizer(
    plan: Plan, model: torch.nn.Module
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW, with weight decay on matrices only, and its schedule."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": plan.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.98))
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, plan.rate)


class Trainer:
    """One model on its way through the batches."""

    def __init__(self, plan: Plan, model: GPT4VForConditionalGeneration):
        self.model = model.train()
        self.optimizer, self.schedule = make_optimizer(plan, model)

    def step(self, batch: Batch) -> float:
        """One update; returns the loss before it."""
        loss = self.model(**batch._asdict()).loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        return float(loss.detach())


def train(
    plan: Plan, model: GPT4VForConditionalGeneration, batches: Batches, report: Callable[[int, float], None]
) -> list[float]:
    """The whole run; `report(step, loss)` is called after each step. Returns the losses."""
    trainer, losses = Trainer(plan, model), []
    for step, batch in zip(range(plan.steps), batches, strict=False):
        losses.append(trainer.step(batch))
        report(step, losses[-1])
    return losses


__all__ = ["Batch", "Batches", "Plan", "Trainer", "augment", "make_model", "train"]
