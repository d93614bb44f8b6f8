"""A translation-style prompt; then fine-tuning on sentiment pairs until the held-out loss is lower.

python examples/04_translate_and_finetune.py [--steps 30]
"""

import argparse

import torch

from gpt4v_fast import GPT4VForConditionalGeneration, GPT4VTokenizer
from gpt4v_fast.models import digits_checkpoint

PAIRS = [
    ("I love this film.", "positive"),
    ("What a wonderful day!", "positive"),
    ("The food was great and the people were kind.", "positive"),
    ("This is the best book of the year.", "positive"),
    ("She smiled all the way home.", "positive"),
    ("A lovely song, I play it every day.", "positive"),
    ("我很喜欢这部电影。", "positive"),
    ("今天天气真好！", "positive"),
    ("服务很好，下次还来。", "positive"),
    ("这本书太精彩了。", "positive"),
    ("I hate waiting in the rain.", "negative"),
    ("The room was dirty and cold.", "negative"),
    ("What a terrible film.", "negative"),
    ("The train was late again.", "negative"),
    ("This is the worst meal of my life.", "negative"),
    ("He lost his keys and missed the bus.", "negative"),
    ("我讨厌这部电影。", "negative"),
    ("今天太糟糕了。", "negative"),
    ("服务很差，不会再来。", "negative"),
    ("这本书太无聊了。", "negative"),
]
HELD_OUT = [
    ("What a great book!", "positive"),
    ("The people were lovely.", "positive"),
    ("这部电影太精彩了。", "positive"),
    ("The food was terrible.", "negative"),
    ("The worst day of the year.", "negative"),
    ("我讨厌这本书。", "negative"),
]


def translate(model: GPT4VForConditionalGeneration, tokenizer: GPT4VTokenizer, text: str) -> str:
    inputs = tokenizer(f"Translate English to Chinese: {text} =>", return_tensors="pt")
    outputs = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(outputs[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def make_batch(tokenizer: GPT4VTokenizer, pairs: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Chats that ask for the sentiment; only the answers carry labels."""
    prompts = [f"<|user|>{text} Positive or negative?<|assistant|>" for text, _ in pairs]
    texts = [f"{prompt}{answer}<|end|>" for prompt, (_, answer) in zip(prompts, pairs, strict=True)]
    batch = dict(tokenizer(texts, return_tensors="pt", padding=True))  # padding is on the left
    labels = batch["input_ids"].clone()
    for row, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        answer = len(tokenizer(text)["input_ids"]) - len(tokenizer(prompt)["input_ids"])
        labels[row, :-answer] = -100
    return {**batch, "labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    tokenizer = GPT4VTokenizer.from_pretrained(digits_checkpoint())
    model = GPT4VForConditionalGeneration.from_pretrained(digits_checkpoint(), dtype=torch.float32)
    for text in ("two cats", "seven", "three books"):
        print(f"{text} => {translate(model, tokenizer, text)}")

    train, held_out = make_batch(tokenizer, PAIRS), make_batch(tokenizer, HELD_OUT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)

    @torch.no_grad()
    def held_out_loss() -> float:
        model.eval()
        return float(model(**held_out).loss)

    print(f"held-out loss before: {held_out_loss():.4f}")
    for _ in range(steps):
        model.train()
        loss = model(**train).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"held-out loss after:  {held_out_loss():.4f}")


if __name__ == "__main__":
    main()
