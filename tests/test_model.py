"""The model: every implementation against fp64, caches, padding, image blocks, generation, loss, Trainer."""

from __future__ import annotations

import copy
import functools
import re
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from closeness import Spreads, assert_close, spread_of
from transformers import Trainer, TrainingArguments
from transformers.generation.streamers import BaseStreamer

from gpt4v_fast.models.gpt4v import (
    PRESETS,
    GPT4VConfig,
    GPT4VForConditionalGeneration,
    GPT4VModel,
    parameter_count,
    presets,
)

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


def run(model: GPT4VForConditionalGeneration, which: dict[str, str], batch: dict[str, torch.Tensor]):
    """Logits of real tokens, loss, and every gradient, by name."""
    use(model, which).zero_grad(set_to_none=True)
    out = model(**batch)
    out.loss.backward()
    logits = out.logits[batch["attention_mask"].bool()].detach()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    return {"logits": logits, "loss": out.loss.detach(), **gradients}


@pytest.mark.parametrize("bidirectional", [True, False], ids=["image_blocks", "causal"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("which", [OURS, EAGER], ids=["gpt4v_fast", "eager"])
def test_implementations_agree_with_fp64(which, padding, bidirectional):
    model, batch = make_model(image_bidirectional=bidirectional), make_batch(padding)
    double = copy.deepcopy(model).double()
    exact = run(double, EAGER, batch)
    spreads = Spreads(lambda mode: list(run(double, EAGER, batch).values()), list(exact.values()))
    native, fast = run(model, STOCK, batch), run(model, which, batch)
    for i, name in enumerate(exact):
        assert_close(fast[name], exact[name], native[name], name=name, spread=spreads.of(i))


def test_bf16_is_as_close_as_stock_pytorch():
    model, batch = make_model(), make_batch()
    labels = batch.pop("labels")
    keep = batch["attention_mask"].bool()
    half = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        # the fp64 model has the rounded weights, so that only the arithmetic differs
        exact = use(copy.deepcopy(half).double(), EAGER)(**batch).logits[keep]
        native = use(half, STOCK)(**batch).logits[keep]
        fast = use(half, OURS)(**batch).logits[keep]
        loss = half(**batch, labels=labels).loss
    assert fast.dtype == torch.bfloat16
    assert torch.isfinite(loss)
    error, stock = ((x.double() - exact).abs().mean() for x in (fast, native))
    assert error <= 1.5 * stock


def test_text_alone_and_images_alone_have_shapes():
    model = make_model()
    assert model(input_ids=torch.tensor([[7, 8, 9]])).logits.shape == (1, 3, 61)
    out = model.model(**{k: v for k, v in make_batch().items() if k != "labels"})
    assert out.last_hidden_state.shape == (3, 15, 32)
    assert out.image_hidden_states.shape == (3, 4, 32)


def test_hidden_states_attentions_and_tuples():
    model, batch = make_model(), make_batch()
    model.set_attn_implementation("eager")
    out = model(**batch, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 3
    assert [w.shape for w in out.attentions] == [(3, 4, 15, 15)] * 2
    total = out.attentions[0].sum(-1)
    torch.testing.assert_close(
        total, torch.ones_like(total), rtol=0, atol=15 * torch.finfo(total.dtype).eps
    )  # 15 terms
    assert isinstance(model(**batch, return_dict=False), tuple)
    model.set_attn_implementation("gpt4v_fast")
    with pytest.raises(ValueError, match="output_attentions needs attn_implementation='eager'"):
        model(**batch, output_attentions=True)


def test_image_blocks_are_bidirectional_and_separate():
    batch = make_batch()
    batch = {"input_ids": batch["input_ids"][:1], "pixel_values": batch["pixel_values"][:2]}
    changed = {**batch, "pixel_values": batch["pixel_values"].clone()}
    changed["pixel_values"][1, :, 6:, 6:] ^= 255  # the last token of the second image

    def moved(bidirectional: bool) -> list[bool]:
        model = make_model(image_bidirectional=bidirectional).model
        # the vision tower mixes the patches of an image, so features are put in place of pixels
        a, b = (model.get_image_features(x["pixel_values"]) for x in (batch, changed))
        b = torch.cat([a[:1], torch.cat([a[1:, :3], b[1:, 3:]], 1)])
        model.get_image_features = lambda pixels: pixels
        states = [model(batch["input_ids"], pixel_values=x).last_hidden_state[0] for x in (a, b)]
        return [not torch.equal(x, y) for x, y in zip(*states, strict=True)]

    text, first, second, rest = [False] * 2, [False] * 4, [True] * 4, [True] * 5
    assert moved(True) == text + first + second + rest
    assert moved(False) == text + first + [False] * 3 + [True] + rest


def test_left_padded_batch_equals_single_rows():
    model, batch = make_model(), make_batch()
    exact = use(copy.deepcopy(model).double(), EAGER)
    images = [(0, 2), (2, 3), None]
    with torch.no_grad():
        together = use(model, OURS)(**batch).logits
        for i, part in enumerate(images):
            ids = batch["input_ids"][i : i + 1, batch["attention_mask"][i].bool()]
            pixels = None if part is None else batch["pixel_values"][slice(*part)]
            alone = model(input_ids=ids, pixel_values=pixels).logits[0]

            def run_exact(**one) -> torch.Tensor:
                return exact(**one).logits[0]

            again = functools.partial(run_exact, input_ids=ids, pixel_values=pixels)
            want = again()
            assert_close(together[i, -ids.shape[1] :], want, alone, name=f"row {i}", spread=spread_of(again, want))


def test_packed_documents_equal_separate_rows():
    model = make_model()
    a, b = torch.randint(6, 61, (1, 5)), torch.randint(6, 61, (1, 4))
    with torch.no_grad():
        packed = model(
            input_ids=torch.cat([a, b], 1),
            attention_mask=torch.tensor([[1] * 5 + [2] * 4]),
            position_ids=torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]]),
        ).logits[0]
        alone = torch.cat([model(input_ids=x).logits[0] for x in (a, b)])
        exact_model = use(copy.deepcopy(model).double(), EAGER)

        def run_exact() -> torch.Tensor:
            return torch.cat([exact_model(input_ids=x).logits[0] for x in (a, b)])

        exact = run_exact()
        assert_close(packed, exact, alone, name="packed", spread=spread_of(run_exact, exact))


