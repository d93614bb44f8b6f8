"""What the tests of the model share: small models and batches, and the implementations that they run with."""

from __future__ import annotations

import torch

from gpt4v_fast.models.gpt4v import GPT4VConfig, GPT4VForConditionalGeneration

IMAGE, PAD, END = 3, 0, 1
OURS = {"attention": "gpt4v_fast", "patch_embed": "gpt4v_fast", "loss": "gpt4v_fast"}
STOCK = {"attention": "sdpa", "patch_embed": "conv", "loss": "torch"}
EAGER = {**STOCK, "attention": "eager"}


def make_config(**overrides) -> GPT4VConfig:
    vision = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    vision |= {"image_size": 12, "patch_size": 3, **overrides.pop("vision", {})}
    text = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "intermediate_size": 48, **overrides.pop("text", {})}
    return GPT4VConfig(vision, text, **{"projector_merge": 2, "image_token_id": IMAGE, **overrides})


def make_model(**overrides) -> GPT4VForConditionalGeneration:
    torch.manual_seed(0)
    model = GPT4VForConditionalGeneration(make_config(**overrides))
    with torch.no_grad():  # larger than the initial weights, so that attention is far from uniform
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model.eval()


def use(model: GPT4VForConditionalGeneration, which: dict[str, str]) -> GPT4VForConditionalGeneration:
    model.set_attn_implementation(which["attention"])
    model.config.vision_config.patch_embed_implementation = which["patch_embed"]
    model.config.loss_implementation = which["loss"]
    return model


def make_batch(padding: str = "left", seed: int = 1) -> dict[str, torch.Tensor]:
    """Rows with two adjacent images, one image, and text alone; labels on the last tokens."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        return torch.randint(6, 61, (count,), generator=generator).tolist()

    image = [IMAGE] * 4
    rows = [words(2) + image + image + words(5), words(1) + image + words(6), words(7)]
    length = max(map(len, rows))
    ids, mask = torch.full((3, length), PAD), torch.zeros(3, length, dtype=torch.long)
    labels = torch.full((3, length), -100)
    for i, row in enumerate(rows):
        at = slice(length - len(row), length) if padding == "left" else slice(0, len(row))
        ids[i, at], mask[i, at] = torch.tensor(row), 1
        stop = at.stop
        labels[i, stop - 3 : stop] = ids[i, stop - 3 : stop]
    pixels = torch.randint(0, 256, (3, 3, 12, 12), generator=generator, dtype=torch.uint8)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}


def prompt(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}
