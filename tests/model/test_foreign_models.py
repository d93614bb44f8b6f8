"""The attention implementation "gpt4v_fast" in models of transformers' own: the logits of stock PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
from closeness import assert_close, spread_of
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import gpt4v_fast.models  # noqa: F401  (registers the implementation)
from gpt4v_fast.models.gpt4v.attention_gpt4v import gpt4v_fast_attention

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0}
GEMMA = {**DECODER, "sliding_window": 4, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}
EXPERTS = {**DECODER, "sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 2}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**DECODER)),
    "mistral_sliding": (MistralForCausalLM, MistralConfig(**DECODER, sliding_window=4)),
    "gemma2_softcap": (Gemma2ForCausalLM, Gemma2Config(**GEMMA)),
    "gpt_oss_sinks": (GptOssForCausalLM, GptOssConfig(**EXPERTS)),
    "bert_bidirectional": (BertModel, BertConfig(**SIZES)),
}


def make_foreign(name: str) -> torch.nn.Module:
    kind, config = MODELS[name]
    torch.manual_seed(0)
    model = kind(copy.deepcopy(config)).eval()
    with torch.no_grad():  # larger than the initial weights, so that attention is far from uniform
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def make_inputs(padding: str | None) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 60, (2, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 11, dtype=torch.long)
    if padding:
        mask[0, :4] = 0
        mask = mask.flip(1) if padding == "right" else mask
    return {"input_ids": ids, "attention_mask": mask} if padding else {"input_ids": ids}


@torch.no_grad()
def answer(model: torch.nn.Module, implementation: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits (or last hidden states) of real tokens."""
    model.set_attn_implementation(implementation)
    out = model(**inputs)
    states = out.logits if "logits" in out else out.last_hidden_state
    return states[inputs["attention_mask"].bool()] if "attention_mask" in inputs else states


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_stock_pytorch(name, padding):
    model, inputs = make_foreign(name), make_inputs(padding)
    native, fast = (answer(model, which, inputs) for which in ("eager", "gpt4v_fast"))
    # fp32 through two layers differs by 1e-6; a mask that is missing moves these logits by 0.1 to 1.5
    torch.testing.assert_close(fast, native, rtol=1e-4, atol=1e-5)


def test_a_llama_does_not_see_the_future():
    model, inputs = make_foreign("llama"), make_inputs(None)
    before = answer(model, "gpt4v_fast", inputs)
    inputs["input_ids"][:, 6:] = 7
    assert torch.equal(answer(model, "gpt4v_fast", inputs)[:, :6], before[:, :6])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral_sliding", "gpt_oss_sinks"])
def test_generation_is_that_of_stock_pytorch(name, cache):
    model, inputs = make_foreign(name), make_inputs("left")
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    made = []
    for implementation in ("eager", "gpt4v_fast"):
        model.set_attn_implementation(implementation)
        made.append(model.generate(**inputs, **options, cache_implementation=cache))
    assert torch.equal(*made)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32], ids=["boolean", "additive"])
def test_a_bias_of_positions_joins_the_mask(kind):
    generator = torch.Generator().manual_seed(2)
    q, k, v = torch.randn(3, 2, 4, 6, 8, generator=generator)
    bias = torch.randn(1, 4, 6, 6, generator=generator)
    seen = torch.rand(2, 1, 6, 6, generator=generator) > 0.4
    seen[..., 0] = True
    low = torch.finfo(torch.float32).min
    mask = seen if kind == torch.bool else torch.where(seen, 0.0, low)

    def weighted(dtype: torch.dtype) -> torch.Tensor:
        scores = (q.to(dtype) @ k.to(dtype).mT / 8**0.5 + bias.to(dtype)).masked_fill(~seen, -torch.inf)
        return (scores.softmax(-1) @ v.to(dtype)).transpose(1, 2)

    got, _ = gpt4v_fast_attention(torch.nn.Module(), q, k, v, mask, scaling=8**-0.5, position_bias=bias)
    exact = weighted(torch.float64)
    spread = spread_of(lambda: weighted(torch.float64), exact)
    assert_close(got, exact, weighted(torch.float32), name="out", spread=spread)