@pytest.mark.parametrize("which", [OURS, STOCK, EAGER], ids=["gpt4v_fast", "sdpa", "eager"])
@pytest.mark.parametrize("pieces", [(12, 1, 1, 1), (11, 4)], ids=["token_by_token", "chunk"])
def test_cache_equals_no_cache(which, pieces):
    model, batch = make_model(), make_batch()
    labels = batch.pop("labels")
    assert labels.shape == batch["input_ids"].shape
    with torch.no_grad():
        exact_model = use(copy.deepcopy(model).double(), EAGER)
        exact = exact_model(**batch).logits
        whole = use(model, which)(**batch).logits
        cache, parts, start = None, [], 0
        for count in pieces:
            stop = start + count
            out = model(
                input_ids=batch["input_ids"][:, start:stop],
                attention_mask=batch["attention_mask"][:, :stop],
                pixel_values=batch["pixel_values"] if start == 0 else None,
                past_key_values=cache,
                use_cache=True,
            )
            cache, start = out.past_key_values, stop
            parts.append(out.logits)
        keep = batch["attention_mask"].bool()
        spread = spread_of(lambda: exact_model(**batch).logits[keep], exact[keep])
        assert_close(torch.cat(parts, 1)[keep], exact[keep], whole[keep], name="cached", spread=spread)


def test_gradient_checkpointing_changes_nothing():
    batch = make_batch()
    plain = make_model().train()
    frugal = make_model().train()
    frugal.gradient_checkpointing_enable()
    losses = []
    for model in (plain, frugal):
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.detach())
    assert torch.equal(*losses)
    for (name, a), b in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_dropout_acts_in_training_only():
    text = {"hidden_dropout": 0.3, "attention_dropout": 0.3}
    model, batch = make_model(text=text, vision={"hidden_dropout": 0.3}), make_batch()
    assert torch.equal(model(**batch).loss, model(**batch).loss)
    model.train()
    assert not torch.equal(model(**batch).loss, model(**batch).loss)
    torch.manual_seed(5)
    first = model(**batch).loss
    torch.manual_seed(5)
    assert torch.equal(first, model(**batch).loss)


