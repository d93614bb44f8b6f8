"""The model's generate: greedy, sampling, beams, captions, streams, caches that go on."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from model_cases import IMAGE, make_batch, make_model, prompt
from transformers.generation.streamers import BaseStreamer

from gpt4v_fast.models.gpt4v.modeling_gpt4v import CACHE


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


def test_a_static_cache_is_refused():
    model = make_model()
    with pytest.raises(ValueError, match=r"past_key_values must be a cache that grows.*got StaticCache"):
        model.generate(input_ids=torch.tensor([[7, 8, 9]]), max_new_tokens=2, cache_implementation="static")
