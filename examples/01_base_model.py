"""Hidden states of a sentence from the model without its head."""

from gpt4v_fast import GPT4VModel, GPT4VTokenizer
from gpt4v_fast.models import digits_checkpoint

checkpoint = digits_checkpoint()
tokenizer = GPT4VTokenizer.from_pretrained(checkpoint)
model = GPT4VModel.from_pretrained(checkpoint)
outputs = model(**tokenizer("GPT-4V is amazing!", return_tensors="pt"))
print(tuple(outputs.last_hidden_state.shape))
