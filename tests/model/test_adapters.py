"""What stands in the place of a plain layer counts: adapters, hooks, quantized or offloaded layers; merged features."""

from __future__ import annotations

import accelerate
import pytest
import torch
import torch.nn.functional as F
from model_cases import IMAGE, make_batch, make_model
from torch import nn

from gpt4v_fast.models.gpt4v.layers_gpt4v import is_plain


class Adapter(nn.Module):
    """PEFT's layout: the base layer's weight and bias under their own names, and a forward that adds to it."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base, self.gain = base, nn.Parameter(torch.tensor(0.5))

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) * (1 + self.gain)


def with_adapter(model):
    model.lm_head = Adapter(model.lm_head)
    return model


def with_bias(model):
    model.lm_head.bias = nn.Parameter(torch.linspace(-3, 3, 61))
    return model


def with_hook(model):
    model.lm_head.register_forward_hook(lambda module, args, out: 2 * out)
    return model


def with_pre_hook(model):
    model.lm_head.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    return model


def with_weight_norm(model):
    nn.utils.parametrizations.weight_norm(model.lm_head)
    return model


def with_int8(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def offloaded(model):
    return accelerate.cpu_offload(model, execution_device="cpu")


HEADS = [with_adapter, with_bias, with_hook, with_pre_hook, with_weight_norm, with_int8, offloaded]


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated")
@pytest.mark.parametrize("change", HEADS, ids=lambda change: change.__name__)
def test_the_loss_is_that_of_the_models_own_logits(change):
    batch, model = make_batch(), make_model(tie_word_embeddings=False)
    plain = model(**batch).loss.item()
    out = change(model)(**batch)
    want = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(out.loss, want, rtol=1e-5, atol=1e-5)
    if change is not offloaded:
        assert abs(out.loss.item() - plain) > 1e-6 or change is with_weight_norm


def test_an_adapter_of_the_head_gets_its_gradient():
    model, batch = with_adapter(make_model()).train(), make_batch()
    model(**batch).loss.backward()
    assert model.lm_head.gain.grad.abs() > 1e-3


def test_a_plain_head_stays_fused():
    model = make_model()
    model.lm_head.forward_is_called = False
    original = nn.Linear.forward

    def watch(self, x):
        model.lm_head.forward_is_called |= self is model.lm_head
        return original(self, x)

    nn.Linear.forward = watch
    try:
        model(**make_batch(), return_logits=False)
    finally:
        nn.Linear.forward = original
    assert not model.lm_head.forward_is_called


def patch_adapter(tower):
    tower.patch_embedding = Adapter(tower.patch_embedding)


def patch_hook(tower):
    tower.patch_embedding.register_forward_hook(lambda module, args, out: 2 * out)


@pytest.mark.parametrize("change", [patch_adapter, patch_hook], ids=lambda change: change.__name__)
def test_patch_embedding_runs_what_stands_there(change):
    features = []
    pixels = make_batch()["pixel_values"]
    for implementation in ("gpt4v_fast", "conv"):
        model = make_model()
        plain = model.get_image_features(pixels)
        change(model.model.vision_tower)
        model.config.vision_config.patch_embed_implementation = implementation
        features.append(model.get_image_features(pixels))
    torch.testing.assert_close(*features, rtol=1e-5, atol=1e-5)
    assert (features[0] - plain).abs().max() > 0.1


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_offloaded_model_runs(where, tied, tmp_path):
    model, batch = make_model(tie_word_embeddings=tied), make_batch()
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    want = model(**batch)
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    got = model(**batch)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)
    batch.pop("input_ids")
    torch.testing.assert_close(model(**batch, inputs_embeds=embeds).loss, want.loss, rtol=1e-5, atol=1e-5)


def test_only_a_plain_layer_is_plain():
    layer = nn.Linear(2, 2)
    assert is_plain(layer, nn.Linear) and not is_plain(layer, nn.Conv2d)
    layer.register_full_backward_hook(lambda module, grad_in, grad_out: None)
    assert not is_plain(layer, nn.Linear)
    patched = nn.Linear(2, 2)
    patched.forward = lambda x: x
    assert not is_plain(patched, nn.Linear)


def test_hooks_on_the_decoder_and_the_tower_run():
    model, seen = make_model(), []
    for part in (model.model.language_model, model.model.vision_tower, model.model.projector):
        part.register_forward_hook(lambda module, args, out: seen.append(type(module).__name__))
    model(**make_batch())
    assert seen == ["GPT4VVisionTower", "GPT4VProjector", "GPT4VDecoder"]


# Image features that the caller has put into inputs_embeds


def merged(model, batch):
    """`batch` with the images' features in inputs_embeds, and where they stand."""
    places = batch["input_ids"] == IMAGE
    features = model.get_image_features(batch["pixel_values"])
    embeds = model.get_input_embeddings()(batch["input_ids"]).masked_scatter(places[..., None], features)
    rest = {name: batch[name] for name in ("attention_mask", "labels") if name in batch}
    return {**rest, "inputs_embeds": embeds, "mm_token_type_ids": places.long()}


@pytest.mark.parametrize("padding", ["left", "right"])
def test_marked_features_are_seen_as_images_are(padding):
    model, batch = make_model(), make_batch(padding)
    assert torch.equal(model(**merged(model, batch)).logits, model(**batch).logits)


def test_marks_say_where_pixels_go():
    model, batch = make_model(), make_batch()
    inputs = {**merged(model, batch), "pixel_values": batch["pixel_values"]}
    inputs["inputs_embeds"] = torch.where(inputs["mm_token_type_ids"][..., None] == 1, 0.0, inputs["inputs_embeds"])
    assert torch.equal(model(**inputs).logits, model(**batch).logits)


def test_bad_marks_are_refused():
    model, batch = make_model(), make_batch()
    inputs = merged(model, batch)
    with pytest.raises(ValueError, match=r"mm_token_type_ids must have shape \(3, 15\), got \(3, 14\)"):
        model(**{**inputs, "mm_token_type_ids": inputs["mm_token_type_ids"][:, 1:]})
    fewer = inputs["mm_token_type_ids"].clone()
    fewer[0, fewer[0].nonzero()[0]] = 0
    with pytest.raises(ValueError, match=r"mark image_seq_length = 4 tokens for each image, got \[7, 4, 0\]"):
        model(**{**inputs, "mm_token_type_ids": fewer})
