"""The model's generate: greedy, sampling, beams, captions, streams, caches that go on."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from model_cases import IMAGE, make_batch, make_model, prompt
from transformers import MistralConfig, StaticCache
from transformers.generation.streamers import BaseStreamer

from gpt4v_fast.models.gpt4v.generation_gpt4v import CACHE


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
    going_on = model.generate(input_ids=more, **{CACHE: first[CACHE]}, **options)
    assert torch.equal(fresh, going_on)


def test_speculation_changes_nothing():
    model = make_model()
    ids = torch.tensor([[7, 8, 9, 7, 8, 9, 7, 8]])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
    plain = model.generate(input_ids=ids, **options)
    assert torch.equal(model.generate(input_ids=ids, prompt_lookup_num_tokens=3, **options), plain)


OPTIONS = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1}


def one_row() -> dict[str, torch.Tensor]:
    """A prompt with two images."""
    batch = make_batch()
    return {"input_ids": batch["input_ids"][:1], "pixel_values": batch["pixel_values"][:2]}


@pytest.mark.parametrize("way", ["assistant", "itself", "lookup"])
def test_speculation_with_images_changes_nothing(way):
    model, inputs = make_model(), one_row()
    drafts = {"assistant": make_model(text={"num_hidden_layers": 1}), "itself": model}
    how = {"prompt_lookup_num_tokens": 3} if way == "lookup" else {"assistant_model": drafts[way]}
    assert torch.equal(model.generate(**inputs, **OPTIONS, **how), model.generate(**inputs, **OPTIONS))


@pytest.mark.parametrize("implementation", ["gpt4v_fast", "sdpa", "eager"])
@pytest.mark.parametrize("images", [False, True], ids=["text", "images"])
def test_a_static_cache_changes_nothing(images, implementation):
    model = make_model()
    model.set_attn_implementation(implementation)
    inputs = prompt(make_batch()) if images else {"input_ids": torch.tensor([[7, 8, 9]])}
    static = model.generate(**inputs, **OPTIONS, cache_implementation="static")
    assert torch.equal(static, model.generate(**inputs, **OPTIONS))


def test_a_cache_of_sliding_windows_is_refused():
    model = make_model()
    cache = StaticCache(config=MistralConfig(num_hidden_layers=2, sliding_window=4), max_cache_len=16)
    with pytest.raises(ValueError, match="past_key_values must keep all tokens, got a cache of sliding windows"):
        model(input_ids=torch.tensor([[7, 8, 9]]), past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no_cache"])
@pytest.mark.parametrize("images", ["text", "pixels", "merged"])
@pytest.mark.parametrize("ways", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 1, "num_return_sequences": 2}])
def test_a_prompt_of_embeddings_is_a_prompt(ways, images, use_cache):
    model, inputs = make_model(), prompt(make_batch())
    if images == "text":
        inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, 5)
        del inputs["pixel_values"]
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    like = {name: tensor for name, tensor in inputs.items() if name != "input_ids"}
    if images == "merged":
        places = inputs["input_ids"] == IMAGE
        embeds = embeds.masked_scatter(places[..., None], model.get_image_features(like.pop("pixel_values")))
        like["mm_token_type_ids"] = places.long()
    options = {**OPTIONS, **ways}
    want = model.generate(**inputs, **options)[:, 15:]
    assert torch.equal(model.generate(**like, inputs_embeds=embeds, **options, use_cache=use_cache), want)


def test_a_second_turn_may_bring_an_image():
    model, inputs = make_model(), one_row()
    first = model.generate(**inputs, **OPTIONS, return_dict_in_generate=True)
    more = torch.cat([first.sequences, torch.tensor([[8, *[IMAGE] * 4, 9]])], 1)
    pixels = make_batch()["pixel_values"]
    fresh = model.generate(input_ids=more, pixel_values=pixels, **OPTIONS)
    assert torch.equal(
        model.generate(input_ids=more, pixel_values=pixels[2:], **{CACHE: first[CACHE]}, **OPTIONS), fresh
    )
