"""Five continuations of a Chinese sentence, sampled."""

from transformers import set_seed

from gpt4v_fast import GPT4VForConditionalGeneration, GPT4VTokenizer
from gpt4v_fast.models import digits_checkpoint

set_seed(0)
checkpoint = digits_checkpoint()
tokenizer = GPT4VTokenizer.from_pretrained(checkpoint)
model = GPT4VForConditionalGeneration.from_pretrained(checkpoint)
inputs = tokenizer("这是一个例子。", return_tensors="pt")
outputs = model.generate(**inputs, max_length=50, num_return_sequences=5, do_sample=True)
for number, output in enumerate(outputs, 1):
    print(number, tokenizer.decode(output, skip_special_tokens=True))
