"""The model: every implementation against fp64, caches, padding, image blocks, loss, Trainer."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from closeness import Spreads, assert_close, spread_of
from model_cases import EAGER, OURS, STOCK, make_batch, make_model, prompt, use
from transformers import DynamicCache, Trainer, TrainingArguments

from gpt4v_fast.models.gpt4v import GPT4VForConditionalGeneration, GPT4VModel
from gpt4v_fast.models.gpt4v.modeling_gpt4v import CACHE


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


def test_the_config_may_ask_for_states_and_weights():
    model, batch = make_model(), prompt(make_batch())
    model.config.output_hidden_states = True
    assert len(model(**batch).hidden_states) == 3
    assert model(**batch, output_hidden_states=False).hidden_states is None
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    assert len(model(**batch).attentions) == 2


@pytest.mark.parametrize("kind", ["text", "padded", "images"])
def test_meta_tensors_have_shapes(kind):
    inputs = prompt(make_batch())
    if kind != "images":
        inputs = {"input_ids": torch.zeros(3, 15, dtype=torch.long), "attention_mask": inputs["attention_mask"]}
    if kind == "text":
        del inputs["attention_mask"]
    model = make_model().to("meta")
    assert model(**{name: tensor.to("meta") for name, tensor in inputs.items()}).logits.shape == (3, 15, 61)


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
                **{CACHE: cache},
                use_cache=True,
            )
            cache, start = out[CACHE], stop
            parts.append(out.logits)
        keep = batch["attention_mask"].bool()
        spread = spread_of(lambda: exact_model(**batch).logits[keep], exact[keep])
        assert_close(torch.cat(parts, 1)[keep], exact[keep], whole[keep], name="cached", spread=spread)


def checkpointed(reentrant: bool) -> GPT4VForConditionalGeneration:
    model = make_model().train()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # before 5.24
    enable({"use_reentrant": reentrant})
    return model


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "saved_tensors"])
@pytest.mark.parametrize("use_cache", [None, True], ids=["no_cache", "cache"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_gradient_checkpointing_changes_nothing(reentrant, use_cache, padding):
    plain, frugal, batch = make_model().train(), checkpointed(reentrant), make_batch(padding)
    losses = [plain(**batch).loss, frugal(**batch, use_cache=use_cache).loss]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for (name, a), b in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_caches_under_gradient_checkpointing():
    model, batch, cache = checkpointed(False), make_batch(), DynamicCache()
    out = model(**batch, use_cache=True, past_key_values=cache)
    assert cache.get_seq_length() == 0 and not any(name in out for name in ("cache", "past_key_values"))
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": -1}
    trained, plain = (m.generate(**prompt(batch), **options) for m in (model, make_model()))  # without gradients: kept
    assert torch.equal(trained, plain)
    with torch.no_grad():
        model(input_ids=torch.tensor([[7, 8]]), past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match=r"past_key_values must be empty or None in training.*got 2 tokens"):
        model(input_ids=torch.tensor([[9]]), past_key_values=cache)


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
