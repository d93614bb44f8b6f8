"""The model's presets, configurations and inputs, and those that are refused."""

from __future__ import annotations

import re

import pytest
from model_cases import PAD, make_batch, make_config, make_model

from gpt4v_fast.models.gpt4v import PRESETS, GPT4VConfig, parameter_count, presets


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_of_presets_is_true(name):
    row = re.search(rf"^\| {name} \|(.*)\|$", presets.__doc__, re.MULTILINE)
    cells = [cell.strip() for cell in row.group(1).split("|")]
    config = GPT4VConfig.from_preset(name)
    vision, text = config.vision_config, config.text_config
    heads = f"({text.num_attention_heads}, {text.num_key_value_heads})"
    assert cells == [
        f"{parameter_count(name):,}",
        str(vision.image_size),
        str(config.image_seq_length),
        f"{vision.hidden_size} x {vision.num_hidden_layers}",
        f"{text.hidden_size} x {text.num_hidden_layers} {heads}",
    ]


def test_preset_overrides_reach_the_parts():
    config = GPT4VConfig.from_preset("tiny", text_config={"vocab_size": 300}, projector_merge=1)
    assert (config.text_config.vocab_size, config.text_config.hidden_size) == (300, 128)
    assert config.image_seq_length == 16
    with pytest.raises(ValueError, match="preset must be one of"):
        GPT4VConfig.from_preset("huge")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vision": {"patch_size": 5}}, "image_size must be a positive multiple of patch_size"),
        ({"vision": {"num_attention_heads": 5}}, "multiple of num_attention_heads"),
        ({"vision": {"image_mean": [0.5]}}, "num_channels=3 values"),
        ({"vision": {"patch_embed_implementation": "fold"}}, "patch_embed_implementation must be one of"),
        ({"text": {"num_key_value_heads": 3}}, "multiple of num_key_value_heads"),
        ({"text": {"head_dim": 7}}, "head_dim must be positive and even"),
        ({"text": {"sliding_window": 4}}, "sliding_window must be None"),
        ({"text": {"layer_types": ["full_attention", "sliding_attention"]}}, "layer_types full_attention"),
        ({"projector_merge": 3}, "projector_merge must divide"),
        ({"image_token_id": 61}, r"image_token_id must be in \[0, 61\)"),
        ({"loss_implementation": "liger"}, "loss_implementation must be one of"),
    ],
)
def test_bad_configurations_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_config(**arguments)


def test_bad_inputs_are_refused():
    model, batch = make_model(), make_batch()
    ids, pixels = batch["input_ids"], batch["pixel_values"]
    cases = [
        (
            ValueError,
            "must have 4 <image> tokens.*8 in all.*got 12",
            {"pixel_values": pixels[:2]},
        ),
        (ValueError, "12 <image> tokens, but no pixel_values", {"pixel_values": None}),
        (ValueError, "pixel_values must have shape", {"pixel_values": pixels[0]}),
        (ValueError, "multiples of 6", {"pixel_values": pixels[..., :10]}),
        (ValueError, "pixel_values must have shape", {"pixel_values": pixels[:, :1]}),
        (ValueError, "attention_mask must have shape", {"attention_mask": batch["attention_mask"][:, 1:]}),
        (ValueError, "labels must have shape", {"labels": batch["labels"][:, 1:]}),
        (IndexError, r"input_ids must be in \[0, 61\)", {"input_ids": ids.masked_fill(ids == PAD, 61)}),
        (IndexError, r"input_ids must be in \[0, 61\)", {"input_ids": ids.masked_fill(ids == PAD, -1)}),
        (ValueError, "exactly one of input_ids and inputs_embeds", {"input_ids": None}),
    ]
    for kind, message, change in cases:
        with pytest.raises(kind, match=message):
            model(**{**batch, **change})
    with pytest.raises(ValueError, match="attn_implementation must be"):
        model.set_attn_implementation("flash_attention_2")
    with pytest.raises(TypeError, match="vision_config must be"):
        GPT4VConfig(vision_config=3)
