"""Byte-level BPE by the `tokenizers` library: any text has tokens, Chinese, English or neither."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ..checkpoint import check_folder

PAD, END, IMAGE, SYSTEM, USER, ASSISTANT = (
    "<|pad|>",
    "<|end|>",
    "<image>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
)
SPECIAL_TOKENS = (PAD, END, USER, IMAGE, ASSISTANT, SYSTEM)  # in the order of their ids

# Words with the space before them, numbers digit by digit (so that arithmetic sees place values), runs of
# symbols, spaces.
WORDS = r"""'(?i:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|end|>' }}{% endgeneration %}"
    "{% elif message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class GPT4VTokenizer(PreTrainedTokenizerFast):
    """Byte-level BPE with the special tokens of the family; pads on the left, as generation needs it.

    A chat is `<|user|>question<|assistant|>answer<|end|>`, an image is `<image>` in the text.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {"tokenizer_file": "tokenizer.json"}
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]
    padding_side = "left"

    # No __init__ here: transformers would then rebuild the backend from the vocabulary alone.
    image_token = IMAGE

    @property
    def image_token_id(self) -> int:
        return self.convert_tokens_to_ids(self.image_token)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> GPT4VTokenizer:
        """transformers' `from_pretrained`; raises FileNotFoundError for a folder without tokenizer.json."""
        check_folder(pretrained_model_name_or_path, ("tokenizer.json",))
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def train_from_iterator(cls, texts: Iterable[str], vocab_size: int, **kwargs: Any) -> GPT4VTokenizer:
        """A tokenizer learnt from `texts`.

        Args:
            vocab_size: at most so many tokens: the 256 bytes, the special tokens, then merges while pairs
                repeat.
        Raises:
            ValueError: a vocab_size below the bytes and special tokens.
        """
        least = 256 + len(SPECIAL_TOKENS)
        if vocab_size < least:
            raise ValueError(
                f"vocab_size must be at least {least} (256 bytes and {len(SPECIAL_TOKENS)} special tokens), "
                f"got {vocab_size}"
            )
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        settings = {
            "bos_token": END,
            "eos_token": END,
            "pad_token": PAD,
            "extra_special_tokens": [USER, IMAGE, ASSISTANT, SYSTEM],
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "padding_side": "left",
        }
        return cls(tokenizer_object=tokenizer, **{**settings, **kwargs})


__all__ = ["GPT4VTokenizer"]