def test_loss_is_cross_entropy_and_training_stores_no_logits():
    model, batch = make_model(), make_batch()
    out = model(**batch)
    logits, labels = out.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    exact = F.cross_entropy(logits.double(), labels)
    assert_close(out.loss, exact, F.cross_entropy(logits, labels), name="loss")
    total = model(**batch, num_items_in_batch=torch.tensor(4)).loss
    want = F.cross_entropy(logits.double(), labels, reduction="sum") / 4
    assert_close(total, want, F.cross_entropy(logits, labels, reduction="sum") / 4, name="sum / items")
    model.train()
    assert model(**batch).logits is None
    assert model(**batch, return_logits=True).logits is not None
    assert model.eval()(**batch, return_logits=False).logits is None


def test_unlabelled_positions_do_not_matter():
    model, batch = make_model(), make_batch()
    counted = batch["labels"] != -100
    moved = batch["labels"].clone()
    moved[counted] = (moved[counted] + 1) % 61
    assert not torch.equal(model(**batch).loss, model(**{**batch, "labels": moved}).loss)
    with pytest.raises(IndexError, match="61"):
        model(**{**batch, "labels": batch["labels"].masked_fill(counted, 61)}).loss.item()


def test_an_image_of_another_size_is_interpolated():
    model = make_model()
    features = model.get_image_features(torch.zeros(2, 3, 18, 24, dtype=torch.uint8))
    assert features.shape == (2, 12, 32)
    table = model.model.vision_tower.positions(4, 4)
    assert torch.equal(table, model.model.vision_tower.position_embedding.flatten(0, 1))


def test_tied_and_untied_heads():
    tied, untied = make_model(), make_model(tie_word_embeddings=False)
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    assert untied.lm_head.weight is not untied.get_input_embeddings().weight
    assert tied.resize_token_embeddings(70).num_embeddings == 70
    assert tied.lm_head.weight.shape == (70, 32)


# Generation


def prompt(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no_cache"])
def test_greedy_is_the_argmax_of_each_step(use_cache):
    model, inputs = make_model(), prompt(make_batch())
    got = model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=use_cache, eos_token_id=-1)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        for _ in range(4):
            out = model(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"])
            logits = out.logits[:, -1].clone()
            logits[:, IMAGE] = -torch.inf
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
            mask = F.pad(mask, (0, 1), value=1)
    assert torch.equal(got, ids)


def test_generation_of_a_padded_batch_equals_single_prompts():
    model, inputs = make_model(), prompt(make_batch())
    together = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    ids = inputs["input_ids"][1:2, inputs["attention_mask"][1].bool()]
    alone = model.generate(input_ids=ids, pixel_values=inputs["pixel_values"][2:], max_new_tokens=5, do_sample=False)
    new = alone[0, ids.shape[1] :]
    assert torch.equal(together[1, inputs["input_ids"].shape[1] :][: len(new)], new)


def test_sampling_is_seeded_and_returns_several():
    model, inputs = make_model(), prompt(make_batch())
    rows = []
    for _ in range(2):
        torch.manual_seed(3)
        rows.append(model.generate(**inputs, max_new_tokens=6, do_sample=True, num_return_sequences=5))
    assert rows[0].shape[0] == 15
    assert torch.equal(*rows)
    assert len({tuple(row.tolist()) for row in rows[0][:5]}) > 1
    assert not (rows[0][:, 15:] == IMAGE).any()


def test_several_sequences_keep_their_own_images():
    model, inputs = make_model(), prompt(make_batch())
    greedy = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    several = model.generate(**inputs, max_new_tokens=4, do_sample=True, top_k=1, num_return_sequences=3)
    assert torch.equal(several, greedy.repeat_interleave(3, 0))


def test_beams_find_sequences_at_least_as_likely_as_greedy():
    model, inputs = make_model(), prompt(make_batch())

    def score(ids: torch.Tensor) -> torch.Tensor:
        mask = F.pad(inputs["attention_mask"], (0, 4), value=1)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"]).logits
        logits[..., IMAGE] = -torch.inf
        chosen = logits[:, 14:-1].log_softmax(-1).gather(-1, ids[:, 15:, None])
        return chosen.sum((1, 2))

    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1}
    greedy, beams = (model.generate(**inputs, **options, num_beams=n) for n in (1, 61))
    assert (score(beams) >= score(greedy) - 1e-4).all()
    assert model.generate(**inputs, **options, num_beams=4, num_return_sequences=3).shape == (9, 19)


