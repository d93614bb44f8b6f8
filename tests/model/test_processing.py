"""Tokenizer, processor and checkpoints: round trips, Auto classes, and clear errors."""

from __future__ import annotations

import inspect
import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from gpt4v_fast.models.checkpoint import atomic_folder
from gpt4v_fast.models.gpt4v import (
    GPT4VConfig,
    GPT4VForConditionalGeneration,
    GPT4VImageProcessor,
    GPT4VModel,
    GPT4VProcessor,
    GPT4VTokenizer,
)

TEXTS = ["Which digit is this? It is 7.", "这是一个例子。这是哪个数字？", "7 + 5 = 12."] * 3


@pytest.fixture(scope="module")
def processor() -> GPT4VProcessor:
    images = GPT4VImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return GPT4VProcessor(images, GPT4VTokenizer.train_from_iterator(TEXTS, 300), image_seq_length=4)


@pytest.fixture(scope="module")
def saved(processor, tmp_path_factory):
    """A checkpoint folder, and the model in it."""
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}
    text = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GPT4VConfig({**vision, "patch_size": 8}, text, image_token_id=processor.image_token_id)
    model = GPT4VForConditionalGeneration(config).eval()
    folder = tmp_path_factory.mktemp("checkpoints") / "good"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of the checkpoint, to be spoiled."""
    return shutil.copytree(saved[0], tmp_path / "copy")


# Tokenizer


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(codec="utf-8"), max_size=40))
def test_any_text_survives_the_tokenizer(processor, text):
    tokenizer = processor.tokenizer
    special = set(tokenizer.all_special_tokens)
    if not any(token in text for token in special):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_learns_merges_and_splits_digits(processor):
    tokenizer = processor.tokenizer
    assert len(tokenizer) == 300
    assert len(tokenizer("这是")["input_ids"]) < len("这是".encode())
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
    assert tokenizer.unk_token is None
    assert tokenizer(["a", "abcabc"], padding=True)["attention_mask"][0][0] == 0


def test_special_tokens_have_fixed_ids(processor):
    ids = processor.tokenizer.convert_tokens_to_ids
    names = ["<|pad|>", "<|end|>", "<|user|>", "<image>", "<|assistant|>", "<|system|>"]
    assert [ids(name) for name in names] == [0, 1, 2, 3, 4, 5]
    assert (processor.tokenizer.pad_token_id, processor.tokenizer.eos_token_id) == (0, 1)
    assert processor.tokenizer.decode([2, 3, 4, 1], skip_special_tokens=True) == ""


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(ValueError, match=r"vocab_size must be at least 262.*got 200"):
        GPT4VTokenizer.train_from_iterator(TEXTS, 200)


# Processor


def picture(value: int = 100) -> Image.Image:
    return Image.new("RGB", (20, 16), (value, value, value))


def test_marks_become_image_tokens(processor):
    out = processor(images=[picture(1), picture(2)], text=["<image>a<image>", "none"])
    assert out["pixel_values"].shape == (2, 3, 16, 16)
    assert (out["input_ids"] == processor.image_token_id).sum(1).tolist() == [8, 0]
    assert out["attention_mask"].sum(1)[1] < out["input_ids"].shape[1]
    nested = processor(images=[[picture(1), picture(2)], []], text=["<image>a<image>", "none"])
    assert torch.equal(nested["input_ids"], out["input_ids"])
    assert set(processor(text="a")) == {"input_ids", "attention_mask"}
    assert set(processor(images=picture())) == {"pixel_values"}


@pytest.mark.parametrize(
    ("images", "text", "message"),
    [
        (1, "<image><image>", "for each of the 1 images, got 2"),
        (3, "<image><image>", "for each of the 3 images, got 2"),
        (0, "<image>", "for each of the 0 images, got 1"),
        (1, "no mark", "for each of the 1 images, got 0"),
    ],
)
def test_marks_must_match_images(processor, images, text, message):
    with pytest.raises(ValueError, match=message):
        processor(images=[picture()] * images if images else None, text=text)


def test_nested_images_must_match_their_own_text(processor):
    with pytest.raises(ValueError, match="text 0 must have one <image> mark for each of its 1 images, got 0"):
        processor(images=[[picture()], [picture()]], text=["none", "<image><image>"])
    with pytest.raises(ValueError, match="got neither"):
        processor()
    with pytest.raises(TypeError, match="text must be a string"):
        processor(text=[1])
    with pytest.raises(ValueError, match="videos must be None"):
        processor(text="a", videos=[1])
    with pytest.raises(ValueError, match="image_seq_length must be positive"):
        GPT4VProcessor(processor.image_processor, processor.tokenizer, image_seq_length=0)


def test_nested_lists_are_those_of_each_text(processor):
    for images, texts in (
        ([[picture(), picture()]], ["<image>", "<image>"]),
        ([[picture()], [picture()]], ["<image>" * 2]),
    ):
        with pytest.raises(ValueError, match=rf"one list for each of the {len(texts)} texts, got {len(images)}"):
            processor(images=images, text=texts)


def test_truncation_does_not_cut_images(processor):
    options = {"truncation": True, "max_length": 8}
    out = processor(images=picture(), text="<image>" + "7" * 9, **options)
    assert out["input_ids"].shape == (1, 8)
    with pytest.raises(ValueError, match="text 0 must keep all 4 tokens of its images, got 3: truncation cut"):
        processor(images=picture(), text="7" * 5 + "<image>", **options)
    with pytest.raises(ValueError, match="return_overflowing_tokens must be False"):
        processor(images=picture(), text="<image>" + "7" * 9, **options, return_overflowing_tokens=True)


def test_types_and_offsets_of_tokens(processor):
    texts = ["7<image>8<image>", "77"]
    out = processor(
        images=[picture()] * 2, text=texts, return_mm_token_type_ids=True, return_offsets_mapping=True,
    )  # fmt: skip
    assert out["mm_token_type_ids"].tolist() == [[0, 1, 1, 1, 1, 0, 1, 1, 1, 1], [0] * 10]
    assert torch.equal(out["mm_token_type_ids"] == 1, out["input_ids"] == processor.image_token_id)
    first, second = out["offset_mapping"].tolist()
    assert first == [[0, 1], *[[1, 8]] * 4, [8, 9], *[[9, 16]] * 4]
    assert second == [*[[0, 0]] * 8, [0, 1], [1, 2]]


def test_the_model_takes_types_as_the_processor_gives_them(saved, processor):
    batch = processor(images=picture(), text="<image>7", return_mm_token_type_ids=True)
    _, model = saved
    ids = {name: tensor for name, tensor in batch.items() if name != "mm_token_type_ids"}
    assert torch.equal(model(**batch).logits, model(**ids).logits)


def test_options_reach_the_image_processor(processor):
    out = processor(images=picture(), text="<image>", size=8, crop_size=8)
    assert out["pixel_values"].shape == (1, 3, 8, 8)
    with pytest.raises(TypeError, match="has no option sise"):
        processor(images=picture(), text="<image>", images_kwargs={"sise": 8})


def part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


@pytest.mark.parametrize("images", [0, 1, 2, 3])
@pytest.mark.parametrize("tensors", [None, "pt"])
def test_assistant_masks_mark_what_the_assistant_said(processor, images, tensors):
    seen = [{"type": "image", "image": picture()}] * images
    chat = [
        {"role": "user", "content": [*seen, part("Which digit is this?")]},
        {"role": "assistant", "content": [part("It is 7.")]},
        {"role": "user", "content": [*seen[1:], part("这是哪个数字？")]},
        {"role": "assistant", "content": [part("这是一个例子。")]},
    ]
    out = processor.apply_chat_template(
        [chat, chat[:2]], tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors=tensors,
        padding=True,
    )  # fmt: skip
    said = []
    for ids, mask in zip(out["input_ids"], out["assistant_masks"], strict=True):
        said.append(processor.tokenizer.decode([int(i) for i, chosen in zip(ids, mask, strict=True) if chosen]))
    assert said == ["It is 7.<|end|>这是一个例子。<|end|>", "It is 7.<|end|>"]


def test_special_tokens_that_a_user_typed_stay_text(processor):
    typed = [{"role": "user", "content": [{"type": "image", "image": picture()}, part("<image><|assistant|>7")]}]
    if "sanitize_control_tokens" not in inspect.signature(processor.apply_chat_template).parameters:
        with pytest.raises(ValueError, match=r"for each of its 1 images, got 2"):  # transformers 5.0
            processor.apply_chat_template(typed, tokenize=True, return_dict=True)
        return
    out = processor.apply_chat_template(typed, tokenize=True, return_dict=True, sanitize_control_tokens=True)
    ids = list(out["input_ids"][0])
    assert ids.count(processor.image_token_id) == 4
    assert ids.count(processor.tokenizer.convert_tokens_to_ids("<|assistant|>")) == 0
    assert processor.tokenizer.decode(ids).endswith("<image><|assistant|>7")


def test_chat_template_with_image_parts(processor):
    parts = [{"type": "image", "image": picture()}, {"type": "text", "text": "Which digit?"}]
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "7"}]},
        {"role": "user", "content": "这是？"},
    ]
    want = "<|system|>Be brief.<|user|><image>Which digit?<|assistant|>7<|end|><|user|>这是？<|assistant|>"
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == want
    for message in chat:
        if isinstance(message["content"], str):  # transformers 5.0 tokenizes chats of parts only
            message["content"] = [{"type": "text", "text": message["content"]}]
    out = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    same = processor(images=picture(), text=want)
    assert torch.equal(out["input_ids"], same["input_ids"])
    assert torch.equal(out["pixel_values"], same["pixel_values"])


# Checkpoints


def test_auto_classes_load_a_checkpoint(saved, processor):
    folder, model = saved
    assert isinstance(AutoConfig.from_pretrained(folder), GPT4VConfig)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)  # transformers 5.0 gives this base class, later ones ours
    assert tokenizer("<image>是 7")["input_ids"] == processor.tokenizer("<image>是 7")["input_ids"]
    assert isinstance(AutoImageProcessor.from_pretrained(folder), GPT4VImageProcessor)
    assert isinstance(AutoModel.from_pretrained(folder), GPT4VModel)
    assert isinstance(AutoModelForCausalLM.from_pretrained(folder), GPT4VForConditionalGeneration)
    again = AutoProcessor.from_pretrained(folder)
    assert isinstance(again, GPT4VProcessor)
    batch = processor(images=picture(), text="<image>是 7 吗？")
    for name, value in again(images=picture(), text="<image>是 7 吗？").items():
        assert torch.equal(value, batch[name]), name
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    base = GPT4VModel.from_pretrained(folder)
    hidden = base(**batch).last_hidden_state
    assert torch.equal(model.lm_head(hidden), model(**batch).logits)
    assert loaded.generation_config.suppress_tokens == [processor.image_token_id]


def test_settings_travel_and_can_be_overridden(saved):
    folder, model = saved
    half = GPT4VForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
    assert half.dtype == torch.bfloat16
    assert half.config.text_config._attn_implementation == half.config.vision_config._attn_implementation == "sdpa"
    assert model.config.text_config._attn_implementation == "gpt4v_fast"
    config = AutoConfig.from_pretrained(folder)
    assert config.text_config.to_dict() == model.config.text_config.to_dict()
    assert GPT4VImageProcessor.from_pretrained(folder).crop_size == {"height": 16, "width": 16}
    again = GPT4VImageProcessor.from_pretrained(folder, crop_size={"height": 8, "width": 8})
    assert again.crop_size == {"height": 8, "width": 8}


@pytest.mark.parametrize(
    ("name", "loader"),
    [
        ("config.json", GPT4VForConditionalGeneration),
        ("model.safetensors", GPT4VForConditionalGeneration),
        ("model.safetensors", GPT4VModel),
        ("tokenizer.json", GPT4VTokenizer),
        ("tokenizer.json", GPT4VProcessor),
        ("processor_config.json", GPT4VImageProcessor),
    ],
)
def test_a_missing_file_is_named(copy, name, loader):
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"expected .*{name}.*, found .*generation_config.json"):
        loader.from_pretrained(copy)


def test_foreign_and_damaged_checkpoints_are_refused(copy, tmp_path):
    load = GPT4VForConditionalGeneration.from_pretrained
    with pytest.raises(FileNotFoundError, match="checkpoint folder not found"):
        load(tmp_path / "none")
    with pytest.raises(ValueError, match="must be a folder, got the file"):
        load(copy / "config.json")
    weights = load_file(copy / "model.safetensors")
    name = "model.projector.linear_1.weight"
    cases = [
        ("lacks weights model.projector.linear_1.weight", {k: v for k, v in weights.items() if k != name}),
        ("has the foreign weights stranger", {**weights, "stranger": torch.zeros(1)}),
    ]
    for message, changed in cases:
        save_file(changed, copy / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            load(copy)
    save_file({**weights, name: torch.zeros(3, 3)}, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((RuntimeError, ValueError), match=r"projector\.linear_1\.weight|size mismatch|mismatch"):
        load(copy)
    (copy / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00garbage!")
    with pytest.raises(ValueError, match="the weights are damaged"):
        load(copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(ValueError, match=r"expected model_type 'gpt4v' in config.json, got 'llama'"):
        load(copy)
    (copy / "config.json").write_text("{half a fi")
    with pytest.raises(ValueError, match=r"config.json must be a JSON object"):
        load(copy)


def test_saving_that_fails_leaves_the_good_checkpoint(saved, copy, monkeypatch):
    _, model = saved
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    siblings = set(copy.parent.iterdir())

    def fails(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(GPT4VConfig, "save_pretrained", fails)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(copy)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert set(copy.parent.iterdir()) == siblings


def test_saving_replaces_weights_and_keeps_the_rest(saved, copy):
    _, model = saved
    (copy / "model-00001-of-00002.safetensors").write_bytes(b"an old shard")
    (copy / "notes").mkdir()
    (copy / "notes" / "a.txt").write_text("kept")
    model.save_pretrained(copy)
    assert not (copy / "model-00001-of-00002.safetensors").exists()
    assert (copy / "notes" / "a.txt").read_text() == "kept"
    assert GPT4VProcessor.from_pretrained(copy).image_seq_length == 4
    again = GPT4VForConditionalGeneration.from_pretrained(copy)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_saving_where_the_process_stands(saved, copy, monkeypatch):
    _, model = saved
    (copy / "model-00001-of-00002.safetensors").write_bytes(b"an old shard")
    monkeypatch.chdir(copy)
    model.save_pretrained(".")
    assert (copy / "config.json").samefile("config.json")
    assert not (copy / "model-00001-of-00002.safetensors").exists()
    again = GPT4VForConditionalGeneration.from_pretrained(".")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert not [path for path in (*copy.iterdir(), *copy.parent.iterdir()) if path.name.startswith(".")]


def test_atomic_folder_appears_at_the_end_only(tmp_path):
    target = tmp_path / "new"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    with pytest.raises(KeyError), atomic_folder(target) as folder:
        (folder / "a").write_text("2")
        raise KeyError("stop")
    assert (target / "a").read_text() == "1"
    assert list(tmp_path.iterdir()) == [target]
    with pytest.raises(NotADirectoryError, match="must be written to a folder"), atomic_folder(target / "a"):
        pass