def test_no_repeat_ngram_size():
    model, inputs = make_model(), prompt(make_batch())
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": -1}
    repeats = []
    for size in (0, 2):
        ids = model.generate(**inputs, **options, no_repeat_ngram_size=size)[:, 15:].tolist()
        repeats.append(any(len(set(pairwise(row))) < len(row) - 1 for row in ids))
    assert repeats == [True, False]


class Collect(BaseStreamer):
    def __init__(self) -> None:
        self.ids: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.ids.extend(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_streamer_gets_every_token():
    model, streamer = make_model(), Collect()
    ids = torch.tensor([[7, 8, 9]])
    out = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, streamer=streamer)
    assert streamer.ended
    assert streamer.ids == out[0].tolist()


def test_pixels_alone_are_captioned():
    model = make_model(caption_prompt_ids=[2, IMAGE, 4])
    pixels = make_batch()["pixel_values"]
    out = model.generate(pixel_values=pixels, max_new_tokens=3, do_sample=False)
    assert out[:, :6].tolist() == [[2, IMAGE, IMAGE, IMAGE, IMAGE, 4]] * 3
    ids = torch.tensor([[2, IMAGE, IMAGE, IMAGE, IMAGE, 4]] * 3)
    same = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=3, do_sample=False)
    assert torch.equal(out, same)
    model.config.caption_prompt_ids = [2, 4]
    with pytest.raises(ValueError, match="caption_prompt_ids must have one image token"):
        model.generate(pixel_values=pixels)


def test_a_second_turn_continues_the_cache():
    model, batch = make_model(), make_batch()
    ids, pixels = batch["input_ids"][:1], batch["pixel_values"][:2]
    first = model.generate(
        input_ids=ids, pixel_values=pixels, max_new_tokens=3, do_sample=False, eos_token_id=-1,
        return_dict_in_generate=True,
    )  # fmt: skip
    more = torch.cat([first.sequences, torch.tensor([[8, 9]])], 1)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": -1}
    fresh = model.generate(input_ids=more, pixel_values=pixels, **options)
    going_on = model.generate(input_ids=more, past_key_values=first.past_key_values, **options)
    assert torch.equal(fresh, going_on)


def test_speculation_changes_nothing():
    model = make_model()
    ids = torch.tensor([[7, 8, 9, 7, 8, 9, 7, 8]])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
    plain = model.generate(input_ids=ids, **options)
    assert torch.equal(model.generate(input_ids=ids, prompt_lookup_num_tokens=3, **options), plain)


def test_a_static_cache_is_refused():
    model = make_model()
    with pytest.raises(ValueError, match=r"past_key_values must be a cache that grows.*got StaticCache"):
        model.generate(input_ids=torch.tensor([[7, 8, 9]]), max_new_tokens=2, cache_implementation="static")


# Trainer


def test_trainer_takes_steps_and_evaluates(tmp_path):
    model, batch = make_model(), make_batch(padding="right")
    rows = [{k: batch[k][i] for k in ("input_ids", "attention_mask", "labels")} for i in (2, 2, 2, 2)]
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2,
        report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.evaluate()["eval_loss"] < before
    assert trainer.predict(rows).predictions[0].shape[-1] == 61
    trainer.save_model(str(tmp_path / "saved"))
    again = GPT4VForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


# Sizes and bad input


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


def test_embeddings_in_place_of_ids():
    model, batch = make_model(), make_batch()
    embeds = model.get_input_embeddings()(batch["input_ids"])
    rest = {k: v for k, v in batch.items() if k != "input_ids"}
    assert torch.equal(model(**rest, inputs_embeds=embeds).loss, model(**batch).loss)


def test_the_base_model_runs_like_the_whole():
    model, batch = make_model(), prompt(make_batch())
    base = GPT4VModel(model.config).eval()
    base.load_state_dict(model.model.state_dict())
    hidden = base(**batch).last_hidden_state
    assert torch.equal(model.lm_head(hidden), model(**batch).logits)
